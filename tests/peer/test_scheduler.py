"""Batches: decode first, prompts in pieces, order, siblings, the fit of step times."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hexswarm.errors import UsageError
from hexswarm.peer.scheduler import (
    Policy,
    Scheduler,
    Wait,
    chunk_range,
    slice_payload,
)
from hexswarm.peer.steps import Activations, Batch, Step
from hexswarm.peer.steptime import StepTime
from hexswarm.records import Span, Speed

A, B, C, D = (bytes([i]) * 16 for i in range(4))


def decode(session: bytes, position: int = 5, *, siblings: int = 0) -> Step:
    return Step(session, position, 1, None, last=True, arrived_s=0.0, siblings=siblings)


def prompt(session: bytes, count: int, position: int = 0, *, last: bool = True) -> Step:
    return Step(session, position, count, list(range(count)), last=last, arrived_s=0.0)


def shape(batch: Batch | Wait | None) -> list[tuple[bytes, int, int]]:
    assert isinstance(batch, Batch)
    return [(row.session, row.position, row.count) for row in batch.rows]


def test_nothing_waits() -> None:
    scheduler = Scheduler()
    assert scheduler.pick(0.0) is None
    assert len(scheduler) == 0
    assert scheduler.prompts_s() == 0.0


def test_decodes_come_first_and_prompts_fill_up() -> None:
    scheduler = Scheduler(Policy(chunk_tokens=64))
    scheduler.submit(prompt(A, 40), 0.0)
    scheduler.submit(decode(B), 0.0)
    scheduler.submit(decode(C), 0.0)
    batch = scheduler.pick(0.0)
    assert shape(batch)[:2] == [(B, 5, 1), (C, 5, 1)]
    assert shape(batch)[2][0] == A


def test_a_long_prompt_is_cut_and_ends_with_the_row_to_sample() -> None:
    scheduler = Scheduler(Policy(chunk_tokens=64), blocks_of=lambda session: (len(session),))
    step = prompt(A, 150)
    scheduler.submit(step, 0.0)
    rows = []
    while isinstance(batch := scheduler.pick(0.0), Batch):
        assert len(batch.rows) == 1
        rows += batch.rows
        scheduler.finished(batch, 0.0, 0.01)
    assert [(row.position, row.count) for row in rows] == [(0, 64), (64, 64), (128, 22)]
    assert [row.sample for row in rows] == [False, False, True]
    assert [token for row in rows for token in row.payload] == step.payload
    assert {row.blocks for row in rows} == {(16,)}


def test_the_middle_of_a_prompt_is_not_sampled() -> None:
    scheduler = Scheduler()
    scheduler.submit(prompt(A, 10, last=False), 0.0)
    batch = scheduler.pick(0.0)
    assert isinstance(batch, Batch)
    assert not batch.rows[0].sample


def test_a_row_keeps_what_its_step_says() -> None:
    scheduler = Scheduler()
    scheduler.submit(Step(A, 3, 1, None, True, 0.0, turn=7, span=Span(2, 4)), 0.0)
    batch = scheduler.pick(0.0)
    assert isinstance(batch, Batch)
    assert (batch.rows[0].turn, batch.rows[0].span) == (7, Span(2, 4))


def test_prompts_without_decodes_share_a_chunk_in_order_of_arrival() -> None:
    scheduler = Scheduler(Policy(chunk_tokens=64))
    for session, count in ((A, 20), (B, 30), (C, 60)):
        scheduler.submit(prompt(session, count), 0.0)
    assert shape(scheduler.pick(0.0)) == [(A, 0, 20), (B, 0, 30)]
    assert shape(scheduler.pick(0.0)) == [(C, 0, 60)]


def test_the_rest_of_a_prompt_keeps_its_place() -> None:
    scheduler = Scheduler(Policy(chunk_tokens=32))
    scheduler.submit(prompt(A, 100), 0.0)
    scheduler.submit(prompt(B, 10), 0.0)
    assert [shape(scheduler.pick(0.0))[0][0] for _ in range(3)] == [A, A, A]


def test_steps_of_a_session_stay_in_order_and_apart() -> None:
    scheduler = Scheduler()
    for position in (0, 8, 16):
        scheduler.submit(prompt(A, 8, position, last=position == 16), 0.0)
    scheduler.submit(decode(A, 24), 0.0)
    positions = [shape(scheduler.pick(0.0)) for _ in range(4)]
    assert positions == [[(A, 0, 8)], [(A, 8, 8)], [(A, 16, 8)], [(A, 24, 1)]]
    assert scheduler.pick(0.0) is None


def test_rows_are_capped_and_one_is_kept_for_a_prompt() -> None:
    scheduler = Scheduler(Policy(max_rows=3))
    keys = [bytes([i]) * 16 for i in range(5)]
    scheduler.submit(prompt(A, 16), 0.0)
    for key in keys[1:]:
        scheduler.submit(decode(key), 0.0)
    assert [row[0] for row in shape(scheduler.pick(0.0))] == [keys[1], keys[2], A]
    assert [row[0] for row in shape(scheduler.pick(0.0))] == [keys[3], keys[4]]


def test_beside_decodes_a_prompt_gets_what_the_target_leaves() -> None:
    scheduler = Scheduler(Policy(chunk_tokens=512, target_step_s=0.05))
    rng = random.Random(1)
    for _ in range(60):  # 10 ms + 1 ms a row + 0.5 ms a token
        rows, tokens = rng.randrange(1, 8), rng.choice([0, 0, 16, 64])
        scheduler.times.observe(rows, tokens, 0.01 + 0.001 * rows + 0.0005 * tokens)
    for session in (A, B):
        scheduler.submit(decode(session), 0.0)
    scheduler.submit(prompt(C, 1000), 0.0)
    rows = shape(scheduler.pick(0.0))
    assert rows[2][2] == pytest.approx(76, abs=16)


def test_slow_decodes_leave_a_prompt_as_much_time_again() -> None:
    """A machine whose decodes alone exceed the target still prefills, at up to double the step."""
    scheduler = Scheduler(Policy(chunk_tokens=512, target_step_s=0.05))
    for rows, tokens in ((1, 0), (4, 0), (1, 64), (2, 128)) * 10:
        scheduler.times.observe(rows, tokens, 0.2 + 0.01 * rows + 0.002 * tokens)
    scheduler.submit(decode(A), 0.0)
    scheduler.submit(prompt(C, 1000), 0.0)
    assert 64 <= shape(scheduler.pick(0.0))[1][2] <= 112


def test_a_prompt_never_starves() -> None:
    scheduler = Scheduler(Policy(target_step_s=1e-6))
    for tokens in (0, 16, 0, 32, 0, 0):
        scheduler.times.observe(1, tokens, 0.001 + tokens * 10)
    scheduler.submit(decode(A), 0.0)
    scheduler.submit(prompt(C, 100), 0.0)
    assert shape(scheduler.pick(0.0))[1] == (C, 0, 16)


def test_the_head_cuts_a_fresh_prompt_so_that_stages_overlap() -> None:
    policy = Policy(head=True, chunk_tokens=128, chunk_floor=32)

    def pieces(scheduler: Scheduler, step: Step) -> list[int]:
        scheduler.submit(step, 0.0)
        counts = []
        while isinstance(batch := scheduler.pick(0.0), Batch):
            counts.append(batch.tokens)
        return counts

    assert pieces(Scheduler(policy), prompt(A, 20)) == [20]
    assert pieces(Scheduler(policy), prompt(A, 100)) == [64, 36]
    assert pieces(Scheduler(policy), prompt(A, 512)) == [96] * 4 + [128]
    assert pieces(Scheduler(policy), prompt(A, 2048)) == [128] * 16
    assert pieces(Scheduler(policy), prompt(A, 100, 50)) == [100], "a later turn or replay"
    assert pieces(Scheduler(Policy(chunk_tokens=128)), prompt(A, 100)) == [100], "not the head"


@given(
    tokens=st.integers(256, 4000),
    efficient=st.integers(16, 1000),
    stages=st.integers(2, 12),
)
def test_the_cut_is_near_the_best_there_is(tokens: int, efficient: int, stages: int) -> None:
    """Of a prompt of some length: within a quarter of the best number of pieces."""

    def pipeline(piece: int) -> float:
        pieces = -(-tokens // piece)
        return (stages + pieces - 1) * (efficient + tokens / pieces)

    policy = Policy(head=True, chunk_tokens=4096, efficient_tokens=efficient, stages=stages)
    scheduler = Scheduler(policy)
    scheduler.submit(prompt(A, tokens), 0.0)
    batch = scheduler.pick(0.0)
    assert isinstance(batch, Batch)
    best = min(pipeline(max(16, -(-tokens // pieces))) for pieces in range(1, 9))
    assert pipeline(max(16, batch.tokens)) <= 1.25 * best


def test_a_prompt_stays_whole_where_pieces_cost_as_much() -> None:
    policy = Policy.of(576 * 4, head=True, efficient_tokens=300)
    scheduler = Scheduler(policy)
    scheduler.submit(prompt(A, 43), 0.0)
    batch = scheduler.pick(0.0)
    assert isinstance(batch, Batch)
    assert batch.tokens == 43


def test_chunks_follow_the_size_of_activations_and_the_device() -> None:
    assert chunk_range(576 * 4) == (16, 112)
    assert chunk_range(4096 * 2) == (16, 32)
    assert chunk_range(8192 * 2) == (16, 16)
    assert chunk_range(8192 * 2, 64) == (16, 64)
    assert chunk_range(8192 * 2, 256) == (16, 128), "never more than 2 MiB"
    assert Policy.of(576 * 4, head=True).chunk_tokens == 112


def test_a_policy_is_checked() -> None:
    for wrong in ({"max_rows": 1}, {"chunk_floor": 8}, {"chunk_floor": 64, "chunk_tokens": 32}):
        with pytest.raises(UsageError):
            Policy(**wrong)
    with pytest.raises(UsageError):
        Policy(target_step_s=0.0)


def test_siblings_wait_for_each_other() -> None:
    scheduler = Scheduler(Policy(sibling_wait_s=0.002))
    scheduler.submit(decode(A, siblings=2), 1.0)
    assert scheduler.pick(1.0) == Wait(1.002)
    scheduler.submit(decode(B, siblings=1), 1.001)
    assert scheduler.pick(1.001) == Wait(1.002)
    scheduler.submit(decode(C), 1.0015)
    assert [row[0] for row in shape(scheduler.pick(1.0015))] == [A, B, C]


def test_a_lost_sibling_is_waited_for_once() -> None:
    scheduler = Scheduler(Policy(sibling_wait_s=0.002))
    scheduler.submit(decode(A, siblings=1), 1.0)
    assert shape(scheduler.pick(1.002)) == [(A, 5, 1)]
    scheduler.submit(decode(C), 1.003)
    assert shape(scheduler.pick(1.003)) == [(C, 5, 1)]


def test_endless_siblings_do_not_stop_the_device() -> None:
    """A liar that always announces more delays a batch by the bound, not for ever."""
    scheduler = Scheduler(Policy(sibling_wait_s=0.002))
    for i in range(100):
        scheduler.submit(decode(bytes([i]) * 16, siblings=1), 1.0 + i * 1e-4)
        picked = scheduler.pick(1.0 + i * 1e-4)
        if isinstance(picked, Batch):
            assert i == 20
            return
    raise AssertionError


def test_a_dropped_session_vanishes() -> None:
    scheduler = Scheduler(Policy(head=True))
    scheduler.submit(decode(A), 0.0)
    scheduler.submit(prompt(B, 100), 0.0)
    batch = scheduler.pick(0.0)
    assert isinstance(batch, Batch)
    scheduler.submit(decode(A, 6), 0.0)
    scheduler.drop(A)
    scheduler.drop(B)
    scheduler.drop(C)
    assert scheduler.pick(0.0) is None
    scheduler.finished(batch, 0.1, 0.1)
    assert len(scheduler) == 0
    assert scheduler.gather.sessions == 0, "a late batch does not bring it back"


def test_waiting_work_is_counted() -> None:
    scheduler = Scheduler(Policy(chunk_tokens=64))
    for rows, tokens in ((1, 0), (4, 0), (0, 64), (0, 32)) * 20:
        scheduler.times.observe(rows, tokens, 0.01 + 0.001 * rows + 0.0005 * tokens)
    scheduler.submit(decode(A), 0.0)
    scheduler.submit(prompt(B, 128), 0.0)
    assert scheduler.pending_tokens(B) == 128
    assert scheduler.prompts_s() == pytest.approx(0.01 * 2 + 0.0005 * 128, rel=0.1)


def test_a_row_knows_since_when_it_could_have_been_computed() -> None:
    """From its arrival, or from the end of what its session asked for before."""
    scheduler = Scheduler(Policy(chunk_tokens=16, chunk_floor=16))
    scheduler.submit(decode(B), 3.0)
    scheduler.submit(prompt(A, 32), 4.0)
    first = scheduler.pick(5.0)
    assert isinstance(first, Batch)
    assert [row.ready_s for row in first.rows] == [3.0, 4.0]
    scheduler.submit(decode(B, 6), 5.5)
    scheduler.finished(first, 7.0, 2.0)
    second = scheduler.pick(8.0)
    assert isinstance(second, Batch)
    assert [row.ready_s for row in second.rows] == [7.0, 7.0]
    scheduler.finished(second, 9.0, 1.0)
    scheduler.submit(decode(A, 32), 9.5)
    third = scheduler.pick(9.6)
    assert isinstance(third, Batch)
    assert [row.ready_s for row in third.rows] == [9.5]


def test_payloads_are_cut_by_token() -> None:
    part = slice_payload(Activations(bytes(range(12)), "float32"), 3, 1, 2)
    assert bytes(part.data) == bytes(range(4, 12))
    assert slice_payload([1, 2, 3], 3, 1, 1) == [2]
    assert slice_payload(None, 3, 1, 1) is None


steps = st.builds(
    lambda session, position, count, last, siblings: Step(
        bytes([session]) * 16, position, count, list(range(count)), last, 0.0, 0, siblings
    ),
    st.integers(0, 6),
    st.integers(0, 3),
    st.one_of(st.just(1), st.integers(1, 300)),
    st.booleans(),
    st.integers(0, 3),
)


@settings(deadline=None, max_examples=150)
@given(
    st.lists(st.one_of(steps, st.floats(0.0, 0.01)), max_size=60),
    st.booleans(),
    st.integers(2, 5),
)
def test_all_tokens_are_computed_once_in_order(
    events: list[Step | float], head: bool, max_rows: int
) -> None:
    """Any history gives each session its tokens once and in order, in legal batches."""
    scheduler = Scheduler(Policy(head=head, max_rows=max_rows, chunk_tokens=48))
    wanted: dict[bytes, list[tuple[int, int]]] = {}
    given_out: dict[bytes, list[tuple[int, int]]] = {}
    now = 0.0

    def compute() -> bool:
        nonlocal now
        picked = scheduler.pick(now)
        if isinstance(picked, Wait):
            assert picked.until > now
            now = picked.until
            return True
        if picked is None:
            return False
        sessions = [row.session for row in picked.rows]
        assert len(sessions) == len(set(sessions)) <= max_rows
        assert all(row.count <= 48 for row in picked.rows)
        assert picked.tokens <= 48 + max_rows
        for row in picked.rows:
            given_out.setdefault(row.session, []).extend(
                (row.position + i, token) for i, token in enumerate(row.payload)
            )
        now += 0.005
        scheduler.finished(picked, now, 0.005)
        return True

    for event in events:
        if isinstance(event, Step):
            scheduler.submit(event, now)
            wanted.setdefault(event.session, []).extend(
                (event.position + i, i) for i in range(event.count)
            )
        else:
            now += event
            compute()
    while compute():
        pass
    assert given_out == wanted
    assert len(scheduler) == 0


def test_the_fit_finds_the_truth() -> None:
    times, rng = StepTime(), random.Random(2)
    for _ in range(100):
        rows, tokens = rng.randrange(0, 9), rng.choice([0, 0, 0, 16, 48, 128])
        if rows or tokens:
            noise = 1 + 0.1 * rng.random()
            times.observe(rows, tokens, noise * (0.02 + 0.003 * rows + 0.001 * tokens))
    for rows, tokens in ((1, 0), (8, 0), (4, 64), (0, 256)):
        truth = 0.02 + 0.003 * rows + 0.001 * tokens
        assert times.predict(rows, tokens) == pytest.approx(1.05 * truth, rel=0.1)


def test_the_fit_follows_a_machine_that_gets_slower() -> None:
    times = StepTime()
    for scale in (1.0, 5.0):
        for i in range(80):
            times.observe(1 + i % 3, 0, scale * (0.01 + 0.001 * (1 + i % 3)))
    assert times.predict(2) == pytest.approx(0.06, rel=0.1)


def test_the_fit_keeps_what_it_no_longer_sees() -> None:
    times = StepTime()
    for tokens in (16, 32, 64, 128) * 10:
        times.observe(0, tokens, 0.01 + 0.001 * tokens)
    for _ in range(500):
        times.observe(1, 0, 0.012)
    assert times.predict(0, 64) == pytest.approx(0.074, rel=0.25)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 64), st.integers(0, 2048), st.floats(0, 100)), min_size=1))
def test_the_fit_stays_sane(steps: list[tuple[int, int, float]]) -> None:
    """Whatever is measured, predictions are finite, positive and grow with the batch."""
    times = StepTime()
    for rows, tokens, elapsed_s in steps:
        if rows or tokens:
            times.observe(rows, tokens, elapsed_s)
    assert 0 < times.predict(1) <= times.predict(2) < 1e6
    assert times.predict(1) <= times.predict(1, 16) < 1e6
    assert times.tokens_within(0.05, 1) >= 0


SPEED = Speed(0.001, 0.0001, 0.0, 0.0002)


def test_before_any_step_the_probe_is_believed() -> None:
    """Ten layers: a read of 8 ms, 2 ms a row; a token of a chunk costs 1 ms, its read shared."""
    times = StepTime.probed(SPEED, 10)
    assert times.predict(1) == pytest.approx(0.010)
    assert times.predict(3) == pytest.approx(0.014)
    assert times.predict(0, 128) == pytest.approx(0.128, rel=0.1)
    assert times.marginal(3, 0) == pytest.approx(0.006)
    assert times.marginal(0, 0) == 0.0
    times.observe(1, 0, 0.020)
    assert times.predict(3) == pytest.approx(0.028, rel=0.1), "a machine half as fast"


def test_noise_does_not_make_rows_free() -> None:
    """Batches of four that seem as long as those of one, for long: a full peer would seem idle."""
    times = StepTime.probed(SPEED, 10)
    for n in range(400):
        times.observe(1 + 3 * (n % 2), 0, 0.012)
    share = times.marginal(4, 0) / times.predict(4)
    assert 0.1 < share < 0.6
