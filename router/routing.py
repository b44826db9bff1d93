"""The best pipeline for one request under its limits, or a precise reason why there is none.

`find_route` is a pure function of a snapshot and a request: of all routes of peers that the request
may use (`candidates.py`), whose predicted times (`cost.py`) keep the request's limits at its
percentile, the one of lowest price; without limits the one that has the whole answer soonest. The
search is exact unless it is cut short (`search.py`); in swarms of more than `EXACT_PEERS` it runs
over the most promising candidates (`select.py`). Stages may use less than their peers hold.

*No herd.* Clients decide on views that are seconds old, so all would take the same best route, and
then all leave it. Remedies for a request with a `spread` (their gains: benchmarks/herd.py):

- *previous*: a client stays on its route of the last request unless another is better by more than
  `HYSTERESIS`. Gains at a third of the capacity, nothing near it; its links are warm;
- *perturbed costs*: the cost of each peer is raised by a random share of at most `spread`, so that
  near-equal routes are drawn at random (follow the perturbed leader, Kalai and Vempala 2005). The
  route found costs at most 1 + spread of the best; limits are kept on true times;
- *a random share*: with other clients about, a tenth is not enough: what a stale view says to be
  idle is overrun. So the busier the swarm, the more peers each request tries to avoid, up to
  `MOST_AVOIDED` of them drawn by lot: they count as dearer by `AVOID`. Then less than half of the
  clients come to one peer, and a lone user of an idle swarm keeps the best route;
- *power of two choices* (Mitzenmacher 2001): of two such draws the less busy is taken, unless it
  costs more than `TWICE` the other.

Rejected by the same benchmark: avoiding each peer by its own load (the herd runs to where the view
says idle), loads faded towards the mean as they age (slower), the share as a hard rule (no better,
and in a swarm of few fast and many slow peers a quarter of the requests would crawl).

Spares are the best routes that share the fewest peers with those before them. First without those
peers at all, which is a search like any other; only if there is nothing, or nothing is found soon,
with a penalty on them. (The penalty alone ruins the multipliers of the search: of two rings one may
cost 1e9 more, and what a second is worth drowns in it.)
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hexswarm.errors import NoRoute, UsageError
from hexswarm.records import Route, RouteRequest, Span, Stage
from hexswarm.router import cost
from hexswarm.router.candidates import check, usable
from hexswarm.router.network import Snapshot, Ways
from hexswarm.router.search import (
    GOOD,
    QUICK,
    Nothing,
    Problem,
    Ring,
    Solver,
    cost_of,
    evaluate,
    ttft,
    within,
)
from hexswarm.router.select import EXACT_PEERS, select

SPARES = 2
"""Further routes told with the best one."""

HYSTERESIS = 0.1
"""Relative gain for which a client leaves the route of its last request. Smaller differences are
within the error of the predictions (benchmarks/wan.py)."""

DRAWS = 2
"""Power of two choices. Beside the other remedies the second draw shortens the 95th percentile by
about 3 %, and costs one more search."""

MOST_AVOIDED = 0.6
"""Share of the peers that a request tries to avoid in a busy swarm. At 0.5 the 95th percentile at
four fifths of the capacity is 11 % longer (1-25 % in nine swarms: seeds 4-7, 11-15)."""

AVOIDED_PER_BUSY = 5.0
"""That share over the mean of `busy`: all of it from 0.12 on, which is a swarm at a quarter of its
capacity."""

AVOID = 4.0
"""How much dearer avoided peers count, relative to their cost. At 2 the 95th percentile is 9 %
longer in a swarm at four fifths of its capacity."""

TWICE = 2.0
"""Beyond this a less busy route is a slower one: no swarm of like peers differs as much."""

SHARED_COST = 1e9
"""Cost that a spare route pays for each peer that an earlier route uses: beyond any real one, so
that fewer shared peers always win."""

Rows = NDArray[np.intp]


def find_route(snapshot: Snapshot, request: RouteRequest, now: float, rng: random.Random) -> Route:
    """The best route within the request's limits, with spares.

    Raises NoRoute, or UsageError for a request that makes no sense.
    """
    check(request)
    rows, clients, problem = _problem(snapshot, request, usable(snapshot, request))
    solver = Solver(problem)
    ring = _choose(snapshot, request, rows, solver, rng)
    if ring is None:
        raise _too_slow(solver, request)
    rings = [ring]
    for _ in range(SPARES):
        spare = _spare(solver, rings)
        if spare is None:
            break
        rings.append(spare)
    best, *spares = (_route(snapshot, request, rows, clients, problem.ways, item) for item in rings)
    return replace(best, spares=tuple(spares))


def replan(
    snapshot: Snapshot,
    request: RouteRequest,
    route: Route,
    hole: Span,
    now: float,
    rng: random.Random,
) -> Route:
    """`route` with other peers for the layers of `hole`, and all other stages as they are.

    The peers that served the hole are not used again. Raises NoRoute if the rest of the swarm
    cannot fill it, and UsageError if the hole is not a whole number of stages.
    """
    check(request)
    inside = [stage for stage in route.stages if hole.covers(stage.span)]
    if not inside or sum(len(stage.span) for stage in inside) != len(hole):
        raise UsageError(f"layers {hole} are not whole stages of the route")
    kept = {stage.peer: stage.span for stage in route.stages if stage not in inside}
    lost = frozenset(stage.peer for stage in inside)
    rows = usable(snapshot, request, hole, lost)
    columns = snapshot.columns(request.model)
    rows = np.array([row for row in rows if columns.peers[row] not in kept], dtype=np.intp)
    if len(rows) > EXACT_PEERS:
        rows = select(snapshot, replace(request, ttft_s=None, tpot_s=None), rows)
    fixed = [columns.index[peer] for peer in kept]
    together = np.array(sorted({*fixed, *map(int, rows)}), dtype=np.intp)
    clients = cost.client_ways(snapshot, request, together)
    problem = cost.build_problem(snapshot, request, together, clients=clients)
    spans = [
        kept.get(columns.peers[row])
        or Span(max(hole.first, columns.first[row]), min(hole.end, columns.end[row]))
        for row in together
    ]
    problem = replace(
        problem,
        first=np.array([span.first for span in spans], dtype=np.int32),
        end=np.array([span.end for span in spans], dtype=np.int32),
    )
    solver = Solver(problem)
    ring = solver.solve()
    if isinstance(ring, Nothing):
        raise _too_slow(solver, request)
    return _route(snapshot, request, together, clients, problem.ways, ring)


def _problem(
    snapshot: Snapshot, request: RouteRequest, rows: Rows
) -> tuple[Rows, cost.ClientWays, Problem]:
    """The search over the usable rows, with the rows of its peers and their ways to the client."""
    count = len(snapshot.columns(request.model).peers)
    barred: Any = False
    if count <= EXACT_PEERS:
        barred = np.ones(count, dtype=np.bool_)
        barred[rows] = False
        rows = np.arange(count)
    elif len(rows) > EXACT_PEERS:
        rows = select(snapshot, request, rows)
    clients = cost.client_ways(snapshot, request, rows)
    return rows, clients, cost.build_problem(snapshot, request, rows, barred, clients)


def _choose(
    snapshot: Snapshot, request: RouteRequest, rows: Rows, solver: Solver, rng: random.Random
) -> Ring | None:
    """The ring to take, by the rules of the module's text; None if none is within the limits."""
    problem = solver.problem
    held = _held(snapshot, request, rows, problem)
    if request.spread <= 0 or held is not None:
        best = _found(solver.solve())
        if best is None:
            return None
        if held is not None and cost_of(problem, held) <= (1 + HYSTERESIS) * cost_of(problem, best):
            return held
        if request.spread <= 0:
            return best
    avoided = _avoided(snapshot, request, rows, problem)
    changed = [_perturbed(problem, request.spread, avoided, rng) for _ in range(DRAWS)]
    draws = [_found(solver.solve(variant, GOOD)) for variant in changed]
    found = [evaluate(problem, draw.peers, draw.ends) for draw in draws if draw is not None]
    if not found:
        return None
    most = TWICE * min(cost_of(problem, ring) for ring in found)
    fair = [ring for ring in found if cost_of(problem, ring) <= most]
    return min(fair, key=lambda ring: (_load(snapshot, request, rows, ring), ring.peers))


