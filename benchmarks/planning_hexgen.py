"""HexGen's pools: the highest rate of requests with 99 % SLO attainment, by plan.

    python benchmarks/planning_hexgen.py [--clusters DIR] [--pool NAME] [--seconds N] [--quick]

The pools are HexGen's: 58 unlike GPUs against 16 A100 at equal rent, Llama-2-70B, prompts and
answers of 32 to 128 tokens (both uniform), Poisson arrivals. A request is in time when its whole
answer comes within 5 times (the SLO scale) what the A100 pool's quickest plan takes for the same
request alone.

- *general*: our plan: groupings and placement by flow within the deadline; requests go along the
  paths of the flow, which share units, to the one with the least under way for what it carries;
  or the plan of *balanced*, if the simulator finds that it keeps more requests in time;
- *general-free*: the same plan with our router, which knows no paths;
- *hexgen*: disjoint pipelines, inner programme for the lowest latency, as in the paper;
- *balanced*: disjoint pipelines with our bound on the slowest stage in the programme;
- *a100*: the same search (balanced) on the A100 pool; *a100-tp8*: each machine one group of 8.

Two judges. The queue model of `router/placement/attainment.py`, with batches of 64 rows and, as
HexGen itself serves, of one row. And the simulator, where every plan has the same step times,
chunked prompts and rings, so that plans and routing are compared and nothing else; rates are found
to 6 % (the last that held). The queue model's figures are bisected.

Prints a table and, as its last line, one JSON object.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path as File

from tqdm import tqdm

from hexswarm.records import Load, Span
from hexswarm.router.placement import aims, attainment, regroup, speeds
from hexswarm.router.placement.attainment import Curve, Slo
from hexswarm.router.placement.cluster import COORDINATOR, Cluster, Model, parse
from hexswarm.router.placement.flow import Flow
from hexswarm.router.placement.groups import grouping
from hexswarm.router.placement.partition import Disjoint, disjoint
from hexswarm.router.placement.paths import Path, paths
from hexswarm.router.placement.pipelines import Builder, quickest
from hexswarm.router.placement.plan import Plan
from hexswarm.simulator.ours import Ours, Wishes
from hexswarm.simulator.policy import Execution, Policy, Request, View, Visit, Visits
from hexswarm.simulator.rival_hexgen import HexGen
from hexswarm.simulator.rival_hops import Rival
from hexswarm.simulator.run import simulate

NAME, SCALE, WANTED, MEAN = "llama-70b", 5.0, 0.99, 80.0
ROWS = 64
"""Of a batch, as `hexswarm.peer.scheduler` composes them."""
STEP = 1.06
MOST_RUNS = 8
SINCE_S, JUDGED_S, UNTIL_S = 25.0, 55.0, 85.0
"""Arrivals go on to the end; judged are those between the first two."""


class Groups(HexGen):
    """Disjoint pipelines on our data plane: HexGen's dispatch, chunked prompts, rings."""

    execution = Execution(central=True)


class Along(Rival):
    """The paths of a flow, by what is under way on each and what each carries."""

    name = "paths"
    execution = Execution(central=True)

    def __init__(self, cluster: Cluster, model: Model, plan: Plan, ways: Sequence[Path]) -> None:
        super().__init__(cluster, model, plan)
        self._ways = ways
        self._under_way = [0] * len(ways)
        self._taken: dict[int, int] = {}

    def route(self, now: float, request: Request, view: View) -> Visits | None:
        self._leave(request)
        able = [at for at, way in enumerate(self._ways) if not view.refused & {*way.units}]
        if not able:
            return None
        rate = [way.tokens_per_s for way in self._ways]
        best = min(able, key=lambda at: ((self._under_way[at] + 1) / rate[at], at))
        self._taken[request.id] = best
        self._under_way[best] += 1
        way = self._ways[best]
        return tuple(map(Visit, way.units, way.spans))

    def refused(
        self, now: float, request: Request, refusing: frozenset[int], loads: Mapping[int, Load]
    ) -> None:
        self._leave(request)

    def ended(self, now: float, request: Request, visits: Visits) -> None:
        self._leave(request)

    def _leave(self, request: Request) -> None:
        if request.id in self._taken:
            self._under_way[self._taken.pop(request.id)] -= 1


