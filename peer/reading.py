"""Reading one tensor, or a member's slice of it, out of a safetensors or GGUF file.

Bytes go straight into the memory that `room` gives: new memory, or pinned memory that all tensors
on their way to a GPU share (`Bounce`), one after another. Rows lie together in a file, so they are
one read. Of columns each row's run is read by itself if it is long; short ones are cut out of whole
rows, a few megabytes at a time, since a disk hands over pages anyway. GGUF packs weights in blocks
along a row: rows are read as they are, columns cut out of the whole tensor once it is widened, or
repacked (`hexswarm.peer.packing`): then the bytes of whole rows are given, as the file has them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Sequence
from io import FileIO
from pathlib import Path

import torch

from hexswarm.errors import CorruptWeights, UnsupportedModel
from hexswarm.gguf import read_gguf
from hexswarm.headers import TensorInfo, check_safetensors
from hexswarm.peer.slices import Slice
from hexswarm.store import ModelFolder

Shape = tuple[int, ...]
Read = Callable[[str, Slice], torch.Tensor]
Room = Callable[[Shape, torch.dtype], torch.Tensor]

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_PINNED = 256 << 20
"""A larger tensor goes through ordinary memory: pinning a gigabyte takes longer than it saves."""
_LONG_RUN = 16 << 10
"""Bytes of a row's columns from which on they are read by themselves."""
_BLOCK = 8 << 20
"""Bytes of whole rows that are read at a time otherwise."""


def fresh(shape: Shape, dtype: torch.dtype) -> torch.Tensor:
    """Memory of its own."""
    return torch.empty(shape, dtype=dtype)


class Bounce:
    """Pinned memory that holds one tensor at a time, on its way to a device."""

    def __init__(self) -> None:
        self._held: torch.Tensor | None = None

    def room(self, shape: Shape, dtype: torch.dtype) -> torch.Tensor:
        size = math.prod(shape) * dtype.itemsize
        if size > _PINNED:
            return fresh(shape, dtype)
        if self._held is None or self._held.nbytes < size:
            self._held = None
            self._held = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        return self._held[:size].view(dtype).view(shape)


def reader(folder: ModelFolder, name: str, room: Room = fresh, packed: Container[str] = ()) -> Read:
    """A function that reads one tensor of the file `name`, into `room`; of `packed` ones bytes."""
    if folder.gguf is not None:
        return _gguf_reader(folder.gguf, packed)
    path = folder.file(name)
    header = check_safetensors(path)

    def read(tensor: str, wanted: Slice) -> torch.Tensor:
        if tensor not in header:
            raise CorruptWeights(f"{path} has no tensor {tensor}")
        info = _expect(path, tensor, header[tensor], wanted.whole)
        return _read_tensor(path, tensor, info, wanted, room)

    return read


def _expect(path: Path, name: str, info: TensorInfo, shape: Shape) -> TensorInfo:
    if info.shape != shape:
        raise _misshapen(path, name, info.shape, shape)
    if info.dtype not in _DTYPES:
        raise UnsupportedModel(
            f"{path} stores {name} as {info.dtype}", remedy="use unquantised weights or a GGUF"
        )
    return info


def _read_tensor(
    path: Path, name: str, info: TensorInfo, wanted: Slice, room: Room
) -> torch.Tensor:
    """Fill some room with the file's bytes of what is `wanted`."""
    dtype = _DTYPES[info.dtype]
    row = math.prod(info.shape[1:]) * dtype.itemsize
    start = info.start + wanted.rows.start * row
    with path.open("rb", buffering=0) as file:
        if wanted.columns is None:
            tensor = room(wanted.shape, dtype)
            _fill(file, start, tensor, name)
            return tensor
        return _read_columns(file, start, row, wanted, room(wanted.shape, dtype), name)


def _read_columns(
    file: FileIO, start: int, row: int, wanted: Slice, tensor: torch.Tensor, name: str
) -> torch.Tensor:
    """Fill `tensor` with a run of each row from `start` on; rows have `row` bytes."""
    columns, dtype = wanted.columns, tensor.dtype
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


def _gguf_reader(path: Path, packed: Container[str]) -> Read:
    header = read_gguf(path)
    named = header.hf_tensors()

    def read(tensor: str, wanted: Slice) -> torch.Tensor:
        if named[tensor].shape != wanted.whole:
            raise _misshapen(path, tensor, named[tensor].shape, wanted.whole)
        if tensor in packed:
            return torch.from_numpy(header.blocks(named[tensor], wanted.rows))
        rows = torch.from_numpy(header.array(named[tensor], wanted.rows))
        if wanted.columns is None:
            return rows
        return rows[:, wanted.columns.start : wanted.columns.stop].contiguous()

    return read


def _misshapen(path: Path, name: str, found: Sequence[int], expected: Shape) -> CorruptWeights:
    return CorruptWeights(
        f"{name} in {path} has shape {list(found)}, its config says {list(expected)}"
    )
