"""Weights in few bits: rounded once when they are loaded, widened in registers when they are used.

int8: one scale for each output, the largest weight of it over 127. int4: one for each group of 128
inputs of an output (fewer where the matrix is no multiple; a matrix that does not fit at all gets 8
bits); the scale is chosen among a few below the largest weight for the least squared error, since
clipping one weight a little costs less than coarser steps for the others.

A GGUF file's Q4_0 is that very form with groups of 32, but for the order of its bits: `repack` puts
them into ours, and not one number changes. Where 32 does not divide the inputs into eights of
groups, 16 may: each block is two groups of one scale. Its other types do not fit: Q8_0 has a scale
for each 32 weights where our int8 has one for a row, Q4_1 and the K types have an offset, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

GROUPS = (128, 64, 32, 16)
"""Inputs that share a scale in int4; eight groups lie in the same words."""

FILE_GROUPS = (32, 16)
"""The same for a file with Q4_0, whose blocks have 32; other types in it are rounded likewise."""

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

    def to(self, device: torch.device) -> Quantised:
        return Quantised(self.values.to(device), self.scales.to(device), self.bits)


def quantise(weight: Tensor, bits: int, groups: Sequence[int] = GROUPS) -> Quantised:
    """Round a matrix `[out, in]` to 8 or 4 bits; to 8 if `in` is no multiple of 128."""
    inputs = weight.shape[1]
    group = _group(inputs, groups)
    pieces = weight.split(max(PIECE // inputs, 1))
    if bits == 8 or group is None:
        return join([_eight(piece) for piece in pieces])
    return join([_four(piece, group) for piece in pieces])


def rounded_bytes(outputs: int, inputs: int, bits: int, groups: Sequence[int] = GROUPS) -> int:
    """What a matrix rounded to `bits` takes."""
    group = _group(inputs, groups)
    if bits == 8 or group is None:
        return outputs * (inputs + 4)
    return outputs * (inputs // 2 + 2 * (inputs // group))


def _group(inputs: int, groups: Sequence[int]) -> int | None:
    """Inputs of a group in int4; None if there is no such group."""
    return next((size for size in groups if inputs % (8 * size) == 0), None)


def kept_group(columns: range) -> int | None:
    """Inputs of a group if of Q4_0 these can be kept; None if they have to be rounded anew."""
    begins = [size for size in FILE_GROUPS if columns.start % size == 0]
    return _group(len(columns), begins)


def repack(blocks: Tensor, columns: range) -> Quantised:
    """`columns`, for which there is a `kept_group`, of a matrix in Q4_0: the same numbers.

    `blocks` `[out, bytes]` are the file's: of 32 weights each, a float16 scale, then 16 bytes, of
    which byte j has weight j in its low and weight j + 16 in its high half, plus 8 as ours.
    """
    group = kept_group(columns)
    assert group is not None
    rows, inputs, device = len(blocks), len(columns), blocks.device
    values = torch.empty(rows, inputs // 8, dtype=torch.int32, device=device)
    scales = torch.empty(rows, inputs // group, dtype=torch.float16, device=device)
    met = slice(columns.start // 32, -(-columns.stop // 32))
    for here in _pieces(rows, inputs):
        found = blocks[here].reshape(-1, blocks.shape[1] // 18, 18)[:, met]
        halves = torch.stack((found[..., 2:] & 15, found[..., 2:] >> 4), 2).flatten(1)
        skipped = columns.start % 32
        steps = halves[:, skipped : skipped + inputs]
        values[here] = _pack(steps.reshape(len(steps), -1, 8, group))
        each = found[..., :2].contiguous().view(torch.float16).expand(-1, -1, 2).flatten(1)
        scales[here] = each[:, skipped // 16 :: group // 16][:, : inputs // group]
    return Quantised(values, scales, 4)


def _pieces(rows: int, inputs: int) -> list[slice]:
    step = max(PIECE // inputs, 1)
    return [slice(first, min(first + step, rows)) for first in range(0, rows, step)]


def join(parts: Sequence[Quantised]) -> Quantised:
    """One matrix of the outputs of several, which have the same inputs."""
    if len(parts) == 1:
        return parts[0]
    values = torch.cat([part.values for part in parts])
    return Quantised(values, torch.cat([part.scales for part in parts]), parts[0].bits)


def dequantise(weight: Quantised, dtype: torch.dtype) -> Tensor:
    """The matrix `[out, in]` that `weight` stands for."""
    out = torch.empty(*weight.shape, dtype=dtype, device=weight.values.device)
    for here in _pieces(*weight.shape):
        part = Quantised(weight.values[here], weight.scales[here], weight.bits)
        out[here] = _eight_widened(part) if weight.bits == 8 else _four_widened(part)
    return out


def _eight_widened(weight: Quantised) -> Tensor:
    return weight.values.float() * weight.scales[:, None]


def _four_widened(weight: Quantised) -> Tensor:
    rows, inputs = weight.shape
    scales = weight.scales.float()
    group = inputs // scales.shape[1]
    words = weight.values.view(rows, -1, 1, group)
    shifts = torch.arange(0, 32, 4, device=words.device, dtype=torch.int32)[:, None]
    steps = ((words >> shifts) & 15).float() - 8
    return (steps.reshape(rows, -1, group) * scales[..., None]).reshape(rows, inputs)


def _eight(weight: Tensor) -> Quantised:
    scales = (weight.abs().amax(1).float() / 127).clamp_min(1e-12)
    values = (weight.float() / scales[:, None]).round_().clamp_(-127, 127).to(torch.int8)
    return Quantised(values, scales, 8)


def _four(weight: Tensor, group: int) -> Quantised:
    rows = len(weight)
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
    steps = (values + 8).to(torch.uint8).view(rows, -1, 8, group)
    return Quantised(_pack(steps), scales.half(), 4)


def _pack(steps: Tensor) -> Tensor:
    """Words of `steps` 0 to 15, `[rows, eights of groups, 8, group]`: `[rows, in / 8]`."""
    bytes_of_words = steps[:, :, 0::2] | steps[:, :, 1::2] << 4  # the lowest first, as machines do
    return bytes_of_words.transpose(2, 3).contiguous().view(torch.int32).view(len(steps), -1)
