"""The search of `benchmarks/service.py` for the highest load that is served."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

FILE = Path(__file__).parents[2] / "benchmarks" / "service.py"
GRID = [10.0, 20.0, 30.0, 40.0, 50.0, 60.0, 70.0]


@pytest.fixture(scope="module")
def service() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmarks_service", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("begin", range(len(GRID)))
@pytest.mark.parametrize("limit", [5.0, *(load + 5.0 for load in GRID)])
def test_both_sides_of_the_limit_are_found(service: ModuleType, begin: int, limit: float) -> None:
    tried: list[float] = []

    def serves(load: float) -> bool:
        tried.append(load)
        return load <= limit

    kept, failed = service.last_that_serves(GRID, serves, begin)
    assert kept == max((load for load in GRID if load <= limit), default=None)
    assert failed == min((load for load in GRID if load > limit), default=None)
    assert len(tried) == len(set(tried)) <= 4


def test_few_runs_tell_what_they_saw(service: ModuleType) -> None:
    kept, failed = service.last_that_serves(GRID, lambda load: load <= 45.0, 5, runs=1)
    assert (kept, failed) == (None, 60.0)
