"""The collectives of a group that copy instead of summing: pure, no sockets.

The leader tells all others what the next step is (`Say`, `Hear`), and members lay what each has
computed side by side (`Gather`): a vocabulary that is cut among them. See `hexswarm.peer.reduction`
for what an operation is. How long a message is says its header; what a member of the group may make
another one allocate is bounded.
"""

from __future__ import annotations

from collections.abc import Sequence

from hexswarm.peer.reduction import HEADER_BYTES, Kind, Outgoing

MOST_CAST_BYTES = 64 << 20


def _framed(data: bytes | memoryview) -> memoryview:
    return memoryview(bytearray(bytes(HEADER_BYTES)) + data)


class Say:
    """The leader's side of a broadcast."""

    def __init__(self, size: int, data: bytes | memoryview) -> None:
        self._size = size
        self._framed = _framed(data)

    def begin(self) -> Sequence[Outgoing]:
        return [Outgoing(tuple(range(1, self._size)), Kind.CAST, 0, self._framed)]

    def lacks(self, rank: int) -> int:
        return 0

    def place(self, rank: int, kind: Kind, offset: int, length: int) -> memoryview | None:
        return None

    def arrived(self, rank: int, kind: Kind, offset: int) -> Sequence[Outgoing]:
        raise AssertionError("nothing is placed")


class Hear:
    """A follower's side: what rank 0 has to say, of any length up to MOST_CAST_BYTES."""

    def __init__(self) -> None:
        self.data: memoryview | None = None
        self._whole = False

    def begin(self) -> Sequence[Outgoing]:
        return ()

    def lacks(self, rank: int) -> int:
        return 2 if rank == 0 and not self._whole else 0

    def place(self, rank: int, kind: Kind, offset: int, length: int) -> memoryview | None:
        fits = kind is Kind.CAST and length <= MOST_CAST_BYTES
        if rank or not fits or self.data is not None:
            return None
        self.data = memoryview(bytearray(length))
        return self.data

    def arrived(self, rank: int, kind: Kind, offset: int) -> Sequence[Outgoing]:
        self._whole = True
        return ()


class Gather:
    """Everybody's bytes to everybody; the lengths may differ."""

    def __init__(self, rank: int, size: int, own: memoryview, most_bytes: int) -> None:
        """`most_bytes` is the longest that one of the others may have."""
        self._others = tuple((rank + step) % size for step in range(1, size))
        self._framed, self._most_bytes = _framed(own), most_bytes
        self._missing = set(self._others)
        self.parts: list[memoryview] = [memoryview(b"")] * size
        self.parts[rank] = own

    def begin(self) -> Sequence[Outgoing]:
        return [Outgoing(self._others, Kind.PART, 0, self._framed)]

    def lacks(self, rank: int) -> int:
        return 2 if rank in self._missing else 0

    def place(self, rank: int, kind: Kind, offset: int, length: int) -> memoryview | None:
        fits = kind is Kind.PART and offset == 0 and length <= self._most_bytes
        if not fits or rank not in self._missing:
            return None
        self.parts[rank] = memoryview(bytearray(length))
        return self.parts[rank]

    def arrived(self, rank: int, kind: Kind, offset: int) -> Sequence[Outgoing]:
        self._missing.discard(rank)
        return ()
