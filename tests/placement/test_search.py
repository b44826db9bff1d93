"""The search for placements: laws of packing and moves, an exact oracle, and Helix's clusters."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hexswarm.records import Span
from hexswarm.router import native
from hexswarm.router.placement.anneal import Board, Phi, PythonWalk, move, walk
from hexswarm.router.placement.bound import upper_bound
from hexswarm.router.placement.cluster import parse
from hexswarm.router.placement.compiled import CompiledWalk
from hexswarm.router.placement.flow import Flow, arrays, solver, spans_of
from hexswarm.router.placement.pack import pack
from hexswarm.router.placement.plan import Unit, whole_units
from hexswarm.router.placement.rates import Rates, rates
from hexswarm.router.placement.regions import COPIES, MOST, cut
from hexswarm.router.placement.search import Found, Hunt, search
from tests.placement.oracle import best_flow
from tests.placement.worlds import cluster, placements, profile, worlds

CLUSTERS = Path(__file__).parents[3] / "shared" / "clusters"
needs_clusters = pytest.mark.skipif(not CLUSTERS.exists(), reason="the cluster files are not here")
needs_compiler = pytest.mark.skipif(not native.available(), reason="not compiled")


def looks(most: int) -> Callable[[], bool]:
    """A deadline after so many questions, whatever the machine's speed."""
    asked = count(1)
    return lambda: next(asked) >= most


def is_placement(found: Rates, first: Sequence[int], end: Sequence[int]) -> bool:
    return all(
        0 <= a <= b <= found.layers and b - a <= most
        for a, b, most in zip(first, end, found.most, strict=True)
    )


@settings(max_examples=15)
@given(data=st.data(), seed=st.integers(0, 2**32))
def test_packing_fits(data: Any, seed: int) -> None:
    """A packing is a placement, whatever the units; equal seeds pack alike."""
    where, model, units = data.draw(worlds())
    found, goal = rates(where, model, units), upper_bound(where, model, units)
    placed = pack(found, goal, rng=Random(seed))
    assert is_placement(found, *placed)
    assert pack(found, goal, rng=Random(seed)) == placed


def test_packing_covers_what_can_be_covered() -> None:
    where = cluster(["a"] * 4, 6, regions={("a", "a"): 1e9})
    units = [Unit(f"u{at}", f"n{at}", profile(9, 8, 7)) for at in range(4)]
    placed = pack(rates(where, where.models["m"], units), 14.0, rng=Random(1))
    assert sorted(zip(*placed, strict=True)) == [(0, 3), (0, 3), (3, 6), (3, 6)]


@settings(max_examples=20)
@given(data=st.data(), seed=st.integers(0, 2**32))
def test_every_move_leaves_a_placement(data: Any, seed: int) -> None:
    where, model, units = data.draw(worlds())
    found = rates(where, model, units)
    board = Board(found, *map(list, arrays(data.draw(placements(units, model.layers)))))
    rng = Random(seed)
    for _ in range(50):
        move(board, rng)
        assert is_placement(found, board.first, board.end)


@settings(max_examples=12)
@given(data=st.data(), seed=st.integers(0, 2**32))
def test_a_walk_tells_the_truth_of_its_best(data: Any, seed: int) -> None:
    """In Python and in C: a placement, of that flow and that worth, and no worse than the first."""
    where, model, units = data.draw(worlds())
    found, goal = rates(where, model, units), upper_bound(where, model, units)
    begun = arrays(data.draw(placements(units, model.layers)))
    flow, phi = Flow(where, model, units), Phi(found, goal)
    engine = solver(found)
    walks = [
        walk(engine, found, *begun, rng=Random(seed), objective=phi),
        PythonWalk(engine, found, *begun, rng=Random(seed), objective=phi),
    ]
    assert isinstance(walks[0], CompiledWalk) == native.available()
    for walked in walks:
        worths = [phi(*begun, flow.value_of(*begun))]
        for _ in range(3):
            walked.advance(100, 5.0, 0.1)
            worths.append(walked.worth)
        assert worths == sorted(worths)
        assert is_placement(found, *walked.best)
        assert walked.flow == pytest.approx(flow.value_of(*walked.best), abs=1e-6)
        assert walked.worth == pytest.approx(phi(*walked.best, walked.flow), abs=1e-6)


