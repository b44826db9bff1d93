"""docs/security.md tells the truth: each limit in its table is the one in the code."""

from __future__ import annotations

import functools
import importlib
import re
from pathlib import Path

import pytest

TEXT = (Path(__file__).parent.parent / "docs" / "security.md").read_text(encoding="utf-8")
ROWS = re.findall(
    r"^\|[^|\n]+\| ([\d.]+) \| `(hexswarm[\w.]*)\.([A-Z_]+)(?:\.(\w+))?` \|$", TEXT, re.M
)
BURSTS = re.findall(r"\(burst (\d+)\)[^`]+`(hexswarm\.quota)\.([A-Z_]+)\.per_s`", TEXT)


def found(module: str, *names: str) -> object:
    return functools.reduce(getattr, filter(None, names), importlib.import_module(module))


def test_the_table_is_read() -> None:
    limits = TEXT.partition("## Limits")[2].partition("## If")[0]
    assert len(ROWS) == limits.count("| `hexswarm.") >= 30
    assert len(BURSTS) == limits.count("(burst ") >= 4


@pytest.mark.parametrize(("told", "module", "name", "field"), ROWS)
def test_each_limit_is_true(told: str, module: str, name: str, field: str) -> None:
    assert str(found(module, name, field)) == told


@pytest.mark.parametrize(("told", "module", "name"), BURSTS)
def test_each_burst_is_true(told: str, module: str, name: str) -> None:
    assert found(module, name, "burst") == float(told)


def test_what_must_be_said_is_said() -> None:
    assert "Every peer of a route can read the prompt and the answer" in TEXT
    assert "88.4 % of the tokens" in TEXT
