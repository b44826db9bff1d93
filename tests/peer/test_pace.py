"""When real steps outweigh the probe, and when not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hexswarm.peer.pace import FEW, FORGET_S, REST_FEW, REST_SAMPLES, SAMPLES, STEP, Pace
from hexswarm.peer.steps import Batch, Row
from hexswarm.records import Span, Speed

SPEED = Speed(0.001, 0.0002, 0.002, 0.0001)
LAYERS = 12


def decodes(count: int = 1, span: Span | None = None) -> Batch:
    return Batch(
        tuple(
            Row(bytes([n]) * 16, 9, 1, None, sample=True, blocks=(), span=span)
            for n in range(count)
        )
    )


def prompt(count: int = 64) -> Batch:
    return Batch((Row(b"p" * 16, 0, count, None, sample=True, blocks=()),))


def run(
    pace: Pace, seconds: float, factor: float, now: float = 0.0, *, batch: Batch | None = None
) -> float:
    """Steps of one batch every 50 ms, `factor` times as long as the probe says of a row."""
    batch = batch or decodes()
    end_s = now + seconds
    while now < end_s:
        now += 0.05
        pace.observe(batch, factor * 0.006, now)
    return now


def whole() -> Pace:
    """Six of twelve layers: a row takes 6 ms."""
    return Pace(SPEED, Span(0, 6), LAYERS)


def test_the_probe_counts_while_steps_agree() -> None:
    pace = whole()
    now = run(pace, 60, 1 + STEP / 2)
    assert pace.speed(now) == SPEED


def test_what_steps_take_is_announced_as_soon_as_there_are_a_few() -> None:
    pace = whole()
    now = run(pace, 0.05 * (FEW - 2), 2.0)
    assert pace.speed(now) == SPEED, "not for one odd step"
    now = run(pace, 1.0, 2.0, now)
    slow = pace.speed(now)
    assert slow.decode_layer_s == pytest.approx(2 * SPEED.decode_layer_s)
    assert slow.prefill_layer_s == pytest.approx(2 * SPEED.prefill_layer_s)
    now = run(pace, 0.05 * SAMPLES, 1.0, now)
    assert pace.speed(now) == SPEED


def test_a_few_late_steps_say_nothing() -> None:
    pace, now = whole(), 0.0
    for _ in range(20):
        now = run(pace, 0.3, 40.0, now)
        now = run(pace, 0.5, 1.0, now)
        assert pace.speed(now) == SPEED


def test_without_steps_the_probe_counts_again() -> None:
    """Nobody sends steps to a peer that says it is slow: it would stay so for ever."""
    pace = whole()
    now = run(pace, 60, 3.0)
    assert pace.speed(now + FORGET_S / 2) != SPEED
    assert pace.speed(now + FORGET_S + 1) == SPEED


def test_many_rows_and_few_layers_are_no_trouble() -> None:
    """A batch is compared with what the probe says of just such a batch."""
    pace, now = whole(), 0.0
    for _ in range(500):
        now += 0.05
        pace.observe(decodes(5), 6 * (0.001 + 4 * 0.0001), now)
        pace.observe(decodes(1, Span(2, 4)), 2 * 0.001, now)
    assert pace.speed(now) == SPEED


def test_the_head_of_a_tail_is_counted() -> None:
    pace, now = Pace(SPEED, Span(6, 12), LAYERS), 0.0
    for _ in range(500):
        now += 0.05
        pace.observe(decodes(), 6 * 0.001 + 0.002, now)
    assert pace.speed(now) == SPEED


def test_prompts_are_not_looked_at() -> None:
    pace = whole()
    now = run(pace, 1200, 50.0, batch=prompt())
    assert pace.speed(now) == SPEED


@given(st.lists(st.floats(1e-6, 1e3), max_size=200))
def test_whatever_is_seen_the_figures_stay_finite(times_s: list[float]) -> None:
    pace, now = whole(), 0.0
    for elapsed_s in times_s:
        now += elapsed_s
        pace.observe(decodes(), elapsed_s, now)
        assert pace.speed(now).decode_layer_s > 0  # Speed checks that it is finite


def test_steps_of_its_own_count_while_there_are_no_others() -> None:
    """A machine that was busy starting when it was probed, and one whose caches were too warm."""
    pace, now = whole(), 0.0
    for _ in range(REST_FEW):
        assert pace.speed(now) == SPEED
        now += 2.0
        pace.rested(0.003, now)
    assert pace.speed(now).decode_layer_s == pytest.approx(SPEED.decode_layer_s / 2)
    assert pace.speed(now).head_s == pytest.approx(SPEED.head_s / 2)
    now = run(pace, 5, 1.5, now)
    assert pace.speed(now).decode_layer_s == pytest.approx(1.5 * SPEED.decode_layer_s)
    pace.rested(0.003, now)
    assert pace.speed(now).decode_layer_s == pytest.approx(1.5 * SPEED.decode_layer_s)
    for _ in range(REST_SAMPLES):
        pace.rested(0.012, now + FORGET_S)
    assert pace.speed(now + FORGET_S + 1).decode_layer_s == pytest.approx(2 * SPEED.decode_layer_s)
