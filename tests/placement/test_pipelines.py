"""Disjoint pipelines: the queue model, the inner programme, the outer search, the general plan."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hexswarm.errors import UsageError
from hexswarm.router.placement import aims, attainment, groups, regroup
from hexswarm.router.placement.attainment import Curve, Job, Pipeline, Slo, Stage
from hexswarm.router.placement.cluster import (
    Cluster,
    GpuSpec,
    Model,
    Node,
    NodeType,
    Profile,
    Way,
)
from hexswarm.router.placement.flow import Flow
from hexswarm.router.placement.partition import disjoint
from hexswarm.router.placement.pipelines import Builder, Part, quickest
from tests.placement.worlds import CONSTANTS

SMALL = Model("small", 6, 1e9, 16384, 2, 4096, 80, 80, 2048)
KINDS = {
    "fast": GpuSpec(155e12, 768e9, 4e9, 12e9),
    "slow": GpuSpec(77e12, 448e9, 3e9, 12e9),
}


def cluster(*machines: tuple[str, int, str]) -> Cluster:
    """Machines of (kind, GPUs, region); regions are 20 ms apart."""
    nodes = tuple(
        Node(f"n{row}", f"{kind}{count}", region, 1.25e9, 1.25e9)
        for row, (kind, count, region) in enumerate(machines)
    )
    types = {
        f"{kind}{count}": NodeType(
            f"{kind}{count}", kind, count, KINDS[kind].memory_bytes * count, {}, KINDS[kind]
        )
        for kind, count, _ in machines
    }
    names = {region for _, _, region in machines} | {"hub"}
    regions = {
        (a, b): Way(6e8, 2e-4 if a == b else 0.02)
        for a, b in itertools.product(sorted(names), repeat=2)
    }
    hub = Node("coordinator", "", "hub", 1.25e9, 1.25e9)
    models = {SMALL.name: SMALL}
    return Cluster("test", "", models, types, nodes, hub, {}, regions, CONSTANTS, {})


def flat(layer_s: float, row_s: float, kv_tokens: int = 10**6) -> Profile:
    """A profile whose times are straight lines."""
    points = tuple((float(n), layer_s + row_s * n) for n in (1, 512))
    room = (0, *[kv_tokens] * 6)
    return Profile((0.0, *[1.0] * 6), room, ((16.0, layer_s), (2048.0, layer_s * 2)), points)


def pipe(*stages: tuple[int, Profile], hops_s: float = 0.0) -> Pipeline:
    return Pipeline(tuple(Stage(held, profile) for held, profile in stages), hops_s, 0.0)


def slo(scale: float = 5.0) -> Slo:
    return Slo(scale, pipe((6, flat(0.01, 1e-5))))


# --- the queue model -----------------------------------------------------------------------------


@settings(max_examples=30)
@given(st.floats(1e-4, 1e-2), st.floats(1e-6, 1e-3), st.integers(1, 64))
def test_a_curve_rises_and_meets_its_capacity(layer_s: float, row_s: float, rows: int) -> None:
    """More requests in flight never make a token quicker nor the pipeline slower."""
    made = attainment.curve(SMALL, pipe((3, flat(layer_s, row_s)), (3, flat(layer_s, 0))), rows)
    through = [n / s for n, s in enumerate(made.token_s)]
    assert all(a <= b + 1e-12 for a, b in itertools.pairwise(made.token_s))
    assert all(rate <= made.tokens_per_s * (1 + 1e-9) for rate in through)
    assert through[-1] >= 0.95 * made.tokens_per_s


def test_one_request_alone_takes_what_its_stages_take() -> None:
    profile = flat(0.01, 1e-5)
    made = pipe((2, profile), (4, profile), hops_s=0.03)
    token_s = 6 * profile.decode_layer_s(1) + 0.03
    prompt_s = 6 * profile.prefill_layer_s(50) + 0.03
    assert made.alone_s(50, 11) == pytest.approx(prompt_s + 10 * token_s)


def test_one_server_of_equal_jobs_by_hand() -> None:
    """Two jobs at once, of 10 tokens and no prompt, at 1 s a token alone and 2 s together."""
    server = Curve((1.0, 1.0, 2.0), (1.0, 1.0, 2.0), 2, 1.0)
    jobs = [Job(0.0, 1, 10, limit) for limit in (20.0, 20.5)]
    assert attainment.attainment([server], jobs, skip=0.0) == 1.0
    jobs = [Job(0.0, 1, 10, 19.0), Job(0.0, 1, 10, 19.0)]
    assert attainment.attainment([server], jobs, skip=0.0) == 0.0
    jobs = [Job(0.0, 1, 10, 11.0), Job(10.0, 1, 10, 11.0)]
    assert attainment.attainment([server], jobs, skip=0.0) == 1.0


def test_who_finds_no_room_waits() -> None:
    server = Curve((1.0, 1.0), (1.0, 1.0), 1, 1.0)
    jobs = [Job(0.0, 1, 10, limit) for limit in (10.5, 10.5)]
    assert attainment.attainment([server], jobs, skip=0.0) == 0.5
    assert attainment.attainment([server, server], jobs, skip=0.0) == 1.0


@settings(max_examples=10)
@given(st.integers(0, 2**32), st.floats(0.5, 3.0))
def test_more_pipelines_never_serve_less(seed: int, rate: float) -> None:
    """A second equal pipeline does not lower the attainment, a looser scale neither."""
    made = attainment.curve(SMALL, pipe((6, flat(0.02, 1e-3))), 16)
    limit, loose = slo(2.0), slo(4.0)
    jobs = limit.jobs(rate, 40.0, random.Random(seed))
    later = loose.jobs(rate, 40.0, random.Random(seed))
    one = attainment.attainment([made], jobs)
    assert attainment.attainment([made, made], jobs) >= one
    assert attainment.attainment([made], later) >= one


def test_the_highest_rate_is_below_the_capacity_and_kept() -> None:
    made = attainment.curve(SMALL, pipe((6, flat(0.01, 2e-4))), 64)
    rate = attainment.highest_rate([made], slo(), 1)
    assert 0.3 * made.tokens_per_s / 80 < rate < made.tokens_per_s / 80
    jobs = slo().jobs(0.9 * rate, 60.0, random.Random(5))
    assert attainment.attainment([made], jobs) >= 0.98


def test_wrong_rates_are_refused() -> None:
    with pytest.raises(UsageError, match="positive"):
        slo().jobs(0.0, 1.0, random.Random(1))
    assert attainment.attainment([], slo().jobs(1.0, 9.0, random.Random(1))) == 0.0


# --- one pipeline --------------------------------------------------------------------------------


def builder(pool: Cluster, *, paper: bool = False, scale: float = 20.0) -> Builder:
    return Builder(pool, SMALL, slo(scale), paper=paper)


def every_cut(made: Builder, machine: int, count: int) -> list[list[Part]]:
    """All ways to use at most `count` GPUs of a machine, in every order, with every cut."""
    found: list[list[Part]] = [[]]
    for degree in (size for size in made.units[machine] if size <= count):
        most = min(made.units[machine][degree].profile.max_layers, SMALL.layers)
        for tail in every_cut(made, machine, count - degree):
            found += [[Part(machine, degree, held), *tail] for held in range(1, most + 1)]
    return found


@pytest.mark.parametrize("slowest_s", [float("inf"), 0.02, 0.013])
@pytest.mark.parametrize("rows", [1, 32])
def test_the_programme_against_trying_everything(slowest_s: float, rows: int) -> None:
    made = builder(cluster(("fast", 3, "x"), ("slow", 2, "x")))
    layer = {
        (row, size): made._layer_s(row, size, rows) for row in (0, 1) for size in made.units[row]
    }

    def cost(parts: list[Part]) -> float:
        return sum(part.layers * layer[part.machine, part.degree] for part in parts)

    possible = [
        [*first, *second]
        for first in every_cut(made, 0, 3)
        for second in every_cut(made, 1, 2)
        if sum(part.layers for part in [*first, *second]) == SMALL.layers
        and all(cost([part]) <= slowest_s for part in [*first, *second])
    ]
    found = made.cheapest([0, 1], (3, 2), rows, slowest_s)
    assert (found is None) == (not possible)
    if found is not None:
        assert sum(part.layers for part in found) == SMALL.layers
        assert cost(list(found)) == pytest.approx(min(map(cost, possible)))
        assert all(cost([part]) <= slowest_s + 1e-12 for part in found)


def test_machines_follow_each_other_by_nearness() -> None:
    made = builder(cluster(("fast", 2, "x"), ("fast", 2, "y"), ("fast", 2, "x")))
    order = made._order((2, 2, 2))
    assert order in ([0, 2, 1], [2, 0, 1], [1, 0, 2], [1, 2, 0])


def test_machines_that_are_alike_change_places() -> None:
    made = builder(cluster(("fast", 4, "x"), ("fast", 4, "x"), ("slow", 4, "x")))
    first, second = made.build((4, 0, 2)), made.build((0, 4, 2))
    assert first is not None
    assert second is not None
    assert first.rate == second.rate
    assert {part.machine for part in first.parts} <= {0, 2}
    assert {part.machine for part in second.parts} <= {1, 2}
    assert len(made._built) == 1


def test_the_papers_programme_is_the_quickest_and_ours_carries_more() -> None:
    pool = cluster(("fast", 4, "x"), ("slow", 4, "x"))
    ours, paper = builder(pool).build((4, 4)), builder(pool, paper=True).build((4, 4))
    assert ours is not None
    assert paper is not None
    assert ours.rate > paper.rate
    assert paper.pipeline.alone_s(80, 80) <= ours.pipeline.alone_s(80, 80)


def test_machines_of_unknown_gpus_serve_whole() -> None:
    """As in Helix's files, which have measured times and no cards."""
    pool = cluster(("fast", 4, "x"), ("slow", 4, "x"))
    made = {"fast4": flat(0.01, 1e-4), "slow4": flat(0.02, 1e-4)}
    types = {
        name: replace(type, spec=None, profiles={SMALL.name: {4: made[name]}})
        for name, type in pool.types.items()
    }
    pool = replace(pool, types=types)
    found = disjoint(builder(pool), rng=random.Random(1), expired=ticks(30))
    assert {unit.id for unit in found.plan.units} == {"n0", "n1"}
    assert not any(unit.grouped for unit in found.plan.units)
    assert [len(units) for units in found.plan.pipelines] == [1, 1]
    assert quickest(pool, SMALL).stages == (Stage(6, made["fast4"]),)


