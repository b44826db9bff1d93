"""Members of a group read their slices: the right numbers, and no others than they need."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from hexswarm.errors import CorruptWeights, OutOfMemory
from hexswarm.peer import reading, weights
from hexswarm.peer.cuts import Cut, Member, cut_by_heads, plan_cut
from hexswarm.peer.slices import part_slices, read_sizes
from hexswarm.peer.weights import load_span, span_bytes
from hexswarm.records import Span
from hexswarm.store import ModelFolder, resolve
from tests import tiny

F32 = torch.float32
ALL = Span(0, tiny.LAYERS)
MOE = {
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 20,
    "mlp_only_layers": [1],
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelFolder]:
    """Safetensors in several files, a mixture, and GGUF as it is and with blocks of 32 weights."""
    home = tmp_path_factory.mktemp("sliced")
    llama = tiny.model("llama", attention_bias=True, mlp_bias=True)
    plain = tiny.model("llama", hidden_size=64, head_dim=16)
    paths = {
        "llama": tiny.save_folder(home / "llama", llama),
        "qwen3_moe": tiny.save_folder(home / "moe", tiny.model("qwen3_moe", **MOE)),
        "gguf": tiny.save_gguf(home / "plain.gguf", plain),
        "q8_0": tiny.save_gguf(home / "q8.gguf", plain, gguf.GGMLQuantizationType.Q8_0),
    }
    return {name: resolve(str(path), home=home) for name, path in paths.items()}


def cuts(folder: ModelFolder, span: Span = ALL) -> list[Cut]:
    sizes = read_sizes(folder.config, span)
    return [
        plan_cut(sizes, [Member(2.0), Member(1.0)]),
        plan_cut(sizes, [Member(1.0), Member(3.0)], "experts"),
        cut_by_heads(sizes, [1, 2, 1]),
    ]


def sliced(folder: ModelFolder, cut: Cut, rank: int, span: Span = ALL) -> dict[str, torch.Tensor]:
    """What a rank should get, out of tensors that were read whole."""
    whole = load_span(folder, span, dtype=F32)
    found = {}
    for name, part in part_slices(folder.config, span, cut.parts[rank]).items():
        rows = whole[name][part.rows.start : part.rows.stop]
        columns = part.columns
        found[name] = rows if columns is None else rows[:, columns.start : columns.stop]
    return found


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe", "gguf", "q8_0"])
@pytest.mark.parametrize("long_run", [1, 1 << 20], ids=["runs", "blocks"])
def test_slices_are_those_of_the_whole(
    folders: dict[str, ModelFolder],
    kind: str,
    long_run: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Read run by run, or cut out of blocks of a few rows."""
    monkeypatch.setattr(reading, "_LONG_RUN", long_run)
    monkeypatch.setattr(reading, "_BLOCK", 700)
    folder = folders[kind]
    for span in (ALL, Span(0, 1), Span(2, 3)):
        for cut in cuts(folder, span):
            for rank, part in enumerate(cut.parts):
                got = load_span(folder, span, dtype=F32, part=part)
                wanted = sliced(folder, cut, rank, span)
                assert got.keys() == wanted.keys()
                for name, tensor in got.items():
                    assert tensor.is_contiguous()
                    assert torch.equal(tensor, wanted[name]), name
                assert span_bytes(folder, span, F32, part) == sum(t.nbytes for t in got.values())


def test_a_member_reads_no_more_than_it_holds(
    folders: dict[str, ModelFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where runs are long, which they are in models that are cut in earnest."""
    read = 0
    fill = reading._fill

    def counted(file: Any, start: int, tensor: torch.Tensor, name: str) -> None:
        nonlocal read
        read += tensor.nbytes
        fill(file, start, tensor, name)

    monkeypatch.setattr(reading, "_fill", counted)
    monkeypatch.setattr(reading, "_LONG_RUN", 1)
    folder = folders["llama"]
    for part in cuts(folder)[0].parts:
        read = 0
        load_span(folder, ALL, dtype=F32, part=part)
        assert read == span_bytes(folder, ALL, F32, part)


def test_a_member_needs_memory_for_its_part_alone(
    folders: dict[str, ModelFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folders["llama"]
    small = cuts(folder)[0].parts[1]
    room = span_bytes(folder, ALL, F32, small)
    assert room < 0.4 * span_bytes(folder, ALL, F32)
    monkeypatch.setattr(weights, "free_bytes", lambda device: room)
    load_span(folder, ALL, dtype=F32, part=small)
    with pytest.raises(OutOfMemory):
        load_span(folder, ALL, dtype=F32)


@pytest.mark.parametrize("long_run", [1, 1 << 20], ids=["runs", "blocks"])
def test_a_file_that_ends_within_a_slice(
    tmp_path: Path, long_run: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it may when somebody writes to it after it was checked."""
    monkeypatch.setattr(reading, "_LONG_RUN", long_run)
    path = tiny.save_folder(tmp_path / "model", tiny.model("llama"), shard="1GB")
    folder = resolve(str(path), home=tmp_path)
    (name,) = folder.files
    reader = reading.reader(folder, name)
    part = cuts(folder)[0].parts[1]
    slices = part_slices(folder.config, ALL, part)
    tensor = next(n for n in slices if n.endswith("down_proj.weight"))
    file = folder.file(name)
    file.write_bytes(file.read_bytes()[:3000])
    with pytest.raises(CorruptWeights, match="ends within"):
        reader(tensor, slices[tensor])
