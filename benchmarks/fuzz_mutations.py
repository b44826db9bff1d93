"""How valid inputs become hostile ones: flips, cuts, splices, lies about lengths, other types.

Every choice comes from the generator that is passed in, so a seed gives the same inputs each time.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import msgpack

INTEGERS = (0, 1, -1, 127, 128, 255, 65535, 65536, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 62)
LENGTHS = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 40, (1 << 64) - 1)
VALUES: tuple[Any, ...] = (
    *INTEGERS, (1 << 64) - 1, -(1 << 63), None, True, False, 0.0, -0.0, math.nan, math.inf,
    -math.inf, 1e308, 5e-324, "", "x", "x" * 300, "\0", "\u6a21" * 70, b"", b"x", b"x" * 16,
    b"x" * 70, [], [[]], [1] * 40, [[[[[[[[[[1]]]]]]]]]], {}, {"a": 1},
    msgpack.ExtType(0x40, b"\x90"), msgpack.Timestamp(1),
)  # fmt: skip
TYPES = bytes.fromhex("c0c1c2c3c4c6c7c9cacbcccfd0d3d4d8d9dbdcdddedf8090a0ff")
"""First bytes of msgpack values, of most kinds."""


def mutate(data: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    """`data` altered in one to three ways; `others` lend pieces."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        rng.choice(_WAYS)(changed, rng, others)
    return bytes(changed)


def _flip(data: bytearray, rng: random.Random, others: Sequence[bytes]) -> None:
    for _ in range(rng.choice((1, 1, 2, 8)) if data else 0):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def _overwrite(data: bytearray, rng: random.Random, others: Sequence[bytes]) -> None:
    if data:
        data[rng.randrange(len(data))] = rng.choice(TYPES)


def _truncate(data: bytearray, rng: random.Random, others: Sequence[bytes]) -> None:
    del data[rng.randint(0, len(data)) :]


def _cut(data: bytearray, rng: random.Random, others: Sequence[bytes]) -> None:
    start = rng.randint(0, len(data))
    del data[start : start + rng.randint(1, 32)]


def _splice(data: bytearray, rng: random.Random, others: Sequence[bytes]) -> None:
    other = rng.choice(others)
    start = rng.randint(0, len(other))
    piece = other[start : start + rng.choice((4, 16, 64, len(other)))]
    at = rng.randint(0, len(data))
    data[at : at + rng.choice((0, len(piece)))] = piece


def _repeat(data: bytearray, rng: random.Random, others: Sequence[bytes]) -> None:
    start = rng.randint(0, len(data))
    piece = data[start : start + rng.randint(1, 64)]
    data[start:start] = piece * rng.choice((1, 2, 50))


def _lie(data: bytearray, rng: random.Random, others: Sequence[bytes]) -> None:
    """Write a length, or one near what stands there, over 1 to 8 bytes."""
    width = rng.choice((1, 2, 4, 4, 8))
    if len(data) < width:
        return
    start, order = rng.randint(0, len(data) - width), rng.choice(("big", "little"))
    told = int.from_bytes(data[start : start + width], order)
    lie = told + rng.choice((-1, 1)) if rng.random() < 0.5 else rng.choice(LENGTHS)
    data[start : start + width] = (lie % (1 << 8 * width)).to_bytes(width, order)


def _noise(data: bytearray, rng: random.Random, others: Sequence[bytes]) -> None:
    at = rng.randint(0, len(data))
    data[at:at] = rng.randbytes(rng.choice((1, 4, 16)))


_WAYS: tuple[Callable[[bytearray, random.Random, Sequence[bytes]], None], ...] = (
    *(_flip, _overwrite, _truncate, _cut, _splice, _repeat, _lie, _noise),
)


def mutate_tree(data: bytes, rng: random.Random) -> bytes:
    """msgpack with one value in it replaced, added, removed or doubled."""
    changed = mutate_value(msgpack.unpackb(data, strict_map_key=False), rng)
    packed: bytes = msgpack.packb(changed, default=repr)
    return packed


def mutate_value(value: Any, rng: random.Random) -> Any:
    """A tree of lists and dicts with one place in it altered."""
    if rng.random() < 0.3 or not isinstance(value, list | dict) or not value:
        return _other(value, rng)
    if isinstance(value, dict):
        name = rng.choice(sorted(value, key=repr))
        if rng.random() < 0.1:
            return {key: item for key, item in value.items() if key != name}
        return {**value, name: mutate_value(value[name], rng)}
    at = rng.randrange(len(value))
    match rng.randrange(8):
        case 0:
            return value[:at] + value[at + 1 :]
        case 1:
            return [*value[:at], rng.choice(VALUES), *value[at:]]
        case 2:
            return [*value[:at], *value]
        case _:
            return [*value[:at], mutate_value(value[at], rng), *value[at + 1 :]]


def _other(value: Any, rng: random.Random) -> Any:
    """Something near the value, or anything."""
    near = rng.random() < 0.5
    if near and type(value) is int:
        return max(-(1 << 63), min((1 << 64) - 1, value + rng.choice((-1, 1, 1 << 12, -(1 << 12)))))
    if near and type(value) is float:
        return value * rng.choice((-1.0, 0.0, 2.0, 1e300))
    if near and type(value) is str:
        return rng.choice((value * 2, value[1:], value + "\0", value.upper()))
    if near and type(value) is bytes:
        return rng.choice((value * 2, value[1:], bytes(len(value))))
    return rng.choice(VALUES)
