"""How clients choose a ring in `herd.py`: two rules of other systems, written anew, and ours.

All see the same stale views and the same true round trips, and all run on our ring, which the other
systems do not have; so what differs is the choice alone.

*Petals' rule*: the shortest path client -> server -> ... -> client over one-way links, 18 ms a hop,
and 1/throughput for each block, where throughput is what the server measured when it was idle. A
server is left at the end of its span only. One that announces too little cache pays 10 s.

*Cost per layer once a stage*: the dynamic program that Parallax has for choosing a chain: a node
costs its latency for one layer (measured, so it grows with its batch, and 5 % more when full), not
multiplied by the layers that it serves; an edge costs half a round trip.

*Ours*: `hexswarm.router.routing.find_route`.
"""

from __future__ import annotations

import math
import random
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

from herd_events import JITTER, Choice, View
from herd_world import HIDDEN_BYTES, LAYERS, MODEL, Request, World

from hexswarm.errors import NoRoute
from hexswarm.records import Announcement, Link, Load, PeerId, Route, RouteRequest
from hexswarm.router import cost
from hexswarm.router.network import Snapshot, snapshot
from hexswarm.router.routing import find_route

PETALS_HOP_S = 0.018
PETALS_NO_CACHE_S = 10.0
SPREAD = 0.1
"""As the client asks (swarm/planning.py)."""
FULL_SHARE = 0.05
"""By how much a full node counts slower in the cost per layer."""


class Shortest(ABC):
    """A policy that takes a shortest path over servers that are left at the end of their span."""

    def __init__(self, world: World) -> None:
        self.world = world

    @abstractmethod
    def serve_s(self, item: Announcement, layers: int) -> float:
        """What the rule counts for these layers at a server."""

    def enter_s(self, item: Announcement, request: Request) -> float:
        return 0.0

    def told(  # noqa: B027  a hook that may stay empty
        self, now: float, client: int, loads: dict[int, Load], *, opened: bool
    ) -> None:
        """Loads told at opening are ours alone."""

    def route(
        self, now: float, view: View, client: int, request: Request, refused: frozenset[int]
    ) -> Choice | None:
        way, items = self.world.one_way_s, view.announcements
        to_client = self.world.client_way_s[self.world.sites[client]]
        entry = [self.enter_s(item, request) for item in items]
        rest = [math.inf] * len(items)
        """From the end of the peer's span to the client."""
        after = [-1] * len(items)
        able = [index for index in range(len(items)) if index not in refused]
        for one in sorted(able, key=lambda index: -items[index].span.end):
            end = items[one].span.end
            if end == LAYERS:
                rest[one] = to_client[one]
                continue
            for other in able:
                span = items[other].span
                if span.first <= end < span.end:
                    cost = way[one, other] + entry[other] + rest[other]
                    cost += self.serve_s(items[other], span.end - end)
                    if cost < rest[one]:
                        rest[one], after[one] = cost, other
        heads = [
            (
                to_client[one]
                + entry[one]
                + self.serve_s(items[one], items[one].span.end)
                + rest[one],
                one,
            )
            for one in able
            if items[one].span.first == 0
        ]
        best, peer = min(heads, default=(math.inf, -1))
        if best == math.inf:
            return None
        ring: list[tuple[int, int]] = []
        reached = 0
        while peer >= 0:
            end = items[peer].span.end
            ring.append((peer, end - reached))
            reached, peer = end, after[peer]
        return Choice(ring)


class Petals(Shortest):
    """Petals' rule, see the module's docstring."""

    def serve_s(self, item: Announcement, layers: int) -> float:
        return layers * item.speed.decode_layer_s

    def enter_s(self, item: Announcement, request: Request) -> float:
        lacks = item.free_kv_tokens < request.prompt + request.answer
        return PETALS_HOP_S + PETALS_NO_CACHE_S * lacks


class PerLayer(Shortest):
    """Cost per layer once a stage, see the module's docstring."""

    def serve_s(self, item: Announcement, layers: int) -> float:
        layer_s = item.speed.decode_layer_s + item.speed.row_layer_s * max(0.0, item.rows - 1)
        full = 1 - item.free_kv_tokens / item.kv_tokens
        return layer_s * (1 + FULL_SHARE * full)

    def enter_s(self, item: Announcement, request: Request) -> float:
        return 0.0 if item.free_kv_tokens >= request.prompt + request.answer else math.inf


@dataclass(slots=True)
class _Client:
    previous: Route | None = None
    attempt: Route | None = None
    """What was tried last for the request under way."""
    heard: dict[int, tuple[float, Load]] = field(default_factory=dict)


Search = Callable[[Snapshot, RouteRequest, float, random.Random], Route]


