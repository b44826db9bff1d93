"""What the device computes next: continuous batching over single steps, without torch or clocks.

The unit is one *step* of one session at this stage: a decode token or a piece of a prompt. Steps
are served first come, first served, which in a ring is token-level round robin, since a session
cannot ask for token t+1 before token t went all the way round. (FastServe's multi-level queue on
top of that bought at most 7 % mean latency in simulation while memory is free; rejected for now.)

A batch is composed of
1. all decode steps that wait, up to `max_rows`: their sessions stand still at every other stage;
2. pieces of prompts, in order of arrival, as many tokens as fit: beside decodes so many that the
   step is expected to end within `target_step_s` (or, where decodes alone already take longer,
   to double at most), by themselves up to `chunk_tokens`. A long prompt is cut into rows, its rest
   keeps its place. At least 16 tokens always go along, so that no prompt starves.
One session never has two rows in one batch: the second attends to what the first writes.

Cutting also makes the pipeline overlap: stage j computes piece i while stage j-1 computes i+1. How
finely the head cuts a fresh prompt follows from what a piece costs on its device (`_fresh_piece`):
on a CPU a piece of 11 tokens takes nearly as long as one of 43, so short prompts stay whole.

Two things make the device wait although steps are ready. *Siblings*: steps that left the previous
stage in one batch arrive in a burst; the first ones wait for the last, at most `sibling_wait_s`, so
that a convoy is not torn apart by its own delivery. *Gathering*, at the head only: sessions out of
phase are brought into phase once (`hexswarm.peer.gather` has the theory and the bound).

A state machine: `submit`, `pick`, `finished` and `drop` are its events, time is passed in, and
equal histories give equal batches. The owner guards it with a lock (`hexswarm.peer.engine`).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

from hexswarm.errors import UsageError
from hexswarm.peer.gather import Gather
from hexswarm.peer.steps import Activations, Batch, Row, SessionKey, Step
from hexswarm.peer.steptime import StepTime

MIN_PIECE = 16
"""Tokens of a prompt that go along with any batch; also the grain of cuts."""

_PIECES = 8
"""A fresh prompt is cut into so many pieces at the most."""

_PIECE_BYTES = 2 << 20
"""And a piece is never larger than this, whatever the device would like."""


@dataclass(frozen=True, slots=True)
class Policy:
    """What the owner decides; see `Policy.of` for a model's chunk sizes."""

    head: bool = False
    """This is the first stage: cut fresh prompts for overlap, and gather."""
    max_rows: int = 64
    """Most rows of a batch; one of them is kept for a prompt, if one waits."""
    chunk_tokens: int = 128
    """Most prompt tokens of a row, and of a batch without decodes."""
    chunk_floor: int = 32
    """A fresh prompt is not cut finer than this."""
    efficient_tokens: int = 32
    """Prompt tokens whose arithmetic takes as long as what every piece costs anyhow."""
    stages: int = 3
    """Stages of the pipeline, as far as this one can guess."""
    target_step_s: float = 0.05
    sibling_wait_s: float = 0.002
    gather_rows: int = 5
    """At the head: gather batches of up to so many decode rows; 0 switches gathering off."""

    def __post_init__(self) -> None:
        if self.max_rows < 2 or not MIN_PIECE <= self.chunk_floor <= self.chunk_tokens:
            raise UsageError("a batch has 2 rows or more, and 16 <= chunk_floor <= chunk_tokens")
        if self.target_step_s <= 0 or self.sibling_wait_s < 0:
            raise UsageError("target_step_s is positive and sibling_wait_s not negative")

    @classmethod
    def of(
        cls,
        hidden_bytes: int,
        *,
        head: bool,
        efficient_tokens: int = 2 * MIN_PIECE,
        stages: int = 3,
        accelerator: bool = False,
    ) -> Policy:
        """The policy of a stage whose activations have `hidden_bytes` a token.

        `efficient_tokens` is measured at start (`hexswarm.peer.probe`). A row costs an accelerator
        far less of a weight read than it costs a CPU, so there more rows are worth gathering.
        """
        floor, ceiling = chunk_range(hidden_bytes, efficient_tokens)
        return cls(
            head=head,
            chunk_tokens=ceiling,
            chunk_floor=floor,
            efficient_tokens=efficient_tokens,
            stages=max(1, stages),
            gather_rows=32 if accelerator else 5,
        )


