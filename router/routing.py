"""The first router: the fastest pipeline for one request, or a precise reason why there is none.

`find_route` is a pure function of a snapshot and a request. Among all routes of peers that serve
the model, are permitted by the request and have room for its tokens, it takes the one with the
least predicted time per token; of equal ones the least time to first token, then the lower peer
ids. A stage may use less than its peer holds, entering or leaving in the middle of the span. Where
the request states limits, only routes within them count; `NoRoute` names the best that can be had.

Price, percentiles and spreading of load are for a router that has them measured; it will have the
same signature, of which this one leaves `now` and `rng` unused.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from hexswarm.errors import NoRoute
from hexswarm.records import PeerId, Route, RouteRequest, Span, Stage
from hexswarm.router import cost
from hexswarm.router.candidates import check, usable
from hexswarm.router.network import Snapshot
from hexswarm.router.search import Costs, Graph, any_ring, build_graph, rings

SPARES = 2
"""Further routes told with the best one."""

EQUAL = 1e-9
"""Relative difference of two predictions below which they count as equal: rounding is 1e-15."""

TIES = 32
"""So many routes of equal time per token are compared by the next criteria."""

CANDIDATES = 128
"""So many routes of each order are tried against the limits of the request."""

SHARED_S = 1e6
"""Seconds that a spare route pays for each peer that an earlier route uses: beyond any real time,
so that fewer shared peers always win over speed."""


def find_route(snapshot: Snapshot, request: RouteRequest, now: float, rng: random.Random) -> Route:
    """The route with the least time per token within the request's limits, with spares.

    Raises NoRoute, or UsageError for a request that makes no sense.
    """
    check(request)
    graph = build_graph(usable(snapshot, request), request.layers)
    decode = _decode_costs(snapshot, request, graph)
    best = _best(snapshot, request, graph, decode)
    routes = [best]
    for _ in range(SPARES):
        spare = _spare(snapshot, request, graph, decode, routes)
        if spare is None:
            break
        routes.append(spare)
    return replace(best, spares=tuple(routes[1:]))


def predict(snapshot: Snapshot, request: RouteRequest, stages: Sequence[Stage]) -> Route:
    """`stages` as a route with its predicted times."""
    return Route(
        tuple(stages),
        ttft_s=cost.time_to_first_token(snapshot, request, stages),
        tpot_s=cost.time_per_token(snapshot, request, stages),
    )


def _decode_costs(snapshot: Snapshot, request: RouteRequest, graph: Graph) -> Costs:
    """`cost.time_per_token` as arrays."""
    one_way_s, per_byte_s = snapshot.distances([item.peer for item in graph.peers])
    close = one_way_s + cost.HOP_S
    np.fill_diagonal(close, 0.0)
    hop = one_way_s + cost.HOP_S + request.hidden_bytes * per_byte_s
    return Costs(
        enter=np.array([cost.queue_s(item) for item in graph.peers]),
        layer=np.array([item.speed.decode_layer_s for item in graph.peers]),
        hop=hop,
        onward=graph.onward(hop),
        finish=np.array([item.speed.head_s for item in graph.peers]),
        close=close,
    )


def _prefill_costs(snapshot: Snapshot, request: RouteRequest, graph: Graph, decode: Costs) -> Costs:
    """`cost.time_to_first_token` as far as it is a sum: the way of the first chunk."""
    _, tokens = cost.chunks(request)
    _, per_byte_s = snapshot.distances([item.peer for item in graph.peers])
    whole = Span(0, request.layers)
    client = np.array(
        [cost.client_s(snapshot, request, Stage(item.peer, whole)) for item in graph.peers]
    )
    hop = decode.hop + (tokens - 1) * request.hidden_bytes * per_byte_s
    return replace(
        decode,
        layer=tokens * np.array([item.speed.prefill_layer_s for item in graph.peers]),
        hop=hop,
        onward=graph.onward(hop),
        close=client[:, None] + client[None, :],
    )


def _rank(route: Route) -> tuple[float, list[PeerId], list[Span]]:
    return (
        route.ttft_s,
        [stage.peer for stage in route.stages],
        [stage.span for stage in route.stages],
    )


def _fits(request: RouteRequest, route: Route) -> bool:
    return (request.ttft_s is None or route.ttft_s <= request.ttft_s) and (
        request.tpot_s is None or route.tpot_s <= request.tpot_s
    )


def _best(snapshot: Snapshot, request: RouteRequest, graph: Graph, decode: Costs) -> Route:
    """The first route within the limits in order of time per token; NoRoute if there is none."""
    fastest: Route | None = None
    tied: list[Route] = []
    for stages in itertools.islice(rings(graph, decode), CANDIDATES):
        route = predict(snapshot, request, stages)
        fastest = fastest or route
        if tied and route.tpot_s > tied[0].tpot_s * (1 + EQUAL):
            break
        if request.tpot_s is not None and route.tpot_s > request.tpot_s * (1 + EQUAL):
            break
        if _fits(request, route):
            tied.append(route)
        if len(tied) == TIES:
            break
    if tied:
        return min(tied, key=_rank)
    fastest = fastest or predict(snapshot, request, any_ring(graph))
    return _best_by_first_token(snapshot, request, graph, decode, fastest)


def _best_by_first_token(
    snapshot: Snapshot, request: RouteRequest, graph: Graph, decode: Costs, fastest: Route
) -> Route:
    """No route of least time per token fits: look among those of least time to first token."""
    if _fits(request, fastest):
        return fastest
    if request.tpot_s is not None and fastest.tpot_s > request.tpot_s:
        raise _too_slow(request, fastest, fastest)
    prefill = _prefill_costs(snapshot, request, graph, decode)
    order = itertools.islice(rings(graph, prefill), CANDIDATES)
    routes = [fastest, *(predict(snapshot, request, stages) for stages in order)]
    fitting = [route for route in routes if _fits(request, route)]
    if fitting:
        return min(fitting, key=lambda route: (route.tpot_s, _rank(route)))
    soonest = min(routes, key=lambda route: (route.ttft_s, _rank(route)))
    raise _too_slow(request, fastest, soonest)


def _too_slow(request: RouteRequest, fastest: Route, soonest: Route) -> NoRoute:
    """Name the limit that binds, and the best that can be had."""
    if request.tpot_s is not None and fastest.tpot_s > request.tpot_s:
        return NoRoute(
            f"the fastest route needs {fastest.tpot_s:.3g} s a token, the limit is "
            f"{request.tpot_s:g} s",
            remedy=f"allow tpot_s = {fastest.tpot_s * 1.1:.2g}",
        )
    if request.ttft_s is not None and soonest.ttft_s > request.ttft_s:
        return NoRoute(
            f"the soonest first token takes {soonest.ttft_s:.3g} s, the limit is "
            f"{request.ttft_s:g} s",
            remedy=f"allow ttft_s = {soonest.ttft_s * 1.1:.2g}",
        )
    return NoRoute(
        f"no route keeps both limits: the fastest has its first token after {fastest.ttft_s:.3g} s "
        f"and {fastest.tpot_s:.3g} s a token, the soonest after {soonest.ttft_s:.3g} s and "
        f"{soonest.tpot_s:.3g} s a token",
        remedy="relax one of the limits",
    )


def _spare(
    snapshot: Snapshot,
    request: RouteRequest,
    graph: Graph,
    decode: Costs,
    routes: Sequence[Route],
) -> Route | None:
    """The next route within the limits that shares the fewest peers with those in `routes`.

    A route that uses all peers of an earlier one would die with it and is no spare.
    """
    used = [{stage.peer for stage in route.stages} for route in routes]
    uses = np.array([sum(item.peer in peers for peers in used) for item in graph.peers])
    costs = replace(decode, enter=decode.enter + SHARED_S * uses)
    for stages in itertools.islice(rings(graph, costs), TIES):
        mine = {stage.peer for stage in stages}
        if any(peers <= mine for peers in used):
            continue
        route = predict(snapshot, request, stages)
        if _fits(request, route):
            return route
    return None
