"""One link: both lanes to one neighbour, and what is known of its life (see `hexswarm.links`)."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable

from hexswarm.messages import Message
from hexswarm.records import PeerId
from hexswarm.transports.base import Stream
from hexswarm.wire import FrameDecoder, pack

STEP, BULK = 0, 1

Outgoing = tuple[Message, bytes | memoryview]


class Link:
    """Both lanes to one neighbour, and what is known of its life."""

    def __init__(self, peer: PeerId, name: bytes, now: float, *, dialled: bool) -> None:
        self.peer = peer
        self.name = name
        self.dialled = dialled
        """By us."""
        self.lanes: dict[int, Stream] = {}
        self.decoders: dict[int, FrameDecoder] = {}
        self.since_s = now
        """When it was begun, later: when it was ready."""
        self.heard_s = now
        self.used = False
        """It carried something for a session."""
        self.used_s = -math.inf
        """When it last did."""
        self.closed = False
        self.tasks: set[asyncio.Task[None]] = set()

    @property
    def whole(self) -> bool:
        return len(self.lanes) == 2

    def stalled(self, now: float) -> bool:
        return any(decoder.stalled(now) for decoder in self.decoders.values())

    def use(self, now: float) -> None:
        self.used, self.used_s = True, now

    def write(self, outgoing: Iterable[Outgoing], lane: int = STEP) -> int:
        """Send frames in one go; the bytes that wait now."""
        stream = self.lanes[lane]
        stream.write([part for message, payload in outgoing for part in pack(message, payload)])
        return stream.backlog

    def close(self) -> None:
        self.closed = True
        for stream in self.lanes.values():
            stream.close()
