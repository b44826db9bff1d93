"""Measuring the ways to neighbours, for ourselves and for others who ask.

Four exchanges over the links that exist (`hexswarm.links` hands their frames here):

    Ping    -> Pong        a round trip
    Probe   -> Probed      a burst on the bulk lane; the receiver says how fast it came in
    Measure -> Measured    the neighbour measures its way to a third peer and tells
    frames of sessions     a long one on the bulk lane tells how fast the neighbour's bytes come in

A client cannot know the way between two peers that never met, and announcements list 8 neighbours
at most: so it asks one of the two (`Measure`), just before it uses that way.

What strangers may cause is bounded. Whoever asks gets `ASKS_EACH` measurements in `ASKS_S`, all
together `ASKS_ALL`, `ASKS_AT_ONCE` at a time; beyond that the answer is "not known", at once. A
probe is `PROBE_BYTES` long; a longer one or more than `PROBES_EACH` in a minute end the link. We
probe one neighbour in `PROBE_EVERY_S`, each again after `PROBE_AGAIN_S`, and never while a session
moves bulk: its prompt is measured anyway, and must not wait. Links that were made to measure alone
end after `CASUAL_S` without a sample, else random neighbours would add up to a full mesh.
"""

from __future__ import annotations

import asyncio
import math
import os
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

from hexswarm.clock import Clock
from hexswarm.errors import PeerLost, RemoteProtocolError
from hexswarm.messages import Measure, Measured, Message, Ping, Pong, Probe, Probed
from hexswarm.meter import Meter, believed
from hexswarm.records import Link as Way
from hexswarm.records import PeerId

MEASURE_S = 2.0
"""Limit for connecting and all pings of one measurement."""
ASK_S = 3.0
SAMPLES = 3
REMEMBER_S = 600.0
"""So long is the way to a neighbour remembered after its last sample, if the link has ended."""
MAX_METERS = 1024
MAX_PINGS = 4096
MAX_ASKED = 256
"""Answers that we wait for."""
ASKS_S = 10.0
ASKS_EACH = 8
ASKS_ALL = 64
ASKS_AT_ONCE = 4
PROBE_BYTES = 128 << 10
"""As long as a usual piece of a prompt (64 to 256 KiB), and long enough that the bytes after the
first read take a millisecond at a gigabit: below that our own loop would be measured."""
MAX_PROBE_BYTES = PROBE_BYTES
PROBES_EACH = 6
"""Accepted from one neighbour in a minute."""
PROBE_EVERY_S = 5.0
PROBE_AGAIN_S = 600.0
PROBE_WAIT_S = 30.0
"""A probe that is not answered by then counts as lost."""
QUIET_S = 2.0
"""So long no session may have used the link, nor moved bulk anywhere, before we probe."""
CASUAL_S = 120.0

K = TypeVar("K")
V = TypeVar("V")

KINDS = (Ping, Pong, Probe, Probed, Measure, Measured)


class Wire(Protocol):
    """The part of `Links` that measuring needs."""

    def connected(self, peer: PeerId) -> bool: ...

    async def reach(self, peer: PeerId, addresses: Sequence[str]) -> None:
        """Have a link. Raises PeerLost."""

    def tell(self, peer: PeerId, message: Message, payload: bytes = b"", lane: int = 0) -> bool:
        """Send something that belongs to no session; False without a link."""

    def idle_since_s(self, peer: PeerId) -> float:
        """When a session last used the link."""

    def let_go(self, peer: PeerId) -> bool:
        """End the link if no session uses it; False if one does."""


@dataclass(frozen=True, slots=True)
class _Sent:
    """A ping, a probe or a question that was sent; `answer` is for whoever waits."""

    peer: PeerId
    at_s: float
    about: PeerId | None = None
    answer: asyncio.Future[Way | None] | None = None


