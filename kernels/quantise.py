"""Weights in few bits: rounded once when they are loaded, widened in registers when they are used.

int8: one scale for each output, the largest weight of it over 127. int4: one for each group of 128
inputs of an output (fewer where the matrix is no multiple; a matrix that does not fit at all gets 8
bits); the scale is chosen among a few below the largest weight for the least squared error, since
clipping one weight a little costs less than coarser steps for the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

GROUPS = (128, 64, 32, 16)
"""Inputs that share a scale in int4; eight groups lie in the same words."""

SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8)
"""Shares of the largest weight that are tried as the end of the int4 range."""


PIECE = 1 << 24
"""Weights that are rounded at a time: what is in between takes twenty bytes for each."""


@dataclass(frozen=True, slots=True)
class Quantised:
    """A matrix `[out, in]` in few bits.

    int8: `values` `[out, in]`. int4: eight in each int32, `[out, in / 8]`; of eight groups side by
    side, word j holds input j of each, the first lowest, all plus 8. So a word's steps are widened
    by one shift and one mask each, and multiply eight long pieces of x.
    """

    values: Tensor
    scales: Tensor
    """int8: float32 `[out]`; int4: float16 `[out, in / group]`."""
    bits: int

    @property
    def shape(self) -> tuple[int, int]:
        rows, width = self.values.shape
        return rows, width * self.values.element_size() * 8 // self.bits

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes


def quantise(weight: Tensor, bits: int) -> Quantised:
    """Round a matrix `[out, in]` to 8 or 4 bits; to 8 if `in` is no multiple of 128."""
    inputs = weight.shape[1]
    group = _group(inputs)
    pieces = weight.split(max(PIECE // inputs, 1))
    if bits == 8 or group is None:
        return join([_eight(piece) for piece in pieces])
    return join([_four(piece, group) for piece in pieces])


def rounded_bytes(outputs: int, inputs: int, bits: int) -> int:
    """What a matrix rounded to `bits` takes."""
    group = _group(inputs)
    if bits == 8 or group is None:
        return outputs * (inputs + 4)
    return outputs * (inputs // 2 + 2 * (inputs // group))


def _group(inputs: int) -> int | None:
    """Inputs of a group in int4; None if there is no such group."""
    return next((size for size in GROUPS if inputs % (8 * size) == 0), None)


def join(parts: Sequence[Quantised]) -> Quantised:
    """One matrix of the outputs of several, which have the same inputs."""
    if len(parts) == 1:
        return parts[0]
    values = torch.cat([part.values for part in parts])
    return Quantised(values, torch.cat([part.scales for part in parts]), parts[0].bits)


def dequantise(weight: Quantised, dtype: torch.dtype) -> Tensor:
    """The matrix `[out, in]` that `weight` stands for."""
    scales = weight.scales.float()
    if weight.bits == 8:
        return (weight.values.float() * scales[:, None]).to(dtype)
    rows, inputs = weight.shape
    group = inputs // scales.shape[1]
    words = weight.values.view(rows, -1, 1, group)
    shifts = torch.arange(0, 32, 4, device=words.device, dtype=torch.int32)[:, None]
    steps = ((words >> shifts) & 15).float() - 8
    return (steps.reshape(rows, -1, group) * scales[..., None]).reshape(rows, inputs).to(dtype)


def _eight(weight: Tensor) -> Quantised:
    scales = (weight.abs().amax(1).float() / 127).clamp_min(1e-12)
    values = (weight.float() / scales[:, None]).round_().clamp_(-127, 127).to(torch.int8)
    return Quantised(values, scales, 8)


def _four(weight: Tensor, group: int) -> Quantised:
    rows, inputs = weight.shape
    groups = weight.float().view(rows, -1, group)
    largest = groups.abs().amax(-1).clamp_min(1e-6)
    best = torch.full_like(largest, float("inf"))
    scales, values = torch.zeros_like(largest), torch.zeros_like(groups)
    for shrink in SHRINKS:
        scale = (largest * (shrink / 7)).half().float()
        steps = (groups / scale[..., None]).round_().clamp_(-8, 7)
        error = (steps * scale[..., None] - groups).square_().sum(-1)
        better = error < best
        best = torch.where(better, error, best)
        scales = torch.where(better, scale, scales)
        values = torch.where(better[..., None], steps, values)
    steps = (values + 8).to(torch.int32).view(rows, -1, 8, group)
    words = torch.zeros_like(steps[:, :, 0])
    for i in range(8):
        words |= steps[:, :, i] << (4 * i)
    return Quantised(words.view(rows, inputs // 8), scales.half(), 4)
