"""The router measured without a network: exactness, time per route, upkeep of the snapshot.

    python benchmarks/routing.py [--quick] [--times]

Prints tables and, as its last line, one JSON object. Pure: no sockets, one core, seeded swarms.

- *exact, small*: random swarms of at most 12 peers with limits on both latencies and on KV, against
  every possible ring;
- *exact, 200 peers*: against Pareto labels without any cut (`solve_python` unbounded);
- *time*: `find_route` with spares, on a snapshot that is ready, at 200, 1,000 and 10,000 peers with
  80 layers, without limits and with tight ones; and a snapshot updated by one record;
- *candidates*: what the choice of candidates loses at 1,000 peers against the search over all.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from tqdm import tqdm

from hexswarm.errors import NoRoute
from hexswarm.records import Announcement, Coordinates, Link, PeerId, RouteRequest, Span, Speed
from hexswarm.router import cost, native, search, select
from hexswarm.router.candidates import usable
from hexswarm.router.network import Snapshot, snapshot
from hexswarm.router.routing import find_route

MODEL = "ab" * 32
CLIENT = PeerId("12D3KooWClient")
REGIONS = 6

Figures = dict[str, float]


@dataclass(frozen=True, slots=True)
class Swarm:
    """A random swarm and its client."""

    view: Snapshot
    layers: int
    request: RouteRequest


def peer(index: int) -> PeerId:
    return PeerId(f"12D3KooWPeer{index:06d}")


def random_swarm(
    seed: int,
    count: int,
    layers: int,
    *,
    longest: int = 20,
    round_: bool = False,
    neighbours: int = 8,
) -> Swarm:
    """Regions some tens of milliseconds apart, homes with slow access, spans of unlike lengths.

    With `round_` times are whole milliseconds, so that equal costs, the hard case, occur.
    """
    rng = random.Random(seed)
    centres = [
        (rng.uniform(0, 0.1), rng.uniform(0, 0.1), rng.uniform(0, 0.02)) for _ in range(REGIONS)
    ]

    def seconds(low: float, high: float) -> float:
        value = rng.uniform(low, high)
        return round(value, 3) if round_ else value

    def place() -> Coordinates:
        x, y, z = rng.choice(centres)
        near = tuple(value + rng.gauss(0, 0.002) for value in (x, y, z))
        return Coordinates((near[0], near[1], near[2]), rng.expovariate(1 / 0.004), 0.08)

    items = []
    for index in range(count):
        length = rng.randint(min(4, longest, layers), min(longest, layers))
        first = rng.randint(0, layers - length)
        if index * longest < 2 * layers:  # two chains cover all layers, whatever chance does
            first = (index * length * 2 // 3) % layers
            first = min(first, layers - length)
        fast = rng.choice([1.0, 1.0, 2.0, 4.0])
        pool = rng.choice([4096, 32768])
        items.append(
            Announcement(
                peer=peer(index),
                model=MODEL,
                model_name="random",
                layers=layers,
                span=Span(first, first + length),
                state="online",
                dtype="bfloat16",
                device="cuda",
                speed=Speed(
                    decode_layer_s=seconds(0.0004, 0.004) / (1 if round_ else fast),
                    prefill_layer_s=2e-6 / fast,
                    head_s=0.001,
                    row_layer_s=2e-5,
                ),
                free_kv_tokens=int(pool * rng.random()),
                queue_s=seconds(0.0, 0.006),
                addresses=(),
                neighbours=tuple(
                    (peer(other), seconds(0.001, 0.09))
                    for other in rng.sample(range(count), min(neighbours, count - 1))
                    if other != index
                ),
                rows=rng.choice([0.0, 1.0, 4.0, 8.0]),
                busy=rng.choice([0.0, 0.2, rng.random() * 0.9]),
                kv_tokens=pool,
                coordinates=place(),
                up_bytes_per_s=rng.choice([2.5e6, 12.5e6, 125e6]),
                down_bytes_per_s=rng.choice([12.5e6, 125e6]),
            )
        )
    links = {(CLIENT, peer(index)): Link(seconds(0.01, 0.1)) for index in range(min(count, 4))}
    view = snapshot(items, links, 0.0, client=CLIENT, coordinates=place())
    request = RouteRequest(
        model=MODEL,
        layers=layers,
        hidden_bytes=16384,
        prompt_tokens=rng.randint(1, 600),
        new_tokens=rng.randint(0, 200),
        client=CLIENT,
        percentile=rng.choice([50.0, 95.0]),
        warm=frozenset(peer(index) for index in range(min(count, 4))),
    )
    return Swarm(view, layers, request)


def limited(swarm: Swarm, rng: random.Random, *, tightest: float) -> RouteRequest | None:
    """The swarm's request with limits around what is possible; None if nothing is."""
    request = swarm.request
    loose = dict.fromkeys(("tpot_s", "ttft_s"), 1e-09)
    try:
        find_route(swarm.view, replace(request, **loose), 0.0, rng)
    except NoRoute as error:
        best = error.achievable
    if not best:
        return None
    which = rng.choice([("tpot_s",), ("ttft_s",), ("tpot_s", "ttft_s"), ("tpot_s", "ttft_s")])
    return replace(request, **{name: best[name] * rng.uniform(tightest, 2.0) for name in which})


