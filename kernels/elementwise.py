"""RMS norm and SiLU times up for batches too large for `hexswarm.kernels.linear` (Triton)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rms_norm(x_ptr, weight_ptr, out_ptr, width, stride_x, stride_out, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    x = tl.load(x_ptr + row * stride_x + at, mask=inside, other=0.0).to(tl.float32)
    root = tl.rsqrt(tl.sum(x * x) / width + eps)
    weight = tl.load(weight_ptr + at, mask=inside, other=0.0).to(tl.float32)
    out = x * root * weight
    tl.store(out_ptr + row * stride_out + at, out.to(out_ptr.dtype.element_ty), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight of `[rows, width]`, in float32 between."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    width = x.shape[-1]
    block = triton.next_power_of_2(width)
    _rms_norm[(x.shape[0],)](
        *(x, weight, out, width, x.stride(0), out.stride(0), eps),
        BLOCK=block, num_warps=min(max(block // 512, 1), 16),
    )  # fmt: skip
    return out


@triton.jit
def _silu_mul(x_ptr, out_ptr, width, stride_x, stride_out, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    gate = tl.load(x_ptr + row * stride_x + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * stride_x + width + at, mask=inside, other=0.0).to(tl.float32)
    out = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + row * stride_out + at, out.to(out_ptr.dtype.element_ty), mask=inside)


def silu_mul(gate_up: Tensor, out: Tensor | None = None) -> Tensor:
    """silu(gate) * up of `[rows, 2 * width]`, gate first."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    if out is None:
        out = torch.empty(rows, width, dtype=gate_up.dtype, device=gate_up.device)
    grid = (rows, triton.cdiv(width, 1024))
    _silu_mul[grid](gate_up, out, width, gate_up.stride(0), out.stride(0), BLOCK=1024, num_warps=4)
    return out
