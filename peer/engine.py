"""The step loop: one thread owns the device, asyncio owns the network, one lock lies between.

Launching kernels from one thread makes their order trivial, and keeps a 30 ms step from freezing
the streams of every session. The thread sleeps on a condition (no spinning: a volunteer's machine
is shared), wakes when steps are submitted, asks the scheduler for a batch, runs it without the
lock, and hands all its results to the event loop in a single `call_soon_threadsafe`.

Ownership. Scheduler and block tables are touched under the lock only, by either side, for
microseconds: the event loop opens, extends and closes sessions and submits steps directly, so that
admission is answered in the same call and needs no messages to and fro. The runner and everything
with tensors is touched by the device thread only; `between` runs a function there, between two
batches. Rejected: accounting by the device thread alone (an open would wait for a running step),
and a queue of messages in front of the scheduler (the scheduler *is* the queue; its length is
bounded, since what waits of a session never exceeds what the session leased).

Steps are checked when they are submitted, in order: the cached length then counts accepted steps
as written. That holds because a session's steps run in order, and if one fails, those behind it
vanish and the length is taken back. A closed session's blocks may be leased anew while its last
batch still runs: the newcomer's first write comes after that batch, on the same thread, and after
the blocks were erased there (`forget`).

Two batches may be under way on a GPU, which computes what it was told while the host goes on: the
next one is picked shortly before the last is expected to end, as late as can be, since a batch
costs one reading of the weights whatever is in it, and who comes a moment later should not miss it.
Then the last one's results are handed over while the next one is computed. A session is in one of
them at most, unless its next row could be foreseen (`hexswarm.peer.foresight`). A batch with a
prompt waits until the last one has landed: its many launches would hold those results up.

Failures. A step that leaves a gap, exceeds its lease, or belongs to no session gives a
`Result.error` for its session only. If the runner raises, the rows of that batch are tried once
more, each by itself (`hexswarm.peer.attempts`), and the thread lives on: a volunteer who starts a
game must not lose the peer.
A row that fails after its session was taken back behind it (a new turn, another route) is nobody's
concern: what has been submitted since then stays.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, TypeVar

from hexswarm.clock import Clock
from hexswarm.errors import HexswarmError, RemoteProtocolError, SessionClosed
from hexswarm.peer.attempts import Attempts, Job, Runner
from hexswarm.peer.blocks import Name
from hexswarm.peer.cache import BLOCK_TOKENS, BlockTables
from hexswarm.peer.foresight import Foresight
from hexswarm.peer.gauges import BatchGauges, Counters, EngineGauges
from hexswarm.peer.leases import KvFull, Lease
from hexswarm.peer.load import LoadMeter
from hexswarm.peer.pace import Pace
from hexswarm.peer.scheduler import Scheduler, Wait
from hexswarm.peer.steps import Batch, Result, SessionKey, Step
from hexswarm.records import Load, Speed

log = logging.getLogger(__name__)

T = TypeVar("T")

Deliver = Callable[[list[Result]], None]


SWITCH_S = 0.0005
"""For which the event loop may keep the interpreter to itself while a device is waiting for us;
Python's own 5 ms are half a step. Set once there is such a device."""
LEAST_LEAD_S, MOST_LEAD_S = 0.0005, 0.005
EARLY = 0.9
"""The next batch is picked when this much of the expected time of the last has passed, less what
picking and launching take: a guess that is a little long must not let the device stand still."""


