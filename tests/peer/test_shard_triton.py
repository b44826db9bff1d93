"""A shard on the backend "triton": interpreted on a CPU, compiled and captured on a GPU.

Whole answers through the runner, as a peer computes them, against the reference on the CPU.
"""

from __future__ import annotations

import random

import pytest
import torch

pytest.importorskip("triton")

from hexswarm.architecture import span_shapes
from hexswarm.config import PeerConfig
from hexswarm.errors import UsageError
from hexswarm.kernels.quantise import Quantised, dequantise, quantise
from hexswarm.peer.models.registry import architecture
from hexswarm.peer.probe import rehearse
from hexswarm.peer.runner import Runner
from hexswarm.peer.shard import BITS, Shard
from hexswarm.peer.steps import Batch, Row, TailPolicy
from hexswarm.records import Sampling, Span

torch.set_num_threads(1)
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
LAYERS, VOCABULARY, BLOCK, BLOCKS = 2, 97, 16, 400
BASE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}
MODELS = {
    "llama": {"model_type": "llama", "tie_word_embeddings": True},
    "llama biased": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "qwen2 windows": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 9,
        "max_window_layers": 1,
    },
    "qwen3": {"model_type": "qwen3"},
}
GREEDY = TailPolicy(Sampling())


def tensors(name, span=None):
    """Random weights of the model, the same at each call, and in bfloat16."""
    config = {**BASE, **MODELS[name]}
    generator = torch.Generator().manual_seed(3)
    found = {}
    for key, shape in span_shapes(config, Span(0, LAYERS)).items():
        value = torch.randn(shape, generator=generator)
        if key.endswith("norm.weight"):
            value = 1 + 0.3 * value
        elif len(shape) == 2 and "embed" not in key:
            value *= 2 / shape[1] ** 0.5
        found[key] = value.bfloat16().float()
    wanted = span_shapes(config, span or Span(0, LAYERS))
    return {key: value for key, value in found.items() if key in wanted}


def make(name, backend, device="cpu", span=None, warm=GPU, **options):
    """Ready to run; what is interpreted gains nothing from running once before."""
    span = span or Span(0, LAYERS)
    config = architecture({**BASE, **MODELS[name]})
    shard = Shard(
        config, span, LAYERS, tensors(name, span), device=device, backend=backend, **options
    )
    pool = shard.make_pool(BLOCKS, BLOCK)
    pool.data.fill_(float("nan"))
    if warm:
        shard.warm(pool, (1,))
    return Runner(shard, pool)


def answer(runners, prompts, count):
    """Greedy answers of sessions that decode in one batch, through stages one after another."""
    order = random.Random(0).sample(range(BLOCKS), BLOCKS)
    each = BLOCKS // max(len(prompts), 8)
    tables = [tuple(order[i * each : (i + 1) * each]) for i in range(len(prompts))]
    inputs, positions = [list(prompt) for prompt in prompts], [0] * len(prompts)
    answers = [[] for _ in prompts]
    for _ in range(count):
        payloads = inputs
        for runner in runners:
            rows = tuple(
                Row(bytes([i]), positions[i], len(inputs[i]), payloads[i], True, tables[i],
                    policy=GREEDY)
                for i in range(len(prompts))
            )  # fmt: skip
            results = runner.run(Batch(rows))
            assert [result.error for result in results] == [None] * len(rows)
            payloads = [result.activations for result in results]
        for i, result in enumerate(results):
            positions[i] += len(inputs[i])
            inputs[i] = [result.token]
            answers[i].append(result.token)
    return answers


def staggered(runner, texts):
    """Answers of sessions that start one after another: prompts and decode steps in one batch."""
    tables = [tuple(range(6 * i, 6 * i + 6)) for i in range(len(texts))]
    done, heard = [0] * len(texts), [[] for _ in texts]
    for turn in range(len(texts) + 1):
        rows, going = [], list(range(min(turn + 1, len(texts))))
        for i in reversed(going):
            ids = texts[i] if not done[i] else heard[i][-1:]
            rows.append(Row(bytes([i]), done[i], len(ids), ids, True, tables[i], policy=GREEDY))
            done[i] += len(ids)
        for row, result in zip(rows, runner.run(Batch(tuple(rows))), strict=True):
            assert result.error is None
            heard[row.session[0]].append(result.token)
    return heard


def prompts(count, longest=20):
    rng = random.Random(5)
    return [rng.choices(range(VOCABULARY), k=rng.randint(2, longest)) for _ in range(count)]


@pytest.mark.parametrize("name", MODELS)
def test_answers_equal_the_reference(name):
    """Prompts of many lengths, then decode steps that cross a block's end, in two stages."""
    texts = [[1, 2, 3], list(range(16))]
    stages = [make(name, "triton", DEVICE, span) for span in (Span(0, 1), Span(1, LAYERS))]
    assert answer(stages, texts, 2) == answer([make(name, "torch")], texts, 2)


