"""What Python and `native.c` share: its records, the library itself, and its teams of threads.

The library is an optional part of the installation: without a C compiler `available()` is False.
"""

from __future__ import annotations

import ctypes
import weakref
from functools import cache
from importlib.util import find_spec
from itertools import count, takewhile
from typing import Any

import torch
from torch import Tensor

ROWS = 64
"""Most tokens of a batch of `hexswarm_decode` and `hexswarm_head`; native.c has the same number."""

MOST = 128
"""Most tokens of a matrix product at a time; likewise."""

DTYPES = (torch.float32, torch.bfloat16)
"""What matrices and cache may be stored in."""


class Shape(ctypes.Structure):
    _fields_ = (
        ("hidden", ctypes.c_int64),
        ("intermediate", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("kv_heads", ctypes.c_int64),
        ("head_dim", ctypes.c_int64),
        ("eps", ctypes.c_float),
    )


VECTORS = (
    "input_norm",
    "qkv_bias",
    "qk_norm",
    "o_bias",
    "post_norm",
    "gate_up_bias",
    "down_bias",
)
MATRICES = ("qkv", "o", "gate_up", "down")


class Layer(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in (*VECTORS, *MATRICES)),
        ("cache", ctypes.c_void_p),
        ("window", ctypes.c_int64),
    )


class Batch(ctypes.Structure):
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


class Pass(ctypes.Structure):
    _fields_ = (
        ("shape", ctypes.POINTER(Shape)),
        ("layers", ctypes.POINTER(Layer)),
        ("count", ctypes.c_int64),
        ("batch", ctypes.POINTER(Batch)),
        ("x", ctypes.c_void_p),
        ("scratch", ctypes.c_void_p),
    )


class Head(ctypes.Structure):
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


class Product(ctypes.Structure):
    _fields_ = (
        ("rows", ctypes.c_int64),
        ("depth", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("x_stride", ctypes.c_int64),
        ("x", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("weight", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("room", ctypes.c_void_p),
    )


@cache
def library() -> Any:
    """The compiled library, or None. It is found, not imported: it has nothing for Python."""
    found = find_spec("hexswarm.kernels._native")
    if found is None or found.origin is None:
        return None
    return load(found.origin)


def load(path: str) -> Any:
    """The library in this file, its functions declared."""
    library = ctypes.CDLL(path)
    library.hexswarm_instructions.argtypes = (ctypes.c_int64,)
    library.hexswarm_instructions.restype = ctypes.c_char_p
    library.hexswarm_scratch.argtypes = (ctypes.POINTER(Shape), ctypes.c_int64, ctypes.c_int64)
    library.hexswarm_scratch.restype = ctypes.c_int64
    library.hexswarm_start.argtypes = (ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)
    library.hexswarm_start.restype = ctypes.c_void_p
    library.hexswarm_stop.argtypes = (ctypes.c_void_p,)
    library.hexswarm_stop.restype = None
    for function in (library.hexswarm_decode, library.hexswarm_head, library.hexswarm_product):
        function.argtypes = (ctypes.c_void_p, ctypes.c_void_p)
        function.restype = None
    return library


def available() -> bool:
    """Whether the library was compiled when the package was installed."""
    return library() is not None


def instructions() -> tuple[str, ...]:
    """The instruction sets that the library can use here, best first."""
    if not available():
        return ()
    names = map(library().hexswarm_instructions, count())
    return tuple(name.decode() for name in takewhile(bool, names))


class Team:
    """Threads that run the functions of the library, the caller's being the first.

    `stored` is what matrices and cache hold. One call at a time, as a shard has one owner; the GIL
    is free meanwhile.
    """

    def __init__(
        self, threads: int, stored: torch.dtype, instruction_set: str | None = None
    ) -> None:
        if not available():
            raise RuntimeError("hexswarm was installed without its native library")
        self.instruction_set = instruction_set or instructions()[0]
        index = instructions().index(self.instruction_set)
        self._library, self.threads = library(), threads
        team = self._library.hexswarm_start(threads, index, DTYPES.index(stored))
        if team is None:
            raise MemoryError
        self._team = ctypes.c_void_p(team)
        self.stop = weakref.finalize(self, self._library.hexswarm_stop, self._team)
        """Ends the threads, once."""
        self.stop.atexit = False  # the process ends its threads, and a forked one has none of them

    def decode(self, job: Pass) -> None:
        self._library.hexswarm_decode(self._team, ctypes.byref(job))

    def head(self, job: Head) -> None:
        self._library.hexswarm_head(self._team, ctypes.byref(job))

    def multiply(self, job: Product) -> None:
        self._library.hexswarm_product(self._team, ctypes.byref(job))


def address(tensor: Tensor | None, dtype: torch.dtype) -> int | None:
    """Where a tensor's numbers are; they are what and as they should be."""
    if tensor is None:
        return None
    assert tensor.is_contiguous()
    return address_of_rows(tensor, dtype)


def address_of_rows(tensor: Tensor, dtype: torch.dtype) -> int:
    """The same if only each row's numbers must adjoin."""
    assert tensor.dtype == dtype
    assert tensor.device.type == "cpu"
    assert tensor.stride(-1) == 1
    return tensor.data_ptr()
