"""Our own policy: the router as clients run it (`hexswarm.router.routing`).

A client sees the announcements as old as they are in the directory, and knows better of the peers
that it asked itself: the loads told with grants and refusals count until a later word is read. All
ways are taken as measured, and links as warm. When a stage refuses, the best spare route without
who refused is tried, then the router is asked anew. A dead stage's hole is filled by `replan`.

One coordinator stands for a gateway with many users (`hexswarm serve`): it hears of all loads
itself, and `previous` (a client stays on its route) is left out unless `sticky`, for a gateway that
sends all its users down one route is a herd of its own. With clients in several places each knows
what it heard alone.

Times that are promised (`tpot_s`): stages are asked for their part of the limit (`cost.budgets`),
and refuse what they cannot keep.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from hexswarm.errors import NoRoute
from hexswarm.records import Link, Load, PeerId, Route, RouteRequest, Span, Stage
from hexswarm.router import cost
from hexswarm.router.network import Snapshot, snapshot
from hexswarm.router.placement.cluster import Cluster, Model, Way
from hexswarm.router.placement.plan import Plan
from hexswarm.router.routing import find_route, replan
from hexswarm.simulator.board import peer_of, unit_of
from hexswarm.simulator.policy import Execution, Plain, Request, View, Visit, Visits

SPREAD = 0.1
"""As clients ask (`hexswarm.planning`)."""

Search = Callable[[Snapshot, RouteRequest, float, random.Random], Route]
Pair = tuple[PeerId, PeerId]


@dataclass(frozen=True, slots=True)
class Wishes:
    """What users ask for."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    percentile: float = 50.0
    spread: float = SPREAD
    sticky: bool = False
    """Stay on the route of the last request, as a single user does."""


@dataclass(slots=True)
class _Client:
    """What one client knows beside the directory."""

    links: Mapping[Pair, Link]
    heard: dict[int, tuple[float, Load]] = field(default_factory=dict)
    seen: tuple[tuple[str, int], Snapshot] | None = None
    previous: Route | None = None


