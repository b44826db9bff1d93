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
that time is nobody's silence. What pings and bulk frames tell of the way, `hexswarm.measuring`
keeps: round trip, jitter and bandwidth to every neighbour (`Links.ways`). How incoming streams
become links is `hexswarm.lobby`'s; what neighbours may hold and how much they may say depends on
whether they take part in a session (`hexswarm.guests`, `hexswarm.quota`).
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from hexswarm.clock import Clock
from hexswarm.errors import PeerLost, RemoteProtocolError
from hexswarm.guests import (
    GRACE_S,
    GUEST,
    GUEST_BACKLOG_BYTES,
    PARTNER,
    SMALL_BYTES,
    chokes,
    gives_way,
    hoards,
)
from hexswarm.link import BULK as BULK
from hexswarm.link import STEP as STEP
from hexswarm.link import Link
from hexswarm.link import Outgoing as Outgoing
from hexswarm.lobby import HELLO_S, Lobby, greeting, hello
from hexswarm.measuring import KINDS, MEASURE_S, SAMPLES, Measuring
from hexswarm.messages import PROTOCOL_VERSION, Hello, Hidden, Logits, Message, Token, Tokens
from hexswarm.meter import Inflow
from hexswarm.quota import Quotas
from hexswarm.records import Link as Way
from hexswarm.records import PeerId
from hexswarm.transports.base import Stream, Transport
from hexswarm.wire import Frame, FrameDecoder

log = logging.getLogger(__name__)

