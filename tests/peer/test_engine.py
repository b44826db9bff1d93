"""The device thread: one delivery per batch, errors for the guilty only, bounded stop."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import pytest

from hexswarm.clock import RealClock
from hexswarm.errors import SessionClosed
from hexswarm.peer.cache import BlockTables
from hexswarm.peer.engine import Engine
from hexswarm.peer.leases import KvFull
from hexswarm.peer.pace import Pace
from hexswarm.peer.scheduler import Policy, Scheduler
from hexswarm.peer.steps import Batch, Result, Row, Step
from hexswarm.records import Load, Span, Speed

A, B, C = (bytes([i]) * 16 for i in range(3))


class IntegerRunner:
    """A model of one integer per block of KV: the token is the sum of a session's inputs so far.

    It keeps its sums in blocks, as a real runner keeps KV, so that a wrong block table or a step
    out of order gives a wrong token. `before` runs first in each batch and may block or raise.
    """

    def __init__(self, blocks: int) -> None:
        self.cells = [[0] * 16 for _ in range(blocks)]
        self.batches: list[Batch] = []
        self.started_s: list[float] = []
        self.threads: set[str] = set()
        self.before: Callable[[Batch], None] = lambda batch: None

    def run(self, batch: Batch) -> Sequence[Result]:
        self.started_s.append(time.perf_counter())
        self.threads.add(threading.current_thread().name)
        self.batches.append(batch)
        self.before(batch)
        return [self._row(row) for row in batch.rows]

    def _row(self, row: Row) -> Result:
        for i, value in enumerate(row.payload, row.position):
            self.cells[row.blocks[i // 16]][i % 16] = value
        end = row.position + row.count
        total = sum(self.cells[row.blocks[i // 16]][i % 16] for i in range(end))
        return Result(row, token=total if row.sample else None)


class Bench:
    """An engine on an integer runner, with its deliveries as a queue."""

    def __init__(self, blocks: int = 64, **policy: float) -> None:
        self.runner = IntegerRunner(blocks)
        self.cache = BlockTables(blocks)
        self.scheduler = Scheduler(Policy(**policy), self.cache.blocks)  # type: ignore[arg-type]
        self.deliveries: asyncio.Queue[list[Result]] = asyncio.Queue()
        self.engine = Engine(
            self.runner,
            self.scheduler,
            self.cache,
            clock=RealClock(),
            deliver=self.deliveries.put_nowait,
            pace=Pace(Speed(0.001, 0.0001, 0.0), Span(0, 6), 12),
        )

    async def results(self) -> list[Result]:
        async with asyncio.timeout(5):
            return await self.deliveries.get()


@asynccontextmanager
async def bench(blocks: int = 64, **policy: float) -> AsyncIterator[Bench]:
    made = Bench(blocks, **policy)
    made.engine.start()
    try:
        yield made
    finally:
        assert made.engine.stop(5.0)


def prompt(session: bytes, values: list[int], position: int = 0) -> Step:
    return Step(session, position, len(values), values, last=True, arrived_s=0.0)


def decode(session: bytes, position: int, value: int) -> Step:
    return prompt(session, [value], position)


def test_a_session_from_open_to_close() -> None:
    async def main() -> None:
        async with bench(chunk_tokens=32) as b:
            lease = b.engine.open(A, 60)
            assert lease.tokens == 60
            b.engine.submit([prompt(A, list(range(40)))])
            first, second = await b.results(), await b.results()
            assert [first[0].token, second[0].token] == [None, sum(range(40))]
            b.engine.submit([decode(A, 40, 7)])
            assert (await b.results())[0].token == sum(range(40)) + 7
            assert b.runner.threads == {"hexswarm-device"}
            assert b.engine.counters.batches == 3
            assert b.engine.counters.tokens == 41
            assert b.engine.close(A)
            assert not b.engine.close(A)
            assert b.engine.free_tokens == 64 * 16

    asyncio.run(main())


def test_steps_submitted_together_are_one_batch_and_one_delivery() -> None:
    async def main() -> None:
        async with bench() as b:
            for session in (A, B, C):
                b.engine.open(session, 16)
            b.engine.submit([prompt(s, [1, 2]) for s in (A, B, C)])
            results = await b.results()
            assert [result.row.session for result in results] == [A, B, C]
            assert len(b.runner.batches) == 1

    asyncio.run(main())


def test_a_result_tells_how_long_its_row_waited_and_its_batch_took() -> None:
    async def main() -> None:
        async with bench() as b:
            entered, release = threading.Event(), threading.Event()

            def block(batch: Batch) -> None:
                entered.set()
                release.wait(5)

            b.runner.before = block
            for session in (A, B, C):
                b.engine.open(session, 16)
            b.engine.submit([prompt(A, [1])])
            await asyncio.to_thread(entered.wait, 5)
            b.engine.submit([prompt(B, [1])])
            b.engine.submit([prompt(C, [1])])
            release.set()
            (first,), behind = await b.results(), await b.results()
            assert first.batch_rows == 1
            assert 0 <= first.wait_s < first.compute_s + 1
            assert [result.batch_rows for result in behind] == [2, 2]
            assert behind[0].wait_s >= behind[1].wait_s >= 0
            assert behind[0].compute_s == behind[1].compute_s > 0
            assert behind[0].wait_s <= first.compute_s + 1

    asyncio.run(main())


def test_load_counts_what_was_computed_and_waits() -> None:
    async def main() -> None:
        async with bench() as b:
            assert b.engine.load_now() == Load(0.0, 0.0, 0.0, 64 * 16)
            b.engine.open(A, 32)
            b.engine.submit([prompt(A, [1, 2])])
            await b.results()
            for position in range(2, 12):
                b.engine.submit([decode(A, position, 1)])
                await b.results()
            load = b.engine.load_now()
            assert load.free_kv_tokens == 62 * 16
            assert 0 < load.rows < 1
            assert 0 < load.busy < 1
            assert load.queue_s > 0

    asyncio.run(main())


def test_steps_that_arrive_during_a_batch_make_the_next_one() -> None:
    async def main() -> None:
        async with bench() as b:
            entered, release = threading.Event(), threading.Event()

            def block(batch: Batch) -> None:
                entered.set()
                release.wait(5)

            b.runner.before = block
            for session in (A, B, C):
                b.engine.open(session, 16)
            b.engine.submit([prompt(A, [1])])
            await asyncio.to_thread(entered.wait, 5)
            b.engine.submit([prompt(B, [1])])
            b.engine.submit([prompt(C, [1])])
            assert b.engine.load_now().queue_s > 0
            assert b.engine.load_now(prompts=False).queue_s < b.engine.load_now().queue_s
            release.set()
            assert [len(await b.results()) for _ in range(2)] == [1, 2]

    asyncio.run(main())


def test_a_wrong_step_fails_its_session_only() -> None:
    async def main() -> None:
        async with bench() as b:
            for session in (A, B):
                b.engine.open(session, 16)
            wrong = [
                (decode(A, 3, 1), "gap"),
                (prompt(A, list(range(17))), "more steps"),
                (decode(C, 1, 1), "no KV"),
            ]
            b.engine.submit([prompt(B, [5]), *(step for step, _ in wrong)])
            answers = await b.results() + await b.results()
            errors = {r.row.position: r.error or "" for r in answers if r.error}
            assert len([r for r in answers if r.error]) == 3
            assert "gap" in errors[3]
            assert [r.token for r in answers if r.error is None] == [5]
            b.engine.submit([prompt(A, [1, 2])])
            assert (await b.results())[0].token == 3, "the refused steps left no trace"

    asyncio.run(main())


def test_more_steps_than_the_lease_holds_are_refused() -> None:
    """The queue is bounded by the leases: repeating a position does not fill memory."""

    async def main() -> None:
        async with bench() as b:
            release = threading.Event()
            b.runner.before = lambda batch: release.wait(5) and None
            b.engine.open(A, 16)
            b.engine.open(B, 16)
            b.engine.submit([prompt(B, [1])])
            b.engine.submit([prompt(A, [1] * 4) for _ in range(50)])
            refused = await b.results()
            assert len(refused) in (46, 45)
            release.set()

    asyncio.run(main())


def test_cropping_overwrites() -> None:
    async def main() -> None:
        async with bench() as b:
            b.engine.open(A, 16)
            b.engine.submit([prompt(A, [1, 2, 3, 4])])
            await b.results()
            b.engine.submit([decode(A, 2, 10)])
            assert (await b.results())[0].token == 13
            assert b.cache.length(A) == 3

    asyncio.run(main())


def test_a_crash_fails_its_batch_and_the_thread_lives_on(caplog: pytest.LogCaptureFixture) -> None:
    words = "what somebody wrote"

    async def main() -> None:
        async with bench() as b:
            for session in (A, B):
                b.engine.open(session, 32)
            b.engine.submit([prompt(A, [1]), prompt(B, [2])])
            await b.results()

            def crash(batch: Batch) -> None:
                raise MemoryError(words)

            b.runner.before = crash
            for _ in range(2):
                b.engine.submit([decode(A, 1, 1)])
                (result,) = await b.results()
                assert result.error is not None
                assert "MemoryError" in result.error
                assert b.cache.length(A) == 1, "the step counts as not written"
            b.runner.before = lambda batch: None
            b.engine.submit([decode(A, 1, 4), decode(B, 1, 5)])
            assert [r.token for r in await b.results()] == [5, 7]
            assert b.engine.counters.crashes == 2
            assert b.engine.alive

    with caplog.at_level(logging.ERROR, "hexswarm.peer.engine"):
        asyncio.run(main())
    assert len(caplog.records) == 2
    first, second = (record.getMessage() for record in caplog.records)
    assert "failed: MemoryError\nTraceback" in first
    assert "in crash\n" in first, "where it was raised"
    assert second.endswith("failed: MemoryError")
    assert words not in caplog.text
    assert not any(record.exc_info for record in caplog.records)


def test_one_row_that_makes_a_batch_fail_takes_no_other_along() -> None:
    """Each is tried once more by itself; what cannot be computed fails, and only that."""

    async def main() -> None:
        async with bench() as b:

            def crash(batch: Batch) -> None:
                if any(13 in row.payload for row in batch.rows):
                    raise RuntimeError("poison")

            for session in (A, B, C):
                b.engine.open(session, 32)
            b.engine.submit([prompt(A, [1]), prompt(B, [2]), prompt(C, [3])])
            await b.results()
            b.runner.before = crash
            b.engine.submit([decode(A, 1, 4), decode(B, 1, 13), decode(C, 1, 5)])
            results = await b.results()
            assert [(r.token, r.error is None) for r in results] == [
                *((5, True), (None, False), (8, True))
            ]
            assert [len(batch.rows) for batch in b.runner.batches[1:]] == [3, 1, 1, 1]
            assert [b.cache.length(key) for key in (A, B, C)] == [2, 1, 2]
            assert b.engine.counters.crashes == 1
            b.engine.submit([decode(A, 2, 1), decode(B, 1, 6), decode(C, 2, 1)])
            assert [r.token for r in await b.results()] == [6, 8, 9], "all go on"

    asyncio.run(main())


def test_a_batch_that_does_not_fit_is_computed_in_parts() -> None:
    async def main() -> None:
        async with bench() as b:

            def crash(batch: Batch) -> None:
                if len(batch.rows) > 1:
                    raise MemoryError("out of memory")

            b.runner.before = crash
            b.engine.open(A, 32)
            b.engine.open(B, 32)
            b.engine.submit([prompt(A, [1]), prompt(B, [2])])
            assert [r.token for r in await b.results()] == [1, 2]
            assert b.engine.alive

    asyncio.run(main())


def test_a_row_of_the_past_that_fails_leaves_what_came_since() -> None:
    """The session was rewound to another route while the device computed for the old one."""

    async def main() -> None:
        async with bench() as b:
            entered, leave = threading.Event(), threading.Event()

            def crash(batch: Batch) -> None:
                entered.set()
                assert leave.wait(5)
                b.runner.before = lambda batch: None
                raise RuntimeError("the old route")

            b.engine.open(A, 32)
            b.engine.submit([prompt(A, [1, 2, 3])])
            await b.results()
            b.runner.before = crash
            b.engine.submit([decode(A, 3, 4), decode(A, 4, 5)])
            assert await asyncio.to_thread(entered.wait, 5)
            b.engine.cancel(A, 2)
            assert b.cache.length(A) == 2
            b.engine.submit([decode(A, 2, 7)])
            leave.set()
            assert [r.error is None for r in await b.results()] == [False]
            assert [r.token for r in await b.results()] == [10]
            assert b.cache.length(A) == 3

    asyncio.run(main())


def test_what_an_ended_session_left_is_erased_before_anybody_else_computes() -> None:
    """After the batch that still writes there, whether the session was closed or expired."""

    async def main() -> None:
        made = Bench(4)
        story: list[object] = []

        def forget(blocks: Sequence[int]) -> None:
            assert threading.current_thread().name == "hexswarm-device"
            story.append(sorted(blocks))

        made.engine = Engine(
            *(made.runner, made.scheduler, made.cache),
            clock=RealClock(),
            deliver=made.deliveries.put_nowait,
            forget=forget,
        )
        entered, leave = threading.Event(), threading.Event()

        def note(batch: Batch) -> None:
            story.append(batch.rows[0].session)
            entered.set()
            assert leave.wait(5)

        made.runner.before = note
        made.engine.start()
        try:
            made.engine.open(A, 32)
            made.engine.submit([prompt(A, [1])])
            assert await asyncio.to_thread(entered.wait, 5)
            made.engine.close(A)
            made.engine.open(B, 64)
            made.engine.submit([prompt(B, [2])])
            leave.set()
            await made.results()
            await made.results()
            made.cache.lease_s = -1.0
            assert made.engine.expire() == [B]
            await asyncio.wrap_future(made.engine.between(lambda: None))
            assert story == [A, [0, 1], B, [0, 1, 2, 3]]
        finally:
            assert made.engine.stop(5.0)

    asyncio.run(main())


def test_a_failed_prompt_takes_its_rest_along() -> None:
    async def main() -> None:
        async with bench(chunk_tokens=32) as b:

            def crash(batch: Batch) -> None:
                raise RuntimeError

            b.runner.before = crash
            b.engine.open(A, 200)
            b.engine.open(B, 200)
            b.engine.submit([prompt(A, [1] * 100)])
            assert (await b.results())[0].error
            b.runner.before = lambda batch: None
            b.engine.submit([decode(A, 100, 1), prompt(B, [1])])
            assert {r.error is None for r in await b.results() + await b.results()} == {True, False}
            assert len(b.runner.batches) == 2
            b.engine.submit([prompt(A, [1] * 10)])
            assert (await b.results())[0].token == 10, "a replay from the start works"

    asyncio.run(main())


def test_a_runner_that_loses_rows_is_a_crash() -> None:
    async def main() -> None:
        async with bench() as b:
            b.runner.run = lambda batch: []  # type: ignore[method-assign]
            b.engine.open(A, 16)
            b.engine.submit([prompt(A, [1])])
            assert (await b.results())[0].error

    asyncio.run(main())


def test_a_full_pool_refuses_at_once() -> None:
    async def main() -> None:
        async with bench(blocks=2) as b:
            b.engine.open(A, 16)
            with pytest.raises(KvFull):
                b.engine.open(B, 17)
            assert b.engine.extend(A, 32).tokens == 32
            with pytest.raises(SessionClosed):
                b.engine.extend(B, 1)

    asyncio.run(main())


def test_a_closed_session_vanishes_from_the_queue() -> None:
    async def main() -> None:
        async with bench() as b:
            entered, release = threading.Event(), threading.Event()

            def block(batch: Batch) -> None:
                entered.set()
                release.wait(5)

            b.runner.before = block
            for session in (A, B, C):
                b.engine.open(session, 16)
            b.engine.submit([prompt(A, [1])])
            await asyncio.to_thread(entered.wait, 5)
            b.engine.submit([prompt(B, [1]), prompt(C, [1])])
            b.engine.close(B)
            b.engine.close(A)
            release.set()
            assert [r.row.session for r in await b.results() + await b.results()] == [A, C]

    asyncio.run(main())


def test_a_step_is_timed_at_rest_only() -> None:
    """On the device thread, on blocks of its own, and never while a session has KV."""

    async def main() -> None:
        async with bench() as b:
            ran = []

            def see(batch: Batch) -> None:
                (row,) = batch.rows
                ran.append((row.blocks, threading.current_thread().name))

            def test(run: Callable[[Batch], object]) -> float:
                run(Batch((Row(b"probe", 0, 1, [1], True, (0, 1)),)))
                return 0.012

            b.runner.before = see
            b.engine.open(A, 32, ["name"])
            assert b.engine.at_rest(test) is None
            b.engine.submit([prompt(A, [*range(20)])])
            await b.results()
            b.engine.close(A)
            ran.clear()
            for _ in range(3):
                timed = b.engine.at_rest(test)
                assert timed is not None
                await asyncio.wrap_future(timed)
            assert ran == [((1, 2), "hexswarm-device")] * 3, "block 0 keeps what has a name"
            assert b.cache.free_blocks == 64
            speed = b.engine.speed_now()
            assert speed is not None
            assert speed.decode_layer_s == pytest.approx(0.012 / 6)

    asyncio.run(main())


def test_a_cancelled_step_does_not_count_as_cached() -> None:
    """Otherwise a later step could attend to what an earlier session left in the blocks."""

    async def main() -> None:
        async with bench() as b:
            entered, release = threading.Event(), threading.Event()

            def block(batch: Batch) -> None:
                entered.set()
                release.wait(5)

            b.runner.before = block
            b.engine.open(A, 64)
            b.engine.open(B, 16)
            b.engine.submit([prompt(B, [1])])
            await asyncio.to_thread(entered.wait, 5)
            b.engine.submit([prompt(A, [1, 2, 3])])
            b.engine.cancel(A)
            release.set()
            assert [r.row.session for r in await b.results()] == [B]
            b.engine.submit([decode(A, 3, 4)])
            (refused,) = await b.results()
            assert refused.error is not None
            assert "gap" in refused.error
            b.engine.submit([prompt(A, [5])])
            assert [r.token for r in await b.results()] == [5]

    asyncio.run(main())


def test_idle_sessions_expire() -> None:
    async def main() -> None:
        async with bench() as b:
            b.cache.lease_s = -1.0
            b.engine.open(A, 16)
            assert b.engine.expire() == [A]
            assert b.engine.free_tokens == 64 * 16

    asyncio.run(main())


def test_calls_run_on_the_device_thread_between_batches() -> None:
    async def main() -> None:
        async with bench() as b:
            name = b.engine.between(lambda: threading.current_thread().name)
            assert await asyncio.wrap_future(name) == "hexswarm-device"
            with pytest.raises(ZeroDivisionError):
                await asyncio.wrap_future(b.engine.between(lambda: 1 // 0))
            assert b.engine.alive
        assert b.engine.between(lambda: 1).cancelled()
        assert not b.engine.alive

    asyncio.run(main())


def test_after_stop_steps_are_answered_with_an_error() -> None:
    async def main() -> None:
        b = Bench()
        b.engine.start()
        b.engine.open(A, 16)
        assert b.engine.stop(5.0)
        b.engine.submit([prompt(A, [1])])
        assert "shutting down" in str((await b.results())[0].error)

    asyncio.run(main())


def test_stop_is_bounded_even_if_the_runner_hangs() -> None:
    async def main() -> None:
        b = Bench()
        b.engine.start()
        entered, release = threading.Event(), threading.Event()

        def hang(batch: Batch) -> None:
            entered.set()
            release.wait(10)

        b.runner.before = hang
        b.engine.open(A, 16)
        b.engine.submit([prompt(A, [1])])
        await asyncio.to_thread(entered.wait, 5)
        assert not b.engine.stop(0.05)
        release.set()
        assert b.engine.stop(5.0)

    asyncio.run(main())


def test_results_after_the_loop_ended_are_dropped() -> None:
    b = Bench()
    release, done = threading.Event(), threading.Event()
    b.runner.before = lambda batch: release.wait(5) and None

    async def main() -> None:
        b.engine.start()
        b.engine.open(A, 16)
        b.engine.submit([prompt(A, [1])])

    asyncio.run(main())
    release.set()
    b.engine.between(done.set)
    assert done.wait(5), "the device thread outlived the delivery"
    assert b.engine.stop(5.0)


def test_many_sessions_give_right_tokens_under_concurrency() -> None:
    """Sessions that open, decode and close at once, on reused blocks, see only their own KV."""

    async def main() -> None:
        async with bench(blocks=12, head=True, chunk_tokens=32) as b:
            waiters: dict[bytes, asyncio.Future[int]] = {}
            freed = asyncio.Event()

            async def pump() -> None:
                while True:
                    for result in await b.deliveries.get():
                        assert result.error is None
                        if result.token is not None:
                            waiters.pop(result.row.session).set_result(result.token)

            async def step(key: bytes, step: Step) -> int:
                waiters[key] = asyncio.get_running_loop().create_future()
                b.engine.submit([step])
                return await waiters[key]

            async def session(number: int) -> None:
                key, values = number.to_bytes(16, "big"), [number] * (20 + number)
                while True:
                    try:
                        b.engine.open(key, len(values) + 10)
                        break
                    except KvFull:  # waiting, not spinning: that would starve the device thread
                        freed.clear()
                        await freed.wait()
                assert await step(key, prompt(key, values)) == sum(values)
                for i in range(10):
                    token = await step(key, decode(key, len(values) + i, i))
                    assert token == sum(values) + sum(range(i + 1))
                b.engine.close(key)
                freed.set()

            pumping = asyncio.create_task(pump())
            async with asyncio.timeout(20), asyncio.TaskGroup() as group:
                for number in range(30):
                    group.create_task(session(number))
            pumping.cancel()
            assert b.engine.free_tokens == 12 * 16

    asyncio.run(main())


def test_waking_is_fast() -> None:
    """Median of submit -> run; 0.3 ms on an idle machine, here with room for a busy one."""

    async def main() -> None:
        async with bench() as b:
            b.engine.open(A, 512)
            delays = []
            for i in range(200):
                submitted_s = time.perf_counter()
                b.engine.submit([decode(A, i, 1)])
                await b.results()
                delays.append(b.runner.started_s[-1] - submitted_s)
            median_s = sorted(delays)[len(delays) // 2]
            assert median_s < 0.003, f"{median_s * 1e3:.3f} ms"

    asyncio.run(main())
