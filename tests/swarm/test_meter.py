"""What is believed of samples: quartiles against outliers, bursts against our own loop."""

from __future__ import annotations

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hexswarm.meter import (
    BANDWIDTH_FADE_S,
    BELIEF,
    FADE_S,
    FEW,
    LEAST_BYTES,
    LEAST_S,
    SAMPLES,
    Inflow,
    Meter,
    believed,
)

trips = st.floats(1e-4, 2.0)


def metered(*rtts_s: float, at_s: float = 0.0) -> Meter:
    made = Meter()
    for rtt_s in rtts_s:
        made.rtt(rtt_s, at_s)
    return made


def test_nothing_is_known_at_first() -> None:
    made = Meter()
    assert made.way() is None
    assert made.up_bytes_per_s(0.0) is None
    assert made.down_bytes_per_s(0.0) is None
    made.sent(1e6, 0.0)
    assert made.way() is None, "a bandwidth without a round trip is no way"


@given(st.lists(trips, min_size=1, max_size=40))
def test_a_way_lies_among_its_latest_samples(samples: list[float]) -> None:
    """The round trip is between the least and the median of them, jitter within half the rest."""
    way, latest = metered(*samples).way(), samples[-SAMPLES:]
    assert way is not None
    assert min(latest) <= way.rtt_s <= statistics.median(latest) * (1 + 1e-9)
    if len(latest) >= FEW:
        assert way.rtt_s == pytest.approx(statistics.quantiles(latest, method="inclusive")[0])
    assert 0 <= way.jitter_s <= (max(latest) - way.rtt_s) / 2 + 1e-12


@given(st.lists(trips, min_size=FEW, max_size=SAMPLES), st.randoms(use_true_random=False))
def test_order_does_not_matter(samples: list[float], rng: object) -> None:
    shuffled = list(samples)
    rng.shuffle(shuffled)  # type: ignore[attr-defined]
    assert metered(*samples).way() == metered(*shuffled).way()


@given(st.floats(0.001, 0.5), st.floats(1.0, 100.0), st.integers(0, SAMPLES - 1))
def test_a_late_pong_changes_nothing(rtt_s: float, late_s: float, place: int) -> None:
    samples = [rtt_s] * SAMPLES
    samples[place] = late_s
    way = metered(*samples).way()
    assert way is not None
    assert way.rtt_s == rtt_s


def test_jitter_is_the_95th_percentile_one_way() -> None:
    way = metered(*[0.1] * 11, *[0.14] * 5).way()
    assert way is not None
    assert (way.rtt_s, way.jitter_s) == (0.1, pytest.approx(0.02))


def test_of_few_samples_the_least_counts_more() -> None:
    way = metered(0.3, 0.1, 0.3).way()
    assert way is not None
    assert way.rtt_s == pytest.approx(0.15)


def test_a_way_that_changed_is_followed_at_once_after_a_pause() -> None:
    made = metered(*[0.5] * SAMPLES)
    made.rtt(0.1, FADE_S + 1)
    way = made.way()
    assert way is not None
    assert way.rtt_s == 0.1
    assert way.jitter_s == 0.0


@given(st.lists(st.tuples(st.floats(0, 1e4), st.floats(1.0, 1e9)), max_size=30))
def test_the_best_recent_word_on_our_bytes_counts(words: list[tuple[float, float]]) -> None:
    made = metered(0.1)
    words.sort()
    for at_s, bytes_per_s in words:
        made.sent(bytes_per_s, at_s)
    now = words[-1][0] if words else 0.0
    recent = [value for at_s, value in words[-SAMPLES // 2 :] if at_s >= now - BANDWIDTH_FADE_S]
    assert made.up_bytes_per_s(now) == max(recent, default=None)
    assert made.up_bytes_per_s(now + BANDWIDTH_FADE_S + 1) is None


def test_the_way_has_the_bandwidth_of_sending() -> None:
    made = metered(0.1)
    assert made.way().bytes_per_s == math.inf  # type: ignore[union-attr]
    made.arrived(10**6, 0.1, 0.0)
    assert made.way().bytes_per_s == math.inf  # type: ignore[union-attr]
    made.sent(5e6, 0.0)
    made.sent(0.0, 0.0)
    assert made.way().bytes_per_s == 5e6  # type: ignore[union-attr]
    assert made.down_bytes_per_s(0.0) == 1e7


@given(st.floats(1e3, 1e12), st.floats(1e-6, 10.0), st.floats(0.0, 0.2))
def test_a_receiver_is_believed_within_what_the_sender_saw(
    told: float, elapsed_s: float, rtt_s: float
) -> None:
    """Never more than it said, and no claim moves the limit."""
    found = believed(told, 1 << 17, elapsed_s, rtt_s)
    assert 0 < found <= told
    most = believed(1e18, 1 << 17, elapsed_s, rtt_s)
    assert found <= most <= BELIEF * (1 << 17) / max(elapsed_s - rtt_s, LEAST_S) * (1 + 1e-9)


def test_a_long_frame_is_timed_from_its_first_read() -> None:
    inflow = Inflow()
    assert inflow.read(1000, None, 5.0) is None
    assert inflow.read(64_000, None, 5.1) is None
    assert inflow.read(36_000, 100_000, 5.2) == (100_000, pytest.approx(0.2))
    assert inflow.read(50, 10, 9.0) is None, "a short frame says nothing"


def test_bytes_that_lay_waiting_count_as_a_gigabit() -> None:
    inflow = Inflow()
    assert inflow.read(131_072, 131_000, 1.0) == (131_072, LEAST_S)
    inflow.read(100_000, None, 2.0)
    assert inflow.read(31_072, 131_000, 2.0) == (131_072, LEAST_S)
    assert Meter().arrived(131_072, 0.0, 0.0) == pytest.approx(131_072 / LEAST_S)
    assert Meter().arrived(0, 1.0, 0.0) == 0.0


@given(
    st.floats(1e4, 5e7),
    st.lists(st.integers(1000, 65_536), min_size=2, max_size=40),
)
def test_a_steady_line_is_measured_however_it_is_read(rate: float, reads: list[int]) -> None:
    """Bytes after the first read over the time since then give the line's rate."""
    inflow, now = Inflow(), 0.0
    for size in reads[:-1]:
        now += size / rate
        assert inflow.read(size, None, now) is None
    now += reads[-1] / rate
    burst = inflow.read(reads[-1], max(sum(reads), LEAST_BYTES), now)
    assert burst is not None
    size, seconds = burst
    if seconds > LEAST_S:
        assert size / seconds == pytest.approx(rate, rel=1e-6)