PING_AFTER_S = 2.0
TICK_S = 0.5
READ_BYTES = 1 << 18
MAX_DIALLING = 256
"""Ways to others that are being opened: strangers name them, too."""
FLOW = frozenset((Tokens, Hidden, Token, Logits))
"""What sessions consist of; everything else is control, and counted."""


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
        self._quotas = Quotas()
        self._lobby = Lobby(clock, self._quotas, software)
        self._dialling: dict[PeerId, asyncio.Task[None]] = {}
        self._watched: Counter[PeerId] = Counter()
        self._measuring = Measuring(self, clock)
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
        links += self._lobby.half_open.values()
        self._links.clear()
        self._lobby.half_open.clear()
        tasks = {*self._tasks, *self._dialling.values(), *self._measuring.close()}
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

    async def connect(self, peer: PeerId, addresses: Sequence[str]) -> None:
        """Have a link to `peer`, an existing one if possible. Raises PeerLost."""
        self._measuring.wanted(peer)
        await self.reach(peer, addresses)

    async def reach(self, peer: PeerId, addresses: Sequence[str]) -> None:
        """The same for measuring alone: the link may end when nobody measures any more."""
        if self.connected(peer):
            return
        if self._closed:  # who has not heard of it yet would make a link that nobody ends
            raise PeerLost(peer, None, "is not dialled: the links were closed")
        task = self._dialling.get(peer)
        if task is None:
            if len(self._dialling) >= MAX_DIALLING:
                raise PeerLost(peer, None, "is not dialled: too many others are")
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
        link.use(self._clock.monotonic())
        if lane == BULK:
            self._measuring.bulk_moved()
        return self._write(link, outgoing, lane)

    def _write(self, link: Link, outgoing: Sequence[Outgoing], lane: int = STEP) -> bool:
        """False if the link does not take it."""
        if link.write(outgoing, lane) <= GUEST_BACKLOG_BYTES:
            return True
        if slowest := chokes(link, self._all()):
            self._drop(slowest, "does not read what it is sent")
        return slowest is not link

    def watch(self, peer: PeerId) -> None:
        """Depend on `peer`: notice within `silence_s` when it goes silent."""
        self._watched[peer] += 1
        now = self._clock.monotonic()
        for link in self._links.get(peer, ()):
            link.heard_s = max(link.heard_s, now - self._ping_after_s)
            if link.limits is not PARTNER:
                link.become(PARTNER)

    def unwatch(self, peer: PeerId) -> None:
        self._watched[peer] -= 1
        if self._watched[peer] <= 0:
            del self._watched[peer]
            for link in self._links.get(peer, ()):
                link.partner_s = self._clock.monotonic()

    # --- measuring ------------------------------------------------------------------------

    @property
    def ways(self) -> dict[PeerId, Way]:
        """What was measured: of neighbours, and for ten minutes of those that were."""
        return self._measuring.ways()

    @property
    def rtts(self) -> dict[PeerId, float]:
        """Round-trip seconds to the neighbours that were measured."""
        return {peer: way.rtt_s for peer, way in self.ways.items() if self.connected(peer)}

    @property
    def up_bytes_per_s(self) -> float | None:
        """Fastest that a neighbour lately received from us; None if nobody told."""
        return self._measuring.up_bytes_per_s()

    @property
    def down_bytes_per_s(self) -> float | None:
        """Fastest that we lately received from a neighbour; None if not measured."""
        return self._measuring.down_bytes_per_s()

    def used_within(self, seconds: float) -> list[PeerId]:
        """Neighbours with which a session had to do in the last `seconds`."""
        since_s = self._clock.monotonic() - seconds
        return [peer for peer in self._links if self.idle_since_s(peer) >= since_s]

    def ping(self, peer: PeerId) -> None:
        """Measure the round trip to a connected peer once, and wait for nothing."""
        for link in self._links.get(peer, ())[:1]:
            self._ping(link)

    async def measure(
        self,
        peer: PeerId,
        addresses: Sequence[str],
        samples: int = SAMPLES,
        within_s: float = MEASURE_S,
    ) -> Way | None:
        """The way to `peer`, measured now; None if it does not answer in time."""
        return await self._measuring.measure(peer, addresses, samples, within_s)

    async def measure_all(
        self,
        peers: Iterable[tuple[PeerId, Sequence[str]]],
        samples: int = SAMPLES,
        within_s: float = MEASURE_S,
    ) -> dict[PeerId, Way]:
        """The ways to those of `peers` that answered in time, measured at the same time."""
        return await self._measuring.measure_all(peers, samples, within_s)

    async def ask(self, via: PeerId, peer: PeerId, addresses: Sequence[str]) -> Way | None:
        """The way from the neighbour `via` to `peer`, as it measures it now.

        None if there is no link to `via`, or it does not answer, or cannot reach `peer`, or has
        measured too much for us lately.
        """
        return await self._measuring.ask(via, peer, addresses)

    def probe(self, candidates: Iterable[PeerId]) -> PeerId | None:
        """Find out how fast bytes come in at one of the connected `candidates`.

        Call it often: it chooses whose turn it is, mostly nobody's, and returns who was chosen.
        """
        connected = (peer for peer in candidates if self.connected(peer))
        return self._measuring.probe(connected, BULK)

    def tell(self, peer: PeerId, message: Message, payload: bytes = b"", lane: int = STEP) -> bool:
        """Send something that belongs to no session; False if there is no link."""
        for link in self._links.get(peer, ())[:1]:
            return self._write(link, [(message, payload)], lane)
        return False

    def silent_s(self, peer: PeerId, now: float) -> float:
        """Seconds until `now` since anything came from `peer`; inf without a link. Unlike `heard_s`
        this knows nothing of when somebody began to listen, or was held up."""
        return min((now - link.came_s for link in self._links.get(peer, ())), default=math.inf)

    def missed_s(self, peer: PeerId, now: float) -> float:
        """Seconds until `now` in which we listened to `peer` and heard nothing; inf without a
        link. A loop that is held up by a crowd of sessions has heard nobody, and misses nobody."""
        return min((now - link.heard_s for link in self._links.get(peer, ())), default=math.inf)

    def unanswered_s(self, peer: PeerId, now: float) -> float:
        """Seconds until `now` in which `peer` has answered no ping, whatever else came from it."""
        return self._measuring.unanswered_s(peer, now)

    def idle_since_s(self, peer: PeerId) -> float:
        """When a session last had to do with `peer`, -inf for never."""
        return max((link.used_s for link in self._links.get(peer, ())), default=-math.inf)

    def let_go(self, peer: PeerId) -> bool:
        """End the way to `peer` if no session ever used it and nobody depends on it."""
        links = self._links.get(peer, [])
        if peer in self._watched or any(link.used for link in links):
            return False
        for link in list(links):
            self._drop(link, "was of no use")
        return True

    def _ping(self, link: Link) -> None:
        self._write(link, [(self._measuring.ping(link.peer), b"")])

    # --- making links ---------------------------------------------------------------------

    async def _dial(self, peer: PeerId, addresses: tuple[str, ...]) -> None:
        link = Link(peer, os.urandom(16), self._clock.monotonic(), dialled=True)
        early: dict[int, list[Frame]] = {}
        try:
            async with asyncio.timeout(HELLO_S):
                for lane in (STEP, BULK):
                    stream = await self._transport.dial(peer, addresses)
                    link.lanes[lane], link.decoders[lane] = stream, FrameDecoder(GUEST)
                    link.block = stream.block
                    stream.write(hello(link.name, lane, self._software))
                for lane, stream in link.lanes.items():
                    said, early[lane] = await greeting(stream, link.decoders[lane], self._clock)
                    _check_version(said)
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

    async def _accept(self, stream: Stream) -> None:
        """Serve one incoming lane until it ends."""
        task, peer = asyncio.current_task(), stream.remote
        assert task is not None
        self._tasks.add(task)
        try:
            await self._serve(stream)
        except asyncio.CancelledError:
            if not self._closed:  # else we end, and asyncio would log that this did not end well
                raise
        except (TimeoutError, RemoteProtocolError, PeerLost) as error:
            log.debug("refused a stream of %s: %s", peer[-8:], error)
            stream.close()
            if not isinstance(error, PeerLost):
                self._punish(peer, stream.block)
        finally:
            self._tasks.discard(task)
            stream.close()

    async def _serve(self, stream: Stream) -> None:
        if self._closed:
            return
        lane = await self._lobby.receive(stream, partner=stream.remote in self._watched)
        if lane is None or self._closed:
            return
        try:
            if lane.link.whole:
                self._join(lane.link)
            await self._pump(lane.link, lane.number, lane.early)
        finally:
            self._lobby.end(lane.link)

    def _join(self, link: Link) -> None:
        """Both lanes are there: use the link, and end those that it replaces."""
        now = self._clock.monotonic()
        link.since_s = link.heard_s = link.came_s = now
        for held in list(self._links.get(link.peer, ())):
            if held.dialled == link.dialled or now - held.since_s > HELLO_S:
                self._drop(held, "began anew")
        self._links.setdefault(link.peer, []).append(link)
        link.become(PARTNER if link.peer in self._watched else GUEST)
        guests = (other for other in self._all() if other.peer not in self._watched)
        if out := gives_way(guests, link):
            self._drop(out, "gave way to others: no session used it")
            self._shed(out.peer)

    def _all(self) -> list[Link]:
        return [link for links in self._links.values() for link in links]

    def _punish(self, peer: PeerId, block: str) -> None:
        """End the connection of somebody that misbehaved; its next streams wait."""
        self._lobby.waits.offend(peer, block, self._clock.monotonic())
        self._shed(peer)

    def _shed(self, peer: PeerId) -> None:
        """End the connection itself of somebody who is of no use to us.

        A closed stream goes on at the other end, and in the transport, as long as that end likes.
        """
        if not (peer in self._watched or peer in self._dialling or self.connected(peer)):
            self._transport.hang_up(peer)

    # --- reading --------------------------------------------------------------------------

    async def _pump(self, link: Link, lane: int, early: list[Frame]) -> None:
        how = "vanished"
        stream, decoder, inflow = link.lanes[lane], link.decoders[lane], Inflow()
        try:
            self._take(link, early, lane)
            await self._finish(link, decoder, lane)
            while (data := await stream.read(READ_BYTES)) and not link.closed:
                now = link.heard_s = link.came_s = self._clock.monotonic()
                frames = decoder.feed(data, now)
                bytes_per_s = 0.0
                if lane == BULK:
                    largest = max((len(frame.payload) for frame in frames), default=None)
                    if burst := inflow.read(len(data), largest, now):
                        bytes_per_s = self._measuring.arrived(link.peer, *burst)
                pause_s = self._take(link, frames, lane, bytes_per_s)
                if decoder.more:
                    pause_s = max(pause_s, await self._finish(link, decoder, lane))
                if decoder.held > SMALL_BYTES:
                    self._weigh()
                if pause_s:
                    await asyncio.sleep(pause_s)
        except RemoteProtocolError as error:
            how = f"broke the protocol: {error}"
        finally:
            self._drop(link, how)
            if how != "vanished":
                self._punish(link.peer, link.block)

    async def _finish(self, link: Link, decoder: FrameDecoder, lane: int) -> float:
        """Take what the decoder still has of the last read, a few frames a turn of the loop."""
        pause_s = 0.0
        while decoder.more and not link.closed:
            await asyncio.sleep(0)
            frames = decoder.feed(b"", self._clock.monotonic())
            pause_s = max(pause_s, self._take(link, frames, lane))
        return pause_s

    def _weigh(self) -> None:
        """Drop the link that holds most bytes of unfinished frames, if all hold too many."""
        if out := hoards(self._all()):
            self._drop(out, "held too much that it did not finish")
            self._punish(out.peer, out.block)

    def _take(
        self, link: Link, frames: list[Frame], lane: int = STEP, bytes_per_s: float = 0.0
    ) -> float:
        """Hand on what arrived on a lane, the last of it at `bytes_per_s` (0: not known).

        The seconds for which not to read from it; raises RemoteProtocolError.
        """
        if not frames:
            return 0.0
        if not link.whole:
            raise RemoteProtocolError("frames out of place: a link begins with two greetings")
        partner, now = link.limits is PARTNER, link.heard_s
        if not partner and not self._quotas.guest(link.peer, len(frames), now):
            raise RemoteProtocolError("too many frames of somebody who shares no session with us")
        rest, control = [], 0
        for frame in frames:
            message = frame.message
            if type(message) in FLOW:
                rest.append(frame)
                continue
            control += 1
            if isinstance(message, Hello):
                raise RemoteProtocolError("frames out of place: a link begins with two greetings")
            if isinstance(message, KINDS):
                size = len(frame.payload)
                answer = self._measuring.take(link.peer, message, size, bytes_per_s)
                if answer is not None:
                    self._write(link, [(answer, b"")])
            else:
                rest.append(frame)
        if rest:
            self._hand_on(link, rest, lane)
        return self._quotas.control(link.peer, control, now) if partner and control else 0.0

    def _hand_on(self, link: Link, frames: list[Frame], lane: int) -> None:
        if link.closed:
            return  # an answer to one of them was too much, and the loss has been told
        link.use(link.heard_s)
        if lane == BULK:
            self._measuring.bulk_moved()
        try:
            self._on_frames(link.peer, frames)
        except Exception:  # a mistake of ours: be loud, and leave no session half served
            log.exception("frames from %s could not be handled", link.peer[-8:])
            self._drop(link, "sent what could not be handled")

    def _drop(self, link: Link, how: str) -> None:
        link.close()
        peer, links = link.peer, self._links.get(link.peer, [])
        if link not in links:
            return
        links.remove(link)
        if links and not link.used:
            return
        del self._links[peer]
        self._measuring.lost(peer)
        for other in links:
            other.close()
        try:
            self._on_lost(peer, how)
        except Exception:  # ours again; whoever dropped the link goes on
            log.exception("the loss of %s could not be handled", peer[-8:])

    # --- heartbeats -----------------------------------------------------------------------

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(self._tick_s)
            self._beat(self._clock.monotonic())

    def _beat(self, now: float) -> None:
        late_s = now - self._beat_s - self._tick_s
        self._beat_s = now
        for link in self._all():
            if late_s > self._tick_s:
                link.heard_s = min(now, link.heard_s + late_s)  # we did not listen
            if link.stalled(now):
                self._drop(link, "takes too long for a frame")
                self._punish(link.peer, link.block)
            elif link.peer in self._watched:
                self._check(link, now - link.heard_s)
            elif link.limits is PARTNER and now - link.partner_s > GRACE_S:
                link.become(GUEST)
        self._lobby.beat(now)
        self._measuring.beat(now)

    def _check(self, link: Link, silent_s: float) -> None:
        if silent_s > self._silence_s:
            self._drop(link, f"has been silent for {silent_s:.0f} s")
        elif silent_s >= self._ping_after_s:
            self._ping(link)


def _check_version(hello: Hello) -> None:
    if hello.version != PROTOCOL_VERSION:
        raise RemoteProtocolError(f"protocol version {hello.version} instead of {PROTOCOL_VERSION}")
