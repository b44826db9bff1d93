"""The door to `native.c`: the router's hot path, compiled.

Loaded by ctypes, which gives the interpreter's lock back during the call. The extension is an
optional part of the installation; without a C compiler `available()` is False and `search.py` and
`select.py` do the same in Python, ten to a thousand times slower.
"""

from __future__ import annotations

import ctypes
import weakref
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hexswarm.router.search import Problem
    from hexswarm.router.select import Census

_STAGES = 64
_FOUND, _NONE, _UNPROVEN, _GAVE_UP = range(4)

_BY_PEER = (
    *("price_enter", "price_layer", "t_enter", "t_layer", "t_finish"),
    *("a_enter", "a_layer", "a_finish", "a_begin", "open_stage"),
)
_BY_PAIR = ("rtt_s", "jitter_s", "s_per_byte")
_HOP = ("hop_fixed", "late", "t_bytes", "a_bytes", "dial")
_NUMBERS = (
    *("weight_price", "weight_t", "weight_a", "weight_max", "more_chunks"),
    *("limit_t", "limit_a"),
)


class _Problem(ctypes.Structure):
    _fields_ = (
        ("peers", ctypes.c_int64),
        ("layers", ctypes.c_int64),
        ("first", ctypes.c_void_p),
        ("end", ctypes.c_void_p),
        *((name, ctypes.c_void_p) for name in (*_BY_PEER, *_BY_PAIR, "linked")),
        *((name, ctypes.c_double) for name in (*_HOP, *_NUMBERS)),
        ("most_labels", ctypes.c_int64),
        ("steps", ctypes.c_int64),
        ("barred", ctypes.c_void_p),
    )


