"""Loading a span: the right tensors, verified, converted, and refusals with a remedy."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from hexswarm.config import DEFAULT_MODEL
from hexswarm.config import cache as default_home
from hexswarm.errors import (
    CorruptWeights,
    OutOfMemory,
    UnknownModel,
    UnsupportedModel,
    UsageError,
)
from hexswarm.manifest import write_manifest
from hexswarm.peer import reading, weights
from hexswarm.peer.memory import free_bytes
from hexswarm.peer.weights import load_span, span_bytes
from hexswarm.progress import Quiet
from hexswarm.records import Span
from hexswarm.store import INDEX, ModelFolder, resolve, span_files
from tests import tiny

F32 = torch.float32


class Bars(Quiet):
    """Progress that remembers the bars."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def bar(self, what: str, total_bytes: int) -> Any:
        self.seen.append(what)
        return super().bar(what, total_bytes)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_folder(tmp_path_factory.mktemp("tiny") / "model", tiny.model("llama"))


@pytest.fixture
def path(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "model"))


@pytest.fixture
def folder(path: Path, tmp_path: Path) -> ModelFolder:
    return resolve(str(path), home=tmp_path / "home")


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("form", ["folder", "gguf"])
def test_spans_hold_the_models_tensors(tmp_path: Path, family: str, form: str) -> None:
    built = tiny.model(family)
    place = (
        tiny.save_folder(tmp_path / "model", built)
        if form == "folder"
        else tiny.save_gguf(tmp_path / "model.gguf", built)
    )
    folder = resolve(str(place), home=tmp_path / "home")
    expected = built.state_dict()
    loaded: dict[str, torch.Tensor] = {}
    for span in (Span(0, 1), Span(1, 2), Span(2, 3)):
        part = load_span(folder, span, dtype=F32)
        assert not set(part) & set(loaded)
        loaded |= part
    assert set(loaded) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(loaded[name], tensor), name


def test_only_the_ends_hold_embedding_norm_and_head(folder: ModelFolder) -> None:
    ends = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    held = [set(load_span(folder, Span(n, n + 1), dtype=F32)) & ends for n in range(tiny.LAYERS)]
    assert held == [{"model.embed_tokens.weight"}, set(), ends - {"model.embed_tokens.weight"}]


