"""Our decoders give what transformers gives: every family, split anywhere, chunked anyhow.

The KV pools are filled with NaN first, so that a read of a slot that nobody wrote shows at once.
"""

import itertools
import random

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from hexswarm.errors import CorruptWeights, UnsupportedModel
from hexswarm.kernels import native
from hexswarm.peer.models.registry import architecture
from hexswarm.peer.runner import Runner
from hexswarm.peer.shard import Shard, required_tensors
from hexswarm.peer.steps import Batch, Row, TailPolicy
from hexswarm.records import Sampling, Span
from tests.tiny import checkpoint

torch.set_num_threads(1)
VOCABULARY, LAYERS, BLOCK = 61, 4, 4

SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
}


def rope(kind, **parameters):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **parameters}}


LLAMA3 = rope(
    "llama3",
    factor=4.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=24,
)
YARN = rope("yarn", factor=4.0, original_max_position_embeddings=24)
EXPERTS = {"head_dim": 8, "moe_intermediate_size": 12, "attention_bias": True}
MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "llama-tied-llama3": (
        LlamaForCausalLM,
        LlamaConfig,
        {"tie_word_embeddings": True, **LLAMA3},
    ),
    "llama-biased-wide-heads": (
        LlamaForCausalLM,
        LlamaConfig,
        {"attention_bias": True, "mlp_bias": True, "head_dim": 8},
    ),
    "llama-linear": (LlamaForCausalLM, LlamaConfig, rope("linear", factor=2.0)),
    "llama-yarn": (LlamaForCausalLM, LlamaConfig, YARN),
    "llama-dynamic": (LlamaForCausalLM, LlamaConfig, rope("dynamic", factor=2.0)),
    "mistral-window": (MistralForCausalLM, MistralConfig, {"sliding_window": 7}),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": None}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {"tie_word_embeddings": True}),
    "qwen2-windows": (
        Qwen2ForCausalLM,
        Qwen2Config,
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
    ),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 8, "attention_bias": True}),
    "qwen3-layer-types": (
        Qwen3ForCausalLM,
        Qwen3Config,
        {
            "head_dim": 8,
            "use_sliding_window": True,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2),
        },
    ),
    "mixtral": (MixtralForCausalLM, MixtralConfig, {"num_local_experts": 5, "sliding_window": 9}),
    "qwen3-moe": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig,
        {**EXPERTS, "num_experts": 7, "num_experts_per_tok": 3, "mlp_only_layers": [1]},
    ),
    "qwen3-moe-normalised": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig,
        {**EXPERTS, "num_experts": 4, "num_experts_per_tok": 4, "norm_topk_prob": True},
    ),
    "qwen3-moe-every-second": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig,
        {
            **EXPERTS,
            "num_experts": 4,
            "num_experts_per_tok": 1,
            "decoder_sparse_step": 2,
            "use_sliding_window": True,
            "sliding_window": 6,
        },
    ),
}
FAMILIES = ("llama", "mistral-window", "qwen2", "qwen3", "mixtral", "qwen3-moe")
_CACHE = {}


def reference(name):
    """A random model of the kind, with biases and norms that are not at their initial values."""
    if name not in _CACHE:
        model_class, config_class, extra = MODELS[name]
        torch.manual_seed(1)
        model = model_class(config_class(**{**SMALL, **extra})).eval()
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if parameter.dim() == 1:
                    offset = 1.0 if "norm" in parameter_name else 0.0
                    parameter.copy_(offset + 0.3 * torch.randn_like(parameter))
        _CACHE[name] = model
    return _CACHE[name]


@torch.no_grad()
def true_logits(name, ids):
    return reference(name)(torch.tensor([ids])).logits[0]


@pytest.fixture(params=["native", "torch"])
def backend(request, monkeypatch):
    """What shards choose by themselves, and what they do without the native library."""
    if request.param == "torch":
        monkeypatch.setattr(native, "available", lambda: False)
    elif not native.available():
        pytest.skip("installed without a compiler")


each_backend = pytest.mark.usefixtures("backend")