class Measuring:
    """All meters of a process, what it has asked and what it is asked."""

    def __init__(self, wire: Wire, clock: Clock) -> None:
        self._wire = wire
        self._clock = clock
        self._meters: dict[PeerId, Meter] = {}
        """Least recently measured first."""
        self._relayed: set[PeerId] = set()
        self._pings: dict[int, _Sent] = {}
        self._unanswered_s: dict[PeerId, float] = {}
        """When the first ping to a peer went out that no answer has followed."""
        self._asked: dict[int, _Sent] = {}
        self._probes: dict[int, _Sent] = {}
        self._probed_s: dict[PeerId, float] = {}
        self._last_probe_s = -math.inf
        self._bulk_s = -math.inf
        """When a session last moved bulk over any link."""
        self._asks: deque[tuple[float, PeerId]] = deque()
        """Measurements that others caused within `ASKS_S`."""
        self._incoming_probes: deque[tuple[float, PeerId]] = deque()
        self._casual: dict[PeerId, float] = {}
        """Links that were made to measure alone, and since when."""
        self._burst = os.urandom(PROBE_BYTES)  # nothing on the way can compress it
        self._tasks: set[asyncio.Task[None]] = set()

    # --- what is known ----------------------------------------------------------------------

    def ways(self) -> dict[PeerId, Way]:
        """What was measured: neighbours, and for a while those that were."""
        now, found = self._clock.monotonic(), {}
        for peer, meter in self._meters.items():
            way = meter.way()
            fresh = self._wire.connected(peer) or now - meter.heard_s <= REMEMBER_S
            if way is not None and fresh:
                found[peer] = replace(way, relayed=True) if peer in self._relayed else way
        return found

    def way(self, peer: PeerId) -> Way | None:
        meter = self._meters.get(peer)
        found = None if meter is None else meter.way()
        return None if found is None else replace(found, relayed=peer in self._relayed)

    def up_bytes_per_s(self) -> float | None:
        now = self._clock.monotonic()
        return _best(meter.up_bytes_per_s(now) for meter in self._meters.values())

    def down_bytes_per_s(self) -> float | None:
        now = self._clock.monotonic()
        return _best(meter.down_bytes_per_s(now) for meter in self._meters.values())

    # --- measuring --------------------------------------------------------------------------

    def ping(self, peer: PeerId) -> Ping:
        """A ping to send to `peer` now."""
        return self._ping(peer, None)

    def _ping(self, peer: PeerId, answer: asyncio.Future[Way | None] | None) -> Ping:
        nonce = _nonce()
        now = self._clock.monotonic()
        self._pings[nonce] = _Sent(peer, now, answer=answer)
        _bound(self._pings, MAX_PINGS)
        self._unanswered_s.setdefault(peer, now)
        return Ping(nonce)

    def unanswered_s(self, peer: PeerId, now: float) -> float:
        """For how long until `now` pings to `peer` have gone without an answer."""
        return now - self._unanswered_s.get(peer, now)

    async def measure(
        self,
        peer: PeerId,
        addresses: Sequence[str],
        samples: int = SAMPLES,
        within_s: float = MEASURE_S,
    ) -> Way | None:
        """The way to `peer`, measured now; None if it does not answer in time."""
        answered = False
        if not self._wire.connected(peer):
            self._casual.setdefault(peer, self._clock.monotonic())
            if addresses and all("/p2p-circuit" in item for item in addresses):
                self._relayed.add(peer)
        try:
            async with asyncio.timeout(within_s):
                await self._wire.reach(peer, addresses)
                for _ in range(samples):
                    if await self._round_trip(peer) is None:
                        break
                    answered = True
        except (TimeoutError, PeerLost):
            pass
        return self.way(peer) if answered else None

    async def measure_all(
        self,
        peers: Iterable[tuple[PeerId, Sequence[str]]],
        samples: int = SAMPLES,
        within_s: float = MEASURE_S,
    ) -> dict[PeerId, Way]:
        """The ways to those of `peers` that answered, measured at the same time."""
        chosen = dict(peers)
        ways = await asyncio.gather(
            *(self.measure(peer, where, samples, within_s) for peer, where in chosen.items())
        )
        return {peer: way for peer, way in zip(chosen, ways, strict=True) if way is not None}

    async def _round_trip(self, peer: PeerId) -> Way | None:
        answer: asyncio.Future[Way | None] = asyncio.get_running_loop().create_future()
        if not self._wire.tell(peer, self._ping(peer, answer)):
            return None
        return await answer

    async def ask(self, via: PeerId, peer: PeerId, addresses: Sequence[str]) -> Way | None:
        """The way from `via` to `peer` as `via` measures it now; None if it cannot say."""
        if len(self._asked) >= MAX_ASKED:
            return None
        answer: asyncio.Future[Way | None] = asyncio.get_running_loop().create_future()
        nonce = _nonce()
        self._asked[nonce] = _Sent(via, self._clock.monotonic(), peer, answer)
        try:
            if not self._wire.tell(via, Measure(nonce, peer, tuple(addresses)[:8])):
                return None
            async with asyncio.timeout(ASK_S):
                return await answer
        except TimeoutError:
            return None
        finally:
            self._asked.pop(nonce, None)

    def probe(self, candidates: Iterable[PeerId], lane: int) -> PeerId | None:
        """Probe the first of `candidates` whose turn it is, if nothing speaks against it now."""
        now = self._clock.monotonic()
        if now - self._last_probe_s < PROBE_EVERY_S or now - self._bulk_s < QUIET_S:
            return None
        for peer in candidates:
            due = now - self._probed_s.get(peer, -math.inf) >= PROBE_AGAIN_S
            if not due or now - self._wire.idle_since_s(peer) < QUIET_S:
                continue
            nonce = _nonce()
            if self._wire.tell(peer, Probe(nonce), self._burst, lane):
                self._probes[nonce] = _Sent(peer, now)
                self._last_probe_s = self._probed_s[peer] = now
                _bound(self._probed_s, MAX_METERS)
                return peer
        return None

    # --- what arrives -----------------------------------------------------------------------

    def bulk_moved(self) -> None:
        """A session sent or received bulk."""
        self._bulk_s = self._clock.monotonic()

    def arrived(self, peer: PeerId, size: int, seconds: float) -> float:
        """A long frame of `peer` came in; the bytes per second, 0 if they cannot be told."""
        return self._meter(peer).arrived(size, seconds, self._clock.monotonic())

    def take(self, peer: PeerId, message: Message, size: int, bytes_per_s: float) -> Message | None:
        """A message of ours with `size` bytes of payload, which came in at `bytes_per_s`.

        What to answer on the same link. Raises RemoteProtocolError.
        """
        match message:
            case Ping():
                return Pong(message.nonce)
            case Pong():
                self._pong(peer, message.nonce)
            case Probe():
                self._count_probe(peer, size)
                return Probed(message.nonce, bytes_per_s)
            case Probed():
                self._probe_told(peer, message)
            case Measure():
                return self._asked_of_us(peer, message)
            case Measured():
                self._told(peer, message)
        return None

    def _pong(self, peer: PeerId, nonce: int) -> None:
        sent = self._pings.get(nonce)
        if sent is None or sent.peer != peer:
            return
        del self._pings[nonce]
        self._unanswered_s.pop(peer, None)
        now = self._clock.monotonic()
        meter = self._meter(peer)
        meter.rtt(now - sent.at_s, now)
        _resolve(sent.answer, meter.way())

    def _count_probe(self, peer: PeerId, size: int) -> None:
        now = self._clock.monotonic()
        _expire(self._incoming_probes, now - 60.0)
        self._incoming_probes.append((now, peer))
        count = sum(other == peer for _, other in self._incoming_probes)
        if size > MAX_PROBE_BYTES or count > PROBES_EACH:
            raise RemoteProtocolError(f"probe {count} of a minute, of {size} bytes")

    def _probe_told(self, peer: PeerId, message: Probed) -> None:
        sent = self._probes.get(message.nonce)
        if sent is None or sent.peer != peer:
            return
        del self._probes[message.nonce]
        now, meter = self._clock.monotonic(), self._meter(peer)
        way = meter.way()
        rtt_s = 0.0 if way is None else way.rtt_s
        meter.sent(believed(message.bytes_per_s, PROBE_BYTES, now - sent.at_s, rtt_s), now)

    def _asked_of_us(self, asker: PeerId, message: Measure) -> Measured | None:
        """Begin to measure for `asker`, or the answer if that is not done."""
        now = self._clock.monotonic()
        _expire(self._asks, now - ASKS_S)
        each = Counter(peer for _, peer in self._asks)
        if each[asker] >= ASKS_EACH or len(self._asks) >= ASKS_ALL:
            return _measured(message, None)
        if len(self._tasks) >= ASKS_AT_ONCE:
            return _measured(message, None)
        self._asks.append((now, asker))
        task = asyncio.create_task(self._measure_for(asker, message))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return None

    async def _measure_for(self, asker: PeerId, message: Measure) -> None:
        way = await self.measure(PeerId(message.peer), message.addresses)
        self._wire.tell(asker, _measured(message, way))

    def _told(self, peer: PeerId, message: Measured) -> None:
        sent = self._asked.get(message.nonce)
        if sent is None or (sent.peer, sent.about) != (peer, message.peer):
            return
        way = None
        if message.rtt_s >= 0:
            bandwidth = message.bytes_per_s or math.inf
            way = Way(message.rtt_s, bandwidth, message.jitter_s)
        _resolve(sent.answer, way)

    # --- life -------------------------------------------------------------------------------

    def wanted(self, peer: PeerId) -> None:
        """Somebody wants the link for more than measuring."""
        self._casual.pop(peer, None)

    def lost(self, peer: PeerId) -> None:
        """The last link to `peer` has ended: nobody who waits for it gets an answer."""
        self._casual.pop(peer, None)
        self._unanswered_s.pop(peer, None)
        for waiting in (self._pings, self._asked, self._probes):
            for nonce in [nonce for nonce, sent in waiting.items() if sent.peer == peer]:
                _resolve(waiting.pop(nonce).answer, None)

    def beat(self, now: float) -> None:
        """Forget what is too old, and let go of links that nobody needs."""
        for nonce in [n for n, sent in self._probes.items() if now - sent.at_s > PROBE_WAIT_S]:
            del self._probes[nonce]
        for peer, since_s in list(self._casual.items()):
            meter = self._meters.get(peer)
            heard_s = since_s if meter is None else max(since_s, meter.heard_s)
            if now - heard_s > CASUAL_S:
                self._casual.pop(peer, None)
                self._wire.let_go(peer)
        for peer, meter in list(self._meters.items()):
            if now - meter.heard_s > REMEMBER_S and not self._wire.connected(peer):
                del self._meters[peer]
                self._relayed.discard(peer)

    def close(self) -> list[asyncio.Task[None]]:
        """The tasks that are to be cancelled; whoever waits gets None."""
        for waiting in (self._pings, self._asked):
            for sent in waiting.values():
                _resolve(sent.answer, None)
            waiting.clear()
        return list(self._tasks)

    def _meter(self, peer: PeerId) -> Meter:
        """The meter of `peer`, which becomes the most recent one."""
        meter = self._meters.pop(peer, None) or Meter()
        self._meters[peer] = meter
        _bound(self._meters, MAX_METERS)
        return meter


def _measured(message: Measure, way: Way | None) -> Measured:
    if way is None:
        return Measured(message.nonce, message.peer, -1.0, 0.0, 0.0)
    known = math.isfinite(way.bytes_per_s)
    bandwidth = way.bytes_per_s if known else 0.0
    return Measured(message.nonce, message.peer, way.rtt_s, way.jitter_s, bandwidth)


def _nonce() -> int:
    return int.from_bytes(os.urandom(7), "big")


def _resolve(answer: asyncio.Future[Way | None] | None, way: Way | None) -> None:
    if answer is not None and not answer.done():
        answer.set_result(way)


def _bound(entries: dict[K, V], most: int) -> None:
    """Drop the oldest."""
    while len(entries) > most:
        entries.pop(next(iter(entries)))


def _expire(events: deque[tuple[float, PeerId]], since_s: float) -> None:
    while events and events[0][0] < since_s:
        events.popleft()


def _best(found: Iterable[float | None]) -> float | None:
    return max((value for value in found if value is not None), default=None)
