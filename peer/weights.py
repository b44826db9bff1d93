"""Loading the tensors of a span: verified, converted one at a time, never more than asked for.

Each weight file is identified by its hash before a byte of it is used, and looked at again after
reading, so that what was verified is what was loaded (a hash is remembered for as long as the file
is unchanged, see `hexswarm.manifest`). Tensors are read straight into their final storage, or into
one temporary of a single tensor's size if dtype or device differ: the peak is the span plus one
tensor. Files are read, not mapped, since a mapped file that somebody truncates kills the process.

The names and shapes come from the config, not from the file: a file that lacks one, has another
shape, or has a tensor which our model code would ignore is refused.

A member of a tensor-parallel group reads its own slices (`hexswarm.peer.slices`). Rows lie together
in a file, so they are one read. Of columns each row's run is read by itself if it is long; short
ones are cut out of whole rows, a few megabytes at a time, since a disk hands over pages anyway.
GGUF packs weights in blocks along a row: rows are read as they are, columns cut out of the whole
tensor once it is widened.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from io import FileIO
from pathlib import Path

import torch

from hexswarm.architecture import span_shapes
from hexswarm.errors import CorruptWeights, OutOfMemory, UnsupportedModel
from hexswarm.gguf import read_gguf
from hexswarm.headers import TensorInfo, check_safetensors
from hexswarm.manifest import HashCache
from hexswarm.peer.cuts import Part
from hexswarm.peer.memory import free_bytes
from hexswarm.peer.slices import Slice, part_slices
from hexswarm.progress import Progress, Quiet
from hexswarm.records import DTYPES, Span
from hexswarm.store import ModelFolder, span_files

Shape = tuple[int, ...]
Read = Callable[[str, Slice], torch.Tensor]

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_LONG_RUN = 16 << 10
"""Bytes of a row's columns from which on they are read by themselves."""
_BLOCK = 8 << 20
"""Bytes of whole rows that are read at a time otherwise."""
_COMPUTED = re.compile(r".*\.rotary_emb\.inv_freq")
"""Tensors in old checkpoints that follow from the config."""


def span_bytes(
    folder: ModelFolder, span: Span, dtype: torch.dtype | str, part: Part | None = None
) -> int:
    """Bytes that the weights of `span`, or a `part` of it, occupy; needs the config alone."""
    width = DTYPES[dtype] if isinstance(dtype, str) else dtype.itemsize
    return width * sum(one.elements for one in part_slices(folder.config, span, part).values())


def load_span(
    folder: ModelFolder,
    span: Span,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    part: Part | None = None,
) -> dict[str, torch.Tensor]:
    """The tensors of `span` by their Hugging Face names, or of each what `part` has of it.

    The tail of a model with tied embeddings gets `model.embed_tokens.weight`, as the checkpoint
    names it. Raises UsageError, OutOfMemory or a ModelError.
    """
    progress = progress or Quiet()
    device = torch.device(device)
    slices = part_slices(folder.config, span, part)
    files = span_files(folder, span)
    _refuse_unknown(folder, span)
    needed, free = span_bytes(folder, span, dtype, part), free_bytes(device)
    if needed > free:
        raise _out_of_memory(span, needed, device, f"{free / 1e9:.1f} GB are free")
    cache = HashCache(folder.home)
    tensors: dict[str, torch.Tensor] = {}
    try:
        with progress.bar(f"loading layers {span}", needed) as advance:
            for name, wanted in sorted(files.items()):
                cache.require(folder.file(name), folder.files[name], progress)
                read = _reader(folder, name)
                for tensor in (one for one in wanted if one in slices):
                    value = read(tensor, slices[tensor]).to(device=device, dtype=dtype)
                    tensors[tensor] = value
                    advance(value.nbytes)
                cache.require(folder.file(name), folder.files[name], progress)
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise _out_of_memory(span, needed, device, "the device is full") from error
    except RuntimeError as error:
        if "allocate" not in str(error) and "memory" not in str(error):
            raise
        raise _out_of_memory(span, needed, device, "the device is full") from error
    return tensors


