"""A running turn under watch: what `hexswarm.failover` knows of it, and what its plans say."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from hexswarm.detector import Detector
from hexswarm.errors import HexswarmError, NoRoute, PeerLost
from hexswarm.instructions import Turn
from hexswarm.planning import Plan
from hexswarm.records import PeerId, Route
from hexswarm.runtime import OpenSession
from hexswarm.trace import Place, Repair

AVOID_S = 2.0
"""So long a peer that failed this turn does not come into it again; twice as long each time."""
ALONE_S = 1.0
"""The same where there is nobody else, each time: what broke may have been the way between two."""
WORTH = 1.5
"""A turn moves to another route that makes it so many times as fast."""


@dataclass(slots=True, eq=False)
class Ward:
    """A running turn."""

    session: OpenSession
    plan: Plan
    turn: Turn
    detector: Detector
    promised_s: dict[PeerId, float]
    """What each stage was asked to promise."""
    repairs: list[Repair] = field(default_factory=list)
    news: asyncio.Event = field(default_factory=asyncio.Event)
    """Something happened that whoever mends it waits for."""
    mending: asyncio.Task[None] | None = None
    asking: asyncio.Task[None] | None = None
    leaving: set[PeerId] = field(default_factory=set)
    """Stages that drain and that it should leave before they are gone."""
    slow: dict[PeerId, float] = field(default_factory=dict)
    """Stragglers, with their seconds a step."""
    avoid: dict[PeerId, float] = field(default_factory=dict)
    """Until when these do not come in."""
    refrain: dict[PeerId, float] = field(default_factory=dict)
    """The same where there is nobody else."""
    failures: Counter[PeerId] = field(default_factory=Counter)
    noted: set[PeerId] = field(default_factory=set)
    """Losses of this attempt that were seen to."""
    beside: dict[PeerId, PeerId] = field(default_factory=dict)
    """Of those lost who may only be cut off from a neighbour: that neighbour."""
    cuts: Counter[PeerId] = field(default_factory=Counter)
    """In how many ways that were lost each was an end."""

    stall: Stall | None = None
    """The gap in which it is now."""

    @property
    def known(self) -> int:
        """Token ids known to the client."""
        return len(self.session.machine.cached)

    @property
    def left(self) -> int:
        """Tokens that may still come."""
        return self.turn.end + self.turn.max_new - self.known

    @property
    def alive(self) -> bool:
        return self.session.machine.running and self.session.machine.failed is None

    # --- whom to do without ---------------------------------------------------------------------

    def avoid_for_now(self, peer: PeerId, now: float, retry_s: float = 0.0) -> None:
        """It failed this turn; longer with each time."""
        self.failures[peer] += 1
        avoid_s = AVOID_S * 2.0 ** (self.failures[peer] - 1)
        self.avoid[peer] = now + max(avoid_s, retry_s)
        self.refrain[peer] = now + max(ALONE_S, retry_s)

    def avoided(self, now: float, *, alone: bool = False) -> frozenset[PeerId]:
        """Who does not come in; with `alone`, who does not though there is nobody else."""
        until = self.refrain if alone else self.avoid
        return frozenset(peer for peer, until_s in until.items() if until_s > now)

    def cut(self, peer: PeerId, beside: PeerId) -> None:
        """The way between a stage and its neighbour is lost, as far as is known."""
        self.beside[peer] = beside
        self.cuts.update((peer, beside))

    def instead(self, gone: frozenset[PeerId]) -> frozenset[PeerId]:
        """Who else may be replaced to do without the ways that were lost."""
        return frozenset(self.beside.get(peer, peer) for peer in gone)

    # --- gaps -----------------------------------------------------------------------------------

    def stop(self, now: float) -> Stall:
        """The gap in which the turn is now; a new one if tokens came since the last."""
        self.settle(now)
        if self.stall is None:
            since_s = min(now, self.detector.token_s)
            self.stall = Stall(since_s, now, self.known, self.session.route, {})
        self.stall.mended_at = None
        return self.stall

    def settle(self, token_s: float, *, over: bool = False) -> None:
        """A gap is over once the new route has given a token."""
        stall = self.stall
        if stall is None or stall.mended_at is None or (self.known <= stall.mended_at and not over):
            return
        self.stall = None
        stall_s = max(0.0, token_s - stall.since_s)
        repair = repaired(stall.route, self.session.route, stall.gone, stall.position, stall_s)
        if repair is not None:
            self.repairs.append(repair)


@dataclass(slots=True)
class Stall:
    """The gap in an answer while its route changes."""

    since_s: float
    """When the last token came."""
    began_s: float
    position: int
    route: Route
    """Before."""
    gone: dict[PeerId, str]
    """Who is replaced, and why."""
    mended_at: int | None = None
    """The ids that were known when the stages were told to go on."""


# --- what a plan says ---------------------------------------------------------------------------


def expected(plan: Plan) -> dict[PeerId, float]:
    """Seconds of a step at each stage, as predicted."""
    return {hop.peer: hop.compute_s + hop.queue_s for hop in plan.budget().hops}


def promised(plan: Plan) -> dict[PeerId, float]:
    peers = (stage.peer for stage in plan.route.stages)
    return dict(zip(peers, plan.promises(), strict=True))


def pays(old: Plan, new: Plan, slow: Mapping[PeerId, float], pace_s: float | None) -> bool:
    """Would the ring be `WORTH` times as fast with others in place of the slow?

    What stays is known as measured: it is in the pace. Of the newcomers there is the prediction.
    """
    if pace_s is None:
        return False
    before = {hop.peer for hop in old.budget().hops}
    links_s = [sum(hop.link_s for hop in plan.budget().hops) for plan in (old, new)]
    come_s = sum(time_s for peer, time_s in expected(new).items() if peer not in before)
    then_s = pace_s - sum(slow.values()) + come_s + max(0.0, links_s[1] - links_s[0])
    return pace_s >= WORTH * max(0.0, then_s)


def replay_s(plan: Plan, known: int, before: Iterable[PeerId]) -> float:
    """Seconds that the newcomers of a route need to compute what is known."""
    stays, model = frozenset(before), plan.request.model
    return sum(
        plan.snapshot.announcement(model, stage.peer).speed.prefill_layer_s
        * len(stage.span)
        * known
        for stage in plan.route.stages
        if stage.peer not in stays
    )


def repaired(
    before: Route, after: Route, gone: Mapping[PeerId, str], position: int, stall_s: float
) -> Repair | None:
    """What changed between two routes; None if nothing did."""
    old = {Place(stage.peer, stage.span) for stage in before.stages if stage.peer not in gone}
    now = [Place(stage.peer, stage.span) for stage in after.stages]
    kept = old & set(now)
    lost = [Place(stage.peer, stage.span) for stage in before.stages]
    lost = [place for place in lost if place not in kept]
    if not lost:
        return None
    why = next((gone[place.peer] for place in lost if place.peer in gone), "gave way")
    by = tuple(place for place in now if place not in kept)
    return Repair(tuple(lost), by, position, stall_s, why)


def lost_for_good(ward: Ward, why: NoRoute | None, repair_s: float) -> HexswarmError:
    """What the caller of an answer is told that could not go on for so long."""
    broken = ward.session.machine.broken
    peer, cause = next(iter(broken.items()))
    spans = {stage.peer: stage.span for stage in ward.session.route.stages}
    first, end = spans[peer].first, spans[peer].end
    how = cause.how if isinstance(cause, PeerLost) else f"failed: {cause.cause}"
    if why is None:
        how += f", and in {repair_s:.0f} s nobody could take over"
    elif why.binding in ("coverage", "state", "peers"):  # whom we avoid ourselves is no reason
        how += f", and in {repair_s:.0f} s nobody else was found for these layers"
    else:
        how += f", and in {repair_s:.0f} s nobody could take over: {why.cause}"
    final = PeerLost(peer, (first, end), how)
    if why is not None:
        final.remedy = f"start another with `hexswarm peer --span {first}:{end}`"
    final.__cause__ = why or cause
    return final
