"""From a folder of weights to a running shard: bytes as announced, rounding as asked for."""

from __future__ import annotations

import pytest
import torch

from hexswarm.clock import RealClock
from hexswarm.config import PeerConfig
from hexswarm.errors import OutOfMemory
from hexswarm.kernels import dispatch
from hexswarm.kernels.quantise import dequantise, quantise
from hexswarm.peer.fitting import held_bytes, kept_bits, longest_runs
from hexswarm.peer.hosting import Machine
from hexswarm.peer.loading import load
from hexswarm.peer.models.registry import architecture
from hexswarm.peer.probe import BLOCKS
from hexswarm.peer.shard import Shard
from hexswarm.peer.weights import load_span, span_bytes
from hexswarm.progress import Quiet
from hexswarm.records import Span
from hexswarm.store import ModelFolder, resolve
from tests import tiny

WIDE = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 8, "head_dim": 16}
"""Large enough for int4."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    home = tmp_path_factory.mktemp("wide")
    model = tiny.model("llama", **WIDE, max_position_embeddings=512)
    return resolve(str(tiny.save_folder(home / "model", model)), home=home)


@pytest.mark.parametrize("span", [Span(0, 1), Span(1, 2), Span(0, 3)], ids=str)
@pytest.mark.parametrize(("quant", "bits"), [("none", 16), ("int8", 8), ("int4", 4)])
def test_the_bytes_that_are_planned_are_the_bytes_that_are_held(folder, span, quant, bits):
    pytest.importorskip("triton")
    weights = load_span(folder, span, dtype=torch.float16)
    config = architecture(folder.config)
    shard = Shard(config, span, 3, weights, "float16", backend="triton", quant=quant)
    assert shard.weight_bytes == held_bytes(folder, span, "float16", bits)
    assert not weights


def test_without_rounding_that_is_what_the_loader_reads(folder):
    for dtype in ("float32", "bfloat16"):
        assert held_bytes(folder, Span(0, 3), dtype) == span_bytes(folder, Span(0, 3), dtype)


def test_rounded_layers_make_longer_spans(folder):
    budget = held_bytes(folder, Span(0, 1), "bfloat16") + 1
    plain, rounded = (longest_runs(folder, 0, "bfloat16", budget, bits) for bits in (16, 4))
    assert plain[0] == 1
    assert rounded[1] == 2
    with pytest.raises(OutOfMemory):
        longest_runs(folder, 0, "bfloat16", 100, bits=4)


def test_bits_are_kept_where_triton_runs(folder, monkeypatch):
    config = PeerConfig(quant="int4")
    assert kept_bits(config, folder, "cpu", "float32") == 16
    monkeypatch.setattr(dispatch, "_young", lambda device: True)
    assert kept_bits(config, folder, "cuda", "bfloat16") == 4
    assert kept_bits(PeerConfig(), folder, "cuda", "bfloat16") == 16


def test_a_peer_with_room_for_one_block_knows_its_speed(folder, tmp_path, monkeypatch):
    """Rows that the pool has no blocks for were refused, in no time, and passed for fast ones."""
    monkeypatch.setenv("HEXSWARM_CACHE", str(tmp_path))
    config = PeerConfig(kv_tokens=16, threads=1)
    served = load(
        *(config, folder, Span(1, 2), "cpu", "float32", Quiet()), Machine(config, RealClock())
    )
    assert served.blocks == 1
    assert served.runner.pool.blocks == BLOCKS
    assert served.measured.speed.decode_layer_s > 1e-5


@pytest.mark.parametrize("quant", ["none", "int8"])
def test_a_peer_on_a_cpu_serves_the_rounded_model(folder, quant, tmp_path, monkeypatch):
    """Wider in memory than they were rounded, but with the same values; the class tells."""
    monkeypatch.setenv("HEXSWARM_CACHE", str(tmp_path))
    config = PeerConfig(quant=quant, kv_tokens=2048, threads=1)
    hosting = Machine(config, RealClock())
    served = load(config, folder, Span(1, 2), "cpu", "float32", Quiet(), hosting)
    name = "model.layers.1.mlp.down_proj.weight"
    weight = load_span(folder, Span(1, 2), dtype=torch.float32)[name]
    rounded = dequantise(quantise(weight, 8), torch.float32)
    wanted = weight if quant == "none" else rounded
    assert torch.equal(served.runner.shard.layers[0].down, wanted.t())
    assert served.numerics == ("float32" if quant == "none" else "float32+int8")
    assert served.measured.speed.decode_layer_s > 0


@pytest.mark.parametrize(
    ("device", "head_dim", "young", "backend"),
    [
        ("cuda", 64, True, "triton"),
        ("cuda", 16, True, "triton"),
        ("cuda", 8, True, "torch"),
        ("cuda", 96, True, "torch"),
        ("cuda", 64, False, "torch"),
        ("meta", 64, True, "torch"),
    ],
)
def test_the_backend_of_a_device(device, head_dim, young, backend, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(dispatch, "_young", lambda device: young)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert dispatch.choose(torch.device(device), dtype, head_dim) == backend
    monkeypatch.setattr(dispatch, "find_spec", lambda name: None)
    assert dispatch.choose(torch.device(device), torch.bfloat16, head_dim) == "torch"
