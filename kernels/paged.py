"""Decode attention over the paged cache, whatever the lengths of the sessions (Triton).

One query token per session, its keys in blocks of 16 all over the cache. The floor is reading keys
and values once, so the heads of a group share what is read: they are the rows of one small matrix
product. A long session is cut into *splits*, each with its own running maximum and sum; a second
kernel joins them (split-K, as in FlashDecoding).

The grid is fixed, because a CUDA graph replays it: `programs` x kv heads. What it works on is a
list of (session, split) pairs in device memory, made on the host for each step, through which the
programs go by turns. So one graph serves 64 short sessions and one of 100,000 tokens alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from hexswarm.kernels.linear import shared

LOG2_E = math.log2(math.e)


@triton.jit
def _attend(
    q_ptr, cache_ptr, plan_ptr, tables_ptr, part_ptr, peak_ptr, stride_q, scale, window, MOST,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr,
    BLOCK: tl.constexpr, TILE: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    items = tl.load(plan_ptr)
    split = tl.load(plan_ptr + 1)
    lengths_ptr = plan_ptr + 2
    bases_ptr = lengths_ptr + MOST
    work_ptr = bases_ptr + 2 * MOST + 1
    group = tl.arange(0, GROUP)
    dim = tl.arange(0, DIM)
    real = group < HEADS // KV_HEADS
    token = tl.arange(0, TILE)
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        row = tl.load(work_ptr + 2 * item)
        first = tl.load(work_ptr + 2 * item + 1)
        length = tl.load(lengths_ptr + row)
        table = tables_ptr + tl.load(bases_ptr + row)
        end = tl.minimum(first + split, length)
        visible = tl.where(window > 0, tl.maximum(length - window, 0), 0)
        heads = head * (HEADS // KV_HEADS) + group
        q = tl.load(
            q_ptr + row * stride_q + heads[:, None] * DIM + dim[None, :],
            mask=real[:, None], other=0.0,
        )  # fmt: skip
        peak = tl.full((GROUP,), float("-inf"), dtype=tl.float32)
        total = tl.zeros((GROUP,), dtype=tl.float32)
        out = tl.zeros((GROUP, DIM), dtype=tl.float32)
        for start in range(tl.maximum(first, visible) // TILE * TILE, end, TILE):
            t = start + token
            seen = (t < end) & (t >= tl.maximum(visible, first))
            block = tl.load(table + t // BLOCK, mask=seen, other=0)
            slot = (block * BLOCK + t % BLOCK).to(tl.int64)
            at = cache_ptr + slot[:, None] * (2 * KV_HEADS * DIM) + head * DIM + dim[None, :]
            k = tl.load(at, mask=seen[:, None], other=0.0)
            v = tl.load(at + KV_HEADS * DIM, mask=seen[:, None], other=0.0)
            scores = tl.dot(q, tl.trans(k), input_precision=EXACT) * scale
            scores = tl.where(seen[None, :], scores, float("-inf"))
            higher = tl.maximum(peak, tl.max(scores, axis=1))
            safe = tl.where(higher == float("-inf"), 0.0, higher)
            weights = tl.exp2(scores - safe[:, None])
            fade = tl.exp2(peak - safe)
            total = total * fade + tl.sum(weights, axis=1)
            out = out * fade[:, None]
            out = tl.dot(weights.to(v.dtype), v, out, input_precision=EXACT)
            peak = higher
        at = item * HEADS + heads
        tl.store(part_ptr + at[:, None] * DIM + dim[None, :], out, mask=real[:, None])
        tl.store(peak_ptr + 2 * at, peak, mask=real)
        tl.store(peak_ptr + 2 * at + 1, total, mask=real)


@triton.jit
def _join(
    part_ptr, peak_ptr, plan_ptr, out_ptr, stride_out, MOST,
    HEADS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0), tl.program_id(1)
    dim = tl.arange(0, DIM)
    starts_ptr = plan_ptr + 2 + 2 * MOST
    peak = float("-inf")
    total = 0.0
    out = tl.zeros((DIM,), dtype=tl.float32)
    for item in range(tl.load(starts_ptr + row), tl.load(starts_ptr + row + 1)):
        at = item * HEADS + head
        here = tl.load(peak_ptr + 2 * at)
        higher = tl.maximum(peak, here)
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        fade, share = tl.exp2(peak - safe), tl.exp2(here - safe)
        total = total * fade + tl.load(peak_ptr + 2 * at + 1) * share
        out = out * fade + tl.load(part_ptr + at * DIM + dim) * share
        peak = higher
    out = out / tl.where(total > 0, total, 1.0)
    tl.store(out_ptr + row * stride_out + head * DIM + dim, out.to(out_ptr.dtype.element_ty))


TILE = 64
"""Tokens that a program attends to at a time."""
STAGES = 3
"""Tiles that are on their way at a time, where they fit."""
LEAST = 2 * TILE
"""Tokens of the shortest split."""
SPLIT_ITEMS = 256
"""So many splits a step may have beside one for each session."""


class Plan:
    """The step's list of work and block tables, on the host and in device memory.

    Integers in one buffer, so that one copy brings them over: number of items, tokens of a split,
    then for each session its length, where its table begins, and its first item; then the items.
    """

    def __init__(self, most: int, blocks: int, device: torch.device, parallel: int) -> None:
        """For at most `most` sessions whose tables have `blocks` entries in all.

        `parallel` splits fill the device.
        """
        self.most, self.parallel = most, parallel
        self.least = LEAST
        self._tables_at = 2 + 3 * most + 1 + 2 * (most + SPLIT_ITEMS)
        size = self._tables_at + blocks
        pinned = device.type == "cuda"
        self._host = torch.zeros(size, dtype=torch.int32, pin_memory=pinned)
        self._taken = torch.cuda.Event() if pinned else None
        self._numbers = self._host.numpy()
        self.numbers = torch.zeros(size, dtype=torch.int32, device=device)
        self.tables = self.numbers[self._tables_at :]
        self.items = most + SPLIT_ITEMS

    def set(self, lengths: Sequence[int], tables: Sequence[Sequence[int]]) -> None:
        """Sessions that see `lengths` tokens, through these block tables."""
        if self._taken is not None:
            self._taken.synchronize()  # the last step's copy may still wait for its turn
        n, most, numbers = len(lengths), self.most, self._numbers
        split = self._split(lengths)
        counts = [-(-length // split) for length in lengths]
        numbers[:2] = sum(counts), split
        numbers[2 : 2 + n] = lengths
        ends = np.cumsum([len(table) for table in tables])
        numbers[2 + most] = 0
        numbers[2 + most + 1 : 2 + most + n] = ends[:-1]
        starts = 2 + 2 * most
        numbers[starts] = 0
        numbers[starts + 1 : starts + 1 + n] = np.cumsum(counts)
        numbers[starts + 1 + n : starts + 1 + most] = sum(counts)  # rows that only fill a bucket
        rows = np.repeat(np.arange(n), counts)
        first = (np.arange(len(rows)) - numbers[starts + rows]) * split
        work = starts + most + 1
        numbers[work : work + 2 * len(rows) : 2] = rows
        numbers[work + 1 : work + 2 * len(rows) : 2] = first
        at = self._tables_at
        for table in tables:
            numbers[at : at + len(table)] = table
            at += len(table)
        self.numbers[:at].copy_(self._host[:at], non_blocking=True)
        if self._taken is not None:
            self._taken.record()

    def _split(self, lengths: Sequence[int]) -> int:
        """Tokens of a split: as many splits as fill the device, in whole tiles."""
        wanted = max(self.parallel - len(lengths), 0) + 1
        split = -(-sum(lengths) // min(wanted, SPLIT_ITEMS))
        return max(self.least, -(-split // TILE) * TILE)


class PagedDecode:
    """Attention of one query token a session; its partial results live here."""

    def __init__(self, plan: Plan, heads: int, kv_heads: int, dim: int, block: int) -> None:
        device = plan.numbers.device
        self.plan, self.heads, self.kv_heads, self.dim, self.block = (
            plan,
            heads,
            kv_heads,
            dim,
            block,
        )
        self._part = torch.empty(plan.items, heads, dim, device=device)
        self._peak = torch.empty(plan.items, heads, 2, device=device)

    def attend(
        self, q: Tensor, cache: Tensor, out: Tensor, scale: float, window: int | None = None,
        *, tile: int = TILE, warps: int = 4, stages: int | None = None,
        programs: int | None = None,
    ) -> Tensor:  # fmt: skip
        """`out` `[rows, heads * dim]` of queries at the start of each row of `q`."""
        plan, rows = self.plan, q.shape[0]
        group = max(16, triton.next_power_of_2(self.heads // self.kv_heads))
        exact = "ieee" if q.dtype == torch.float32 else "tf32"
        grid = (programs or max(rows, plan.parallel), self.kv_heads)
        if stages is None:
            room = shared(q.device) // (2 * tile * self.dim * q.element_size())
            stages = min(max(room, 1), STAGES)
        _attend[grid](
            *(q, cache, plan.numbers, plan.tables, self._part, self._peak),
            *(q.stride(0), scale * LOG2_E, window or 0, plan.most),
            HEADS=self.heads, KV_HEADS=self.kv_heads, GROUP=group, DIM=self.dim,
            BLOCK=self.block, TILE=tile, EXACT=exact, num_warps=warps, num_stages=stages,
        )  # fmt: skip
        _join[(rows, self.heads)](
            *(self._part, self._peak, plan.numbers, out, out.stride(0), plan.most),
            HEADS=self.heads, DIM=self.dim, num_warps=1,
        )  # fmt: skip
        return out
