"""How fast is this machine at its own span: measured at start, in a second or two, and cached.

The probe drives the real runner, not a model of it: single-token steps (decode) and one chunk
(prefill) in a scratch session. Seconds per layer are what the router wants (a session may use less
than the whole span), so the LM head's share is measured apart: a step that samples minus one that
does not; and so is what a further row adds to a decode batch: two rows minus one. The figure is
cached by everything that determines it; a peer restarted with the same span announces at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from hexswarm.errors import UnsupportedModel
from hexswarm.peer.leases import blocks_of
from hexswarm.peer.steps import Activations, Batch, Result, Row, TailPolicy
from hexswarm.peer.steptime import CHUNK_TOKENS
from hexswarm.records import Sampling, Span, Speed

SHORT_TOKENS = 16
STEPS = 6
REPEATS = 8
MOST_EFFICIENT = 1024
WORDS = 16
"""Token ids that every vocabulary has."""
BLOCKS = blocks_of(CHUNK_TOKENS + STEPS + 1)
"""Of the scratch session: a pool has as many, however few may be leased."""
VERSION = 4
"""Of the cached figures: raised when something else is measured, or otherwise."""


@dataclass(frozen=True, slots=True)
class Measured:
    """A peer's speed, and how long a prompt piece should be to use it."""

    speed: Speed
    efficient_tokens: int
    """Tokens whose arithmetic takes as long as the fixed cost of a piece."""


def measure(
    run: Callable[[Batch], Iterable[Result]], span: Span, layers: int, hidden: int, dtype: str
) -> Measured:
    """Seconds per token and layer of `run`, which must accept rows on the first `BLOCKS` blocks.

    Raises UnsupportedModel if a row is refused: that takes no time, and is no speed.
    """
    rows = _Rows(span, layers, hidden, dtype)

    def timed(*batch: Row) -> float:
        began = time.perf_counter()
        results = run(Batch(batch))
        took_s = time.perf_counter() - began
        _check(results)
        return took_s

    def one(position: int, count: int, sample: bool = False) -> float:
        return timed(rows.row(b"probe", position, count, sample))

    def pair(position: int) -> float:
        """Two decode rows; they may share blocks, since nobody reads what they compute."""
        other = rows.row(b"other", position + 1, 1, False)
        return timed(rows.row(b"probe", position, 1, False), other)

    one(0, CHUNK_TOKENS, sample=True)  # warm-up
    pair(CHUNK_TOKENS)
    # By turns, and the least of each: other peers may be starting on the same machine, and what
    # is wanted is the machine's own speed. Load is announced apart, as queue delay.
    rounds = [
        (
            one(0, SHORT_TOKENS),
            one(0, CHUNK_TOKENS),
            one(CHUNK_TOKENS + n % STEPS, 1),
            one(CHUNK_TOKENS + n % STEPS, 1, sample=True),
            pair(CHUNK_TOKENS + n % STEPS),
        )
        for n in range(REPEATS)
    ]
    short, prefill, decode, full, both = (min(times) for times in zip(*rounds, strict=True))
    head_s = max(0.0, full - decode) if span.end == layers else 0.0
    speed = Speed(
        decode_layer_s=decode / len(span),
        prefill_layer_s=prefill / CHUNK_TOKENS / len(span),
        head_s=head_s,
        row_layer_s=max(0.0, both - decode) / len(span),
    )
    return Measured(speed, _efficient_tokens(short, prefill))


