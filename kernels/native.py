"""The layers of a stage for a few tokens, in C: what a CPU does instead of PyTorch at decode.

A decode step reads every weight once, so memory sets its floor: SmolLM2-135M in float32 is 538 MB,
37 ms at the 14.5 GB/s of one core of our Xeon (AVX-512, virtual, shared). PyTorch took 45 there:
some twenty small operations a layer that run cold, since 14 MB of weights pass through the caches
between two of a kind, and matrix products that lose speed with two rows or more. Milliseconds of
the processor a step, one thread, the decode of `benchmarks/engine.py` with 31 steps, both backends
by turns in one process, medians of 5 (its `--backend` measures one at a time), before the tiles:

    rows       1     2     4     8    16
    native  39.3  40.6  44.9  52.4  79.6
    torch   45.1  55.7  66.8  92.9 115.4

Here one call runs all layers. Weights stay as they are, `[in, out]`, one copy for this and for
PyTorch's prefill. For up to twelve tokens four of their rows stream by at a time and are added to
sums that stay in the first-level cache, a tile of 1024 columns; a weight is loaded once for up to
eight tokens. For more the sums of eight tokens and 48 columns stay in registers while 128 rows pass
by, out of a panel that was copied into that cache (`native_tiles.h`): a step of 64 rows is limited
by arithmetic, not by the caches. Every result is the same sum in the same order whatever the batch,
the tiling and the threads, hence a row does not depend on its neighbours, bit for bit. Queries are
tokens, not sessions: any batch of up to `ROWS` tokens will do, be they decode steps or a prompt.
The tiles alone, without the layers around them, serve longer prompts in bfloat16
(`hexswarm.kernels.native_prompts`).

Matrices and cache may be bfloat16: a third of the time of a step less, since half of the bytes are
read. They are widened in registers by a shift, exactly, which every processor can; sums, norms and
what lies between matrices are float32 as ever. The dot products that newer processors have for
bfloat16 were rejected: they want pairs of rows interleaved, which PyTorch's prefill does not, and
reading is the limit already. Rows of this table were measured beside other work:

    rows                 1     4     8    16
    float32 native    40.9  45.7  50.9  77.6
    bfloat16 native   25.9  26.5  31.2  62.3
    bfloat16 torch    83.2     -  91.3   142

Threads are a team of the shard's own, over columns, heads and sessions; how many is for the owner
to say (`hexswarm.peer.threads`).

Rejected: weights in `[out, in]` (dot products; the prefill wants the other order, and two copies do
not fit), for few tokens sums in registers over all of k (a row of weights is read in pieces of 256
bytes, which no prefetcher follows), huge pages (no gain measured), OpenMP (a second runtime in
PyTorch's process), `target_clones` (generic vectors are lowered before it clones). Float16 stays
with PyTorch.

The library is an optional part of the installation: without a C compiler `available()` is False.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hexswarm.kernels.native_library import (
    DTYPES,
    MATRICES,
    ROWS,
    VECTORS,
    Batch,
    Head,
    Layer,
    Pass,
    Shape,
    Team,
    address,
    available,
    instructions,
    library,
)
from hexswarm.kernels.ragged import Ragged

__all__ = ["DTYPES", "ROWS", "NativeLayers", "available", "instructions"]


class NativeLayers:
    """The layers of a shard (`DecoderLayer`s), all in one of `DTYPES` on the CPU, and its threads.

    One batch at a time, as a shard has one owner; the GIL is free meanwhile. `instruction_set`
    is one of `instructions()`, by default the best. Needs `available()`.
    """

    def __init__(
        self, layers: Sequence[Any], threads: int, instruction_set: str | None = None
    ) -> None:
        first = layers[0]
        self._dtype = first.qkv.dtype
        self._team = Team(threads, self._dtype, instruction_set)
        self._hidden = first.input_norm.shape[0]
        self._shape = Shape(
            *(self._hidden, first.down.shape[0]),
            *(first.heads, first.kv_heads, first.head_dim, first.eps),
        )
        self._layers = (Layer * len(layers))()
        self._held: list[Tensor | None] = []
        for record, layer in zip(self._layers, layers, strict=True):
            for name in VECTORS:
                setattr(record, name, self._hold(_wide(getattr(layer, name)), torch.float32))
            for name in MATRICES:
                setattr(record, name, self._hold(getattr(layer, name), self._dtype))
            record.window = layer.window or 0
        self._make_room()

    def resize(self, threads: int) -> None:
        """Go on with another number of threads."""
        team = Team(threads, self._dtype, self._team.instruction_set)
        self._team.stop()
        self._team = team
        self._make_room()

    @property
    def threads(self) -> int:
        return self._team.threads

    def _make_room(self) -> None:
        size = library().hexswarm_scratch(self._shape, ROWS, self.threads)
        self._scratch = torch.empty(size)

    def _hold(self, tensor: Tensor | None, dtype: torch.dtype) -> int | None:
        """Its address, and that it stays there as long as we do."""
        self._held.append(tensor)
        return address(tensor, dtype)

    def decode(
        self,
        x: Tensor,
        batch: Ragged,
        rope: tuple[Tensor, Tensor],
        caches: Sequence[Tensor],
        first: int,
    ) -> Tensor:
        """Run layers [first, first + len(caches)) on `x` `[tokens, hidden]`, in place.

        `rope` is that of `hexswarm.kernels.reference.rope_tables`, in float32. Tokens of one
        session may be several: all keys and values are appended before attention reads any.
        """
        rows = batch.tokens
        assert rows <= ROWS
        assert x.shape == (rows, self._hidden)
        tables, blocks = array("q"), array("q")
        for extent in batch.extents:
            tables.extend([len(blocks)] * extent.count)
            blocks.extend(extent.blocks)
        records = (Layer * len(caches)).from_buffer(self._layers, first * ctypes.sizeof(Layer))
        for record, store in zip(records, caches, strict=True):
            record.cache = address(store, self._dtype)
        described = Batch(
            *(rows, batch.extents[0].block_size),
            *(address(table, torch.float32) for table in rope),
            *(address(index, torch.int64) for index in (batch.positions, batch.slots)),
            *(numbers.buffer_info()[0] for numbers in (tables, blocks)),
        )
        wide = x.float()  # x itself if that is what it is
        job = Pass(
            *(ctypes.pointer(self._shape), records, len(caches), ctypes.pointer(described)),
            *(address(wide, torch.float32), self._scratch.data_ptr()),
        )
        self._team.decode(job)
        return x if wide is x else x.copy_(wide)

    def head(self, x: Tensor, norm: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Final norm and LM head of `[rows, hidden]`: logits `[rows, vocabulary]`."""
        rows, (hidden, vocabulary) = x.shape[0], weight.shape
        assert rows <= ROWS
        assert x.shape[1] == hidden == self._hidden
        logits, x, norm = torch.empty(rows, vocabulary), x.float(), norm.float()
        job = Head(
            *(rows, hidden, vocabulary),
            *(address(x, torch.float32), address(norm, torch.float32)),
            *(address(weight, self._dtype), address(logits, torch.float32)),
            *(self._scratch.data_ptr(), eps),
        )
        self._team.head(job)
        return logits


def _wide(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float()
