"""Requests: lengths, arrivals, places."""

from __future__ import annotations

import random
from statistics import fmean, pvariance

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hexswarm.errors import UsageError
from hexswarm.simulator import workload
from hexswarm.simulator.policy import Request

LENGTHS = ((100, 20), (300, 60), (700, 240))
BINS = (10, 18, 4, 16)


def drawn(kind: str, rate: float = 800.0, until_s: float = 3000.0, seed: int = 1) -> list[Request]:
    rng = random.Random(seed)
    if kind == "poisson":
        return list(workload.poisson(LENGTHS, rate, until_s, rng, ("a", "b")))
    return list(workload.binned(LENGTHS, BINS, rate, until_s, rng, ("a", "b")))


@pytest.mark.parametrize("kind", ["poisson", "binned"])
def test_the_rate_is_what_was_asked_for(kind: str) -> None:
    requests = drawn(kind)
    told = workload.offered_tokens_per_s(requests, 0.0, 3000.0)
    assert told == pytest.approx(800, rel=0.05)
    assert {(one.input_tokens, one.output_tokens) for one in requests} == set(LENGTHS)
    assert {one.client for one in requests} == {"a", "b"}


@pytest.mark.parametrize("kind", ["poisson", "binned"])
@settings(max_examples=20)
@given(seed=st.integers(0, 99), rate=st.floats(1, 5000), until_s=st.floats(1, 60))
def test_requests_are_in_order_numbered_and_seeded(
    kind: str, seed: int, rate: float, until_s: float
) -> None:
    requests = drawn(kind, rate, until_s, seed)
    assert [one.id for one in requests] == list(range(len(requests)))
    times = [one.arrives_s for one in requests]
    assert times == sorted(times)
    assert all(0 <= when < until_s for when in times)
    assert requests == drawn(kind, rate, until_s, seed)


def test_bursts_are_as_large_as_those_of_the_trace() -> None:
    """At the trace's own rate the counts of bins have its mean and variance, not Poisson's."""
    own = fmean(BINS) / workload.BIN_S * fmean(asked + told for asked, told in LENGTHS)
    requests = drawn("binned", own)
    counts = [0] * 1000
    for one in requests:
        counts[int(one.arrives_s / workload.BIN_S)] += 1
    assert set(counts) == set(BINS)
    assert pvariance(counts) == pytest.approx(pvariance(BINS), rel=0.1)


def test_offline_everything_is_there_at_once() -> None:
    requests = workload.at_once(LENGTHS, 500, random.Random(1))
    assert len(requests) == 500
    assert {one.arrives_s for one in requests} == {0.0}
    assert {one.client for one in requests} == {"coordinator"}
    assert fmean(one.input_tokens for one in requests) == pytest.approx(1100 / 3, rel=0.15)


def test_files_are_read_and_filtered() -> None:
    text = "input_tokens,output_tokens\n3,50\n4,4\n2048,1024\n2049,8\n9,1025\n\n"
    lengths = workload.read_lengths(text.splitlines())
    assert len(lengths) == 5
    assert workload.usable(lengths) == ((4, 4), (2048, 1024))
    assert workload.read_bins("requests_in_3_s\n1\n4\n".splitlines()) == (1, 4)


def test_mistakes_are_named() -> None:
    with pytest.raises(UsageError, match="trace of lengths"):
        workload.read_lengths(["a,b", "1,x"])
    with pytest.raises(UsageError, match="trace of lengths"):
        workload.read_lengths(["a", "1"])
    with pytest.raises(UsageError, match="list of arrivals"):
        workload.read_bins(["a", "b"])
    with pytest.raises(UsageError, match="no request"):
        workload.usable([(1, 1)])
    with pytest.raises(UsageError, match="positive"):
        workload.poisson(LENGTHS, 0.0, 1.0, random.Random(1))
    with pytest.raises(UsageError, match="empty"):
        workload.binned(LENGTHS, (0, 0), 1.0, 1.0, random.Random(1))
