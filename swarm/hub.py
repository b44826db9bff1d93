"""The Hugging Face Hub as a source of models: metadata first, then only what a span needs.

Two calls are made. `HfApi.model_info(files_metadata=True)` names the commit and, for each file in
LFS, its SHA-256: the digest is known before a byte of weights moves. `snapshot_download` with a
list of exact names then fetches configuration and tokenizer, and for a peer the weight files
that hold its span, into the Hub's usual cache, where other tools find them too. Pickles
(`*.bin`, `*.pt`) are never asked for. Downloads are verified when they are loaded, like any file.

What was learned is kept in `home/manifests/hub`, so that a restart works while the Hub is away.
"""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hexswarm.errors import CorruptWeights, ModelError, UnknownModel, UnsupportedModel
from hexswarm.manifest import FileHash, read_json, write_json
from hexswarm.progress import Progress

HUB_ID = re.compile(r"(?P<repo>[\w][\w.\-]{0,95}/[\w][\w.\-]{0,95})(@(?P<revision>[\w.\-/]+))?")

_SMALL_FILES = (
    "config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer*.json",
    "tokenizer.model", "tekken.json", "vocab.json", "merges.txt", "special_tokens_map.json",
    "added_tokens.json", "chat_template.json", "chat_template.jinja",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class HubModel:
    """A repository at one commit; `hashes` of the safetensors files, where the Hub knows them."""

    repo: str
    commit: str
    names: tuple[str, ...]
    """All files in the root folder."""
    hashes: dict[str, FileHash]

    @property
    def small_files(self) -> list[str]:
        return [n for n in self.names if any(fnmatch.fnmatch(n, p) for p in _SMALL_FILES)]


def describe(reference: str, home: Path, progress: Progress) -> HubModel:
    """What the Hub, or our memory of it, says of `org/name` or `org/name@revision`."""
    match = HUB_ID.fullmatch(reference)
    assert match is not None
    repo, revision = match["repo"], match["revision"]
    memory = home / "manifests" / "hub" / (reference.replace("/", "--") + ".json")
    import huggingface_hub
    from huggingface_hub import errors

    try:
        info = huggingface_hub.HfApi().model_info(repo, revision=revision, files_metadata=True)
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise _not_found(reference, error) from error
    except errors.HFValidationError as error:
        raise UnknownModel(f"{repo} is not a Hub id", remedy="write org/name") from error
    except _unreachable() as error:
        remembered = _recall(memory)
        if remembered is None:
            raise _cannot_reach(reference, error) from error
        progress.note(f"the Hub is unreachable; using what it said of {reference} before")
        return remembered
    model = _from_info(repo, info)
    memory.parent.mkdir(parents=True, exist_ok=True)
    draft = memory.with_suffix(f".{os.getpid()}-{os.urandom(4).hex()}")
    write_json(draft, asdict(model))
    draft.replace(memory)
    return model


def download(model: HubModel, names: Iterable[str], progress: Progress) -> Path:
    """The snapshot folder with the files `names` in it, fetched unless the cache has them."""
    import huggingface_hub

    wanted = sorted(names)
    size = sum(model.hashes[name].size for name in wanted if name in model.hashes)
    if size:
        progress.note(f"{model.repo}: {len(wanted)} weight files, {size / 1e9:.2f} GB")
    call = {"revision": model.commit, "allow_patterns": wanted}
    try:
        try:
            folder = huggingface_hub.snapshot_download(model.repo, **call, local_files_only=True)
            if all((Path(folder) / name).is_file() for name in wanted):
                return Path(folder)
        except FileNotFoundError:
            pass  # nothing of this commit is cached yet
        return Path(huggingface_hub.snapshot_download(model.repo, **call))
    except _unreachable() as error:
        raise _cannot_reach(model.repo, error) from error


def _from_info(repo: str, info: Any) -> HubModel:
    """Read the API's answer; files in sub-folders are not ours to load."""
    siblings = [entry for entry in info.siblings or () if "/" not in entry.rfilename]
    names = tuple(sorted(entry.rfilename for entry in siblings))
    if not any(name.endswith(".safetensors") for name in names):
        hint = "download one of its .gguf files and give its path"
        has_gguf = any(name.endswith(".gguf") for name in names)
        raise UnsupportedModel(
            f"{repo} has no safetensors",
            remedy=hint if has_gguf else "only safetensors and GGUF are loaded, never pickles",
        )
    hashes = {
        entry.rfilename: FileHash(entry.lfs["sha256"], int(entry.lfs["size"]))
        for entry in siblings
        if entry.lfs and entry.rfilename.endswith(".safetensors")
    }
    return HubModel(repo, str(info.sha), names, hashes)


def _recall(memory: Path) -> HubModel | None:
    try:
        kept = read_json(memory)
        hashes = {name: FileHash(**entry) for name, entry in kept["hashes"].items()}
        return HubModel(kept["repo"], kept["commit"], tuple(kept["names"]), hashes)
    except (ModelError, CorruptWeights, KeyError, TypeError, AttributeError):
        return None


def _unreachable() -> tuple[type[Exception], ...]:
    """What the hub client raises without an answer: its transport changed twice, its base tells."""
    from huggingface_hub import errors

    return (OSError, *errors.HfHubHTTPError.__bases__)


def _not_found(reference: str, error: Exception) -> UnknownModel:
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return UnknownModel(
            f"{reference} is gated",
            remedy="accept its licence on huggingface.co, then run `hf auth login`",
        )
    return UnknownModel(
        f"the Hugging Face Hub has no {reference} (or it is private)",
        remedy="check the spelling, or run `hf auth login`",
    )


def _cannot_reach(reference: str, error: Exception) -> UnknownModel:
    said = " ".join(str(error).split())[:160]
    return UnknownModel(
        f"the Hugging Face Hub cannot be reached for {reference} ({said})",
        remedy="check the network, or give a local folder or .gguf file",
    )
