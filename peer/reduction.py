"""The sums of a group as lists of frames: pure, numpy, no sockets.

An operation is one collective as one member sees it: which frames it sends, where the bytes of a
frame that comes belong (`place`: they are received there, not copied), and what follows from a
frame that is complete. `hexswarm.peer.exchange` drives it.

Two ways to sum a vector over all members, with the same result bit for bit:

- `Swap`, for the vectors of decode steps: everybody sends its part to everybody and sums all. One
  one-way delay, n - 1 vectors sent by each.
- `Scatter`, for those of prompts: each member *owns* an n-th of the vector, gets that range from
  everybody, sums it and sends the sum to everybody. Two delays, 2 (n - 1) / n vectors sent by each.
  Ranges travel in segments, so that sums of the first one fly while later ones still come.

Parts are always summed in the order of the ranks, in float32, so that all members have equal bits:
a group whose members disagree in the last place would sample different tokens, or none. On the wire
values are float32, or bfloat16: then the parts are rounded before they are summed, everybody's own
one too, and the sum is rounded once at the end.

Rejected: the ring (reduce-scatter, then all-gather, as NCCL and gloo have it). It sends as little
as `Scatter`, but takes 2 (n - 1) delays instead of two, adds up each range in another order, and
where one member waits for its neighbour, nobody sees who is at fault. A ring spares links of a
slow topology; a LAN has a switch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

HEADER_BYTES = 24
"""Room in front of each payload that is sent, so that header and payload are one TLS record."""
SEGMENT_BYTES = 64 << 10

Floats = npt.NDArray[np.float32]


class Kind(IntEnum):
    """What a frame is. The last three are about the group itself and belong to no operation."""

    PART = 1
    """A member's own values."""
    SUM = 2
    """The sum of a range, from its owner."""
    CAST = 3
    """The leader's message to all."""
    CALL = 4
    """Are you there?"""
    HERE = 5
    LOST = 6
    """A member is lost: the epoch is over."""


