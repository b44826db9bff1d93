"""The arithmetic of `benchmarks/chaos.py`, and the table of failures: what it names exists."""

from __future__ import annotations

import ast
import itertools
import math
import re
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.lab import scripts

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def figures() -> ModuleType:
    return scripts.load("chaos_figures")


@pytest.fixture(scope="module")
def matrix(figures: ModuleType) -> ModuleType:
    scripts.load("chaos_swarm")
    return scripts.load("chaos_matrix")


# --- figures ------------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 100), min_size=1), st.sampled_from([0.5, 0.9, 0.95, 1.0]))
def test_a_quantile_is_the_least_value_that_enough_do_not_exceed(
    values: list[float], share: float
) -> None:
    quantile = scripts.load("chaos_figures").quantile
    found = quantile(values, share)
    assert found in values
    assert sum(value <= found for value in values) >= share * len(values) - 1e-9
    less = [value for value in values if value < found]
    assert len(less) < share * len(values) + 1e-9


def test_a_stall_is_the_longest_silence_beyond_the_normal_one(figures: ModuleType) -> None:
    steady = [1.0, 1.1, 1.2, 1.3]
    assert figures.stall_s(steady, 1.0, 0.1) == pytest.approx(0.0)
    assert figures.stall_s([*steady, 4.4], 1.0, 0.1) == pytest.approx(3.0)
    assert figures.stall_s([5.0, 5.1], 1.0, 0.1) == pytest.approx(4.0), "before the first token"
    assert figures.stall_s([0.5], 1.0, 0.1) == 0, "quicker than usual is no stall"
    assert figures.stall_s([1.0, 31.0], 1.0, 0.1) == pytest.approx(29.9), "ended by an error"


def test_a_slope_is_relative_and_does_not_count_the_warm_up(figures: ModuleType) -> None:
    warm = [(float(at), 50.0 * at) for at in range(10)]
    flat = [(float(at), 1000.0) for at in range(10, 100)]
    assert figures.slope_share([*warm, *flat], 10, 600) == pytest.approx(0.0)
    growing = [(float(at), 1000.0 + at / 10) for at in range(100)]
    mean = 1000 + 99 / 20
    assert figures.slope_share(growing, 0, 600) == pytest.approx(60 / mean)
    assert figures.slope_share(growing[:2], 0, 600) == 0


def test_the_json_line_knows_no_infinity(figures: ModuleType) -> None:
    assert figures.rounded({"a": [math.inf, 1.23456], "b": ("x", 2)}) == {
        "a": [None, 1.2346],
        "b": ["x", 2],
    }


# --- cases --------------------------------------------------------------------------------------


def test_the_matrix_has_every_case_once_and_a_batch_has_each_stage_once(matrix: ModuleType) -> None:
    batches = matrix.cases(3, 3, {})
    every = [case for batch in batches for case in batch]
    assert len(every) == len({*every}) == 81
    assert {(case.stage, case.phase, case.signal, case.seed) for case in every} == {
        *itertools.product(range(3), matrix.PHASES, matrix.SIGNALS, range(3))
    }
    assert all([case.stage for case in batch] == [0, 1, 2] for batch in batches)
    chosen = matrix.cases(3, 1, {"stage": {"1"}, "phase": {"early", "late"}, "signal": {"KILL"}})
    assert [str(case) for batch in chosen for case in batch] == [
        "stage 1, early, SIGKILL, seed 0",
        "stage 1, late, SIGKILL, seed 0",
    ]


# --- the table ----------------------------------------------------------------------------------


def test_every_test_that_the_table_of_failures_names_exists() -> None:
    text = (ROOT / "docs" / "failures.md").read_text("utf-8")
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)
    assert len(named) > 20
    for file in {file for file, _ in named}:
        tree = ast.parse((ROOT / file).read_text("utf-8"))
        defined = {
            node.name
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        }
        missing = {test for where, test in named if where == file} - defined
        assert not missing, f"{file} has no {sorted(missing)}"


def test_every_part_that_the_table_names_is_one(figures: ModuleType, matrix: ModuleType) -> None:
    for name in ("chaos_soak", "chaos_load", "chaos"):
        scripts.load(name)
    text = (ROOT / "docs" / "failures.md").read_text("utf-8")
    named = {*re.findall(r"`(?:python benchmarks/)?chaos\.py (\w+)", text)}
    assert named <= {*scripts.load("chaos").PARTS, "all"}
    assert len(named) > 4
