"""Incoming streams before they are a link: greetings, half-open links, and their bounds.

The side that dials says `Hello` on both lanes and waits for both answers; here is the side that is
called. Whoever has not greeted may send one header of 100 bytes and nothing else; both lanes have
to be here within `HELLO_S`. How many streams may come is a question of rates (`hexswarm.quota`),
how many may *wait* is bounded here: a newer one takes the place of the oldest, of the same peer if
that one has many. So a crowd that never finishes greets nobody out for longer than it keeps coming.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass

from hexswarm.clock import Clock
from hexswarm.errors import PeerLost, RemoteProtocolError
from hexswarm.guests import GUEST
from hexswarm.link import Link
from hexswarm.messages import PROTOCOL_VERSION, Hello
from hexswarm.quota import Quotas
from hexswarm.records import PeerId
from hexswarm.transports.base import Stream
from hexswarm.waits import Waits
from hexswarm.wire import Frame, FrameDecoder, Limits, pack

HELLO_S = 10.0
"""Limit for both lanes to be open and greeted."""
GREETING = Limits(header_bytes=512, payload_bytes=0, deadline_s=HELLO_S, frames=2)
GREETING_READ_BYTES = 1 << 12
MAX_UNGREETED = 64
"""Incoming streams that have said nothing yet."""
MAX_UNGREETED_EACH = 8
"""The same, of one peer."""
MAX_HALF_OPEN = 64
"""Incoming links of which one lane is here."""
MAX_HALF_OPEN_EACH = 4
MAX_WAITING = 256
"""Streams of those that misbehaved, which wait (`hexswarm.waits`); further ones are closed."""
MAX_WAITING_EACH = 16


@dataclass(frozen=True, slots=True)
class Lane:
    """A lane that has greeted and was greeted, and what came right behind."""

    link: Link
    number: int
    early: list[Frame]


class Lobby:
    """All streams that came in and are not yet half of a whole link."""

    def __init__(self, clock: Clock, quotas: Quotas, software: str) -> None:
        self.half_open: dict[tuple[PeerId, bytes], Link] = {}
        self.waits = Waits()
        self._ungreeted: dict[Stream, None] = {}
        self._waiting: Counter[PeerId] = Counter()
        self._clock = clock
        self._quotas = quotas
        self._software = software

    async def receive(self, stream: Stream, *, partner: bool) -> Lane | None:
        """Greet one incoming stream; None if it is of no use. A `partner` needs no quota.

        Raises RemoteProtocolError, PeerLost or TimeoutError.
        """
        if not partner:
            await self._wait(stream)
        now = self._clock.monotonic()
        if not (partner or self._quotas.stream(stream.remote, stream.block, now)):
            raise RemoteProtocolError("too many streams")
        decoder = FrameDecoder(GREETING)
        self._enter(stream)
        try:
            async with asyncio.timeout(HELLO_S):
                said, early = await greeting(stream, decoder, self._clock)
        finally:
            self._ungreeted.pop(stream, None)
        key = (stream.remote, said.link)
        if said.version != PROTOCOL_VERSION:
            stream.write(hello(said.link, said.lane, self._software))  # so that it learns why
            return None
        link = self.half_open.get(key) or self._begin(key, stream.block)
        if said.lane in link.lanes:
            return None
        link.lanes[said.lane], link.decoders[said.lane] = stream, decoder
        decoder.limits = link.limits
        stream.write(hello(link.name, said.lane, self._software))
        if link.whole:
            self.end(link)
        return Lane(link, said.lane, early)

    async def _wait(self, stream: Stream) -> None:
        """Let whoever misbehaved lately wait, without a word. Raises PeerLost: too many do."""
        peer, now = stream.remote, self._clock.monotonic()
        wait_s = self.waits.wait_s(peer, stream.block, now)
        if not wait_s:
            return
        if self._waiting[peer] >= MAX_WAITING_EACH or self._waiting.total() >= MAX_WAITING:
            raise PeerLost(peer, None, "has to wait")
        self._waiting[peer] += 1
        stream.pause()
        try:
            await asyncio.sleep(wait_s)
        finally:
            self._waiting[peer] -= 1
            if not self._waiting[peer]:
                del self._waiting[peer]

    def end(self, link: Link) -> None:
        """The link is whole, or over."""
        key = (link.peer, link.name)
        if self.half_open.get(key) is link:
            del self.half_open[key]

    def beat(self, now: float) -> None:
        """Close what is half open for too long; whoever serves it then ends it."""
        for link in list(self.half_open.values()):
            if now - link.since_s > HELLO_S:
                link.close()

    def _enter(self, stream: Stream) -> None:
        same = [other for other in self._ungreeted if other.remote == stream.remote]
        if len(same) >= MAX_UNGREETED_EACH:
            self.waits.offend(stream.remote, stream.block, self._clock.monotonic())
            self._turn_out(same[0])
        elif len(self._ungreeted) >= MAX_UNGREETED:
            self._turn_out(next(iter(self._ungreeted)))
        self._ungreeted[stream] = None

    def _turn_out(self, stream: Stream) -> None:
        del self._ungreeted[stream]
        stream.close()

    def _begin(self, key: tuple[PeerId, bytes], block: str) -> Link:
        peer, name = key
        same = [other for other in self.half_open if other[0] == peer]
        if len(same) >= MAX_HALF_OPEN_EACH:
            self.waits.offend(peer, block, self._clock.monotonic())
            self.half_open.pop(same[0]).close()
        elif len(self.half_open) >= MAX_HALF_OPEN:
            self.half_open.pop(next(iter(self.half_open))).close()
        link = Link(peer, name, self._clock.monotonic(), dialled=False, block=block)
        link.become(GUEST)
        self.half_open[key] = link
        return link


def hello(link: bytes, lane: int, software: str) -> list[bytes | memoryview]:
    return pack(Hello(PROTOCOL_VERSION, software, lane, link))


async def greeting(
    stream: Stream, decoder: FrameDecoder, clock: Clock
) -> tuple[Hello, list[Frame]]:
    """The other side's Hello, and frames that came right behind it."""
    frames: list[Frame] = []
    while not frames:
        data = await stream.read(GREETING_READ_BYTES)
        if not data:
            raise PeerLost(stream.remote, None, "hung up")
        frames = decoder.feed(data, clock.monotonic())
    said = frames[0].message
    if not isinstance(said, Hello):
        raise RemoteProtocolError("no greeting")
    return said, frames[1:]