class Ours(Plain):
    """See the module's text."""

    name = "hexswarm"

    def __init__(
        self,
        cluster: Cluster,
        model: Model,
        plan: Plan,
        *,
        seed: int = 0,
        wishes: Wishes | None = None,
        execution: Execution | None = None,
        search: Search = find_route,
    ) -> None:
        self.execution = execution or Execution()
        self._cluster, self._model, self._plan = cluster, model, plan
        self._wishes = wishes or Wishes()
        self._search = search
        self._rng = random.Random(seed)
        self._clients: dict[str, _Client] = {}
        self._tried: dict[int, Route] = {}
        """The route that was tried last for a request."""
        self._lost_s: dict[int, float] = {}
        """When units were found dead."""
        self._peers = {n: peer_of(n) for n, span in enumerate(plan.spans) if span}
        self._links = self._between()

    # --- choosing ------------------------------------------------------------------------------

    def route(self, now: float, request: Request, view: View) -> Visits | None:
        """The best route, or the best spare after a refusal."""
        client = self._client(request.client)
        wanted = self._wanted(request, view, client)
        route = self._spare(request.id, wanted.deny) if view.refused else None
        seen = self._seen(now, view, client)
        if route is None:
            try:
                route = self._search(seen, wanted, now, self._rng)
            except NoRoute:
                self._tried.pop(request.id, None)
                return None
        self._tried[request.id] = route
        return _visits(route, cost.budgets(seen, wanted, route.stages))

    def repair(
        self,
        now: float,
        request: Request,
        visits: Visits,
        dead: frozenset[int],
        known: int,
        view: View,
    ) -> Visits | None:
        """The same route with other peers in the hole, with limits if it can be."""
        client = self._client(request.client)
        seen = self._seen(now, view, client)
        kept = {peer_of(visit.unit) for visit in visits if visit.unit not in dead}
        if not kept <= seen.columns(self._model.name).index.keys():
            return None
        gone = [visit.span for visit in visits if visit.unit in dead]
        hole = Span(gone[0].first, gone[-1].end)
        stages = tuple(Stage(peer_of(visit.unit), visit.span) for visit in visits)
        left = max(1, request.tokens - known)
        wanted = replace(self._wanted(request, view, client), prompt_tokens=known, new_tokens=left)
        wanted = replace(wanted, ttft_s=None, previous=None)
        for asked in dict.fromkeys((wanted, replace(wanted, tpot_s=None))):
            try:
                found = replan(seen, asked, Route(stages, 0.0, 0.0), hole, now, self._rng)
            except NoRoute:
                continue
            return _visits(found, cost.budgets(seen, asked, found.stages))
        return None

    def _wanted(self, request: Request, view: View, client: _Client) -> RouteRequest:
        wishes = self._wishes
        denied = {peer_of(unit) for unit in (*view.refused, *self._dead(view))}
        return RouteRequest(
            model=self._model.name,
            layers=self._model.layers,
            hidden_bytes=int(self._model.activation_bytes),
            prompt_tokens=request.input_tokens,
            new_tokens=request.output_tokens,
            client=_client_id(request.client),
            ttft_s=wishes.ttft_s,
            tpot_s=wishes.tpot_s,
            percentile=wishes.percentile,
            deny=frozenset(denied),
            warm=frozenset(self._peers.values()),
            spread=wishes.spread,
            previous=client.previous if wishes.sticky else None,
        )

    def _dead(self, view: View) -> list[int]:
        """Units found dead, which have said nothing since."""
        words = view.announced
        return [
            unit
            for unit, lost_s in self._lost_s.items()
            if (word := words[unit]) is not None and word.issued_s <= lost_s
        ]

    def _spare(self, request: int, denied: frozenset[PeerId]) -> Route | None:
        """The first spare of the last try that avoids who refused."""
        tried = self._tried.get(request)
        for route in tried.spares if tried else ():
            if not denied & {stage.peer for stage in route.stages}:
                return replace(route, spares=tried.spares if tried else ())
        return None

    # --- knowing -------------------------------------------------------------------------------

    def opened(
        self, now: float, request: Request, visits: Visits, loads: Mapping[int, Load]
    ) -> None:
        client = self._client(request.client)
        client.previous = self._tried.pop(request.id, client.previous)
        client.heard.update((unit, (now, load)) for unit, load in loads.items())

    def refused(
        self, now: float, request: Request, refusing: frozenset[int], loads: Mapping[int, Load]
    ) -> None:
        client = self._client(request.client)
        client.heard.update((unit, (now, load)) for unit, load in loads.items())

    def lost(self, now: float, unit: int) -> None:
        self._lost_s[unit] = now

    def _seen(self, now: float, view: View, client: _Client) -> Snapshot:
        """The directory as it was read, with what the client heard since each word."""
        if client.seen is None or client.seen[0] != view.reading:
            words = [word for word in view.announced if word is not None]
            owner = _client_id(view.reading[0])
            client.seen = view.reading, snapshot(words, client.links, now, client=owner)
        fresh = {
            peer_of(unit): load
            for unit, (when, load) in client.heard.items()
            if (word := view.announced[unit]) is not None and when > word.issued_s
        }
        base = client.seen[1]
        return base.with_loads(self._model.name, fresh, now) if fresh else base

    def _client(self, name: str) -> _Client:
        held = self._clients.get(name)
        if held is None:
            mine = {
                (_client_id(name), peer): self._link(name, self._plan.units[unit].node)
                for unit, peer in self._peers.items()
            }
            held = self._clients[name] = _Client({**self._links, **mine})
        return held

    def _between(self) -> dict[Pair, Link]:
        """All ways between units that serve, as if everybody had measured them."""
        nodes = {unit: self._plan.units[unit].node for unit in self._peers}
        return {
            (peer, self._peers[other]): self._link(nodes[unit], nodes[other])
            for unit, peer in self._peers.items()
            for other in self._peers
            if unit < other
        }

    def _link(self, a: str, b: str) -> Link:
        there, back = self._cluster.way(a, b), self._cluster.way(b, a)
        return Link(there.one_way_s + back.one_way_s, min(map(_rate, (there, back))))


def _rate(way: Way) -> float:
    return way.bytes_per_s


def _client_id(name: str) -> PeerId:
    """A user beside a machine is not that machine."""
    return PeerId(f"client {name}")


def _visits(route: Route, steps_s: tuple[float, ...]) -> Visits:
    pairs = zip(route.stages, steps_s, strict=True)
    return tuple(Visit(unit_of(stage.peer), stage.span, step_s) for stage, step_s in pairs)
