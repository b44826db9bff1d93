"""Ragged prefill against the reference in float64, and when it is chosen.

Interpreted without a GPU. Cells of the cache that nobody wrote, and outputs before, are no numbers.
"""

from __future__ import annotations

import random

import pytest
import torch

pytest.importorskip("triton")

from hexswarm.kernels import compiled, dispatch, prefill, reference
from hexswarm.kernels.ragged import Extent, Pieces, ragged

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HALF = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16
BOUNDS = {torch.float32: 1e-5, HALF: 1e-2}
BLOCK = 16
MIX = [(0, 5), (33, 40), (16, 16), (70, 1)]
"""Position and count: a beginning, past a block's end, whole blocks, a decode step."""


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def sessions(given, kv_heads, dim, dtype):
    """Extents in scattered blocks, and a cache with their keys alone."""
    blocks = list(range(sum(-(-(p + c) // BLOCK) for p, c in given) + 4))
    random.Random(1).shuffle(blocks)
    shape = (len(blocks) * BLOCK, 2, kv_heads, dim)
    cache = torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)
    extents = []
    for position, count in given:
        table = tuple(blocks.pop() for _ in range(-(-(position + count) // BLOCK)))
        extents.append(Extent(position, count, table, BLOCK))
        slots = [extents[-1].slot(token) for token in range(position + count)]
        cache[slots] = torch.randn(len(slots), *shape[1:], device=DEVICE).to(dtype)
    return extents, cache


def queries(tokens, heads, kv_heads, dim, dtype):
    """As they lie in a fused product, keys and values behind them."""
    fused = torch.randn(tokens, (heads + 2 * kv_heads) * dim, device=DEVICE).to(dtype)
    return fused[:, : heads * dim].view(tokens, heads, dim)


def near(out, wanted):
    error = (out.double() - wanted).norm() / wanted.norm()
    return bool(error < BOUNDS[out.dtype])


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "window", "dtype"),
    [
        (3, 1, 64, None, torch.float32),
        (2, 2, 16, 20, torch.float32),
        (4, 1, 32, 1, torch.float32),
        (2, 1, 128, None, HALF),
    ],
)
def test_prompts_with_prefixes_equal_the_reference(heads, kv_heads, dim, window, dtype):
    extents, cache = sessions(MIX, kv_heads, dim, dtype)
    batch = ragged(extents, DEVICE)
    q = queries(batch.tokens, heads, kv_heads, dim, dtype)
    pieces = batch.pieces(window, torch.float64)
    wanted = reference.attend(q.double(), cache.double(), pieces, dim**-0.5)
    out = torch.full((batch.tokens, heads * dim), float("nan"), dtype=dtype, device=DEVICE)
    plan = prefill.tiles(extents, DEVICE, prefill.ROWS[dtype.itemsize])
    prefill.attend(q, cache, plan, dim**-0.5, window, out=out)
    assert near(out, wanted)


def test_more_queries_than_a_tile():
    extents, cache = sessions([(20, 37)], 1, 16, torch.float32)
    q = queries(37, 2, 1, 16, torch.float32)
    pieces = ragged(extents, DEVICE).pieces(None, torch.float64)
    wanted = reference.attend(q.double(), cache.double(), pieces, 0.25)
    plan = prefill.tiles(extents, DEVICE, 16)
    assert [row[:3] for row in plan.numbers.tolist()] == [[32, 5, 52], [16, 16, 36], [0, 16, 20]]
    assert near(prefill.attend(q, cache, plan, 0.25, shape=(16, 4, 1)), wanted)


def test_a_part_of_the_heads_and_of_the_cache():
    """As a tensor-parallel part reads them whose heads come in unequal groups."""
    extents, cache = sessions(MIX, 3, 16, torch.float32)
    batch = ragged(extents, DEVICE)
    q = queries(batch.tokens, 6, 3, 16, torch.float32)[:, 2:4]
    some = cache[:, :, 1:2]
    wanted = reference.attend(q.double(), some.double(), batch.pieces(None, torch.float64), 0.25)
    plan = prefill.tiles(extents, DEVICE, 64)
    assert near(prefill.attend(q, some, plan, 0.25), wanted)


@pytest.mark.parametrize(
    ("given", "rule", "chosen"),
    [
        ([(0, 5)], "several", False),
        ([(3, 5)], "several", True),
        ([(0, 5), (0, 2)], "several", True),
        ([(0, 5)], "always", True),
        ([(3, 5), (0, 2)], "never", False),
    ],
)
def test_the_choice_is_explicit(given, rule, chosen, monkeypatch):
    """One prompt from its beginning is PyTorch's; masks are made only for what asks for them."""
    monkeypatch.setattr(dispatch, "PREFILL", rule)
    extents, cache = sessions(given, 1, 16, torch.float32)
    batch = ragged(extents, DEVICE)
    pieces = batch.pieces(None, torch.float32)
    q = queries(batch.tokens, 2, 1, 16, torch.float32)
    out = compiled.attend(q, cache, pieces, 0.25)
    assert isinstance(pieces, Pieces)
    assert (pieces.plan is not None) == chosen
    assert (pieces._made is None) == chosen
    exact = reference.attend(q.double(), cache.double(), batch.pieces(None, torch.float64), 0.25)
    assert near(out, exact)
