"""The layers of a stage for a few tokens, in C: what a CPU does instead of PyTorch at decode.

A decode step reads every weight once, so memory sets its floor: SmolLM2-135M in float32 is 538 MB,
37 ms at the 14.5 GB/s of one core of our Xeon (AVX-512, virtual, shared). PyTorch took 45 there:
some twenty small operations a layer that run cold, since 14 MB of weights pass through the caches
between two of a kind, and matrix products that lose speed with two rows or more. Milliseconds of
the processor a step, one thread, the decode of `benchmarks/engine.py` with 31 steps, both backends
by turns in one process, medians of 5 (its `--backend` measures one at a time):

    rows       1     2     4     8    16
    native  39.3  40.6  44.9  52.4  79.6
    torch   45.1  55.7  66.8  92.9 115.4

Here one call runs all layers. Weights stay as they are, `[in, out]`, one copy for this and for
PyTorch's prefill. Four of their rows stream by at a time and are added to sums that stay in the
first-level cache, a tile of 1024 columns; a weight is loaded once for up to eight tokens. Every
result is the same sum in the same order whatever the batch, the tiling and the threads, hence a
row does not depend on its neighbours, bit for bit. Queries are tokens, not sessions: any batch of
up to `ROWS` tokens will do, be they decode steps or the end of a prompt.

Matrices and cache may be bfloat16: a third of the time of a step less, since half of the bytes are
read. They are widened in registers by a shift, exactly, which every processor can; sums, norms and
what lies between matrices are float32 as ever. The dot products that newer processors have for
bfloat16 were rejected: they want pairs of rows interleaved, which PyTorch's prefill does not, and
reading is the limit already. Rows of this table were measured beside other work:

    rows                 1     4     8    16
    float32 native    40.9  45.7  50.9  77.6
    bfloat16 native   25.9  26.5  31.2  62.3
    bfloat16 torch    83.2     -  91.3   142

Threads are a team of the shard's own, over columns, heads and sessions; how many is for the owner
to say (`hexswarm.peer.threads`).

Rejected: weights in `[out, in]` (dot products; the prefill wants the other order, and two copies do
not fit), sums in registers over all of k (a row of weights is read in pieces of 256 bytes, which no
prefetcher follows), huge pages (no gain measured), OpenMP (a second runtime in PyTorch's process),
`target_clones` (generic vectors are lowered before it clones). Float16 stays with PyTorch.

The library is an optional part of the installation: without a C compiler `available()` is False.
"""

from __future__ import annotations

import ctypes
import weakref
from array import array
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from itertools import count, takewhile
from typing import Any

import torch
from torch import Tensor

from hexswarm.kernels.ragged import Ragged

ROWS = 16
"""Most tokens of a batch; native.c has the same number."""

DTYPES = (torch.float32, torch.bfloat16)
"""What matrices and cache may be stored in."""


class _Shape(ctypes.Structure):
    _fields_ = (
        ("hidden", ctypes.c_int64),
        ("intermediate", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("kv_heads", ctypes.c_int64),
        ("head_dim", ctypes.c_int64),
        ("eps", ctypes.c_float),
    )


_VECTORS = (
    "input_norm",
    "qkv_bias",
    "qk_norm",
    "o_bias",
    "post_norm",
    "gate_up_bias",
    "down_bias",
)
_MATRICES = ("qkv", "o", "gate_up", "down")


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in (*_VECTORS, *_MATRICES)),
        ("cache", ctypes.c_void_p),
        ("window", ctypes.c_int64),
    )