# --- partitions ----------------------------------------------------------------------------------


def ticks(count: int) -> object:
    left = itertools.count(count, -1)
    return lambda: next(left) <= 0


@settings(max_examples=3, deadline=None)
@given(st.integers(0, 2**32))
def test_pipelines_are_whole_and_share_nothing(seed: int) -> None:
    """Every pipeline holds all layers once, in order, and no GPU is in two."""
    pool = cluster(("fast", 4, "x"), ("slow", 4, "x"), ("fast", 4, "y"))
    found = disjoint(builder(pool), rng=random.Random(seed), expired=ticks(25))
    gpus = [gpu for unit in found.plan.units for gpu in unit.members]
    assert len(set(gpus)) == len(gpus)
    assert sorted(itertools.chain(*found.plan.pipelines)) == list(range(len(found.plan.units)))
    for units in found.plan.pipelines:
        spans = [found.plan.spans[unit] for unit in units]
        ends = [0, *(span.end for span in spans if span)]
        assert [span.first for span in spans if span] == ends[:-1]
        assert ends[-1] == SMALL.layers
    assert found.rate > 0


def test_the_search_beats_its_start_and_repeats_itself() -> None:
    pool = cluster(("fast", 4, "x"), ("slow", 4, "x"), ("fast", 3, "y"))
    short = disjoint(builder(pool), rng=random.Random(3), expired=ticks(2))
    long = disjoint(builder(pool), rng=random.Random(3), expired=ticks(60))
    again = disjoint(builder(pool), rng=random.Random(3), expired=ticks(60))
    assert long.rate > short.rate
    assert again == long


