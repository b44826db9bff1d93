"""One unit: KV, promises, batches, and the load that it tells."""

from __future__ import annotations

import pytest

from hexswarm.peer.cache import BLOCK_TOKENS
from hexswarm.peer.scheduler import Policy, Scheduler
from hexswarm.records import Span
from hexswarm.simulator.policy import Computed, Execution
from hexswarm.simulator.records import Settings
from hexswarm.simulator.stage import Stage, Tally
from hexswarm.simulator.whole import WholePrompts
from tests.simulator.small import MODEL, READ_S, ROW_S, TOKEN_S, WHOLE, profile, world

A, B = b"a" * 16, b"b" * 16
HELD = Span(0, 4)


def stage(
    execution: Execution = WHOLE, *, kv: int = 4096, settings: Settings | None = None
) -> Stage:
    _, plan = world([(0, 4), (4, 8)], profiles=[profile(kv=kv)] * 2)
    some = settings or Settings()
    return Stage(0, plan.units[0], HELD, MODEL, execution, some, Tally(), 0.0)


def compute(one: Stage, now: float) -> tuple[float, Computed]:
    """Run the batch that waits; its end."""
    ends_s = one.begin(now)
    assert ends_s is not None
    _, work = one.finish(ends_s)
    return ends_s, work


def test_a_session_needs_kv_for_its_prompt_and_answer_in_whole_blocks() -> None:
    one = stage(kv=320)
    assert one.judge(A, 320, 4, False, 0.0, 0.0) is None
    assert one.judge(A, 321, 4, False, 0.0, 0.0) == "full"
    one.open(A, 170, 4, False, 0.0, 0.0)
    assert one.tables.free_tokens == 320 - 11 * BLOCK_TOKENS
    assert one.judge(B, 145, 4, False, 0.0, 0.0) == "full"
    one.close(A, 1.0)
    assert one.judge(B, 320, 4, False, 0.0, 1.0) is None
    assert one.tally.kv_peak == pytest.approx(11 / 20)
    assert stage(kv=320, settings=Settings(kv_share=0.5)).tables.free_tokens == 160


def test_a_promise_that_cannot_be_kept_is_refused() -> None:
    one, step_s = stage(), 4 * (READ_S + ROW_S)
    assert one.judge(A, 100, 4, False, 0.9 * step_s, 0.0) is not None
    assert one.judge(A, 100, 4, False, 1.1 * step_s, 0.0) is None
    one.open(A, 100, 4, False, 1.02 * step_s, 0.0)
    assert one.judge(B, 100, 4, False, 0.0, 0.0) is not None  # it would break the first one's
    one.close(A, 0.0)
    assert one.judge(B, 100, 4, False, 0.0, 0.0) is None


def test_a_batch_takes_its_time_and_is_counted() -> None:
    one = stage()
    one.open(A, 200, 4, False, 0.0, 0.0)
    one.submit(A, 0, 100, True, None, 0, 1.0)
    assert len(one.queue) == 1
    ends_s, work = compute(one, 1.0)
    assert ends_s == pytest.approx(1 + 4 * 100 * TOKEN_S)
    assert work == Computed(0, 0, 100, ends_s - 1.0, 0)
    one.submit(A, 100, 1, True, None, 0, 2.0)
    ends_s, work = compute(one, 2.5)
    assert (work.decode_rows, work.prompt_tokens) == (1, 0)
    assert ends_s - 2.5 == pytest.approx(4 * (READ_S + ROW_S))
    assert (one.tally.batches, one.tally.rows, one.tally.prompt_tokens) == (2, 1, 100)
    assert one.busy_s(9.0) == pytest.approx(4 * (100 * TOKEN_S + READ_S + ROW_S))
    assert one.tables.length(A) == 101
    assert one.begin(9.0) is None


def test_the_load_tells_waits_rows_and_sessions_to_come() -> None:
    one = stage()
    one.open(A, 1000, 4, False, 0.0, 0.0)
    assert one.load(0.0).rows == 0
    # Half of a ring's layers: half a row that no batch shows yet.
    assert one.foreseen(B, 4, 0.0).rows == pytest.approx(0.5)
    assert one.foreseen(A, 4, 0.0).rows == 0
    one.submit(A, 0, 900, True, None, 0, 0.0)
    assert 0 < one.load(0.0).queue_s <= 4 * 900 * TOKEN_S  # a guess, until it computed some
    now, _ = compute(one, 0.0)
    for step in range(100):
        one.submit(A, 900 + step, 1, True, None, 0, now)
        now, _ = compute(one, now)
    load = one.load(now)
    assert load.rows == pytest.approx(0.9, abs=0.1)
    assert load.free_kv_tokens == one.tables.free_tokens < 4096


def test_half_a_batch_under_way_counts_as_work() -> None:
    one = stage()
    one.open(A, 200, 4, False, 0.0, 0.0)
    one.submit(A, 0, 100, True, None, 0, 0.0)
    ends_s = one.begin(1.0)
    assert ends_s is not None
    assert one.busy_s(1.0 + (ends_s - 1.0) / 2) == pytest.approx((ends_s - 1.0) / 2)


def test_what_waits_of_a_session_can_be_forgotten_and_sent_again() -> None:
    one = stage()
    one.open(A, 200, 4, False, 0.0, 0.0)
    one.submit(A, 0, 100, True, None, 0, 0.0)
    now, _ = compute(one, 0.0)
    one.submit(A, 100, 1, True, None, 0, now)
    one.cancel(A)
    assert (len(one.queue), one.tables.length(A)) == (0, 100)
    one.submit(A, 0, 100, True, None, 1, now)
    assert one.tables.length(A) == 100
    one.close(A, now)
    assert (len(one.queue), len(one.promises)) == (0, 0)


def test_systems_differ_in_the_queue() -> None:
    peers, others = stage(Execution()), stage(WHOLE)
    assert isinstance(others.queue, WholePrompts)
    assert isinstance(peers.queue, Scheduler)
    assert peers.queue.policy.head
    changed = Settings(scheduling=lambda usual: Policy(max_rows=usual.max_rows + 1))
    queue = stage(Execution(), settings=changed).queue
    assert isinstance(queue, Scheduler)
    assert queue.policy.max_rows == peers.queue.policy.max_rows + 1
