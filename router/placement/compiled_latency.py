"""The door to `router/native_latency.h`: `mean_field` compiled, a twenty-fifth of the time.

The numpy form stays the reference: tests hold both to the same numbers.
"""

from __future__ import annotations

import ctypes
import weakref
from functools import cache
from typing import Any

import numpy as np

from hexswarm.router import native

TABLES = ("one_way", "token_s", "id_s", "decode", "chunk", "room")
NUMBERS = (
    *("requests_per_s", "output_tokens", "chunk_tokens", "chunks", "long_chunks", "context"),
    *("variance", "spread", "full", "convoy"),
)
EXPECTED = ("ttft_s", "long_ttft_s", "tpot_s", "stages", "busiest", "kv")


class _Serving(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("units", "layers", "rows", "width")),
        *((name, ctypes.c_void_p) for name in TABLES),
        *((name, ctypes.c_double) for name in NUMBERS),
        ("rounds", ctypes.c_int64),
    )


class _Expected(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_double) for name in EXPECTED)


@cache
def _library() -> Any:
    library, address = native.library(), ctypes.c_void_p
    library.hexswarm_latency_prepare.argtypes = (ctypes.POINTER(_Serving),)
    library.hexswarm_latency_prepare.restype = address
    library.hexswarm_latency_release.argtypes = (address,)
    library.hexswarm_latency_release.restype = None
    library.hexswarm_latency_expect.argtypes = (address,) * 5
    library.hexswarm_latency_expect.restype = ctypes.c_int64
    return library


class CompiledLatency:
    """Expectations for placements of the same units at one load. Not for two threads at once."""

    def __init__(
        self, layers: int, tables: dict[str, Any], numbers: dict[str, float], rounds: int
    ) -> None:
        self._kept = {name: np.ascontiguousarray(tables[name], np.float64) for name in TABLES}
        """Must live as long as the library may read them."""
        units, rows = len(tables["chunk"]), tables["decode"].shape[1] - 2
        width = tables["room"].shape[1]
        shapes = [(units + 1,) * 2] * 3 + [(units, rows + 2), (units,), (units, width)]
        if [array.shape for array in self._kept.values()] != shapes:
            raise ValueError("arrays of unlike lengths")
        addresses = (array.ctypes.data for array in self._kept.values())
        given = (numbers[name] for name in NUMBERS)
        self._serving = _Serving(units, layers, rows, width, *addresses, *given, rounds)
        pointer = _library().hexswarm_latency_prepare(ctypes.byref(self._serving))
        if not pointer:
            raise MemoryError("no memory for the latency of a placement")
        self._pointer = pointer
        weakref.finalize(self, _library().hexswarm_latency_release, pointer)
        self._units = units
        self._first, self._end = np.zeros((2, units), np.int32)
        self._shares, self._told = np.zeros(units), _Expected()
        self._at = tuple(array.ctypes.data for array in (self._first, self._end))
        self._into = ctypes.addressof(self._told), self._shares.ctypes.data
        self._expect = _library().hexswarm_latency_expect

    def expect(self, first: Any, end: Any) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        """The figures of `EXPECTED` and each unit's share; None: no request can be served.

        Spans are those that a `Flow` took: they are not looked at again.
        """
        self._first[:], self._end[:] = first, end
        self._shares[:] = 0.0
        if not self._expect(self._pointer, *self._at, *self._into):
            return None
        figures = tuple(getattr(self._told, name) for name in EXPECTED)
        return figures, tuple(self._shares.tolist())
