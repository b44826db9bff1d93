"""A GGUF in Q4_0 with `--quant int4`: its own numbers, in its own four bits, on every backend."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import save_file

from hexswarm.clock import RealClock
from hexswarm.config import PeerConfig
from hexswarm.errors import CorruptWeights, NoRoute
from hexswarm.gguf import GgufFile, read_gguf
from hexswarm.kernels.quantise import Quantised, dequantise
from hexswarm.kernels.ragged import Extent, ragged
from hexswarm.peer.commands import Plan
from hexswarm.peer.cuts import Cut, cut_by_heads
from hexswarm.peer.fitting import held_bytes
from hexswarm.peer.groups import entry
from hexswarm.peer.hosting import Machine
from hexswarm.peer.loading import load, tell_packed
from hexswarm.peer.models.registry import architecture
from hexswarm.peer.packing import kept_of
from hexswarm.peer.rank import load as load_rank
from hexswarm.peer.ranks import Ranks
from hexswarm.peer.runner import Runner
from hexswarm.peer.shard import Shard
from hexswarm.peer.slices import part_slices, read_sizes
from hexswarm.peer.stream_sums import StreamSums
from hexswarm.peer.sums import thread_sums
from hexswarm.peer.weights import load_span, stream_span
from hexswarm.progress import Quiet
from hexswarm.records import RouteRequest, Span
from hexswarm.router.network import snapshot
from hexswarm.router.routing import find_route
from hexswarm.store import ModelFolder, resolve
from tests import tiny
from tests.peer.test_shard_triton import BLOCK, BLOCKS, answer
from tests.router.test_routing import peer
from tests.strategies import peer_id

Q4_0, Q4_1, Q8_0 = (gguf.GGMLQuantizationType[name] for name in ("Q4_0", "Q4_1", "Q8_0"))
F32, ALL = torch.float32, Span(0, tiny.LAYERS)
SIZES = {"hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32,
         "intermediate_size": 512, "max_position_embeddings": 512}  # fmt: skip
SMALL = {**SIZES, "hidden_size": 128, "head_dim": 16, "intermediate_size": 128}
TEXTS = [[1, 2, 3]]
HALVES, UNEVEN = (4, 4), (2, 6)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelFolder]:
    """Rows of q and k permuted (llama) or not; groups of 32, 16 and none; other types beside."""
    home = tmp_path_factory.mktemp("packed")
    others = {"v_proj": Q4_1, "layers.1.mlp.up_proj": Q8_0, "embed": Q8_0}
    odd = {**SIZES, "intermediate_size": 384}
    made: dict[str, tuple[str, dict[str, int], dict[str, Any]]] = {
        "llama": ("llama", SIZES, {}),
        "small": ("qwen2", SMALL, {}),
        "mixed": ("llama", odd, others),
        "narrow": ("qwen2", {**odd, "intermediate_size": 96}, {}),
    }
    found = {}
    for name, (family, sizes, kinds) in made.items():
        built = tiny.model(family, tied=name == "mixed", **sizes)
        path = tiny.save_gguf(home / f"{name}.gguf", built, Q4_0, kinds)
        found[name] = resolve(str(path), home=home)
    return found


def shard_of(
    folder: ModelFolder,
    quant: str,
    backend: str,
    dtype: torch.dtype = F32,
    span: Span = ALL,
) -> Shard:
    with stream_span(folder, span, dtype=dtype, quant=quant) as tensors:
        return Shard(
            *(architecture(folder.config), span, tiny.LAYERS, tensors, dtype),
            backend=backend,
            quant=quant,
        )


def runner_of(folder: ModelFolder, quant: str, backend: str) -> Runner:
    shard = shard_of(folder, quant, backend)
    return Runner(shard, shard.make_pool(BLOCKS, BLOCK))


def in_file(folder: ModelFolder, layer: int, *names: str) -> torch.Tensor:
    """The file's numbers, in the order of a fused matrix."""
    tensors = load_span(folder, Span(layer, layer + 1), dtype=F32)
    places = {"q": "self_attn", "k": "self_attn", "v": "self_attn", "o": "self_attn"}
    return torch.cat(
        [
            tensors[f"model.layers.{layer}.{places.get(n, 'mlp')}.{n}_proj.weight"]  # type: ignore[misc]
            for n in names
        ]
    )


