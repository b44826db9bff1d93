"""Mixtures of experts on a GPU: five launches, whatever the tokens chose (Triton).

    route - sort - gate-up with SiLU behind it - down times the shares - sum of a token's terms

A token and one of the experts that it was sent to are a *pair*. `_sort` puts the pairs of an expert
side by side and cuts them into *slots* of `TILE` rows; each program of a product owns a slot and
`BLOCK_N` outputs, so that an expert's weights are read once for each tile of its tokens, and those
that nobody chose never. How many slots there are stays on the device: nothing waits for it. The
grid has the most that there can be, and what is left over ends at once. With fewer pairs than
experts each pair has a slot to itself in reserve; with more, an expert that follows `n` pairs
begins at slot `n // TILE` plus its own number, since

    floor((n + c) / TILE) + 1 - floor(n / TILE) >= ceil(c / TILE).

So no program has to know how many tiles the experts before it have, and they sort side by side.

Terms lie pair by pair and are added in the order of the token's choice, never by atomics: a row is
the same in any company, bit for bit, as long as the tiles are (up to `FEW` tokens). A decode step
is then bytes again: the weights of the chosen experts.

Rejected: one launch with a loop over experts in each program (the slowest expert makes all wait),
PyTorch's sort, sums and searches for the plan (ten launches of some microseconds for a layer whose
weights take fifteen), and split K for a single token (its eight experts fill the device).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hexswarm.kernels.linear import shared

FEW = 64
"""Most tokens for which slots have `ROWS` rows; with more, `MANY`."""
ROWS, MANY = 16, 64
_SCAN = 1024
"""Pairs that a program sorts at a time."""


@triton.jit
def _route(
    scores_ptr, slots_ptr, shares_ptr, experts_ptr, EXPERTS, stride,
    CHOSEN: tl.constexpr, ROOM: tl.constexpr, BLOCK: tl.constexpr, NORMALISED: tl.constexpr,
    SLOTS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    place = tl.arange(0, ROOM)
    at = scores_ptr + row.to(tl.int64) * stride + lane
    scores = tl.load(at, mask=lane < EXPERTS, other=float("-inf")).to(tl.float32)
    weights = tl.exp(scores - tl.max(scores, axis=0))
    weights = weights / tl.sum(weights, axis=0)
    left = tl.where(lane < EXPERTS, weights, -1.0)
    shares = tl.zeros((ROOM,), dtype=tl.float32)
    experts = tl.zeros((ROOM,), dtype=tl.int32) + EXPERTS
    for i in range(CHOSEN):
        best = tl.max(left, axis=0)
        expert = tl.min(tl.where(left == best, lane, EXPERTS), axis=0)
        shares = tl.where(place == i, best, shares)
        experts = tl.where(place == i, expert, experts)
        left = tl.where(lane == expert, -1.0, left)
    if NORMALISED:
        shares = shares / tl.sum(shares, axis=0)
    if SLOTS:
        experts = tl.where(tl.load(slots_ptr + row) < 0, EXPERTS, experts)
    tl.store(shares_ptr + row * CHOSEN + place, shares, mask=place < CHOSEN)
    tl.store(experts_ptr + row * CHOSEN + place, experts, mask=place < CHOSEN)


@triton.jit(do_not_specialize=["PAIRS", "SLOTS"])
def _sort(
    experts_ptr, order_ptr, plan_ptr, PAIRS, SLOTS, FIRST, HELD,
    APART: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    own = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    lower = tl.zeros((BLOCK,), dtype=tl.int32)
    equal = tl.zeros((BLOCK,), dtype=tl.int32)
    for at in range(0, PAIRS, BLOCK):
        inside = at + lane < PAIRS
        expert = tl.load(experts_ptr + at + lane, mask=inside, other=-1).to(tl.int32) - FIRST
        lower += (inside & (expert >= 0) & (expert < own)).to(tl.int32)
        equal += (inside & (expert == own)).to(tl.int32)
    before = tl.sum(lower, axis=0)
    end = before + tl.sum(equal, axis=0)
    place = before
    for at in range(0, PAIRS, BLOCK):
        inside = at + lane < PAIRS
        expert = tl.load(experts_ptr + at + lane, mask=inside, other=-1).to(tl.int32) - FIRST
        mine = (inside & (expert == own)).to(tl.int32)
        rank = tl.cumsum(mine, axis=0) - mine
        tl.store(order_ptr + place + rank, at + lane, mask=mine > 0)
        place += tl.sum(mine, axis=0)
    if APART:
        start, after = before, end
    else:
        start, after = before // TILE + own, end // TILE + own + 1
    after = tl.where(own == HELD - 1, SLOTS, after)
    for at in range(0, SLOTS, BLOCK):
        slot = at + lane
        first = before + (slot - start) * TILE
        here = (slot >= start) & (slot < after)
        tl.store(plan_ptr + slot, tl.where(first < end, own, -1), mask=here)
        tl.store(plan_ptr + SLOTS + slot, first, mask=here)
        tl.store(plan_ptr + 2 * SLOTS + slot, end, mask=here)


@triton.jit(do_not_specialize=["SLOTS"])
def _grouped(
    x_ptr, w_ptr, order_ptr, plan_ptr, shares_ptr, out_ptr, SLOTS, N, K, stride_x,
    CHOSEN: tl.constexpr, GATED: tl.constexpr, TILE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0)  # the tiles of an expert run side by side, and share what they read
    expert = tl.load(plan_ptr + slot)
    if expert < 0:
        return
    place = tl.load(plan_ptr + SLOTS + slot) + tl.arange(0, TILE)
    here = place < tl.load(plan_ptr + 2 * SLOTS + slot)
    pair = tl.load(order_ptr + place, mask=here, other=0)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = columns < N
    k = tl.arange(0, BLOCK_K)
    total = tl.zeros((TILE, BLOCK_N), dtype=tl.float32)
    up = tl.zeros((TILE, BLOCK_N), dtype=tl.float32)
    if GATED:
        source = (pair // CHOSEN).to(tl.int64)
        matrix = w_ptr + expert.to(tl.int64) * K * (2 * N)
    else:
        source = place.to(tl.int64)
        matrix = w_ptr + expert.to(tl.int64) * K * N
    x_at = x_ptr + source[:, None] * stride_x + k[None, :]
    at = matrix + columns[None, :].to(tl.int64) * K + k[:, None]
    for start in range(0, K, BLOCK_K):
        left = k < K - start
        x = tl.load(x_at + start, mask=here[:, None] & left[None, :], other=0.0)
        mask = left[:, None] & inside[None, :]
        w = tl.load(at + start, mask=mask, other=0.0)
        total = tl.dot(x, w, total, input_precision=EXACT)
        if GATED:
            w = tl.load(at + N.to(tl.int64) * K + start, mask=mask, other=0.0)
            up = tl.dot(x, w, up, input_precision=EXACT)
    if GATED:
        total = total / (1.0 + tl.exp(-total)) * up
        row = place.to(tl.int64)
    else:
        total *= tl.load(shares_ptr + pair, mask=here, other=0.0)[:, None]
        row = pair.to(tl.int64)
    out_at = out_ptr + row[:, None] * N + columns[None, :]
    tl.store(out_at, total.to(out_ptr.dtype.element_ty), mask=here[:, None] & inside[None, :])


@triton.jit
def _sum(
    terms_ptr, experts_ptr, out_ptr, FIRST, HELD, WIDTH, stride_out,
    CHOSEN: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < WIDTH
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for i in range(CHOSEN):
        pair = row * CHOSEN + i
        expert = tl.load(experts_ptr + pair).to(tl.int32) - FIRST
        held = inside & (expert >= 0) & (expert < HELD)
        total += tl.load(terms_ptr + pair * WIDTH + at, mask=held, other=0.0).to(tl.float32)
    out_at = out_ptr + row * stride_out + at
    if ADD:
        total += tl.load(out_at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_at, total.to(out_ptr.dtype.element_ty), mask=inside)


def route(
    scores: Tensor, chosen: int, normalised: bool, slots: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As `hexswarm.kernels.reference.route`; of equal scores the first expert comes first.

    A row whose slot is negative (there is no such session), and one of scores that are no numbers,
    goes to an expert that there is not.
    """
    rows, experts = scores.shape
    shares = torch.empty(rows, chosen, dtype=torch.float32, device=scores.device)
    found = torch.empty(rows, chosen, dtype=torch.int32, device=scores.device)
    _route[(rows,)](
        *(scores, scores if slots is None else slots, shares, found, experts, scores.stride(0)),
        CHOSEN=chosen, ROOM=triton.next_power_of_2(chosen), NORMALISED=normalised,
        BLOCK=triton.next_power_of_2(experts), SLOTS=slots is not None, num_warps=1,
    )  # fmt: skip
    return shares, found