def _found(answer: Ring | Nothing) -> Ring | None:
    return answer if isinstance(answer, Ring) else None


def _held(snapshot: Snapshot, request: RouteRequest, rows: Rows, problem: Problem) -> Ring | None:
    """The route of the last request as a ring of today, if it could still be used."""
    if request.previous is None:
        return None
    index = snapshot.columns(request.model).index
    place = {int(row): at for at, row in enumerate(rows)}
    peers, ends = [], []
    for stage in request.previous.stages:
        at = place.get(index.get(stage.peer, -1))
        if (
            at is None
            or not problem.first[at] <= stage.span.first < stage.span.end <= problem.end[at]
        ):
            return None
        peers.append(at)
        ends.append(stage.span.end)
    if not ends or ends[-1] != problem.layers:
        return None
    ring = evaluate(problem, tuple(peers), tuple(ends))
    return ring if within(problem, ring) else None


def _avoided(snapshot: Snapshot, request: RouteRequest, rows: Rows, problem: Problem) -> float:
    """Probability with which a request tries to avoid a peer: grows with the load of them all."""
    usable_ = rows[problem.first < problem.end]
    busy = float(snapshot.columns(request.model).busy[usable_].mean())
    return min(MOST_AVOIDED, AVOIDED_PER_BUSY * busy)


