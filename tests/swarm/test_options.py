"""What a request may ask for, from both doors, and what is refused before anything takes time."""

from __future__ import annotations

import argparse
from typing import Any

import pytest

from hexswarm.cli import given
from hexswarm.config import add_flags, byte_rate, seconds
from hexswarm.errors import UsageError
from hexswarm.options import Options, Wishes

PEER = "12D3KooWBmAwcd4PJNJvfV89HwE48nwkRmAgo8Vy3uQEyNNHBox2"


def flags(words: str, options: type[Wishes] = Options) -> dict[str, Any]:
    """What the command line makes of `words`."""
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_flags(parser, options)
    return given(options, parser.parse_args(words.split()))


@pytest.mark.parametrize(
    ("text", "value"), [("0.25", 0.25), ("0.25s", 0.25), ("250ms", 0.25), ("2", 2.0), ("1e3ms", 1)]
)
def test_seconds(text: str, value: float) -> None:
    assert seconds(text) == pytest.approx(value)


@pytest.mark.parametrize(
    ("text", "value"),
    [("1500000", 1.5e6), ("1.5MB", 1.5e6), ("1.5MB/s", 1.5e6), ("2kB", 2e3), ("1G", 1e9)],
)
def test_byte_rates(text: str, value: float) -> None:
    assert byte_rate(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["", "fast", "ms", "1 h", "0.25mss"])
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(UsageError, match="not a number of seconds"):
        seconds(text)
    with pytest.raises(UsageError, match="not a number of bytes"):
        byte_rate(text)


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_latency": 0},
        {"max_latency": -1.0},
        {"max_latency": float("nan")},
        {"max_latency": float("inf")},
        {"max_latency": "250ms"},
        {"max_latency": True},
        {"ttft": 0.0},
        {"percentile": 49},
        {"percentile": 100},
        {"percentile": "p95"},
        {"min_bandwidth": -1},
        {"min_bandwidth": float("inf")},
        {"allow": PEER},
        {"deny": [""]},
        {"deny": None, "trusted": [3]},
        {"trusted": 7},
        {"dtypes": ["float64"]},
        {"dtypes": "bfloat16"},
    ],
)
def test_a_wish_that_makes_no_sense(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Options(**wrong)


def test_a_limit_means_nearly_always() -> None:
    assert Wishes().request()["percentile"] == 50
    assert Wishes(max_latency=0.1).request()["percentile"] == 95
    assert Wishes(ttft=0.1).request()["percentile"] == 95
    assert Wishes(max_latency=0.1, percentile=50).request()["percentile"] == 50
    assert Wishes(percentile=90).request()["percentile"] == 90


def test_an_empty_list_is_a_list() -> None:
    """Nobody is allowed, which is not the same as nothing said."""
    asked = Wishes(allow=[], trusted=()).request()
    assert (asked["allow"], asked["trusted"]) == (frozenset(), frozenset())
    assert Wishes().request()["allow"] is None


def test_flags_say_the_same_as_keywords() -> None:
    words = (
        f"--max-latency 250ms --ttft 2s --percentile 90 --allow {PEER} --deny {PEER} "
        f"--trusted {PEER} --dtype bfloat16 --dtype float16 --min-bandwidth 1.5MB "
        "--max-new-tokens 8 --stop a --stop b --seed 3"
    )
    assert Options(**flags(words)) == Options(
        max_latency=0.25, ttft=2.0, percentile=90.0, allow=(PEER,), deny=(PEER,), trusted=(PEER,),
        dtypes=("bfloat16", "float16"), min_bandwidth=1.5e6, max_new_tokens=8, stop=("a", "b"),
        seed=3,
    )  # fmt: skip
    assert Options(**flags("")) == Options()


def test_single_requests_are_not_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEXSWARM_SEED", "7")
    monkeypatch.setenv("HEXSWARM_MAX_LATENCY", "1ms")
    assert flags("") == flags("", Options)
    assert Options(**flags("")).seed is None


@pytest.mark.parametrize(
    "words", ["--deny Box2", "--max-latency soon", "--dtype int3", "--percentile 10"]
)
def test_a_flag_that_makes_no_sense(words: str) -> None:
    with pytest.raises((UsageError, argparse.ArgumentError)):
        flags(words)
