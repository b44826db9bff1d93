"""A network inside one process: the stream contract with delay, bandwidth and faults, no sockets.

    network = MemoryNetwork(delay_s=0.02)
    a, b = network.transport("a"), network.transport("b")
    network.shape("a", "b", delay_s=0.08)      # one way; both ways alike unless told otherwise
    network.freeze("a", "b")                   # nothing arrives any more, and nobody is told
    network.cut("a", "b")                      # both ends see the end of every stream
    network.heal("a", "b")

It is product, not a test double: users simulate their own swarms with it, and the simulation runs
the real client and peers over it. Time is taken from the running loop alone (`time`, `call_at`,
`call_later`), so that the same code runs in real time and on a loop with virtual time, where a run
is a function of its seed. There are no threads and no chance in here.

The model. Between two peers there is one *wire* in each direction, which all streams of the pair
share; it sends segments of the streams in turn, as libp2p's multiplexer does on its one connection,
so a prompt on one lane leaves room for a token on the other. A wire without a bandwidth limit takes
what one `write` gives in one piece, which then arrives in one piece: frames sent together arrive
together. Arrival never overtakes: a shorter delay set later does not reorder what flies already.
A reader that does not read stops the sender after `WINDOW_BYTES`; what cannot be sent (window,
bandwidth, freeze) is the sender's `backlog`. A dial costs one round trip.

Loss of packets is not modelled: on a reliable stream it shows as delay, which `shape` can change at
any time. Rejected: asyncio's own loopback sockets (real time only, kernel buffers of unknown size).
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

from hexswarm.errors import NetworkError, PeerLost
from hexswarm.records import PeerId
from hexswarm.transports.base import Handler

log = logging.getLogger(__name__)

WINDOW_BYTES = 4 << 20
"""So much may fly or lie unread in one direction of a stream."""
SEGMENT_BYTES = 64 << 10
"""A wire of limited bandwidth serves its streams in turns of this size."""
DRAINED_BYTES = 1 << 20
"""`drain` waits until the backlog is not above this."""

Pair = tuple[PeerId, PeerId]


class MemoryNetwork:
    """Peers by id and the wires between them; `delay_s` and `bytes_per_s` hold unless shaped."""

    def __init__(self, delay_s: float = 0.0, bytes_per_s: float = math.inf) -> None:
        self._delay_s = delay_s
        self._bytes_per_s = bytes_per_s
        self._transports: dict[PeerId, MemoryTransport] = {}
        self._wires: dict[Pair, _Wire] = {}
        self._cut: set[Pair] = set()
        self._dials: dict[asyncio.Future[MemoryStream | None], Pair] = {}

    def transport(self, peer: PeerId) -> MemoryTransport:
        """The way of `peer` into this network. Raises NetworkError if it has one already."""
        if peer in self._transports:
            raise NetworkError(f"peer {peer} is in the network already", remedy="close it first")
        made = self._transports[peer] = MemoryTransport(self, peer)
        return made

    def shape(
        self,
        a: PeerId,
        b: PeerId,
        *,
        delay_s: float | None = None,
        bytes_per_s: float | None = None,
        one_way: bool = False,
    ) -> None:
        """Set delay and bandwidth from `a` to `b`, and back unless `one_way`."""
        for pair in ((a, b),) if one_way else ((a, b), (b, a)):
            wire = self.wire(*pair)
            wire.delay_s = wire.delay_s if delay_s is None else delay_s
            wire.bytes_per_s = wire.bytes_per_s if bytes_per_s is None else bytes_per_s

    def cut(self, a: PeerId, b: PeerId | None = None) -> None:
        """End every stream between `a` and `b` (None: everybody); what flies is lost.

        Until `heal`, neither reaches the other.
        """
        for pair in self._pairs(a, b):
            self._cut.add(pair)
            self.wire(*pair).clear()
            for answer in [answer for answer, way in self._dials.items() if way == pair]:
                if not answer.done():
                    answer.set_result(None)
            if pair[0] in self._transports:
                self._transports[pair[0]].sever(pair[1])

    def freeze(self, a: PeerId, b: PeerId | None = None) -> None:
        """From now on nothing arrives between `a` and `b` (None: everybody); nobody is told."""
        for pair in self._pairs(a, b):
            self.wire(*pair).freeze()

    def heal(self, a: PeerId, b: PeerId | None = None) -> None:
        """End a cut or a freeze; what a freeze held up arrives now."""
        for pair in self._pairs(a, b):
            self._cut.discard(pair)
            self.wire(*pair).thaw()

    def _pairs(self, a: PeerId, b: PeerId | None) -> list[Pair]:
        others = [b] if b is not None else sorted(self._transports.keys() - {a})
        return [pair for other in others for pair in ((a, other), (other, a))]

    # --- for transports ----------------------------------------------------------------------

    def wire(self, source: PeerId, target: PeerId) -> _Wire:
        pair = (source, target)
        if pair not in self._wires:
            self._wires[pair] = _Wire(self._delay_s, self._bytes_per_s)
        return self._wires[pair]

    async def connect(self, source: MemoryTransport, target: PeerId) -> MemoryStream:
        """Make a stream: a request travels there, the answer back. Raises PeerLost."""
        here = source.local
        if (here, target) in self._cut or target not in self._transports:
            raise PeerLost(target, None, "cannot be reached")
        answer: asyncio.Future[MemoryStream | None]
        answer = asyncio.get_running_loop().create_future()
        self._dials[answer] = (here, target)
        self.wire(here, target).post(partial(self._request, source, target, answer))
        try:
            stream = await answer
        finally:
            del self._dials[answer]
        if stream is None:
            raise PeerLost(target, None, "cannot be reached")
        return stream

    def _request(
        self, source: MemoryTransport, target: PeerId, answer: asyncio.Future[MemoryStream | None]
    ) -> None:
        """A dial has arrived at `target`."""
        there = self._transports.get(target)
        stream = there.accept(source) if there is not None else None
        self.wire(target, source.local).post(partial(_answer, answer, stream))

    def forget(self, transport: MemoryTransport) -> None:
        if self._transports.get(transport.local) is transport:
            del self._transports[transport.local]


def _answer(answer: asyncio.Future[MemoryStream | None], stream: MemoryStream | None) -> None:
    """A dial was answered; if the caller gave up meanwhile, its stream ends."""
    if not answer.done():
        answer.set_result(stream)
    elif stream is not None:
        stream.close()


class MemoryTransport:
    """One peer's `Transport`."""

    def __init__(self, network: MemoryNetwork, local: PeerId) -> None:
        self._network = network
        self._local = local
        self._handler: Handler | None = None
        self._streams: dict[MemoryStream, None] = {}
        """Open ones, in the order in which they were made: a set would end them by address."""
        self._serving: set[asyncio.Task[None]] = set()

    @property
    def local(self) -> PeerId:
        return self._local

    async def dial(self, peer: PeerId, addresses: Sequence[str] = ()) -> MemoryStream:
        """Open a stream; addresses are not needed here. Raises PeerLost."""
        return await self._network.connect(self, peer)

    async def listen(self, handler: Handler) -> None:
        self._handler = handler

    def check(self) -> None:
        """It always can."""

    def hang_up(self, peer: PeerId) -> None:
        for stream in [stream for stream in self._streams if stream.remote == peer]:
            stream.close()

    async def close(self) -> None:
        """Leave the network; the other ends see the end of their streams."""
        self._handler = None
        self._network.forget(self)
        for stream in list(self._streams):
            stream.close()
        for task in self._serving:
            task.cancel()
        await asyncio.gather(*self._serving, return_exceptions=True)

    # --- for the network -----------------------------------------------------------------------

    def accept(self, caller: MemoryTransport) -> MemoryStream | None:
        """The caller's end of a new stream, whose other end our handler serves from now on."""
        if self._handler is None:
            return None
        there = _Pipe(self._network.wire(caller.local, self.local))
        back = _Pipe(self._network.wire(self.local, caller.local))
        theirs = MemoryStream(self.local, back, there, caller._streams)
        ours = MemoryStream(caller.local, there, back, self._streams)
        task = asyncio.get_running_loop().create_task(self._serve(self._handler, ours))
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)
        return theirs

    def sever(self, remote: PeerId) -> None:
        """The way to `remote` is cut."""
        for stream in [stream for stream in self._streams if stream.remote == remote]:
            stream.sever()

    async def _serve(self, handler: Handler, stream: MemoryStream) -> None:
        try:
            await handler(stream)
        except Exception:
            log.exception("the handler of a stream from %s failed", stream.remote)
        finally:
            stream.close()


