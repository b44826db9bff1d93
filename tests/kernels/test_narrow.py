"""Activations in 8 bits: the kernels give the reference's bits, and little is lost."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from hexswarm.kernels import narrow, reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HALF = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16


def rows(width, dtype):
    """Of different sizes, with a stretch of zeros; apart from each other in memory."""
    generator = torch.Generator().manual_seed(width)
    x = torch.randn(3, width + 8, generator=generator) * torch.tensor([[1e-3], [1.0], [3e3]])
    x[1, :64] = 0
    return x.to(DEVICE, dtype)[:, :width]


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("width", [64, 100, 1100])
def test_both_directions_give_the_bits_of_the_reference(width, dtype):
    x = rows(width, dtype)
    values, scales = narrow.narrow(x)
    wanted, others = reference.narrow(x)
    assert torch.equal(values, wanted)
    assert torch.equal(scales, others)
    back = narrow.widen(values, scales, dtype)
    assert torch.equal(back, reference.widen(values, scales, dtype))


def test_little_is_lost():
    """At most half a step of its 64 numbers' scale, which bfloat16 may round down a little."""
    x = rows(1100, torch.float32)
    values, scales = reference.narrow(x)
    back = reference.widen(values, scales, torch.float32)
    steps = scales.float().repeat_interleave(64, 1)[:, :1100]
    assert ((back - x).abs() <= steps * 1.01).all()
    assert (back - x).norm() / x.norm() < 0.01
    assert (back[1, :64] == 0).all()
