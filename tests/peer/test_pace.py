"""When real steps outweigh the probe, and when not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hexswarm.peer.pace import FORGET_S, STEP, SUSTAINED_S, Pace
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
    now = run(pace, 600, 1 + STEP / 2)
    assert pace.speed(now) == SPEED


def test_a_slow_device_is_announced_after_a_while_and_forgiven_after_another() -> None:
    pace = whole()
    now = run(pace, 25, 2.0)
    assert pace.speed(now) == SPEED, "not at once"
    now = run(pace, 1200, 2.0, now)
    slow = pace.speed(now)
    assert slow.decode_layer_s == pytest.approx(2 * SPEED.decode_layer_s, rel=0.2)
    assert slow.prefill_layer_s / SPEED.prefill_layer_s == pytest.approx(
        slow.decode_layer_s / SPEED.decode_layer_s
    )
    now = run(pace, 1200, 1.0, now)
    assert pace.speed(now) == SPEED


def test_short_troubles_are_not_announced() -> None:
    pace, now = whole(), 0.0
    for _ in range(20):
        now = run(pace, SUSTAINED_S / 3, 1.5, now)
        now = run(pace, SUSTAINED_S * 2, 0.95, now)
        assert pace.speed(now) == SPEED


def test_without_steps_the_probe_counts_again() -> None:
    """Nobody sends steps to a peer that says it is slow: it would stay so for ever."""
    pace = whole()
    now = run(pace, 1200, 3.0)
    assert pace.speed(now + FORGET_S - 1) != SPEED
    assert pace.speed(now + FORGET_S + 1) == SPEED


def test_many_rows_and_few_layers_are_no_trouble() -> None:
    """A batch is compared with what the probe says of just such a batch."""
    pace, now = whole(), 0.0
    for _ in range(20_000):
        now += 0.05
        pace.observe(decodes(5), 6 * (0.001 + 4 * 0.0001), now)
        pace.observe(decodes(1, Span(2, 4)), 2 * 0.001, now)
    assert pace.speed(now) == SPEED


def test_the_head_of_a_tail_is_counted() -> None:
    pace, now = Pace(SPEED, Span(6, 12), LAYERS), 0.0
    for _ in range(20_000):
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


def test_a_test_at_rest_counts_at_once() -> None:
    """A machine that was busy starting when it was probed, and one that lies in its probe."""
    pace = whole()
    pace.rested(0.003, 1.0)
    assert pace.speed(1.0).decode_layer_s == pytest.approx(SPEED.decode_layer_s / 2)
    assert pace.speed(1.0).head_s == pytest.approx(SPEED.head_s / 2)
    pace.rested(0.00605, 2.0)
    assert pace.speed(2.0) == SPEED, "so near it confirms the probe"
    pace.rested(0.012, 3.0)
    assert pace.speed(3.0).decode_layer_s == pytest.approx(2 * SPEED.decode_layer_s)
    assert pace.speed(3.0 + FORGET_S + 1) == SPEED
