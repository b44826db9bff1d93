"""One link: both lanes to one neighbour, and what is known of its life (see `hexswarm.links`)."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable

from hexswarm.messages import Message
from hexswarm.records import PeerId
from hexswarm.transports.base import Stream
from hexswarm.wire import FULL, FrameDecoder, Limits, pack

STEP, BULK = 0, 1

Outgoing = tuple[Message, bytes | memoryview]


class Link:
    """Both lanes to one neighbour, and what is known of its life."""

    def __init__(
        self, peer: PeerId, name: bytes, now: float, *, dialled: bool, block: str = ""
    ) -> None:
        self.peer = peer
        self.name = name
        self.dialled = dialled
        """By us."""
        self.block = block
        """Of addresses, to which the peer's belongs; "" for none (`hexswarm.quota`)."""
        self.limits: Limits = FULL
        """What the peer may send, by its role (`hexswarm.guests`)."""
        self.partner_s = -math.inf
        """When we last depended on it for a session, as far as is known."""
        self.lanes: dict[int, Stream] = {}
        self.decoders: dict[int, FrameDecoder] = {}
        self.since_s = now
        """When it was begun, later: when it was ready."""
        self.heard_s = now
        """When something came last, or when its life began to matter: what its end is judged by."""
        self.came_s = now
        """When something came last."""
        self.used = False
        """It carried something for a session."""
        self.used_s = -math.inf
        """When it last did."""
        self.closed = False
        self.tasks: set[asyncio.Task[None]] = set()

    @property
    def whole(self) -> bool:
        return len(self.lanes) == 2

    @property
    def useful_s(self) -> float:
        """When it was last of use; being here counts once."""
        return max(self.since_s, self.partner_s)

    @property
    def unfinished(self) -> int:
        """Bytes held of frames that are not complete."""
        return sum(decoder.held for decoder in self.decoders.values())

    @property
    def backlog(self) -> int:
        """Bytes that it has not taken from us."""
        return sum(stream.backlog for stream in self.lanes.values())

    def become(self, limits: Limits) -> None:
        """From now on the peer may send this much."""
        self.limits = limits
        for decoder in self.decoders.values():
            decoder.limits = limits

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
