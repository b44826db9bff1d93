"""The public surface is a list: what the package exports is what the README documents.

The README has the list between two comments, each name in backticks:

    <!-- public names -->
    - `generate`: ...
    <!-- end of public names -->
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import hexswarm
from hexswarm import errors

README = Path(__file__).parent.parent / "README.md"


def documented() -> list[str]:
    """The names that the README lists, in its order."""
    text = README.read_text(encoding="utf-8")
    part = re.search(r"<!-- public names -->(.*?)<!-- end of public names -->", text, re.DOTALL)
    assert part, "README.md has no list of public names"
    return re.findall(r"`(\w+)`", part[1])


def test_the_readme_lists_exactly_the_public_names() -> None:
    names = documented()
    assert len(names) == len(set(names))
    assert sorted(names) == sorted(hexswarm.__all__)


def test_all_is_sorted_and_every_name_can_be_had() -> None:
    assert list(hexswarm.__all__) == sorted(hexswarm.__all__)
    for name in hexswarm.__all__:
        assert getattr(hexswarm, name) is not None
    assert set(hexswarm.__all__) <= set(dir(hexswarm))


def test_every_error_is_public() -> None:
    """Who catches an error needs its name."""
    tree = {
        name
        for name, item in vars(errors).items()
        if isinstance(item, type) and issubclass(item, errors.HexswarmError)
    }
    assert tree <= set(hexswarm.__all__)


def test_other_names_do_not_exist() -> None:
    with pytest.raises(AttributeError, match="nonsense"):
        _ = hexswarm.nonsense