# --- exactness ------------------------------------------------------------------------------------


def every_ring(problem: search.Problem) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """All rings of a small problem."""

    def ways_on(
        peers: tuple[int, ...], ends: tuple[int, ...]
    ) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
        reached = ends[-1] if ends else 0
        if reached == problem.layers:
            yield peers, ends
            return
        for index in range(len(problem.first)):
            if index not in peers and problem.first[index] <= reached < problem.end[index]:
                for end in range(reached + 1, int(problem.end[index]) + 1):
                    yield from ways_on((*peers, index), (*ends, end))

    yield from ways_on((), ())


def brute_force(problem: search.Problem) -> float:
    """Least cost of all rings within the limits; inf if there is none."""
    rings = (search.evaluate(problem, *ring) for ring in every_ring(problem))
    return min(
        (search.cost_of(problem, ring) for ring in rings if search.within(problem, ring)),
        default=math.inf,
    )


def problem_of(swarm: Swarm, request: RouteRequest) -> search.Problem:
    """Over all peers that the request may use."""
    return cost.build_problem(swarm.view, request, usable(swarm.view, request))


def route_cost(swarm: Swarm, request: RouteRequest, problem: search.Problem) -> float:
    """What `find_route` gives, judged by the formulas of a route and not by those of the search.

    inf for none, nan for a route that breaks a limit or lacks room for the request's tokens.
    """
    try:
        route = find_route(swarm.view, request, 0.0, random.Random(0))
    except NoRoute:
        return math.inf
    times = cost.predict(swarm.view, request, route.stages, request.percentile)
    late = request.tpot_s is not None and times.tpot_s > request.tpot_s * (1 + 2e-9)
    late |= request.ttft_s is not None and times.ttft_s > request.ttft_s * (1 + 2e-9)
    room = min(swarm.view.announcement(MODEL, stage.peer).free_kv_tokens for stage in route.stages)
    if late or room < request.kv_tokens:
        return math.nan
    weigh = problem.weight_price, problem.weight_t, problem.weight_a
    return weigh[0] * route.price + weigh[1] * times.tpot_s + weigh[2] * times.ttft_s


def exact_small(graphs: int, bar: tqdm) -> Figures:
    """Random swarms of at most 12 peers against every ring."""
    same = missed = infeasible = without = told = 0
    for seed in itertools.count():
        if told == graphs:
            break
        rng = random.Random(seed)
        layers = rng.randint(3, 6)
        swarm = random_swarm(seed, rng.randint(2, 12), layers, longest=3, round_=seed % 2 == 0)
        request = limited(swarm, rng, tightest=0.95)
        if request is None:
            continue
        told += 1
        bar.update()
        problem = problem_of(swarm, request)
        least, mine = brute_force(problem), route_cost(swarm, request, problem)
        without += least == math.inf
        missed += mine == math.inf != least
        infeasible += math.isnan(mine) or (least == math.inf != mine)
        same += mine == least or abs(mine - least) <= 1e-7 * abs(least)
    return {
        "graphs": graphs,
        "same": same,
        "missed": missed,
        "infeasible": infeasible,
        "without_a_route": without,
    }


