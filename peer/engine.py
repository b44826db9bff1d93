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

Failures. A step that leaves a gap, exceeds its lease, or belongs to no session gives a
`Result.error` for its session only. If the runner raises (out of memory included), one line is
logged (with the way to where it was raised once per kind; an exception's own words may quote what
somebody wrote, and are for those who debug), the rows of that batch are tried once more, each by
itself, so that what one session brought takes no other along, and those that raise again fail.
Nothing is tried a third time, and the thread lives on: a volunteer who starts a game must not lose
the peer.
A row that fails after its session was taken back behind it (a new turn, another route) is nobody's
concern: what has been submitted since then stays.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from hexswarm.clock import Clock
from hexswarm.errors import HexswarmError, RemoteProtocolError, SessionClosed
from hexswarm.peer.cache import BLOCK_TOKENS, BlockTables, Lease
from hexswarm.peer.gauges import BatchGauges, EngineGauges
from hexswarm.peer.load import LoadMeter
from hexswarm.peer.pace import Pace
from hexswarm.peer.scheduler import Scheduler
from hexswarm.peer.steps import Batch, Result, Row, SessionKey, Step
from hexswarm.records import Load, Speed

log = logging.getLogger(__name__)

T = TypeVar("T")

Deliver = Callable[[list[Result]], None]


class Runner(Protocol):
    """What computes batches; called by the device thread only."""

    def run(self, batch: Batch) -> Sequence[Result]:
        """One result per row, in the order of the rows."""


