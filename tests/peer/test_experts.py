"""Mixtures of experts: transformers' answers to the last digits, and weights by span.

What all families share (any chunking, batches, crops) `test_models.py` holds for mixtures, too.
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch

from hexswarm.architecture import numerics, span_shapes
from hexswarm.errors import UnsupportedModel
from hexswarm.experts import read_experts
from hexswarm.kernels import dispatch, native
from hexswarm.kernels.quantise import dequantise, quantise
from hexswarm.kernels.ragged import ragged
from hexswarm.kernels.reference import route
from hexswarm.peer.fitting import held_bytes, longest_runs
from hexswarm.peer.models.experts import MixtureLayer
from hexswarm.peer.models.registry import architecture
from hexswarm.peer.shard import Shard
from hexswarm.peer.weights import load_span
from hexswarm.records import Span
from hexswarm.store import ModelFolder, resolve
from tests import tiny

torch.set_num_threads(1)
CPU = torch.device("cpu")
CHANGES = {
    "mixtral": {"num_local_experts": 5, "num_experts_per_tok": 2},
    "qwen3_moe": {
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 20,
        "mlp_only_layers": [1],
    },
}
BACKENDS = ["torch", *(["native"] if native.available() else [])]
IDS = torch.randint(0, 200, (24,), generator=torch.Generator().manual_seed(1)).tolist()


def build(family):
    return tiny.model(family, **CHANGES[family], experts_implementation="eager")


@pytest.fixture(scope="module")
def built():
    return {family: build(family) for family in tiny.MIXTURES}


@pytest.fixture(scope="module")
def folders(built, tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelFolder]:
    """Read back from files that transformers wrote."""
    home = tmp_path_factory.mktemp("mixtures")
    found = {}
    for family, model in built.items():
        path: Path = tiny.save_folder(home / family, model, shard="100KB")
        found[family] = resolve(str(path), home=home)
    return found


class Line:
    """Stages one after another for one session."""

    def __init__(self, folder, cuts=(), backend="torch", dtype="float32", **options):
        config = architecture(folder.config)
        self.shards, self.position = [], 0
        for first, end in itertools.pairwise((0, *cuts, tiny.LAYERS)):
            tensors = load_span(folder, Span(first, end), dtype=torch.float32)
            shard = Shard(config, Span(first, end), tiny.LAYERS, tensors, dtype, backend=backend,
                          **options)  # fmt: skip
            assert not tensors
            self.shards.append(shard)
        self.pools = [shard.make_pool(8) for shard in self.shards]
        for pool in self.pools:
            pool.data.fill_(float("nan"))

    @torch.inference_mode()
    def logits(self, ids):
        """Of every token of the next piece."""
        x = self.shards[0].embed(torch.tensor(ids))
        for shard, pool in zip(self.shards, self.pools, strict=True):
            batch = ragged([pool.extent(self.position, len(ids), (3, 1, 7, 4))], CPU)
            x = shard.forward(x, batch, pool)
        self.position += len(ids)
        return self.shards[-1].head(x)


def assert_close(got, expected, relative=1e-5):
    assert (got - expected).abs().max() <= relative * expected.abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cuts", [(), (1,), (2,), (1, 2)], ids=str)
@pytest.mark.parametrize("family", tiny.MIXTURES)
def test_logits_equal_transformers_wherever_it_is_cut(built, folders, family, cuts, backend):
    with torch.no_grad():
        expected = built[family](torch.tensor([IDS])).logits[0]
    line = Line(folders[family], cuts, backend)
    assert_close(line.logits(IDS[:20]), expected[:20])  # longer than what runs in C
    for position in range(20, len(IDS)):
        assert_close(line.logits(IDS[position : position + 1])[0], expected[position])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", tiny.MIXTURES)
def test_greedy_answers_equal_generate(built, folders, family, backend):
    line, ids = Line(folders[family], (1,), backend), list(IDS[:9])
    with torch.no_grad():
        expected = built[family].generate(
            torch.tensor([ids]), max_new_tokens=24, min_new_tokens=24, do_sample=False
        )
    piece = ids
    for _ in range(24):
        logits = line.logits(piece)[-1].clone()
        logits[0] = -math.inf  # the end, as with `min_new_tokens`
        piece = [int(logits.argmax())]
        ids += piece
    assert ids == expected[0].tolist()


@pytest.mark.parametrize("normalised", [False, True])
def test_routing_is_softmax_then_the_largest(normalised):
    scores = torch.randn(40, 9, generator=torch.Generator().manual_seed(2))
    shares, experts = route(scores, 3, normalised)
    exact = scores.double().softmax(-1)
    for token in range(40):
        chosen = sorted(range(9), key=lambda expert: -exact[token, expert])[:3]
        assert experts[token].tolist() == chosen
        wanted = exact[token, chosen] / (exact[token, chosen].sum() if normalised else 1)
        torch.testing.assert_close(shares[token].double(), wanted, rtol=1e-5, atol=0)


def test_a_mixture_equals_its_definition_in_float64(folders):
    """Each token by itself, each expert by itself; the tokens of a batch crowd on a few experts."""
    shard = Line(folders["qwen3_moe"]).shards[0]
    layer = shard.layers[0]
    assert isinstance(layer, MixtureLayer)
    y = torch.randn(1, 32).repeat(30, 1) + 0.2 * torch.randn(30, 32)
    shares, experts = route(y @ layer.router, layer.chosen, layer.normalised)
    got = shard.operations.mix(y, shares, experts, layer.gate_up, layer.down)
    for token in range(30):
        wanted = torch.zeros(32, dtype=torch.double)
        for share, expert in zip(shares[token], experts[token].tolist(), strict=True):
            gate, up = (y[token].double() @ layer.gate_up[expert].double()).chunk(2)
            inner = torch.nn.functional.silu(gate) * up
            wanted += share.double() * (inner @ layer.down[expert].double())
        assert_close(got[token].double(), wanted)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", tiny.MIXTURES)
def test_half_precision_computes(built, folders, family, dtype):
    """Not close in each token: rounding may send one to another expert."""
    with torch.no_grad():
        expected = built[family](torch.tensor([IDS])).logits[0]
    got = Line(folders[family], dtype=dtype).logits(IDS)
    far = (got - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert far.median() < 0.1


def test_rounding_leaves_the_router_alone(folders):
    folder = folders["mixtral"]
    layer = Line(folder, quant="int8").shards[0].layers[2]
    stored = load_span(folder, Span(2, 3), dtype=torch.float32)
    prefix = "model.layers.2.block_sparse_moe"
    assert torch.equal(layer.router, stored[f"{prefix}.gate.weight"].t())
    down = stored[f"{prefix}.experts.4.w2.weight"]
    assert torch.equal(layer.down[4], dequantise(quantise(down, 8), torch.float32).t())


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's, of NaN
@pytest.mark.parametrize(
    ("family", "quant", "way"),
    [
        ("mixtral", "none", "grouped"),
        ("qwen3_moe", "none", "grouped"),
        ("qwen3_moe", "none", "loop"),
        ("mixtral", "int8", "grouped"),
    ],
)
def test_triton_runs_them(folders, family, quant, way, monkeypatch):
    """Grouped in the graph with the layers around them; else layer by layer."""
    pytest.importorskip("triton")
    monkeypatch.setattr(dispatch, "MIXTURES", way)
    outcomes = []
    for backend in ("torch", "triton"):
        line = Line(folders[family], (2,), backend, quant=quant)
        shard, pool = line.shards[0], line.pools[0]
        shard.warm(pool, (1,))
        with torch.inference_mode():
            batch = ragged([pool.extent(0, 2, (3,)), pool.extent(0, 1, (1,))], CPU)
            prompt = shard.forward(shard.embed(torch.tensor(IDS[:3])), batch, pool)
            steps = [pool.extent(2, 1, (3,)), pool.extent(1, 1, (1,)), pool.extent(0, 1, (2,))]
            batch = ragged(steps, CPU)
            last = shard.forward(shard.embed(torch.tensor(IDS[3:6])), batch, pool)
        outcomes.append(torch.cat((prompt, last)))
        assert len(shard._graphed) == (backend == "triton" and quant == "none" and way == "grouped")
    assert_close(*outcomes)


@pytest.mark.parametrize("family", tiny.MIXTURES)
def test_spans_hold_the_tensors_of_the_checkpoint(built, folders, family):
    expected = tiny.checkpoint(built[family])
    for span in (Span(0, 1), Span(1, 2), Span(2, 3)):
        for name, tensor in load_span(folders[family], span, dtype=torch.float32).items():
            assert torch.equal(tensor, expected.pop(name)), name
    assert not expected


@pytest.mark.parametrize("family", tiny.MIXTURES)
def test_bytes_of_a_span_are_those_of_its_layers(folders, family):
    """A mixture is larger than a layer with one MLP, and both are counted."""
    folder = folders[family]
    for first, end in itertools.combinations(range(tiny.LAYERS + 1), 2):
        held = held_bytes(folder, Span(first, end), "float32")
        shards = Line(folder, tuple({first, end} - {0, tiny.LAYERS})).shards
        assert held == next(s.weight_bytes for s in shards if s.span == Span(first, end)) - (
            _expanded_norm_bytes(shards[0].architecture, end - first)
        )
        longest = longest_runs(folder, 0, "float32", held)
        assert longest[first] >= end - first
        for start, count in enumerate(longest):
            fits = Span(start, start + count) if count else None
            assert fits is None or held_bytes(folder, fits, "float32") <= held


def _expanded_norm_bytes(config, layers):
    """Norms of queries and keys are stored per head."""
    each = (config.heads + config.kv_heads - 2) * config.head_dim * 4
    return each * layers if config.qk_norm else 0


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("mixtral", {"num_experts_per_tok": 1}),
        ("mixtral", {"num_local_experts": 4}),
        ("qwen3_moe", {"norm_topk_prob": True}),
        ("qwen3_moe", {"mlp_only_layers": [0]}),
        ("qwen3_moe", {"decoder_sparse_step": 2}),
        ("qwen3_moe", {"rope_parameters": {"rope_theta": 5.0}}),
    ],
)
def test_what_changes_the_answers_changes_the_digest(folders, family, change):
    config = folders[family].config
    assert numerics({**config, **change}) != numerics(config)


def test_spellings_of_one_model_have_one_digest(folders):
    config = dict(folders["qwen3_moe"].config)
    named = {**config, "num_experts": config["num_local_experts"]}
    del named["num_local_experts"]
    sparse = {**config, "decoder_sparse_step": 1, "router_aux_loss_coef": 0.5}
    assert numerics(config) == numerics(named) == numerics(sparse)
    mixtral = folders["mixtral"].config
    plain = {key: value for key, value in mixtral.items() if key != "rope_parameters"}
    assert numerics(mixtral) == numerics(plain)


def test_a_large_mixture_is_sized_by_its_config_alone():
    """Qwen3-30B-A3B: 30.5 G parameters in 48 layers."""
    config = {
        "model_type": "qwen3_moe", "num_hidden_layers": 48, "hidden_size": 2048,
        "intermediate_size": 6144, "moe_intermediate_size": 768, "num_experts": 128,
        "num_experts_per_tok": 8, "num_attention_heads": 32, "num_key_value_heads": 4,
        "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 40960,
        "norm_topk_prob": True,
    }  # fmt: skip
    shapes = span_shapes(config, Span(0, 48))
    assert len(shapes) == 18_867
    assert sum(map(math.prod, shapes.values())) == 30_532_122_624


@pytest.mark.parametrize("change", [{"num_local_experts": 1 << 20}, {"num_experts_per_tok": "2"}])
def test_odd_numbers_are_refused(change):
    with pytest.raises(UnsupportedModel):
        read_experts({"model_type": "mixtral", **change}, 3)
    assert read_experts({"model_type": "llama", **change}, 3) is None