class Pipeline:
    """A model cut into stages, each with its own pool; sessions use the same blocks everywhere."""

    def __init__(self, name, cuts=(), dtype="float32", device="cpu", spans=None, blocks=64):
        model = reference(name)
        config = architecture(model.config.to_dict())
        ends = (0, *cuts, LAYERS)
        self.stages = spans or [Span(a, b) for a, b in itertools.pairwise(ends)]
        self.runners = []
        for span in self.stages:
            shard = Shard(config, span, LAYERS, checkpoint(model), dtype, device)
            pool = shard.make_pool(blocks, BLOCK)
            pool.data.fill_(float("nan"))
            self.runners.append(Runner(shard, pool))

    def step(self, *pieces, route=None):
        """Logits after each piece (session, position, ids, blocks), or None where it failed."""
        route = route or self.stages
        policy = TailPolicy(Sampling(), logits=True)
        payloads = [ids for _, _, ids, _ in pieces]
        for runner, span in zip(self.runners, route, strict=True):
            rows = tuple(
                Row(session, position, len(ids), payload, True, blocks, span=span)
                for (session, position, ids, blocks), payload in zip(pieces, payloads, strict=True)
            )
            results = runner.run(Batch(rows), {row.session: policy for row in rows})
            assert [result.error for result in results] == [None] * len(rows)
            payloads = [result.activations for result in results]
        return [torch.frombuffer(bytearray(r.logits), dtype=torch.float32) for r in results]


def assert_close(got, expected, relative=1e-4):
    scale = expected.abs().max()
    assert (got - expected).abs().max() <= relative * scale
    if relative <= 1e-3:
        assert int(got.argmax()) == int(expected.argmax())


def tokens(count, seed=0):
    return random.Random(seed).choices(range(VOCABULARY), k=count)


ASCENDING = tuple(range(3, 20))
SCATTERED = (9, 2, 30, 31, 4, 1, 17, 11, 12, 40, 39, 38, 5, 22, 23, 50, 49)


@each_backend
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("blocks", [ASCENDING, SCATTERED], ids=["ascending", "scattered"])
def test_logits_equal_transformers_for_prompt_and_every_decode_step(name, blocks):
    ids, prompt = tokens(40), 29
    expected, pipeline = true_logits(name, ids), Pipeline(name)
    got = pipeline.step((b"a", 0, ids[:prompt], blocks))[0]
    assert_close(got, expected[prompt - 1])
    for position in range(prompt, len(ids)):
        got = pipeline.step((b"a", position, ids[position : position + 1], blocks))[0]
        assert_close(got, expected[position])


@each_backend
@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_answer_equals_generate(name):
    prompt, blocks = tokens(17, seed=3), ASCENDING
    model, pipeline = reference(name), Pipeline(name, cuts=(2,))
    with torch.no_grad():
        expected = model.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False)
    ids = list(prompt)
    logits = pipeline.step((b"a", 0, ids, blocks))[0]
    for _ in range(19):
        ids.append(int(logits.argmax()))
        logits = pipeline.step((b"a", len(ids) - 1, ids[-1:], blocks))[0]
    assert [*ids, int(logits.argmax())] == expected[0].tolist()


CUTS = [*itertools.combinations(range(1, LAYERS), 1), *itertools.combinations(range(1, LAYERS), 2)]


@each_backend
@pytest.mark.parametrize("cuts", CUTS, ids=str)
@pytest.mark.parametrize("name", [*FAMILIES, "qwen2-windows", "llama-tied-llama3"])
def test_a_split_at_any_layer_changes_nothing(name, cuts):
    ids = tokens(24, seed=1)
    expected, pipeline = true_logits(name, ids), Pipeline(name, cuts)
    assert_close(pipeline.step((b"a", 0, ids[:20], ASCENDING))[0], expected[19])
    for position in range(20, 24):
        got = pipeline.step((b"a", position, ids[position : position + 1], ASCENDING))[0]
        assert_close(got, expected[position])


@each_backend
@pytest.mark.parametrize("name", [*FAMILIES, "qwen3-layer-types"])
@pytest.mark.parametrize("blocks", [ASCENDING, SCATTERED], ids=["ascending", "scattered"])
def test_any_chunking_of_the_prompt_changes_nothing(name, blocks):
    rng = random.Random(7)
    ids = tokens(48, seed=2)
    expected = true_logits(name, ids)
    for _ in range(4):
        pipeline, position = Pipeline(name, cuts=(1,)), 0
        while position < len(ids):
            count = min(rng.choice((1, 2, 3, 5, 8, 13, 21)), len(ids) - position)
            piece = ids[position : position + count]
            got = pipeline.step((b"a", position, piece, blocks))[0]
            position += count
            assert_close(got, expected[position - 1])


