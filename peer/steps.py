"""The unit of work at a stage, as records: a step arrives, becomes a batch row, gives a result.

A *step* is what one message asks of this stage for one session: a decode token or a piece of a
prompt. The scheduler may cut a long prompt step into several rows (chunked prefill); a decode step
is always one row. Records carry payloads as opaque values, so that scheduler and cache accounting
stay free of torch and run unchanged in the simulator.
"""

from __future__ import annotations

import array
import sys
from dataclasses import dataclass, field
from typing import Any

from hexswarm.records import Sampling, Span

SessionKey = bytes
"""128 random bits chosen by the client."""


def ids_of(payload: bytes) -> list[int]:
    """Little-endian uint32 token ids."""
    ids = array.array("I", payload)
    if sys.byteorder == "big":
        ids.byteswap()
    return ids.tolist()


@dataclass(frozen=True, slots=True)
class Step:
    """`count` consecutive tokens of one session from absolute `position` on."""

    session: SessionKey
    position: int
    count: int
    payload: Any
    """At the head `list[int]` token ids, later `Activations`."""
    last: bool
    """True for the end of a prompt and for decode steps: the tail chooses a token after it."""
    arrived_s: float
    turn: int = 0
    siblings: int = 0
    """So many further steps of the same upstream batch follow at once (see scheduler)."""
    span: Span | None = None
    """The layers that this session uses here (partial entry); None for all that the peer holds."""
    policy: TailPolicy | None = None
    """At the tail: how to end a sampled step; None elsewhere."""
    epoch: int = 0
    """Of the route for which it came; what an abandoned one left behind is told apart by it."""

    @property
    def decode(self) -> bool:
        return self.count == 1 and self.last and self.position > 0

    def whole(self) -> Row:
        """As the row that it would be by itself: for a result that needs no batch."""
        return Row(
            session=self.session,
            position=self.position,
            count=self.count,
            payload=None,
            sample=self.last,
            blocks=(),
            turn=self.turn,
            span=self.span,
            epoch=self.epoch,
        )


@dataclass(frozen=True, slots=True)
class Activations:
    """Hidden states as they came off the wire: `count` x hidden elements of `dtype`, row-major."""

    data: bytes | memoryview
    dtype: str


@dataclass(frozen=True, slots=True)
class Row:
    """A step, or a piece of it, inside a batch."""

    session: SessionKey
    position: int
    count: int
    payload: Any
    sample: bool
    """The last token of this row ends the prompt or is a decode step."""
    blocks: tuple[int, ...]
    """Block table of the session; covers at least `position + count` tokens."""
    turn: int = 0
    span: Span | None = None
    """The layers that this session uses here (partial entry); None for all that the peer holds."""
    policy: TailPolicy | None = None
    """At the tail: how to end a sampled step; None elsewhere."""
    ready_s: float = 0.0
    """When it could first have been computed: it had arrived, and what its session asked for
    before was done."""
    epoch: int = 0

    @property
    def decode(self) -> bool:
        return self.count == 1 and self.sample and self.position > 0


@dataclass(frozen=True, slots=True)
class Batch:
    rows: tuple[Row, ...]

    @property
    def tokens(self) -> int:
        return sum(row.count for row in self.rows)


@dataclass(frozen=True, slots=True)
class Result:
    """What a row gave: activations for the next stage, or (at the tail) a token or logits."""

    row: Row
    activations: Activations | None = None
    token: int | None = None
    logits: bytes | None = None
    """Little-endian float32, one per word of the vocabulary (client loop)."""
    error: str | None = None
    """Why this row, and only this row, failed; the session ends."""
    wait_s: float = 0.0
    """From `Row.ready_s` to the start of its batch."""
    compute_s: float = 0.0
    """Of its batch, all of it: what the row waited for."""
    batch_rows: int = 1
    """Rows in its batch, itself included."""

    def timed(self, started_s: float, compute_s: float, batch_rows: int) -> Result:
        """The same, with the times of its batch (by hand: `replace` takes half as long again)."""
        row = self.row
        return Result(
            *(row, self.activations, self.token, self.logits, self.error),
            *(max(0.0, started_s - row.ready_s), compute_s, batch_rows),
        )


@dataclass(frozen=True, slots=True)
class TailPolicy:
    """How the tail ends a step of one session: choose a token, or hand the logits to the client."""

    sampling: Sampling
    history: list[int] = field(default_factory=list)
    """Token ids so far, prompt and answer; the stage appends, the repetition penalty reads."""
    logits: bool = False
    """Give logits instead of a token (client loop)."""
