"""Which GPUs form which pipeline, as HexGen decides it: the outer search of disjoint pipelines.

A partition says for each pipeline how many GPUs of each machine it has; GPUs in none idle. Moves
are HexGen's: *swap* (some GPUs go from one pipeline to another), *split* one in two, *merge* two;
the inner programme (`pipelines`) makes the best of each. What a partition is worth: SLO attainment
at a given rate in the queue model, then capacity; or, without a rate, the requests a second that
meet the deadline in the mean, which is smooth and costs microseconds. The search is annealing with
restarts: seeded, anytime, one partition at a time. HexGen's population of 100 with tournaments
spends its evaluations on copies of good partitions; memory of what was built makes a step of ours
two new pipelines.

A pipeline that cannot hold the model counts a little by the part of the memory that it has, so that
GPUs gather where a pipeline may come to be.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hexswarm.errors import UsageError
from hexswarm.records import Span
from hexswarm.router.placement.attainment import Curve, attainment
from hexswarm.router.placement.groups import group
from hexswarm.router.placement.pipelines import Builder, Built, Counts
from hexswarm.router.placement.plan import Plan, Unit

Partition = tuple[Counts, ...]

_JOBS_S = 60.0


@dataclass(frozen=True, slots=True)
class Disjoint:
    """A plan of pipelines that share nothing."""

    plan: Plan
    curves: tuple[Curve, ...]
    rate: float
    """Requests a second within the deadline in the mean, summed."""


def disjoint(
    builder: Builder,
    *,
    rng: random.Random,
    expired: Callable[[], bool],
    rate: float | None = None,
    rounds: int = 400,
    told: Callable[[float], None] = lambda worth: None,
) -> Disjoint:
    """The best partition until `expired`; UsageError: the cluster cannot hold the model once."""
    best: tuple[float, Partition] = (0.0, ())
    judge = _Judge(builder, rate, rng.getrandbits(32))
    while True:
        now = _start(builder, rng)
        worth = judge(now)
        for round in range(rounds):
            if expired():
                break
            heat = 0.08 * (1 - round / rounds) ** 2 * max(worth, 1e-9)
            tried = _moved(now, builder.gpus, rng)
            found = judge(tried)
            if found >= worth or rng.random() < math.exp((found - worth) / max(heat, 1e-12)):
                now, worth = tried, found
            if worth > best[0]:
                best = worth, now
                told(worth)
        if expired():
            break
    made = [built for counts in best[1] if (built := builder.build(counts))]
    if not made:
        raise UsageError(
            f"no pipeline of {builder.cluster.name} serves {builder.model.name} in time",
            remedy="allow a larger SLO scale, or add machines",
        )
    return _disjoint(builder, made)


class _Judge:
    """What a partition is worth."""

    def __init__(self, builder: Builder, rate: float | None, seed: int) -> None:
        self._builder = builder
        self._need = builder.model.layers * builder.model.layer_bytes
        self._memory = [
            builder.cluster.types[node.type].memory_bytes / count
            for node, count in zip(builder.cluster.nodes, builder.gpus, strict=True)
        ]
        self._jobs = rate and builder.slo.jobs(rate, _JOBS_S, random.Random(seed))

    def __call__(self, partition: Partition) -> float:
        made = [(counts, self._builder.build(counts)) for counts in partition]
        capacity = sum(built.rate for _, built in made if built)
        hope = sum(self._hope(counts) for counts, built in made if not built)
        if not self._jobs:
            return capacity + 1e-3 * hope
        met = attainment([built.curve for _, built in made if built], self._jobs)
        return met + 1e-3 * capacity + 1e-6 * hope

    def _hope(self, counts: Counts) -> float:
        held = sum(c * memory for c, memory in zip(counts, self._memory, strict=True))
        return min(1.0, held / self._need) ** 2


def _start(builder: Builder, rng: random.Random) -> Partition:
    """One pipeline for each region, or for each machine, as HexGen starts."""
    nodes = builder.cluster.nodes
    by_region = rng.random() < 0.5
    keys = [node.region if by_region else node.id for node in nodes]
    return tuple(
        tuple(count if key == mine else 0 for key, count in zip(keys, builder.gpus, strict=True))
        for mine in dict.fromkeys(keys)
    )


def _moved(partition: Partition, gpus: Counts, rng: random.Random) -> Partition:
    """Another partition, one move away; empty pipelines vanish."""
    groups = [list(counts) for counts in partition]
    move = rng.random()
    if move < 0.15:
        _split(groups, rng)
    elif move < 0.25 and len(groups) > 1:
        _merge(groups, rng)
    else:
        for _ in range(1 + (rng.random() < 0.3)):
            _swap(groups, gpus, rng)
    return tuple(sorted((tuple(counts) for counts in groups if any(counts)), reverse=True))


def _split(groups: list[list[int]], rng: random.Random) -> None:
    """Half of one pipeline's GPUs, or its machines' halves, become another."""
    whole = rng.choice(groups)
    if rng.random() < 0.5:
        part = [count // 2 for count in whole]
    else:
        part = [count if rng.random() < 0.5 else 0 for count in whole]
    whole[:] = [count - taken for count, taken in zip(whole, part, strict=True)]
    groups.append(part)


def _merge(groups: list[list[int]], rng: random.Random) -> None:
    first, second = rng.sample(range(len(groups)), 2)
    groups[first] = [a + b for a, b in zip(groups[first], groups[second], strict=True)]
    del groups[second]


def _swap(groups: list[list[int]], gpus: Counts, rng: random.Random) -> None:
    """Some GPUs of one machine go from one pipeline, or from idling, to another, or to idling."""
    row = rng.randrange(len(gpus))
    idle = gpus[row] - sum(counts[row] for counts in groups)
    givers: list[list[int] | None] = [counts for counts in groups if counts[row]]
    givers += [None] if idle else []
    giver = rng.choice(givers)
    taker = rng.choice([counts for counts in [*groups, None] if counts is not giver])
    most = idle if giver is None else giver[row]
    count = min(most, rng.choice((1, 2, 2, 4, 4, 8)))
    if giver is not None:
        giver[row] -= count
    if taker is not None:
        taker[row] += count


def _disjoint(builder: Builder, made: Sequence[Built]) -> Disjoint:
    """The plan, with each machine's GPUs handed out in order."""
    cluster, model = builder.cluster, builder.model
    units: list[Unit] = []
    spans: list[Span] = []
    pipelines: list[tuple[int, ...]] = []
    taken = [0] * len(cluster.nodes)
    for built in made:
        done = 0
        for part in built.parts:
            node, first = cluster.nodes[part.machine], taken[part.machine]
            taken[part.machine] += part.degree
            unit: Unit | None = builder.units[part.machine][part.degree]
            if unit is not None and unit.grouped:
                unit = group(cluster, model, [(node.id, first + gpu) for gpu in range(part.degree)])
            assert unit is not None, "what was built once can be built again"
            units.append(unit)
            spans.append(Span(done, done + part.layers))
            done += part.layers
        pipelines.append(tuple(range(len(units) - len(built.parts), len(units))))
    return Disjoint(
        Plan(model.name, cluster.name, tuple(units), tuple(spans), tuple(pipelines)),
        tuple(built.curve for built in made),
        sum(built.rate for built in made),
    )
