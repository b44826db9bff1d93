"""The model store: from what a user writes after --model to a folder whose every byte is named.

`resolve` accepts four things and makes one of them: a `ModelFolder`, that is configuration,
tokenizer, the list of weight files with their hashes, and where each tensor lies.

    SmolLM2-135M-Instruct   the embedded default: downloaded and converted once (`default_model`)
    org/name[@revision]     the Hub: only files with tensors of the span (`hub`)
    a folder                safetensors; hashed once, or a manifest's word, checked when loaded
    a .gguf file            read in place; config and tokenizer are converted once (`gguf`)

A client passes `weights=False`: it needs the words and the digest, no tensor. A peer that chooses
its span by free memory first resolves without weights, then again with the span. What exists on
this machine under the given path wins over a Hub id of the same spelling.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hexswarm import hub
from hexswarm.architecture import check_config, model_spec, span_shapes
from hexswarm.config import DEFAULT_MODEL
from hexswarm.errors import CorruptWeights, UnknownModel, UnsupportedModel
from hexswarm.headers import check_safetensors
from hexswarm.manifest import (
    MANIFEST,
    FileHash,
    HashCache,
    check_name,
    json_text,
    model_digest,
    read_json,
    read_manifest,
)
from hexswarm.progress import Progress, Quiet
from hexswarm.records import ModelSpec, Span

INDEX = "model.safetensors.index.json"
GGUF_NAME = "model.gguf"
"""Under which a GGUF stands in the manifest, whatever its owner called the file."""

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A resolved model."""

    path: Path
    """Folder with config.json and the tokenizer's files; weights too unless `gguf` is set."""
    config: dict[str, Any]
    spec: ModelSpec
    files: dict[str, FileHash]
    """All weight files of the model, present here or not."""
    tensors: dict[str, str]
    """Weight file of each tensor; empty if the files are absent and no index tells."""
    home: Path
    """Where hashes are remembered."""
    gguf: Path | None = None
    packed: frozenset[str] = frozenset()
    """Of a GGUF, the layers' matrices in Q4_0, which can be kept as they are."""

    def file(self, name: str) -> Path:
        """Where the weight file `name` lies."""
        return self.gguf or self.path / name


def resolve(
    model: str,
    *,
    home: Path,
    span: Span | None = None,
    weights: bool = True,
    progress: Progress | None = None,
) -> ModelFolder:
    """Find or fetch `model`; with `weights`, the files of `span` (None: all) are then present.

    A local folder may hold only some shards: without `span`, nothing is asked of it but the
    manifest. Raises UnknownModel, UnsupportedModel or CorruptWeights.
    """
    progress = progress or Quiet()
    path = _local(model)
    if model == DEFAULT_MODEL:
        from hexswarm.default_model import default_folder

        folder = _from_folder(default_folder(home, progress), home, progress)
    elif path and path.is_dir():
        folder = _from_folder(path, home, progress)
    elif path:
        folder = _from_gguf(path, home, progress)
    elif hub.HUB_ID.fullmatch(model) and not model.endswith(".gguf"):
        return _from_hub(model, home, span if weights else None, weights, progress)
    else:
        raise UnknownModel(
            f"there is no folder or file {model!r}",
            remedy=f"give a folder of safetensors, a .gguf file, a Hub id org/name "
            f"or {DEFAULT_MODEL}",
        )
    if span is not None:
        span_files(folder, span, present=weights)
    return folder


def _local(model: str) -> Path | None:
    """`model` as a path, if something exists there."""
    try:
        path = Path(model).expanduser()
        return path if path.exists() else None
    except (OSError, RuntimeError, ValueError):
        return None  # too long, a NUL, or the home of an unknown user


def span_files(folder: ModelFolder, span: Span, *, present: bool = True) -> dict[str, list[str]]:
    """Weight files that hold `span`, each with the names of the span's tensors in it.

    Raises UsageError for a span beyond the model, CorruptWeights for a model without one of the
    tensors, UnknownModel if a file is not `present`.
    """
    wanted = span_shapes(folder.config, span)
    if not folder.tensors:
        missing = sorted(folder.files)
        raise UnknownModel(f"{folder.path} holds no weights", remedy=f"fetch {missing[0]}")
    files: dict[str, list[str]] = {}
    for name in wanted:
        if name not in folder.tensors:
            raise CorruptWeights(f"{folder.path} has no tensor {name}")
        files.setdefault(folder.tensors[name], []).append(name)
    absent = [name for name in files if not folder.file(name).is_file()] if present else []
    if absent:
        raise UnknownModel(
            f"{folder.path} lacks {', '.join(sorted(absent)[:3])} for layers {span}",
            remedy="fetch the files, or serve layers that the folder holds",
        )
    return files