def mix(
    x: Tensor,
    shares: Tensor,
    experts: Tensor,
    gate_up: Tensor,
    down: Tensor,
    first: int = 0,
    *,
    out: Tensor | None = None,
    add: bool = False,
) -> Tensor:
    """As `hexswarm.kernels.reference.mix`, into `out` if given; `add`: to what is there.

    The weights are views `[experts, in, out]` of what lies `[experts, out, in]`.
    """
    (rows, hidden), chosen = x.shape, experts.shape[1]
    held, width = len(down), down.shape[1]
    if out is None:
        out = torch.empty(rows, hidden, dtype=x.dtype, device=x.device)
    if not (held and width and rows):
        return out if add else out.zero_()
    tile = ROWS if rows <= FEW else MANY
    order, plan = sort(experts, first, held, tile)
    inner = torch.empty(rows * chosen, width, dtype=x.dtype, device=x.device)
    wide = torch.float32 if rows <= FEW else x.dtype  # of a long prompt they would take too much
    terms = torch.empty(rows * chosen, hidden, dtype=wide, device=x.device)
    _multiply(x, gate_up, order, plan, shares, inner, tile, gated=True)
    _multiply(inner, down, order, plan, shares, terms, tile, gated=False)
    _sum[(rows, triton.cdiv(hidden, 1024))](
        *(terms, experts, out, first, held, hidden, out.stride(0)),
        CHOSEN=chosen, ADD=add, BLOCK=1024, num_warps=4,
    )  # fmt: skip
    return out


