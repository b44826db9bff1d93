"""Matrix products for up to 16 tokens with weights of 4 bits (Triton).

The floor is half a byte a weight, so little that arithmetic decides: an H100 does 30 T instructions
a second, which keeps up with the 3.1 TB/s of its memory at less than 5 a weight. Two forms:

- *vector*: each weight becomes a float by its bits, is multiplied by x, then by its
  scale, in the units for single numbers; 7.7 instructions a weight and token.
- *matrix* (16-bit x): words become pairs of 16-bit numbers and go to the matrix units as the left
  operand, straight from registers, x as the right one; 2.3 instructions a weight for 8 tokens at
  once, 2.8 for 16.

Two things make that low count. Words hold nibble i of eight groups side by side
(`hexswarm.kernels.quantise`), so a tile of words is eight operands over the same places of eight
groups, and each product has one scale for each output behind it, in float32. And two words at a
time are widened in pairs: two permutations bring their low and their high halves together, a shift
and one logic instruction put two nibbles into the mantissas of a pair of 128s (float16: 1024s), and
one fused multiply-add takes 136 (1032) off, exactly. Said in Triton, the same conversion is 5.2
instructions, most of them from integer to float at a quarter of the speed, and was twice as slow as
the vector form; so it is written in PTX, and the plain words serve the interpreter and other GPUs.

On an H100 the four products of a 70B layer take 300 us in the vector form for one token, and for
16 tokens 4.1 ms; in the matrix form 235 us for 16, 214 for 8 (bfloat16: 587). The eight scales that
belong to a word come as 16 bytes, and 8 tokens leave room in the registers for two matrices.

Rejected: a sum of x taken off once for each group instead of 136 from each pair, which needs a pass
over x before; pairs multiplied in 16 bits, which loses what float32 sums keep; rows beyond the last
token that read the last one's x again instead of being masked (their loads wait for each other: 1.5
times as long for one token); K in two parts side by side, for more warps (1.3 times as long).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hexswarm.kernels.quantise import Quantised

FORM = "matrix"
"""Of the two, with 16-bit x."""
SHAPE = (32, 64, 2, 3)
"""Outputs and words of a tile, warps, stages of the matrix form."""

_PAIRS = """
{{
.reg .b32 low, high, one, off, a, b, c, d, e, f, g, h;
mov.b32 one, {one};
mov.b32 off, {off};
prmt.b32 low, $8, $9, 0x5410;
prmt.b32 high, $8, $9, 0x7632;
shr.u32 b, low, 4;
shr.u32 c, low, 8;
shr.u32 d, low, 12;
shr.u32 f, high, 4;
shr.u32 g, high, 8;
shr.u32 h, high, 12;
lop3.b32 a, low, 0x000F000F, {magic}, 0xEA;
lop3.b32 b, b, 0x000F000F, {magic}, 0xEA;
lop3.b32 c, c, 0x000F000F, {magic}, 0xEA;
lop3.b32 d, d, 0x000F000F, {magic}, 0xEA;
lop3.b32 e, high, 0x000F000F, {magic}, 0xEA;
lop3.b32 f, f, 0x000F000F, {magic}, 0xEA;
lop3.b32 g, g, 0x000F000F, {magic}, 0xEA;
lop3.b32 h, h, 0x000F000F, {magic}, 0xEA;
fma.rn.{kind} $0, a, one, off;
fma.rn.{kind} $1, b, one, off;
fma.rn.{kind} $2, c, one, off;
fma.rn.{kind} $3, d, one, off;
fma.rn.{kind} $4, e, one, off;
fma.rn.{kind} $5, f, one, off;
fma.rn.{kind} $6, g, one, off;
fma.rn.{kind} $7, h, one, off;
}}
"""
_BFLOAT = tl.constexpr(
    _PAIRS.format(kind="bf16x2", magic="0x43004300", one="0x3F803F80", off="0xC308C308")
)
_HALF = tl.constexpr(
    _PAIRS.format(kind="f16x2", magic="0x64006400", one="0x3C003C00", off="0xE408E408")
)


@triton.jit
def _step(words, i: tl.constexpr, kind: tl.constexpr):
    return (((words >> (4 * i)) & 15) - 8).to(kind)


@triton.jit
def _steps(words, kind: tl.constexpr, PTX: tl.constexpr):
    """The nibbles of `words` as numbers from -8 to 7: eight tiles, lowest nibble first."""
    if PTX and kind == tl.bfloat16:
        found = tl.inline_asm_elementwise(
            _BFLOAT, "=r,=r,=r,=r,=r,=r,=r,=r,r,r", [words],
            dtype=(tl.bfloat16,) * 8, is_pure=True, pack=2,
        )  # fmt: skip
    elif PTX:
        found = tl.inline_asm_elementwise(
            _HALF, "=r,=r,=r,=r,=r,=r,=r,=r,r,r", [words],
            dtype=(tl.float16,) * 8, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        found = (
            _step(words, 0, kind), _step(words, 1, kind), _step(words, 2, kind),
            _step(words, 3, kind), _step(words, 4, kind), _step(words, 5, kind),
            _step(words, 6, kind), _step(words, 7, kind),
        )  # fmt: skip
    return found


@triton.jit
def _tile(
    total, x_at, here, w_ptr, scale_ptr, columns, inside, at, j, K,
    GROUP: tl.constexpr, PTX: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """`total` `[outputs, rows]` with the products of one tile of words."""
    word_at = w_ptr + columns[:, None] * (K // 8) + (at + j)[None, :]
    words = tl.load(word_at, mask=inside[:, None], other=0)
    steps = _steps(words, x_at.dtype.element_ty, PTX)
    scale_at = scale_ptr.to(tl.pointer_type(tl.int64), bitcast=True)
    scale_at += columns * (K // (4 * GROUP)) + at // GROUP * 2
    low = tl.load(scale_at, mask=inside, other=0)
    high = tl.load(scale_at + 1, mask=inside, other=0)
    for i in tl.static_range(8):
        x = tl.load(x_at + i * GROUP, mask=here[None, :], other=0.0)
        bits = (low if i < 4 else high) >> (16 * (i % 4))
        scale = bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        total += tl.dot(steps[i], x, input_precision=EXACT) * scale[:, None]
    return total


@triton.jit(do_not_specialize=["M"])
def _matrix4(
    x_ptr, w_ptr, scale_ptr, bias_ptr, out_ptr, M, N, K, stride_x, stride_out,
    GATED: tl.constexpr, ADD: tl.constexpr, BIAS: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr, WORDS: tl.constexpr, ROWS: tl.constexpr, PTX: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = columns < N
    rows = tl.arange(0, ROWS)
    here = rows < M
    j = tl.arange(0, WORDS)
    total = tl.zeros((BLOCK_N, ROWS), dtype=tl.float32)
    up = tl.zeros((BLOCK_N, ROWS), dtype=tl.float32)
    for at in range(0, K // 8, WORDS):
        first = tl.multiple_of(at // GROUP * (8 * GROUP) + at % GROUP, WORDS)
        x_at = x_ptr + rows[None, :] * stride_x + (first + j)[:, None]
        total = _tile(
            total, x_at, here, w_ptr, scale_ptr, columns, inside, at, j, K, GROUP, PTX, EXACT
        )
        if GATED:
            up = _tile(
                up, x_at, here, w_ptr, scale_ptr, columns + N, inside, at, j, K, GROUP, PTX, EXACT
            )
    if BIAS:
        total += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)[:, None]
        if GATED:
            up += tl.load(bias_ptr + columns + N, mask=inside, other=0.0).to(tl.float32)[:, None]
    if GATED:
        total = total / (1.0 + tl.exp(-total)) * up
    out_at = out_ptr + rows[None, :] * stride_out + columns[:, None]
    mask = here[None, :] & inside[:, None]
    if ADD:
        total += tl.load(out_at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_at, total.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _sum4(sums, x_ptr, w_ptr, scale_ptr, columns, inside, start, K, GROUP: tl.constexpr):
    """`sums` `[BLOCK_N, GROUP]` with the products of 8 * GROUP inputs."""
    j = tl.arange(0, GROUP)
    at = w_ptr + columns[:, None] * (K // 8) + (start // 8 + j)[None, :]
    words = tl.load(at, mask=inside[:, None], other=0)
    scale_at = scale_ptr + columns * (K // GROUP) + start // GROUP
    for i in tl.static_range(8):
        x = tl.load(x_ptr + start + i * GROUP + j).to(tl.float32)[None, :]
        scale = tl.load(scale_at + i, mask=inside, other=0.0).to(tl.float32)[:, None]
        if 4 * i <= 19:  # 1 + step / 16, by its bits
            bits = ((words << (19 - 4 * i)) & 0x780000) | 0x3F800000
        else:
            bits = ((words >> (4 * i - 19)) & 0x780000) | 0x3F800000
        sums += (bits.to(tl.float32, bitcast=True) * x - 1.5 * x) * scale
    return sums


@triton.jit
def _vector4(
    x_ptr, w_ptr, scale_ptr, bias_ptr, out_ptr, N, K, stride_x, stride_out,
    GATED: tl.constexpr, ADD: tl.constexpr, BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = columns < N
    row = tl.program_id(1)
    sums = tl.zeros((BLOCK_N, GROUP), dtype=tl.float32)
    ups = tl.zeros((BLOCK_N, GROUP), dtype=tl.float32)
    x_ptr += row * stride_x
    for start in range(0, K, 8 * GROUP):
        sums = _sum4(sums, x_ptr, w_ptr, scale_ptr, columns, inside, start, K, GROUP)
        if GATED:
            ups = _sum4(ups, x_ptr, w_ptr, scale_ptr, columns + N, inside, start, K, GROUP)
    total = 16.0 * tl.sum(sums, axis=1)
    if BIAS:
        total += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        up = 16.0 * tl.sum(ups, axis=1)
        if BIAS:
            up += tl.load(bias_ptr + columns + N, mask=inside, other=0.0).to(tl.float32)
        total = total / (1.0 + tl.exp(-total)) * up
    out_at = out_ptr + row * stride_out + columns
    if ADD:
        total += tl.load(out_at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_at, total.to(out_ptr.dtype.element_ty), mask=inside)


def linear4(
    x: Tensor,
    weight: Quantised,
    out: Tensor,
    *,
    bias: Tensor | None = None,
    gated: bool = False,
    add: bool = False,
    form: str | None = None,
    shape: tuple[int, int, int, int] | None = None,
) -> Tensor:
    """As `hexswarm.kernels.linear.linear`, of which this is the part for 4 bits.

    `form` "matrix" or "vector" and `shape`, of the matrix form, are to be tried out.
    """
    tokens, inputs = x.shape
    outputs, group = out.shape[1], inputs // weight.scales.shape[1]
    pointers = (x, weight.values, weight.scales, x if bias is None else bias, out)
    strides = (outputs, inputs, x.stride(0), out.stride(0))
    fixed = {"GATED": gated, "ADD": add, "BIAS": bias is not None, "GROUP": group}
    if form is None:
        form = "matrix" if shape else "vector" if x.dtype == torch.float32 else FORM
    if form == "vector":
        grid = (triton.cdiv(outputs, 4), tokens)
        _vector4[grid](*pointers, *strides, **fixed, BLOCK_N=4, num_warps=1, num_stages=3)
        return out
    block_n, words, warps, stages = shape or SHAPE
    _matrix4[(triton.cdiv(outputs, block_n),)](
        *(*pointers, tokens, *strides), **fixed, BLOCK_N=block_n, WORDS=min(words, group),
        ROWS=8 if tokens <= 8 else 16, PTX=_speaks_ptx(x),
        EXACT="ieee" if x.dtype == torch.float32 else "tf32",
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out


def _speaks_ptx(x: Tensor) -> bool:
    """Whether pairs can be widened in PTX: not where Triton interprets, nor on AMD's GPUs."""
    return x.is_cuda and torch.version.hip is None and x.dtype in (torch.bfloat16, torch.float16)
