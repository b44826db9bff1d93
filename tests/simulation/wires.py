"""The network of a simulated world: every frame passes here, is written down, and may be harmed.

Under it lies the product's own `MemoryNetwork` (delay, cut, freeze). What that cannot do, because
real streams never do it, is done here, frame by frame, on the way from one peer to another:

- *vanish*: what is sent does not arrive, and nobody is told (a half-open link). When it ends, the
  streams that lost bytes end too, as a reset would;
- *tear*: the next frame arrives as a half, then the way is cut;
- *twice*, *late* and *swap*: frames come again, at once or seconds later, or behind their
  successors, as a hostile peer may send them. Greetings, pings and probes are left alone: those
  would only end the link, as a cut does.

Members of a group have streams of their own beside the links (`lan`, used by `direct.py`): another
network between the same machines, so that what is cut or frozen is so for both.

A cut or a freeze has *reasons*, and holds as long as any does: a partition that ends does not wake
a peer that is dead.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import random
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from hexswarm.errors import PeerLost
from hexswarm.records import PeerId
from hexswarm.transports.base import Handler
from hexswarm.transports.memory import MemoryNetwork, MemoryStream, MemoryTransport
from hexswarm.wire import FrameDecoder
from tests.simulation.processes import NOBODY, Process

Pair = tuple[PeerId, PeerId]

_PREFIX = struct.Struct("!II")
_TIME = struct.Struct("!d")
_MISCHIEF = frozenset({5, 6, 7, 8, 9, 10, 11, 13, 21, 22, 23})
"""Kinds of messages that are repeated or moved: those of sessions, but not what opens them."""
HELD_S = 0.05
"""A frame that waits for its successor and gets none goes on after this."""


class Trace:
    """What happened, as a running hash; the last events also in words."""

    def __init__(self, keep: int = 0) -> None:
        self.events = 0
        self._hash = hashlib.blake2b(digest_size=16)
        self._keep = keep
        self.lines: list[str] = []

    def note(self, now: float, *words: object) -> None:
        self.events += 1
        self._hash.update(_TIME.pack(now) + repr(words).encode())
        if self._keep:
            self.lines.append(f"{now:9.4f} " + " ".join(map(str, words)))
            del self.lines[: -self._keep]

    def raw(self, now: float, pair: Pair, data: bytes) -> None:
        """On a stream of a group."""
        self.events += 1
        self._hash.update(_TIME.pack(now) + f"{pair[0]}{pair[1]}".encode() + data)
        if self._keep:
            self.lines.append(f"{now:9.4f} {pair[0][-5:]}>{pair[1][-5:]} {len(data)} bytes")
            del self.lines[: -self._keep]

    def frame(self, now: float, pair: Pair, data: bytes) -> None:
        self.events += 1
        self._hash.update(_TIME.pack(now))
        self._hash.update(f"{pair[0]}{pair[1]}".encode())
        self._hash.update(data)
        if self._keep:
            self.lines.append(f"{now:9.4f} {pair[0][-5:]}>{pair[1][-5:]} {_words(data)}")
            del self.lines[: -self._keep]

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()


def _words(data: bytes) -> str:
    message = FrameDecoder().feed(data, 0.0)[0].message
    shown = [f"{type(message).__name__}"]
    for name in ("epoch", "turn", "position", "count", "last", "code", "reason", "token", "finish"):
        if hasattr(message, name):
            shown.append(f"{name}={getattr(message, name)}")
    for name in ("start", "send_from", "end", "received", "done", "cached", "journal", "first"):
        if hasattr(message, name):
            shown.append(f"{name}={getattr(message, name)}")
    if hasattr(message, "session"):
        shown.append(message.session.hex()[:6])
    return " ".join(shown)


def frames_of(data: bytes) -> Iterator[bytes]:
    """The frames that one write consists of."""
    start = 0
    while start < len(data):
        header, payload = _PREFIX.unpack_from(data, start)
        end = start + _PREFIX.size + header + payload
        yield data[start:end]
        start = end


def kind_of(frame: bytes) -> int:
    """The number of the message: the first item of the header's list."""
    return frame[9] if frame[8] & 0xF0 == 0x90 else frame[11]


@dataclass(slots=True)
class Harm:
    """What is wrong with one direction of one pair."""

    vanish: int = 0
    tear: bool = False
    twice: float = 0.0
    swap: float = 0.0
    late: float = 0.0
    torn: bool = field(default=False)
    """Bytes were lost: the streams are of no further use."""

    @property
    def any(self) -> bool:
        return bool(self.vanish or self.tear or self.twice or self.swap or self.late)


