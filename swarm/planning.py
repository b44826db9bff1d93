"""Which route a request takes: the router's choice, made on ways that somebody has measured.

The router counts a way that nobody has measured as no time at all, so that it cannot overlook the
best route for lack of knowledge; it names such ways (`Route.unmeasured`). Before the route is used
they are measured, all at once: the client's own ways by itself, those between two peers by one of
the two. Then the router chooses again. Few rounds suffice, since with every round the ways of the
best route and of its spares are known. A way that cannot be measured counts as very long for a
minute. One that let a session down, though both its ends live, is measured before another takes it:
see `cut`. Where no route keeps the limits, the ways of the best ones are measured too, so that the
latency which the error calls achievable is one.

Peers that failed lately are done without where that is possible (`hexswarm.bans`): first the
banned and, by lot, those on probation, then the banned alone, and if there is no route without them
they are used. Those just seen dead are not in the directory until they announce themselves anew.
The route of a running session that lost stages is changed as little as possible (`replan`,
`hexswarm.holes`); that is measured only briefly, since every moment of it is a gap in the answer.

Rejected: a default length for unknown ways. Too long, it hides the best route for ever, because
nobody measures what nobody uses; too short, a request with a limit ends up on a route that breaks
it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from hexswarm.bans import Bans
from hexswarm.clock import Clock
from hexswarm.errors import HexswarmError, NoRoute
from hexswarm.holes import fill, kept
from hexswarm.membership import Membership
from hexswarm.options import Wishes
from hexswarm.records import (
    Coordinates,
    Link,
    ModelSpec,
    PeerId,
    Route,
    RouteRequest,
    uncovered,
)
from hexswarm.router import vivaldi
from hexswarm.router.cost import budgets
from hexswarm.router.experience import Experience
from hexswarm.router.explain import Budget, Explanation, budget, explain
from hexswarm.router.network import Snapshot
from hexswarm.router.routing import find_route
from hexswarm.runtime import OpenSession, SessionRuntime
from hexswarm.view import Heard, Leases, View

log = logging.getLogger(__name__)

ROUNDS = 4
"""Of measuring and choosing again; then the best route is taken with what is known."""
MEASURE_ALL_S = 4.0
"""All rounds together: in a swarm that is far away and new to us four would take ten seconds."""
MEASURE_S = 3.0
"""One round of measuring: a dial and three round trips of the longest ways on earth."""
REPAIR_MEASURE_S = 0.3
"""The same for the route of an answer that stands still; what is not known then is not awaited."""
JUST_ABOVE = 1.01
"""Limits of the routes that come next to the best achievable."""
SPREAD = 0.1
"""Routes within a tenth of the best are near-equal: announced loads are up to 30 s old and
predictions err by about as much, so the choice between them is a matter of spreading the load."""
ASKED = 3
"""Repairs of one route whose newcomers are asked at once whether they live."""
NEVER_S = 1e-9
"""A limit that nobody keeps."""
PLACE_S = 1.0
"""Longest wait of a request for this client's coordinates."""
PLACE_AGAIN_S = 60.0
"""Period of asking for the coordinates, which are measured anew when they are old."""
PLACE_RETRY_S = 5.0
"""The same while they are not known."""

Pair = tuple[PeerId, PeerId]


@dataclass(frozen=True, slots=True)
class Plan:
    """A route and what it was chosen for and on."""

    snapshot: Snapshot
    request: RouteRequest
    route: Route

    def budget(self) -> Budget:
        """Where the predicted time goes."""
        return budget(self.snapshot, self.request, self.route)

    def promises(self) -> tuple[float, ...]:
        """The seconds a step that each stage is asked to promise; 0 without a limit."""
        return budgets(self.snapshot, self.request, self.route.stages)