def test_attainment_at_a_rate_is_an_objective_too() -> None:
    pool = cluster(("fast", 4, "x"), ("slow", 4, "x"))
    worths: list[float] = []
    disjoint(
        builder(pool),
        rng=random.Random(3),
        expired=ticks(30),
        rate=1.0,
        told=worths.append,
    )
    assert worths == sorted(worths)
    assert worths[-1] > 0.9


def test_what_cannot_hold_the_model_is_named() -> None:
    with pytest.raises(UsageError, match="no pipeline"):
        disjoint(builder(cluster(("slow", 2, "x"))), rng=random.Random(1), expired=ticks(5))


# --- the general plan ----------------------------------------------------------------------------


def test_the_general_plan_keeps_the_deadline_and_beats_disjoint_pipelines() -> None:
    """In the flow of what units carry within the deadline, from the pipelines on."""
    pool = cluster(("fast", 4, "x"), ("slow", 3, "x"), ("fast", 3, "x"))
    limit = slo(20.0)
    start = disjoint(builder(pool), rng=random.Random(1), expired=ticks(60)).plan
    deadline = aims.Deadline.of(limit)
    moments = itertools.count(0.0, 0.02)
    found = regroup.general(
        pool,
        SMALL,
        deadline,
        rng=random.Random(1),
        clock=lambda: next(moments),
        until=1.0,
        start=start,
    )
    limited = deadline.limited(SMALL, start.units)
    before = Flow(deadline.near(pool), SMALL, limited).value(start.spans)
    assert found.flow >= before > 0
    assert found.plan.missing(SMALL.layers) == []


def test_a_far_way_is_closed_but_not_to_the_coordinator() -> None:
    pool = cluster(("fast", 4, "x"), ("fast", 4, "y"))
    near = aims.Deadline(0.15, 0.01).near(pool)
    assert near.way("n0", "n1").bytes_per_s < 1.0
    assert near.way("n0", "coordinator").bytes_per_s > 1e6
    wide = aims.Deadline(0.25, 0.01).near(pool)
    assert wide.way("n0", "n1").bytes_per_s > 1e6


def test_a_unit_that_is_too_slow_carries_nothing() -> None:
    pool = cluster(("fast", 4, "x"))
    unit = groups.group(pool, SMALL, [("n0", 0)])
    assert unit is not None
    slow = replace(aims.Deadline(1.0, 0.0), token_s=1e-3)
    (limited,) = slow.limited(SMALL, [unit])
    assert set(limited.profile.throughput) == {0.0}