class MemoryStream:
    """One end of a stream."""

    def __init__(
        self,
        remote: PeerId,
        incoming: _Pipe,
        outgoing: _Pipe,
        registry: dict[MemoryStream, None],
    ) -> None:
        self._remote = remote
        self._incoming = incoming
        self._outgoing = outgoing
        self._registry = registry
        registry[self] = None

    @property
    def remote(self) -> PeerId:
        return self._remote

    @property
    def block(self) -> str:
        return ""

    async def read(self, limit: int) -> bytes:
        return await self._incoming.read(limit)

    def write(self, buffers: Sequence[bytes | memoryview]) -> None:
        self._outgoing.write(b"".join(buffers))

    @property
    def backlog(self) -> int:
        return self._outgoing.backlog

    async def drain(self) -> None:
        await self._outgoing.drain()

    def pause(self) -> None:
        """What is not read stays in the window."""

    def close(self) -> None:
        self._outgoing.finish()
        self._incoming.stop()
        self._registry.pop(self, None)

    def sever(self) -> None:
        """Lose what is under way; both directions end now."""
        self._outgoing.end()
        self._incoming.end()
        self._registry.pop(self, None)


class _Pipe:
    """One direction of one stream: written | flying | unread."""

    def __init__(self, wire: _Wire) -> None:
        self.backlog = 0
        self._wire = wire
        self._written: deque[memoryview] = deque()
        self._flying = 0
        self._unread = bytearray()
        self._finished = False
        """The writer has closed; the end follows its last byte."""
        self._end_sent = False
        self._ended = False
        """Nothing arrives any more: the end came, the reader closed, or the way was cut."""
        self._waiters: set[asyncio.Future[None]] = set()

    # --- the writer's end ------------------------------------------------------------------------

    def write(self, data: bytes) -> None:
        if data and not self._finished and not self._ended:
            self._written.append(memoryview(data))
            self.backlog += len(data)
            self._wire.offer(self)

    def finish(self) -> None:
        """Close after what was written."""
        if not self._finished:
            self._finished = True
            self._wire.offer(self)

    async def drain(self) -> None:
        while self.backlog > DRAINED_BYTES and not self._ended:
            await self._wait()

    # --- the wire --------------------------------------------------------------------------------

    @property
    def waiting(self) -> bool:
        """There is something to send, and room for it at the reader."""
        if self._ended:
            return False
        if self._written:
            return self._flying + len(self._unread) < WINDOW_BYTES
        return self._finished and not self._end_sent

    def take(self, limit: int) -> bytes:
        """The next at most `limit` bytes to send; b"" is the end, which comes once."""
        if not self._written:
            self._end_sent = True
            return b""
        limit = min(limit, WINDOW_BYTES - self._flying - len(self._unread))
        piece = self._written.popleft()
        if len(piece) > limit:
            self._written.appendleft(piece[limit:])
            piece = piece[:limit]
        self._flying += len(piece)
        self.backlog -= len(piece)
        if self.backlog <= DRAINED_BYTES:
            self._wake()
        return bytes(piece)

    def arrive(self, data: bytes) -> None:
        if self._ended:
            return
        self._flying -= len(data)
        self._unread += data
        self._ended = not data
        self._wake()

    # --- the reader's end ------------------------------------------------------------------------

    async def read(self, limit: int) -> bytes:
        while not self._unread and not self._ended:
            await self._wait()
        data = bytes(self._unread[:limit])
        del self._unread[:limit]
        self._wire.offer(self)
        return data

    def end(self) -> None:
        """Nothing more arrives; what did may still be read."""
        self._ended = True
        self._written.clear()
        self.backlog = 0
        self._wake()

    def stop(self) -> None:
        """The reader has closed: nothing more arrives, and what did is of no interest."""
        self._unread.clear()
        self.end()

    async def _wait(self) -> None:
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.add(waiter)
        try:
            await waiter
        finally:
            self._waiters.discard(waiter)

    def _wake(self) -> None:
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)


