"""Strict checks of what comes over the wire, field by field.

A message is a frozen dataclass whose fields are made by `wire`, with a check that returns the value
or raises ValueError: the type itself, never one that only behaves like it (a bool is no integer, a
float no position), and a bound for whatever has a size. `encode` and `decode` of
`hexswarm.messages` run the same checks, so that nothing leaves which others would refuse.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import field
from typing import Any

from hexswarm.flat import real

Check = Callable[[Any], Any]


def wire(check: Check, **kw: Any) -> Any:
    return field(metadata={"check": check}, **kw)


def integer(low: int, high: int) -> Check:
    def check(value: Any) -> int:
        if type(value) is not int or not low <= value <= high:
            raise ValueError(f"an integer in {low}-{high} was expected")
        return value

    return check


def text(limit: int) -> Check:
    def check(value: Any) -> str:
        if type(value) is not str or len(value) > limit:
            raise ValueError(f"a text of at most {limit} characters was expected")
        return value

    return check


def blob(size: int) -> Check:
    def check(value: Any) -> bytes:
        if type(value) is not bytes or len(value) != size:
            raise ValueError(f"{size} bytes were expected")
        return value

    return check


def share(value: Any) -> float:
    if not 0 <= real(value) <= 1:
        raise ValueError("a number from 0 to 1 was expected")
    return float(value)


def amount(value: Any) -> float:
    if real(value) < 0:
        raise ValueError("a number that is not negative was expected")
    return float(value)


def list_of(check: Check, limit: int) -> Check:
    def check_list(value: Any) -> tuple[Any, ...]:
        if type(value) not in (list, tuple) or len(value) > limit:
            raise ValueError(f"a list of at most {limit} was expected")
        return tuple(check(item) for item in value)

    return check_list


def one_of(names: tuple[str, ...]) -> Check:
    def check(value: Any) -> str:
        if value not in names:
            raise ValueError(f"one of {', '.join(names)} was expected")
        return str(value)

    return check