@dataclass(frozen=True, slots=True)
class Case:
    """A plan and who routes on it."""

    name: str
    cluster: Cluster
    model: Model
    plan: Plan
    pipelines: tuple[tuple[int, ...], ...]
    """Empty: all may hand to all."""
    curves: tuple[Curve, ...]
    guess: float
    """Requests a second that the planner expects."""
    ways: tuple[Path, ...] = ()
    """Of the flow."""

    def policy(self, seed: int) -> Policy:
        if self.ways:
            return Along(self.cluster, self.model, self.plan, self.ways)
        if self.pipelines:
            return Groups(self.cluster, self.model, self.plan, self.pipelines)
        return Ours(self.cluster, self.model, self.plan, seed=seed, wishes=Wishes())


def pool(folder: File, name: str) -> Cluster:
    """A pool, with the speeds that HexGen's lengths give it."""
    cluster = parse(json.loads((folder / f"{name}.json").read_text()))
    return speeds.for_lengths(cluster, NAME, MEAN, MEAN)


def searched(builder: Builder, seed: int, seconds: float) -> Disjoint:
    end = time.monotonic() + seconds
    return disjoint(builder, rng=random.Random(seed), expired=lambda: time.monotonic() > end)


def of(name: str, builder: Builder, found: Disjoint) -> Case:
    model = builder.model
    return Case(
        name, builder.cluster, model, found.plan, found.plan.pipelines, found.curves, found.rate
    )


def planned(hetero: Cluster, a100: Cluster, slo: Slo, seed: int, seconds: float) -> list[Case]:
    """All plans, each from as many seconds of search."""
    model, other = hetero.model(NAME), a100.model(NAME)
    paper = Builder(hetero, model, slo, max_rows=ROWS, paper=True)
    ours = Builder(hetero, model, slo, max_rows=ROWS)
    best = searched(ours, seed, seconds)
    cases = [of("hexgen", paper, searched(paper, seed, seconds)), of("balanced", ours, best)]
    deadline = aims.Deadline.of(slo, hops=0.0, max_rows=ROWS)
    found = regroup.general(
        hetero,
        model,
        deadline,
        rng=random.Random(seed),
        clock=time.monotonic,
        until=time.monotonic() + seconds,
        start=best.plan,
    )
    rate = found.flow / (2 * MEAN)
    limited = deadline.limited(model, found.plan.units)
    edges = Flow(deadline.near(hetero), model, limited).edges(found.plan.spans)
    ways = paths(edges, found.plan.spans)
    mixed = Case("general", hetero, model, found.plan, (), (), rate, ways)
    apart = replace(of("general", ours, best), curves=())
    cases.append(_better(mixed, apart, slo, seed))
    cases.append(Case("general-free", hetero, model, found.plan, (), (), rate / 2))
    alike = Builder(a100, other, slo, max_rows=ROWS)
    cases.append(of("a100", alike, searched(alike, seed, seconds / 2)))
    cases.append(symmetric(alike))
    return cases


def _better(mixed: Case, apart: Case, slo: Slo, seed: int) -> Case:
    """Disjoint pipelines are plans like others; flow overstates plans whose units share much."""
    rate = min(mixed.guess, apart.guess)
    return max((mixed, apart), key=lambda case: attained(case, slo, rate, seed))


def symmetric(builder: Builder) -> Case:
    """Every machine one group that holds all layers."""
    cluster, model = builder.cluster, builder.model
    made = [grouping(cluster, model, node, (8,)) for node in cluster.nodes]
    units = tuple(unit for found in made if found for unit in found)
    plan = Plan(NAME, cluster.name, units, (Span(0, model.layers),) * len(units))
    pipelines = [attainment.pipeline(cluster, model, [unit], [model.layers]) for unit in units]
    curves = tuple(attainment.curve(model, made, ROWS) for made in pipelines)
    rate = sum(builder.rate(made) for made in curves)
    lines = tuple((at,) for at in range(len(units)))
    return Case("a100-tp8", cluster, model, plan, lines, curves, rate)


