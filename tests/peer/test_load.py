"""How busy a peer says it is, against sums over all its batches."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hexswarm.peer.load import BUCKETS, WINDOW_S, LoadMeter
from hexswarm.records import Load

BUCKET_S = WINDOW_S / BUCKETS


@dataclass(frozen=True)
class Done:
    started_s: float
    ended_s: float
    waits_s: tuple[float, ...]
    marginal_s: float


@st.composite
def histories(draw: st.DrawFn) -> list[Done]:
    """Batches one after the other, with pauses, from time 0 on."""
    now, made = 0.0, []
    for _ in range(draw(st.integers(0, 30))):
        started_s = now + draw(st.floats(0.0, 3.0))
        now = started_s + draw(st.floats(0.001, 14.0))
        waits_s = tuple(draw(st.lists(st.floats(0.0, 1.0), max_size=5)))
        share = draw(st.floats(0.0, 1.0))
        made.append(Done(started_s, now, waits_s, share * (now - started_s)))
    return made


def metered(history: list[Done]) -> LoadMeter:
    made = LoadMeter(0.0)
    for done in history:
        made.computed(done.started_s, done.ended_s, done.waits_s, done.marginal_s)
    return made


def test_an_idle_peer_says_so() -> None:
    assert LoadMeter(5.0).load(5.0, 0.0, 77) == Load(0.0, 0.0, 0.0, 77)
    assert LoadMeter(5.0).load(500.0, 0.0, 77) == Load(0.0, 0.0, 0.0, 77)


@given(histories(), st.floats(0.0, 12.0))
def test_the_load_is_the_mean_over_the_window(history: list[Done], later_s: float) -> None:
    """Recomputed from all batches, cut to the whole buckets that the window holds."""
    now = (history[-1].ended_s if history else 0.0) + later_s
    since_s = max(0.0, (int(now / BUCKET_S) - BUCKETS + 1) * BUCKET_S)
    covered_s = max(now - since_s, BUCKET_S)
    row_seconds = marginal_s = 0.0
    waits_s: list[float] = []
    for done in history:
        inside_s = max(0.0, done.ended_s - max(done.started_s, since_s))
        row_seconds += inside_s * len(done.waits_s)
        marginal_s += done.marginal_s * inside_s / (done.ended_s - done.started_s)
        if int(done.ended_s / BUCKET_S) >= int(now / BUCKET_S) - BUCKETS + 1:
            waits_s += done.waits_s
    load = metered(history).load(now, 0.0, 0)
    assert load.rows == pytest.approx(row_seconds / covered_s, abs=1e-6)
    assert load.busy == pytest.approx(min(1.0, marginal_s / covered_s), abs=1e-6)
    mean_s = sum(waits_s) / len(waits_s) if waits_s else 0.0
    assert load.queue_s == pytest.approx(mean_s, abs=1e-9)


@given(histories())
def test_ten_idle_seconds_are_enough(history: list[Done]) -> None:
    """Without a new batch, and exactly."""
    now = (history[-1].ended_s if history else 0.0) + WINDOW_S + BUCKET_S
    assert metered(history).load(now, 0.0, 3) == Load(0.0, 0.0, 0.0, 3)


@given(histories(), st.floats(0, 20))
def test_prompts_that_wait_count_before_they_are_felt(history: list[Done], waiting: float) -> None:
    now = history[-1].ended_s if history else 0.0
    load = metered(history).load(now, waiting, 0)
    assert load.queue_s >= waiting


def test_a_session_alone_in_a_fast_ring_keeps_nobody_busy() -> None:
    """The device is awake half of the time, yet most of it is the read of the weights."""
    made = LoadMeter(0.0)
    for n in range(1000):
        made.computed(n * 0.02, n * 0.02 + 0.01, (0.001,), 0.0005)
    load = made.load(20.0, 0.0, 0)
    assert load.rows == pytest.approx(0.5, rel=0.05)
    assert load.busy == pytest.approx(0.025, rel=0.05)
    assert load.queue_s == pytest.approx(0.001)


def test_a_marginal_part_is_never_above_the_whole() -> None:
    made = LoadMeter(0.0)
    made.computed(0.0, 5.0, (), 50.0)
    assert made.load(10.0, 0.0, 0).busy <= 0.55


def test_memory_is_bounded() -> None:
    made = LoadMeter(0.0)
    made.computed(0.0, 1e6, (0.0,), 1.0)
    for n in range(10_000):
        made.computed(1e6 + n, 1e6 + n + 0.5, (0.0,), 0.1)
    assert len(made._buckets) <= BUCKETS
