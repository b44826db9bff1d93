"""Attention of prompts over the paged cache, several sessions in one launch (Triton).

The sessions' tokens lie end to end; each has a *prefix* in the cache, of any length, and its own
keys and values there already. PyTorch's attention takes one session at a time, copies the keys of
one whose blocks are scattered, and a session that has a prefix needs a mask of [queries, keys],
with which it leaves the fast path. Here a program owns a tile of queries of one head and goes over
the blocks: those that every query sees without a mask, then those at the edge.

Arithmetic is the floor, 4 d operations for each query, key and head, half of them hidden by the
future; keys are read again for each tile of queries, from the second-level cache. So tiles are as
large as registers allow, and the heads of a group, which read the same keys, run next to each
other. Tiles with most keys go first: they take longest, and small ones fill the end.

Running maximum and sum are those of FlashAttention (Dao et al., 2022), powers of two throughout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from hexswarm.kernels.linear import shared
from hexswarm.kernels.paged import LOG2_E
from hexswarm.kernels.ragged import Extent

ROWS = {2: 128, 4: 64}
"""Queries of a tile, by the bytes of a number."""
SHAPE = (64, 8, 2)
"""Keys of a tile, warps, stages."""


@triton.jit
def _visit(
    out, peak, total, q, cache_ptr, table, start, position, end, m, n, d,
    stride_slot, stride_value, scale, window,
    BLOCK: tl.constexpr, MASKED: tl.constexpr, WINDOW: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """One tile of keys; `MASKED` if some query may not see some of them."""
    t = start + n
    if MASKED:
        block = tl.load(table + t // BLOCK, mask=t < end, other=0)
    else:
        block = tl.load(table + t // BLOCK)
    slot = (block * BLOCK + t % BLOCK).to(tl.int64)
    at = cache_ptr + slot[:, None] * stride_slot + d[None, :]
    if MASKED:  # noqa: SIM108
        k = tl.load(at, mask=(t < end)[:, None], other=0.0)
    else:
        k = tl.load(at)
    scores = tl.dot(q, tl.trans(k), input_precision=EXACT)
    if MASKED:
        seen = (t[None, :] <= position + m[:, None]) & (t[None, :] < end)
        if WINDOW:
            seen = seen & (t[None, :] > position + m[:, None] - window)
        scores = tl.where(seen, scores, float("-inf"))
    higher = tl.maximum(peak, tl.max(scores, axis=1) * scale)
    safe = tl.where(higher == float("-inf"), 0.0, higher) if WINDOW else higher
    weights = tl.exp2(scores * scale - safe[:, None])
    fade = tl.exp2(peak - safe)
    total = total * fade + tl.sum(weights, axis=1)
    out = out * fade[:, None]
    if MASKED:
        v = tl.load(at + stride_value, mask=(t < end)[:, None], other=0.0)
    else:
        v = tl.load(at + stride_value)
    out = tl.dot(weights.to(v.dtype), v, out, input_precision=EXACT)
    return out, higher, total


@triton.jit
def _prefill(
    q_ptr, cache_ptr, tiles_ptr, tables_ptr, out_ptr,
    stride_q, stride_q_head, stride_slot, stride_value, stride_head, stride_out, scale, window,
    SHARE: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, WINDOW: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    tile = tiles_ptr + 4 * tl.program_id(1)
    row = tl.load(tile).to(tl.int64)
    count = tl.load(tile + 1)
    position = tl.load(tile + 2)
    table = tables_ptr + tl.load(tile + 3)
    end = position + count
    m, n, d = tl.arange(0, ROWS), tl.arange(0, KEYS), tl.arange(0, DIM)
    here = (m < count)[:, None]
    q_at = q_ptr + (row + m)[:, None] * stride_q + head * stride_q_head + d[None, :]
    q = tl.load(q_at, mask=here, other=0.0)
    cache_ptr += head // SHARE * stride_head
    out = tl.zeros((ROWS, DIM), dtype=tl.float32)
    peak = tl.full((ROWS,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((ROWS,), dtype=tl.float32)
    edge = (position + 1) // KEYS * KEYS  # every query sees the keys before
    if WINDOW:  # masks everywhere: such models are few, and their tiles too
        edge = tl.maximum(position + 1 - window, 0) // KEYS * KEYS
    else:
        for start in range(0, edge, KEYS):
            out, peak, total = _visit(
                out, peak, total, q, cache_ptr, table, start, position, end, m, n, d,
                stride_slot, stride_value, scale, window, BLOCK, False, WINDOW, EXACT,
            )  # fmt: skip
    for start in range(edge, end, KEYS):
        out, peak, total = _visit(
            out, peak, total, q, cache_ptr, table, start, position, end, m, n, d,
            stride_slot, stride_value, scale, window, BLOCK, True, WINDOW, EXACT,
        )  # fmt: skip
    out = out / tl.where(total > 0, total, 1.0)[:, None]
    out_at = out_ptr + (row + m)[:, None] * stride_out + head * DIM + d[None, :]
    tl.store(out_at, out.to(out_ptr.dtype.element_ty), mask=here)


@dataclass(frozen=True, slots=True)
class Tiles:
    """What the programs work on, for all layers."""

    numbers: Tensor
    """Of each tile: first row, queries, position of the first, where its block table begins."""
    tables: Tensor
    rows: int
    """Queries of a tile."""
    block: int


def tiles(extents: Sequence[Extent], device: torch.device, rows: int) -> Tiles:
    """Cut a batch's sessions into tiles of at most `rows` queries."""
    found, first = [], 0
    bases = [0, *accumulate(len(extent.blocks) for extent in extents)]
    for extent, base in zip(extents, bases, strict=False):
        for at in range(0, extent.count, rows):
            count = min(rows, extent.count - at)
            found.append((first + at, count, extent.position + at, base))
        first += extent.count
    found.sort(key=lambda tile: -(tile[1] + tile[2]))
    numbers = [number for tile in found for number in tile]
    blocks = [block for extent in extents for block in extent.blocks]
    both = torch.tensor(numbers + blocks, dtype=torch.int32).to(device)
    return Tiles(
        both[: len(numbers)].view(-1, 4), both[len(numbers) :], rows, extents[0].block_size
    )