@pytest.mark.parametrize("form", ["folder", "gguf"])
def test_a_tied_head_is_the_embedding(tmp_path: Path, form: str) -> None:
    built = tiny.model("qwen3", tied=True)
    place = (
        tiny.save_folder(tmp_path / "model", built)
        if form == "folder"
        else tiny.save_gguf(tmp_path / "model.gguf", built)
    )
    folder = resolve(str(place), home=tmp_path / "home")
    whole = load_span(folder, Span(0, 3), dtype=F32)
    tail = load_span(folder, Span(2, 3), dtype=F32)
    assert "lm_head.weight" not in whole | tail
    for part in (whole, tail):
        assert torch.equal(part["model.embed_tokens.weight"], built.get_input_embeddings().weight)
    assert span_bytes(folder, Span(2, 3), F32) == sum(t.nbytes for t in tail.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_and_the_predicted_size(folder: ModelFolder, dtype: torch.dtype) -> None:
    for span in (Span(0, 3), Span(0, 1), Span(1, 2), Span(1, 3)):
        tensors = load_span(folder, span, dtype=dtype)
        assert {tensor.dtype for tensor in tensors.values()} == {dtype}
        needed = sum(tensor.nbytes for tensor in tensors.values())
        name = str(dtype).removeprefix("torch.")
        assert span_bytes(folder, span, dtype) == span_bytes(folder, span, name) == needed
    exact = tiny.model("llama").state_dict()["model.norm.weight"]
    assert torch.equal(tensors["model.norm.weight"], exact.to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_files_in_half_precision(tmp_path: Path, dtype: torch.dtype) -> None:
    built = tiny.model("mistral").to(dtype)
    place = tiny.save_folder(tmp_path / "model", built)
    folder = resolve(str(place), home=tmp_path / "home")
    for wanted in (dtype, F32):
        loaded = load_span(folder, Span(0, 3), dtype=wanted)
        for name, tensor in built.state_dict().items():
            assert torch.equal(loaded[name], tensor.to(wanted))


def test_a_quantised_gguf(tmp_path: Path) -> None:
    built = tiny.model("qwen2")
    path = tiny.save_gguf(tmp_path / "q.gguf", built, gguf.GGMLQuantizationType.Q8_0)
    folder = resolve(str(path), home=tmp_path / "home")
    loaded = load_span(folder, Span(0, 3), dtype=torch.bfloat16)
    for name, tensor in built.state_dict().items():
        torch.testing.assert_close(loaded[name].float(), tensor, atol=0.02, rtol=0.02)


def test_only_files_of_the_span_are_read(path: Path, folder: ModelFolder) -> None:
    write_manifest(path, folder.files)
    for name in set(folder.files) - set(span_files(folder, Span(1, 2))):
        (path / name).unlink()
    partial = resolve(str(path), home=folder.home, span=Span(1, 2))
    assert load_span(partial, Span(1, 2), dtype=F32)
    with pytest.raises(UnknownModel, match="lacks"):
        load_span(partial, Span(0, 2), dtype=F32)


def test_a_restart_does_not_hash_again(folder: ModelFolder) -> None:
    bars = Bars()
    load_span(folder, Span(0, 3), dtype=F32, progress=bars)
    assert bars.seen == ["loading layers 0:3"]


@pytest.mark.parametrize("damage", ["flip", "truncate", "swap", "remove"])
def test_an_altered_file_is_not_loaded(path: Path, folder: ModelFolder, damage: str) -> None:
    (name,) = list(span_files(folder, Span(1, 2)))[:1]
    victim, data = path / name, bytearray((path / name).read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 4
        victim.write_bytes(data)
        os.utime(victim, ns=(9, 9))
    elif damage == "truncate":
        victim.write_bytes(data[:-4])
    elif damage == "swap":
        shutil.copy(path / next(iter(span_files(folder, Span(0, 1)))), victim)
    else:
        victim.unlink()
    with pytest.raises((CorruptWeights, UnknownModel)):
        load_span(folder, Span(1, 2), dtype=F32)


def test_an_altered_gguf_is_not_loaded(tmp_path: Path) -> None:
    path = tiny.save_gguf(tmp_path / "m.gguf", tiny.model("llama"))
    folder = resolve(str(path), home=tmp_path / "home")
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(9, 9))
    with pytest.raises(CorruptWeights, match="not the file"):
        load_span(folder, Span(0, 1), dtype=F32)


@pytest.mark.parametrize("span", [Span(0, 4), Span(3, 4), Span(7, 9)])
def test_a_span_beyond_the_model(folder: ModelFolder, span: Span) -> None:
    with pytest.raises(UsageError):
        load_span(folder, span, dtype=F32)
    with pytest.raises(UsageError):
        span_bytes(folder, span, F32)


def test_a_span_that_does_not_fit(folder: ModelFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "free_bytes", lambda device: 1000)
    with pytest.raises(OutOfMemory, match="--span"):
        load_span(folder, Span(0, 3), dtype=F32)


def test_running_out_while_loading(folder: ModelFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")):

        def full(*_: Any, error: Exception = error) -> Any:
            raise error

        monkeypatch.setattr(reading, "_read_tensor", full)
        with pytest.raises(OutOfMemory):
            load_span(folder, Span(0, 1), dtype=F32)


def test_memory_is_measured() -> None:
    assert 1 << 20 < free_bytes("cpu") < 1 << 50


def test_a_config_that_contradicts_the_weights(path: Path, tmp_path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "intermediate_size": 128}))
    folder = resolve(str(path), home=tmp_path / "home")
    with pytest.raises(CorruptWeights, match="shape"):
        load_span(folder, Span(0, 1), dtype=F32)
    (path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    folder = resolve(str(path), home=tmp_path / "home")
    with pytest.raises(CorruptWeights, match="has no tensor"):
        load_span(folder, Span(3, 4), dtype=F32)


def test_an_index_that_contradicts_the_files(path: Path, tmp_path: Path) -> None:
    index = json.loads((path / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = "model-00001-of-00010.safetensors"
    (path / INDEX).write_text(json.dumps(index))
    folder = resolve(str(path), home=tmp_path / "home")
    with pytest.raises(CorruptWeights, match="has no tensor"):
        load_span(folder, Span(2, 3), dtype=F32)


def test_tensors_that_we_would_ignore_are_refused(path: Path, tmp_path: Path) -> None:
    index = json.loads((path / INDEX).read_text())
    file = index["weight_map"]["model.norm.weight"]
    index["weight_map"]["model.layers.1.self_attn.rotary_emb.inv_freq"] = file
    (path / INDEX).write_text(json.dumps(index))
    load_span(resolve(str(path), home=tmp_path / "home"), Span(0, 3), dtype=F32)
    index["weight_map"]["model.layers.1.self_attn.q_proj.lora"] = file
    (path / INDEX).write_text(json.dumps(index))
    folder = resolve(str(path), home=tmp_path / "home")
    load_span(folder, Span(0, 1), dtype=F32)
    with pytest.raises(UnsupportedModel, match="lora"):
        load_span(folder, Span(1, 2), dtype=F32)


def test_the_default_loads_one_layer() -> None:
    folder = resolve(DEFAULT_MODEL, home=default_home(), span=Span(29, 30))
    tensors = load_span(folder, Span(29, 30), dtype=torch.bfloat16)
    assert len(tensors) == 9 + 2
    assert tensors["model.embed_tokens.weight"].shape == (49152, 576)
