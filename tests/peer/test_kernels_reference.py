"""Each operation against a slow, plain statement of it in float64."""

import random

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from hexswarm.kernels import reference
from hexswarm.kernels.dispatch import BACKENDS, Operations, operations
from hexswarm.kernels.ragged import Extent, ragged

torch.set_num_threads(1)
CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 5])
def test_rms_norm_equals_transformers(dtype, tokens):
    torch.manual_seed(0)
    x = (torch.randn(tokens, 48) * 10).to(dtype)
    norm = LlamaRMSNorm(48, eps=1e-3).to(dtype)
    norm.weight.data.normal_()
    got = reference.rms_norm(x, norm.weight.data, 1e-3)
    assert got.dtype == dtype
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(got, norm(x).detach(), rtol=tolerance, atol=tolerance)


def test_rms_norm_of_zero_and_of_huge_values():
    weight = torch.ones(8)
    assert reference.rms_norm(torch.zeros(1, 8), weight, 1e-6).tolist() == [[0.0] * 8]
    huge = reference.rms_norm(torch.full((1, 8), 1e15), weight, 1e-6)
    torch.testing.assert_close(huge, torch.ones(1, 8))


@pytest.mark.parametrize("head_dim", [2, 16, 64])
def test_rotate_equals_transformers(head_dim):
    torch.manual_seed(0)
    positions = torch.tensor([0, 3, 4, 1000])
    frequencies = 1.0 / 10000 ** (torch.arange(0, head_dim, 2) / head_dim)
    x = torch.randn(4, 5, head_dim)
    angles = positions[:, None] * frequencies
    emb = torch.cat((angles, angles), -1)
    expected, _ = apply_rotary_pos_emb(x, x, emb.cos() * 0.9, emb.sin() * 0.9)
    cos, sin = reference.rope_tables(positions, frequencies, 0.9, torch.float32)
    wide = torch.cat((x, torch.full((4, 1, head_dim), 7.0)), 1)
    got = reference.rotate_(wide[:, :5], cos, sin)
    torch.testing.assert_close(got, expected)
    assert (wide[:, 5] == 7).all()  # in place, and only there


def test_silu_mul():
    x = torch.randn(3, 20)
    gate, up = x[:, :10].double(), x[:, 10:].double()
    expected = gate / (1 + (-gate).exp()) * up
    before = x.clone()
    torch.testing.assert_close(reference.silu_mul(x).double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(before[:, 10:], x[:, 10:])


def slow_attention(q, keys, values, position, window, scale):
    """One session, one query at a time, one head at a time, in float64."""
    out = torch.zeros_like(q, dtype=torch.float64)
    group = q.shape[1] // keys.shape[1]
    for i in range(q.shape[0]):
        end = position + i + 1
        start = 0 if window is None else max(0, end - window)
        for head in range(q.shape[1]):
            k, v = (
                keys[start:end, head // group].double(),
                values[start:end, head // group].double(),
            )
            weights = (k @ q[i, head].double() * scale).softmax(0)
            out[i, head] = weights @ v
    return out.reshape(q.shape[0], -1)


@pytest.mark.parametrize("window", [None, 1, 4, 40])
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("seed", range(4))
def test_append_and_attend_over_a_ragged_batch(window, group, seed):
    """Sessions of all sizes, consecutive or scattered blocks, slots of others poisoned with NaN."""
    rng, block, kv_heads, head_dim = random.Random(seed), 4, 2, 8
    torch.manual_seed(seed)
    shapes = [(0, 1), (0, 9), (7, 1), (8, 1), (13, 6), (3, 4), (15, 17)]
    rng.shuffle(shapes)
    free = list(range(60))
    cache = torch.full((60 * block, 2, kv_heads, head_dim), float("nan"))
    extents, histories = [], []
    for position, count in shapes:
        needed = -(-(position + count) // block)
        blocks = tuple(free[:needed] if rng.random() < 0.5 else rng.sample(free, needed))
        free = [b for b in free if b not in blocks]
        extent = Extent(position, count, blocks, block)
        history = torch.randn(position + count, 2, kv_heads, head_dim)
        for token in range(position):
            cache[extent.slot(token)] = history[token]
        extents.append(extent)
        histories.append(history)
    batch = ragged(extents, CPU)
    new = torch.cat([h[e.position :] for h, e in zip(histories, extents, strict=True)])
    q = torch.randn(batch.tokens, kv_heads * group, head_dim)
    reference.append_(cache, batch.slots, new)
    got = reference.attend(q, cache, batch.pieces(window, q.dtype), 0.3)
    first = 0
    for extent, history in zip(extents, histories, strict=True):
        part = slice(first, first + extent.count)
        keys, values = history.unbind(1)
        expected = slow_attention(q[part], keys, values, extent.position, window, 0.3)
        torch.testing.assert_close(got[part].double(), expected, rtol=1e-5, atol=1e-5)
        first += extent.count


def test_positions_and_slots():
    batch = ragged([Extent(3, 3, (5, 2), 4), Extent(0, 1, (9,), 4)], CPU)
    assert batch.positions.tolist() == [3, 4, 5, 0]
    assert batch.slots.tolist() == [23, 8, 9, 36]


def test_consecutive_blocks_are_a_view_and_decode_needs_no_mask():
    for blocks, view in (((4, 5, 6), True), ((4, 6, 5), False), ((4, 6, 7), False)):
        (piece,) = ragged([Extent(10, 1, blocks, 4)], CPU).pieces(None, torch.float32)
        assert isinstance(piece.keys, slice) == view
        assert piece.mask is None
        assert not piece.causal
    (piece,) = ragged([Extent(10, 1, (4, 5, 6), 4)], CPU).pieces(3, torch.float32)
    assert piece.keys == slice(16 + 8, 16 + 11)


def test_every_backend_has_every_operation():
    names = [name for name in vars(Operations) if not name.startswith("_")]
    for backend in BACKENDS:
        for name in names:
            assert callable(getattr(operations(backend), name))
    with pytest.raises(KeyError):
        operations("abacus")
