"""The operations of a layer for prompts whose weights are bfloat16, on a CPU: in float32.

PyTorch multiplies bfloat16 slowly where the processor has no matrix units for it: 80 GFLOP/s on
our Xeon (AVX512-BF16, no AMX) against 135 in float32. The products of `native_tiles.h` copy each
piece of the weights into the nearest cache in any case and widen it on that way for nothing, so
bfloat16 costs there what float32 does. Processor milliseconds for the products of one layer of
SmolLM2, one thread, by turns, medians:

    tokens                        16     32     64    128    512
    PyTorch, float32             2.1    2.7    3.5    6.6   27.4
    PyTorch, bfloat16                   3.8          11.8   44.8
    PyTorch, after widening             3.1           7.6   25.3
    here, bfloat16               1.3    2.2    3.5    6.5   26.7

All between the matrices is float32, too: no rounding but that of the weights and of keys and
values, as in `native.py`. Attention widens the keys it reads, a copy that is small beside the
products; PyTorch's attention in bfloat16 is slow likewise.

Rejected: widening whole matrices for PyTorch's float32 product (a second copy of a layer passes
through memory: 15 to 19 % at up to 128 tokens), and AVX512-BF16's dot products (PyTorch's have
them, see above, and pairs of rows would have to be interleaved first).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hexswarm.kernels import reference
from hexswarm.kernels.native_library import MOST, Product, Team, address, address_of_rows
from hexswarm.kernels.ragged import Piece


class WideOperations:
    """`hexswarm.kernels.dispatch.Operations` for float32 tokens, bfloat16 weights and cache."""

    def __init__(self, threads: int, instruction_set: str | None = None) -> None:
        self._team = Team(threads, torch.bfloat16, instruction_set)
        self._room = torch.empty(0)

    silu_mul = staticmethod(reference.silu_mul)
    rope_tables = staticmethod(reference.rope_tables)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return reference.rms_norm(x, weight, eps)

    def rope_append_(
        self,
        qkv: Tensor,
        rope: tuple[Tensor, Tensor],
        slots: Tensor,
        cache: Tensor,
        heads: int,
        norm: Tensor | None = None,
        eps: float = 0.0,
    ) -> None:
        """As the reference has it; keys and values are rounded on their way to the cache."""
        _, _, kv_heads, dim = cache.shape
        every = qkv.view(-1, heads + 2 * kv_heads, dim)
        turned = every[:, : heads + kv_heads]
        if norm is not None:
            every[:, : heads + kv_heads] = reference.rms_norm(turned, norm, eps)
        reference.rotate_(turned, *rope)
        keys_values = every[:, heads:].view(-1, 2, kv_heads, dim)
        reference.append_(cache, slots, keys_values.to(cache.dtype))

    def project(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        out = torch.empty(x.shape[0], weight.shape[1])
        self._multiply(out, x, weight, bias, None)
        return out

    def add_projected_(
        self, x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        if self._room.numel() < MOST * weight.shape[1]:
            self._room = torch.empty(MOST * weight.shape[1])
        self._multiply(x, y, weight, bias, self._room)
        return x

    def attend(self, q: Tensor, cache: Tensor, pieces: Sequence[Piece], scale: float) -> Tensor:
        """The keys of one session at a time are widened."""
        parts = []
        for piece in pieces:
            keys, tokens = cache[piece.keys].float(), piece.end - piece.first
            here = replace(piece, first=0, end=tokens, keys=slice(0, len(keys)))
            parts.append(reference.attend(q[piece.first : piece.end], keys, [here], scale))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _multiply(
        self, out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, room: Tensor | None
    ) -> None:
        """out = x @ weight + bias, or out += that by way of `room`."""
        rows, (depth, width) = x.shape[0], weight.shape
        assert x.shape == (rows, depth)
        assert out.shape == (rows, width)
        wide = None if bias is None else bias.float()
        job = Product(
            *(rows, depth, width, x.stride(0)),
            *(address_of_rows(x, torch.float32), address(wide, torch.float32)),
            *(address(weight, torch.bfloat16), address(out, torch.float32)),
            address(room, torch.float32),
        )
        self._team.multiply(job)
