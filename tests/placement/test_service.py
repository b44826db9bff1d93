"""Plans that serve: enough flow first, then the lowest expected latency."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from random import Random

import pytest

from hexswarm.errors import UsageError
from hexswarm.records import Span
from hexswarm.router.placement.flow import Flow, arrays
from hexswarm.router.placement.latency import Latency
from hexswarm.router.placement.service import (
    Objective,
    Target,
    frontier,
    most_load,
    plan_for_service,
)
from tests.placement.serving_worlds import LAYERS, MODEL, load, profile, world


def after(pieces: int) -> Callable[[], bool]:
    """A deadline that is counted, so that equal seeds search alike."""
    left = itertools.count(pieces, -1)
    return lambda: next(left) <= 0


def test_too_little_flow_is_worse_than_any_latency() -> None:
    cluster, units = world([profile(8), profile(8, slower=50)])
    target = Target(load(400.0))
    objective = Objective(Latency(cluster, MODEL, units), target)
    flow = Flow(cluster, MODEL, units)

    def worth(*pairs: tuple[int, int]) -> float:
        first, end = arrays([Span(*pair) for pair in pairs])
        return objective(first, end, flow.value_of(first, end))

    enough, slow, half = worth((0, 8), (0, 8)), worth((0, 4), (4, 8)), worth((0, 8), (0, 1))
    assert 0 < enough < 1
    assert 0 < half < 1
    assert -1 <= slow < 0, "the slow half passes 20 tokens a second of the 480 that are needed"


def test_the_flow_must_exceed_the_load_by_a_fifth() -> None:
    cluster, units = world([profile(8)])
    objective = Objective(Latency(cluster, MODEL, units), Target(load(100.0)))
    first, end = arrays([Span(0, LAYERS)])
    assert objective(first, end, 119.0) == pytest.approx(119 / 120 - 1)
    assert objective(first, end, 121.0) > 0


def test_the_best_of_all_placements_is_found() -> None:
    cluster, units = world([profile(5), profile(5, slower=1.5), profile(8, slower=3)])
    target = Target(load(100.0))
    latency, flow = Latency(cluster, MODEL, units), Flow(cluster, MODEL, units)
    objective = Objective(latency, target)

    def choices(most: int) -> list[tuple[int, int]]:
        runs = itertools.combinations(range(LAYERS + 1), 2)
        return [(0, 0), *((a, b) for a, b in runs if b - a <= most)]

    best = -1.0
    for held in itertools.product(*(choices(unit.profile.max_layers) for unit in units)):
        first, end = [a for a, _ in held], [b for _, b in held]
        if 0 in first and LAYERS in end:
            best = max(best, objective(first, end, flow.value_of(first, end)))
    found = plan_for_service(cluster, MODEL, units, target, rng=Random(1), expired=after(40))
    assert found.worth == pytest.approx(best, rel=1e-9)


def test_equal_seeds_find_equal_plans_and_hear_of_them() -> None:
    cluster, units = world([profile(4, slower=1 + at % 3) for at in range(6)])
    heard: list[float] = []
    found = [
        plan_for_service(
            cluster,
            MODEL,
            units,
            Target(load(300.0)),
            rng=Random(3),
            expired=after(15),
            told=lambda best: heard.append(best.worth),
        )
        for _ in range(2)
    ]
    assert found[0] == found[1]
    half = len(heard) // 2
    assert heard[:half] == heard[half:] == sorted(heard[:half])
    assert found[0].flow >= 1.2 * 300.0


def test_more_load_costs_latency_and_brings_flow() -> None:
    """A fast machine that holds everything is best at little load; T(8) of it is too little for
    much."""
    cluster, units = world([profile(8), *[profile(4, slower=2) for _ in range(4)]])
    plans = frontier(
        cluster,
        MODEL,
        units,
        Target(load(1.0)),
        [20.0, 800.0],
        rng=Random(5),
        expired=lambda: after(30),
    )
    little, much = plans
    assert little.told.stages == pytest.approx(1, abs=0.05)
    assert much.flow >= 1.2 * 800.0
    assert much.told.tpot_s > little.told.tpot_s


def test_a_start_is_kept_unless_bettered() -> None:
    cluster, units = world([profile(8), profile(8)])
    start = [Span(0, 8), Span(0, 8)]
    target = Target(load(10.0))
    found = plan_for_service(
        cluster, MODEL, units, target, rng=Random(1), expired=lambda: True, start=start
    )
    assert found.worth > 0
    assert found.flow >= 12.0


def test_most_load_is_where_the_limits_end() -> None:
    cluster, units = world([profile(8), profile(8)])
    latency = Latency(cluster, MODEL, units)
    placed = [Span(0, 4), Span(4, 8)]
    target = Target(load(1.0), ttft_s=0.2, tpot_s=0.05)
    most = most_load(latency, placed, target)
    assert target.kept(latency.estimate(placed, target.at(most).load))
    assert not target.kept(latency.estimate(placed, target.at(1.05 * most).load))
    assert most_load(latency, [Span(0, 4), None], target) == 0.0


def test_limits_are_positive() -> None:
    with pytest.raises(UsageError):
        Target(load(1.0), tpot_s=0.0)