def rehearse(
    run: Callable[[Batch], Iterable[Result]], span: Span, layers: int, hidden: int, dtype: str
) -> None:
    """Run each kind of piece once that sessions bring, on the first `BLOCKS` blocks.

    On a GPU what has not been met is compiled, or loaded, when it comes: seconds, which would else
    fall into somebody's answer, and most likely into one that has just lost another peer. Raises
    UnsupportedModel.
    """
    rows, half = _Rows(span, layers, hidden, dtype), CHUNK_TOKENS // 2
    drawn = TailPolicy(Sampling(temperature=0.7, top_k=20, top_p=0.9))
    for batch in (
        [rows.row(b"probe", 0, CHUNK_TOKENS, True)],
        [rows.row(b"probe", half, half, True)],
        [rows.row(b"probe", half, SHORT_TOKENS // 2 + 1, True)],
        [rows.row(b"probe", 0, half, True), rows.row(b"other", half, half, True)],
        [rows.row(b"probe", half, 1, True), rows.row(b"other", 0, half, False)],
        [replace(rows.row(b"probe", half, 1, True), policy=drawn if rows.tail else None)],
    ):
        _check(run(Batch(tuple(batch))))


def _check(results: Iterable[Result]) -> None:
    for result in results:
        if result.error is not None:
            raise UnsupportedModel(
                f"this machine fails at its own layers: {result.error}",
                remedy="try `--device cpu`, or another model",
            )


def again(
    run: Callable[[Batch], Iterable[Result]], span: Span, layers: int, hidden: int, dtype: str
) -> float:
    """Seconds of a single decode step, now; only while no session has KV in the pool."""
    row = _Rows(span, layers, hidden, dtype).row(b"probe", CHUNK_TOKENS, 1, False)
    began = time.perf_counter()
    results = run(Batch((row,)))
    took_s = time.perf_counter() - began
    _check(results)
    return took_s


def try_threads(
    run: Callable[[Batch], Iterable[Result]],
    resize: Callable[[int], None],
    span: Span,
    layers: int,
    hidden: int,
    dtype: str,
) -> Callable[[int], float]:
    """Times a decode step with so many threads; only before sessions have KV in the pool."""

    def timed(count: int) -> float:
        resize(count)
        again(run, span, layers, hidden, dtype)  # threads start, and sleep again
        return again(run, span, layers, hidden, dtype)

    return timed


class _Rows:
    """Rows of a made-up session for one span."""

    def __init__(self, span: Span, layers: int, hidden: int, dtype: str) -> None:
        self._head, self.tail = span.first == 0, span.end == layers
        self._blocks = tuple(range(BLOCKS))
        self._hidden, self._dtype = hidden, dtype

    def row(self, session: bytes, position: int, count: int, sample: bool) -> Row:
        data = _noise(count * self._hidden, self._dtype)
        return Row(
            session=session.ljust(16, b"\0"),
            position=position,
            count=count,
            payload=[n % WORDS for n in range(count)]
            if self._head
            else Activations(data, self._dtype),
            sample=sample and self.tail,
            blocks=self._blocks,
            policy=TailPolicy(Sampling()) if self.tail else None,
        )


@cache
def _noise(count: int, dtype: str) -> bytes:
    """Activations as a model might have them; of equal tokens a mixture would ask few experts."""
    values = np.random.default_rng(0).standard_normal(count, np.float32)
    if dtype == "bfloat16":
        return (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    return values.astype(dtype).tobytes()


def _efficient_tokens(short_s: float, long_s: float) -> int:
    """Fixed cost over cost per token, of the line through two pieces."""
    token_s = max((long_s - short_s) / (CHUNK_TOKENS - SHORT_TOKENS), 1e-9)
    fixed_s = max(short_s - SHORT_TOKENS * token_s, 0.0)
    return min(max(round(fixed_s / token_s), SHORT_TOKENS), MOST_EFFICIENT)


def cached(path: Path, parts: tuple[object, ...], probe: Callable[[], Measured]) -> Measured:
    """What is stored in `path` for `parts`, or a fresh measurement, stored."""
    key = hashlib.sha256(repr((VERSION, *parts)).encode()).hexdigest()[:32]
    with contextlib.suppress(KeyError, TypeError, ValueError):
        *times, efficient = _stored(path)[key]
        decode, prefill, head, row = map(float, times)
        return Measured(Speed(decode, prefill, head, row), int(efficient))
    found = probe()
    speed = found.speed
    times = [speed.decode_layer_s, speed.prefill_layer_s, speed.head_s, speed.row_layer_s]
    # Read again: other peers of this machine may have measured meanwhile.
    entries = {**_stored(path), key: [*times, found.efficient_tokens]}
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f"{path.name}.{os.getpid()}")
        draft.write_text(json.dumps(entries))
        draft.replace(path)
    return found


def _stored(path: Path) -> dict[str, Any]:
    """The entries on disk; an unreadable file counts as empty."""
    with contextlib.suppress(OSError, ValueError):
        entries = json.loads(path.read_text())
        if isinstance(entries, dict):
            return entries
    return {}