def _perturbed(problem: Problem, spread: float, avoided: float, rng: random.Random) -> Problem:
    """The same with the cost of each peer raised by a random share of at most `spread`, and by
    `AVOID` with the probability `avoided`."""
    random_ = np.random.default_rng(rng.getrandbits(64))
    count = len(problem.first)
    share = spread * random_.random(count) + AVOID * (random_.random(count) < avoided)
    return _dearer(problem, share, 0.0)


def _spare(solver: Solver, rings: Sequence[Ring]) -> Ring | None:
    """The best ring that shares the fewest peers with `rings`; its price is not a true one.

    A ring that uses all peers of an earlier one would die with it and is no spare. Where the search
    gives only such, few peers are to choose from, and each of the first ring is left out in turn.
    """
    problem = solver.problem
    uses = np.zeros(len(problem.first))
    for ring in rings:
        uses[list(ring.peers)] += 1
    found = _found(solver.solve(effort=QUICK, barred=uses > 0))
    if found is not None:
        return found
    apart = _dearer(problem, 0.0, SHARED_COST * uses)
    found = _found(solver.solve(apart, QUICK))
    if found is None or _outlives(found, rings):
        return found
    best: Ring | None = None
    for peer in rings[0].peers:
        without = np.arange(len(uses)) == peer
        found = _found(solver.solve(apart, GOOD, without))
        if found is None or not _outlives(found, rings):
            continue
        if best is None or cost_of(apart, found) < cost_of(apart, best):
            best = found
    return best


def _outlives(ring: Ring, earlier: Sequence[Ring]) -> bool:
    """Does it lack a peer of each earlier ring?"""
    return not any(set(other.peers) <= set(ring.peers) for other in earlier)


def _dearer(problem: Problem, share: Any, enter: Any) -> Problem:
    """The same with peers that cost `share` more, and `enter` more for each stage.

    What is added to the objective is added as price, which no limit counts.
    """
    p, weight = problem, problem.weight_price
    per_stage = weight * p.price_enter + p.weight_t * p.t_enter + p.weight_a * p.a_enter
    per_layer = weight * p.price_layer + p.weight_t * p.t_layer + p.weight_a * p.a_layer
    return replace(
        problem,
        price_enter=weight * p.price_enter + share * per_stage + enter,
        price_layer=weight * p.price_layer + share * per_layer,
        weight_price=1.0,
    )