def chunk_range(hidden_bytes: int, efficient_tokens: int = MIN_PIECE) -> tuple[int, int]:
    """Least and most tokens of a piece, in whole grains of 16.

    64 KiB and 256 KiB of activations, where the network sets the measure; at most 2 MiB and at
    least `efficient_tokens`, where the device does.
    """
    floor, ceiling = (64 << 10) // hidden_bytes, (256 << 10) // hidden_bytes
    wanted = min(efficient_tokens, _PIECE_BYTES // hidden_bytes)
    return max(MIN_PIECE, _grains(floor)), max(MIN_PIECE, _grains(max(ceiling, wanted)))


@dataclass(frozen=True, slots=True)
class Wait:
    """Steps are ready, but not before `until` unless something is submitted: then ask again."""

    until: float


@dataclass(slots=True)
class _Pending:
    """A step and how much of it has been handed out."""

    order: int
    step: Step
    piece: int
    """Tokens of its largest row."""
    ready_s: float
    done: int = 0


class Scheduler:
    """The steps that wait at one stage.

    `blocks_of` names a session's block table when a row is cut; the simulator needs none.
    """

    def __init__(
        self,
        policy: Policy | None = None,
        blocks_of: Callable[[SessionKey], tuple[int, ...]] = lambda _: (),
        *,
        times: StepTime | None = None,
        gather: Gather | None = None,
    ) -> None:
        self.policy = policy or Policy()
        self.times = times or StepTime()
        self.gather = gather or Gather(rows=self.policy.gather_rows, most_rows=self.policy.max_rows)
        self._gathers = self.policy.head and self.policy.gather_rows > 0
        self._blocks_of = blocks_of
        self._waiting: dict[SessionKey, deque[_Pending]] = {}
        self._flying: set[SessionKey] = set()
        self._order = count()
        self._siblings = 0
        self._burst_until_s: float | None = None

    def __len__(self) -> int:
        """Steps that wait, wholly or in part."""
        return sum(map(len, self._waiting.values()))

    def submit(self, step: Step, now: float) -> None:
        """A step arrived."""
        fresh = self.policy.head and step.position == 0 and not step.decode
        piece = self._fresh_piece(step.count) if fresh else self.policy.chunk_tokens
        queue = self._waiting.setdefault(step.session, deque())
        queue.append(_Pending(next(self._order), step, piece, now))
        if self._gathers and queue[0].step.decode:
            self.gather.arrived(step.session, now)
        self._expect_siblings(step, now)

    def pick(
        self, now: float, aloft: Collection[SessionKey] = (), along: int = 0
    ) -> Batch | Wait | None:
        """The next batch, or until when to wait, or None if nothing waits.

        Nothing of the sessions that are `aloft`, in a batch that is still computed. So many decode
        rows that do not wait here go `along`: then there is nobody to wait for.
        """
        decodes, prompts = self._ready(aloft)
        if not decodes and not prompts:
            return None
        leaving = bool(prompts) or along > 0
        if self._siblings and self._burst_until_s and now < self._burst_until_s and not along:
            return Wait(self._burst_until_s)
        self._siblings, self._burst_until_s = 0, None
        if self._gathers and decodes and (until_s := self._hold(decodes, leaving, now)) is not None:
            return Wait(until_s)
        decodes = decodes[: max(0, self.policy.max_rows - along - bool(prompts))]
        rows = [self._cut(pending, 1) for pending in decodes]
        rows += self._pieces(prompts, len(decodes) + along)
        if not rows:
            return None
        self._flying.update(row.session for row in rows)
        return Batch(tuple(rows))

    def finished(self, batch: Batch, now: float, elapsed_s: float | None) -> None:
        """The device computed `batch` in `elapsed_s`, ending now; None: that tells nothing."""
        if elapsed_s is not None:
            decodes = sum(row.decode for row in batch.rows)
            self.times.observe(decodes, batch.tokens - decodes, elapsed_s)
            if self._gathers:
                self.gather.worked(now, elapsed_s)
        for row in batch.rows:
            if row.session in self._flying and self._gathers and row.sample:
                self.gather.departed(row.session, now)
            self._flying.discard(row.session)
            if behind := self._waiting.get(row.session):
                behind[0].ready_s = now

    def drop(self, session: SessionKey) -> int | None:
        """What the session has waiting vanishes; the position of its first token, if any waited."""
        first = self.first(session)
        self._waiting.pop(session, None)
        self._flying.discard(session)
        self.gather.forget(session)
        return first

    def first(self, session: SessionKey) -> int | None:
        """The lowest position that the session has waiting, if anything waits."""
        waiting = self._waiting.get(session, ())
        return min((p.step.position + p.done for p in waiting), default=None)

    def pending_tokens(self, session: SessionKey) -> int:
        """Tokens of the session that wait."""
        return sum(p.step.count - p.done for p in self._waiting.get(session, ()))

    def prompts_s(self) -> float:
        """Expected seconds of the prompts that wait.

        Decode steps are not counted: they wait for one batch at most, and how long they really
        waited is known (`hexswarm.peer.load`).
        """
        waiting = (pending for queue in self._waiting.values() for pending in queue)
        tokens = sum(p.step.count - p.done for p in waiting if not p.step.decode)
        batches = -(-tokens // self.policy.chunk_tokens)
        return self.times.predict(0, tokens) + max(0, batches - 1) * self.times.read_s

    def _ready(self, aloft: Collection[SessionKey]) -> tuple[list[_Pending], list[_Pending]]:
        """The first pending step of each session: decodes and prompts, by arrival."""
        waiting = self._waiting.items()
        heads = [queue[0] for session, queue in waiting if session not in aloft]
        heads.sort(key=lambda p: p.order)
        decodes = [pending for pending in heads if pending.step.decode]
        return decodes, [pending for pending in heads if not pending.step.decode]

    def _hold(self, decodes: list[_Pending], leaving: bool, now: float) -> float | None:
        """Until when to gather; what is `leaving` anyhow, like prompts, ends a hold."""
        sessions = [pending.step.session for pending in decodes]
        for session in sessions:
            self.gather.arrived(session, now)
        if leaving:
            self.gather.charge(sessions, now)
            return None
        return self.gather.until(sessions, now)

    def _expect_siblings(self, step: Step, now: float) -> None:
        """Count down the burst: each step says how many of its batch are still to come.

        The wait is counted from the first such step since the last batch and never extended.
        """
        self._siblings = max(0, self._siblings - 1, step.siblings)
        if self._siblings and self._burst_until_s is None:
            self._burst_until_s = now + self.policy.sibling_wait_s

    def _pieces(self, prompts: list[_Pending], decodes: int) -> list[Row]:
        """Rows of prompts within the token budget and the rows left."""
        rows: list[Row] = []
        budget = self._budget(decodes)
        for pending in prompts[: self.policy.max_rows - decodes]:
            left = pending.step.count - pending.done
            wanted = pending.piece
            if left <= wanted * 3 // 2:  # no crumbs: a short rest goes along
                wanted = min(left, self.policy.chunk_tokens)
            if wanted > budget:
                wanted = _grains(budget)
            if wanted < 1:
                break
            rows.append(self._cut(pending, wanted))
            budget -= wanted
        return rows

    def _budget(self, decodes: int) -> int:
        """Prompt tokens of a batch beside so many decodes."""
        if not decodes:
            return self.policy.chunk_tokens
        step_s = max(self.policy.target_step_s, 2 * self.times.predict(decodes))
        tokens = self.times.tokens_within(step_s, decodes)
        return min(max(_grains(tokens), MIN_PIECE), self.policy.chunk_tokens)

    def _fresh_piece(self, tokens: int) -> int:
        """Size of the pieces in which a fresh prompt goes down the pipeline.

        k pieces of P tokens pass S stages in (S + k - 1) (a + b P / k) seconds, where a piece costs
        a + b a token; that is least at k = sqrt((S - 1) b P / a), and a / b are the efficient
        tokens. A short prompt therefore stays whole.
        """
        policy = self.policy
        best = math.sqrt((policy.stages - 1) * tokens / policy.efficient_tokens)
        pieces = min(max(round(best), 1), _PIECES)
        piece = _grains(-(-tokens // pieces) + MIN_PIECE - 1)
        return min(max(piece, policy.chunk_floor), policy.chunk_tokens)

    def _cut(self, pending: _Pending, tokens: int) -> Row:
        """Take the next `tokens` tokens of a pending step as a row."""
        step, first = pending.step, pending.done
        pending.done += tokens
        ended = pending.done == step.count
        if ended:
            queue = self._waiting[step.session]
            queue.popleft()
            if not queue:
                del self._waiting[step.session]
        return Row(
            session=step.session,
            position=step.position + first,
            count=tokens,
            payload=slice_payload(step.payload, step.count, first, tokens),
            sample=step.last and ended,
            blocks=self._blocks_of(step.session),
            turn=step.turn,
            span=step.span,
            policy=step.policy,
            ready_s=pending.ready_s,
            epoch=step.epoch,
        )


def slice_payload(payload: Any, count: int, first: int, tokens: int) -> Any:
    """The part of a step's payload that belongs to `tokens` of its `count` tokens."""
    if tokens == count or payload is None:
        return payload
    if isinstance(payload, Activations):
        size = len(payload.data) // count
        data = memoryview(payload.data)[first * size : (first + tokens) * size]
        return replace(payload, data=data)
    return payload[first : first + tokens]


def _grains(tokens: int) -> int:
    """Rounded down to whole grains of 16."""
    return tokens - tokens % MIN_PIECE
