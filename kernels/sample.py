"""The choice of tokens on a GPU, for many rows, without a sort (Triton).

The rule is that of `hexswarm.kernels.choice`, and so is every number: the same token for the same
logits. Cuts and draw are all one question: which is the first token, in order of falling logit,
with which a sum of weights (or a count) reaches this? Floats in order of size are integers in order
of size, so the answer is a search for an integer, by fourths: at each step three sums of what lies
above, exact in any order since weights are whole. No token is moved.

A step of the search over a whole vocabulary is a pass over it, so first it goes over a shortlist:

1. the largest logit of each 128 (all processors; this reads the logits from memory);
2. for each row the middle one of these: half of them are above it, so are some hundred tokens;
3. those tokens into a list, and the sum of all weights (all processors, logits from the cache);
4. one program a row searches its list: cuts, draw, then the id among equals;
5. the rows whose answer lies beyond the list are searched in full, by one program each. That takes
   some hundred microseconds, and comes when the weights are flat: high temperature, no filter.

Lists fill in any order (an atomic count), which sums do not show. Bytes: the logits, once from
memory; 64 rows of 128,000 are 33 MB, 11 us of an H100. Rejected: a histogram (weights of a bin need
atomics on numbers of 64 bits: 8 million of them), sorting the lists (as many steps as the search).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hexswarm.kernels import choice

EACH = 128
"""Logits of which the largest is found first."""
ROOM = 4096
"""Tokens of a list; a row of more goes to the full search."""
_MANY = 32
_OPEN = -2

_TOP: tl.constexpr = tl.constexpr(float(choice.LARGEST))
_SHIFT: tl.constexpr = tl.constexpr(choice.SHIFT)
_NOT_FINITE: tl.constexpr = tl.constexpr(choice.NOT_FINITE)
_UNDECIDED: tl.constexpr = tl.constexpr(_OPEN)
_P1: tl.constexpr = tl.constexpr(choice.POWERS[0])
_P2: tl.constexpr = tl.constexpr(choice.POWERS[1])
_P3: tl.constexpr = tl.constexpr(choice.POWERS[2])
_P4: tl.constexpr = tl.constexpr(choice.POWERS[3])
_P5: tl.constexpr = tl.constexpr(choice.POWERS[4])
_P6: tl.constexpr = tl.constexpr(choice.POWERS[5])
_ONE: tl.constexpr = tl.constexpr(choice.ONE)
_LOWEST: tl.constexpr = tl.constexpr(-(1 << 31))


@triton.jit
def _key(x):
    """Integers in the order of floats; both zeros are one."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _logit(key):
    key = key.to(tl.int32)
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _weight(x, peak, rate):
    """As `choice.weigh`, operation by operation."""
    y = (x - peak) * rate
    y = tl.where(y > -63.0, y, -63.0)  # also what is no number
    whole = tl.floor(y)
    f = y - whole
    power = (((((_P6 * f + _P5) * f + _P4) * f + _P3) * f + _P2) * f + _P1) * f + 1.0
    number = power.to(tl.int32, bitcast=True) - _ONE
    return (number.to(tl.int64) << _SHIFT) >> (-whole).to(tl.int32).to(tl.int64)


