"""What rank 0 of a group tells the other ranks, as messages; how they go over a socket.

A message is a length and a msgpack list `[kind, field, ...]`; kinds and fields are in `Follower` of
`hexswarm.peer.following`, their only reader. Processes of one machine trust each other: rank 0
started the others.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import msgpack

from hexswarm.errors import RemoteProtocolError
from hexswarm.kernels.ragged import Extent
from hexswarm.peer.cuts import Part
from hexswarm.peer.shared_sums import TERM, TIMEOUT_S
from hexswarm.records import Span

MOST_BYTES = 1 << 26
"""Of a message: token ids and block tables of a large batch."""
_LENGTH = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class Plan:
    """What all ranks of a group load, and how they add up."""

    model: str
    """Path of a folder or a GGUF."""
    home: str
    """Where hashes are remembered."""
    digest: str
    first: int
    end: int
    """Of the span."""
    dtype: str
    threads: int
    """Of each rank but the first, whose owner decides."""
    quant: str = "none"
    devices: tuple[str, ...] = ()
    """Of each rank; none: all on the CPU."""
    backend: str = "auto"
    """Of the shards, the same at all ranks: they must sum alike."""
    sums: str = "shared"
    """"shared" memory, "nccl" or "gloo"."""
    even: bool = True
    """Whether all ranks can hold a step in one graph."""
    meeting: str = ""
    """File by which ranks with process groups find each other."""
    generation: int = 0
    links: int = 0
    """So often has rank 0 linked its GPU's memory before (`hexswarm.peer.rendezvous`)."""
    """How many groups rank 0 has led before."""
    term: int = TERM
    timeout_s: float = TIMEOUT_S

    def device(self, rank: int) -> str:
        return self.devices[rank] if self.devices else "cpu"

    @property
    def span(self) -> Span:
        return Span(self.first, self.end)


def send(door: socket.socket, message: Sequence[Any]) -> None:
    """Send one message; OSError if the other end is gone."""
    packed: bytes = msgpack.packb(message)
    door.sendall(_LENGTH.pack(len(packed)) + packed)


def receive(door: socket.socket) -> list[Any] | None:
    """The next message, None at the end of the stream; TimeoutError as the socket is set."""
    head = _exactly(door, _LENGTH.size)
    if head is None:
        return None
    (length,) = _LENGTH.unpack(head)
    body = _exactly(door, length) if length <= MOST_BYTES else None
    if body is None:
        raise RemoteProtocolError("a command between ranks is cut off or too long")
    message: list[Any] = msgpack.unpackb(body)
    return message


def _exactly(door: socket.socket, count: int) -> bytes | None:
    """`count` bytes, None if the stream ends before."""
    found = bytearray()
    while len(found) < count:
        piece = door.recv(count - len(found))
        if not piece:
            return None
        found += piece
    return bytes(found)


def pack_plan(plan: Plan, part: Part) -> list[Any]:
    """The first message."""
    ranges = [getattr(part, field.name) for field in fields(part)[2:]]
    cells = [[one.start, one.stop] for one in ranges]
    return ["load", asdict(plan), part.rank, part.size, cells]


def unpack_plan(message: Sequence[Any]) -> tuple[Plan, Part]:
    _, plan, rank, size, cells = message
    plan["devices"] = tuple(plan["devices"])
    return Plan(**plan), Part(rank, size, *(range(*cell) for cell in cells))


def pack_extents(extents: Sequence[Extent]) -> list[Any]:
    return [[one.position, one.count, list(one.blocks), one.block_size] for one in extents]


def unpack_extents(packed: Sequence[Any]) -> list[Extent]:
    return [
        Extent(position, count, tuple(blocks), size) for position, count, blocks, size in packed
    ]