class Planner:
    """Everything of a client that chooses."""

    def __init__(
        self, member: Membership, runtime: SessionRuntime, clock: Clock, rng: random.Random
    ) -> None:
        self.experience = Experience()
        self.bans = Bans()
        self.lost_s = -math.inf
        """When a peer was last found dead, or of no use."""
        self.spread = SPREAD
        self.coordinates: Coordinates | None = None
        self._member = member
        self._clock = clock
        self._rng = rng
        self._runtime = runtime
        self._leases = Leases()
        self._view = View(member.directory, clock, self.experience, self._loads)
        self._previous: Route | None = None
        self._placing: asyncio.Task[None] | None = None
        self._placed = asyncio.Event()
        self._choosing = asyncio.Lock()

    # --- where we are -----------------------------------------------------------------------

    def start(self) -> None:
        """Find this client's coordinates, in the background, and keep them fresh."""
        self._placing = asyncio.create_task(self._place_for_ever())

    async def close(self) -> None:
        if self._placing is not None:
            self._placing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._placing
            self._placing = None

    async def _place_for_ever(self) -> None:
        while True:
            try:
                self.coordinates = await self._member.place(self._rng, vivaldi.fit)
            except HexswarmError as error:
                log.info("this client's place is not known: %s", error)
            self._placed.set()
            await asyncio.sleep(PLACE_RETRY_S if self.coordinates is None else PLACE_AGAIN_S)

    async def _wait_for_place(self) -> None:
        """The first request waits a moment: with coordinates far fewer ways need measuring."""
        if self._placing is not None and not self._placed.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PLACE_S):
                    await self._placed.wait()

    # --- choosing ---------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """The swarm as known now."""
        member = self._member
        return self._view.snapshot(member.transport.local, member.links.ways, self.coordinates)

    def request(
        self, spec: ModelSpec, prompt_tokens: int, new_tokens: int, wishes: Wishes
    ) -> RouteRequest:
        return RouteRequest(
            model=spec.digest,
            layers=spec.layers,
            hidden_bytes=spec.hidden * 4,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            client=self._member.transport.local,
            model_name=spec.name,
            warm=frozenset(self._member.links.peers()),
            spread=self.spread,
            previous=self._previous,
            **wishes.request(),
        )

    async def plan(self, request: RouteRequest, *, once: bool = False) -> Plan:
        """The best route for `request`, every way of it measured if that can be done.

        Raises NoRoute; unless `once`, the directory is read again before that.
        """
        await self._wait_for_place()
        try:
            return await self._avoiding(request)
        except NoRoute:
            if once:
                raise
            try:
                await self._member.refresh(request.model)  # a peer may have come since
            except Exception as error:  # hivemind raises many kinds; the view stays old
                log.warning("reading the directory failed: %r", error)
            return await self._avoiding(request)

    async def _avoiding(self, request: RouteRequest) -> Plan:
        """The best route of peers that did not fail lately; if there is none, of all."""
        for avoided in self._avoided():
            with contextlib.suppress(NoRoute):
                plan = await self._plan(replace(request, deny=request.deny | avoided))
                return replace(plan, request=request)
        return await self._plan(request)

    def _avoided(self) -> Iterator[frozenset[PeerId]]:
        """Whom to try to do without, from many to few."""
        now = self._clock.monotonic()
        drawn, banned = self.bans.draw(now, self._rng), self.bans.banned(now)
        if drawn:
            yield drawn
        if banned and banned != drawn:
            yield banned

    async def replan(
        self,
        plan: Plan,
        gone: frozenset[PeerId],
        known: int,
        left: int,
        deny: frozenset[PeerId],
    ) -> Plan:
        """The route of a running session without the peers in `gone`, otherwise as it is if that
        can be: `known` tokens are to be replayed and at most `left` to come.

        Peers in `deny` do not come in. If no route keeps the request's limits, the plan's
        request has none. Raises NoRoute.
        """
        request = replace(
            plan.request,
            prompt_tokens=known,
            new_tokens=max(left, 0),
            ttft_s=None,
            previous=None,
            warm=frozenset(self._member.links.peers()),
        )
        for avoided in (*self._avoided(), frozenset[PeerId]()):
            asked = replace(request, deny=request.deny | deny | avoided)
            try:
                view, route, within = await self._fill(plan, asked, gone)
            except NoRoute:
                if not avoided:
                    raise
            else:
                return Plan(view, replace(plan.request, tpot_s=within.tpot_s), route)
        raise AssertionError("the last try raises")

    async def _fill(
        self, plan: Plan, request: RouteRequest, gone: frozenset[PeerId]
    ) -> tuple[Snapshot, Route, RouteRequest]:
        """Newcomers without a link may be as dead as whoever is gone, so they are asked, and in the
        same moment those who would come in instead. The first choice that answers is taken, if it
        changes no more of the route and keeps the same limits."""
        local = self._member.transport.local
        ways, strange = set[Pair](), frozenset[PeerId]()
        first = self._filled(plan, request, gone)
        with contextlib.suppress(NoRoute):
            choice = first
            for _ in range(ASKED):
                ways |= {*choice[1].unmeasured}
                if not (fresh := self._strangers(plan, choice[1])):
                    break
                ways |= {(local, peer) for peer in fresh}
                strange |= fresh
                choice = self._filled(plan, request, gone, strange)
        if not ways:
            return first
        await self._measure(first[0], request.model, ways, REPAIR_MEASURE_S)
        first = self._filled(plan, request, gone)  # others may have gone meanwhile
        mute = frozenset(peer for peer in strange if not self._member.links.connected(peer))
        if not mute:
            return first
        with contextlib.suppress(NoRoute):
            choice = self._filled(plan, request, gone, mute)
            same = choice[2].tpot_s == first[2].tpot_s
            same &= kept(plan.route, choice[1]) >= kept(plan.route, first[1])
            if same and not self._strangers(plan, choice[1]):
                return choice
        return first

    def _filled(
        self,
        plan: Plan,
        request: RouteRequest,
        gone: frozenset[PeerId],
        deny: frozenset[PeerId] = frozenset(),
    ) -> tuple[Snapshot, Route, RouteRequest]:
        """The best repair, as far as is known now, and the request whose limits it keeps."""
        view, asked = self._going_on(plan, replace(request, deny=request.deny | deny))
        return view, *fill(view, asked, plan.route, gone, self._clock.monotonic(), self._rng)

    def _strangers(self, plan: Plan, route: Route) -> frozenset[PeerId]:
        """Newcomers to the plan's route to whom we have no link."""
        fresh = frozenset(_peers(route)) - frozenset(_peers(plan.route))
        return frozenset(peer for peer in fresh if not self._member.links.connected(peer))

    def _going_on(self, plan: Plan, request: RouteRequest) -> tuple[Snapshot, RouteRequest]:
        """The swarm as known now, with peers of the plan that the directory lost as they were.

        Whoever is in the route but not in the directory can go on, if it is well, not begin.
        """
        view, model = self.snapshot(), plan.request.model
        away = frozenset(_peers(plan.route)) - view.columns(model).index.keys()
        for peer in away:
            view = view.updated(plan.snapshot.announcement(model, peer), self._clock.wall())
        return view, replace(request, deny=request.deny | away)

    async def _plan(self, request: RouteRequest) -> Plan:
        until_s = self._clock.monotonic() + MEASURE_ALL_S
        for left in reversed(range(ROUNDS + 1)):
            try:
                view, route = await self._choose(request)
            except NoRoute as error:
                view = self.snapshot()
                ways = self._ways_of_best(view, request, error)
                if not ways or not left:
                    raise
            else:
                ways = {*route.unmeasured} | self._view.told.doubted(_ways(route))
                if not ways or not left:
                    break
                ways |= {way for spare in route.spares for way in spare.unmeasured}
            within_s = min(MEASURE_S, max(until_s - self._clock.monotonic(), REPAIR_MEASURE_S))
            await self._measure(view, request.model, ways, within_s)
        return Plan(view, request, route)

    async def _choose(self, request: RouteRequest) -> tuple[Snapshot, Route]:
        """One route in each turn of the loop, however many are asked for at once: what comes from
        the peers is read in between, and their pings are answered."""
        async with self._choosing:
            await asyncio.sleep(0)
            view = self.snapshot()
            return view, find_route(view, request, self._clock.monotonic(), self._rng)

    def _ways_of_best(self, view: Snapshot, request: RouteRequest, error: NoRoute) -> set[Pair]:
        """Unmeasured ways of what is said to be achievable: with them it is a bound, no promise."""
        ways: set[Pair] = set()
        for limit, best_s in error.achievable.items():
            no_limits = replace(without_habits(request), ttft_s=None, tpot_s=None)
            only: dict[str, Any] = {limit: best_s * JUST_ABOVE}
            asked = replace(no_limits, **only)
            with contextlib.suppress(NoRoute):
                route = find_route(view, asked, self._clock.monotonic(), self._rng)
                ways |= {*route.unmeasured}
        return ways

    async def quickest_s(self, request: RouteRequest) -> float | None:
        """The least time per token that can be had, at the request's percentile, as known now."""
        asked = replace(without_habits(request), ttft_s=None, tpot_s=NEVER_S)
        try:
            await self._plan(asked)
        except NoRoute as error:
            return error.achievable.get("tpot_s")
        return None

    async def explain(self, request: RouteRequest) -> tuple[Snapshot, Explanation]:
        """Why `plan` chooses as it does, or why it cannot; and the view it is said of."""
        with contextlib.suppress(NoRoute):
            await self.plan(request)  # what the reasons rest on is measured by that
        view = self.snapshot()
        return view, explain(view, request, self._clock.monotonic(), self._rng)

    def roomy(self, request: RouteRequest) -> bool:
        """Could all layers hold the request's KV, if nobody else were there?"""
        items = self.snapshot().of_model(request.model)
        large = [a.span for a in items if a.serving and not 0 < a.kv_tokens < request.kv_tokens]
        return not uncovered(large, request.layers)

    def _loads(self) -> Heard:
        return self._leases.corrected(self._runtime.loads)

    def asked(self, session: OpenSession) -> None:
        """The stages of `session` are asked for its lease, just now."""
        self._leases.asked(session)

    def answered(self, session: OpenSession) -> None:
        """The stages of `session` have granted or refused its lease, just now."""
        self._leases.answered(session, self._runtime.loads)

    def use(self, route: Route) -> None:
        """A session was opened along `route`: near-equal ones give way to it from now on."""
        self._previous = route

    def leave(self, peers: Iterable[PeerId]) -> None:
        """These peers refused or died: a route through them is no habit to keep."""
        if self._previous and {stage.peer for stage in self._previous.stages} & {*peers}:
            self._previous = None

    # --- measuring --------------------------------------------------------------------------

    async def _measure(
        self, view: Snapshot, model: str, pairs: Iterable[Pair], within_s: float = MEASURE_S
    ) -> None:
        """Measure these ways now, all at once, and remember what came of it."""
        async with asyncio.TaskGroup() as group:
            tasks = {
                pair: group.create_task(self._way(view, model, *pair, within_s))
                for pair in sorted({*pairs})
            }
        now = self._clock.monotonic()
        for pair, task in tasks.items():
            way = task.result()
            if way is not None or within_s > 2 * REPAIR_MEASURE_S:  # in haste it says little
                self._view.told.remember(pair, way, now)

    async def _way(
        self, view: Snapshot, model: str, a: PeerId, b: PeerId, within_s: float
    ) -> Link | None:
        local, links = self._member.transport.local, self._member.links
        if b == local:
            a, b = b, a
        to = view.announcement(model, b).addresses
        try:
            async with asyncio.timeout(within_s):
                if a == local:
                    return await links.measure(b, to)
                await links.connect(a, view.announcement(model, a).addresses)
                return await links.ask(a, b, to)
        except (TimeoutError, HexswarmError) as error:
            log.info("the way from %s to %s is not known: %r", a[-8:], b[-8:], error)
            return None

    # --- learning ---------------------------------------------------------------------------

    def failed(self, peer: PeerId, *, blameless: bool = False, heard: bool = False) -> None:
        """This peer is dead or of no use: it is not in the swarm until it announces itself anew.

        It is no strike against it if that is hearsay, or it had said that it would go. One that is
        `heard` is alive, if cut off from a neighbour: others are preferred to it.
        """
        self.lost_s = self._clock.monotonic()
        if not heard:
            self._member.directory.forget(peer)
        self.leave([peer])
        if not blameless:
            self.bans.strike(peer, self.lost_s, self._rng)

    def cut(self, a: PeerId, b: PeerId) -> None:
        """Two peers that live seem not to hear each other: the way between them is measured before
        a new session takes it, whatever was measured, announced or estimated of it."""
        self._view.told.doubt((a, b))

    def announced(self, plan: Plan) -> dict[PeerId, float]:
        """Compute seconds per token of the route's peers, without what experience had added."""
        now = self._clock.monotonic()
        return {
            hop.peer: hop.compute_s / self.experience.factor(hop.peer, now)
            for hop in plan.budget().hops
        }

    def observed(self, plan: Plan, announced: Mapping[PeerId, float], tpot_s: float) -> None:
        """An answer along the plan's route took so long per token (median)."""
        route, now = plan.route, self._clock.monotonic()
        slack_s = max(0.0, route.tpot_p95_s - route.tpot_s)
        self.experience.observe(announced, route.tpot_s, tpot_s, now, slack_s=slack_s)
        self._view.doubt(announced)

    def told(self, announced: Mapping[PeerId, float], compute_s: Mapping[PeerId, float]) -> None:
        """The stages' own words on their computing, seconds per token."""
        now = self._clock.monotonic()
        for peer, told_s in compute_s.items():
            self.experience.observe_stage(peer, announced[peer], told_s, now)
        self._view.doubt(compute_s)


def without_habits(request: RouteRequest) -> RouteRequest:
    """The same request of a client that has no last route and draws no lots: for dry runs."""
    return replace(request, spread=0.0, previous=None)


def _ways(route: Route) -> list[Pair]:
    """Between its stages, in a ring."""
    peers = _peers(route)
    return [(a, b) for a, b in zip(peers, [*peers[1:], *peers[:1]], strict=True) if a != b]


def _peers(route: Route) -> list[PeerId]:
    return [stage.peer for stage in route.stages]
