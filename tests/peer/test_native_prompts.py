"""Prompts over bfloat16 weights in float32: near float64 on the same numbers, rows independent."""

import random
from dataclasses import fields, replace

import pytest
import torch

from hexswarm.kernels import native
from hexswarm.kernels.dispatch import operations
from hexswarm.kernels.native_library import MOST
from hexswarm.kernels.native_prompts import WideOperations
from hexswarm.kernels.ragged import Extent, ragged
from hexswarm.peer.models.layers import DecoderLayer, start_pass
from hexswarm.peer.models.registry import architecture
from hexswarm.peer.shard import Shard
from hexswarm.records import Span
from tests import tiny

pytestmark = pytest.mark.skipif(not native.available(), reason="installed without a compiler")
torch.set_num_threads(1)
CPU, BLOCK = torch.device("cpu"), 4


def product(ops, x, weight, bias=None, onto=None):
    """x @ weight + bias, perhaps on top of `onto`."""
    if onto is None:
        return ops.project(x, weight, bias)
    return ops.add_projected_(onto.clone(), x, weight, bias)


@pytest.mark.parametrize("instruction_set", native.instructions())
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("depth", [1, 127, 300])
def test_products_equal_those_in_float64(depth, threads, instruction_set):
    """Any sizes, whole tiles or not, with and without bias and something to add to."""
    ops, rng = WideOperations(threads, instruction_set), random.Random(depth)
    torch.manual_seed(depth)
    for rows in (1, 8, 65, MOST, MOST + 3):
        width = rng.choice((1, 15, 48, 96, 131))
        x, weight = torch.randn(rows, depth), torch.randn(depth, width).bfloat16()
        bias = rng.choice((None, torch.randn(width).bfloat16()))
        onto = rng.choice((None, torch.randn(rows, width)))
        got = product(ops, x, weight, bias, onto)
        exact = x.double() @ weight.double()
        exact += 0 if bias is None else bias.double()
        exact += 0 if onto is None else onto.double()
        assert got.dtype == torch.float32
        assert (got - exact).norm() <= 1e-6 * exact.norm()


@pytest.mark.parametrize("instruction_set", native.instructions())
def test_a_row_of_a_product_does_not_depend_on_its_neighbours(instruction_set):
    """Bit for bit, whatever the others are, and whatever the number of threads."""
    torch.manual_seed(1)
    one, three = (WideOperations(threads, instruction_set) for threads in (1, 3))
    x, weight = torch.randn(MOST + 9, 150), torch.randn(150, 100).bfloat16()
    x[5, 7], x[6, 0] = float("nan"), float("inf")
    together = one.project(x, weight)
    assert torch.equal(three.project(x, weight).nan_to_num(), together.nan_to_num())
    for row in (0, 4, 7, MOST - 1, MOST + 8):
        assert torch.equal(one.project(x[row : row + 1], weight)[0], together[row])
    assert together.isfinite().all(1).sum() == len(x) - 2


def random_layer(window, qk_norm):
    """Hidden 40, three heads on each of two KV heads, all numbers in bfloat16."""

    def numbers(*shape):
        return torch.randn(shape).div(shape[0] ** 0.5).bfloat16()

    return DecoderLayer(
        heads=6,
        kv_heads=2,
        head_dim=16,
        eps=1e-5,
        window=window,
        input_norm=1 + numbers(40),
        qkv=numbers(40, 10 * 16),
        qkv_bias=numbers(10 * 16),
        qk_norm=1 + numbers(8, 16) if qk_norm else None,
        o=numbers(6 * 16, 40),
        o_bias=None,
        post_norm=1 + numbers(40),
        gate_up=numbers(40, 2 * 70),
        gate_up_bias=None,
        down=numbers(70, 40),
        down_bias=numbers(40),
    )


def widened(layer):
    """The same numbers in float64."""
    names = (f.name for f in fields(layer) if isinstance(getattr(layer, f.name), torch.Tensor))
    return replace(layer, **{name: getattr(layer, name).double() for name in names})


@pytest.mark.parametrize(("window", "qk_norm"), [(None, False), (None, True), (30, False)])
def test_a_layer_is_near_float64(window, qk_norm):
    """Prompts from the start and from the middle, in blocks that follow each other or not."""
    torch.manual_seed(2)
    layer = random_layer(window, qk_norm)
    scattered = tuple(random.Random(2).sample(range(60, 120), 30))
    extents = [
        Extent(0, 90, tuple(range(23)), BLOCK),
        Extent(37, 60, scattered[:25], BLOCK),
        Extent(5, 1, (40, 41), BLOCK),
    ]
    cache = torch.full((120 * BLOCK, 2, 2, 16), float("nan"), dtype=torch.bfloat16)
    for extent in extents:
        for token in range(extent.position):
            cache[extent.slot(token)] = torch.randn(2, 2, 16).bfloat16()
    frequencies = 1.0 / 10000 ** (torch.arange(0, 16, 2) / 16)
    batch, x = ragged(extents, CPU), torch.randn(151, 40).bfloat16()
    results = []
    for held, dtype, ops in (
        (widened(layer), torch.float64, operations("torch")),
        (layer, torch.float32, WideOperations(1)),
    ):
        own = cache.clone() if dtype == torch.float32 else cache.double()
        run = start_pass(batch, {window}, frequencies, 1.0, dtype, ops)
        y = x.to(dtype)
        held.forward(y, run, own)
        results.append((y.double(), own.double()[batch.slots]))
    for exact, got in zip(*results, strict=True):
        assert not got.isnan().any()
        assert (got - exact).norm() <= 1e-2 * exact.norm()


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_long_prompt_in_bfloat16_is_as_near_as_in_pieces(family):
    """A shard's prompt of more tokens than C takes at once, against the same token by token."""
    model = tiny.model(family)
    config, span = architecture(model.config.to_dict()), Span(0, tiny.LAYERS)
    ids, logits = torch.tensor(random.Random(3).choices(range(200), k=native.ROWS + 6)), []
    tensors = tiny.checkpoint(model)
    held = Shard(config, span, tiny.LAYERS, tensors, "bfloat16")
    for pieces in ([len(ids)], [1] * len(ids)):
        pool, first = held.make_pool(8), 0
        pool.data.fill_(float("nan"))
        for count in pieces:
            batch = ragged([pool.extent(first, count, tuple(range(8)))], CPU)
            with torch.inference_mode():
                x = held.forward(held.embed(ids[first : first + count]), batch, pool)
            first += count
        with torch.inference_mode():
            logits.append(held.head(x[-1:]))
    whole, stepwise = logits
    assert (whole - stepwise).norm() <= 2e-2 * stepwise.norm()