def attend(
    q: Tensor, cache: Tensor, plan: Tiles, scale: float, window: int | None = None,
    *, out: Tensor | None = None, shape: tuple[int, int, int] | None = None,
) -> Tensor:  # fmt: skip
    """As `hexswarm.kernels.reference.attend`: `[tokens, heads * dim]` of `[tokens, heads, dim]`.

    `shape`: keys of a tile, warps and stages, to be tried out.
    """
    tokens, heads, dim = q.shape
    kv_heads = cache.shape[2]
    if out is None:
        out = torch.empty(tokens, heads * dim, dtype=q.dtype, device=q.device)
    keys, warps, stages = shape or _fitting(q, plan.rows)
    _prefill[(heads, len(plan.numbers))](
        *(q, cache, plan.numbers, plan.tables, out, q.stride(0), q.stride(1)),
        *(cache.stride(0), cache.stride(1), cache.stride(2), out.stride(0)),
        *(scale * LOG2_E, window or 0),
        SHARE=heads // kv_heads, DIM=dim, BLOCK=plan.block, ROWS=plan.rows, KEYS=keys,
        WINDOW=window is not None, EXACT="ieee" if q.dtype == torch.float32 else "tf32",
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out


def _fitting(q: Tensor, rows: int) -> tuple[int, int, int]:
    """`SHAPE` with as many keys and stages as the device's shared memory holds."""
    keys, warps, stages = SHAPE
    if q.dtype == torch.float32:
        keys //= 2
    wide = q.shape[2] * q.element_size()
    while stages > 1 and (rows + 2 * keys * stages) * wide > shared(q.device):
        stages -= 1
    return keys, warps, stages