@needs_compiler
@pytest.mark.parametrize("seed", range(6))
def test_the_search_finds_the_optimum_of_the_milp(seed: int) -> None:
    """For a handful of units with links that bind, against HiGHS on the definition."""
    rng, machines = Random(seed), 3 + seed % 3
    where = cluster(
        list("ababa"[:machines]),
        4,
        regions={("a", "a"): 2000.0, ("b", "b"): 2000.0, ("a", "b"): rng.choice((300.0, 900.0))},
        nics={
            f"n{at}": (rng.randint(3, 20) * 100.0, rng.randint(3, 20) * 100.0) for at in range(4)
        },
    )
    model, units = where.models["m"], []
    for at in range(machines):
        speeds = sorted((rng.randint(3, 25) for _ in range(rng.randint(1, 3))), reverse=True)
        units.append(Unit(f"u{at}", f"n{at}", profile(*map(float, speeds))))
    found = rates(where, model, units)
    exact = best_flow(found)
    hunt = Hunt(found, rng=Random(seed))
    straight = Hunt(found, rng=Random(seed), objective=lambda first, end, flow: flow)
    for _ in range(9):
        for _ in hunt.round(2000):
            pass
        if straight.flow < exact - 1e-5:
            for _ in straight.round(200):
                pass
    assert Flow(where, model, units).value_of(*hunt.placed) == pytest.approx(hunt.flow, abs=1e-6)
    # The objective gives a little for cover, at most 0.15 of what the flow could gain.
    assert exact * 0.85 - 1e-5 <= hunt.flow <= exact + 1e-5
    assert straight.flow == pytest.approx(exact, abs=1e-5)


def chain(machines: int, layers: int) -> tuple[Any, Any, list[Unit]]:
    where = cluster(["a"] * machines, layers, regions={("a", "a"): 1e9})
    units = [
        Unit(f"u{at}", f"n{at}", profile(*(12.0 / k for k in range(1, 3 + at % 3))))
        for at in range(machines)
    ]
    return where, where.models["m"], units


def test_equal_seeds_find_equal_placements_and_are_told_of_progress() -> None:
    where, model, units = chain(7, 6)
    runs = []
    for _ in range(2):
        told: list[Found] = []
        found = search(where, model, units, rng=Random(5), expired=looks(5), told=told.append)
        assert [each.worth for each in told] == sorted(each.worth for each in told)
        assert told[-1].spans == found.spans
        assert 0 < found.flow <= found.bound
        runs.append((found, told))
    assert runs[0] == runs[1]


def test_a_start_is_not_made_worse_even_without_time() -> None:
    where, model, units = chain(7, 6)
    best = search(where, model, units, rng=Random(1), expired=looks(10))
    again = search(where, model, units, rng=Random(2), expired=lambda: True, start=best.spans)
    assert again.worth >= best.worth
    assert again.flow == pytest.approx(best.flow)


@pytest.mark.parametrize("machines", [7, MOST + 1])
def test_without_time_there_is_still_a_placement(machines: int) -> None:
    where, model, units = chain(machines, 6)
    assert search(where, model, units, rng=Random(1), expired=lambda: True).flow > 0