class _Answer(ctypes.Structure):
    _fields_ = (
        ("status", ctypes.c_int64),
        ("stages", ctypes.c_int64),
        ("labels", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("peer", ctypes.c_int32 * _STAGES),
        ("end", ctypes.c_int32 * _STAGES),
        *((name, ctypes.c_double) for name in ("price", "t", "a", "open", "slowest")),
    )


_CENSUS = (
    *("enter", "layer", "finish", "begin", "out", "in_", "close_out", "close_in"),
    *("between", "close_between"),
)


class _Census(ctypes.Structure):
    _fields_ = (
        ("peers", ctypes.c_int64),
        ("layers", ctypes.c_int64),
        ("regions", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("first", "end", "region", *_CENSUS, "homes")),
        ("anywhere", ctypes.c_int64),
        ("score", ctypes.c_void_p),
    )


Found = tuple[tuple[int, ...], tuple[int, ...], tuple[float, float, float, float, float], bool]


@cache
def library() -> Any:
    """The extension, or None; `placement/compiled.py` declares its functions for placements."""
    spec = find_spec("hexswarm.router._native")
    if spec is None or spec.origin is None:
        return None
    library = ctypes.CDLL(spec.origin)
    library.hexswarm_prepare.argtypes = (ctypes.POINTER(_Problem),)
    library.hexswarm_prepare.restype = ctypes.c_void_p
    library.hexswarm_search.argtypes = (
        ctypes.c_void_p,
        ctypes.POINTER(_Problem),
        ctypes.POINTER(_Answer),
    )
    library.hexswarm_search.restype = None
    library.hexswarm_release.argtypes = (ctypes.c_void_p,)
    library.hexswarm_release.restype = None
    library.hexswarm_select.argtypes = (ctypes.POINTER(_Census),)
    library.hexswarm_select.restype = ctypes.c_int64
    return library


def available() -> bool:
    """The native search was compiled at installation."""
    return library() is not None


class Prepared:
    """One problem made ready: what its variants in price, weights and limits have in common."""

    def __init__(self, problem: Problem) -> None:
        self._kept: list[Any] = []
        """Arrays that must live as long as the library may read them."""
        count = len(problem.first)
        asked = self._asked = _Problem(
            peers=count,
            layers=problem.layers,
            first=self._address(problem.first, np.int32, (count,)),
            end=self._address(problem.end, np.int32, (count,)),
            linked=self._address(problem.ways.linked, np.bool_, (count, count)),
        )
        for name in _BY_PEER:
            setattr(asked, name, self._address(getattr(problem, name), np.float64, (count,)))
        for name in _BY_PAIR:
            matrix = getattr(problem.ways, name)
            setattr(asked, name, self._address(matrix, np.float64, (count, count)))
        for name in _HOP:
            setattr(asked, name, getattr(problem, name))
        pointer = library().hexswarm_prepare(ctypes.byref(asked))
        if not pointer:
            raise MemoryError("no memory for the search of a route")
        self._pointer = pointer
        weakref.finalize(self, library().hexswarm_release, pointer)

    def search(
        self,
        problem: Problem,
        most_labels: int,
        *,
        steps: int = 6,
        barred: NDArray[np.bool_] | None = None,
    ) -> Found | None:
        """Peers, ends, (price, t, a, open, slowest) and whether proven; None: there is no ring.

        Without peers the search gave up: there may be one. `steps` are those of the secant for a
        multiplier. `problem` is the prepared one but for price, weights and limits; peers that are
        `barred` take no part. Not for two threads at once.
        """
        asked, answer = self._asked, _Answer()
        count = len(problem.first)
        prices = {
            name: np.ascontiguousarray(getattr(problem, name), np.float64)
            for name in ("price_enter", "price_layer")
        }
        for name, array in prices.items():
            if array.shape != (count,):
                raise ValueError(f"prices of shape {array.shape} for {count} peers")
            setattr(asked, name, array.ctypes.data)
        asked.barred = None
        if barred is not None:
            barred = np.ascontiguousarray(barred, np.bool_)
            if barred.shape != (count,):
                raise ValueError(f"flags of shape {barred.shape} for {count} peers")
            asked.barred = barred.ctypes.data
        for name in _NUMBERS:
            setattr(asked, name, getattr(problem, name))
        asked.most_labels, asked.steps = most_labels, steps
        library().hexswarm_search(self._pointer, ctypes.byref(asked), ctypes.byref(answer))
        if answer.status == _NONE:
            return None
        if answer.status not in (_FOUND, _UNPROVEN, _GAVE_UP):
            raise MemoryError("no memory for the search of a route")
        stages = answer.stages
        sizes = (answer.price, answer.t, answer.a, answer.open, answer.slowest)
        proven = answer.status == _FOUND
        return tuple(answer.peer[:stages]), tuple(answer.end[:stages]), sizes, proven

    def _address(self, array: Any, dtype: Any, shape: tuple[int, ...]) -> Any:
        exact = np.ascontiguousarray(array, dtype)
        if exact.shape != shape:
            raise ValueError(f"an array of shape {exact.shape} where {shape} was expected")
        self._kept.append(exact)
        return exact.ctypes.data


def select(census: Census) -> NDArray[np.float64]:
    """`hexswarm.router.select.through`."""
    count, regions = len(census.first), len(census.between)
    kept: list[Any] = []

    def address(array: Any, dtype: Any) -> Any:
        exact = np.ascontiguousarray(array, dtype)
        if exact.shape not in ((count,), (regions,), (regions, regions)):
            raise ValueError(f"an array of shape {exact.shape}")
        kept.append(exact)
        return exact.ctypes.data

    score = np.empty(count)
    asked = _Census(
        peers=count,
        layers=census.layers,
        regions=regions,
        homes=address(census.homes, np.bool_),
        anywhere=census.anywhere,
        score=score.ctypes.data,
    )
    for name in ("first", "end", "region"):
        setattr(asked, name, address(getattr(census, name), np.int32))
    for name in _CENSUS:
        setattr(asked, name, address(getattr(census, name), np.float64))
    if not library().hexswarm_select(ctypes.byref(asked)):
        raise MemoryError("no memory for the choice of candidates")
    return score
