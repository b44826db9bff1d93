"""A decoder layer on fused, transposed weights, and the batch as its layers see it.

Weights are stored `[in, out]` and used as `x @ W`. That is the opposite of PyTorch's habit, and on
a CPU it is what keeps small batches at the speed of memory (one thread, float32, batch 4: 10 GB/s
against 7 for `[out, in]`); a GPU does not mind. Query, key and value projections are one matrix,
gate and up are one. A layer adds to its input in place: a decode step is bound by reading weights
and by dispatch, so an operation saved in each layer shows.

A layer's head counts are those of its own weights. A tensor-parallel shard is therefore the same
class with fewer heads and columns, plus a sum over the group where `_add_projected` adds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hexswarm.kernels.dispatch import Operations
from hexswarm.kernels.ragged import Piece, Ragged


@dataclass(frozen=True, slots=True)
class Pass:
    """One batch on its way through the layers: what they share, computed once."""

    slots: Tensor
    cos: Tensor
    sin: Tensor
    pieces: Mapping[int | None, tuple[Piece, ...]]
    """Attention's view of the batch, by sliding window."""
    operations: Operations


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """Weights of one layer (or of a tensor-parallel part of it)."""

    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    window: int | None
    input_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    qk_norm: Tensor | None
    """Norm weights of every query head, then every key head: `[heads + kv heads, head dim]`."""
    o: Tensor
    o_bias: Tensor | None
    post_norm: Tensor
    gate_up: Tensor
    gate_up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None

    def forward(self, x: Tensor, batch: Pass, cache: Tensor) -> Tensor:
        """Change `x` `[tokens, hidden]` in place; append to and read the layer's `cache`."""
        ops = batch.operations
        attended = self._attend(ops.rms_norm(x, self.input_norm, self.eps), batch, cache)
        _add_projected(x, attended, self.o, self.o_bias)
        y = ops.rms_norm(x, self.post_norm, self.eps)
        y = ops.silu_mul(_project(y, self.gate_up, self.gate_up_bias))
        return _add_projected(x, y, self.down, self.down_bias)

    def _attend(self, y: Tensor, batch: Pass, cache: Tensor) -> Tensor:
        ops, rotated = batch.operations, self.heads + self.kv_heads
        fused = _project(y, self.qkv, self.qkv_bias)
        heads = fused.view(-1, rotated + self.kv_heads, self.head_dim)
        if self.qk_norm is not None:
            heads[:, :rotated] = ops.rms_norm(heads[:, :rotated], self.qk_norm, self.eps)
        ops.rotate_(heads[:, :rotated], batch.cos, batch.sin)
        keys_values = heads[:, self.heads :].view(-1, 2, self.kv_heads, self.head_dim)
        ops.append_(cache, batch.slots, keys_values)
        pieces = batch.pieces[self.window]
        return ops.attend(heads[:, : self.heads], cache, pieces, self.head_dim**-0.5)


def start_pass(
    batch: Ragged,
    windows: set[int | None],
    frequencies: Tensor,
    scaling: float,
    dtype: torch.dtype,
    operations: Operations,
) -> Pass:
    """Compute what the layers of a span share."""
    cos, sin = operations.rope_tables(batch.positions, frequencies, scaling, dtype)
    pieces = {window: batch.pieces(window, dtype) for window in windows}
    return Pass(batch.slots, cos, sin, pieces, operations)


def _project(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.mm(x, weight) if bias is None else torch.addmm(bias, x, weight)


def _add_projected(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x += y @ weight + bias, the sum inside the matrix product."""
    x.addmm_(y, weight)
    return x if bias is None else x.add_(bias)
