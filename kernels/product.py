"""Matrix products on a GPU for any number of tokens, and the widening of weights for many (Triton).

Few tokens go through `hexswarm.kernels.linear`, many through the library. How many are few follows
from the bytes that pass: 16-bit weights up to one tile of 16 tokens. int8 once for each tile: up to
four tiles that is 4 bytes a weight at most, against 5 to widen it and read it again. int4 the
same: four tiles take 1.0 ms for a 70B layer, widening alone would read and write for as long. With
float32 x int4 is read once for each token, limited by arithmetic: up to 4 tokens.

For more, few-bit weights are widened, matrix by matrix, into memory that the next one uses again.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hexswarm.kernels.elementwise import silu_mul
from hexswarm.kernels.linear import ROWS, linear
from hexswarm.kernels.quantise import Quantised

FEW = {16: ROWS, 8: 4 * ROWS, 4: 4 * ROWS}
"""Most tokens for which a product reads the weights as they are, by the bits of a weight."""
FEW_SINGLY = 4
"""The same where each token reads them anew: 4 bits with float32."""


@triton.jit
def _widen8(values_ptr, scale_ptr, out_ptr, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    values = tl.load(values_ptr + row * width + at, mask=inside, other=0).to(tl.float32)
    out = values * tl.load(scale_ptr + row)
    tl.store(out_ptr + row * width + at, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _widen4(values_ptr, scale_ptr, out_ptr, width, GROUP: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    eight = tl.program_id(1)  # groups that lie in the same words
    j = tl.arange(0, GROUP)
    words = tl.load(values_ptr + row * (width // 8) + eight * GROUP + j)
    for i in tl.static_range(8):
        scale = tl.load(scale_ptr + row * (width // GROUP) + eight * 8 + i).to(tl.float32)
        out = (((words >> (4 * i)) & 15) - 8).to(tl.float32) * scale
        at = row * width + (eight * 8 + i) * GROUP + j
        tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty))


def widen(weight: Quantised, dtype: torch.dtype) -> Tensor:
    """As `hexswarm.kernels.quantise.dequantise`: the matrix `[out, in]`."""
    outputs, inputs = weight.shape
    out = torch.empty(outputs, inputs, dtype=dtype, device=weight.values.device)
    if weight.bits == 8:
        grid = (outputs, triton.cdiv(inputs, 2048))
        _widen8[grid](weight.values, weight.scales, out, inputs, BLOCK=2048, num_warps=4)
        return out
    group = inputs // weight.scales.shape[1]
    grid = (outputs, inputs // (8 * group))
    _widen4[grid](weight.values, weight.scales, out, inputs, GROUP=group, num_warps=1)
    return out


def product(
    x: Tensor,
    weight: Tensor | Quantised,
    out: Tensor,
    *,
    bias: Tensor | None = None,
    gated: bool = False,
    add: bool = False,
) -> Tensor:
    """As `hexswarm.kernels.linear.linear`, for any number of tokens and a tensor `[in, out]`.

    That tensor is the transposed view of one that lies `[out, in]`.
    """
    bits = weight.bits if isinstance(weight, Quantised) else 16
    singly = bits == 4 and x.dtype == torch.float32
    if x.shape[0] <= (FEW_SINGLY if singly else FEW[bits]):
        lying = weight if isinstance(weight, Quantised) else weight.t()
        for first in range(0, x.shape[0], ROWS):
            tile = slice(first, first + ROWS)
            linear(x[tile], lying, out[tile], bias=bias, gated=gated, add=add)
        return out
    wide = widen(weight, x.dtype).t() if isinstance(weight, Quantised) else weight
    if gated:
        return silu_mul(_library(x, wide, bias), out)
    if not add:
        return _library(x, wide, bias, out)
    out.addmm_(x, wide)
    return out if bias is None else out.add_(bias)


def _library(x: Tensor, wide: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    return torch.mm(x, wide, out=out) if bias is None else torch.addmm(bias, x, wide, out=out)


def project(x: Tensor, weight: Tensor | Quantised, bias: Tensor | None = None) -> Tensor:
    """x @ weight + bias."""
    outputs = weight.shape[0] if isinstance(weight, Quantised) else weight.shape[1]
    out = torch.empty(x.shape[0], outputs, dtype=x.dtype, device=x.device)
    return product(x, weight, out, bias=bias)


def add_projected_(
    x: Tensor, y: Tensor, weight: Tensor | Quantised, bias: Tensor | None = None
) -> Tensor:
    """x += y @ weight + bias."""
    return product(y, weight, x, bias=bias, add=True)
