"""A running turn under watch: what `hexswarm.failover` knows of it, and what its plans say."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from hexswarm.detector import Detector
from hexswarm.instructions import Turn
from hexswarm.planning import Plan
from hexswarm.records import PeerId, Route
from hexswarm.runtime import OpenSession
from hexswarm.trace import Place, Repair

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

    def cut(self, peer: PeerId, beside: PeerId) -> None:
        """The way between a stage and its neighbour is lost, as far as is known."""
        self.beside[peer] = beside
        self.cuts.update((peer, beside))

    def instead(self, gone: frozenset[PeerId]) -> frozenset[PeerId]:
        """Who else may be replaced to do without the ways that were lost."""
        return frozenset(self.beside.get(peer, peer) for peer in gone)

    stall: Stall | None = None

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
