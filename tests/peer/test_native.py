"""The layers in C give what the layers in PyTorch give in float64, and a row's result is its own.

With weights and cache in bfloat16 the yardstick has the same rounded numbers.
Caches are filled with NaN first, so that a read of a slot that nobody wrote shows at once.
"""

import random
from dataclasses import fields, replace

import pytest
import torch

from hexswarm.kernels import native, native_library, reference
from hexswarm.kernels.dispatch import choose, operations
from hexswarm.kernels.native import ROWS, NativeLayers
from hexswarm.kernels.ragged import Extent, ragged
from hexswarm.peer.models.architecture import Architecture
from hexswarm.peer.models.layers import DecoderLayer, start_pass
from hexswarm.peer.models.rope import read_rope
from hexswarm.peer.shard import Shard, required_tensors
from hexswarm.records import Span

torch.set_num_threads(1)
CPU = torch.device("cpu")
BLOCK, BLOCKS = 4, 700

compiled = pytest.mark.skipif(not native.available(), reason="installed without a compiler")
each_instruction_set = pytest.mark.parametrize("instruction_set", native.instructions())


def make_layer(rng, hidden, intermediate, heads, kv_heads, head_dim, window=None):
    """A random layer; biases and norms of heads by chance."""

    def maybe(*shape):
        return torch.randn(shape) if rng.random() < 0.5 else None

    def matrix(rows, columns):
        return torch.randn(rows, columns) / rows**0.5

    q, fused = heads * head_dim, (heads + 2 * kv_heads) * head_dim
    return DecoderLayer(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        eps=1e-5,
        window=window,
        input_norm=1 + 0.3 * torch.randn(hidden),
        qkv=matrix(hidden, fused),
        qkv_bias=maybe(fused),
        qk_norm=maybe(heads + kv_heads, head_dim),
        o=matrix(q, hidden),
        o_bias=maybe(hidden),
        post_norm=1 + 0.3 * torch.randn(hidden),
        gate_up=matrix(hidden, 2 * intermediate),
        gate_up_bias=maybe(2 * intermediate),
        down=matrix(intermediate, hidden),
        down_bias=maybe(hidden),
    )


def in_dtype(layer, dtype):
    """The layer with all its numbers in `dtype`."""
    tensors = {
        field.name: getattr(layer, field.name).to(dtype)
        for field in fields(layer)
        if isinstance(getattr(layer, field.name), torch.Tensor)
    }
    return replace(layer, **tensors)