def _reader(folder: ModelFolder, name: str) -> Read:
    """A function that reads one tensor of the file `name`."""
    if folder.gguf is not None:
        return _gguf_reader(folder.gguf)
    path = folder.file(name)
    header = check_safetensors(path)

    def read(tensor: str, wanted: Slice) -> torch.Tensor:
        if tensor not in header:
            raise CorruptWeights(f"{path} has no tensor {tensor}")
        return _read_tensor(
            path, tensor, _expect(path, tensor, header[tensor], wanted.whole), wanted
        )

    return read


def _expect(path: Path, name: str, info: TensorInfo, shape: Shape) -> TensorInfo:
    if info.shape != shape:
        raise _misshapen(path, name, info.shape, shape)
    if info.dtype not in _DTYPES:
        raise UnsupportedModel(
            f"{path} stores {name} as {info.dtype}", remedy="use unquantised weights or a GGUF"
        )
    return info


def _read_tensor(path: Path, name: str, info: TensorInfo, wanted: Slice) -> torch.Tensor:
    """Fill a new tensor with the file's bytes of what is `wanted`."""
    dtype = _DTYPES[info.dtype]
    row = math.prod(info.shape[1:]) * dtype.itemsize
    start = info.start + wanted.rows.start * row
    with path.open("rb", buffering=0) as file:
        if wanted.columns is None:
            tensor = torch.empty(wanted.shape, dtype=dtype)
            _fill(file, start, tensor, name)
            return tensor
        return _read_columns(file, start, row, wanted, dtype, name)


def _read_columns(
    file: FileIO, start: int, row: int, wanted: Slice, dtype: torch.dtype, name: str
) -> torch.Tensor:
    """A run of each row from `start` on; rows have `row` bytes."""
    columns, tensor = wanted.columns, torch.empty(wanted.shape, dtype=dtype)
    assert columns is not None
    if len(columns) * dtype.itemsize >= _LONG_RUN:
        for index, own in enumerate(tensor):
            _fill(file, start + index * row + columns.start * dtype.itemsize, own, name)
        return tensor
    whole = torch.empty(max(_BLOCK // row, 1), wanted.whole[1], dtype=dtype)
    for first in range(0, len(tensor), len(whole)):
        own = tensor[first : first + len(whole)]
        _fill(file, start + first * row, whole[: len(own)], name)
        own.copy_(whole[: len(own), columns.start : columns.stop])
    return tensor


def _fill(file: FileIO, start: int, tensor: torch.Tensor, name: str) -> None:
    """Fill a contiguous tensor with the bytes from `start` on."""
    buffer = tensor.view(-1).view(torch.uint8).numpy().data
    file.seek(start)
    while buffer:
        count = file.readinto(buffer)
        if not count:
            raise CorruptWeights(f"{file.name} ends within {name}", remedy="fetch it again")
        buffer = buffer[count:]


def _gguf_reader(path: Path) -> Read:
    header = read_gguf(path)
    named = header.hf_tensors()

    def read(tensor: str, wanted: Slice) -> torch.Tensor:
        if named[tensor].shape != wanted.whole:
            raise _misshapen(path, tensor, named[tensor].shape, wanted.whole)
        rows = torch.from_numpy(header.array(named[tensor], wanted.rows))
        if wanted.columns is None:
            return rows
        return rows[:, wanted.columns.start : wanted.columns.stop].contiguous()

    return read


def _refuse_unknown(folder: ModelFolder, span: Span) -> None:
    """Raise if a layer has a tensor that the model code would silently leave out."""
    shapes = span_shapes(folder.config, span)
    for name in folder.tensors:
        match = re.match(r"model\.layers\.(\d{1,6})\.", name)
        if match and int(match[1]) in span and name not in shapes and not _COMPUTED.match(name):
            raise UnsupportedModel(
                f"{folder.spec.name} has a tensor {name}, unusual for {folder.spec.architecture}"
            )


def _misshapen(path: Path, name: str, found: Sequence[int], expected: Shape) -> CorruptWeights:
    return CorruptWeights(
        f"{name} in {path} has shape {list(found)}, its config says {list(expected)}"
    )


def _out_of_memory(span: Span, needed: int, device: torch.device, why: str) -> OutOfMemory:
    return OutOfMemory(
        f"layers {span} need {needed / 1e9:.1f} GB on {device}; {why}",
        remedy="serve fewer layers (--span) or use --dtype bfloat16",
    )
