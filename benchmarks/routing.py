"""The router measured without a network: exactness, time per route, upkeep of the snapshot.

    python benchmarks/routing.py [--quick]

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
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from hexswarm.errors import NoRoute
from hexswarm.progress import Progress
from hexswarm.records import Announcement, Coordinates, Link, PeerId, RouteRequest, Span, Speed
from hexswarm.router import cost, search, select
from hexswarm.router.candidates import usable
from hexswarm.router.network import Snapshot, snapshot
from hexswarm.router.routing import find_route

MODEL = "ab" * 32
CLIENT = PeerId("12D3KooWClient")
REGIONS = 6


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
        length = rng.randint(min(4, layers), min(longest, layers))
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
    loose = {name: 1e-9 for name in ("tpot_s", "ttft_s")}
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
        peers: tuple[int, ...], ends: tuple[int, ...], reached: int
    ) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
        if reached == problem.layers:
            yield peers, ends
            return
        for index in range(len(problem.first)):
            if index not in peers and problem.first[index] <= reached < problem.end[index]:
                for end in range(reached + 1, int(problem.end[index]) + 1):
                    yield from ways_on((*peers, index), (*ends, end), end)

    yield from ways_on((), (), 0)


def brute_force(problem: search.Problem) -> float:
    """Least cost of all rings within the limits; inf if there is none."""
    best = math.inf
    for peers, ends in every_ring(problem):
        ring = search.evaluate(problem, peers, ends)
        if search.within(problem, ring):
            best = min(best, search.cost_of(problem, ring))
    return best


def problem_of(swarm: Swarm, request: RouteRequest) -> search.Problem:
    return cost.build_problem(swarm.view, request, usable(swarm.view, request))


def route_cost(swarm: Swarm, request: RouteRequest, problem: search.Problem) -> float:
    """What `find_route` gives, judged by the formulas of the route and not by the search."""
    try:
        route = find_route(swarm.view, request, 0.0, random.Random(0))
    except NoRoute:
        return math.inf
    times = cost.predict(swarm.view, request, route.stages, request.percentile)
    room = 1 + 2e-9
    late = request.tpot_s is not None and times.tpot_s > request.tpot_s * room
    if late or (request.ttft_s is not None and times.ttft_s > request.ttft_s * room):
        return -math.inf  # an infeasible route was returned
    p = problem
    return (
        p.weight_price * route.price + p.weight_t * times.tpot_s + p.weight_a * times.ttft_s
    )
