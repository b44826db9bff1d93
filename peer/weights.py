"""Loading the tensors of a span: verified, converted one at a time, never more than asked for.

Each weight file is identified by its hash before a byte of it is used, and looked at again after
reading, so that what was verified is what was loaded (a hash is remembered for as long as the file
is unchanged, see `hexswarm.manifest`). `stream_span` reads a tensor when it is taken, so that what
fuses them on a device, or rounds them, needs room for one tensor beside its own: on the host it is
read into pinned memory that all share, from which a GPU takes it at the speed of its bus. Whoever
wants them all at once has `load_span`. Tensors are read straight into their final storage, or into
one temporary of a single tensor's size if dtype or device differ: the peak is the span plus one
tensor. Files are read, not mapped, since a mapped file that somebody truncates kills the process.

The names and shapes come from the config, not from the file: a file that lacks one, has another
shape, or has a tensor which our model code would ignore is refused.

A member of a tensor-parallel group reads its own slices (`hexswarm.peer.slices`). Matrices that a
file has in the 4 bits that are wanted are not widened on the way (`hexswarm.peer.packing`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager

import torch
from torch import Tensor

from hexswarm.architecture import span_shapes
from hexswarm.errors import OutOfMemory, UnsupportedModel
from hexswarm.kernels.quantise import Quantised
from hexswarm.manifest import HashCache
from hexswarm.peer.cuts import Part
from hexswarm.peer.memory import free_bytes
from hexswarm.peer.packing import in_few_bits, kept, roundable
from hexswarm.peer.reading import Bounce, Read, fresh, reader
from hexswarm.peer.slices import Slice, part_slices
from hexswarm.progress import Advance, Progress, Quiet
from hexswarm.records import DTYPES, Span
from hexswarm.store import ModelFolder, span_files

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
    quant: str = "none",
) -> dict[str, Tensor | Quantised]:
    """The tensors of `span` by their Hugging Face names, or of each what `part` has of it.

    The tail of a model with tied embeddings gets `model.embed_tokens.weight`, as the checkpoint
    names it. `quant`: how matrices of layers will be rounded; a file that has them so gives them
    so. Raises UsageError, OutOfMemory or a ModelError.
    """
    with stream_span(
        folder, span, dtype=dtype, device=device, progress=progress, part=part, quant=quant
    ) as tensors:
        return {name: tensors.pop(name) for name in list(tensors)}


@contextmanager
def stream_span(
    folder: ModelFolder,
    span: Span,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    part: Part | None = None,
    quant: str = "none",
    held: int | None = None,
) -> Iterator[SpanTensors]:
    """The same, each tensor read when it is taken, as long as the context lasts.

    `held` bytes of them will be kept, if that is not all: they may be rounded to few bits. Besides
    what `load_span` raises, a lack of memory within the context becomes OutOfMemory.
    """
    progress, device = progress or Quiet(), torch.device(device)
    slices, files = part_slices(folder.config, span, part), span_files(folder, span)
    _refuse_unknown(folder, span)
    whole = span_bytes(folder, span, dtype, part)
    needed, free = whole if held is None else held, free_bytes(device)
    if needed > free:
        raise _out_of_memory(span, needed, device, f"{free / 1e9:.1f} GB are free")
    cache = HashCache(folder.home)
    for name in sorted(files):
        cache.require(folder.file(name), folder.files[name], progress)
    wanted = {t: name for name in sorted(files) for t in files[name] if t in slices}
    try:
        with progress.bar(f"loading layers {span}", whole) as advance:
            packing = quant == "int4" and bool(folder.packed)
            yield SpanTensors(folder, wanted, slices, dtype, device, advance, packing)
        for name in sorted(files):
            cache.require(folder.file(name), folder.files[name], progress)
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise _out_of_memory(span, needed, device, "the device is full") from error
    except RuntimeError as error:
        if "allocate" not in str(error) and "memory" not in str(error):
            raise
        raise _out_of_memory(span, needed, device, "the device is full") from error


class SpanTensors(MutableMapping[str, Tensor | Quantised]):
    """The tensors of a span by name; each is read anew whenever it is asked for."""

    def __init__(
        self,
        folder: ModelFolder,
        files: dict[str, str],
        slices: Mapping[str, Slice],
        dtype: torch.dtype,
        device: torch.device,
        advance: Advance,
        packing: bool = False,
    ) -> None:
        """`files` says in which file each tensor is; `packing`: matrices are wanted in int4."""
        self._folder, self._files, self._slices = folder, files, slices
        self._dtype, self._device, self._advance = dtype, device, advance
        self._readers: dict[str, Read] = {}
        self._given: dict[str, Tensor | Quantised] = {}
        self._packing = packing
        names = slices if packing else ()
        self._packed = {name for name in names if kept(folder, name, slices[name])}
        self._room = Bounce().room if device.type == "cuda" else fresh

    def __getitem__(self, name: str) -> Tensor | Quantised:
        if name in self._given:
            return self._given[name]
        file, wanted = self._files[name], self._slices[name]
        if file not in self._readers:
            self._readers[file] = reader(self._folder, file, self._room, self._packed)
        value = self._given_form(name, self._readers[file](name, wanted), wanted)
        self._advance(wanted.elements * self._dtype.itemsize)
        return value

    def _given_form(self, name: str, value: Tensor, wanted: Slice) -> Tensor | Quantised:
        """What was read, on its device, in the form that is given."""
        if self._packing and roundable(name, wanted.whole):
            return in_few_bits(value, name in self._packed, wanted, self._dtype, self._device)
        return value.to(device=self._device, dtype=self._dtype)

    def __setitem__(self, name: str, value: Tensor | Quantised) -> None:
        self._given[name] = value

    def __delitem__(self, name: str) -> None:
        found = self._given.pop(name, None)
        if self._files.pop(name, None) is None and found is None:
            raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return iter({**self._files, **self._given})

    def __len__(self) -> int:
        return len(self._files.keys() | self._given.keys())


def _refuse_unknown(folder: ModelFolder, span: Span) -> None:
    """Raise if a layer has a tensor that the model code would silently leave out."""
    shapes = span_shapes(folder.config, span)
    for name in folder.tensors:
        match = re.match(r"model\.layers\.(\d{1,6})\.", name)
        if match and int(match[1]) in span and name not in shapes and not _COMPUTED.match(name):
            raise UnsupportedModel(
                f"{folder.spec.name} has a tensor {name}, unusual for {folder.spec.architecture}"
            )


def _out_of_memory(span: Span, needed: int, device: torch.device, why: str) -> OutOfMemory:
    return OutOfMemory(
        f"layers {span} need {needed / 1e9:.1f} GB on {device}; {why}",
        remedy="serve fewer layers (--span) or use --dtype bfloat16",
    )
