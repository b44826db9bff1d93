"""The Triton kernels against float64: interpreted without a GPU, compiled with one.

Inputs are random, outputs poisoned, unused cache cells are not numbers.
"""

from __future__ import annotations

import random

import pytest
import torch

pytest.importorskip("triton")

from hexswarm.kernels import elementwise, linear4
from hexswarm.kernels.linear import linear
from hexswarm.kernels.paged import PagedDecode, Plan
from hexswarm.kernels.quantise import dequantise, quantise
from hexswarm.kernels.rope import rope_append_

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HALF = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16
"""The interpreter multiplies the bits of bfloat16 as integers."""
BOUNDS = {torch.float32: 1e-5, HALF: 1e-2}
DTYPES = pytest.mark.parametrize("dtype", list(BOUNDS), ids=["float32", "half"])


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def near(out: torch.Tensor, wanted: torch.Tensor) -> bool:
    error = (out.double() - wanted).norm() / wanted.norm()
    return bool(error < BOUNDS[out.dtype])


def rand(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def poisoned(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.full(shape, float("nan"), device=DEVICE, dtype=dtype)


@DTYPES
@pytest.mark.parametrize(("rows", "width"), [(1, 64), (3, 100), (5, 576)])
def test_rms_norm(rows, width, dtype):
    x, weight = rand(rows, width, dtype=dtype), rand(width, dtype=dtype)
    wide = x.double()
    root = torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)
    assert near(elementwise.rms_norm(x, weight, 1e-5), wide * root * weight.double())


@DTYPES
def test_silu_mul(dtype):
    x = rand(3, 2 * 1100, dtype=dtype)
    gate, up = x.double().chunk(2, -1)
    assert near(elementwise.silu_mul(x), torch.nn.functional.silu(gate) * up)


WAYS = pytest.mark.parametrize(("bits", "way"), [(16, ""), (8, ""), (4, "vector"), (4, "matrix")])
"""Weights of 4 bits have two."""


@DTYPES
@WAYS
@pytest.mark.parametrize(("form", "tokens"), [("plain", 1), ("gated", 2), ("add", 7)])
def test_linear(form, tokens, bits, dtype, way, monkeypatch):
    """Also where neither size is a multiple of a block."""
    monkeypatch.setattr(linear4, "FORM", way)
    outputs, inputs = 20, 384
    x, weight = rand(tokens, inputs, dtype=dtype), rand(outputs, inputs, dtype=dtype)
    used = quantise(weight, bits) if bits < 16 else weight
    exact = weight.double() if bits == 16 else dequantise(used, torch.float64)
    wanted = x.double() @ exact.T
    out = poisoned(tokens, outputs // 2 if form == "gated" else outputs, dtype=dtype)
    if form == "gated":
        gate, up = wanted.chunk(2, -1)
        wanted = torch.nn.functional.silu(gate) * up
    if form == "add":
        out = rand(tokens, outputs, dtype=dtype)
        wanted = wanted + out.double()
    linear(x, used, out, gated=form == "gated", add=form == "add")
    assert near(out, wanted)


@WAYS
def test_a_row_of_a_product_does_not_depend_on_its_neighbours(bits, way, monkeypatch):
    monkeypatch.setattr(linear4, "FORM", way)
    kind = HALF if bits == 4 else torch.float32
    x, weight = rand(16, 256, dtype=kind), rand(32, 256, dtype=kind)
    used = quantise(weight, bits) if bits < 16 else weight
    every = linear(x, used, poisoned(16, 32, dtype=kind))
    few = linear(x[:2], used, poisoned(2, 32, dtype=kind))
    assert torch.equal(every[:2], few)


@pytest.mark.parametrize(("bits", "bound"), [(8, 0.01), (4, 0.12)])
def test_rounding_loses_little(bits, bound):
    weight = rand(64, 1024, dtype=torch.float32)
    rounded = dequantise(quantise(weight, bits), torch.float32)
    assert (rounded - weight).norm() / weight.norm() < bound


@DTYPES
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("tokens", [2, 65])
def test_rope_append(tokens, norm, dtype):
    """As apart: norm, rotation by angle, cache; a negative slot is written nowhere."""
    heads, kv_heads, dim, slots = 3, 1, 16, tokens + 3
    total = heads + 2 * kv_heads
    qkv, cache = (
        rand(tokens, total * dim, dtype=dtype),
        poisoned(slots, 2, kv_heads, dim, dtype=dtype),
    )
    weight = rand(heads + kv_heads, dim, dtype=dtype) if norm else None
    angles = torch.rand(tokens, 1, dim // 2, device=DEVICE) * 6
    cos, sin = angles.cos(), angles.sin()
    rope = torch.cat((cos, cos), -1).to(dtype), torch.cat((-sin, sin), -1).to(dtype)
    places = torch.randperm(slots, device=DEVICE)[:tokens]
    places[0] = -1
    wanted = qkv.double().view(tokens, total, dim).clone()
    turned = wanted[:, : heads + kv_heads]
    if weight is not None:
        root = torch.rsqrt(turned.square().mean(-1, keepdim=True) + 1e-5)
        turned = turned * root * weight.double()
    half = turned.roll(dim // 2, -1)
    wanted[:, : heads + kv_heads] = turned * rope[0].double() + half * rope[1].double()
    rope_append_(qkv, rope, places, cache, heads, weight, 1e-5)
    assert near(qkv.view(tokens, total, dim)[:, :heads], wanted[:, :heads])
    kept = cache[places[1:]].reshape(tokens - 1, 2 * kv_heads, dim)
    assert near(kept, wanted[1:, heads:])
    assert cache.isnan().all(-1).all(-1).all(-1).sum() == slots - tokens + 1


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "window", "dtype"),
    [
        (6, 2, 64, None, torch.float32),
        (2, 2, 32, 40, torch.float32),
        (8, 1, 128, None, HALF),
        (3, 1, 64, 40, HALF),
    ],
)
def test_paged_attention(window, heads, kv_heads, dim, dtype):
    """Lengths of one, a block, one past it and several splits; blocks all over the place."""
    lengths, block = [1, 16, 17, 200], 16
    order = random.Random(1)
    blocks = list(range(sum(-(-n // block) for n in lengths) + 3))
    order.shuffle(blocks)
    tables, cache = [], poisoned(len(blocks) * block, 2, kv_heads, dim, dtype=dtype)
    for length in lengths:
        table = [blocks.pop() for _ in range(-(-length // block))]
        slots = [table[t // block] * block + t % block for t in range(length)]
        cache[slots] = rand(length, 2, kv_heads, dim, dtype=dtype)
        tables.append((table, slots))
    q = rand(len(lengths), (heads + 2 * kv_heads) * dim, dtype=dtype)
    plan = Plan(8, 64, DEVICE, parallel=6)
    plan.set(lengths, [table for table, _ in tables])
    out = poisoned(len(lengths), heads * dim, dtype=dtype)
    PagedDecode(plan, heads, kv_heads, dim, block).attend(q, cache, out, dim**-0.5, window)
    rows = []
    for row, (_, slots) in enumerate(tables):
        keys = (
            cache[slots][-(window or len(slots)) :].double().repeat_interleave(heads // kv_heads, 2)
        )
        query = q[row, : heads * dim].view(heads, dim).double()
        scores = torch.einsum("hd,thd->ht", query, keys[:, 0]) * dim**-0.5
        rows.append(torch.einsum("ht,thd->hd", scores.softmax(-1), keys[:, 1]).flatten())
    assert near(out, torch.stack(rows))


def test_a_row_that_only_fills_a_bucket_attends_to_nothing():
    plan = Plan(8, 8, DEVICE, parallel=6)
    plan.set([5], [[0]])
    cache = rand(16, 2, 1, 32, dtype=torch.float32)
    out = poisoned(4, 32, dtype=torch.float32)
    PagedDecode(plan, 1, 1, 32, 16).attend(rand(4, 96, dtype=torch.float32), cache, out, 1.0)
    assert not out[0].isnan().any()
    assert (out[1:] == 0).all()
