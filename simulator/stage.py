"""One unit that serves: its queue, its KV, its step times, its load.

The accounting is what a peer runs (`hexswarm.peer`): `Scheduler` or, for systems without chunks,
`WholePrompts`; `BlockTables`; `LoadMeter`; `Promises`; `StepTime`. What is missing of a peer is
the network and the device: messages come as items, and a batch takes what `speeds` says.

A stage that died is replaced by a new one when the machine is back: KV, queue and figures are
gone with it, and a batch that was running ends nowhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from hexswarm.peer.cache import BLOCK_TOKENS, BlockTables
from hexswarm.peer.load import LoadMeter
from hexswarm.peer.promises import Breach, Promises
from hexswarm.peer.scheduler import Scheduler, Wait
from hexswarm.peer.steps import Batch, SessionKey, Step
from hexswarm.peer.steptime import StepTime
from hexswarm.records import Load, Span
from hexswarm.router.placement.cluster import Model
from hexswarm.router.placement.plan import Unit
from hexswarm.simulator import speeds
from hexswarm.simulator.policy import Computed, Execution
from hexswarm.simulator.records import Settings
from hexswarm.simulator.whole import WholePrompts

_NO_LEASE_ENDS_S = 1e12
"""The world ends sessions itself, so none is forgotten."""


class Queue(Protocol):
    """What composes batches."""

    times: StepTime

    def __len__(self) -> int: ...
    def submit(self, step: Step, now: float) -> None: ...
    def pick(self, now: float) -> Batch | Wait | None: ...
    def finished(self, batch: Batch, now: float, elapsed_s: float | None) -> None: ...
    def drop(self, session: SessionKey) -> int | None: ...
    def prompts_s(self) -> float: ...


@dataclass(slots=True)
class Tally:
    """What a unit did, in all its lives."""

    batches: int = 0
    rows: int = 0
    """Of decoding."""
    prompt_tokens: int = 0
    kv_peak: float = 0.0
    """Most of the KV that was leased at once, as a share."""


class Stage:
    """A unit while it lives."""

    def __init__(
        self,
        number: int,
        unit: Unit,
        span: Span,
        model: Model,
        execution: Execution,
        settings: Settings,
        tally: Tally,
        now: float,
    ) -> None:
        self.number, self.unit, self.span = number, unit, span
        self.node = unit.node
        self.speed = speeds.speed(unit.profile)
        self.batch_s = speeds.BatchTime(unit.profile, span)
        tokens = int(settings.kv_share * unit.profile.kv_tokens[len(span)])
        self.tables = BlockTables(max(1, tokens // BLOCK_TOKENS), lease_s=_NO_LEASE_ENDS_S)
        self.meter = LoadMeter(now)
        self.promises = Promises(model.layers)
        self.queue = _queue(unit, span, model, execution, settings)
        self.alive = True
        self.running: Batch | None = None
        self.started_s = 0.0
        self.wake_s: float | None = None
        """When the queue is asked again, if it asked for that."""
        self.awake_s = 0.0
        """Seconds that it computed, up to the last batch that ended."""
        self.tally = tally

    # --- sessions ------------------------------------------------------------------------------

    def judge(
        self, session: SessionKey, tokens: int, layers: int, tail: bool, step_s: float, now: float
    ) -> str | Breach | None:
        """Why the session is not let in; None: it may come."""
        if self.tables.free_tokens < -(-tokens // BLOCK_TOKENS) * BLOCK_TOKENS:
            return "full"
        if not step_s and not self.promises:
            return None
        load = self.load(now, prompts=False)
        return self.promises.judge(session, layers, tail, step_s, self.speed, load, now)

    def open(
        self, session: SessionKey, tokens: int, layers: int, tail: bool, step_s: float, now: float
    ) -> None:
        """Lease KV and promise the step time, which `judge` found possible."""
        self.tables.lease(session, tokens, now)
        self.promises.hold(session, layers, tail, step_s, now)
        used = 1 - self.tables.free_blocks / self.tables.total_blocks
        self.tally.kv_peak = max(self.tally.kv_peak, used)

    def close(self, session: SessionKey, now: float) -> None:
        """The session is over here, if it ever was."""
        self.queue.drop(session)
        self.promises.release(session)
        self.tables.release(session, now)

    def cancel(self, session: SessionKey) -> None:
        """Forget what waits of a session whose route changes; its KV stays."""
        waits = self.queue.drop(session)
        if waits is not None:
            self.tables.rewind(session, waits)

    def load(self, now: float, *, prompts: bool = True) -> Load:
        """As `hexswarm.peer.engine` tells it."""
        prompts_s = self.queue.prompts_s() if prompts else 0.0
        return self.meter.load(now, prompts_s, self.tables.free_tokens)

    def foreseen(self, session: SessionKey, layers: int, now: float) -> Load:
        """The load with the rows that are about to come, as it is told with a grant or refusal."""
        load = self.load(now)
        return self.promises.foreseen(self.speed, load, layers, now, without=session)

    # --- batches -------------------------------------------------------------------------------

    def submit(
        self,
        session: SessionKey,
        position: int,
        count: int,
        last: bool,
        span: Span | None,
        epoch: int,
        now: float,
    ) -> None:
        """A step arrived."""
        self.tables.write(session, position, count, now)
        step = Step(session, position, count, None, last, now, span=span, epoch=epoch)
        self.queue.submit(step, now)

    def begin(self, now: float) -> float | None:
        """Start the next batch and say when it ends; None: nothing to start now."""
        picked = self.queue.pick(now)
        if not isinstance(picked, Batch):
            self.wake_s = None if picked is None else picked.until
            return None
        self.wake_s = None
        self.running, self.started_s = picked, now
        return now + self.batch_s(picked.rows)

    def finish(self, now: float) -> tuple[Batch, Computed]:
        """The running batch ended: it, and what to say of it."""
        batch, elapsed_s = self.running, now - self.started_s
        assert batch is not None, "a batch ends that never began"
        self.running = None
        self.queue.finished(batch, now, elapsed_s)
        waits_s = [self.started_s - row.ready_s for row in batch.rows if row.decode]
        decodes, tokens = len(waits_s), batch.tokens - len(waits_s)
        marginal_s = self.queue.times.marginal(decodes, tokens)
        self.meter.computed(self.started_s, now, waits_s, marginal_s)
        self.awake_s += elapsed_s
        self.tally.batches += 1
        self.tally.rows += decodes
        self.tally.prompt_tokens += tokens
        return batch, Computed(self.number, decodes, tokens, elapsed_s, len(self.queue))

    def busy_s(self, now: float) -> float:
        """Seconds that it computed so far, the running batch included."""
        return self.awake_s + (now - self.started_s if self.running is not None else 0.0)


def _queue(
    unit: Unit, span: Span, model: Model, execution: Execution, settings: Settings
) -> Scheduler | WholePrompts:
    profile = unit.profile
    times = StepTime.probed(speeds.speed(profile), len(span))
    if execution.chunked:
        usual = speeds.scheduling(profile, model, span)
        return Scheduler(settings.scheduling(usual), times=times)
    most = profile.most_rows[len(span)] if profile.most_rows else 0
    return WholePrompts(times, most_prompts=profile.most_prompts, most_rows=most)