def _from_folder(path: Path, home: Path, progress: Progress) -> ModelFolder:
    """A folder on this machine."""
    config = check_config(read_json(path / "config.json"), str(path))
    files = read_manifest(path)
    names, tensors = _weights_of(path, sorted(files) if files is not None else None)
    if files is None:
        absent = [name for name in names if not (path / name).is_file()]
        if absent:
            raise UnknownModel(
                f"{path} lacks {len(absent)} of {len(names)} weight files, e.g. {absent[0]}",
                remedy=f"fetch them, or add the {MANIFEST} of the whole model",
            )
        cache = HashCache(home)
        files = {name: cache.identify(path / name, progress) for name in names}
    if not set(names) <= set(files):
        raise CorruptWeights(f"{path / MANIFEST} does not list all files of the index")
    return _assemble(path, path.resolve().name, config, files, tensors, home)


def _from_hub(
    reference: str, home: Path, span: Span | None, weights: bool, progress: Progress
) -> ModelFolder:
    """A repository on the Hub; weights are fetched only if asked for, and only the span's."""
    model = hub.describe(reference, home, progress)
    path = hub.download(model, model.small_files, progress)
    config = check_config(read_json(path / "config.json"), reference)
    remote = sorted(name for name in model.names if name.endswith(".safetensors"))
    names, tensors = _weights_of(path, remote)
    unhashed = [name for name in names if name not in model.hashes]
    if unknown := set(unhashed) - set(remote):
        raise CorruptWeights(f"{reference} has no {min(unknown)}, which its index names")
    if unhashed:  # small files are kept in git itself, which tells no SHA-256
        hub.download(model, unhashed, progress)
    cache = HashCache(home)
    files = {
        name: model.hashes.get(name) or cache.identify(path / name, progress) for name in names
    }
    folder = _assemble(path, model.repo, config, files, tensors, home)
    if not weights:
        return folder
    wanted = set(span_files(folder, span, present=False)) if span and tensors else set(names)
    hub.download(model, wanted, progress)
    return replace(folder, tensors=tensors or _weights_of(path, remote)[1])


def _from_gguf(path: Path, home: Path, progress: Progress) -> ModelFolder:
    """A GGUF file; its tokenizer is converted into a folder of ours."""
    from hexswarm.gguf import read_gguf
    from hexswarm.gguf_config import gguf_config
    from hexswarm.materialise import config_files, make_once

    if path.suffix.lower() in (".bin", ".pt", ".pth", ".ckpt"):
        raise _only_safe(path)
    header = read_gguf(path)
    config = check_config(gguf_config(header), str(path))
    identity = HashCache(home).identify(path, progress)
    folder = home / "models" / f"gguf-{identity.sha256[:16]}"

    def whole(place: Path) -> bool:
        kept = place / "config.json"
        return kept.is_file() and kept.read_text(encoding="utf-8") == json_text(config)

    make_once(folder, lambda draft: config_files(header, draft), whole, progress)
    tensors = dict.fromkeys(header.hf_tensors(), GGUF_NAME)
    built = _assemble(folder, path.stem, config, {GGUF_NAME: identity}, tensors, home)
    return replace(built, gguf=path.resolve(), packed=header.packed())


def _assemble(
    path: Path, name: str, config: dict[str, Any], files: dict[str, FileHash],
    tensors: dict[str, str], home: Path,
) -> ModelFolder:  # fmt: skip
    spec = model_spec(name, config, model_digest(config, files))
    return ModelFolder(path, config, spec, files, tensors, home)


def _weights_of(path: Path, known: list[str] | None) -> tuple[list[str], dict[str, str]]:
    """Names of the model's weight files, and the file of each tensor as far as it can be told.

    `known` are the files that a manifest or the Hub lists; None means to look into the folder.
    """
    if (path / INDEX).is_file():
        content = read_json(path / INDEX)
        mapping = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(mapping, dict) or not mapping:
            raise CorruptWeights(f"{path / INDEX} has no weight_map")
        tensors = {str(name): check_name(file, path / INDEX) for name, file in mapping.items()}
        return sorted(set(tensors.values())), tensors
    names = known if known is not None else sorted(p.name for p in path.glob("*.safetensors"))
    if "model.safetensors" in names:
        names = ["model.safetensors"]
    if not names and any(next(path.glob(pattern), None) for pattern in _PICKLES):
        raise _only_safe(path)
    if not names:
        hint = "give the path of the .gguf file" if next(path.glob("*.gguf"), None) else ""
        raise UnknownModel(f"{path} holds no safetensors", remedy=hint)
    if len(names) > 1:
        raise UnsupportedModel(f"{path} has several weight files but no {INDEX}")
    weights = path / check_name(names[0], path)
    return names, dict.fromkeys(check_safetensors(weights), names[0]) if weights.is_file() else {}


def _only_safe(path: Path) -> UnsupportedModel:
    return UnsupportedModel(
        f"{path} has its weights as pickles, which can run code",
        remedy="only safetensors and GGUF are loaded; convert them on a machine you trust",
    )