def exact_200(graphs: int, layers: int, bar: tqdm) -> Figures:
    """Swarms of 200 peers against Pareto labels in Python, without boxes, dual or any cut."""
    worst, equal, told = 0.0, 0, 0
    for seed in range(graphs):
        rng = random.Random(seed)
        swarm = random_swarm(seed, 200, layers, longest=max(4, layers // 4))
        request = limited(swarm, rng, tightest=1.02)
        bar.update()
        if request is None:
            continue
        problem = problem_of(swarm, request)
        answer = search.solve_python(problem)
        least = search.cost_of(problem, answer) if isinstance(answer, search.Ring) else math.inf
        mine = route_cost(swarm, request, problem)
        told += 1
        if mine == least:
            equal += 1
            continue
        excess = math.inf if math.inf in (mine, least) or math.isnan(mine) else mine / least - 1
        equal += abs(excess) <= 1e-7
        worst = max(worst, excess)
    return {"graphs": told, "layers": layers, "equal": equal / told, "worst_excess": worst}


# --- time -----------------------------------------------------------------------------------------

KINDS = ("none", "tpot", "ttft", "both")


def demanding(swarm: Swarm, request: RouteRequest, kind: str, rng: random.Random) -> RouteRequest:
    """The request with limits of a kind, 1.05 to 2 times the best there is."""
    if kind == "none":
        return request
    try:
        find_route(swarm.view, replace(request, tpot_s=1e-9), 0.0, rng)
    except NoRoute as error:
        best = error.achievable
    names = {"tpot": ("tpot_s",), "ttft": ("ttft_s",), "both": ("tpot_s", "ttft_s")}[kind]
    return replace(request, **{name: best[name] * rng.uniform(1.05, 2.0) for name in names})


def time_routes(count: int, layers: int, routes: int, bar: tqdm) -> Figures:
    """Milliseconds of `find_route` with spares on snapshots that are ready, by kind of request.

    Of the processor: one thread computes, and others on this machine do not count.
    """
    spent: dict[str, list[float]] = {kind: [] for kind in KINDS}
    swarms = [random_swarm(seed, count, layers) for seed in range(2 if count > 2000 else 8)]
    for index in range(routes):
        swarm, kind = swarms[index // len(KINDS) % len(swarms)], KINDS[index % len(KINDS)]
        rng = random.Random(index)
        request = replace(
            swarm.request, prompt_tokens=rng.randint(1, 600), new_tokens=rng.randint(1, 200)
        )
        try:
            request = demanding(swarm, request, kind, rng)
            find_route(swarm.view, replace(request, tpot_s=None, ttft_s=None), 0.0, rng)  # warm
            began = time.thread_time()
            find_route(swarm.view, request, 0.0, rng)
        except NoRoute:
            continue
        spent[kind].append((time.thread_time() - began) * 1e3)
        bar.update()
    every = sorted(itertools.chain(*spent.values()))
    times = {f"p50_{kind}": statistics.median(values) for kind, values in spent.items()}
    return {"p50": statistics.median(every), "p95": every[int(0.95 * len(every))], **times}


def time_update(count: int, layers: int) -> Figures:
    """Milliseconds until a snapshot with one changed record is ready to route on."""
    swarm = random_swarm(0, count, layers)
    view = swarm.view
    find_route(view, swarm.request, 0.0, random.Random(0))
    changed, loads = [], []
    for index in range(50):
        old = view.columns(MODEL).announcements[(index * 37) % count]
        new = replace(old, sequence=old.sequence + 1, busy=0.5, issued_s=float(index))
        began = time.thread_time()
        view = view.updated(new, float(index))
        view.columns(MODEL)
        changed.append((time.thread_time() - began) * 1e3)
        began = time.thread_time()
        view = view.with_loads(MODEL, {old.peer: new.load}, float(index))
        view.columns(MODEL)
        loads.append((time.thread_time() - began) * 1e3)
    return {"update_ms": statistics.median(changed), "load_ms": statistics.median(loads)}


def lost_by_candidates(graphs: int, layers: int, bar: tqdm) -> Figures:
    """How much dearer routes are at 1,000 peers because only candidates are searched."""
    excess, missed = [], 0
    for seed in range(graphs):
        rng = random.Random(seed)
        swarm = random_swarm(seed, 1000, layers)
        kind = KINDS[seed % len(KINDS)]
        bar.update()
        try:
            request = demanding(swarm, swarm.request, kind, rng)
            problem = problem_of(swarm, request)
        except NoRoute:
            continue
        best = search.Solver(problem).solve(effort=200_000)
        rows = select.select(swarm.view, request, usable(swarm.view, request))
        few = cost.build_problem(swarm.view, request, rows)
        mine = search.solve(few)
        if isinstance(best, search.Ring) and isinstance(mine, search.Ring):
            excess.append(search.cost_of(few, mine) / search.cost_of(problem, best) - 1)
        else:
            missed += isinstance(best, search.Ring)
    return {
        "graphs": len(excess),
        "missed": missed,
        "median": statistics.median(excess),
        "worst": max(excess),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a tenth of the graphs and routes")
    parser.add_argument("--times", action="store_true", help="the times alone, no comparisons")
    options = parser.parse_args()
    share = 10 if options.quick else 1

    def run(title: str, total: int, measure: Callable[[tqdm], Figures]) -> Figures:
        with tqdm(total=total, desc=title, leave=False, disable=None) as bar:
            found = measure(bar)
        print(
            f"{title}: " + ", ".join(f"{name} {value:.6g}" for name, value in found.items()),
            flush=True,
        )
        return found

    result: dict[str, object] = {"native": native.available()}
    graphs, oracle, loss = 3000 // share, 300 // share, 60 // share
    if not options.times:
        result["small"] = run("12 peers", graphs, lambda bar: exact_small(graphs, bar))
        result["exact_200"] = run("200 peers", oracle, lambda bar: exact_200(oracle, 16, bar))
    for count, routes in ((200, 400), (1000, 200), (10000, 80)):
        result[f"ms_{count}"] = run(
            f"time, {count} peers, 80 layers",
            routes // share,
            lambda bar, count=count, routes=routes: time_routes(count, 80, routes // share, bar),
        )
    result["update_10000"] = run("update, 10,000 peers", 1, lambda bar: time_update(10000, 80))
    if not options.times:
        result["candidates_1000"] = run(
            "candidates, 1,000 peers", loss, lambda bar: lost_by_candidates(loss, 80, bar)
        )
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