@each_backend
@pytest.mark.parametrize("name", FAMILIES)
def test_sessions_in_a_batch_do_not_see_each_other(name):
    """Prompt pieces and decode steps of five sessions at unlike positions, in one batch."""
    rng = random.Random(5)
    pipeline = Pipeline(name, cuts=(3,), blocks=80)
    order = rng.sample(range(80), 80)
    sessions = [
        (bytes([i]), tokens(30 + i, seed=i), tuple(order[i * 12 : i * 12 + 12])) for i in range(4)
    ]
    sessions.append((b"run", tokens(33, seed=9), ()))
    start = next(i for i in range(80) if not set(range(i, i + 10)) & set(order[:48]) or i == 70)
    sessions[-1] = (
        b"run",
        sessions[-1][1],
        tuple(order[48:60]) if start == 70 else tuple(range(start, start + 10)),
    )
    expected = {session: true_logits(name, ids) for session, ids, _ in sessions}
    reached = {session: 0 for session, _, _ in sessions}
    while any(reached[session] < len(ids) for session, ids, _ in sessions):
        pieces = []
        for session, ids, blocks in rng.sample(sessions, len(sessions)):
            position = reached[session]
            count = min(rng.choice((0, 1, 1, 1, 6, 11)), len(ids) - position)
            if count:
                pieces.append((session, position, ids[position : position + count], blocks))
        if not pieces:
            continue
        for (session, position, ids, _), got in zip(pieces, pipeline.step(*pieces), strict=True):
            reached[session] = position + len(ids)
            assert_close(got, expected[session][reached[session] - 1])


@each_backend
@pytest.mark.parametrize("name", FAMILIES)
def test_a_step_below_the_cached_length_crops(name):
    first, pipeline = tokens(30, seed=1), Pipeline(name)
    pipeline.step((b"a", 0, first, ASCENDING))
    second = [*first[:13], *tokens(12, seed=8)]
    got = pipeline.step((b"a", 13, second[13:24], ASCENDING))[0]
    expected = true_logits(name, second)
    assert_close(got, expected[23])
    assert_close(pipeline.step((b"a", 24, second[24:], ASCENDING))[0], expected[24])


@each_backend
def test_sessions_use_different_parts_of_overlapping_spans():
    """Peers hold 0:3 and 1:4; one session changes over at layer 1, one at 3, in common batches."""
    name = "qwen3"
    pipeline = Pipeline(name, spans=[Span(0, 3), Span(1, 4)])
    early, late = tokens(20, seed=1), tokens(20, seed=2)
    blocks = {b"early": ASCENDING, b"late": tuple(range(30, 40))}
    cuts = {b"early": 1, b"late": 3}
    policies = dict.fromkeys(cuts, TailPolicy(Sampling(), logits=True))
    for position, count in ((0, 12), (12, 1), (13, 7)):
        parts = {b"early": early, b"late": late}
        payloads = {key: ids[position : position + count] for key, ids in parts.items()}
        for stage, runner in enumerate(pipeline.runners):
            rows = [
                Row(key, position, count, payload, True, blocks[key], span=span)
                for key, payload in payloads.items()
                for span in [Span(0, cuts[key]) if stage == 0 else Span(cuts[key], LAYERS)]
            ]
            results = runner.run(Batch(tuple(rows)), policies)
            payloads = {result.row.session: result.activations for result in results}
        for result, ids in zip(results, (early, late), strict=True):
            got = torch.frombuffer(bytearray(result.logits), dtype=torch.float32)
            assert_close(got, true_logits(name, ids)[position + count - 1])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_half_precision_is_close(name, dtype):
    ids = tokens(30, seed=4)
    expected, pipeline = true_logits(name, ids), Pipeline(name, cuts=(2,), dtype=dtype)
    assert_close(pipeline.step((b"a", 0, ids[:29], ASCENDING))[0], expected[28], relative=0.08)
    assert_close(pipeline.step((b"a", 29, ids[29:], ASCENDING))[0], expected[29], relative=0.08)


@pytest.mark.gpu
@pytest.mark.parametrize("name", MODELS)
def test_a_gpu_gives_the_same(name):
    torch.backends.cuda.matmul.allow_tf32 = False
    ids = tokens(40)
    expected, pipeline = true_logits(name, ids), Pipeline(name, cuts=(2,), device="cuda")
    for first, end in ((0, 20), (20, 33), (33, 34), (34, 40)):
        got = pipeline.step((b"a", first, ids[first:end], SCATTERED))[0]
        assert_close(got, expected[end - 1])


