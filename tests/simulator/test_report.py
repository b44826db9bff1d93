"""Figures of a run, by hand."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hexswarm.simulator.report import Outcome, Spread, attained, goodput
from hexswarm.simulator.run import simulate
from tests.simulator.small import MODEL, WHOLE, Fixed, chain, request, world

NAN = math.nan


def outcome(
    arrives_s: float,
    first_s: float = NAN,
    last_s: float = NAN,
    tokens: int = 0,
    answer: int = 11,
    gave_up: bool = False,
) -> Outcome:
    asked = request(at_s=arrives_s, answer=answer)
    return Outcome(asked, arrives_s, first_s, last_s, NAN, tokens, 0, 0, 1, gave_up)


GOOD = outcome(0.0, 5.0, 15.0, 11)
SLOW_START = outcome(0.0, 5.1, 6.0, 11)
SLOW_STEPS = outcome(0.0, 1.0, 11.5, 11)
STALLED = outcome(0.0, 1.0, 9.0, 5)
FRESH = outcome(96.0)
WAITING = outcome(94.0)
GONE = outcome(99.0, gave_up=True)
FIRST = outcome(0.0, 1.0, 1.0, 1)


def test_goodput_wants_an_early_first_token_and_steady_ones() -> None:
    judged = [one.good(100.0, 5.0, 1.0) for one in (GOOD, SLOW_START, SLOW_STEPS, STALLED)]
    assert judged == [True, False, False, False]
    judged = [one.good(100.0, 5.0, 1.0) for one in (FRESH, WAITING, GONE, FIRST)]
    assert judged == [None, False, False, True]
    assert goodput([GOOD, SLOW_START, FRESH, FIRST], 100.0, 5.0, 1.0) == pytest.approx(2 / 3)
    assert math.isnan(goodput([FRESH], 100.0, 5.0, 1.0))


def test_attainment_counts_what_is_late_already() -> None:
    some = [GOOD, outcome(0.0, 5.0, 30.0, 11), outcome(80.0, 85.0, 90.0, 4)]
    shares = attained(some, 100.0, lambda asked: 10.0, (1.0, 1.5, 2.0, 3.0))
    # Of the last one, which runs for 20 s, nothing can be said from scale 2 on.
    assert shares == (0.0, pytest.approx(1 / 3), 0.5, 1.0)


@given(st.lists(st.floats(0, 1e3), min_size=1))
def test_percentiles_are_ordered_and_within(seconds: list[float]) -> None:
    spread = Spread.of(seconds)
    assert min(seconds) <= spread.p50_s <= spread.p95_s <= spread.p99_s <= max(seconds)
    assert spread.count == len(seconds)


def test_nothing_has_no_percentiles() -> None:
    assert Spread.of([]).count == 0
    assert math.isnan(Spread.of([]).p95_s)


def test_a_report_becomes_plain_values() -> None:
    cluster, plan = world([(0, 8), None])
    policy = Fixed(chain(plan, 0), execution=WHOLE)
    requests = [request(0, 1.0, 100, 3), request(1, 2.0, 100, 3)]
    report = simulate(cluster, MODEL, plan, policy, requests, until_s=20.0, warmup_s=1.5)
    told = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert "outcomes" not in told
    assert told["arrived"] == 1
    assert told["finished"] == 1
    assert told["window_s"] == [1.5, 20.0]
    assert told["uses"][0]["span"] == [0, 8]
    assert told["uses"][1] == {
        "unit": "n1", "node": "n1", "span": None, "busy": 0.0, "rows": 0.0, "kv_peak": 0.0
    }  # fmt: skip
    assert told["decode_tokens_per_s"] == pytest.approx(3 / 18.5, abs=1e-5)
    assert told["prompt_tokens_per_s"] == pytest.approx(100 / 18.5, abs=1e-5)
    assert told["offered_tokens_per_s"] == pytest.approx(103 / 18.5, abs=1e-5)
    assert told["decode"]["count"] == 2
    empty = simulate(cluster, MODEL, plan, policy, [], until_s=1.0).to_json()
    assert empty["goodput"] is None
    assert empty["ttft"]["p50_s"] is None


def test_only_the_window_counts() -> None:
    cluster, plan = world([(0, 8)])
    requests = [request(number, 0.5 * number, 50, 20) for number in range(20)]

    def run(warmup_s: float) -> tuple[int, int]:
        policy = Fixed(chain(plan, 0), execution=WHOLE)
        report = simulate(cluster, MODEL, plan, policy, requests, until_s=30.0, warmup_s=warmup_s)
        return report.arrived, report.decode.count

    assert run(0.0) == (20, 20 * 19)
    assert run(5.0)[0] == 10
    assert 10 * 19 <= run(5.0)[1] < 13 * 19
    assert run(25.0) == (0, 0)