def test_an_objective_of_ones_own() -> None:
    """Enough flow, then the fewest machines: one that holds all is enough for a little."""
    where = cluster(["a"] * 4, 4, regions={("a", "a"): 1e9})
    units = [Unit(f"u{at}", f"n{at}", profile(12, 6, 4, 3)) for at in range(4)]

    def frugal(first: Sequence[int], end: Sequence[int], flow: float) -> float:
        return min(flow, 3.0) - 0.01 * sum(a < b for a, b in zip(first, end, strict=True))

    hunt = Hunt(rates(where, where.models["m"], units), rng=Random(3), objective=frugal)
    for _ in range(3):
        for _ in hunt.round(500):
            pass
    assert hunt.flow == pytest.approx(3)
    assert [span for span in spans_of(*hunt.placed) if span] == [Span(0, 4)]
    assert hunt.worth == pytest.approx(2.99)


def test_without_a_compiler_the_search_goes_on_in_python() -> None:
    where, model, units = chain(6, 5)
    hunt = Hunt(rates(where, model, units), rng=Random(2), compiled=False)
    packed, *later = ((better, hunt.flow) for better in hunt.round(150))
    assert packed[0]
    assert later
    assert later[-1][1] >= packed[1] > 0
    assert Flow(where, model, units).value_of(*hunt.placed) == pytest.approx(hunt.flow, abs=1e-5)


def test_the_search_stops_at_the_bound() -> None:
    where = cluster(["a"], 2, regions={("a", "a"): 1e9})
    units = [Unit("u", "n0", profile(4, 3))]
    found = search(where, where.models["m"], units, rng=Random(1), expired=looks(10**9))
    assert found.flow == found.bound == pytest.approx(3)
    assert found.spans == (Span(0, 2),)


@pytest.mark.parametrize("units", [0, 1])
def test_what_cannot_be_covered_has_no_flow(units: int) -> None:
    where, model, all_units = chain(2, 6)
    found = search(where, model, all_units[:units], rng=Random(1), expired=looks(5))
    assert (found.flow, found.bound) == (0, 0)


@settings(max_examples=30)
@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=200), st.integers(2, 12))
def test_parts_are_a_partition_with_room(labels: list[str], layers: int) -> None:
    """Every unit is in one part; a part has room for the model unless all together have not."""
    where = cluster(labels, layers, regions={(x, y): 1e3 for x in "abc" for y in "abc" if x <= y})
    units = [Unit(f"u{at}", f"n{at}", profile(9, 5)) for at in range(len(labels))]
    found = rates(where, where.models["m"], units)
    parts = cut(found, labels)
    assert sorted(unit for part in parts for unit in part) == list(range(len(labels)))
    for part in parts:
        room = sum(int(found.most[unit]) for unit in part)
        assert room >= layers * COPIES - 2 or len(parts) == 1
        assert len(part) <= 2 * MOST or room <= 3 * COPIES * layers


@needs_compiler
def test_a_large_swarm_is_planned_in_parts() -> None:
    """Two regions with a thin link between them; the whole is worth at least its parts."""
    labels = ["a", "b"] * (MOST // 2 + 4)
    where = cluster(labels, 6, regions={("a", "a"): 1e9, ("b", "b"): 1e9, ("a", "b"): 10.0})
    units = [
        Unit(f"u{at}", f"n{at}", profile(*(12.0 / k for k in range(1, 3 + at % 3))))
        for at in range(len(labels))
    ]
    told: list[Found] = []
    found = search(
        where, where.models["m"], units, rng=Random(1), expired=looks(20), told=told.append
    )
    assert found.flow == pytest.approx(Flow(where, where.models["m"], units).value(found.spans))
    assert found.flow >= 0.5 * found.bound
    assert told[-1].spans == found.spans


@needs_clusters
@needs_compiler
def test_the_optimum_that_took_gurobi_an_hour() -> None:
    """Helix's quality study: ten machines, proved optimal in 63 minutes on 14 cores."""
    where = parse(json.loads((CLUSTERS / "helix-small10.json").read_text()))
    model = where.model("llama-30b")
    hunt = Hunt(rates(where, model, whole_units(where, "llama-30b")), rng=Random(1))
    while hunt.flow < 286.58 and hunt.rounds < 8:
        for _ in hunt.round(150_000):
            pass
    assert round(hunt.flow, 3) == 286.587