class Engine:
    """Runs the steps submitted to it and delivers their results to the loop that started it."""

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        cache: BlockTables,
        *,
        clock: Clock,
        deliver: Deliver,
        pace: Pace | None = None,
        forget: Callable[[Sequence[int]], None] | None = None,
    ) -> None:
        """`pace`, if given, follows how fast batches really are.

        `forget` erases the blocks of sessions that ended: on the device thread, after the batch
        that may still write there and before any that is picked later.
        """
        self._runner = runner
        self._scheduler = scheduler
        self._cache = cache
        self._clock = clock
        self._deliver = deliver
        self._loop: asyncio.AbstractEventLoop | None = None
        self._wake = threading.Condition(threading.Lock())
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._stopping = False
        self._attempts = Attempts(runner)
        self._foresight = Foresight(cache)
        self._aloft: Job | None = None
        """What the device computes while the host goes on."""
        self._landed_s = 0.0
        self._lead_s = LEAST_LEAD_S
        """What picking and launching took lately."""
        self._forget = forget
        self._ended: list[int] = []
        """Blocks that are to be erased."""
        if forget is not None:
            cache.on_release = self._ended.extend
        self._thread = threading.Thread(target=self._live, name="hexswarm-device", daemon=True)
        self.counters = Counters()
        self._batches = BatchGauges()
        self._pace = pace
        self._meter = LoadMeter(clock.monotonic())

    def start(self) -> None:
        """Start the device thread; results will be delivered in the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def stop(self, timeout_s: float = 10.0) -> bool:
        """End the thread after the batch it computes; False if that took longer than allowed.

        What waits is not computed and not answered: draining first is the server's decision.
        """
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._stopping

    def open(
        self,
        session: SessionKey,
        tokens: int,
        names: Sequence[Name] = (),
        *,
        publish: bool = True,
    ) -> Lease:
        """Lease KV for a new session or raise KvFull; see `BlockTables.lease`."""
        with self._wake:
            now = self._clock.monotonic()
            return self._cache.lease(session, tokens, now, names, publish=publish)

    def extend(self, session: SessionKey, tokens: int) -> Lease:
        """Make the session's lease `tokens` long in all, or raise KvFull or SessionClosed."""
        with self._wake:
            return self._cache.extend(session, tokens, self._clock.monotonic())

    def close(self, session: SessionKey, names: Sequence[Name] = ()) -> bool:
        """End a session: its KV is free, its steps vanish; False if it was not open.

        What was computed may be found by `names` until the room is needed.
        """
        with self._wake:
            self._drop(session)
            return self._cache.release(session, self._clock.monotonic(), names)

    def cancel(self, session: SessionKey, position: int | None = None) -> None:
        """Forget the steps of a session that wait; its lease and what was computed stay.

        The cached length is taken back to what was computed, or is being computed: a later step
        above it would attend to what an earlier session left in those blocks. With `position` it
        is taken back at least that far: what is being computed above will be written again, later,
        by the same thread.
        """
        with self._wake:
            waits = self._drop(session)
            for known in (waits, position):
                if known is not None:
                    self._cache.rewind(session, known)

    def expire(self) -> list[SessionKey]:
        """Close the sessions that no step renewed for the time of a lease, and name them."""
        with self._wake:
            sessions = self._cache.expire(self._clock.monotonic())
            for session in sessions:
                self._drop(session)
            return sessions

    @property
    def free_tokens(self) -> int:
        """Tokens that a new session could lease."""
        with self._wake:
            return self._cache.free_tokens

    def load_now(self, *, prompts: bool = True) -> Load:
        """How busy this peer is: for its announcement, and for whoever asks for a lease.

        Without `prompts` a decode step's wait alone: those go first, whatever prompts wait beside.
        """
        with self._wake:
            now = self._clock.monotonic()
            prompts_s = self._scheduler.prompts_s() if prompts else 0.0
            return self._meter.load(now, prompts_s, self._cache.free_tokens)

    def gauges(self) -> EngineGauges:
        """How the engine is: for whoever watches this peer."""
        with self._wake:
            now, cache, counted = self._clock.monotonic(), self._cache, self.counters
            load = self._meter.load(now, self._scheduler.prompts_s(), cache.free_tokens)
            return EngineGauges(
                batches=self._batches,
                computed_rows=counted.rows,
                computed_tokens=counted.tokens,
                crashes=counted.crashes,
                busy_s=counted.busy_s,
                waiting_steps=len(self._scheduler),
                sessions=len(cache.sessions),
                kv_tokens=cache.total_blocks * BLOCK_TOKENS,
                kv_leased_tokens=(cache.total_blocks - cache.free_blocks) * BLOCK_TOKENS,
                kv_cached_tokens=sum(map(cache.length, cache.sessions)),
                kv_kept_tokens=cache.kept_blocks * BLOCK_TOKENS,
                prefixes=cache.prefixes,
                queue_s=load.queue_s,
                busy_share=load.busy,
            )

    def speed_now(self) -> Speed | None:
        """The speed to announce, None without a `pace`."""
        with self._wake:
            return None if self._pace is None else self._pace.speed(self._clock.monotonic())

    def submit(self, steps: Iterable[Step]) -> None:
        """Take steps that arrived together; those in error are answered like a computed row."""
        known = []
        with self._wake:
            now = self._clock.monotonic()
            for step in steps:
                try:
                    if result := self._admit(step, now):
                        known.append(result)
                except HexswarmError as error:
                    known.append(Result(step.whole(), error=str(error)))
            self._wake.notify()
        if known:
            self._post(known)

    def at_rest(self, call: Callable[[Callable[[Batch], Any]], float]) -> Future[None] | None:
        """Time a step with `call`, given what runs batches; None if a session is open.

        It gets blocks of its own, since those that it names may keep what a session left.
        """
        with self._wake:
            if self._cache.sessions or self._pace is None:
                return None

        def test() -> None:
            try:
                elapsed_s = call(self._run_aside)
            except KvFull:
                return  # sessions came that need all
            with self._wake:
                assert self._pace is not None
                self._pace.rested(elapsed_s, self._clock.monotonic())

        return self.between(test)

    def _run_aside(self, batch: Batch) -> Sequence[Result]:
        """Run a batch of one row on borrowed blocks."""
        (row,) = batch.rows
        with self._wake:
            blocks = self._cache.borrow(len(row.blocks), self._clock.monotonic())
        try:
            return self._runner.run(Batch((replace(row, blocks=blocks),)))
        finally:
            with self._wake:
                self._cache.give_back(blocks, self._clock.monotonic())

    def between(self, call: Callable[[], T]) -> Future[T]:
        """Run `call` on the device thread between two batches (warm-up, per-session state)."""
        future: Future[T] = Future()
        with self._wake:
            if self._stopping:
                future.cancel()
            else:
                self._calls.append((call, future))
                self._wake.notify()
        return future

    def _drop(self, session: SessionKey) -> int | None:
        """As the scheduler's; and nothing of the session is foreseen any more."""
        self._foresight.forget(session)
        return self._scheduler.drop(session)

    def _admit(self, step: Step, now: float) -> Result | None:
        """Take a step; its result, if that is here already."""
        if self._stopping:
            raise SessionClosed("this stage is shutting down")
        lease = self._cache.lease_of(step.session)
        if self._scheduler.pending_tokens(step.session) + step.count > lease.tokens:
            raise RemoteProtocolError("more steps wait than the session can have")
        self._cache.write(step.session, step.position, step.count, now)
        ahead = self._foresight.claim(step)
        if ahead is None:
            self._scheduler.submit(step, now)
        elif ahead.result is not None:
            self._cache.computed(step.session, step.position + 1, now)
            return ahead.result
        return None

    def _live(self) -> None:
        """The device thread."""
        try:
            while (work := self._next()) is not None:
                if not isinstance(work, Job):
                    _resolve(*work)
                elif work.flight is None:
                    self._begin(work)
                else:
                    self._land(work)
            if self._aloft is not None:
                self._land(self._aloft)
        finally:
            with self._wake:
                self._stopping = True
                for _, future in self._calls:
                    future.cancel()

    def _next(self) -> Job | tuple[Callable[[], Any], Future[Any]] | None:
        """Sleep until there is something to do; None to end.

        A job without a flight is to be begun, one with a flight to be waited for.
        """
        with self._wake:
            while not self._stopping:
                if self._ended:
                    return self._erase, Future()
                aloft, now = self._aloft, self._clock.monotonic()
                if self._calls:
                    return aloft or self._calls.popleft()
                if aloft is not None and now < aloft.due_s:
                    self._wake.wait(aloft.due_s - now)
                    continue
                picked = self._pick(now)
                if isinstance(picked, Job):
                    return picked
                if aloft is not None:
                    return aloft
                self._wake.wait(None if picked is None else max(0.0, picked.until - now))
        return None

    def _pick(self, now: float) -> Job | Wait | None:
        """What the scheduler wants, and what follows by itself on the batch under way."""
        aloft, ahead, sessions = self._aloft, [], set[SessionKey]()
        if aloft is not None and aloft.flight is not None:
            sessions = {row.session for row in aloft.batch.rows}
            room = self._scheduler.policy.max_rows - len(self._scheduler)
            ahead = self._foresight.foresee(aloft.batch, aloft.flight.chosen, room)
        picked = self._scheduler.pick(now, sessions, len(ahead))
        rows = tuple(one.row for one in ahead)
        if isinstance(picked, Batch):
            return Job(Batch(rows + picked.rows), ahead)
        return Job(Batch(rows), ahead) if rows else picked

    def _erase(self) -> None:
        """Zero what ended sessions left; a device that cannot do that fails at its next batch."""
        with self._wake:
            blocks = self._ended[:]
            self._ended.clear()
        assert self._forget is not None
        self._forget(blocks)

    def _begin(self, job: Job) -> None:
        """Launch a batch, and then take the results of the one before."""
        last = self._aloft
        if last is not None and not all(row.decode for row in job.batch.rows):
            self._land(last)
            last = None
        launched_s = self._clock.monotonic()
        flight = job.flight = self._attempts.launch(job.batch)
        took_s = min(self._clock.monotonic() - launched_s, MOST_LEAD_S)  # once, graphs are made
        self._lead_s += 0.2 * (took_s - self._lead_s)
        if last is not None:
            self._land(last)
        job.started_s = max(launched_s, self._landed_s)
        if flight is None:
            self._finish(job, None)
        elif not flight.pending:
            self._land(job)
        else:
            decodes = sum(row.decode for row in job.batch.rows)
            takes_s = self._scheduler.times.predict(decodes, job.batch.tokens - decodes)
            job.due_s = job.started_s + EARLY * takes_s - max(1.5 * self._lead_s, LEAST_LEAD_S)
            self._aloft = job
            if sys.getswitchinterval() > SWITCH_S:
                sys.setswitchinterval(SWITCH_S)

    def _land(self, job: Job) -> None:
        """Wait for a batch and hand its results over."""
        assert job.flight is not None
        results = self._attempts.land(job.batch, job.flight)
        if job is self._aloft:
            self._aloft = None
        self._finish(job, results)

    def _finish(self, job: Job, results: list[Result] | None) -> None:
        """Hand over what a batch gave; None if the runner raised."""
        batch, started_s, crashed = job.batch, job.started_s, results is None
        if results is None:
            with self._wake:
                for row in batch.rows:
                    self._foresight.forget(row.session)
            results = self._attempts.one_by_one(batch)
        self._landed_s = ended_s = self._clock.monotonic()
        took_s, rows = ended_s - started_s, len(results)
        results = [result.timed(started_s, took_s, rows) for result in results]
        with self._wake:
            wanted = [
                *(
                    r
                    for r, a in zip(results, job.ahead, strict=False)
                    if self._foresight.computed(a, r)
                ),
                *results[len(job.ahead) :],
            ]
            self._account(batch, wanted, ended_s, took_s, crashed)
            self._scheduler.finished(batch, ended_s, None if crashed else took_s)
            if not crashed:
                self._measure(batch, started_s, ended_s)
            for result in wanted:
                self._foresight.told(result)
        if wanted:
            self._post(wanted)

    def _measure(self, batch: Batch, started_s: float, ended_s: float) -> None:
        """Tell the meters of a batch that was computed."""
        waits_s = [max(0.0, started_s - row.ready_s) for row in batch.rows if row.decode]
        tokens = batch.tokens - len(waits_s)
        marginal_s = self._scheduler.times.marginal(len(waits_s), tokens)
        self._meter.computed(started_s, ended_s, waits_s, marginal_s)
        rows = len(batch.rows)
        self._batches = self._batches.computed(rows, rows - len(waits_s), ended_s - started_s)
        if self._pace is not None:
            self._pace.observe(batch, ended_s - started_s, ended_s)

    def _account(
        self, batch: Batch, results: list[Result], now: float, busy_s: float, crashed: bool
    ) -> None:
        """Count the batch, renew its leases, and take failed sessions' steps back."""
        last = self.counters
        self.counters = Counters(
            last.batches + 1,
            last.rows + len(batch.rows),
            last.tokens + batch.tokens,
            last.crashes + crashed,
            last.busy_s + busy_s,
        )
        for result in results:
            session = result.row.session
            if result.error is None:
                self._cache.computed(session, result.row.position + result.row.count, now)
            else:
                self._cache.renew(session, now)
                self._take_back(session, result.row.position)

    def _take_back(self, session: SessionKey, position: int) -> None:
        """A row at `position` was not written after all, nor is what waits behind it."""
        waits = self._scheduler.first(session)
        if waits is None or waits > position:
            self._drop(session)
            self._cache.rewind(session, position)

    def _post(self, results: list[Result]) -> None:
        assert self._loop is not None, "start() comes before submit()"
        try:
            self._loop.call_soon_threadsafe(self._deliver, results)
        except RuntimeError:
            log.debug("the event loop is closed: %d results dropped", len(results))


def _resolve(call: Callable[[], Any], future: Future[Any]) -> None:
    """Run a call for its future."""
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(call())
    except Exception as error:
        future.set_exception(error)