@dataclass(frozen=True, slots=True)
class Counters:
    """What the device did since the engine started; differences of two give rates."""

    batches: int = 0
    rows: int = 0
    tokens: int = 0
    crashes: int = 0
    busy_s: float = 0.0


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
        self._crash_kinds: set[type[Exception]] = set()
        self._failure = ""
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

    def open(self, session: SessionKey, tokens: int) -> Lease:
        """Lease KV for a new session or raise KvFull."""
        with self._wake:
            return self._cache.lease(session, tokens, self._clock.monotonic())

    def extend(self, session: SessionKey, tokens: int) -> Lease:
        """Make the session's lease `tokens` long in all, or raise KvFull or SessionClosed."""
        with self._wake:
            return self._cache.extend(session, tokens, self._clock.monotonic())

    def close(self, session: SessionKey) -> bool:
        """End a session: its KV is free, its steps vanish; False if it was not open."""
        with self._wake:
            self._scheduler.drop(session)
            return self._cache.release(session, self._clock.monotonic())

    def cancel(self, session: SessionKey, position: int | None = None) -> None:
        """Forget the steps of a session that wait; its lease and what was computed stay.

        The cached length is taken back to what was computed, or is being computed: a later step
        above it would attend to what an earlier session left in those blocks. With `position` it
        is taken back at least that far: what is being computed above will be written again, later,
        by the same thread.
        """
        with self._wake:
            waits = self._scheduler.drop(session)
            for known in (waits, position):
                if known is not None:
                    self._cache.rewind(session, known)

    def expire(self) -> list[SessionKey]:
        """Close the sessions that no step renewed for the time of a lease, and name them."""
        with self._wake:
            sessions = self._cache.expire(self._clock.monotonic())
            for session in sessions:
                self._scheduler.drop(session)
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
                queue_s=load.queue_s,
                busy_share=load.busy,
            )

    def speed_now(self) -> Speed | None:
        """The speed to announce, None without a `pace`."""
        with self._wake:
            return None if self._pace is None else self._pace.speed(self._clock.monotonic())

    def submit(self, steps: Iterable[Step]) -> None:
        """Take steps that arrived together; those in error are answered like a computed row."""
        refused = []
        with self._wake:
            now = self._clock.monotonic()
            for step in steps:
                try:
                    self._admit(step, now)
                except HexswarmError as error:
                    refused.append(Result(_whole(step), error=str(error)))
            self._wake.notify()
        if refused:
            self._post(refused)

    def at_rest(self, call: Callable[[Callable[[Batch], Any]], float]) -> Future[None] | None:
        """Time a step with `call`, given what runs batches; None if a session is open.

        A session that opens meanwhile is safe: its first write comes after, on the same thread.
        """
        with self._wake:
            if self._cache.sessions or self._pace is None:
                return None

        def test() -> None:
            elapsed_s = call(self._runner.run)
            with self._wake:
                assert self._pace is not None
                self._pace.rested(elapsed_s, self._clock.monotonic())

        return self.between(test)

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

    def _admit(self, step: Step, now: float) -> None:
        if self._stopping:
            raise SessionClosed("this stage is shutting down")
        lease = self._cache.lease_of(step.session)
        if self._scheduler.pending_tokens(step.session) + step.count > lease.tokens:
            raise RemoteProtocolError("more steps wait than the session can have")
        self._cache.write(step.session, step.position, step.count, now)
        self._scheduler.submit(step, now)

    def _live(self) -> None:
        """The device thread."""
        try:
            while (work := self._next()) is not None:
                if isinstance(work, Batch):
                    self._compute(work)
                else:
                    _resolve(*work)
        finally:
            with self._wake:
                self._stopping = True
                for _, future in self._calls:
                    future.cancel()

    def _next(self) -> Batch | tuple[Callable[[], Any], Future[Any]] | None:
        """Sleep until there is something to do; None to end."""
        with self._wake:
            while not self._stopping:
                if self._ended:
                    return self._erase, Future()
                if self._calls:
                    return self._calls.popleft()
                now = self._clock.monotonic()
                picked = self._scheduler.pick(now)
                if isinstance(picked, Batch):
                    return picked
                self._wake.wait(None if picked is None else max(0.0, picked.until - now))
        return None

    def _erase(self) -> None:
        """Zero what ended sessions left; a device that cannot do that fails at its next batch."""
        with self._wake:
            blocks = self._ended[:]
            self._ended.clear()
        assert self._forget is not None
        self._forget(blocks)

    def _compute(self, batch: Batch) -> None:
        started_s = self._clock.monotonic()
        results = self._attempt(batch)
        crashed = results is None
        if results is None:
            results = self._one_by_one(batch)
        ended_s = self._clock.monotonic()
        with self._wake:
            self._account(batch, results, ended_s, ended_s - started_s, crashed)
            self._scheduler.finished(batch, ended_s, None if crashed else ended_s - started_s)
            if not crashed:
                self._measure(batch, started_s, ended_s)
        took_s, rows = ended_s - started_s, len(results)
        self._post([result.timed(started_s, took_s, rows) for result in results])

    def _attempt(self, batch: Batch) -> list[Result] | None:
        """The results of a batch; None if the runner raised."""
        try:
            results = list(self._runner.run(batch))
            if len(results) != len(batch.rows):
                raise RuntimeError(f"{len(results)} results for {len(batch.rows)} rows")
        except Exception as error:
            self._failure = f"the stage failed to compute ({type(error).__name__})"
            self._log(error, batch)
            return None
        return results

    def _one_by_one(self, batch: Batch) -> list[Result]:
        """Every row by itself, if it was not: one of them may have made the batch fail."""
        results: list[Result] = []
        for row in batch.rows:
            alone = self._attempt(Batch((row,))) if len(batch.rows) > 1 else None
            results += alone or [Result(row, error=self._failure)]
        return results

    def _measure(self, batch: Batch, started_s: float, ended_s: float) -> None:
        """Tell the meters of a batch that was computed."""
        waits_s = [started_s - row.ready_s for row in batch.rows if row.decode]
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
            self._cache.renew(session, now)
            if result.error is not None:
                self._take_back(session, result.row.position)

    def _take_back(self, session: SessionKey, position: int) -> None:
        """A row at `position` was not written after all, nor is what waits behind it."""
        waits = self._scheduler.first(session)
        if waits is None or waits > position:
            self._scheduler.drop(session)
            self._cache.rewind(session, position)

    def _log(self, error: Exception, batch: Batch) -> None:
        new = type(error) not in self._crash_kinds
        self._crash_kinds.add(type(error))
        log.error(
            "a batch of %d rows (%d tokens) failed: %s%s",
            len(batch.rows),
            batch.tokens,
            type(error).__name__,
            _raised_at(error) if new else "",
        )
        log.debug("it said: %r", error)

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


def _raised_at(error: BaseException) -> str:
    """The way to where it was raised, in lines of code: no values, no message."""
    lines = traceback.format_tb(error.__traceback__)
    return "\nTraceback (most recent call last):\n" + "".join(lines).rstrip()


def _whole(step: Step) -> Row:
    """A refused step as the row it would have been."""
    return Row(
        session=step.session,
        position=step.position,
        count=step.count,
        payload=None,
        sample=step.last,
        blocks=(),
        turn=step.turn,
        span=step.span,
        epoch=step.epoch,
    )