class Stage:
    """Random layers, their caches with the past of some sessions, and a batch for these."""

    def __init__(self, seed, head_dim, group, counts=None, dtype=torch.float32):
        rng = random.Random(seed)
        torch.manual_seed(seed)
        kv_heads, hidden = rng.randint(1, 3), rng.randint(17, 150)
        windows = [None, rng.randint(1, 9), rng.randint(60, 100)]
        sizes = (hidden, rng.randint(17, 150), kv_heads * group, kv_heads, head_dim)
        self.layers = [in_dtype(make_layer(rng, *sizes, window), dtype) for window in windows]
        self.head_dim, self.hidden = head_dim, hidden
        counts = counts or [1] * rng.randint(1, 18)
        total = max(BLOCKS, 36 * len(counts))
        free = list(range(total))
        extents = [self._extent(rng, count, free) for count in counts]
        shape = (total * BLOCK, 2, kv_heads, head_dim)
        self.caches = [torch.full(shape, float("nan"), dtype=dtype) for _ in self.layers]
        for extent in extents:
            slots = [extent.slot(token) for token in range(extent.position)]
            for cache in self.caches:
                cache[slots] = torch.randn(len(slots), *shape[1:]).to(dtype)
        self.extents = extents
        self.x = torch.randn(sum(counts), hidden).to(dtype)

    @staticmethod
    def _extent(rng, count, free):
        """At an early or late position, in blocks that follow each other or not."""
        position = rng.choice((0, rng.randint(1, 20), rng.randint(60, 140)))
        needed = -(-(position + count) // BLOCK)
        blocks = free[:needed] if rng.random() < 0.5 else rng.sample(free, needed)
        free[:] = [block for block in free if block not in blocks]
        return Extent(position, count, tuple(blocks), BLOCK)

    def frequencies(self):
        return 1.0 / 10000 ** (torch.arange(0, self.head_dim, 2) / self.head_dim)

    def by_torch(self, dtype=torch.float64):
        """Results and caches of the reference."""
        x, caches = (
            self.x.to(dtype, copy=True),
            [cache.to(dtype, copy=True) for cache in self.caches],
        )
        windows = {layer.window for layer in self.layers}
        batch = ragged(self.extents, CPU)
        run = start_pass(batch, windows, self.frequencies(), 0.9, dtype, operations("torch"))
        for layer, cache in zip(self.layers, caches, strict=True):
            in_dtype(layer, dtype).forward(x, run, cache)
        return x, caches

    def by_native(self, rows=None, *, threads=1, instruction_set=None):
        """Results and caches of the extents with these indices (all single tokens), or of all."""
        extents = self.extents if rows is None else [self.extents[row] for row in rows]
        x = self.x.clone() if rows is None else self.x[rows]
        caches = [cache.clone() for cache in self.caches]
        batch = ragged(extents, CPU)
        rope = reference.rope_tables(batch.positions, self.frequencies(), 0.9, torch.float32)
        layers = NativeLayers(self.layers, threads, instruction_set)
        for first, end in ((0, 1), (1, len(caches))):  # entry inside the span
            layers.decode(x, batch, rope, caches[first:end], first)
        return x, caches


def assert_close(got, expected, relative=1e-5):
    assert not expected.isnan().any()
    assert (got - expected).abs().max() <= relative * expected.abs().max()


def assert_equal_stages(got, expected):
    (x, caches), (expected_x, expected_caches) = got, expected
    assert_close(x, expected_x)
    for cache, other in zip(caches, expected_caches, strict=True):
        written = ~other.isnan()
        assert torch.equal(written, ~cache.isnan())
        assert_close(cache[written], other[written])


@compiled
@each_instruction_set
@pytest.mark.parametrize("group", [1, 3, 4, 8, 9])
@pytest.mark.parametrize("head_dim", [6, 32, 64, 80, 128])
def test_decode_equals_torch(head_dim, group, instruction_set):
    """Any sizes, biases, windows, positions, block tables and batches of one token a session."""
    for seed in range(3):
        stage = Stage(seed * 1000 + head_dim * 10 + group, head_dim, group)
        assert_equal_stages(stage.by_native(instruction_set=instruction_set), stage.by_torch())


@compiled
@pytest.mark.parametrize("seed", range(4))
def test_pieces_of_prompts_equal_torch(seed):
    stage = Stage(seed, 32, 3, counts=[1, 5, 1, 7, 2])
    assert_equal_stages(stage.by_native(), stage.by_torch())


@compiled
@each_instruction_set
@pytest.mark.parametrize("count", [2, 3, 8, 9, 16, 17, ROWS])
def test_a_row_does_not_depend_on_its_neighbours(count, instruction_set):
    """Bit for bit: alone, in the whole batch and in a part of it."""
    stage = Stage(count, 80, 3, counts=[1] * count)
    together, _ = stage.by_native(instruction_set=instruction_set)
    for row in random.Random(count).sample(range(count), min(count, 9)):
        alone, _ = stage.by_native([row], instruction_set=instruction_set)
        assert torch.equal(alone[0], together[row])
    part, _ = stage.by_native(list(range(count))[::-2], instruction_set=instruction_set)
    assert torch.equal(part, together.flip(0)[::2])


@compiled
@pytest.mark.parametrize("threads", [2, 3])
def test_threads_change_nothing(threads):
    stage = Stage(threads, 64, 4)
    (x, caches), (one_x, one_caches) = stage.by_native(threads=threads), stage.by_native()
    assert torch.equal(x, one_x)
    for cache, other in zip(caches, one_caches, strict=True):
        assert torch.equal(cache.view(torch.int32), other.view(torch.int32))


@compiled
def test_a_row_that_is_not_finite_fails_alone():
    stage = Stage(1, 32, 4, counts=[1] * 5)
    clean, _ = stage.by_native()
    stage.x[1, 3], stage.x[3, 0] = float("nan"), float("inf")
    x, _ = stage.by_native()
    assert x.isfinite().all(1).tolist() == [True, False, True, False, True]
    for row in (0, 2, 4):
        assert torch.equal(x[row], clean[row])


@compiled
@each_instruction_set
def test_extreme_gates_and_scores(instruction_set):
    """Arguments far outside the exponential's range saturate as in PyTorch."""
    stage = Stage(5, 64, 3, counts=[1] * 6)
    for index, layer in enumerate(stage.layers):
        gate_up, qkv = layer.gate_up * 100, layer.qkv * 10
        stage.layers[index] = replace(layer, gate_up=gate_up, qkv=qkv)
    x, _ = stage.by_native(instruction_set=instruction_set)
    assert_close(x, stage.by_torch()[0], relative=1e-4)


def assert_near(got, expected):
    """As near as bfloat16 should be, by norm."""
    got, expected = got.double(), expected.double()
    assert not got.isnan().any()
    assert (got - expected).norm() <= 1e-2 * expected.norm()


@compiled
@each_instruction_set
@pytest.mark.parametrize("head_dim", [6, 64, 80])
@pytest.mark.parametrize("threads", [1, 3])
def test_weights_and_cache_in_bfloat16(head_dim, threads, instruction_set):
    """Near float64 on the same numbers; a row's bits do not depend on its neighbours."""
    for seed in range(4):
        stage = Stage(seed, head_dim, 1 + seed, dtype=torch.bfloat16)
        expected_x, expected_caches = stage.by_torch()
        x, caches = stage.by_native(threads=threads, instruction_set=instruction_set)
        assert x.dtype == caches[0].dtype == torch.bfloat16
        assert_near(x, expected_x)
        for cache, expected in zip(caches, expected_caches, strict=True):
            written = ~expected.isnan()
            assert torch.equal(written, ~cache.isnan())
            assert_near(cache[written], expected[written])
        row = len(x) - 1
        alone, _ = stage.by_native([row], instruction_set=instruction_set)
        assert torch.equal(alone[0], x[row])


@compiled
@each_instruction_set
def test_the_cache_is_rounded_as_torch_rounds(instruction_set):
    """To the nearest, to even between two; the first layer's values are x through one matrix."""
    stage = Stage(5, 32, 1, [1] * 8, torch.bfloat16)
    layer, x = stage.layers[0], torch.zeros(8, stage.hidden, dtype=torch.bfloat16)
    x[:, 0] = 1
    norm = torch.zeros_like(layer.input_norm)
    norm[0] = 1
    heads = layer.heads + 2 * layer.kv_heads
    qkv = torch.zeros_like(layer.qkv)
    qkv[0] = torch.randn(heads * 32)
    stage.layers = [replace(layer, input_norm=norm, qkv=qkv, qkv_bias=None, qk_norm=None)]
    stage.caches, stage.x = stage.caches[:1], x
    layers = NativeLayers(stage.layers, 1, instruction_set)
    batch, cache = ragged(stage.extents, CPU), stage.caches[0]
    ones = torch.ones(8, 1, 32)
    layers.decode(x.clone(), batch, (ones, 0 * ones), [cache], 0)
    scale = (1 / torch.tensor(1 / stage.hidden + layer.eps).sqrt()) * qkv[0].float()
    values = scale.bfloat16()[-layer.kv_heads * 32 :].view(layer.kv_heads, 32)
    got = cache[batch.slots, 1]
    assert (got.view(torch.int16) - values.view(torch.int16)).abs().max() <= 1  # of the product
    assert (got == values).float().mean() > 0.9


@compiled
@each_instruction_set
@pytest.mark.parametrize("vocabulary", [1, 61, 1024, 2090])
@pytest.mark.parametrize("threads", [1, 2])
def test_head_equals_torch(vocabulary, threads, instruction_set):
    torch.manual_seed(vocabulary)
    hidden = 50
    layer = make_layer(random.Random(0), hidden, 40, 2, 1, 16)
    layers = NativeLayers([layer], threads, instruction_set)
    norm, weight = torch.randn(hidden), torch.randn(hidden, vocabulary)
    for rows in (1, 4, 11, 16, ROWS):
        x = torch.randn(rows, hidden)
        expected = reference.rms_norm(x, norm, 1e-5) @ weight
        got = layers.head(x, norm, weight, 1e-5)
        assert_close(got, expected)
        assert torch.equal(layers.head(x[-1:], norm, weight, 1e-5)[0], got[-1])


def small_shard(dtype="float32", **options):
    config = Architecture(
        family="llama",
        layers=1,
        hidden=8,
        intermediate=12,
        heads=2,
        kv_heads=1,
        head_dim=4,
        vocabulary=11,
        context=64,
        norm_eps=1e-5,
        rope=read_rope({"max_position_embeddings": 64}),
        windows=(None,),
        tied=True,
    )
    shapes = {
        **dict.fromkeys(("q_proj", "o_proj"), (8, 8)),
        **dict.fromkeys(("k_proj", "v_proj"), (4, 8)),
        **dict.fromkeys(("gate_proj", "up_proj"), (12, 8)),
        "down_proj": (8, 12),
        "embed_tokens": (11, 8),
    }
    names = required_tensors(config, Span(0, 1))
    torch.manual_seed(0)
    tensors = {
        name: torch.randn(next((s for key, s in shapes.items() if key in name), (8,)))
        for name in names
    }
    return Shard(config, Span(0, 1), 1, tensors, dtype, **options)


def logits_of(shard):
    pool = shard.make_pool(2)
    batch = ragged([pool.extent(0, 3, (1,))], CPU)
    with torch.inference_mode():
        return shard.head(shard.forward(shard.embed(torch.tensor([1, 2, 3])), batch, pool))


def test_without_the_library_a_shard_falls_back(monkeypatch):
    with monkeypatch.context() as patch:
        for module in (native, native_library):
            patch.setattr(module, "available", lambda: False)
        assert choose(CPU, torch.float32) == "torch"
        shard = small_shard()
        assert shard.backend == "torch"
        with pytest.raises(RuntimeError, match="without its native library"):
            small_shard(backend="native")
    if native.available():
        assert small_shard().backend == "native"
        assert_close(logits_of(small_shard()), logits_of(shard))


@compiled
def test_a_shard_in_bfloat16_runs_in_c():
    shard = small_shard("bfloat16")
    assert shard.backend == "native"
    expected = logits_of(small_shard())
    assert_near(logits_of(shard), expected)
    with torch.inference_mode():
        assert shard.embed(torch.tensor([1])).dtype == torch.bfloat16


def test_other_types_and_devices_stay_with_torch():
    assert small_shard("float16").backend == "torch"
    assert choose(torch.device("cuda"), torch.float32) == "torch"
    assert small_shard(backend="torch").backend == "torch"