def sort(experts: Tensor, first: int, held: int, tile: int) -> tuple[Tensor, Tensor]:
    """Pairs by expert, of those in [first, first + held), and the slots they are cut into.

    Of each slot: the expert among those held or -1, its first place in the order, the expert's end.
    """
    pairs = experts.numel()
    slots = most_slots(pairs, held, tile)
    order = torch.empty(pairs, dtype=torch.int32, device=experts.device)
    plan = torch.empty(3, slots, dtype=torch.int32, device=experts.device)
    _sort[(held,)](
        *(experts, order, plan, pairs, slots, first, held),
        APART=slots == pairs, TILE=tile, num_warps=4,
        BLOCK=min(triton.next_power_of_2(max(pairs, slots)), _SCAN),
    )  # fmt: skip
    return order, plan


def most_slots(pairs: int, held: int, tile: int) -> int:
    """Slots enough for any choice."""
    return min(pairs, pairs // tile + held)


def _multiply(
    x: Tensor,
    weight: Tensor,
    order: Tensor,
    plan: Tensor,
    shares: Tensor,
    out: Tensor,
    tile: int,
    *,
    gated: bool,
) -> None:
    """Each pair by its expert's matrix: from tokens to places, or from places to pairs."""
    lying = weight.transpose(1, 2)
    assert lying.is_contiguous()
    assert shares.is_contiguous()
    assert x.stride(1) == 1
    outputs, slots = out.shape[1], plan.shape[1]
    block_n, block_k, warps, stages = _shape(tile, gated, x)
    _grouped[(slots, triton.cdiv(outputs, block_n))](
        *(x, lying, order, plan, shares, out, slots, outputs, x.shape[1], x.stride(0)),
        CHOSEN=shares.shape[1], GATED=gated, TILE=tile, BLOCK_N=block_n, BLOCK_K=block_k,
        EXACT="ieee" if x.dtype == torch.float32 else "tf32", num_warps=warps, num_stages=stages,
    )  # fmt: skip


def _shape(tile: int, gated: bool, x: Tensor) -> tuple[int, int, int, int]:
    """Block of outputs, block of inputs, warps and stages: as long as the stages fit the device."""
    if tile == ROWS:
        block_n, block_k, warps, stages = (32, 128, 2, 3) if gated else (32, 256, 2, 3)
    else:
        block_n, block_k, warps, stages = (64, 64, 4, 3) if gated else (128, 64, 4, 3)
    size = x.dtype.itemsize
    rows = tile + (2 * block_n if gated else block_n)
    while block_k > 32 and rows * block_k * stages * size > shared(x.device):
        block_k //= 2
    return block_n, block_k, warps, stages