class Wires:
    """All ways between processes."""

    def __init__(self, rng: random.Random, trace: Trace, delay_s: float) -> None:
        self.network, self.lan = MemoryNetwork(delay_s), MemoryNetwork(delay_s)
        self.trace = trace
        self.rng = rng
        self.harms: dict[Pair, Harm] = {}
        self._cuts: dict[Pair, set[str]] = {}
        self._freezes: dict[Pair, set[str]] = {}

    def transport(self, process: Process, peer: PeerId) -> WiredTransport:
        return WiredTransport(self, process, self.network.transport(peer))

    def harm(self, a: PeerId, b: PeerId) -> Harm:
        return self.harms.setdefault((a, b), Harm())

    def open(self, a: PeerId, b: PeerId) -> bool:
        """Whether frames pass unharmed, both ways."""
        pair = _sorted(a, b)
        if self._cuts.get(pair) or self._freezes.get(pair):
            return False
        ways = (self.harms.get((a, b)), self.harms.get((b, a)))
        return not any(harm is not None and harm.any for harm in ways)

    def joins(self, a: PeerId, b: PeerId) -> bool:
        """Whether bytes pass, both ways, whatever is done to frames."""
        pair = _sorted(a, b)
        if self._cuts.get(pair) or self._freezes.get(pair):
            return False
        ways = (self.harms.get((a, b)), self.harms.get((b, a)))
        return not any(harm is not None and (harm.vanish or harm.tear) for harm in ways)

    def shape(self, a: PeerId, b: PeerId, delay_s: float, *, one_way: bool = False) -> None:
        for network in (self.network, self.lan):
            network.shape(a, b, delay_s=delay_s, one_way=one_way)

    @property
    def calm(self) -> bool:
        """Whether all ways are open."""
        return not (
            any(self._cuts.values())
            or any(self._freezes.values())
            or any(harm.any for harm in self.harms.values())
        )

    def cut(self, a: PeerId, b: PeerId, why: str) -> None:
        reasons = self._cuts.setdefault(_sorted(a, b), set())
        if not reasons:
            self.network.cut(a, b)
            self.lan.cut(a, b)
        reasons.add(why)

    def freeze(self, a: PeerId, b: PeerId, why: str) -> None:
        reasons = self._freezes.setdefault(_sorted(a, b), set())
        if not reasons:
            self.network.freeze(a, b)
            self.lan.freeze(a, b)
        reasons.add(why)

    def heal(self, a: PeerId, b: PeerId, why: str) -> None:
        pair = _sorted(a, b)
        cuts, freezes = self._cuts.get(pair, set()), self._freezes.get(pair, set())
        cuts.discard(why)
        freezes.discard(why)
        if not cuts:
            for network in (self.network, self.lan):
                network.heal(a, b)
                if freezes:
                    network.freeze(a, b)

    def vanish(self, a: PeerId, b: PeerId, on: bool) -> None:
        """What `a` sends to `b` is lost from now on; at the end their streams end."""
        harm = self.harm(a, b)
        harm.vanish += 1 if on else -1
        if not harm.vanish and harm.torn:
            harm.torn = False
            self.cut(a, b, "reset")
            self.heal(a, b, "reset")

    def tear(self, pair: Pair) -> None:
        """Cut once the half has arrived; whoever tore the way heals it."""
        delay_s, loop = self.network.wire(*pair).delay_s, asyncio.get_running_loop()
        loop.call_later(delay_s + 1e-3, self.cut, *pair, "torn")
        loop.call_later(delay_s + 0.5, self.heal, *pair, "torn")

    def drop(self, transport: WiredTransport) -> None:
        """A process died: its streams end, nobody reaches it."""
        peer = transport.local
        self._forget(self.network, peer)
        if peer in self.lan._transports:
            self._forget(self.lan, peer)

    def _forget(self, network: MemoryNetwork, peer: PeerId) -> None:
        for other in sorted(network._transports.keys() - {peer}):
            network.cut(peer, other)
        network._transports.pop(peer, None)
        for other in sorted(network._transports.keys() - {peer}):
            if not self._cuts.get(_sorted(peer, other)):
                network.heal(peer, other)
                if self._freezes.get(_sorted(peer, other)):
                    network.freeze(peer, other)

    def passed(self, pair: Pair, data: bytes, now: float) -> tuple[list[bytes], bool]:
        """What arrives of a write, and whether the way tears after it."""
        harm = self.harms.get(pair)
        frames = list(frames_of(data))
        for frame in frames:
            self.trace.frame(now, pair, frame)
        if harm is None or not harm.any:
            return frames, False
        if harm.vanish:
            harm.torn = True
            return [], False
        out: list[bytes] = []
        for frame in frames:
            if harm.tear and kind_of(frame) in _MISCHIEF:
                harm.tear = False
                return [*out, frame[: len(frame) // 2]], True
            out.append(frame)
            if harm.twice and kind_of(frame) in _MISCHIEF and self.rng.random() < harm.twice:
                out.append(frame)
        return out, False


class WiredTransport:
    """The `Transport` of one process."""

    def __init__(self, wires: Wires, process: Process, inner: MemoryTransport) -> None:
        self.inner = inner
        self._wires = wires
        self._process = process

    @property
    def local(self) -> PeerId:
        return self.inner.local

    async def addresses(self) -> tuple[str, ...]:
        return (f"/memory/{self.local[-8:]}",)

    async def dial(self, peer: PeerId, addresses: Sequence[str] = ()) -> WiredStream:
        if self._process.killed:
            raise PeerLost(peer, None, "cannot be reached")
        # A dial under way belongs to the network: it goes on while its process is stopped.
        work = self.inner.dial(peer, addresses)
        stream = await asyncio.get_running_loop().create_task(work, context=NOBODY.copy())
        return WiredStream(self._wires, self.local, stream)

    async def listen(self, handler: Handler) -> None:
        async def serve(stream: Any) -> None:
            self._process.adopt()
            await handler(WiredStream(self._wires, self.local, stream))

        await self.inner.listen(serve)

    def check(self) -> None:
        self.inner.check()

    async def died(self) -> None:
        """There is no daemon that could: never returns."""
        await asyncio.get_running_loop().create_future()

    def hang_up(self, peer: PeerId) -> None:
        NOBODY.run(self.inner.hang_up, peer)

    async def close(self) -> None:
        await self.inner.close()


class WiredStream:
    """One end of a stream: what it writes may be harmed, what it reads has been already."""

    def __init__(self, wires: Wires, local: PeerId, inner: MemoryStream) -> None:
        self._wires = wires
        self._inner = inner
        self._pair = (local, inner.remote)
        self._held: list[bytes] = []
        self._timer: asyncio.TimerHandle | None = None

    @property
    def remote(self) -> PeerId:
        return self._inner.remote

    @property
    def block(self) -> str:
        return self._inner.block

    @property
    def backlog(self) -> int:
        return self._inner.backlog

    async def read(self, limit: int) -> bytes:
        return await self._inner.read(limit)

    def write(self, buffers: Sequence[bytes | memoryview]) -> None:
        now = asyncio.get_running_loop().time()
        frames, torn = self._wires.passed(self._pair, b"".join(buffers), now)
        frames = self._moved(frames)
        if frames:
            NOBODY.run(self._inner.write, frames)
            self._echo(frames)
        if torn:
            NOBODY.run(self._wires.tear, self._pair)

    def _moved(self, frames: list[bytes]) -> list[bytes]:
        """Hold a frame back until another has gone before it."""
        harm = self._wires.harms.get(self._pair)
        if self._held and frames:
            frames, self._held = [frames[0], *self._held, *frames[1:]], []
        elif (
            frames
            and harm is not None
            and harm.swap
            and kind_of(frames[-1]) in _MISCHIEF
            and self._wires.rng.random() < harm.swap
        ):
            self._held = [frames.pop()]
            NOBODY.run(self._later)
        return frames

    def _echo(self, frames: list[bytes]) -> None:
        """Send some of the frames again, much later."""
        harm, rng = self._wires.harms.get(self._pair), self._wires.rng
        if harm is None or not harm.late:
            return
        loop = asyncio.get_running_loop()
        for frame in frames:
            if kind_of(frame) in _MISCHIEF and rng.random() < harm.late:
                delay_s = rng.uniform(0.1, 4.0)
                NOBODY.copy().run(loop.call_later, delay_s, self._inner.write, [frame])

    def _later(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(HELD_S, self._let_go)

    def _let_go(self) -> None:
        if self._held:
            held, self._held = self._held, []
            self._inner.write(held)

    async def drain(self) -> None:
        await self._inner.drain()

    def pause(self) -> None:
        self._inner.pause()

    def close(self) -> None:
        NOBODY.run(self._inner.close)


def _sorted(a: PeerId, b: PeerId) -> Pair:
    return (a, b) if a < b else (b, a)


def pairs(one: Sequence[PeerId], other: Sequence[PeerId]) -> Iterator[Pair]:
    return itertools.product(one, other)
