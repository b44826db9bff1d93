"""What `--tensor-parallel` may be."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hexswarm.degree import MOST_RANKS, Degree
from hexswarm.errors import UsageError

counts = st.integers(0, MOST_RANKS).map(Degree)
unequal = st.lists(st.integers(1, 1000), min_size=2, max_size=MOST_RANKS).map(
    lambda shares: Degree(len(shares), tuple(shares))
)


@given(counts | unequal)
def test_what_is_printed_is_what_is_read(degree: Degree) -> None:
    assert Degree.parse(str(degree)) == degree


@pytest.mark.parametrize(
    ("text", "degree"),
    [
        ("off", Degree()),
        ("1", Degree(1)),
        ("AUTO", Degree(0)),
        ("2", Degree(2)),
        ("3:1", Degree(2, (3, 1))),
        ("5:3:1", Degree(3, (5, 3, 1))),
    ],
)
def test_degrees(text: str, degree: Degree) -> None:
    assert Degree.parse(text) == degree


@pytest.mark.parametrize(
    "text", ["", "0", "-1", "65", "two", "3:", ":1", "3:0", "1001:1", "3:1.5", "²", "1:" * 64 + "1"]
)
def test_what_is_no_degree(text: str) -> None:
    with pytest.raises(UsageError, match="use off, auto, a number"):
        Degree.parse(text)
