"""Flat msgpack lists, read strictly: the bodies of records that strangers sign.

A list in a fixed order, of plain values only: no maps, no extensions, nothing deep. Each function
raises ValueError for a value of another type or size; who reads a body turns that into the error of
its protocol.
"""

from __future__ import annotations

import math
from typing import Any

import msgpack


def unpack(data: bytes, count: int | None = None, *, most: int = 32) -> list[Any]:
    """A list of `count` values; none of the lists in it is longer than `most`."""
    value = msgpack.unpackb(
        data, max_str_len=1024, max_array_len=most, max_map_len=0, max_ext_len=0
    )
    return items(value, count)


def items(value: Any, count: int | None = None) -> list[Any]:
    if type(value) is not list or (count is not None and len(value) != count):
        raise ValueError("a list of another length was expected")
    return value


def text(value: Any, limit: int) -> str:
    if type(value) is not str or len(value) > limit:
        raise ValueError("a short text was expected")
    return value


def integer(value: Any, limit: int, *, least: int = 0) -> int:
    if type(value) is not int or not least <= value <= limit:
        raise ValueError("a small integer was expected")
    return value


def flag(value: Any) -> bool:
    if type(value) is not bool:
        raise ValueError("true or false was expected")
    return value


def real(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError("a finite number was expected")
    return float(value)