def _load(snapshot: Snapshot, request: RouteRequest, rows: Rows, ring: Ring) -> float:
    """How busy the peers of a ring are: the mean price of its layers."""
    columns = snapshot.columns(request.model)
    chosen = rows[list(ring.peers)]
    prices = cost.price_per_layer(
        columns.busy[chosen], columns.free_kv_tokens[chosen], columns.kv_tokens[chosen]
    )
    return float(np.dot(prices, np.diff([0, *ring.ends])) / request.layers)


def _route(
    snapshot: Snapshot,
    request: RouteRequest,
    rows: Rows,
    clients: cost.ClientWays,
    ways: Ways,
    ring: Ring,
) -> Route:
    """A ring as a route, predicted from what the search was made of."""
    columns = snapshot.columns(request.model)
    items = [columns.announcements[rows[peer]] for peer in ring.peers]
    edges = itertools.pairwise((0, *ring.ends))
    stages = tuple(
        Stage(item.peer, Span(first, end), item.addresses)
        for item, (first, end) in zip(items, edges, strict=True)
    )
    return _told(cost.look_up_in(ways, clients, request, items, ring.peers), request, stages)


def predicted(snapshot: Snapshot, request: RouteRequest, stages: Sequence[Stage]) -> Route:
    """`stages` as a route with its predicted times, its price, and what has to be measured."""
    return _told(cost.look_up(snapshot, request, stages), request, stages)


def _told(known: cost.Known, request: RouteRequest, stages: Sequence[Stage]) -> Route:
    median, late = cost.times(known, request, stages, 0.0, 1.0)
    return Route(
        tuple(stages),
        ttft_s=median.ttft_s,
        tpot_s=median.tpot_s,
        ttft_p95_s=late.ttft_s,
        tpot_p95_s=late.tpot_s,
        price=cost.price(stages, known.items),
        unmeasured=known.unmeasured,
    )


def _too_slow(solver: Solver, request: RouteRequest) -> NoRoute:
    """Name the limit that binds, and the best that can be had."""
    problem = solver.problem
    free = replace(problem, limit_t=math.inf, limit_a=math.inf, weight_price=0.0)
    quickest = solver.solve(replace(free, weight_t=1.0, weight_a=0.0, weight_max=0.0))
    soonest = solver.solve(replace(free, weight_t=0.0, weight_a=1.0, weight_max=1.0))
    if isinstance(quickest, Nothing) or isinstance(soonest, Nothing):
        return NoRoute("no route was found", remedy="start more peers with `hexswarm peer`")
    best_tpot, best_ttft = quickest.t, ttft(problem, soonest)
    achievable = {"tpot_s": best_tpot, "ttft_s": best_ttft}
    at = "" if request.percentile == 50 else f" at percentile {request.percentile:g}"
    if best_tpot > problem.limit_t:
        return NoRoute(
            f"the fastest route needs {best_tpot:.3g} s a token{at}, the limit is "
            f"{request.tpot_s:g} s",
            remedy=f"allow {best_tpot * 1.05:.2g} s a token",
            binding="tpot",
            achievable=achievable,
        )
    if best_ttft > problem.limit_a:
        return NoRoute(
            f"the soonest first token takes {best_ttft:.3g} s{at}, the limit is "
            f"{request.ttft_s:g} s",
            remedy=f"allow {best_ttft * 1.05:.2g} s to the first token",
            binding="ttft",
            achievable=achievable,
        )
    return NoRoute(
        f"no route keeps both limits{at}: the fastest has its first token after "
        f"{ttft(problem, quickest):.3g} s and {best_tpot:.3g} s a token, the soonest after "
        f"{best_ttft:.3g} s and {soonest.t:.3g} s a token",
        remedy="relax one of the limits",
        binding="both",
        achievable=achievable,
    )