@pytest.mark.parametrize("quant", ["int8", "int4"])
def test_rounded_weights_mean_the_same_on_every_backend(quant):
    """Kept in few bits here, widened there; the weights are those that rounding gives."""
    few, wide = make("qwen3", "triton", DEVICE, quant=quant), make("qwen3", "torch", quant=quant)
    texts = [[1, 2, 3]]
    assert answer([few], texts, 2) == answer([wide], texts, 2)
    assert few.shard.weight_bytes < 0.8 * wide.shard.weight_bytes
    for kept, other in zip(few.shard.layers, wide.shard.layers, strict=True):
        assert isinstance(kept.down, Quantised)
        down = dequantise(kept.down, torch.float32).t().cpu()  # a GPU divides a little otherwise
        assert (down - other.down).norm() < 1e-3 * other.down.norm()
    key = "model.layers.0.mlp.down_proj.weight"
    rounded = dequantise(quantise(tensors("qwen3")[key], BITS[quant]), torch.float32)
    assert torch.equal(wide.shard.layers[0].down, rounded.t())


def test_a_shard_without_rounding_holds_the_same_bytes():
    one, other = make("llama", "triton", DEVICE).shard, make("llama", "torch").shard
    assert one.weight_bytes == other.weight_bytes
    assert one.layers[0].qkv.shape == other.layers[0].qkv.shape
    assert one.layers[0].qkv.t().is_contiguous()


def test_prompts_and_decode_steps_in_one_batch():
    texts = [[1, 2, 3, 4], [5, 6, 7]]
    wanted = staggered(make("qwen3", "torch"), texts)
    assert staggered(make("qwen3", "triton", DEVICE), texts) == wanted


def test_more_decode_steps_than_a_graph_has_rows(monkeypatch):
    monkeypatch.setattr("hexswarm.peer.shard.DECODE_ROWS", 2)
    texts = [[token] for token in range(3)]
    runner, plain = make("llama", "triton", DEVICE), make("llama", "torch")
    assert answer([runner], texts, 2) == answer([plain], texts, 2)


def test_what_a_pool_needs_goes_with_it():
    runner = make("llama", "triton", DEVICE, warm=True)
    shard, graphed = runner.shard, runner.shard._graphed
    assert len(graphed) == 1
    other = shard.make_pool(4, BLOCK)
    shard.warm(other, (1,))
    assert len(graphed) == 2
    del other
    assert len(graphed) == 1


def test_unknown_roundings_are_refused():
    assert set(BITS) == {"none", "int8", "int4"}
    with pytest.raises(UsageError):
        PeerConfig(quant="int3")
    assert PeerConfig(quant="int4").quant == "int4"


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("name", MODELS)
def test_a_gpu_answers_as_a_cpu_does_alone_and_among_others(name):
    """32 greedy sessions in float32: together, and one by one, token for token."""
    texts = prompts(32, longest=60)
    runner = make(name, "auto", "cuda")
    assert runner.shard.backend == "triton"
    wanted = answer([make(name, "torch")], texts, 40)
    assert answer([runner], texts, 40) == wanted
    for index in (0, 13, 31):
        assert answer([runner], [texts[index]], 40) == [wanted[index]]


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("quant", ["none", "int8", "int4"])
def test_half_precision_on_a_gpu_is_near(quant):
    """Logits after a prompt and after a decode step, in bfloat16 against float32."""
    half = make("qwen3", "auto", "cuda", dtype="bfloat16", quant=quant)
    exact = make("qwen3", "torch", quant=quant)
    policy = TailPolicy(Sampling(), logits=True)
    ids = prompts(1, longest=30)[0] + [1] * 20
    for position, count in ((0, len(ids) - 1), (len(ids) - 1, 1)):
        piece, blocks = ids[position : position + count], tuple(range(8))
        row = Row(b"a", position, count, piece, True, blocks, policy=policy)
        got, wanted = (
            torch.frombuffer(bytearray(runner.run(Batch((row,)))[0].logits), dtype=torch.float32)
            for runner in (half, exact)
        )
        assert (got - wanted).norm() / wanted.norm() < 0.08


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("quant", ["none", "int8", "int4"])
def test_after_the_rehearsal_no_session_meets_a_compiler(name, quant, monkeypatch):
    """Prompts and steps of all kinds and numbers: each kernel is there."""
    knobs = pytest.importorskip("triton.knobs")
    runner = make(name, "auto", "cuda", warm=False, dtype="bfloat16", quant=quant)
    runner.shard.warm(runner.pool)
    rehearse(runner.run, Span(0, LAYERS), LAYERS, BASE["hidden_size"], "bfloat16")
    met = []
    monkeypatch.setattr(
        knobs.compilation, "listener", lambda src, **_: met.append((src.name, str(src.constants)))
    )
    answer([runner], prompts(3, longest=200), 3)
    for count in (1, 3, 7, 16, 17, 40):
        answer([runner], [[token] for token in range(count)], 2)
    staggered(runner, prompts(5, longest=60))
    drawn = TailPolicy(Sampling(temperature=1.0, min_p=0.1))
    row = Row(b"a", 0, 5, [1, 2, 3, 4, 5], True, tuple(range(8)), policy=drawn)
    assert runner.run(Batch((row,)))[0].error is None
    assert met == []
