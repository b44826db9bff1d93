"""Activations in 8 bits, for links that are slower than the layers (Triton).

`hexswarm.kernels.reference` says what they mean: 64 numbers share a bfloat16 scale, so a row takes
0.52 of its bytes in bfloat16. No frame carries them yet. One program takes whole scales of one row,
reads each number once and writes each result once: the floor is those bytes.

Both directions give the reference's bits. Division is rounded as the standard says, and to the
nearest whole number, halves to even, by adding 1.5 * 2^23 and taking it off again.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hexswarm.kernels import reference

_SHARES = 16
"""Scales of a program."""
_STEP: tl.constexpr = tl.constexpr(reference.STEP)
_ROUND: tl.constexpr = tl.constexpr(12582912.0)


@triton.jit
def _narrow(
    x_ptr, values_ptr, scales_ptr, width, shares, stride, COUNT: tl.constexpr, SHARE: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    share = tl.program_id(1) * COUNT + tl.arange(0, COUNT)
    at = share[:, None] * SHARE + tl.arange(0, SHARE)[None, :]
    x = tl.load(x_ptr + row * stride + at, mask=at < width, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(x), axis=1)
    bits = (largest * _STEP).to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536  # the interpreter would cut it off
    divisor = bits.to(tl.float32, bitcast=True)
    scale = divisor.to(tl.bfloat16)
    safe = tl.where(divisor > 0, divisor, 1.0)[:, None] + tl.zeros_like(x)
    steps = tl.where(divisor[:, None] > 0, tl.div_rn(x, safe), 0.0)
    steps = tl.minimum(tl.maximum((steps + _ROUND) - _ROUND, -127.0), 127.0)
    tl.store(values_ptr + row * width + at, steps.to(tl.int8), mask=at < width)
    tl.store(scales_ptr + row * shares + share, scale, mask=share < shares)


@triton.jit
def _widen(
    values_ptr, scales_ptr, out_ptr, width, shares, COUNT: tl.constexpr, SHARE: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    share = tl.program_id(1) * COUNT + tl.arange(0, COUNT)
    at = share[:, None] * SHARE + tl.arange(0, SHARE)[None, :]
    values = tl.load(values_ptr + row * width + at, mask=at < width, other=0).to(tl.float32)
    scale = tl.load(scales_ptr + row * shares + share, mask=share < shares, other=0.0)
    out = values * scale.to(tl.float32)[:, None]
    tl.store(out_ptr + row * width + at, out.to(out_ptr.dtype.element_ty), mask=at < width)


def narrow(x: Tensor) -> tuple[Tensor, Tensor]:
    """As `hexswarm.kernels.reference.narrow`; rows of `x` may lie apart."""
    tokens, width = x.shape
    shares = triton.cdiv(width, reference.SHARE)
    values = torch.empty(tokens, width, dtype=torch.int8, device=x.device)
    scales = torch.empty(tokens, shares, dtype=torch.bfloat16, device=x.device)
    _narrow[(tokens, triton.cdiv(shares, _SHARES))](
        *(x, values, scales, width, shares, x.stride(0)),
        COUNT=_SHARES, SHARE=reference.SHARE, num_warps=4,
    )  # fmt: skip
    return values, scales


def widen(values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """As `hexswarm.kernels.reference.widen`."""
    tokens, width = values.shape
    out = torch.empty(tokens, width, dtype=dtype, device=values.device)
    shares = scales.shape[1]
    _widen[(tokens, triton.cdiv(shares, _SHARES))](
        *(values, scales, out, width, shares), COUNT=_SHARES, SHARE=reference.SHARE, num_warps=4
    )
    return out