class _Batch(ctypes.Structure):
    _fields_ = (
        ("rows", ctypes.c_int64),
        ("block_size", ctypes.c_int64),
        ("cos", ctypes.c_void_p),
        ("sin", ctypes.c_void_p),
        ("positions", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        ("tables", ctypes.c_void_p),
        ("blocks", ctypes.c_void_p),
    )


class _Pass(ctypes.Structure):
    _fields_ = (
        ("shape", ctypes.POINTER(_Shape)),
        ("layers", ctypes.POINTER(_Layer)),
        ("count", ctypes.c_int64),
        ("batch", ctypes.POINTER(_Batch)),
        ("x", ctypes.c_void_p),
        ("scratch", ctypes.c_void_p),
    )


class _Head(ctypes.Structure):
    _fields_ = (
        ("rows", ctypes.c_int64),
        ("hidden", ctypes.c_int64),
        ("vocabulary", ctypes.c_int64),
        ("x", ctypes.c_void_p),
        ("norm", ctypes.c_void_p),
        ("weight", ctypes.c_void_p),
        ("logits", ctypes.c_void_p),
        ("scratch", ctypes.c_void_p),
        ("eps", ctypes.c_float),
    )


@cache
def _library() -> Any:
    """The compiled library, or None. It is found, not imported: it has nothing for Python."""
    found = find_spec("hexswarm.kernels._native")
    if found is None or found.origin is None:
        return None
    library = ctypes.CDLL(found.origin)
    library.hexswarm_instructions.argtypes = (ctypes.c_int64,)
    library.hexswarm_instructions.restype = ctypes.c_char_p
    library.hexswarm_scratch.argtypes = (ctypes.POINTER(_Shape), ctypes.c_int64, ctypes.c_int64)
    library.hexswarm_scratch.restype = ctypes.c_int64
    library.hexswarm_start.argtypes = (ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)
    library.hexswarm_start.restype = ctypes.c_void_p
    library.hexswarm_stop.argtypes = (ctypes.c_void_p,)
    library.hexswarm_stop.restype = None
    for function in (library.hexswarm_decode, library.hexswarm_head):
        function.argtypes = (ctypes.c_void_p, ctypes.c_void_p)
        function.restype = None
    return library


def available() -> bool:
    """Whether the library was compiled when the package was installed."""
    return _library() is not None


def instructions() -> tuple[str, ...]:
    """The instruction sets that the library can use here, best first."""
    if not available():
        return ()
    names = map(_library().hexswarm_instructions, count())
    return tuple(name.decode() for name in takewhile(bool, names))


class NativeLayers:
    """The layers of a shard (`DecoderLayer`s), all in one of `DTYPES` on the CPU, and its threads.

    One batch at a time, as a shard has one owner; the GIL is free meanwhile. `instruction_set`
    is one of `instructions()`, by default the best. Needs `available()`.
    """

    def __init__(
        self, layers: Sequence[Any], threads: int, instruction_set: str | None = None
    ) -> None:
        if not available():
            raise RuntimeError("hexswarm was installed without its native library")
        first = layers[0]
        self._library, self._dtype = _library(), first.qkv.dtype
        self._hidden = first.input_norm.shape[0]
        self._shape = _Shape(
            *(self._hidden, first.down.shape[0]),
            *(first.heads, first.kv_heads, first.head_dim, first.eps),
        )
        self._layers = (_Layer * len(layers))()
        self._held: list[Tensor | None] = []
        self._stop: weakref.finalize[..., NativeLayers] | None = None
        for record, layer in zip(self._layers, layers, strict=True):
            for name in _VECTORS:
                setattr(record, name, self._hold(_wide(getattr(layer, name)), torch.float32))
            for name in _MATRICES:
                setattr(record, name, self._hold(getattr(layer, name), self._dtype))
            record.window = layer.window or 0
        self._instructions = instruction_set or instructions()[0]
        self.resize(threads)

    def resize(self, threads: int) -> None:
        """Go on with another number of threads."""
        index = instructions().index(self._instructions)
        team = self._library.hexswarm_start(threads, index, DTYPES.index(self._dtype))
        if team is None:
            raise MemoryError
        if self._stop is not None:
            self._stop()
        self.threads, self._team = threads, ctypes.c_void_p(team)
        self._stop = weakref.finalize(self, self._library.hexswarm_stop, self._team)
        self._stop.atexit = False  # the process ends its threads, and a forked one has none of them
        size = self._library.hexswarm_scratch(self._shape, ROWS, threads)
        self._scratch = torch.empty(size)

    def _hold(self, tensor: Tensor | None, dtype: torch.dtype) -> int | None:
        """Its address, and that it stays there as long as we do."""
        self._held.append(tensor)
        return _address(tensor, dtype)

    def decode(
        self,
        x: Tensor,
        batch: Ragged,
        rope: tuple[Tensor, Tensor],
        caches: Sequence[Tensor],
        first: int,
    ) -> Tensor:
        """Run layers [first, first + len(caches)) on `x` `[tokens, hidden]`, in place.

        `rope` is that of `hexswarm.kernels.reference.rope_tables`, in float32. Tokens of one
        session may be several: all keys and values are appended before attention reads any.
        """
        rows = batch.tokens
        assert rows <= ROWS
        assert x.shape == (rows, self._hidden)
        tables, blocks = array("q"), array("q")
        for extent in batch.extents:
            tables.extend([len(blocks)] * extent.count)
            blocks.extend(extent.blocks)
        records = (_Layer * len(caches)).from_buffer(self._layers, first * ctypes.sizeof(_Layer))
        for record, store in zip(records, caches, strict=True):
            record.cache = _address(store, self._dtype)
        described = _Batch(
            *(rows, batch.extents[0].block_size),
            *(_address(table, torch.float32) for table in rope),
            *(_address(index, torch.int64) for index in (batch.positions, batch.slots)),
            *(numbers.buffer_info()[0] for numbers in (tables, blocks)),
        )
        wide = x.float()  # x itself if that is what it is
        job = _Pass(
            *(ctypes.pointer(self._shape), records, len(caches), ctypes.pointer(described)),
            *(_address(wide, torch.float32), self._scratch.data_ptr()),
        )
        self._library.hexswarm_decode(self._team, ctypes.byref(job))
        return x if wide is x else x.copy_(wide)

    def head(self, x: Tensor, norm: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Final norm and LM head of `[rows, hidden]`: logits `[rows, vocabulary]`."""
        rows, (hidden, vocabulary) = x.shape[0], weight.shape
        assert rows <= ROWS
        assert x.shape[1] == hidden == self._hidden
        logits, x, norm = torch.empty(rows, vocabulary), x.float(), norm.float()
        job = _Head(
            *(rows, hidden, vocabulary),
            *(_address(x, torch.float32), _address(norm, torch.float32)),
            *(_address(weight, self._dtype), _address(logits, torch.float32)),
            *(self._scratch.data_ptr(), eps),
        )
        self._library.hexswarm_head(self._team, ctypes.byref(job))
        return logits


def _wide(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float()


def _address(tensor: Tensor | None, dtype: torch.dtype) -> int | None:
    if tensor is None:
        return None
    assert tensor.dtype == dtype
    assert tensor.device.type == "cpu"
    assert tensor.is_contiguous()
    return tensor.data_ptr()