def unbatched(hetero: Cluster, a100: Cluster, slo: Slo, seed: int, seconds: float) -> float:
    """Our disjoint pipelines against the A100 pool's when nobody batches, in the queue model."""
    rates = []
    for cluster in (hetero, a100):
        builder = Builder(cluster, cluster.model(NAME), slo, max_rows=1)
        found = searched(builder, seed, seconds)
        rates.append(attainment.highest_rate(found.curves, slo, seed))
    return rates[0] / rates[1]


def attained(case: Case, slo: Slo, rate: float, seed: int) -> float:
    """In the simulator: the share of requests in time."""
    jobs = slo.jobs(rate, UNTIL_S, random.Random(seed))
    requests = [
        Request(row, job.arrives_s, job.input_tokens, job.output_tokens, COORDINATOR)
        for row, job in enumerate(jobs)
    ]
    report = simulate(
        case.cluster, case.model, case.plan, case.policy(seed), requests, seed=seed, until_s=UNTIL_S
    )
    judged = [
        (one.done, one.latency_s, slo.limit_s(one.request.input_tokens, one.request.output_tokens))
        for one in report.outcomes
        if SINCE_S <= one.request.arrives_s < JUDGED_S
    ]
    late = sum(not done or took > limit for done, took, limit in judged)
    return 1 - late / len(judged)


def climb(holds: Callable[[float], bool], guess: float) -> float:
    """The highest rate that was seen to hold: a bracket around a guess, then halves of it."""
    low, high, rate = 0.0, float("inf"), guess
    for _ in range(MOST_RUNS):
        if holds(rate):
            low = rate
        else:
            high = rate
        if low and high < low * STEP:
            break
        if low and high < float("inf"):
            rate = (low * high) ** 0.5
        else:
            rate = low * STEP**2 if low else high / STEP**4
    return low


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--clusters", type=File, default=File("../shared/clusters"))
    parser.add_argument("--pool", default="hexgen-full-price-58")
    parser.add_argument("--seconds", type=float, default=40.0, help="of search for each plan")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="the queue model alone")
    parser.add_argument("--only", nargs="*", help="simulate these plans alone")
    options = parser.parse_args(argv)
    a100 = pool(options.clusters, "hexgen-homogeneous-a100-16")
    hetero = pool(options.clusters, options.pool)
    slo = Slo(SCALE, quickest(a100, a100.model(NAME)))
    cases = planned(hetero, a100, slo, options.seed, options.seconds)
    figures: dict[str, float] = {"deadline_token_s": round(slo.token_s, 4)}
    for case in tqdm(cases, disable=None):
        figures[f"{case.name}_expected"] = round(case.guess, 2)
        if case.curves:
            queue = attainment.highest_rate(case.curves, slo, options.seed)
            figures[f"{case.name}_queue"] = round(queue, 2)
        if not options.quick and (not options.only or case.name in options.only):
            rate = climb(
                lambda rate, case=case: attained(case, slo, rate, options.seed) >= WANTED,
                case.guess,
            )
            figures[f"{case.name}_simulated"] = round(rate, 2)
        tqdm.write(f"{case.name}: {figures}", file=sys.stderr)
    ratio = unbatched(hetero, a100, slo, options.seed, options.seconds / 2)
    figures["unbatched_over_a100_queue"] = round(ratio, 2)
    _ratios(figures)
    for name, value in figures.items():
        print(f"{name:32} {value:10.3f}")
    print(json.dumps(figures))


def _ratios(figures: dict[str, float]) -> None:
    ours = figures.get("general_simulated")
    for other in ("hexgen", "balanced", "general-free", "a100", "a100-tp8"):
        theirs = figures.get(f"{other}_simulated")
        if ours and theirs:
            figures[f"general_over_{other}"] = round(ours / theirs, 3)


if __name__ == "__main__":
    main(sys.argv[1:])
