"""Matrix products for a few tokens, where reading the weights is all the work (Triton).

    out = x @ W.T        out = silu(x @ gate.T) * (x @ up.T)        out += x @ W.T

At decode a layer reads every weight once and does two operations with each and token: the floor is
bytes / bandwidth up to some hundred tokens. Each program owns `BLOCK_N` outputs for all tokens and
all of K: no split, hence no second pass, and a row's sum runs in the same order whatever the batch.
Weights lie `[out, in]`, so that a program reads long rows. SiLU and the residual come along, since
each would be a launch and a pass of its own. For more than `ROWS` tokens the library's products
win (here x would come from the second-level cache once per program).

Measured on an H100 (us; the library's product beside it), batch 1, 8B shape: qkv 20.1 (22.6),
o 14.2 (14.3), gate-up 82.0 (80.7), down 42.6 (44.0). Rejected: the RMS norm inside (33 for qkv, a
kernel of its own costs 3: x has to pass through registers on its way to the matrix units).

Quantised weights (`hexswarm.kernels.quantise`) are widened in registers: int8 here, with one scale
for each output; int4 in `hexswarm.kernels.linear4`.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from hexswarm.kernels.linear4 import linear4
from hexswarm.kernels.quantise import Quantised

ROWS = 16
"""Most tokens of a batch."""


@triton.jit(do_not_specialize=["M"])  # compiled once for any number of tokens
def _linear(
    x_ptr, w_ptr, scale_ptr, bias_ptr, out_ptr, M, N, K, stride_x, stride_out,
    GATED: tl.constexpr, ADD: tl.constexpr, BIAS: tl.constexpr, BITS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EXACT: tl.constexpr, ONE: tl.constexpr,
):  # fmt: skip
    rows = tl.arange(0, 16)
    here = rows < 1 if ONE else rows < M
    columns = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = columns < N
    k = tl.arange(0, BLOCK_K)
    total = tl.zeros((16, BLOCK_N), dtype=tl.float32)
    up = tl.zeros((16, BLOCK_N), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        left = k < K - start
        x_at = x_ptr + rows[:, None] * stride_x + (start + k)[None, :]
        x = tl.load(x_at, mask=here[:, None] & left[None, :], other=0.0)
        at = w_ptr + columns[None, :] * K + (start + k)[:, None]
        mask = left[:, None] & inside[None, :]
        total = tl.dot(x, tl.load(at, mask=mask, other=0).to(x.dtype), total, input_precision=EXACT)
        if GATED:
            w = tl.load(at + N.to(tl.int64) * K, mask=mask, other=0).to(x.dtype)
            up = tl.dot(x, w, up, input_precision=EXACT)
    if BITS == 8:
        total *= tl.load(scale_ptr + columns, mask=inside, other=0.0)[None, :]
        if GATED:
            up *= tl.load(scale_ptr + columns + N, mask=inside, other=0.0)[None, :]
    if BIAS:
        total += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
        if GATED:
            up += tl.load(bias_ptr + columns + N, mask=inside, other=0.0).to(tl.float32)[None, :]
    if GATED:
        total = total / (1.0 + tl.exp(-total)) * up
    out_at = out_ptr + rows[:, None] * stride_out + columns[None, :]
    mask = here[:, None] & inside[None, :]
    if ADD:
        total += tl.load(out_at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_at, total.to(out_ptr.dtype.element_ty), mask=mask)


def linear(
    x: Tensor,
    weight: Tensor | Quantised,
    out: Tensor,
    *,
    bias: Tensor | None = None,
    gated: bool = False,
    add: bool = False,
    shape: tuple[int, int, int, int] | None = None,
) -> Tensor:
    """`out` = x @ weight.T + bias, for `[tokens, in]`, at most `ROWS`, and `[out, in]`.

    `gated`: `weight` is gate then up, `[2 * out, in]`. `add`: adds to what is in `out`. `shape`:
    block of outputs, block of inputs, warps and stages, to be tried out.
    """
    tokens, inputs = x.shape
    outputs = weight.shape[0] // 2 if gated else weight.shape[0]
    assert tokens <= ROWS
    if isinstance(weight, Quantised) and weight.bits == 4:
        return linear4(x, weight, out, bias=bias, gated=gated, add=add, shape=shape)
    few = isinstance(weight, Quantised)
    values, scales = (weight.values, weight.scales) if few else (weight, weight)
    assert values.is_contiguous()
    if shape is None:
        shape = _shape(outputs, gated, few)
        shape = _fitting(shape, gated, x.dtype.itemsize, values.element_size(), x.device)
    block_n, block_k, warps, stages = shape
    _linear[(triton.cdiv(outputs, block_n),)](
        *(x, values, scales, x if bias is None else bias, out),
        *(tokens, outputs, inputs, x.stride(0), out.stride(0)),
        GATED=gated, ADD=add, BIAS=bias is not None, BITS=8 if few else 16,
        BLOCK_N=block_n, BLOCK_K=block_k, EXACT="ieee" if x.dtype == torch.float32 else "tf32",
        ONE=few and tokens == 1,  # 7 % of a step with int8, nothing with whole weights
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out


def _shape(outputs: int, gated: bool, few: bool) -> tuple[int, int, int, int]:
    """The best of those tried on an H100, for weights of 8 bits if `few`."""
    if few:
        return 32, 512, 4, 3
    if gated:
        return 32, 128, 2, 3
    return (16, 512, 2, 3) if outputs < 8192 else (32, 512, 2, 3)


def _fitting(
    shape: tuple[int, int, int, int], gated: bool, wide: int, narrow: int, device: torch.device
) -> tuple[int, int, int, int]:
    """`shape` with a shorter block of inputs where its stages would not fit the device."""
    block_n, block_k, warps, stages = shape
    columns = 2 * block_n if gated else block_n
    while block_k > 32 and (16 * wide + columns * narrow) * block_k * stages > shared(device):
        block_k //= 2
    return block_n, block_k, warps, stages


@lru_cache(maxsize=16)
def shared(device: torch.device) -> int:
    """Bytes of shared memory for a program's tiles: of 227 KB on an H100, 99 on a gamer's card."""
    if device.type != "cuda":
        return 1 << 30
    properties = torch.cuda.get_device_properties(device)
    most = int(getattr(properties, "shared_memory_per_block_optin", 64 << 10))
    return most - (8 << 10)  # reductions and changes of layout need some
