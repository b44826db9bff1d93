"""Which exact bytes a model consists of: hashes, the cache of hashes, and the model digest.

The **digest** is the name under which peers of equal weights find each other. It is the SHA-256
of canonical JSON of the config's numerics and the sorted (file name, SHA-256) of *all* weight
files, so it does not depend on where a folder lies, when it was written, what else is in it, or
which layers this peer holds. A folder with only some shards carries `hexswarm-manifest.json`, the
list of all.

Hashing costs about a second per gigabyte, so a hash is remembered in `home/manifests`, under the
file's real path, and holds as long as size, modification and change time and inode do. Whoever may
change these can also change our cache: this guards against damage and accident, the digest guards
against strangers.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hexswarm.architecture import numerics
from hexswarm.errors import CorruptWeights, UnknownModel
from hexswarm.progress import Advance, Progress, Quiet

MANIFEST = "hexswarm-manifest.json"
MAX_JSON = 64 << 20
"""Bytes of a config, index or manifest that we are ready to parse."""

logger = logging.getLogger(__name__)

_CHUNK = 4 << 20
_FILE_NAME = re.compile(r"(?!\.)[\w.\-+ ()]{1,200}", re.ASCII)


@dataclass(frozen=True, slots=True)
class FileHash:
    """The identity of one weight file."""

    sha256: str
    size: int

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[0-9a-f]{64}", self.sha256) or self.size < 0:
            raise CorruptWeights("a manifest lists a malformed hash or size")


def model_digest(config: Mapping[str, Any], files: Mapping[str, FileHash]) -> str:
    """Name of the weights `files` under the hyperparameters `config`."""
    identity = {
        "config": numerics(dict(config)),
        "files": sorted([name, file.sha256] for name, file in files.items()),
    }
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def check_name(name: Any, source: Path) -> str:
    """`name` if it is a plain file name; "../x" in somebody's index must not leave the folder."""
    if not isinstance(name, str) or not _FILE_NAME.fullmatch(name):
        raise CorruptWeights(
            f"{source} names a file {str(name)[:80]!r}",
            remedy="weight files lie beside config.json; do not trust this model",
        )
    return name


def read_json(path: Path) -> Any:
    """The JSON in `path`, at most MAX_JSON bytes; raises a ModelError."""
    try:
        with path.open("rb") as file:
            text = file.read(MAX_JSON + 1)
        if len(text) > MAX_JSON:
            raise ValueError("too long")
        return json.loads(text)
    except FileNotFoundError:
        raise UnknownModel(f"{path.parent} has no {path.name}") from None
    except OSError as error:
        raise CorruptWeights(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CorruptWeights(f"{path} is not JSON", remedy="fetch it again") from error


def write_json(path: Path, content: Any) -> None:
    path.write_text(json_text(content), encoding="utf-8")


def json_text(content: Any) -> str:
    """Canonical, readable JSON: equal content gives equal text."""
    return json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def read_manifest(folder: Path) -> dict[str, FileHash] | None:
    """The manifest that lies in `folder`, None if it has none; raises CorruptWeights."""
    path = folder / MANIFEST
    if not path.is_file():
        return None
    content = read_json(path)
    try:
        files = {
            check_name(name, path): FileHash(str(entry["sha256"]), int(entry["size"]))
            for name, entry in content["files"].items()
        }
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise CorruptWeights(f"{path} is not a manifest") from error
    if not files:
        raise CorruptWeights(f"{path} lists no file")
    return files


def write_manifest(folder: Path, files: Mapping[str, FileHash]) -> None:
    write_json(folder / MANIFEST, {"files": {name: asdict(file) for name, file in files.items()}})


class HashCache:
    """SHA-256 of files, computed at most once for each state of a file."""

    def __init__(self, home: Path) -> None:
        self._folder = home / "manifests"

    def identify(self, path: Path, progress: Progress | None = None) -> FileHash:
        """Hash of the file at `path`, from memory if it did not change since."""
        state = _state(path)
        known = self._recall(state)
        if known is None:
            with (progress or Quiet()).bar(f"hashing {path.name}", state["size"]) as advance:
                known = _sha256(path, advance)
            if _state(path) != state:
                raise CorruptWeights(f"{path} changes while it is read")
            self._remember(state, known)
        return FileHash(known, state["size"])

    def remember(self, path: Path, sha256: str) -> None:
        """Note a hash that the caller computed while writing the file."""
        self._remember(_state(path), sha256)

    def require(self, path: Path, expected: FileHash, progress: Progress | None = None) -> None:
        """Raise CorruptWeights unless the file at `path` is the `expected` one."""
        if self.identify(path, progress) != expected:
            raise CorruptWeights(
                f"{path} is not the file that the model consists of "
                f"(expected SHA-256 {expected.sha256[:12]}..., {expected.size} bytes)",
                remedy="delete it and fetch it again",
            )

    def _entry(self, real: str) -> Path:
        return self._folder / f"{hashlib.sha256(real.encode()).hexdigest()[:32]}.json"

    def _recall(self, state: dict[str, Any]) -> str | None:
        try:
            entry = json.loads(self._entry(state["path"]).read_bytes())
            if entry["state"] == state:
                return FileHash(entry["sha256"], 0).sha256
        except (OSError, ValueError, KeyError, TypeError, CorruptWeights):
            pass
        return None

    def _remember(self, state: dict[str, Any], sha256: str) -> None:
        entry = self._entry(state["path"])
        draft = entry.with_suffix(f".{os.getpid()}-{os.urandom(4).hex()}")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_json(draft, {"sha256": sha256, "state": state})
            draft.replace(entry)
        except OSError as error:
            logger.warning("cannot remember hashes in %s: %s", self._folder, error.strerror)


def _state(path: Path) -> dict[str, Any]:
    """What changes when a file does."""
    try:
        status = path.stat()
    except OSError as error:
        raise CorruptWeights(
            f"cannot read {path}: {error.strerror}",
            remedy="fetch the missing file, or serve layers that the folder holds",
        ) from error
    return {
        "path": os.path.realpath(path).encode("utf-8", "backslashreplace").decode(),
        "size": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "ctime_ns": status.st_ctime_ns,
        "inode": status.st_ino,
    }


def _sha256(path: Path, advance: Advance) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb", buffering=0) as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
                advance(len(chunk))
    except OSError as error:
        raise CorruptWeights(f"cannot read {path}: {error.strerror}") from error
    return digest.hexdigest()
