"""What a leader may tell a member of its group: checked before anything is done with it; pure.

A member accepted an invitation: a span, a model, so many tokens of KV. Commands (their fields are
in `hexswarm.peer.following`) come from another machine, and a block beyond the pool or an absurd
pool would take the member's process down, or, on a GPU, read where nobody looks for an index out of
range. So a command that steps out of what was accepted ends the epoch, with the leader to blame.
What the numbers mean is not judged: inside a stage members trust each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hexswarm.errors import RemoteProtocolError
from hexswarm.records import Span

MOST_TOKENS = 1 << 20
"""Of one batch."""
MOST_BUCKETS, MOST_ROWS = 64, 1024
"""Batch sizes to warm up for."""
BLOCK_TOKENS = (1, 1024)
"""Least and most tokens of a block of KV."""


class Checks:
    """For one epoch; knows the pool once the leader has asked for it."""

    def __init__(self, span: Span, vocabulary: int, kv_tokens: int) -> None:
        self._span, self._vocabulary, self._kv_tokens = span, vocabulary, kv_tokens
        self._blocks = self._block_size = 0

    def check(self, command: Any) -> None:
        """Raises RemoteProtocolError for what nobody accepted."""
        _require(isinstance(command, list) and bool(command), "a command is a list")
        kind, *given = command
        match kind, given:
            case "pool", [blocks, block_size]:
                self._pool(blocks, block_size)
            case "warm", [list() as buckets]:
                _require(len(buckets) <= MOST_BUCKETS, "too many batch sizes")
                _require(all(_within(one, 1, MOST_ROWS + 1) for one in buckets), "no batch size")
            case "clear", [list() as blocks]:
                self._check_blocks(blocks)
            case "embed", [list() as ids]:
                _require(len(ids) <= MOST_TOKENS, "too many tokens")
                _require(all(_within(one, 0, self._vocabulary) for one in ids), "no such token")
            case "forward", [list() as extents, first, end, rows]:
                self._forward(extents, first, end, rows)
            case "head", [rows]:
                _require(rows is None or _within(rows, 0, MOST_TOKENS), "rows out of range")
            case _:
                raise RemoteProtocolError(f"no such command: {str(kind)[:20]!r}")

    def _pool(self, blocks: Any, block_size: Any) -> None:
        low, high = BLOCK_TOKENS
        _require(_within(block_size, low, high + 1), "blocks of an unusual size")
        most = -(-self._kv_tokens // block_size)
        _require(_within(blocks, 1, most + 1), "a pool larger than was agreed")
        self._blocks, self._block_size = blocks, block_size

    def _forward(self, extents: list[Any], first: Any, end: Any, rows: Any) -> None:
        span, layers = self._span, (first, end)
        _require(all(_within(one, 0, span.end + 1) for one in layers), "no layers of this span")
        _require(span.first <= first < end <= span.end, "layers outside of the span")
        tokens = sum(self._extent(one) for one in extents)
        _require(0 < tokens <= MOST_TOKENS, "a batch of no tokens, or of too many")
        _require(rows is None or (type(rows) is int and rows == tokens), "rows of another batch")

    def _extent(self, extent: Any) -> int:
        """Its tokens."""
        _require(isinstance(extent, list) and len(extent) == 4, "a malformed extent")
        position, count, blocks, block_size = extent
        _require(block_size == self._block_size > 0, "blocks of another pool")
        room = self._blocks * self._block_size
        _require(_within(count, 1, room + 1) and _within(position, 0, room), "beyond the pool")
        _require(isinstance(blocks, list), "a malformed extent")
        _require(len(blocks) == -(-(position + count) // block_size), "blocks too few or too many")
        self._check_blocks(blocks)
        tokens: int = count
        return tokens

    def _check_blocks(self, blocks: Sequence[Any]) -> None:
        _require(all(_within(one, 0, self._blocks) for one in blocks), "no such block")


def _within(value: Any, low: int, end: int) -> bool:
    """An integer in [low, end)."""
    return type(value) is int and low <= value < end


def _require(right: bool, what: str) -> None:
    if not right:
        raise RemoteProtocolError(f"a leader's command: {what}")