FUSED = {"qkv": ("q", "k", "v"), "o": ("o",), "gate_up": ("gate", "up"), "down": ("down",)}


@pytest.fixture(autouse=True)
def _home(folders: dict[str, ModelFolder], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEXSWARM_CACHE", str(folders["llama"].home))


@pytest.mark.parametrize(("name", "bits"), [("llama", 4.5), ("small", 5)])
def test_the_numbers_are_the_files_and_so_are_the_bits(
    folders: dict[str, ModelFolder], name: str, bits: float
) -> None:
    """In groups of 16 the scales are written twice."""
    pytest.importorskip("triton")
    folder = folders[name]
    shard = shard_of(folder, "int4", "triton", torch.float16)
    for index, layer in enumerate(shard.layers):
        for field, parts in FUSED.items():
            matrix = getattr(layer, field)
            assert isinstance(matrix, Quantised)
            exact = in_file(folder, index, *parts)
            assert torch.equal(dequantise(matrix, F32), exact)
            assert matrix.nbytes == exact.numel() * bits / 8
    assert shard.weight_bytes == held_bytes(folder, ALL, "float16", 4)


@pytest.mark.parametrize("name", ["mixed", "narrow"])
def test_what_the_file_has_in_other_types_is_rounded_beside(
    folders: dict[str, ModelFolder], name: str
) -> None:
    """They fuse, they take what was planned, and the others keep the file's numbers."""
    pytest.importorskip("triton")
    folder = folders[name]
    shard = shard_of(folder, "int4", "triton", torch.float16)
    assert shard.weight_bytes == held_bytes(folder, ALL, "float16", 4)
    for index, layer in enumerate(shard.layers):
        for field, parts in FUSED.items():
            exact = in_file(folder, index, *parts)
            found = dequantise(getattr(layer, field), F32)
            assert (found - exact).norm() < 0.1 * exact.norm()
        exact = in_file(folder, index, "q", "k")  # v may have another type
        assert torch.equal(dequantise(layer.qkv, F32)[: len(exact)], exact)
        down = dequantise(layer.down, F32)
        assert torch.equal(down, in_file(folder, index, "down")) == (name == "mixed")
    held, matrices = kept_of(folder, ALL)
    assert (held, matrices) == ((21 - 3 - 1, 21) if name == "mixed" else (21 - 3, 21))


def test_nothing_is_widened_on_the_way(
    folders: dict[str, ModelFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    widened, array = [], GgufFile.array

    def noted(self: GgufFile, tensor: Any, rows: Any = None) -> Any:
        widened.append(tensor.name)
        return array(self, tensor, rows)

    monkeypatch.setattr(GgufFile, "array", noted)
    shard_of(folders["llama"], "int4", "triton", torch.float16)
    assert len(widened) == 2 * tiny.LAYERS + 3
    assert all("norm" in name or name.startswith(("token", "output")) for name in widened)


def test_a_cpu_computes_what_the_widened_file_does(folders: dict[str, ModelFolder]) -> None:
    """The same numbers, hence the same bits of every logit; and Triton's tokens are theirs."""
    for name in ("llama", "small"):
        kept, wide = (shard_of(folders[name], quant, "torch") for quant in ("int4", "none"))
        for one, other in zip(kept.layers, wide.layers, strict=True):
            assert all(torch.equal(getattr(one, f), getattr(other, f)) for f in FUSED)
        wanted = answer([runner_of(folders[name], "none", "auto")], TEXTS, 8)
        assert answer([runner_of(folders[name], "int4", "auto")], TEXTS, 8) == wanted


def test_triton_computes_with_the_packed_numbers(folders: dict[str, ModelFolder]) -> None:
    pytest.importorskip("triton")
    x, found = torch.randn(1, SMALL["hidden_size"]), []
    for quant, backend in (("int4", "triton"), ("none", "torch")):
        shard = shard_of(folders["small"], quant, backend, span=Span(1, 2))
        batch = ragged([Extent(0, 1, (2,), BLOCK)], torch.device("cpu"))
        with torch.inference_mode():
            found.append(shard.forward(x.clone(), batch, shard.make_pool(4)))
    assert (found[0] - found[1]).abs().max() <= 1e-5 * found[1].abs().max()


def test_eight_bits_are_rounded_as_ever(folders: dict[str, ModelFolder]) -> None:
    shard = shard_of(folders["llama"], "int8", "torch")
    exact = in_file(folders["llama"], 0, "o")
    assert 0 < (shard.layers[0].o.t() - exact).norm() < 0.01 * exact.norm()


# ---------------------------------------------------------------------------- cuts


def cut_of(folder: ModelFolder, heads: tuple[int, ...]) -> Cut:
    return cut_by_heads(read_sizes(folder.config, ALL), heads)


@pytest.mark.parametrize("heads", [HALVES, UNEVEN])
@pytest.mark.parametrize("rank", [0, 1])
def test_slices_of_whole_blocks_are_kept(
    folders: dict[str, ModelFolder], heads: tuple[int, ...], rank: int
) -> None:
    """By rows always; of columns, those that are no eight groups are rounded."""
    folder = folders["llama"]
    part = cut_of(folder, heads).parts[rank]
    whole = load_span(folder, ALL, dtype=F32)
    own = load_span(folder, ALL, dtype=F32, part=part, quant="int4")
    exact = set()
    for name, wanted in part_slices(folder.config, ALL, part).items():
        value = own[name]
        if not isinstance(value, Quantised):
            assert "norm" in name or "embed" in name or "lm_head" in name
            continue
        rows = whole[name][wanted.rows.start : wanted.rows.stop]  # type: ignore[index]
        columns = wanted.columns or range(rows.shape[1])
        rows = rows[:, columns.start : columns.stop]
        assert value.shape == tuple(rows.shape)
        found = dequantise(value, F32)
        assert (found - rows).norm() < 0.1 * rows.norm()
        if torch.equal(found, rows):
            exact.add(name.split(".")[-2])
    into = {f"{kind}_proj" for kind in ("q", "k", "v", "gate", "up")}
    assert exact == (into | {"o_proj", "down_proj"} if heads == HALVES else into | {"down_proj"})


def ranks_in_threads(folder: ModelFolder) -> Iterator[Shard]:
    cut = cut_of(folder, HALVES)
    plan = Plan(
        *(str(folder.gguf), str(folder.home), folder.spec.digest, 0, tiny.LAYERS, "float32", 1),
        quant="int4",
    )
    for part, sums in zip(cut.parts, thread_sums(2), strict=True):
        yield load_rank(plan, part, sums)  # type: ignore[arg-type]


def members_of_a_lan(folder: ModelFolder) -> Iterator[Shard]:
    config = PeerConfig(model=str(folder.gguf), quant="int4", threads=1)
    life: Any = SimpleNamespace(config=config, device="cpu", dtype="float32")
    asked = SimpleNamespace(span=ALL, shares=(500, 500))
    for rank in (0, 1):
        place: Any = SimpleNamespace(invitation=asked, rank=rank)
        yield entry._loader(life, Quiet())(place, StreamSums())


@pytest.mark.parametrize("group", [ranks_in_threads, members_of_a_lan])
def test_every_kind_of_group_computes_with_the_files_numbers(
    folders: dict[str, ModelFolder], group: Any
) -> None:
    folder = folders["llama"]
    shards = list(group(folder))
    for index in range(tiny.LAYERS):
        for field in ("o", "down"):
            joined = torch.cat([getattr(shard.layers[index], field) for shard in shards])
            assert torch.equal(joined.t(), in_file(folder, index, field))


@pytest.mark.end_to_end
def test_two_processes_answer_as_one(folders: dict[str, ModelFolder]) -> None:
    folder = folders["llama"]
    with Ranks(folder, ALL, cut_of(folder, HALVES), quant="int4") as ranks:
        led = Runner(ranks.shard, ranks.shard.make_pool(BLOCKS, BLOCK))  # type: ignore[arg-type]
        found = answer([led], TEXTS, 3)
        first = ranks.shard._shard.layers[0].o.t()
        assert torch.equal(first, in_file(folder, 0, "o")[:, : first.shape[1]])
    assert found == answer([runner_of(folder, "none", "torch")], TEXTS, 3)


# ---------------------------------------------------------------------------- classes and words


def test_a_route_never_mixes_the_file_with_another_rounding(
    folders: dict[str, ModelFolder], tmp_path: Path
) -> None:
    """Safetensors with the very numbers of the file are another model: they may be rounded anew."""
    packed = folders["llama"]
    tensors = {name: value.clone() for name, value in load_span(packed, ALL, dtype=F32).items()}  # type: ignore[union-attr]
    twin = tmp_path / "twin"
    twin.mkdir()
    save_file(tensors, twin / "model.safetensors")
    (twin / "config.json").write_text((packed.path / "config.json").read_text())
    wide = resolve(str(twin), home=tmp_path)
    assert torch.equal(in_file(packed, 0, "q"), in_file(wide, 0, "q"))
    named = "model.layers.0.self_attn.q_proj.weight"
    anew = shard_of(wide, "int4", "torch").layers[0].qkv.t()[: len(tensors[named])]
    assert not torch.equal(anew, tensors[named])
    assert packed.spec.digest != wide.spec.digest
    first, second = (
        peer(peer_id(rank), *span, model=folder.spec.digest, layers=2, dtype="float32+int4")
        for rank, (folder, span) in enumerate([(packed, (0, 1)), (wide, (1, 2))])
    )
    request = RouteRequest(
        packed.spec.digest, 2, 1152, prompt_tokens=2, new_tokens=2,
        dtypes=frozenset({"float32+int4"}),
    )  # fmt: skip
    with pytest.raises(NoRoute, match="no peer"):
        find_route(snapshot([first, second], {}, 0.0), request, 0.0, random.Random(0))
    same = replace(second, model=packed.spec.digest)
    route = find_route(snapshot([first, same], {}, 0.0), request, 0.0, random.Random(0))
    assert len(route.stages) == 2


class Notes(Quiet):
    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


@pytest.mark.parametrize("quant", ["none", "int4"])
def test_a_volunteer_is_told(folders: dict[str, ModelFolder], quant: str) -> None:
    config, notes = PeerConfig(quant=quant, kv_tokens=512, threads=1), Notes()
    hosting = Machine(config, RealClock())
    served = load(config, folders["mixed"], ALL, "cpu", "float32", notes, hosting)
    told = [line for line in notes.said if "Q4_0" in line or "--quant" in line]
    if quant == "none":
        assert not told  # on a CPU it would save nothing
    else:
        assert told == [
            "17 of the 21 matrices of layers 0:3 have their numbers as the file has them, "
            "in 4 bits (Q4_0)"
        ]
    layer = served.runner.shard.layers[0]
    assert torch.equal(layer.o.t(), in_file(folders["mixed"], 0, "o"))
    assert served.numerics == ("float32" if quant == "none" else "float32+int4")


def test_what_four_bits_would_save_is_told_where_they_save(
    folders: dict[str, ModelFolder],
) -> None:
    said = tell_packed(folders["llama"], ALL, "bfloat16", "none", "triton")
    assert "21 of the 21 matrices" in said
    assert "--quant int4" in said
    assert "bfloat16+int4" in said
    kept = tell_packed(folders["llama"], ALL, "bfloat16", "int4", "triton")
    assert kept.startswith("21 of the 21 matrices of layers 0:3 are kept")
    in_parts = tell_packed(folders["llama"], ALL, "bfloat16", "int4", "triton", cut=True)
    assert in_parts == f"{kept}, where the cut leaves blocks whole"
    assert not tell_packed(folders["llama"], ALL, "bfloat16", "int8", "triton")
    other = replace(folders["llama"], packed=frozenset())
    assert not tell_packed(other, ALL, "bfloat16", "none", "triton")


def test_a_file_that_ends_within_its_blocks(
    folders: dict[str, ModelFolder], tmp_path: Path
) -> None:
    """As it may when somebody writes to it after it was checked."""
    source = folders["llama"].gguf
    assert source is not None
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(source.read_bytes())
    header = read_gguf(cut)
    tensor = max(header.tensors.values(), key=lambda one: one.end if one.kind == 2 else 0)
    os.truncate(cut, tensor.end - 5)
    with pytest.raises(CorruptWeights, match="cut off"):
        header.blocks(tensor, range(tensor.shape[0]))