class _Wire:
    """One direction between two peers: sends segments of its pipes in turn, delivers in order."""

    def __init__(self, delay_s: float, bytes_per_s: float) -> None:
        self.delay_s = delay_s
        self.bytes_per_s = bytes_per_s
        self._frozen = False
        self._busy: asyncio.TimerHandle | None = None
        self._pipes: deque[_Pipe] = deque()
        self._flight: deque[tuple[float, Callable[[], None]]] = deque()
        self._alarm: asyncio.TimerHandle | None = None

    def offer(self, pipe: _Pipe) -> None:
        """`pipe` may have something to send."""
        if pipe.waiting and pipe not in self._pipes:
            self._pipes.append(pipe)
        self._send()

    def post(self, arrive: Callable[[], None]) -> None:
        """Let `arrive` happen at the far end, `delay_s` from now, after what was posted before."""
        due_s = asyncio.get_running_loop().time() + self.delay_s
        if self._flight:
            due_s = max(due_s, self._flight[-1][0])
        self._flight.append((due_s, arrive))
        self._set_alarm()

    def freeze(self) -> None:
        self._frozen = True
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None

    def thaw(self) -> None:
        if self._frozen:
            self._frozen = False
            self._set_alarm()
            self._send()

    def clear(self) -> None:
        """Lose what is under way; the wire itself goes on."""
        for timer in (self._alarm, self._busy):
            if timer is not None:
                timer.cancel()
        self._alarm = self._busy = None
        self._flight.clear()
        self._pipes.clear()

    def _send(self) -> None:
        while self._pipes and self._busy is None and not self._frozen:
            pipe = self._pipes.popleft()
            if not pipe.waiting:
                continue  # cut, or its reader's window is full: the next read offers it again
            data = pipe.take(WINDOW_BYTES if math.isinf(self.bytes_per_s) else SEGMENT_BYTES)
            if pipe.waiting:
                self._pipes.append(pipe)
            seconds = len(data) / self.bytes_per_s
            if seconds:
                loop = asyncio.get_running_loop()
                self._busy = loop.call_later(seconds, self._sent, pipe, data)
            else:
                self.post(partial(pipe.arrive, data))

    def _sent(self, pipe: _Pipe, data: bytes) -> None:
        self._busy = None
        self.post(partial(pipe.arrive, data))
        self._send()

    def _set_alarm(self) -> None:
        if self._flight and self._alarm is None and not self._frozen:
            self._alarm = asyncio.get_running_loop().call_at(self._flight[0][0], self._arrive)

    def _arrive(self) -> None:
        """Deliver what is due; the first one is, however the loop rounds its clock."""
        now = max(asyncio.get_running_loop().time(), self._flight[0][0])
        self._alarm = None
        while self._flight and self._flight[0][0] <= now:
            self._flight.popleft()[1]()
        self._set_alarm()
