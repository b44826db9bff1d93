"""The search against every ring, and its two forms against each other."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hexswarm.router import native, search
from hexswarm.router.network import Ways
from hexswarm.router.search import Nothing, Problem, Ring, Solver, evaluate, solve_python
from hexswarm.router.select import Census, through, through_python

Solve = Callable[[Problem], Ring | Nothing]

compiled = pytest.mark.skipif(not native.available(), reason="the native search was not compiled")


def random_problem(seed: int, count: int, layers: int) -> Problem:
    """Tenths of seconds, so that equal costs occur; a chain covers all layers, others overlap."""
    rng = np.random.default_rng(seed)
    first = rng.integers(0, layers, count)
    end = np.minimum(layers, first + rng.integers(1, layers // 2 + 2, count))
    links = min(count, layers, 3)
    cuts = [0, *sorted(rng.choice(np.arange(1, layers), links - 1, replace=False)), layers]
    for index in range(links):
        first[index], end[index] = cuts[index], cuts[index + 1]

    def tenths(*shape: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
        return rng.integers(0, 20, shape) / 10

    place = rng.random((count, 2))
    away = np.linalg.norm(place[:, None] - place[None], axis=2) * 5
    linked = rng.random((count, count)) < 0.5
    price = tenths(count)
    return Problem(
        layers=layers,
        first=first.astype(np.int32),
        end=end.astype(np.int32),
        price_enter=price,
        price_layer=price,
        t_enter=tenths(count) / 3,
        t_layer=tenths(count),
        t_finish=tenths(count) / 3,
        a_enter=tenths(count) / 3,
        a_layer=tenths(count),
        a_finish=tenths(count),
        a_begin=tenths(count),
        open_stage=tenths(count) * 2,
        ways=Ways(2 * away, away / 4, tenths(count, count) / 10, away >= 0, linked),
        hop_fixed=0.1,
        late=0.5,
        t_bytes=1.0,
        a_bytes=3.0,
        dial=7.0,
    )


def objectives(problem: Problem, rng: random.Random) -> Problem:
    """By price or by time, with none, either or both limits somewhere around what is possible."""
    problem = replace(problem, more_chunks=rng.choice([0.0, 1.0, 5.0]))
    if rng.random() < 0.3:
        return replace(problem, weight_t=10.0, weight_a=1.0, weight_max=1.0)
    rings = [evaluate(problem, *ring) for ring in every_ring(problem)]
    factor = rng.choice([0.9, 1.000001, 1.1, 1.3, 2.0])
    limits = {}
    if rng.random() < 0.8:
        limits["limit_t"] = factor * min(ring.t for ring in rings)
    if rng.random() < 0.7:
        limits["limit_a"] = factor * min(search.ttft(problem, ring) for ring in rings)
    return replace(
        problem, weight_price=1.0, weight_t=1e-5, weight_a=1e-6, weight_max=1e-6, **limits
    )


def every_ring(problem: Problem) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
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


def cost(problem: Problem, answer: Ring | Nothing) -> float:
    """Of a sound answer; inf for none."""
    if isinstance(answer, Nothing):
        assert answer.proven
        return math.inf
    again = evaluate(problem, answer.peers, answer.ends)
    for name in ("price", "t", "a", "open", "slowest"):
        assert getattr(answer, name) == pytest.approx(getattr(again, name), rel=1e-9)
    assert len(set(answer.peers)) == len(answer.peers)
    assert search.within(problem, again)
    assert answer.proven
    return search.cost_of(problem, again)


@settings(max_examples=150)
@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(2, 6))
def test_no_ring_is_cheaper_and_none_is_missed(seed: int, count: int, layers: int) -> None:
    """Both forms find the least cost of all rings within the limits, or that there is none."""
    problem = objectives(random_problem(seed, count, layers), random.Random(seed))
    rings = [evaluate(problem, *ring) for ring in every_ring(problem)]
    costs = [search.cost_of(problem, ring) for ring in rings if search.within(problem, ring)]
    least = min(costs, default=math.inf)
    assert cost(problem, solve_python(problem)) == pytest.approx(least, rel=1e-9)
    assert cost(problem, search.solve(problem)) == pytest.approx(least, rel=1e-9)


@pytest.mark.parametrize("form", [solve_python, search.solve])
def test_a_better_label_that_used_up_a_peer_does_not_strike_out_another(form: Solve) -> None:
    """0, then 1 or 2, then 3, then 1: to come to 3 by way of 1 is quicker, and then 1 is gone."""
    spans = [(0, 1), (1, 4), (1, 2), (2, 3)]
    seconds = np.array([0.1, 1.0, 2.0, 0.1])
    problem = replace(
        random_problem(0, 4, 4),
        first=np.array([first for first, _ in spans], dtype=np.int32),
        end=np.array([end for _, end in spans], dtype=np.int32),
        t_layer=seconds,
        t_enter=np.zeros(4),
        t_finish=np.zeros(4),
        weight_t=1.0,
        ways=Ways(
            *(np.zeros((4, 4)) for _ in range(3)), np.ones((4, 4), bool), np.ones((4, 4), bool)
        ),
        hop_fixed=0.0,
    )
    # Alone, 1 takes its three layers in 3.0 + 0.1; 2, 3 and 1 take 0.1 + 2.0 + 0.1 + 1.0 = 3.2.
    assert cost(problem, form(problem)) == pytest.approx(3.1)
    slow = replace(problem, t_layer=np.array([0.1, 1.3, 1.4, 0.1]))
    found = form(slow)
    assert isinstance(found, Ring)
    assert found.peers == (0, 2, 3, 1)
    assert cost(slow, found) == pytest.approx(0.1 + 1.4 + 0.1 + 1.3)


@compiled
@settings(max_examples=20)
@given(st.integers(0, 10**6), st.floats(1.01, 2.0), st.booleans(), st.booleans())
def test_the_native_search_is_the_one_in_python(
    seed: int, factor: float, on_t: bool, on_a: bool
) -> None:
    """In larger swarms too, where boxes come into play."""
    problem = replace(random_problem(seed, 24, 16), more_chunks=4.0)
    solver = Solver(problem)
    times = [
        solver.solve(replace(problem, weight_t=1.0)),
        solver.solve(replace(problem, weight_a=1.0, weight_max=1.0)),
    ]
    assert isinstance(times[0], Ring)
    assert isinstance(times[1], Ring)
    limited = replace(
        problem,
        weight_price=1.0,
        limit_t=factor * times[0].t if on_t else math.inf,
        limit_a=factor * search.ttft(problem, times[1]) if on_a else math.inf,
    )
    mine, other = solver.solve(limited), solve_python(limited)
    assert cost(limited, mine) == pytest.approx(cost(limited, other), rel=1e-9)


@compiled
def test_variants_of_a_prepared_problem_do_not_disturb_each_other() -> None:
    problem = replace(random_problem(5, 20, 12), weight_t=1.0)
    solver = Solver(problem)
    before = solver.solve()
    solver.solve(replace(problem, weight_price=1.0, weight_t=0.0, limit_t=1.0))
    solver.solve(replace(problem, weight_a=1.0, weight_max=1.0, limit_a=2.0))
    assert solver.solve() == before
    with pytest.raises(ValueError, match="prices"):
        solver.solve(replace(problem, price_enter=np.zeros(3)))


def test_a_search_cut_short_says_so() -> None:
    """It gives the best found so far, or that it knows of none."""
    problem = replace(random_problem(7, 60, 24), weight_price=1.0, more_chunks=5.0)
    free = search.solve(replace(problem, weight_price=0.0, weight_a=1.0, weight_max=1.0))
    assert isinstance(free, Ring)
    tight = replace(problem, limit_a=1.02 * search.ttft(problem, free))
    for effort in (1, 50):
        found = solve_python(tight, effort)
        assert not found.proven
        if isinstance(found, Ring):
            assert search.within(tight, found)
    if native.available():
        assert not Solver(tight).solve(effort=1).proven


@compiled
@settings(max_examples=40)
@given(st.integers(0, 10**6), st.booleans())
def test_candidates_are_scored_alike_natively_and_in_python(seed: int, anywhere: bool) -> None:
    rng = np.random.default_rng(seed)
    problem = random_problem(seed, 30, 12)
    regions = 4
    between = rng.random((regions, regions))
    census = Census(
        layers=12,
        first=problem.first,
        end=problem.end,
        region=rng.integers(0, regions, 30).astype(np.int32),
        enter=problem.t_enter,
        layer=problem.t_layer,
        finish=problem.t_finish,
        begin=problem.a_begin,
        out=rng.random(30),
        in_=rng.random(30),
        close_out=rng.random(30),
        close_in=rng.random(30),
        between=between,
        close_between=between / 2,
        homes=rng.random(regions) < 0.7,
        anywhere=anywhere,
    )
    np.testing.assert_allclose(through(census), through_python(census), rtol=1e-9)


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.integers(2, 6), st.integers(2, 5))
def test_barred_peers_take_no_part(seed: int, count: int, layers: int) -> None:
    """The answer without some peers is that of the problem in which they hold nothing."""
    problem = objectives(random_problem(seed, count, layers), random.Random(seed))
    barred = np.random.default_rng(seed).random(count) < 0.4
    found = Solver(problem).solve(barred=barred)
    without = replace(problem, end=np.where(barred, problem.first, problem.end))
    assert cost(problem, found) == pytest.approx(cost(without, solve_python(without)), rel=1e-9)
    if isinstance(found, Ring):
        assert not any(barred[peer] for peer in found.peers)


@compiled
@settings(max_examples=5)
@given(st.integers(0, 10**6), st.integers(1, 3))
def test_boxes_are_cut_without_losing_a_ring(seed: int, chunks: int) -> None:
    """Where maxima weigh much and the limit on the first token is tight, in swarms whose searches
    are long enough for boxes."""
    problem = replace(random_problem(seed, 26, 18), weight_price=1.0, more_chunks=8.0 * chunks)
    soonest = Solver(replace(problem, weight_price=0.0, weight_a=1.0, weight_max=1.0)).solve()
    assert isinstance(soonest, Ring)
    tight = replace(problem, limit_a=1.1 * search.ttft(problem, soonest))
    mine, other = search.solve(tight), solve_python(tight)
    assert cost(tight, mine) == pytest.approx(cost(tight, other), rel=1e-9)