class Format(Enum):
    """Values on the wire."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"

    @property
    def value_bytes(self) -> int:
        return 4 if self is Format.FLOAT32 else 2

    @property
    def dtype(self) -> type[np.float32] | type[np.uint16]:
        return np.float32 if self is Format.FLOAT32 else np.uint16

    def encode(self, values: Floats, out: npt.NDArray[Any]) -> None:
        """To the nearest value, ties to even; NaN stays NaN."""
        if self is Format.FLOAT32:
            out[:] = values
            return
        bits = values.view(np.uint32)
        rounded = bits >> 16
        rounded &= 1
        rounded += 0x7FFF
        rounded += bits
        rounded >>= 16
        out[:] = rounded
        strange = np.isnan(values)
        if strange.any():
            out[strange] = 0x7FC0

    def decode(self, data: npt.NDArray[Any], out: Floats) -> None:
        if self is Format.FLOAT32:
            out[:] = data
        else:
            np.left_shift(data, 16, out=out.view(np.uint32), dtype=np.uint32)

    def round(self, values: Floats) -> None:
        """In place: to what survives the wire."""
        if self is not Format.FLOAT32:
            short = np.empty(len(values), np.uint16)
            self.encode(values, short)
            self.decode(short, values)


class Block:
    """Values of one frame, with room for its header."""

    def __init__(self, count: int, wire: Format) -> None:
        self.framed = memoryview(bytearray(HEADER_BYTES + count * wire.value_bytes))
        self.payload = self.framed[HEADER_BYTES:]
        self.values: npt.NDArray[Any] = np.frombuffer(self.payload, dtype=wire.dtype)


@dataclass(frozen=True, slots=True)
class Outgoing:
    """One frame for each of `ranks`; `framed` begins with HEADER_BYTES of room."""

    ranks: tuple[int, ...]
    kind: Kind
    offset: int
    framed: memoryview


class Operation(Protocol):
    """One collective at one member."""

    def begin(self) -> Sequence[Outgoing]:
        """What is sent at once."""

    def lacks(self, rank: int) -> int:
        """What still has to come from `rank`: 0 nothing, 2 what it alone can send, 1 the rest."""

    def place(self, rank: int, kind: Kind, offset: int, length: int) -> memoryview | None:
        """Where the payload of a frame belongs; None if nobody asked for it."""

    def arrived(self, rank: int, kind: Kind, offset: int) -> Sequence[Outgoing]:
        """The frame has come whole; what is sent because of it."""


class Swap:
    """Everybody sends all to all; made once for a length, used for any number of vectors."""

    def __init__(self, rank: int, size: int, count: int, wire: Format) -> None:
        self._others = tuple((rank + step) % size for step in range(1, size))
        self._rank, self._wire = rank, wire
        self._blocks = [Block(count, wire) for _ in range(size)]
        self._scratch: Floats = np.empty(count, np.float32)
        self._missing: set[int] = set()
        self._values: Floats = self._scratch

    def load(self, values: Floats) -> None:
        """The next vector: our part now, the sum when all have come."""
        self._values = values
        self._missing = set(self._others)

    def begin(self) -> Sequence[Outgoing]:
        own = self._blocks[self._rank]
        self._wire.encode(self._values, own.values)
        return [Outgoing(self._others, Kind.PART, 0, own.framed)]

    def lacks(self, rank: int) -> int:
        return 2 if rank in self._missing else 0

    def place(self, rank: int, kind: Kind, offset: int, length: int) -> memoryview | None:
        block = self._blocks[rank].payload
        fits = kind is Kind.PART and offset == 0 and length == len(block)
        return block if fits and rank in self._missing else None

    def arrived(self, rank: int, kind: Kind, offset: int) -> Sequence[Outgoing]:
        self._missing.discard(rank)
        if not self._missing:
            total(self._blocks, self._values, self._scratch, self._wire)
            self._wire.round(self._values)
        return ()


def total(blocks: Sequence[Block], out: Floats, scratch: Floats, wire: Format) -> None:
    """The sum of one block per rank, in their order."""
    wire.decode(blocks[0].values, out)
    with np.errstate(over="ignore", invalid="ignore"):  # infinities are the model's affair
        for block in blocks[1:]:
            if wire is Format.FLOAT32:
                out += block.values
            else:
                wire.decode(block.values, scratch[: len(out)])
                out += scratch[: len(out)]


class Scatter:
    """Each member sums its own range for all; made once for a length."""

    def __init__(self, rank: int, size: int, count: int, wire: Format) -> None:
        self._rank, self._size, self._wire = rank, size, wire
        self._others = tuple((rank + step) % size for step in range(1, size))
        self._segments = [segments(owner, size, count, wire) for owner in range(size)]
        """For each owner the [first, end) of its segments."""
        self._own = [[Block(end - first, wire) for first, end in parts] for parts in self._segments]
        """Our part of everybody's range; of an owner's sums once they come."""
        self._parts = [
            [Block(end - first, wire) for first, end in self._segments[rank]]
            if other != rank
            else self._own[rank]
            for other in range(size)
        ]
        """Everybody's part of our range."""
        self._sums = [Block(end - first, wire) for first, end in self._segments[rank]]
        self._scratch: Floats = np.empty(SEGMENT_BYTES // wire.value_bytes, np.float32)
        self._values: Floats = self._scratch
        self._next: dict[tuple[int, Kind], int] = {}
        """Which segment of each kind comes next from each member; they come in order."""

    def load(self, values: Floats) -> None:
        self._values = values
        self._next = {(rank, kind): 0 for rank in self._others for kind in (Kind.PART, Kind.SUM)}

    def begin(self) -> Sequence[Outgoing]:
        for parts, blocks in zip(self._segments, self._own, strict=True):
            for (first, end), block in zip(parts, blocks, strict=True):
                self._wire.encode(self._values[first:end], block.values)
        # By turns: the first segments of all owners before the second ones.
        deepest = max(len(parts) for parts in self._segments)
        return [
            Outgoing((owner,), Kind.PART, number, self._own[owner][number].framed)
            for number in range(deepest)
            for owner in self._others
            if number < len(self._own[owner])
        ]

    def lacks(self, rank: int) -> int:
        if self._next[rank, Kind.PART] < len(self._segments[self._rank]):
            return 2
        return int(self._next[rank, Kind.SUM] < len(self._segments[rank]))

    def place(self, rank: int, kind: Kind, offset: int, length: int) -> memoryview | None:
        if self._next.get((rank, kind)) != offset:
            return None
        blocks = self._parts[rank] if kind is Kind.PART else self._own[rank]
        if offset >= len(blocks) or length != len(blocks[offset].payload):
            return None
        return blocks[offset].payload

    def arrived(self, rank: int, kind: Kind, offset: int) -> Sequence[Outgoing]:
        self._next[rank, kind] = offset + 1
        if kind is Kind.SUM:
            first, end = self._segments[rank][offset]
            self._wire.decode(self._own[rank][offset].values, self._values[first:end])
            return ()
        if any(self._next[other, Kind.PART] <= offset for other in self._others):
            return ()
        return [self._sum(offset)]

    def _sum(self, number: int) -> Outgoing:
        first, end = self._segments[self._rank][number]
        out, block = self._values[first:end], self._sums[number]
        total([parts[number] for parts in self._parts], out, self._scratch, self._wire)
        self._wire.round(out)
        self._wire.encode(out, block.values)
        return Outgoing(self._others, Kind.SUM, number, block.framed)


def segments(owner: int, size: int, count: int, wire: Format) -> list[tuple[int, int]]:
    """The [first, end) of the segments of one owner's range of a vector of `count` values."""
    begin, end = count * owner // size, count * (owner + 1) // size
    step = SEGMENT_BYTES // wire.value_bytes
    return [(first, min(first + step, end)) for first in range(begin, end, step)]
