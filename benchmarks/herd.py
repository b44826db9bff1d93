"""Routing policies under load on stale views: time per token, refusals, limits kept.

A simulation (`herd_world.py`): 48 unlike peers in four regions, 200 clients, views 5-30 s old.
Every policy (`herd_policies.py`) meets the same swarm and the same arrivals. The bars: at load 0.8
our 95th percentile of the time per token is at most 0.7 of the better of the two other rules, in
the mean of the seeds; and at load 0.7 at least 95 % of the requests whose limit was accepted keep
it. A limit is drawn at 1.2-3 times the time per token of the best route of the idle swarm.

    python benchmarks/herd.py                    # the figures; last line is one JSON object
    python benchmarks/herd.py --ablations        # also: ours at load 0.8 without single ideas
    python benchmarks/herd.py --quick            # few requests and one seed: to see that it runs

Figures are over requests, not tokens: the mean time per token of each request after its first
token, of requests that came after the warm-up. "busy" is the share of a peer's throughput in use,
its mean over peers and its standard deviation: what is uneven is wasted.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

# Loaded by path in tests: the neighbours must be found then as well.
sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
from herd_policies import Ours, PerLayer, Petals, links
from herd_world import (
    CLIENTS,
    HIDDEN_BYTES,
    LAYERS,
    MODEL,
    Policy,
    Result,
    World,
    draw_requests,
    draw_world,
    simulate,
)
from tqdm import tqdm

from hexswarm.records import Load, RouteRequest
from hexswarm.router.network import snapshot
from hexswarm.router.routing import find_route

REQUESTS = 1500
SEEDS = (1, 2, 3)
LOADS = (0.3, 0.5, 0.7)
"""Told of one seed, to show where the herd begins."""
BAR_LOAD, BAR_RATIO = 0.8, 0.7
LIMIT_LOAD, BAR_KEPT = 0.7, 0.95
ALWAYS = 1e9
"""As `thinning`: the share of peers considered does not wait until the swarm is busy."""
OTHERS = ("petals", "per-layer")

Make = Callable[[World, int], Policy]

POLICIES: Mapping[str, Make] = {
    "petals": lambda world, seed: Petals(world),
    "per-layer": lambda world, seed: PerLayer(world),
    "ours": Ours,
    "ours: limits": lambda world, seed: Ours(
        world, seed, limits=True, idle_tpot_s=idle_tpot_s(world)
    ),
}

ABLATIONS: Mapping[str, Make] = {
    "ours: no piggy-back": lambda world, seed: Ours(world, seed, piggyback=False),
    "ours: no spread": lambda world, seed: Ours(world, seed, spread=0.0),
    "ours: no hysteresis": lambda world, seed: Ours(world, seed, hysteresis=False),
    "ours: half the peers": lambda world, seed: Ours(world, seed, consider=0.5, hysteresis=False),
    "ours: half, kept": lambda world, seed: Ours(world, seed, consider=0.5),
    "ours: limits, half": lambda world, seed: Ours(
        world,
        seed,
        consider=0.5,
        thinning=ALWAYS,
        hysteresis=False,
        limits=True,
        idle_tpot_s=idle_tpot_s(world),
    ),
}


@dataclass(frozen=True, slots=True)
class Figures:
    """One policy on one world at one load."""

    policy: str
    load: float
    seed: int
    requests: int
    tpot_p50_s: float
    tpot_p95_s: float
    tpot_p99_s: float
    ttft_p95_s: float
    refused: float
    """Share of requests that got no route."""
    kept: float
    """Share of the answered requests that kept the limit drawn for them, promised or not."""
    refusals: float
    """Attempts that were refused, a request."""
    stages: float
    busy: float
    busy_spread: float
    wall_s: float


def idle_tpot_s(world: World) -> float:
    """Predicted time per token of the best route if nobody else is there."""
    idle = [
        world.announcement(index, Load(free_kv_tokens=machine.kv_tokens), 0.0, 0)
        for index, machine in enumerate(world.machines)
    ]
    request = RouteRequest(MODEL, LAYERS, HIDDEN_BYTES, prompt_tokens=200, new_tokens=1000)
    return find_route(snapshot(idle, links(world), 0.0), request, 0.0, random.Random(0)).tpot_s


def figures(
    name: str, load: float, seed: int, result: Result, limit_s: float, wall_s: float
) -> Figures:
    """Sum one run up; `limit_s` is the time per token of the best route of the idle swarm."""
    answered = [item for item in result.outcomes if item.accepted]
    tpot = [item.tpot_s for item in answered] or [math.nan]
    ttft = [item.ttft_s for item in answered] or [math.nan]
    kept = [item.tpot_s <= item.request.strictness * limit_s for item in answered]
    p50, p95, p99 = (float(value) for value in np.percentile(tpot, [50, 95, 99]))
    return Figures(
        policy=name,
        load=load,
        seed=seed,
        requests=len(result.outcomes),
        tpot_p50_s=p50,
        tpot_p95_s=p95,
        tpot_p99_s=p99,
        ttft_p95_s=float(np.percentile(ttft, 95)),
        refused=1 - len(answered) / len(result.outcomes),
        kept=sum(kept) / max(1, len(kept)),
        refusals=statistics.fmean(item.refusals for item in result.outcomes),
        stages=statistics.fmean(item.stages for item in answered) if answered else math.nan,
        busy=statistics.fmean(result.busy),
        busy_spread=statistics.pstdev(result.busy),
        wall_s=wall_s,
    )


def run(
    name: str,
    make: Make,
    load: float,
    seed: int,
    requests: int = REQUESTS,
    peers: int = 48,
    clients: int = CLIENTS,
) -> Figures:
    """Simulate one policy at one load; the same seed is the same swarm and the same arrivals."""
    world = draw_world(random.Random(seed), peers, clients)
    drawn = draw_requests(world, load, requests, random.Random(1000 * seed + round(100 * load)))
    began = time.perf_counter()
    result = simulate(world, drawn, make(world, seed), seed)
    return figures(name, load, seed, result, idle_tpot_s(world), time.perf_counter() - began)


def plan(seeds: Sequence[int], *, ablations: bool) -> list[tuple[str, Make, float, int]]:
    """All runs: the bars on every seed, the rest on the first."""
    compared = [*OTHERS, "ours"]
    todo = [(name, POLICIES[name], load, seeds[0]) for load in LOADS for name in compared]
    todo += [(name, POLICIES[name], BAR_LOAD, seed) for seed in seeds for name in compared]
    todo += [("ours: limits", POLICIES["ours: limits"], LIMIT_LOAD, seed) for seed in seeds]
    if ablations:
        todo += [
            (name, make, LIMIT_LOAD if "limits" in name else BAR_LOAD, seed)
            for seed in seeds
            for name, make in ABLATIONS.items()
        ]
    return todo


def ratios(found: Sequence[Figures], policy: str) -> list[float]:
    """For each seed the policy's p95 at the bar's load over the better of the other rules."""
    at = {(item.policy, item.seed): item.tpot_p95_s for item in found if item.load == BAR_LOAD}
    return [
        p95 / min(at[other, seed] for other in OTHERS)
        for (name, seed), p95 in sorted(at.items())
        if name == policy
    ]


def summary(found: Sequence[Figures]) -> dict[str, object]:
    """The figures with bars, and all runs."""
    limited = [item for item in found if item.policy == "ours: limits"]
    answered = [item.requests * (1 - item.refused) for item in limited]
    kept = sum(n * item.kept for n, item in zip(answered, limited, strict=True)) / max(
        1, sum(answered)
    )
    told = {name: ratios(found, name) for name in dict.fromkeys(item.policy for item in found)}
    ratio = statistics.fmean(told["ours"])
    return {
        "ratio_p95": ratio,
        "ratios_p95": {name: values for name, values in told.items() if values},
        "ratio_met": ratio <= BAR_RATIO,
        "limits_kept": kept,
        "limits_accepted": 1 - statistics.fmean(item.refused for item in limited),
        "limits_met": kept >= BAR_KEPT,
        "runs": [asdict(item) for item in found],
    }


def table(found: Sequence[Figures]) -> str:
    """One line a run, by load, seed and policy as they were planned."""
    head = (
        f"{'load':>4} {'seed':>4} {'policy':22} {'time per token p50, p95, p99 ms':>32} "
        f"{'ttft p95':>9} {'refused':>8} {'limit kept':>11} {'stages':>7} {'busy':>12} {'run':>6}"
    )
    rows = [
        f"{f.load:4.1f} {f.seed:4d} {f.policy:22} {1e3 * f.tpot_p50_s:14.0f} "
        f"{1e3 * f.tpot_p95_s:8.0f} {1e3 * f.tpot_p99_s:8.0f} {f.ttft_p95_s:7.1f} s "
        f"{f.refused:8.1%} {f.kept:11.1%} {f.stages:7.1f} {f.busy:5.0%} ± {f.busy_spread:4.0%} "
        f"{f.wall_s:4.0f} s"
        for f in found
    ]
    return "\n".join([head, *rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--ablations", action="store_true", help="ours without single ideas")
    parser.add_argument("--quick", action="store_true", help="one seed, few requests")
    parser.add_argument("--requests", type=int, default=REQUESTS, help="measured ones in a run")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    options = parser.parse_args()
    requests, seeds = options.requests, options.seeds
    if options.quick:
        requests, seeds = 150, seeds[:1]
    todo = plan(seeds, ablations=options.ablations)
    found = []
    with tqdm(todo, unit="run", disable=not sys.stderr.isatty()) as bar:
        for name, make, load, seed in bar:
            bar.set_description(f"{name} at {load}, seed {seed}")
            found.append(run(name, make, load, seed, requests))
    print(table(found))
    print(json.dumps(summary(found)))


if __name__ == "__main__":
    main()
