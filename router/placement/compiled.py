"""The door to the planner's part of `router/native.c`: the flow of placements, and annealing on it.

Without a C compiler at installation `native.available()` is False; then `flow.py` asks scipy, some
hundred times slower, and `anneal.py` has the loop in Python.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from hexswarm.errors import UsageError
from hexswarm.router import native
from hexswarm.router.placement.rates import Ints, Numbers, Rates


class _Placing(ctypes.Structure):
    _fields_ = (
        ("units", ctypes.c_int64),
        ("layers", ctypes.c_int64),
        ("width", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("most", "speed", "link", "nic_in", "nic_out")),
        ("limit", ctypes.c_double),
    )


class _Annealing(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_double) for name in ("flow_weight", "floor_weight", "mean_weight")),
        *((name, ctypes.c_double) for name in ("goal", "hot", "cold")),
        ("steps", ctypes.c_int64),
        ("random", ctypes.c_uint64),
        ("worth", ctypes.c_double),
        ("flow", ctypes.c_double),
    )


@cache
def _library() -> Any:
    library = native.library()
    address = ctypes.c_void_p
    library.hexswarm_flow_prepare.argtypes = (ctypes.POINTER(_Placing),)
    library.hexswarm_flow_prepare.restype = address
    library.hexswarm_flow_release.argtypes = (address,)
    library.hexswarm_flow_release.restype = None
    library.hexswarm_flow_value.argtypes = (address, address, address)
    library.hexswarm_flow_value.restype = ctypes.c_double
    library.hexswarm_flow_edges.argtypes = (address,) * 6
    library.hexswarm_flow_edges.restype = ctypes.c_int64
    library.hexswarm_anneal.argtypes = (address, ctypes.POINTER(_Annealing), *(address,) * 4)
    library.hexswarm_anneal.restype = ctypes.c_int64
    return library


class CompiledFlow:
    """Max-flows of placements of the same units. Not for two threads at once."""

    def __init__(self, rates: Rates) -> None:
        count = rates.units
        self._kept = [
            np.ascontiguousarray(array, kind)
            for array, kind in (
                (rates.most, np.int32),
                *((array, np.float64) for array in (rates.speed, rates.link)),
                *((array, np.float64) for array in (rates.nic_in, rates.nic_out)),
            )
        ]
        """Must live as long as the library may read them."""
        shapes = [(count,), (count, rates.speed.shape[1]), (count + 1,) * 2, (count,), (count,)]
        if [array.shape for array in self._kept] != shapes:
            raise ValueError("arrays of unlike lengths")
        self._placing = _Placing(
            count, rates.layers, rates.speed.shape[1], *(a.ctypes.data for a in self._kept)
        )
        self._placing.limit = rates.limit
        pointer = _library().hexswarm_flow_prepare(ctypes.byref(self._placing))
        if not pointer:
            raise MemoryError("no memory for the flow of a placement")
        self.pointer = pointer
        weakref.finalize(self, _library().hexswarm_flow_release, pointer)
        self._first, self._end = (ctypes.c_int32 * count)(), (ctypes.c_int32 * count)()
        self._at = (ctypes.addressof(self._first), ctypes.addressof(self._end))
        self._value = _library().hexswarm_flow_value

    def load(self, first: Sequence[int], end: Sequence[int]) -> None:
        """A placement to value; ctypes takes lists of Python's integers quickest."""
        self._first[:], self._end[:] = list(first), list(end)

    def value(self) -> float:
        """Of the loaded placement."""
        found = float(self._value(self.pointer, *self._at))
        if found < 0:
            raise UsageError("a unit holds more layers than fit, or layers that do not exist")
        return found

    def edges(self) -> tuple[Ints, Ints, Numbers]:
        """Sender, receiver (`units` is the coordinator) and tokens a second where any pass."""
        self.value()
        room = len(self._first) * (len(self._first) + 2)
        sender, receiver = np.empty(room, np.int32), np.empty(room, np.int32)
        carried = np.empty(room)
        into = (array.ctypes.data for array in (sender, receiver, carried))
        count = _library().hexswarm_flow_edges(self.pointer, *self._at, *into)
        return sender[:count], receiver[:count], carried[:count]


class CompiledWalk:
    """Annealing from one placement; as `anneal.PythonWalk`, forty times quicker."""

    def __init__(
        self,
        flow: CompiledFlow,
        first: Sequence[int],
        end: Sequence[int],
        *,
        weights: tuple[float, float, float, float],
        random: int,
    ) -> None:
        """`weights`: of the flow, of the least cover, of the mean cover up to the last number."""
        flow.load(first, end)
        flow.value()  # raises where it is no placement
        self._flow = flow
        self._asked = _Annealing(*weights, random=random, worth=float("-inf"))
        count = len(first)
        self._spans = [(ctypes.c_int32 * count)(*said) for said in (first, end, first, end)]

    def advance(self, steps: int, hot: float, cold: float) -> None:
        """So many steps, while the temperature falls from `hot` to `cold`."""
        asked = self._asked
        asked.steps, asked.hot, asked.cold = steps, hot, cold
        into = (ctypes.addressof(span) for span in self._spans)
        if not _library().hexswarm_anneal(self._flow.pointer, ctypes.byref(asked), *into):
            raise MemoryError("no memory for a plan")

    @property
    def best(self) -> tuple[list[int], list[int]]:
        return list(self._spans[2]), list(self._spans[3])

    @property
    def worth(self) -> float:
        """Of the best, by the weights."""
        return float(self._asked.worth)

    @property
    def flow(self) -> float:
        """Of the best."""
        return float(self._asked.flow)