@pytest.mark.parametrize("name", MODELS)
def test_a_shard_takes_exactly_the_tensors_that_it_names(name):
    model = reference(name)
    config = architecture(model.config.to_dict())
    for span in (Span(0, 1), Span(1, 3), Span(2, LAYERS), Span(0, LAYERS)):
        names = required_tensors(config, span)
        stored = checkpoint(model)
        tensors = {key: stored[key].clone() for key in names}
        shard = Shard(config, span, LAYERS, tensors)
        assert not tensors
        assert shard.weight_bytes == sum(stored[key].nbytes for key in names) + (
            _expanded_norm_bytes(config, span)
        )


def _expanded_norm_bytes(config, span):
    """Norms of queries and keys are stored per head."""
    extra = (config.heads + config.kv_heads - 2) * config.head_dim * 4 * len(span)
    return extra if config.qk_norm else 0


def test_damaged_weights_are_named():
    model = reference("llama")
    config = architecture(model.config.to_dict())
    tensors = dict(model.state_dict())
    del tensors["model.layers.2.mlp.up_proj.weight"]
    with pytest.raises(CorruptWeights, match=r"layers\.2\.mlp\.up_proj"):
        Shard(config, Span(0, LAYERS), LAYERS, tensors)
    tensors = dict(model.state_dict())
    tensors["model.norm.weight"] = torch.ones(3)
    with pytest.raises(CorruptWeights, match="shape"):
        Shard(config, Span(3, LAYERS), LAYERS, tensors)


CONFIG = {**SMALL, "model_type": "llama", "hidden_act": "silu"}


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "phi3"},
        {"model_type": "mixtral", "num_local_experts": 0},
        {"model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 3},
        {"model_type": "mixtral", "num_local_experts": 8, "num_experts": 9},
        {"model_type": "qwen3_moe", "moe_intermediate_size": None},
        {"model_type": "qwen3_moe", "decoder_sparse_step": 0},
        {"model_type": "qwen3_moe", "mlp_only_layers": [True]},
        {"model_type": None},
        {"hidden_act": "gelu"},
        {"partial_rotary_factor": 0.5},
        {"rope_scaling": {"type": "longrope", "factor": 2.0}},
        {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}},
        {"rope_scaling": {"rope_type": "default", "mrope_section": [1, 2]}},
        {"quantization_config": {"bits": 4}},
        {"architectures": ["LlamaForSequenceClassification"]},
        {"num_key_value_heads": 4},
        {"head_dim": 5},
        {"hidden_size": None},
        {"model_type": "mistral", "layer_types": ["full_attention"] * LAYERS},
        {"model_type": "qwen2", "layer_types": ["sliding_attention"] * LAYERS},
        {"model_type": "qwen2", "layer_types": ["chunked_attention"] * LAYERS},
        {"model_type": "qwen3", "layer_types": ["full_attention"]},
    ],
    ids=str,
)
def test_what_we_do_not_compute_is_refused(change):
    architecture(CONFIG)
    with pytest.raises(UnsupportedModel):
        architecture({**CONFIG, **change})


@pytest.mark.parametrize("name", MODELS)
def test_both_spellings_of_a_configuration_read_alike(name):
    """What transformers 4 wrote: rope_theta and rope_scaling instead of rope_parameters."""
    config = reference(name).config.to_dict()
    old = dict(config)
    given = dict(old.pop("rope_parameters"))
    old["rope_theta"] = given.pop("rope_theta")
    given["type"] = given.pop("rope_type")
    old["rope_scaling"] = None if given["type"] == "default" else given
    if "layer-types" not in name:
        old.pop("layer_types", None)
    assert architecture(old) == architecture(config)


@pytest.mark.parametrize("name", MODELS)
def test_rotary_frequencies_equal_transformers(name):
    embedding = reference(name).model.rotary_emb
    config = architecture(reference(name).config.to_dict())
    frequencies, scaling = config.rope.frequencies(config.head_dim)
    torch.testing.assert_close(frequencies, embedding.inv_freq, rtol=1e-6, atol=0)
    assert scaling == pytest.approx(embedding.attention_scaling)
