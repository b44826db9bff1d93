"""The pace of a ring, told apart from the pace of whoever takes the tokens."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hexswarm.conversation import MIN_TOKENS, Meter


def test_tokens_that_are_taken_at_once() -> None:
    meter = Meter(10.0)
    for number in range(20):
        meter.token(number, 11.0 + 0.1 * number, 11.0 + 0.1 * number)
    assert meter.ttft_s == pytest.approx(1.0)
    assert meter.tpot_s == pytest.approx(0.1)
    assert meter.rate == pytest.approx(10)


def test_short_answers_do_not_tell() -> None:
    meter = Meter(0.0)
    for number in range(MIN_TOKENS - 1):
        meter.token(number, 0.1 * number, 0.1 * number)
    assert meter.tpot_s is None
    assert Meter(0.0).rate == 0


def test_one_stall_is_not_the_pace() -> None:
    meter, now = Meter(0.0), 0.0
    for number in range(20):
        now += 5.0 if number == 7 else 0.1
        meter.token(number, now, now)
    assert meter.tpot_s == pytest.approx(0.1)


@given(st.lists(st.floats(0, 3), min_size=12, max_size=60))
def test_a_slow_taker_is_not_a_slow_ring(pauses_s: list[float]) -> None:
    """However long the caller does other things between tokens, the ring's pace is the same."""
    came_s = [1.0 + 0.1 * number for number in range(len(pauses_s))]
    meter, now = Meter(0.0), 0.0
    for number, pause_s in enumerate(pauses_s):
        now = max(now, came_s[number])
        meter.token(number, came_s[number], now)
        now += pause_s
    assert meter.tpot_s == pytest.approx(0.1)
    assert meter.rate == pytest.approx((len(pauses_s) - 1) / (now - pause_s - 1.0))


def test_tokens_that_come_in_pairs() -> None:
    meter = Meter(0.0)
    for number in range(0, 20, 2):
        meter.token(number, 0.1 * number, 0.1 * number)
        meter.token(number + 1, 0.1 * number, 0.1 * number)
    assert meter.tpot_s == pytest.approx(0.1)


def test_what_came_in_one_read_has_no_pace() -> None:
    meter = Meter(0.0)
    for number in range(20):
        meter.token(number, 1.0, 1.0 + number)
    assert meter.tpot_s is None
