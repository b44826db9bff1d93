"""The shape of a ragged batch: which tokens sit where, worked out once and shared by all layers.

A batch is tokens of several sessions laid end to end, `[tokens, hidden]`, without padding. Each
session's keys and values live in *slots* of a paged cache; slot = block * block size + offset. What
attention needs besides the numbers (which slots to read, which keys a query may see) depends on
the batch and on the layer's sliding window, never on the layer itself, so `Ragged.pieces` prepares
it once per distinct window and the layers only pass it on: at decode a layer is a dozen small
operations, and building masks or index tensors inside each would cost as much again.

When a session's blocks follow each other its keys are a plain slice of the cache, a view, and
nothing is gathered. That is the common case: see `hexswarm.peer.cache`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, overload

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Extent:
    """One session's part of a batch: `count` tokens from absolute `position` on."""

    position: int
    count: int
    blocks: tuple[int, ...]
    """Exactly the blocks that hold tokens [0, position + count)."""
    block_size: int

    @property
    def length(self) -> int:
        """Keys visible to the last token."""
        return self.position + self.count

    @property
    def run(self) -> int | None:
        """Slot of token 0 if the session's slots are consecutive."""
        first, count = self.blocks[0], len(self.blocks)
        consecutive = self.blocks == tuple(range(first, first + count))
        return first * self.block_size if consecutive else None

    def slot(self, token: int) -> int:
        return self.blocks[token // self.block_size] * self.block_size + token % self.block_size


@dataclass(frozen=True, slots=True)
class Piece:
    """What attention reads for one session: rows of the batch, slots of the cache, visibility."""

    first: int
    end: int
    """Rows [first, end) of the batch are the queries."""
    keys: slice | Tensor
    """Slots of the keys: a slice (view) or an index tensor (gather)."""
    causal: bool
    """Queries and keys are the same tokens: query i sees keys 0..i."""
    mask: Tensor | None
    """Else, if some query may not see some key: added to the scores, `[queries, keys]`."""


@dataclass(frozen=True, slots=True)
class Ragged:
    """A batch as tensors on the device, beside the host's knowledge of it."""

    extents: tuple[Extent, ...]
    positions: Tensor
    """Absolute position of each token, int64 `[tokens]`."""
    slots: Tensor
    """Where each token's key and value go, int64 `[tokens]`."""

    @property
    def tokens(self) -> int:
        return self.positions.shape[0]

    def pieces(self, window: int | None, dtype: torch.dtype) -> Pieces:
        """Attention's view of the batch for layers with this sliding window (None: no window)."""
        return Pieces(self, window, dtype)

    def part(self, chosen: Sequence[int]) -> tuple[Ragged, Tensor]:
        """The extents with these indices as a batch of their own, and its rows in this one."""
        firsts = [0, *accumulate(extent.count for extent in self.extents)]
        rows = [row for index in chosen for row in range(firsts[index], firsts[index + 1])]
        index = torch.tensor(rows, device=self.positions.device)
        extents = tuple(self.extents[at] for at in chosen)
        return Ragged(extents, self.positions[index], self.slots[index]), index


class Pieces(Sequence[Piece]):
    """The sessions of a batch as attention reads them, made when the first layer asks.

    A backend that reads the batch itself never asks, and no masks are made. What it works out
    instead, once for all layers, it keeps in `plan`.
    """

    __slots__ = ("_dtype", "_made", "batch", "plan", "window")

    def __init__(self, batch: Ragged, window: int | None, dtype: torch.dtype) -> None:
        self.batch, self.window, self._dtype = batch, window, dtype
        self._made: tuple[Piece, ...] | None = None
        self.plan: Any = None

    def __len__(self) -> int:
        return len(self.batch.extents)

    @overload
    def __getitem__(self, at: int) -> Piece: ...
    @overload
    def __getitem__(self, at: slice) -> tuple[Piece, ...]: ...
    def __getitem__(self, at: int | slice) -> Piece | tuple[Piece, ...]:
        if self._made is None:
            self._made = self._make()
        return self._made[at]

    def _make(self) -> tuple[Piece, ...]:
        batch, pieces, first = self.batch, [], 0
        for extent in batch.extents:
            pieces.append(_piece(extent, first, self.window, self._dtype, batch.positions.device))
            first += extent.count
        return tuple(pieces)


def ragged(extents: Sequence[Extent], device: torch.device) -> Ragged:
    """Lay the extents end to end."""
    both = torch.tensor(places(extents), device=device)
    return Ragged(tuple(extents), both[0], both[1])


def places(extents: Sequence[Extent]) -> tuple[list[int], list[int]]:
    """Position and slot of each token."""
    positions: list[int] = []
    slots: list[int] = []
    for extent in extents:
        positions.extend(range(extent.position, extent.length))
        slots.extend(map(extent.slot, range(extent.position, extent.length)))
    return positions, slots


def _piece(
    extent: Extent, first: int, window: int | None, dtype: torch.dtype, device: torch.device
) -> Piece:
    """Leave out keys that no query of the extent sees, mask those that only some of them see."""
    position, length = extent.position, extent.length
    start = 0 if window is None else max(0, position + 1 - window)
    run = extent.run
    keys: slice | Tensor
    if run is not None:
        keys = slice(run + start, run + length)
    else:
        bases = torch.tensor(extent.blocks, device=device)[:, None] * extent.block_size
        offsets = torch.arange(extent.block_size, device=device)
        keys = (bases + offsets).flatten()[start:length]
    windowed = window is not None and length - start > window
    causal = extent.count > 1 and start == position and not windowed
    mask = None
    if extent.count > 1 and not causal:
        mask = _mask(range(position, length), range(start, length), window, dtype, device)
    return Piece(first, first + extent.count, keys, causal, mask)


def _mask(
    queries: range, keys: range, window: int | None, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """0 where the query sees the key, -inf elsewhere; a window of w is the w last tokens."""
    q = torch.arange(queries.start, queries.stop, device=device)[:, None]
    k = torch.arange(keys.start, keys.stop, device=device)[None]
    hidden = k > q
    if window is not None:
        hidden |= k <= q - window
    mask = torch.zeros(hidden.shape, dtype=dtype, device=device)
    return mask.masked_fill_(hidden, float("-inf"))