@dataclass(frozen=True, slots=True)
class Limits:
    """Which requests have a limit on the time per token, and which."""

    base_s: float
    """The limit of a request is its strictness times this."""
    share: float = 1.0
    """Of the requests that have one."""
    percentile: float = 95.0
    promised: bool = True
    """Whether the stages are asked to promise it."""

    def of(self, request: Request) -> float | None:
        return request.strictness * self.base_s if request.lot < self.share else None


class Ours:
    """`find_route` as the client uses it; the switches take single ideas away.

    A refused request takes the first spare without the peers that refused, then asks again.
    """

    def __init__(
        self,
        world: World,
        seed: int,
        *,
        spread: float = SPREAD,
        piggyback: bool = True,
        hysteresis: bool = True,
        limits: Limits | None = None,
        search: Search = find_route,
    ) -> None:
        self.world, self.spread, self.limits = world, spread, limits
        self.piggyback, self.hysteresis = piggyback, hysteresis
        self.search = search
        self.rng = random.Random(seed)
        self.clients = [_Client() for _ in world.sites]
        self.index = {machine.peer: number for number, machine in enumerate(world.machines)}
        self.peers = frozenset(self.index)
        self.links = links(world)
        self.snapshots: dict[int, tuple[tuple[int, int], Snapshot]] = {}

    def route(
        self, now: float, view: View, client: int, request: Request, refused: frozenset[int]
    ) -> Choice | None:
        state = self.clients[client]
        wanted, seen = self.wanted(client, request, refused, state), self.seen(now, view, state)
        route = _spare(state.attempt, wanted.deny) if refused else None
        if route is None:
            try:
                route = self.search(seen, wanted, now, self.rng)
            except NoRoute:
                return None
        state.attempt = route
        ring = [(self.index[stage.peer], len(stage.span)) for stage in route.stages]
        if wanted.tpot_s is None or self.limits is None or not self.limits.promised:
            return Choice(ring)
        return Choice(ring, cost.budgets(seen, wanted, route.stages))

    def wanted(
        self, client: int, request: Request, refused: frozenset[int], state: _Client
    ) -> RouteRequest:
        limit_s = self.limits.of(request) if self.limits else None
        return RouteRequest(
            model=MODEL,
            layers=LAYERS,
            hidden_bytes=HIDDEN_BYTES,
            prompt_tokens=request.prompt,
            new_tokens=request.answer,
            client=site_id(self.world.sites[client]),
            tpot_s=limit_s,
            percentile=self.limits.percentile if self.limits and limit_s else 50.0,
            deny=frozenset(self.world.machines[index].peer for index in refused),
            warm=self.peers,
            spread=self.spread,
            previous=state.previous if self.hysteresis else None,
        )

    def seen(self, now: float, view: View, state: _Client) -> Snapshot:
        """The view with what this client heard since its records were issued."""
        known = self.snapshots.get(view.key[0])
        if known is None or known[0] != view.key:
            known = view.key, snapshot(view.announcements, self.links, now)
            self.snapshots[view.key[0]] = known
        fresh = {
            view.announcements[index].peer: load
            for index, (when, load) in state.heard.items()
            if when > view.announcements[index].issued_s
        }
        return known[1].with_loads(MODEL, fresh, now) if fresh else known[1]

    def told(self, now: float, client: int, loads: dict[int, Load], *, opened: bool) -> None:
        state = self.clients[client]
        if self.piggyback:
            state.heard.update((index, (now, load)) for index, load in loads.items())
        if opened:
            state.previous, state.attempt = state.attempt, None


def _spare(attempt: Route | None, refused: frozenset[PeerId]) -> Route | None:
    """The first spare of the last attempt that avoids who refused."""
    for route in attempt.spares if attempt else ():
        if not refused & {stage.peer for stage in route.stages}:
            return route
    return None


def site_id(site: int) -> PeerId:
    return PeerId(f"site{site:03d}")


def links(world: World) -> dict[tuple[PeerId, PeerId], Link]:
    """All true ways, as if everybody had measured them."""
    peers = [machine.peer for machine in world.machines]
    speeds = [machine.bytes_per_s for machine in world.machines]
    found = {
        (peers[a], peers[b]): _link(world.one_way_s[a, b], min(speeds[a], speeds[b]))
        for a in range(len(peers))
        for b in range(a)
    }
    for site, row in enumerate(world.client_way_s):
        found.update(((site_id(site), peers[b]), _link(way, math.inf)) for b, way in enumerate(row))
    return found


def _link(one_way_s: float, bytes_per_s: float) -> Link:
    """With the median and 95th percentile of an exponential jitter."""
    one_way_s = float(one_way_s)
    median, high = math.log(2), math.log(20)
    return Link(
        2 * one_way_s * (1 + JITTER * median), bytes_per_s, one_way_s * JITTER * (high - median)
    )
