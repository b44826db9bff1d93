"""One link per neighbour: two long-lived streams that all sessions between the two share.

A *link* has two lanes: `STEP` for decode steps and control, `BULK` for prompts and replays, so that
a prompt of megabytes never delays somebody's next token. A stream per session was rejected:
go-libp2p allows 64 inbound streams per protocol and peer, and every new stream costs a
negotiation.

The side that dials names the link by 128 random bits and says `Hello` on both lanes; the other
answers on both. If two peers dial each other at the same moment, as the stages of a ring of two do,
two links exist: each side sends on the one that it got ready first, always, because a change of
link in mid-session would let frames overtake each other, and reads both. A peer that dials although
an older link to it exists has lost that one (it restarted, its network changed), so the old link
ends. A link that dies takes its sibling lane with it, and if it had carried anything for a session,
the neighbour counts as lost: what was under way on it will not come.

Life is judged by bytes: a watched neighbour (one that a session depends on) that has been silent
for `PING_AFTER_S` is pinged on each of its links, and answers where it was asked; a link that stays
silent for `silence_s` is lost. If we ourselves were held up (a machine that swaps, a long call),
that time is nobody's silence. Every pong measures the round trip.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from hexswarm.clock import Clock
from hexswarm.errors import PeerLost, RemoteProtocolError
from hexswarm.messages import PROTOCOL_VERSION, Hello, Message, Ping, Pong
from hexswarm.records import PeerId
from hexswarm.transports.base import Stream, Transport
from hexswarm.wire import Frame, FrameDecoder, pack

log = logging.getLogger(__name__)

STEP, BULK = 0, 1
PING_AFTER_S = 2.0
TICK_S = 0.5
HELLO_S = 10.0
"""Limit for both lanes to be open and greeted."""
READ_BYTES = 1 << 18
MAX_BACKLOG_BYTES = 256 << 20
"""A neighbour that lets this much pile up is lost: it reads slower than we compute."""
MAX_HALF_OPEN = 64
"""Incoming links of which one lane is here; a newer one takes the place of the oldest."""
MAX_HALF_OPEN_EACH = 4
"""The same, of one peer."""

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
        self.closed = False
        self.tasks: set[asyncio.Task[None]] = set()

    @property
    def whole(self) -> bool:
        return len(self.lanes) == 2

    def stalled(self, now: float) -> bool:
        return any(decoder.stalled(now) for decoder in self.decoders.values())

    def write(self, outgoing: Iterable[Outgoing], lane: int = STEP) -> int:
        """Send frames in one go; the bytes that wait now."""
        stream = self.lanes[lane]
        stream.write([part for message, payload in outgoing for part in pack(message, payload)])
        return stream.backlog

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
        self._ping_after_s = min(PING_AFTER_S, silence_s / 4)
        self._tick_s = min(TICK_S, silence_s / 8)
        self._links: dict[PeerId, list[Link]] = {}
        self._half_open: dict[tuple[PeerId, bytes], Link] = {}
        self._dialling: dict[PeerId, asyncio.Task[None]] = {}
        self._watched: Counter[PeerId] = Counter()
        self._pings: dict[int, float] = {}
        self._rtt_s: dict[PeerId, float] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        """The ticker, and what serves incoming lanes."""
        self._beat_s = clock.monotonic()
        self._closed = False

    async def start(self, *, listen: bool) -> None:
        if listen:
            await self._transport.listen(self._accept)
        self._beat_s = self._clock.monotonic()
        self._tasks.add(asyncio.create_task(self._tick()))

    async def close(self) -> None:
        """End all links; nobody is told that they are lost."""
        self._closed = True
        links = [link for links in self._links.values() for link in links]
        links += self._half_open.values()
        self._links.clear()
        self._half_open.clear()
        tasks = {*self._tasks, *self._dialling.values()}
        for link in links:
            link.close()
            tasks |= link.tasks
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

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
            task.add_done_callback(lambda done: self._dialled(peer, done))
        try:
            await asyncio.shield(task)
        except PeerLost:
            if not self.connected(peer):  # else it called us meanwhile
                raise

    def _dialled(self, peer: PeerId, task: asyncio.Task[None]) -> None:
        del self._dialling[peer]
        if not task.cancelled():
            task.exception()  # nobody may be left to take it: whoever waited was cancelled

    def send(self, peer: PeerId, outgoing: Sequence[Outgoing], lane: int = STEP) -> bool:
        """Write frames to `peer` in one go; False if there is no link (or it is choked)."""
        links = self._links.get(peer)
        if not links:
            return False
        link = links[0]
        link.used = True
        if link.write(outgoing, lane) > MAX_BACKLOG_BYTES:
            self._drop(link, "does not read what it is sent")
            return False
        return True

    def watch(self, peer: PeerId) -> None:
        """Depend on `peer`: notice within `silence_s` when it goes silent."""
        self._watched[peer] += 1
        for link in self._links.get(peer, ()):
            link.heard_s = max(link.heard_s, self._clock.monotonic() - self._ping_after_s)

    def unwatch(self, peer: PeerId) -> None:
        self._watched[peer] -= 1
        if self._watched[peer] <= 0:
            del self._watched[peer]

    # --- making links ---------------------------------------------------------------------

    def _hello(self, link: bytes, lane: int) -> list[bytes | memoryview]:
        return pack(Hello(PROTOCOL_VERSION, self._software, lane, link))

    async def _dial(self, peer: PeerId, addresses: tuple[str, ...]) -> None:
        link = Link(peer, os.urandom(16), self._clock.monotonic(), dialled=True)
        early: dict[int, list[Frame]] = {}
        try:
            async with asyncio.timeout(HELLO_S):
                for lane in (STEP, BULK):
                    stream = await self._transport.dial(peer, addresses)
                    link.lanes[lane], link.decoders[lane] = stream, FrameDecoder()
                    stream.write(self._hello(link.name, lane))
                for lane, stream in link.lanes.items():
                    hello, early[lane] = await self._greeting(stream, link.decoders[lane])
                    _check_version(hello)
        except TimeoutError as error:
            link.close()
            raise PeerLost(peer, None, "did not answer") from error
        except RemoteProtocolError as error:
            link.close()
            raise PeerLost(peer, None, f"speaks another protocol: {error}") from error
        except BaseException:
            link.close()
            raise
        self._join(link)
        for lane in link.lanes:
            task = asyncio.create_task(self._pump(link, lane, early[lane]))
            link.tasks.add(task)
            task.add_done_callback(link.tasks.discard)

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
        return hello, frames[1:]

    async def _accept(self, stream: Stream) -> None:
        """Serve one incoming lane until it ends."""
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self._serve(stream)
        except (TimeoutError, RemoteProtocolError, PeerLost) as error:
            log.debug("refused a stream of %s: %s", stream.remote[-8:], error)
        finally:
            self._tasks.discard(task)
            stream.close()

    async def _serve(self, stream: Stream) -> None:
        decoder = FrameDecoder()
        async with asyncio.timeout(HELLO_S):
            hello, early = await self._greeting(stream, decoder)
        if hello.version != PROTOCOL_VERSION:
            stream.write(self._hello(hello.link, hello.lane))  # so that it learns why
        _check_version(hello)
        key = (stream.remote, hello.link)
        link = self._half_open.get(key) or self._begin(key)
        if link is None or hello.lane in link.lanes:
            return
        link.lanes[hello.lane], link.decoders[hello.lane] = stream, decoder
        stream.write(self._hello(link.name, hello.lane))
        if link.whole:
            del self._half_open[key]
            self._join(link)
        try:
            await self._pump(link, hello.lane, early)
        finally:
            if self._half_open.get(key) is link:
                del self._half_open[key]

    def _begin(self, key: tuple[PeerId, bytes]) -> Link | None:
        """A half-open link; too many of one peer, or in all, make the oldest give way."""
        if self._closed:
            return None
        peer, name = key
        same = [other for other in self._half_open if other[0] == peer]
        if len(same) >= MAX_HALF_OPEN_EACH:
            self._half_open.pop(same[0]).close()
        elif len(self._half_open) >= MAX_HALF_OPEN:
            self._half_open.pop(next(iter(self._half_open))).close()
        link = self._half_open[key] = Link(peer, name, self._clock.monotonic(), dialled=False)
        return link

    def _join(self, link: Link) -> None:
        """Both lanes are there: use the link, and end those that it replaces."""
        now = self._clock.monotonic()
        link.since_s = link.heard_s = now
        for held in list(self._links.get(link.peer, ())):
            if held.dialled == link.dialled or now - held.since_s > HELLO_S:
                self._drop(held, "began anew")
        self._links.setdefault(link.peer, []).append(link)

    # --- reading --------------------------------------------------------------------------

    async def _pump(self, link: Link, lane: int, early: list[Frame]) -> None:
        how = "vanished"
        stream, decoder = link.lanes[lane], link.decoders[lane]
        try:
            self._take(link, early)
            while (data := await stream.read(READ_BYTES)) and not link.closed:
                link.heard_s = self._clock.monotonic()
                self._take(link, decoder.feed(data, link.heard_s))
        except RemoteProtocolError as error:
            how = f"broke the protocol: {error}"
        finally:
            self._drop(link, how)

    def _take(self, link: Link, frames: list[Frame]) -> None:
        rest = []
        for frame in frames:
            message = frame.message
            if isinstance(message, Hello) or not link.whole:
                raise RemoteProtocolError("frames out of place: a link begins with two greetings")
            if isinstance(message, Ping):
                link.write([(Pong(message.nonce), b"")])
            elif isinstance(message, Pong):
                self._measure(link.peer, message.nonce)
            else:
                rest.append(frame)
        if not rest:
            return
        link.used = True
        try:
            self._on_frames(link.peer, rest)
        except Exception:  # a mistake of ours: be loud, and leave no session half served
            log.exception("frames from %s could not be handled", link.peer[-8:])
            self._drop(link, "sent what could not be handled")

    def _measure(self, peer: PeerId, nonce: int) -> None:
        sent_s = self._pings.pop(nonce, None)
        if sent_s is not None:
            sample = self._clock.monotonic() - sent_s
            held = self._rtt_s.get(peer)
            self._rtt_s[peer] = sample if held is None else min(sample, 0.8 * held + 0.2 * sample)

    def _drop(self, link: Link, how: str) -> None:
        link.close()
        peer, links = link.peer, self._links.get(link.peer, [])
        if link not in links:
            return
        links.remove(link)
        if links and not link.used:
            return
        del self._links[peer]
        self._rtt_s.pop(peer, None)
        for other in links:
            other.close()
        try:
            self._on_lost(peer, how)
        except Exception:  # ours again; whoever dropped the link goes on
            log.exception("the loss of %s could not be handled", peer[-8:])

    # --- heartbeats -----------------------------------------------------------------------

    def ping(self, peer: PeerId) -> None:
        """Measure the round trip to a connected peer."""
        for link in self._links.get(peer, ())[:1]:
            self._ping(link)

    def _ping(self, link: Link) -> None:
        nonce = int.from_bytes(os.urandom(7), "big")
        self._pings[nonce] = self._clock.monotonic()
        while len(self._pings) > 4096:
            self._pings.pop(next(iter(self._pings)))
        link.write([(Ping(nonce), b"")])

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(self._tick_s)
            self._beat(self._clock.monotonic())

    def _beat(self, now: float) -> None:
        late_s = now - self._beat_s - self._tick_s
        self._beat_s = now
        for link in [link for links in self._links.values() for link in links]:
            if late_s > self._tick_s:
                link.heard_s = min(now, link.heard_s + late_s)  # we did not listen
            if link.stalled(now):
                self._drop(link, "takes too long for a frame")
            elif link.peer in self._watched:
                self._check(link, now - link.heard_s)
        for link in list(self._half_open.values()):
            if now - link.since_s > HELLO_S:
                link.close()

    def _check(self, link: Link, silent_s: float) -> None:
        if silent_s > self._silence_s:
            self._drop(link, f"has been silent for {silent_s:.0f} s")
        elif silent_s >= self._ping_after_s:
            self._ping(link)


def _check_version(hello: Hello) -> None:
    if hello.version != PROTOCOL_VERSION:
        raise RemoteProtocolError(f"protocol version {hello.version} instead of {PROTOCOL_VERSION}")
