"""The stream contract: what the rest of the swarm asks of a network.

A transport gives ordered, reliable, encrypted byte streams between peers whose ids it has
authenticated. That is all; framing, lanes, pings and sessions are built above it, so that the same
code runs over libp2p (`libp2p.py`) and over an in-memory network on a virtual clock (`memory.py`).
The streams of `direct.py` are none of these: collectives wait for them in a thread, not in a loop.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

from hexswarm.records import PeerId


class Stream(Protocol):
    """One bidirectional byte stream to an authenticated peer."""

    @property
    def remote(self) -> PeerId:
        """Who is at the other end."""

    @property
    def block(self) -> str:
        """The block of addresses that it calls from; "" if it has none of its own, or is unknown.

        See `hexswarm.quota.address_block`.
        """

    async def read(self, limit: int) -> bytes:
        """At least one and at most `limit` bytes; b"" when the other end has closed."""

    def write(self, buffers: Sequence[bytes | memoryview]) -> None:
        """Queue bytes for sending, at once and in order; never blocks."""

    @property
    def backlog(self) -> int:
        """Bytes queued and not yet taken by the network."""

    async def drain(self) -> None:
        """Wait until the backlog is small."""

    def pause(self) -> None:
        """Take no more of what the other end sends, until somebody reads."""

    def close(self) -> None:
        """Close both directions; what was written is sent first, if the network still can."""


Handler = Callable[[Stream], Awaitable[None]]


class Transport(Protocol):
    """Makes and accepts streams."""

    @property
    def local(self) -> PeerId:
        """Our own authenticated id."""

    async def dial(self, peer: PeerId, addresses: Sequence[str]) -> Stream:
        """Open a stream to `peer`. Raises PeerLost if it cannot be reached."""

    async def listen(self, handler: Handler) -> None:
        """From now on run `handler` for each incoming stream."""

    def check(self) -> None:
        """Raise NetworkError if it cannot carry anything any more, to anybody."""

    def hang_up(self, peer: PeerId) -> None:
        """End the connection to `peer` with every stream on it, soon; it may call again.

        `Stream.close` closes our end: what the other end costs us ends when that one likes.
        """

    async def close(self) -> None:
        """Close everything."""