@triton.jit
def _peaks(logits_ptr, peaks_ptr, stride, V, PEAKS, MANY: tl.constexpr, EACH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * MANY + tl.arange(0, MANY)
    at = group[:, None] * EACH + tl.arange(0, EACH)[None, :]
    x = tl.load(logits_ptr + row * stride + at, mask=at < V, other=float("-inf"))
    tl.store(peaks_ptr + row * PEAKS + group, tl.max(x, axis=1), mask=group < PEAKS)


@triton.jit
def _bound(peaks_ptr, top_ptr, state_ptr, token_ptr, PEAKS, BLOCK: tl.constexpr):
    """The largest logit of a row, and the one that half of the peaks reach."""
    row = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    peaks = tl.load(peaks_ptr + row * PEAKS + at, mask=at < PEAKS, other=float("-inf"))
    key = _key(peaks).to(tl.int64)
    top = tl.max(peaks, axis=0)
    tl.store(top_ptr + row, top)
    want = (PEAKS + 1) // 2
    lo = tl.min(tl.where(at < PEAKS, key, 1 << 31), axis=0)
    hi = tl.max(key, axis=0)
    while lo < hi:
        step = (hi - lo + 4) // 4
        hits = (tl.sum((key >= lo + step).to(tl.int32), axis=0) >= want).to(tl.int64)
        hits += (tl.sum((key >= lo + 2 * step).to(tl.int32), axis=0) >= want).to(tl.int64)
        hits += (tl.sum((key >= lo + 3 * step).to(tl.int32), axis=0) >= want).to(tl.int64)
        lo += step * hits
        hi = tl.minimum(hi, lo + step - 1)
    tl.store(state_ptr + 4 * row, lo)
    tl.store(state_ptr + 4 * row + 1, tl.zeros((), tl.int64))
    tl.store(state_ptr + 4 * row + 2, tl.zeros((), tl.int64))
    tl.store(state_ptr + 4 * row + 3, tl.zeros((), tl.int64))
    tl.store(token_ptr + row, tl.full((), _UNDECIDED, tl.int64))


@triton.jit
def _gather(
    logits_ptr, settings_ptr, top_ptr, state_ptr, values_ptr, ids_ptr, stride, V,
    ROOM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add up weights; list what reaches the bound; count what is no number."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < V
    x = tl.load(logits_ptr + row * stride + at, mask=inside, other=float("-inf"))
    rate = tl.load(settings_ptr + 5 * row).to(tl.float32)
    weight = tl.where(inside, _weight(x, tl.load(top_ptr + row), rate), 0)
    state_ptr += 4 * row
    tl.atomic_add(state_ptr + 2, tl.sum(weight, axis=0))
    fine = tl.abs(x) < float("inf")  # false for what is no number, too
    strange = tl.sum((inside & (fine == 0)).to(tl.int64), axis=0)
    tl.atomic_add(state_ptr + 3, strange, mask=strange > 0)
    listed = inside & (_key(x).to(tl.int64) >= tl.load(state_ptr))
    count = tl.sum(listed.to(tl.int64), axis=0)
    first = tl.atomic_add(state_ptr + 1, count)
    place = first + tl.cumsum(listed.to(tl.int64), axis=0) - 1
    kept = listed & (place < ROOM)
    tl.store(values_ptr + row * ROOM + place, x, mask=kept)
    tl.store(ids_ptr + row * ROOM + place, at, mask=kept)


@triton.jit
def _int(key):
    """A key, or what is above all of them."""
    return tl.minimum(key, 0x7FFFFFFF).to(tl.int32)


@triton.jit
def _read(values_ptr, ids_ptr, at, n, peak, rate, FULL: tl.constexpr):
    """Key, weight and id of some tokens; where there are no more, they weigh nothing."""
    here = at < n
    x = tl.load(values_ptr + at, mask=here, other=float("-inf"))
    key = tl.where(here, _key(x), _LOWEST)
    weight = tl.where(here, _weight(x, peak, rate), 0)
    if FULL:  # noqa: SIM108
        ids = at
    else:
        ids = tl.load(ids_ptr + at, mask=here, other=0)
    return key, weight, ids


@triton.jit
def _above(
    values_ptr, ids_ptr, n, peak, rate, key, least, FULL: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Weight of the tokens that reach `key` and weigh at least `least`."""
    total = tl.zeros((BLOCK,), tl.int64)
    for start in range(0, n, BLOCK):
        at = start + tl.arange(0, BLOCK)
        keys, weight, _ = _read(values_ptr, ids_ptr, at, n, peak, rate, FULL)
        total += tl.where((keys >= _int(key)) & (weight >= least), weight, 0)
    return tl.sum(total, axis=0)


@triton.jit
def _search(
    values_ptr, ids_ptr, n, peak, rate, lo, hi, goal, COUNTS: tl.constexpr,
    FULL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The largest key in [lo, hi] that tokens of weight (or number) `goal` reach."""
    while lo < hi:
        step = (hi - lo + 4) // 4
        low, middle, high = _int(lo + step), _int(lo + 2 * step), _int(lo + 3 * step)
        first = tl.zeros((BLOCK,), tl.int64)
        second = tl.zeros((BLOCK,), tl.int64)
        third = tl.zeros((BLOCK,), tl.int64)
        for start in range(0, n, BLOCK):
            at = start + tl.arange(0, BLOCK)
            key, amount, _ = _read(values_ptr, ids_ptr, at, n, peak, rate, FULL)
            if COUNTS:
                amount = (at < n).to(tl.int64)
            first += tl.where(key >= low, amount, 0)
            second += tl.where(key >= middle, amount, 0)
            third += tl.where(key >= high, amount, 0)
        hits = (tl.sum(first, axis=0) >= goal).to(tl.int64)
        hits += (tl.sum(second, axis=0) >= goal).to(tl.int64)
        hits += (tl.sum(third, axis=0) >= goal).to(tl.int64)
        lo += step * hits
        hi = tl.minimum(hi, lo + step - 1)
    return lo


@triton.jit
def _among(
    values_ptr, ids_ptr, n, peak, rate, key, wanted, last, FULL: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The `wanted`-th id among the tokens of this key; ids go up to `last`."""
    lo, hi = tl.zeros((), tl.int64), last.to(tl.int64)
    while lo < hi:
        step = (hi - lo + 4) // 4
        first = tl.zeros((BLOCK,), tl.int64)
        second = tl.zeros((BLOCK,), tl.int64)
        third = tl.zeros((BLOCK,), tl.int64)
        for start in range(0, n, BLOCK):
            at = start + tl.arange(0, BLOCK)
            keys, _, ids = _read(values_ptr, ids_ptr, at, n, peak, rate, FULL)
            equal = (keys == _int(key)) & (at < n)
            first += (equal & (ids < lo + step)).to(tl.int64)
            second += (equal & (ids < lo + 2 * step)).to(tl.int64)
            third += (equal & (ids < lo + 3 * step)).to(tl.int64)
        misses = (tl.sum(first, axis=0) < wanted).to(tl.int64)
        misses += (tl.sum(second, axis=0) < wanted).to(tl.int64)
        misses += (tl.sum(third, axis=0) < wanted).to(tl.int64)
        lo += step * misses
        hi = tl.minimum(hi, lo + step - 1)
    return lo


@triton.jit
def _choose(
    values_ptr, ids_ptr, settings_ptr, top_ptr, state_ptr, token_ptr, stride, V,
    ROOM: tl.constexpr, FULL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row's token out of its list, or out of the `FULL` row if that did not decide."""
    row = tl.program_id(0).to(tl.int64)
    strange = tl.load(state_ptr + 4 * row + 3)
    if strange > 0:
        tl.store(token_ptr + row, tl.full((), _NOT_FINITE, tl.int64))
    elif tl.load(token_ptr + row) == _UNDECIDED:
        values_ptr += row * stride
        ids_ptr += row * stride
        peak = tl.load(top_ptr + row)
        settings_ptr += 5 * row
        rate = tl.load(settings_ptr).to(tl.float32)
        top_k = tl.load(settings_ptr + 1).to(tl.int64)
        top_p, min_p = tl.load(settings_ptr + 2), tl.load(settings_ptr + 3)
        total = tl.load(state_ptr + 4 * row + 2)
        hi = _key(peak).to(tl.int64)
        if FULL:
            n, lo, open = V.to(tl.int64), tl.full((), _LOWEST, tl.int64), 0
            have = total
        else:
            n, lo = tl.load(state_ptr + 4 * row + 1), tl.load(state_ptr + 4 * row)
            open = (n > ROOM).to(tl.int32)
            n = tl.minimum(n, ROOM)
            have = _above(values_ptr, ids_ptr, n, peak, rate, lo, 0, FULL, BLOCK)
        mass = total
        if top_k > 0:
            if not FULL:
                open += (top_k > n).to(tl.int32)
            goal = tl.minimum(top_k, n)
            key = _search(values_ptr, ids_ptr, n, peak, rate, lo, hi, goal, True, FULL, BLOCK)
            mass = _above(values_ptr, ids_ptr, n, peak, rate, key, 0, FULL, BLOCK)
        rest = mass
        if top_p < 1.0:
            goal = tl.maximum((top_p * mass.to(tl.float64)).to(tl.int64), 1)
            open += (goal > have).to(tl.int32)
            key = _search(values_ptr, ids_ptr, n, peak, rate, lo, hi, goal, False, FULL, BLOCK)
            before = _above(values_ptr, ids_ptr, n, peak, rate, key + 1, 0, FULL, BLOCK)
            each = tl.maximum(_weight(_logit(key), peak, rate), 1)
            rest = before + (goal - before + each - 1) // each * each
        if min_p > 0.0:
            least = (min_p * _TOP).to(tl.int64)
            enough = _above(values_ptr, ids_ptr, n, peak, rate, lo, least, FULL, BLOCK)
            if FULL:
                rest = tl.minimum(rest, enough)
            else:
                beyond = _weight(_logit(lo), peak, rate) >= least
                rest = tl.where(beyond, rest, tl.minimum(rest, enough))
                open += (beyond & (rest > have)).to(tl.int32)
        draw = tl.load(settings_ptr + 4) * rest.to(tl.float64)
        goal = tl.minimum(draw.to(tl.int64), rest - 1) + 1
        open += (goal > have).to(tl.int32)
        if open == 0:
            key = _search(values_ptr, ids_ptr, n, peak, rate, lo, hi, goal, False, FULL, BLOCK)
            before = _above(values_ptr, ids_ptr, n, peak, rate, key + 1, 0, FULL, BLOCK)
            each = tl.maximum(_weight(_logit(key), peak, rate), 1)
            wanted = (goal - before + each - 1) // each
            token = _among(values_ptr, ids_ptr, n, peak, rate, key, wanted, V - 1, FULL, BLOCK)
            tl.store(token_ptr + row, token)


def pick(logits: Tensor, settings: Tensor) -> Tensor:
    """As `hexswarm.kernels.choice.pick`; `settings` lie beside the logits. Nothing waits."""
    rows, vocabulary = logits.shape
    device, peaks = logits.device, triton.cdiv(vocabulary, EACH)
    tops = torch.empty(rows, peaks + 1, device=device)
    state = torch.empty(rows, 4, dtype=torch.int64, device=device)
    tokens = torch.empty(rows, dtype=torch.int64, device=device)
    values = torch.empty(rows, ROOM, device=device)
    ids = torch.empty(rows, ROOM, dtype=torch.int32, device=device)
    groups, top = tops.view(-1)[: rows * peaks], tops.view(-1)[rows * peaks :]
    stride = logits.stride(0)
    exact = {"enable_fp_fusion": False}
    _peaks[(rows, triton.cdiv(peaks, _MANY))](
        logits, groups, stride, vocabulary, peaks, MANY=_MANY, EACH=EACH, num_warps=4
    )
    _bound[(rows,)](
        groups, top, state, tokens, peaks, BLOCK=triton.next_power_of_2(peaks), num_warps=4
    )
    _gather[(rows, triton.cdiv(vocabulary, 4096))](
        *(logits, settings, top, state, values, ids, stride, vocabulary),
        ROOM=ROOM, BLOCK=4096, num_warps=8, **exact,
    )  # fmt: skip
    for full, block, warps in ((False, 1024, 8), (True, 8192, 32)):
        _choose[(rows,)](
            *(logits if full else values, ids, settings, top, state, tokens),
            *(stride if full else ROOM, vocabulary),
            ROOM=ROOM, FULL=full, BLOCK=block, num_warps=warps, **exact,
        )  # fmt: skip
    return tokens
