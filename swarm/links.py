"""One link per neighbour: two long-lived streams that all sessions between the two share.

A *link* has two lanes: `STEP` for decode steps and control, `BULK` for prompts and replays, so that
a prompt of megabytes never delays somebody's next token. A stream per session was rejected:
go-libp2p allows 64 inbound streams per protocol and peer, and every new stream costs a
negotiation.

The side that dials names the link by 128 random bits and says `Hello` on both lanes; the other
answers on both. If two peers dial each other at the same moment two links exist; each side sends
on the one it got ready last and reads both. A link that dies takes its sibling lane with it.

Life is judged by bytes: a watched neighbour (one that a session depends on) that has been silent
for `PING_AFTER_S` is pinged, and one that stays silent for `silence_s` is lost. Every pong measures
the round trip.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections import Counter
from collections.abc import Callable, Sequence

from hexswarm.clock import Clock
from hexswarm.errors import LocalProtocolError, PeerLost, RemoteProtocolError
from hexswarm.messages import PROTOCOL_VERSION, Hello, Message, Ping, Pong
from hexswarm.records import PeerId
from hexswarm.transports.base import Stream, Transport
from hexswarm.wire import Frame, FrameDecoder, pack

log = logging.getLogger(__name__)

STEP, BULK = 0, 1
PING_AFTER_S = 2.0
TICK_S = 0.5
HELLO_S = 10.0
READ_BYTES = 1 << 18
MAX_BACKLOG_BYTES = 256 << 20
"""A neighbour that lets this much pile up is lost: it reads slower than we compute."""
MAX_HALF_OPEN = 64

Outgoing = tuple[Message, bytes | memoryview]


class Link:
    """Both lanes to one neighbour, and what is known of its life."""

    def __init__(self, peer: PeerId, name: bytes) -> None:
        self.peer = peer
        self.name = name
        self.lanes: dict[int, Stream] = {}
        self.heard_s = 0.0
        self.closed = False
        self.tasks: set[asyncio.Task[None]] = set()

    def close(self) -> None:
        self.closed = True
        for stream in self.lanes.values():
            stream.close()


class Links:
    """All links of a process.

    `on_frames(peer, frames)` gets what arrived, as many frames at once as one read gave (a convoy
    of steps stays together); `on_lost(peer, how)` is told once when the last link to a peer ends.
    Both are plain functions on the event loop.
    """

    def __init__(
        self,
        transport: Transport,
        clock: Clock,
        on_frames: Callable[[PeerId, list[Frame]], None],
        on_lost: Callable[[PeerId, str], None],
        *,
        software: str = "",
        silence_s: float = 8.0,
    ) -> None:
        self._transport = transport
        self._clock = clock
        self._on_frames = on_frames
        self._on_lost = on_lost
        self._software = software
        self._silence_s = silence_s
        self._links: dict[PeerId, list[Link]] = {}
        self._half_open: dict[tuple[PeerId, bytes], Link] = {}
        self._dialling: dict[PeerId, asyncio.Task[None]] = {}
        self._watched: Counter[PeerId] = Counter()
        self._pings: dict[int, float] = {}
        self._rtt_s: dict[PeerId, float] = {}
        self._ticker: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self, *, listen: bool) -> None:
        if listen:
            await self._transport.listen(self._accept)
        self._ticker = asyncio.create_task(self._tick())

    async def close(self) -> None:
        if self._ticker is not None:
            self._ticker.cancel()
        for links in self._links.values():
            for link in links:
                link.close()
        tasks = [*self._tasks, *self._dialling.values()]
        tasks += [task for links in self._links.values() for link in links for task in link.tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._links.clear()

    def connected(self, peer: PeerId) -> bool:
        return bool(self._links.get(peer))

    def peers(self) -> list[PeerId]:
        return list(self._links)

    @property
    def rtts(self) -> dict[PeerId, float]:
        """Smoothed round-trip seconds to the neighbours that were measured."""
        return dict(self._rtt_s)

    async def connect(self, peer: PeerId, addresses: Sequence[str]) -> None:
        """Have a link to `peer`, an existing one if possible. Raises PeerLost."""
        if self.connected(peer):
            return
        task = self._dialling.get(peer)
        if task is None:
            task = asyncio.create_task(self._dial(peer, tuple(addresses)))
            self._dialling[peer] = task
            task.add_done_callback(lambda _: self._dialling.pop(peer, None))
        await asyncio.shield(task)

    def send(self, peer: PeerId, outgoing: Sequence[Outgoing], lane: int = STEP) -> bool:
        """Write frames to `peer` in one go; False if there is no link (or it is choked)."""
        links = self._links.get(peer)
        if not links:
            return False
        stream = links[-1].lanes[lane]
        buffers = [part for message, payload in outgoing for part in pack(message, payload)]
        stream.write(buffers)
        if stream.backlog > MAX_BACKLOG_BYTES:
            self._drop(links[-1], "does not read what it is sent")
            return False
        return True

    def watch(self, peer: PeerId) -> None:
        """Depend on `peer`: notice within `silence_s` when it goes silent."""
        self._watched[peer] += 1
        for link in self._links.get(peer, ()):
            link.heard_s = max(link.heard_s, self._clock.monotonic() - PING_AFTER_S)

    def unwatch(self, peer: PeerId) -> None:
        self._watched[peer] -= 1
        if self._watched[peer] <= 0:
            del self._watched[peer]

    # --- making links ---------------------------------------------------------------------

    def _hello(self, link: Link, lane: int) -> list[bytes | memoryview]:
        return pack(Hello(PROTOCOL_VERSION, self._software, lane, link.name))

    async def _dial(self, peer: PeerId, addresses: tuple[str, ...]) -> None:
        link = Link(peer, os.urandom(16))
        try:
            async with asyncio.timeout(HELLO_S):
                for lane in (STEP, BULK):
                    stream = await self._transport.dial(peer, addresses)
                    link.lanes[lane] = stream
                    stream.write(self._hello(link, lane))
                decoders = [FrameDecoder(), FrameDecoder()]
                early = [await self._greeting(link.lanes[n], decoders[n]) for n in (STEP, BULK)]
        except TimeoutError as error:
            link.close()
            raise PeerLost(peer, None, "did not answer") from error
        except RemoteProtocolError as error:
            link.close()
            raise PeerLost(peer, None, f"speaks another protocol: {error}") from error
        except BaseException:
            link.close()
            raise
        self._ready(link, decoders, [frames for _, frames in early])

    async def _greeting(self, stream: Stream, decoder: FrameDecoder) -> tuple[Hello, list[Frame]]:
        """The other side's Hello, and frames that came right behind it."""
        frames: list[Frame] = []
        while not frames:
            data = await stream.read(READ_BYTES)
            if not data:
                raise PeerLost(stream.remote, None, "hung up")
            frames = decoder.feed(data, self._clock.monotonic())
        hello = frames[0].message
        if not isinstance(hello, Hello):
            raise RemoteProtocolError("no greeting")
        if hello.version != PROTOCOL_VERSION:
            raise RemoteProtocolError(
                f"protocol version {hello.version} instead of {PROTOCOL_VERSION}"
            )
        return hello, frames[1:]

    async def _accept(self, stream: Stream) -> None:
        """Serve one incoming lane until it ends."""
        decoder = FrameDecoder()
        try:
            async with asyncio.timeout(HELLO_S):
                hello, early = await self._greeting(stream, decoder)
        except (TimeoutError, RemoteProtocolError, PeerLost) as error:
            log.debug("refused a stream of %s: %s", stream.remote[-8:], error)
            stream.close()
            return
        key = (stream.remote, hello.link)
        link = self._half_open.get(key) or Link(stream.remote, hello.link)
        if hello.lane in link.lanes or len(self._half_open) >= MAX_HALF_OPEN:
            stream.close()
            return
        link.lanes[hello.lane] = stream
        stream.write(self._hello(link, hello.lane))
        if len(link.lanes) == 1:
            self._half_open[key] = link
        else:
            self._half_open.pop(key, None)
            self._links.setdefault(link.peer, []).append(link)
            link.heard_s = self._clock.monotonic()
        try:
            await self._pump(link, hello.lane, decoder, early)
        finally:
            self._half_open.pop(key, None)

    def _ready(
        self, link: Link, decoders: Sequence[FrameDecoder], early: Sequence[list[Frame]]
    ) -> None:
        link.heard_s = self._clock.monotonic()
        self._links.setdefault(link.peer, []).append(link)
        for lane in (STEP, BULK):
            task = asyncio.create_task(self._pump(link, lane, decoders[lane], early[lane]))
            link.tasks.add(task)
            task.add_done_callback(link.tasks.discard)

    # --- reading --------------------------------------------------------------------------

    async def _pump(
        self, link: Link, lane: int, decoder: FrameDecoder, early: list[Frame]
    ) -> None:
        how = "vanished"
        stream = link.lanes[lane]
        try:
            self._take(link, early)
            while data := await stream.read(READ_BYTES):
                now = self._clock.monotonic()
                link.heard_s = now
                self._take(link, decoder.feed(data, now))
                if decoder.stalled(now):
                    raise RemoteProtocolError("a frame took too long")
        except RemoteProtocolError as error:
            how = f"broke the protocol: {error}"
        finally:
            self._drop(link, how)

    def _take(self, link: Link, frames: list[Frame]) -> None:
        rest = []
        for frame in frames:
            message = frame.message
            if isinstance(message, Ping):
                self.send(link.peer, [(Pong(message.nonce), b"")])
            elif isinstance(message, Pong):
                self._measure(link.peer, message.nonce)
            elif isinstance(message, Hello):
                raise RemoteProtocolError("a second greeting")
            else:
                rest.append(frame)
        if rest:
            self._on_frames(link.peer, rest)

    def _measure(self, peer: PeerId, nonce: int) -> None:
        sent_s = self._pings.pop(nonce, None)
        if sent_s is not None:
            sample = self._clock.monotonic() - sent_s
            held = self._rtt_s.get(peer)
            self._rtt_s[peer] = sample if held is None else min(sample, 0.8 * held + 0.2 * sample)

    def _drop(self, link: Link, how: str) -> None:
        link.close()
        links = self._links.get(link.peer, [])
        if link not in links:
            return
        links.remove(link)
        if not links:
            del self._links[link.peer]
            self._rtt_s.pop(link.peer, None)
            self._on_lost(link.peer, how)

    # --- heartbeats -----------------------------------------------------------------------

    def ping(self, peer: PeerId) -> None:
        """Measure the round trip to a connected peer."""
        nonce = int.from_bytes(os.urandom(7), "big")
        self._pings[nonce] = self._clock.monotonic()
        while len(self._pings) > 4096:
            self._pings.pop(next(iter(self._pings)))
        self.send(peer, [(Ping(nonce), b"")])

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            with contextlib.suppress(LocalProtocolError):
                self._beat(self._clock.monotonic())

    def _beat(self, now: float) -> None:
        for peer in list(self._watched):
            for link in list(self._links.get(peer, ())):
                silent_s = now - link.heard_s
                if silent_s > self._silence_s:
                    self._drop(link, f"has been silent for {silent_s:.0f} s")
                elif silent_s >= PING_AFTER_S:
                    self.ping(peer)
