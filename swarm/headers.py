"""The header of a safetensors file: checked before anything trusts it, and written reproducibly.

A safetensors file is a u64 length, that many bytes of JSON {name: {dtype, shape, data_offsets}},
and the tensors' bytes. A volunteer downloads such files from strangers, so `check_safetensors`
holds each statement of the header against the file's real size and against the others before
anything is read: lengths are bounded, offsets lie inside the file, tensors neither overlap nor
leave holes, and shape x element size is the number of bytes. Anything else is `CorruptWeights`,
never another exception. The check is pure Python: a client does it without numpy or torch.

`write_safetensors` exists because the safetensors package promises a valid file, not the same bytes
in each version, and here equal models must have equal bytes: the digest is a hash of them.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hexswarm.errors import CorruptWeights

if TYPE_CHECKING:
    import numpy as np

MAX_HEADER = 16 << 20
"""Bytes; a 405B model split over 191 files stays far below."""

ELEMENT_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64,
}  # fmt: skip

_NAME = re.compile(r"[\w.\-/+:]{1,512}", re.ASCII)
_FORBIDDEN_INTEGER = 1 << 62


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a file: [start, end) are bytes from the file's beginning."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


def check_safetensors(path: Path) -> dict[str, TensorInfo]:
    """The tensors of the file at `path` in order of offset; raises CorruptWeights."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(MAX_HEADER, size - 8):
                raise _corrupt(path, "its header is longer than the file or 16 MiB")
            text = file.read(length)
    except OSError as error:
        raise CorruptWeights(f"cannot read {path}: {error.strerror}") from error
    if len(text) != length:
        raise _corrupt(path, "it ends within its header")
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        raise _corrupt(path, "its header is not JSON") from None
    if not isinstance(header, dict):
        raise _corrupt(path, "its header is not an object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise _corrupt(path, "its metadata is not an object")
    tensors = {name: _tensor(path, name, entry, 8 + length) for name, entry in header.items()}
    return _contiguous(path, tensors, 8 + length, size)


def _tensor(path: Path, name: str, entry: Any, data: int) -> TensorInfo:
    """One entry of the header, its types and arithmetic checked."""
    if not _NAME.fullmatch(name):
        raise _corrupt(path, f"it names a tensor {name[:80]!r}")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _corrupt(path, f"the entry of {name} is malformed")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ELEMENT_BITS:
        raise _corrupt(path, f"{name} has an unknown element type")
    if not (_sizes(shape) and len(shape) <= 8 and _sizes(offsets) and len(offsets) == 2):
        raise _corrupt(path, f"{name} has no proper shape or offsets")
    start, end = offsets
    if (end - start) * 8 != math.prod(shape) * ELEMENT_BITS[dtype]:
        raise _corrupt(path, f"the shape of {name} does not match its bytes")
    return TensorInfo(dtype, tuple(shape), data + start, data + end)


def _sizes(values: Any) -> bool:
    return isinstance(values, list) and all(
        type(value) is int and 0 <= value < _FORBIDDEN_INTEGER for value in values
    )


def _contiguous(
    path: Path, tensors: dict[str, TensorInfo], data: int, size: int
) -> dict[str, TensorInfo]:
    """The tensors by offset, if they fill the file without hole or overlap."""
    ordered = dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)))
    reached = data
    for name, tensor in ordered.items():
        if tensor.start != reached:
            raise _corrupt(path, f"{name} overlaps another tensor or follows a hole")
        reached = tensor.end
    if reached != size:
        what = "it is truncated" if reached > size else "bytes follow its last tensor"
        raise _corrupt(path, what)
    return ordered


def write_safetensors(path: Path, tensors: Mapping[str, np.ndarray]) -> str:
    """Write float32 arrays in the order of their names and flush to disk; return the SHA-256."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    reached = 0
    for name in sorted(tensors):
        array = tensors[name]
        assert array.dtype == "<f4"
        offsets = [reached, reached + array.nbytes]
        header[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": offsets}
        reached += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    parts: list[bytes | memoryview] = [len(text).to_bytes(8, "little"), text]
    parts += [tensors[name].data.cast("B") for name in sorted(tensors)]
    digest = hashlib.sha256()
    with path.open("xb") as file:
        for part in parts:
            digest.update(part)
            file.write(part)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _corrupt(path: Path, why: str) -> CorruptWeights:
    return CorruptWeights(f"{path} is damaged: {why}", remedy="delete it and fetch it again")
