"""Decode steps through `GpuLayers` against `DecoderLayer.forward` with the reference's operations.

Interpreted without a GPU, and then without graphs; compiled and captured with one.
"""

from __future__ import annotations

import random
from dataclasses import fields, replace

import pytest
import torch

pytest.importorskip("triton")

from hexswarm.kernels import gpu
from hexswarm.kernels.dispatch import operations
from hexswarm.kernels.gpu import GpuLayers
from hexswarm.kernels.product import product, widen
from hexswarm.kernels.quantise import Quantised, dequantise, quantise, rounded_bytes
from hexswarm.kernels.ragged import Extent, ragged
from hexswarm.peer.models.layers import DecoderLayer, start_pass
from hexswarm.peer.shard import DECODE_ROWS

GPU = torch.cuda.is_available()
CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if GPU else "cpu")
HALF = torch.bfloat16 if GPU else torch.float16
BOUNDS = {torch.float32: 1e-5, HALF: 1e-2}
HEADS, KV_HEADS, DIM, HIDDEN, MIDDLE, BLOCK = 3, 1, 16, 128, 128, 16
FREQUENCIES = 1.0 / 10000 ** (torch.arange(0, DIM, 2, device=DEVICE) / DIM)
KINDS = {
    "llama": {},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
    "every bias": {"qkv_bias": True, "o_bias": True, "gate_up_bias": True, "down_bias": True},
    "window": {"window": 20},
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def make_layer(dtype, bits=16, window=None, **present):
    """A random layer; `present` names the biases and norms that it has."""

    def vector(*shape, around=0.0):
        return (around + 0.3 * torch.randn(*shape, device=DEVICE)).to(dtype)

    def matrix(outputs, inputs):
        weight = (torch.randn(outputs, inputs, device=DEVICE) / inputs**0.5).to(dtype)
        return weight.t() if bits == 16 else quantise(weight, bits)

    def bias(name, size):
        return vector(size) if present.get(name) else None

    every = HEADS + 2 * KV_HEADS
    return DecoderLayer(
        *(HEADS, KV_HEADS, DIM, 1e-5, window),
        input_norm=vector(HIDDEN, around=1.0),
        qkv=matrix(every * DIM, HIDDEN),
        qkv_bias=bias("qkv_bias", every * DIM),
        qk_norm=vector(HEADS + KV_HEADS, DIM, around=1.0) if present.get("qk_norm") else None,
        o=matrix(HIDDEN, HEADS * DIM),
        o_bias=bias("o_bias", HIDDEN),
        post_norm=vector(HIDDEN, around=1.0),
        gate_up=matrix(2 * MIDDLE, HIDDEN),
        gate_up_bias=bias("gate_up_bias", 2 * MIDDLE),
        down=matrix(HIDDEN, MIDDLE),
        down_bias=bias("down_bias", HIDDEN),
    )


class Steps:
    """Sessions of random lengths in scattered blocks, all about to decode one token."""

    def __init__(self, rows, dtype, layers):
        rng = random.Random(rows)
        lengths = [rng.choice((1, 15, 16, 17, 50)) for _ in range(rows)]
        free = list(range(4 * rows + 2))
        self.blocks = len(free)
        rng.shuffle(free)
        tables = [tuple(free.pop() for _ in range(-(-length // BLOCK))) for length in lengths]
        self.extents = [
            Extent(length - 1, 1, table, BLOCK)
            for length, table in zip(lengths, tables, strict=True)
        ]
        shape = (self.blocks * BLOCK, 2, KV_HEADS, DIM)
        self.caches = [torch.full(shape, float("nan"), dtype=dtype, device=DEVICE) for _ in layers]
        for cache in self.caches:
            for extent in self.extents:
                slots = [extent.slot(token) for token in range(extent.position)]
                cache[slots] = torch.randn(len(slots), *shape[1:], device=DEVICE).to(dtype)
        self.layers = layers
        self.x = torch.randn(rows, HIDDEN, device=DEVICE).to(dtype)

    def exact(self):
        """Results and caches by the reference, in float32 on the CPU."""
        layers = [widened(layer) for layer in self.layers]
        caches = [cache.to("cpu", torch.float32, copy=True) for cache in self.caches]
        batch, windows = ragged(self.extents, CPU), {layer.window for layer in layers}
        run = start_pass(batch, windows, FREQUENCIES.cpu(), 1.0, torch.float32, operations("torch"))
        x = self.x.to("cpu", torch.float32, copy=True)
        for layer, cache in zip(layers, caches, strict=True):
            layer.forward(x, run, cache)
        return x.to(DEVICE), [cache.to(DEVICE) for cache in caches]

    def gpu(self):
        return GpuLayers(self.layers, FREQUENCIES, 1.0, self.blocks, BLOCK, graphs=GPU)

    def run(self, layers, rows=None, first=0, count=None):
        """Results of the sessions with these indices, and the caches; `layers` from `gpu`."""
        rows = range(len(self.extents)) if rows is None else rows
        caches = [cache.clone() for cache in self.caches]
        batch = ragged([self.extents[row] for row in rows], DEVICE)
        end = len(caches) if count is None else first + count
        x = layers.decode(self.x[list(rows)], batch, caches[first:end], first)
        return x, caches


def widened(layer):
    """The layer in float32 on the CPU, with the weights that few bits stand for."""
    changes = {}
    for field in fields(layer):
        value = getattr(layer, field.name)
        if isinstance(value, Quantised):
            changes[field.name] = dequantise(value, torch.float32).t().cpu()
        elif isinstance(value, torch.Tensor):
            changes[field.name] = value.float().cpu()
    return replace(layer, **changes)


def near(out, wanted):
    error = (out.double() - wanted).norm() / wanted.norm()
    return bool(error < BOUNDS[out.dtype])


def same(got, expected):
    """Results and everything that was written are near, and nothing else was written."""
    (x, caches), (wanted, wanted_caches) = got, expected
    assert near(x, wanted)
    for cache, other in zip(caches, wanted_caches, strict=True):
        written = ~other.isnan()
        assert torch.equal(written, ~cache.isnan())
        assert near(cache[written], other[written])


@pytest.mark.parametrize(
    ("kind", "rows", "layers", "dtype"),
    [
        *((kind, 2, 1, torch.float32) for kind in KINDS),
        ("qwen3", 1, 2, torch.float32),
        ("every bias", 1, 1, HALF),
    ],
)
def test_decode_equals_the_reference(kind, rows, layers, dtype):
    steps = Steps(rows, dtype, [make_layer(dtype, **KINDS[kind]) for _ in range(layers)])
    same(steps.run(steps.gpu()), steps.exact())


@pytest.mark.parametrize(
    ("rows", "bits", "dtype"), [(1, 8, torch.float32), (18, 8, torch.float32), (2, 4, HALF)]
)
def test_decode_with_few_bits_equals_the_same_weights_in_many(rows, bits, dtype):
    """18 rows are two tiles."""
    steps = Steps(rows, dtype, [make_layer(dtype, bits, **KINDS["every bias"])])
    same(steps.run(steps.gpu()), steps.exact())


def test_many_rows_go_through_the_library():
    kind = {**KINDS["every bias"], "qk_norm": True}
    steps = Steps(20, torch.float32, [make_layer(torch.float32, **kind)])
    same(steps.run(steps.gpu()), steps.exact())


@pytest.mark.parametrize("bits", [16, 8])
def test_a_session_does_not_depend_on_its_neighbours(bits):
    """Bit for bit, alone and among sixteen, though split otherwise."""
    steps = Steps(16, torch.float32, [make_layer(torch.float32, bits, qk_norm=True)])
    layers = steps.gpu()
    every, _ = steps.run(layers)
    for row in (0, 7, 15):
        alone, _ = steps.run(layers, [row])
        assert torch.equal(alone[0], every[row])


def test_a_part_of_the_span():
    steps = Steps(2, torch.float32, [make_layer(torch.float32, window=w) for w in (None, 9, None)])
    layers = steps.gpu()
    wanted = replace_layers(steps, 1, 2).exact()
    got, caches = steps.run(layers, first=1, count=2)
    same((got, caches[1:]), wanted)
    assert torch.equal(caches[0].isnan(), steps.caches[0].isnan())


def replace_layers(steps, first, count):
    """The same sessions with some of the layers alone."""
    part = object.__new__(Steps)
    part.__dict__.update(steps.__dict__)
    part.layers = steps.layers[first : first + count]
    part.caches = steps.caches[first : first + count]
    return part


def test_warming_leaves_the_cache_as_it_is():
    steps = Steps(2, torch.float32, [make_layer(torch.float32)])
    layers = steps.gpu()
    before = [cache.clone() for cache in steps.caches]
    layers.warm(steps.caches, (1, 2))
    for cache, kept in zip(steps.caches, before, strict=True):
        assert torch.equal(cache.nan_to_num(7.0), kept.nan_to_num(7.0))
    wanted, batch = steps.exact(), ragged(steps.extents, DEVICE)
    x = layers.decode(steps.x.clone(), batch, steps.caches, 0)  # a graph knows its caches
    same((x, steps.caches), wanted)


def test_sessions_that_share_blocks_fit_the_plan():
    """64 tables may each name the whole pool."""
    layer = make_layer(torch.float32)
    steps = Steps(1, torch.float32, [layer])
    extent = Extent(4 * BLOCK, 1, tuple(range(5)), BLOCK)
    layers = GpuLayers([layer], FREQUENCIES, 1.0, 5, BLOCK, graphs=False)
    cache = torch.randn(5 * BLOCK, 2, KV_HEADS, DIM, device=DEVICE)
    x = steps.x.repeat(DECODE_ROWS, 1)
    out = layers.decode(x.clone(), ragged([extent] * DECODE_ROWS, DEVICE), [cache], 0)
    assert near(out, out[:1].double().expand_as(out))
    assert gpu.BUCKETS[-1] == DECODE_ROWS


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("inputs", [128, 384, 2304])
def test_widening_is_exact(bits, inputs):
    weight = quantise(torch.randn(6, inputs, device=DEVICE), bits)
    assert torch.equal(widen(weight, torch.float32), dequantise(weight, torch.float32))


def test_rounding_in_pieces_changes_nothing(monkeypatch):
    weight = torch.randn(50, 256, device=DEVICE)
    for bits in (8, 4):
        whole = quantise(weight, bits)
        monkeypatch.setattr("hexswarm.kernels.quantise.PIECE", 7 * 256)
        pieces = quantise(weight, bits)
        monkeypatch.undo()
        assert torch.equal(whole.values, pieces.values)
        assert torch.equal(whole.scales, pieces.scales)
        assert whole.shape == pieces.shape == (50, 256)
        assert whole.nbytes == rounded_bytes(50, 256, bits)


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize(
    ("form", "rows"), [("plain", 1), ("gated", 20), ("plain", 70), ("gated", 70), ("add", 70)]
)
def test_product_with_a_bias(form, rows, bits):
    """Whichever way it goes: Triton, in tiles, widened, the library."""
    weight = torch.randn(40, 128, device=DEVICE)
    used = quantise(weight, bits) if bits < 16 else weight.t()
    exact = dequantise(used, torch.float64).t() if bits < 16 else used.double()
    x, bias = torch.randn(rows, 128, device=DEVICE), torch.randn(40, device=DEVICE)
    wanted = x.double() @ exact + bias.double()
    out = torch.randn(rows, 20 if form == "gated" else 40, device=DEVICE)
    if form == "gated":
        gate, up = wanted.chunk(2, -1)
        wanted = torch.nn.functional.silu(gate) * up
    elif form == "add":
        wanted = wanted + out.double()
    product(x, used, out, bias=bias, gated=form == "gated", add=form == "add")
    assert near(out, wanted)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
def test_graphs_are_bounded_and_give_what_plain_launches_give(monkeypatch):
    """Each part of the span twice and again: run, captured, replayed, captured anew."""
    monkeypatch.setattr(gpu, "GRAPHS", 2)
    steps = Steps(3, torch.float32, [make_layer(torch.float32) for _ in range(3)])
    layers = steps.gpu()
    plain = GpuLayers(steps.layers, FREQUENCIES, 1.0, steps.blocks, BLOCK, graphs=False)
    caches = [cache.clone() for cache in steps.caches]
    batch = ragged(steps.extents, DEVICE)
    for first, end in ((0, 3), (0, 1), (1, 3), (0, 2)) * 3:
        wanted = plain.decode(steps.x.clone(), batch, caches[first:end], first)
        assert torch.equal(layers.decode(steps.x.clone(), batch, caches[first:end], first), wanted)
    assert len(layers._graphs) == 2
