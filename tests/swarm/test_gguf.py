"""GGUF: the numbers of the model that it was written from, and damage that is always typed."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from hexswarm.errors import CorruptWeights, ModelError, UnsupportedModel
from hexswarm.gguf import MAX_ITEMS, read_gguf
from hexswarm.gguf_config import _llama3_factors, _shortest, gguf_config
from hexswarm.records import Span
from hexswarm.store import GGUF_NAME, resolve
from tests import tiny

Q8_0 = gguf.GGMLQuantizationType.Q8_0


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("gguf")
    return {f: tiny.save_gguf(folder / f"{f}.gguf", tiny.model(f)) for f in tiny.FAMILIES}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_gguf_holds_the_same_tensors_as_its_model(files: dict[str, Path], family: str) -> None:
    header = read_gguf(files[family])
    named = header.hf_tensors()
    expected = tiny.model(family).state_dict()
    assert set(named) == set(expected)
    for name, tensor in expected.items():
        assert np.array_equal(header.array(named[name]), tensor.numpy()), name


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_its_config_makes_the_same_model(files: dict[str, Path], family: str) -> None:
    header = read_gguf(files[family])
    config = gguf_config(header)
    assert config["model_type"] == family
    rebuilt = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**config)
    ).eval()
    tensors = {n: torch.from_numpy(header.array(t)) for n, t in header.hf_tensors().items()}
    rebuilt.load_state_dict(tensors)
    ids = torch.tensor([[5, 17, 99, 3]])
    with torch.inference_mode():
        assert torch.equal(rebuilt(ids).logits, tiny.model(family)(ids).logits)


def test_our_reading_agrees_with_the_gguf_package(files: dict[str, Path]) -> None:
    ours, theirs = read_gguf(files["qwen3"]), gguf.GGUFReader(files["qwen3"])
    for tensor in theirs.tensors:
        mine = ours.tensors[tensor.name]
        assert (mine.start, mine.shape) == (tensor.data_offset, tensor.data.shape)
    for key in ours.metadata:
        assert ours.metadata[key] == theirs.fields[key].contents()


@pytest.mark.parametrize(
    "kind",
    [
        Q8_0,
        gguf.GGMLQuantizationType.F16,
        gguf.GGMLQuantizationType.BF16,
        gguf.GGMLQuantizationType.Q4_0,
    ],
)
def test_quantised_tensors_come_as_float32(tmp_path: Path, kind: Any) -> None:
    path = tiny.save_gguf(tmp_path / "q.gguf", tiny.model("llama"), kind)
    header = read_gguf(path)
    for name, tensor in tiny.model("llama").state_dict().items():
        array = header.array(header.hf_tensors()[name])
        assert array.dtype == np.float32
        assert np.abs(array - tensor.numpy()).max() < (0.25 if kind.name == "Q4_0" else 0.01)


@pytest.mark.parametrize("tied", [False, True])
def test_tied_embeddings_are_seen(tmp_path: Path, tied: bool) -> None:
    path = tiny.save_gguf(tmp_path / "t.gguf", tiny.model("qwen2", tied=tied))
    header = read_gguf(path)
    assert gguf_config(header)["tie_word_embeddings"] == tied
    assert ("lm_head.weight" in header.hf_tensors()) != tied


def test_a_gguf_resolves_to_a_folder_of_config_and_tokenizer(
    files: dict[str, Path], home: Path, tmp_path: Path
) -> None:
    found = resolve(str(files["llama"]), home=home, span=Span(1, 3))
    assert found.gguf == files["llama"]
    assert (list(found.files), found.spec.name) == ([GGUF_NAME], "llama")
    assert found.path.parent == home / "models"
    assert {path.name for path in found.path.iterdir()} == {
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    renamed = shutil.copy(files["llama"], tmp_path / "other name.GGUF")
    assert resolve(str(renamed), home=home).spec.digest == found.spec.digest
    assert resolve(str(files["qwen2"]), home=home).spec.digest != found.spec.digest


def test_its_tokenizer_works_in_transformers(files: dict[str, Path], home: Path) -> None:
    folder = resolve(str(files["llama"]), home=home).path
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("that a héllo<end>")["input_ids"]
    assert tokenizer.decode(ids) == "that a héllo<end>"
    assert {tiny.WORDS.index("th"), tiny.WORDS.index("Ġa"), 0} <= set(ids)
    assert tokenizer.chat_template == tiny.TEMPLATE
    assert tokenizer.eos_token_id == 0


def test_a_config_of_an_older_conversion_is_replaced(files: dict[str, Path], home: Path) -> None:
    folder = resolve(str(files["qwen3"]), home=home).path
    good = (folder / "config.json").read_text()
    (folder / "config.json").write_text("{}")
    assert resolve(str(files["qwen3"]), home=home).config == json.loads(good)
    assert (folder / "config.json").read_text() == good


def test_shortest_is_the_same_float32() -> None:
    assert _shortest(np.float32(1e-5)) == 1e-5
    assert _shortest(np.float32(1e6)) == 1e6
    assert np.float32(_shortest(np.float32(1 / 3))) == np.float32(1 / 3)


# ---------------------------------------------------------------------------- rotary scaling


def llama3(tmp_path: Path, factors: list[float]) -> dict[str, Any]:
    """The config of a GGUF with the table `factors`."""
    path = tmp_path / "rope.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for add, value in (
        (writer.add_block_count, 1), (writer.add_context_length, 131072),
        (writer.add_embedding_length, 256), (writer.add_feed_forward_length, 8),
        (writer.add_head_count, 4), (writer.add_layer_norm_rms_eps, 1e-5),
        (writer.add_rope_freq_base, 500000.0),
    ):  # fmt: skip
        add(value)
    writer.add_token_list(["a"])
    writer.add_tensor("rope_freqs.weight", np.array(factors, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return gguf_config(read_gguf(path))


def test_the_table_of_llama_3_becomes_its_parameters(tmp_path: Path) -> None:
    config = llama3(tmp_path, _llama3_factors(8.0, 64, 500000.0))
    assert config["rope_scaling"]["rope_type"] == "llama3"
    assert config["rope_scaling"]["factor"] == 8.0
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    plain = {key: value for key, value in config.items() if key != "rope_scaling"}
    scaled, unscaled = (
        LlamaRotaryEmbedding(transformers.AutoConfig.for_model(**entry)).inv_freq
        for entry in (config, plain)
    )
    factors = torch.tensor(_llama3_factors(8.0, 64, 500000.0))
    torch.testing.assert_close(unscaled / scaled, factors)


def test_a_table_that_scales_nothing_or_strangely(tmp_path: Path) -> None:
    assert "rope_scaling" not in llama3(tmp_path, [1.0] * 32)
    with pytest.raises(UnsupportedModel, match="unknown way"):
        llama3(tmp_path, [2.0] * 31 + [3.0])


# ---------------------------------------------------------------------------- damage


def test_other_architectures_and_tensors_are_unsupported(
    files: dict[str, Path], tmp_path: Path
) -> None:
    data = files["qwen2"].read_bytes()
    other = tmp_path / "x.gguf"
    other.write_bytes(data.replace(b"qwen2", b"gemma"))
    with pytest.raises(UnsupportedModel, match="gemma"):
        resolve(str(other), home=tmp_path)
    other.write_bytes(data.replace(b"blk.0.ffn_up.", b"blk.0.ffn_xy."))
    with pytest.raises(UnsupportedModel, match="ffn_xy"):
        resolve(str(other), home=tmp_path)


@pytest.mark.parametrize("keep", [0, 3, 4, 23, 24, 100, 3000, -20_000, -1])
def test_a_truncated_file_is_corrupt(files: dict[str, Path], tmp_path: Path, keep: int) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(files["llama"].read_bytes()[:keep])
    with pytest.raises(CorruptWeights):
        read_gguf(cut)


def head(tensors: int, entries: int, rest: bytes = b"", version: int = 3) -> bytes:
    return struct.pack("<4sIQQ", b"GGUF", version, tensors, entries) + rest


def pair(key: bytes, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(key)) + key + struct.pack("<I", kind) + value


def info(name: bytes, dims: list[int], kind: int, offset: int) -> bytes:
    numbers = struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)
    return struct.pack("<Q", len(name)) + name + numbers


HOSTILE = {
    "magic": b"GGML" + b"\0" * 100,
    "version": head(0, 0, version=1),
    "big-endian": struct.pack(">4sIQQ", b"GGUF", 3, 0, 0),
    "many tensors": head(1 << 60, 0, b"\0" * 100),
    "many entries": head(0, MAX_ITEMS, b"\0" * 100),
    "long array": head(0, 1, pair(b"a", 9, struct.pack("<IQ", 0, 1 << 62))),
    "array beyond the file": head(0, 1, pair(b"a", 9, struct.pack("<IQ", 10, MAX_ITEMS))),
    "strings beyond the file": head(0, 1, pair(b"a", 9, struct.pack("<IQ", 8, MAX_ITEMS))),
    "nested array": head(0, 1, pair(b"a", 9, struct.pack("<IQIQ", 9, 1, 9, 1))),
    "long string": head(0, 1, pair(b"a", 8, struct.pack("<Q", 1 << 63))),
    "not UTF-8": head(0, 1, pair(b"\xff", 7, b"\1")),
    "unknown type": head(0, 1, pair(b"a", 13, b"\1" * 8)),
    "twice": head(0, 2, pair(b"a", 7, b"\1") * 2),
    "alignment": head(0, 1, pair(b"general.alignment", 4, struct.pack("<I", 3))),
    "no dimensions": head(1, 0, info(b"a", [], 0, 0) + b"\0" * 99),
    "five dimensions": head(1, 0, info(b"a", [1] * 5, 0, 0) + b"\0" * 99),
    "unknown tensor type": head(1, 0, info(b"a", [1], 999, 0) + b"\0" * 99),
    "huge tensor": head(1, 0, info(b"a", [1 << 63] * 4, 0, 0) + b"\0" * 99),
    "odd row": head(1, 0, info(b"a", [31], 8, 0) + b"\0" * 99),
    "empty tensor": head(1, 0, info(b"a", [0], 0, 0) + b"\0" * 99),
    "overlap": head(2, 0, info(b"a", [2], 0, 0) + info(b"b", [2], 0, 4) + b"\0" * 99),
    "same name": head(2, 0, info(b"a", [2], 0, 0) + info(b"a", [2], 0, 32) + b"\0" * 99),
    "far offset": head(1, 0, info(b"a", [2], 0, 1 << 63) + b"\0" * 99),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_header_is_corrupt(tmp_path: Path, name: str) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(HOSTILE[name])
    with pytest.raises(CorruptWeights):
        read_gguf(path)


def test_missing_metadata_is_corrupt(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    name = struct.pack("<Q", 5) + b"llama"
    path.write_bytes(head(0, 1, pair(b"general.architecture", 8, name)))
    with pytest.raises(CorruptWeights, match="embedding_length"):
        resolve(str(path), home=tmp_path)


@settings(max_examples=150)
@given(st.data())
def test_any_damage_is_a_model_error_or_harmless(
    files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Bytes overwritten anywhere in the header: read and configured, or a ModelError."""
    content = bytearray(files["llama"].read_bytes())
    end = min(tensor.start for tensor in read_gguf(files["llama"]).tensors.values())
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, end - 9))
        patch = data.draw(st.binary(min_size=1, max_size=8))
        content[place : place + len(patch)] = patch
    path = tmp_path_factory.getbasetemp() / "fuzz.gguf"
    path.write_bytes(content)
    try:
        header = read_gguf(path)
        gguf_config(header)
        header.hf_tensors()
    except ModelError:
        pass


def test_a_file_that_ends_too_soon_is_told_of_in_words(tmp_path: Path) -> None:
    short = tmp_path / "short.gguf"
    short.write_bytes(b"junk\n")
    with pytest.raises(CorruptWeights, match="ends after 5 bytes, in the midst of its header"):
        read_gguf(short)
