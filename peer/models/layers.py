"""A decoder layer on fused, transposed weights, and the batch as its layers see it.

Weights are stored `[in, out]` and used as `x @ W`. That is the opposite of PyTorch's habit, and on
a CPU it is what keeps small batches at the speed of memory (one thread, float32, batch 4: 10 GB/s
against 7 for `[out, in]`). Where Triton runs they are views of what lies `[out, in]`, or rounded to
few bits (`Quantised`). Query, key and value projections are one matrix,
gate and up are one. A layer adds to its input in place: a decode step is bound by reading weights
and by dispatch, so an operation saved in each layer shows.

A layer's head counts are those of its own weights. A tensor-parallel shard is therefore the same
class with fewer heads and columns, plus a sum over the group where `Pass.add_` adds. Where its
heads begin or end amid those that share a KV head, attention goes run by run of equal groups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hexswarm.kernels.dispatch import Operations
from hexswarm.kernels.quantise import Quantised
from hexswarm.kernels.ragged import Piece, Ragged
from hexswarm.peer.sums import Sums


@dataclass(frozen=True, slots=True)
class Pass:
    """One batch on its way through the layers: what they share, computed once."""

    slots: Tensor
    rope: tuple[Tensor, Tensor]
    """Cosines and sines."""
    pieces: Mapping[int | None, Sequence[Piece]]
    """Attention's view of the batch, by sliding window."""
    operations: Operations
    sums: Sums | None = None
    """Of the group whose ranks each compute a term of what is added; None: there is no group."""

    def add_projected_(
        self, x: Tensor, y: Tensor, weight: Tensor | Quantised, bias: Tensor | None
    ) -> Tensor:
        """x += y @ weight + bias, of all ranks."""
        if self.sums is None:
            return self.operations.add_projected_(x, y, weight, bias)
        return self.add_(x, self.operations.project(y, weight, bias))

    def add_(self, x: Tensor, y: Tensor) -> Tensor:
        """x += y, of all ranks; `y` may be changed."""
        return x.add_(y if self.sums is None else self.sums.total(y))


@dataclass(frozen=True, slots=True)
class AttendingLayer:
    """What layers have in common: attention, and the norms before it and after."""

    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    window: int | None
    input_norm: Tensor
    qkv: Tensor | Quantised
    qkv_bias: Tensor | None
    qk_norm: Tensor | None
    """Norm weights of every query head, then every key head: `[heads + kv heads, head dim]`."""
    o: Tensor | Quantised
    o_bias: Tensor | None
    post_norm: Tensor
    runs: tuple[tuple[int, int], ...] = field(default=(), kw_only=True)
    """KV heads and queries of each, run by run; empty or one run if all have equally many."""

    def forward(self, x: Tensor, batch: Pass, cache: Tensor) -> Tensor:
        """Change `x` `[tokens, hidden]` in place; append to and read the layer's `cache`."""
        raise NotImplementedError

    def attend_(self, x: Tensor, batch: Pass, cache: Tensor) -> Tensor:
        """Add attention to `x` in place; what the MLP is to see of it."""
        ops = batch.operations
        attended = self._attend(ops.rms_norm(x, self.input_norm, self.eps), batch, cache)
        batch.add_projected_(x, attended, self.o, self.o_bias)
        return ops.rms_norm(x, self.post_norm, self.eps)

    def _attend(self, y: Tensor, batch: Pass, cache: Tensor) -> Tensor:
        ops, heads = batch.operations, self.heads
        qkv = ops.project(y, self.qkv, self.qkv_bias)
        ops.rope_append_(qkv, batch.rope, batch.slots, cache, heads, self.qk_norm, self.eps)
        queries = qkv[:, : heads * self.head_dim].view(-1, heads, self.head_dim)
        pieces, scale = batch.pieces[self.window], self.head_dim**-0.5
        if len(self.runs) < 2:
            return ops.attend(queries, cache, pieces, scale)
        parts, head, kv = [], 0, 0
        for count, each in self.runs:
            some = queries[:, head : head + count * each]
            parts.append(ops.attend(some, cache[:, :, kv : kv + count], pieces, scale))
            head, kv = head + count * each, kv + count
        return torch.cat(parts, 1)


@dataclass(frozen=True, slots=True)
class DecoderLayer(AttendingLayer):
    """Weights of one layer with one MLP (or of a tensor-parallel part of it)."""

    gate_up: Tensor | Quantised
    gate_up_bias: Tensor | None
    down: Tensor | Quantised
    down_bias: Tensor | None

    def forward(self, x: Tensor, batch: Pass, cache: Tensor) -> Tensor:
        """Change `x` `[tokens, hidden]` in place; append to and read the layer's `cache`."""
        ops = batch.operations
        y = self.attend_(x, batch, cache)
        y = ops.silu_mul(ops.project(y, self.gate_up, self.gate_up_bias))
        return batch.add_projected_(x, y, self.down, self.down_bias)


def start_pass(
    batch: Ragged,
    windows: set[int | None],
    frequencies: Tensor,
    scaling: float,
    dtype: torch.dtype,
    operations: Operations,
    sums: Sums | None = None,
) -> Pass:
    """Compute what the layers of a span share."""
    rope = operations.rope_tables(batch.positions, frequencies, scaling, dtype)
    pieces = {window: batch.pieces(window, dtype) for window in windows}
    return Pass(batch.slots, rope, pieces, operations, sums)
