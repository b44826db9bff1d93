"""A small swarm in one process on virtual time: real links, runtimes, servers and stage tables.

What is not real: the network (`transports/memory.py`), the device (`Device`: a host of the loopback
double whose pieces take `step_s` each, and which says how long each waited), and the clock. Run it
with `tests.virtual.run`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from hexswarm.instructions import Emit, Turn
from hexswarm.links import Links
from hexswarm.peer.server import PeerServer
from hexswarm.peer.steps import SessionKey, Step
from hexswarm.records import PeerId, Route, Sampling, Span, Stage
from hexswarm.runtime import OpenSession, SessionRuntime
from hexswarm.transports.memory import MemoryNetwork
from tests import virtual
from tests.loopback import CLIENT, MODEL, Host

SILENCE_S = 4.0


class Device:
    """The part of the engine that a server uses, in the event loop instead of a thread."""

    def __init__(self, host: Host, step_s: float) -> None:
        self.host, self.step_s = host, step_s
        self.server: PeerServer
        self._timer: asyncio.TimerHandle | None = None
        self._ready_s: dict[SessionKey, float] = {}
        """When each session's next piece could have begun."""
        self._began_s = 0.0

    def submit(self, steps: Iterable[Step]) -> None:
        for step in steps:
            if all(waiting.session != step.session for waiting in self.host.steps):
                self._ready_s[step.session] = asyncio.get_running_loop().time()
            self.host.submit(step)
        if self.host.refused:
            asyncio.get_running_loop().call_soon(self._refuse)
        self._go_on()

    def cancel(self, session: SessionKey, position: int | None = None) -> None:
        self.host.drop(session, position)

    def stop(self) -> None:
        """The machine is gone: nothing that it computes comes to an end."""
        if self._timer is not None:
            self._timer.cancel()

    def _refuse(self) -> None:
        results = list(self.host.refused)
        self.host.refused.clear()
        self.server.deliver(results)

    def _go_on(self) -> None:
        if self.host.running is None and self.host.steps:
            self.host.take()
            loop = asyncio.get_running_loop()
            self._began_s = loop.time()
            self._timer = loop.call_later(self.step_s, self._finish)

    def _finish(self) -> None:
        now = asyncio.get_running_loop().time()
        result = self.host.compute()
        if result is not None:
            wait_s = self._began_s - self._ready_s.get(result.row.session, self._began_s)
            self._ready_s[result.row.session] = now
            self.server.deliver([replace(result, wait_s=wait_s, compute_s=now - self._began_s)])
        self._go_on()


class Peer:
    """A peer that serves."""

    def __init__(
        self, network: MemoryNetwork, name: str, span: Span, layers: int, step_s: float
    ) -> None:
        self.peer = PeerId(name)
        self.host = Host(self.peer, span, layers, blocks=64)
        self.device = Device(self.host, step_s)
        self.transport = network.transport(self.peer)
        clock = virtual.LoopClock()
        self.links = Links(
            self.transport,
            clock,
            lambda peer, frames: self.server.on_frames(peer, frames),
            lambda peer, how: self.server.on_lost(peer, how),
            silence_s=SILENCE_S,
        )
        device: Any = self.device
        self.server = self.device.server = PeerServer(self.host.table, device, self.links, clock)

    @property
    def clean(self) -> bool:
        """Nobody has anything of this peer, nor it of others."""
        return (
            len(self.host.table) == self.host.kv_in_use == len(self.host.steps) == 0
            and not self.links._watched
        )

    async def close(self) -> None:
        self.device.stop()
        await self.links.close()
        await self.transport.close()


class World:
    """Peers p0, p1, ... and a client with its runtime.

    With `copies` each span has so many peers; the route goes through the first of each.
    """

    def __init__(
        self,
        *spans: tuple[int, int],
        delay_s: float = 0.01,
        step_s: float = 0.001,
        copies: int = 1,
    ) -> None:
        self.network = MemoryNetwork(delay_s)
        self.layers = max(end for _, end in spans)
        self.stages = len(spans)
        self.step_s = step_s
        self.peers = [
            Peer(self.network, f"p{i}", Span(*span), self.layers, step_s)
            for i, span in enumerate(spans * copies)
        ]
        self.dead: set[PeerId] = set()
        self.transport = self.network.transport(CLIENT)
        self.runtime = SessionRuntime(virtual.LoopClock())
        self.runtime.links = self.links = Links(
            self.transport,
            virtual.LoopClock(),
            self.runtime.on_frames,
            self.runtime.on_lost,
            silence_s=SILENCE_S,
        )

    @property
    def route(self) -> Route:
        return self.along(*(peer.peer for peer in self.peers[: self.stages]))

    def along(self, *names: str) -> Route:
        """The route through these peers, each with all that it holds."""
        peers = [self.named(name) for name in names]
        stages = tuple(Stage(peer.peer, peer.host.model.span, ("/x",)) for peer in peers)
        return Route(stages, 0.0, 0.0)

    def named(self, name: str) -> Peer:
        return next(peer for peer in self.peers if peer.peer == name)

    async def kill(self, name: str) -> None:
        """A process ends without a word: its neighbours see the end of their streams."""
        peer = self.named(name)
        self.dead.add(peer.peer)
        await peer.close()

    async def restart(self, name: str) -> Peer:
        """A dead peer is back, and remembers nothing."""
        before = self.named(name)
        span, index = before.host.model.span, self.peers.index(before)
        made = Peer(self.network, name, span, self.layers, self.step_s)
        self.peers[index] = made
        self.dead.discard(made.peer)
        await made.links.start(listen=True)
        return made

    def open(self, kv_tokens: int = 64, **options: Any) -> OpenSession:
        return self.runtime.open(self.route, MODEL, kv_tokens, **options)

    async def opened(self, kv_tokens: int = 64) -> OpenSession:
        session = self.open(kv_tokens)
        await session.ready()
        return session

    @property
    def clean(self) -> bool:
        """No session, no lease, nobody watched, on any side."""
        return (
            len(self.runtime) == 0
            and not self.links._watched
            and all(peer.clean for peer in self.peers if peer.peer not in self.dead)
        )

    async def settle(self, seconds: float = 1.0) -> None:
        """Let what is under way arrive."""
        await asyncio.sleep(seconds)


@asynccontextmanager
async def world(*spans: tuple[int, int], **options: Any) -> AsyncIterator[World]:
    """A running world; at its end no task may be left."""
    made = World(*spans, **options)
    for peer in made.peers:
        await peer.links.start(listen=True)
    await made.links.start(listen=False)
    try:
        yield made
    finally:
        await made.links.close()
        await made.transport.close()
        for peer in made.peers:
            if peer.peer not in made.dead:
                await peer.close()
        await asyncio.sleep(0)
        assert virtual.others() == set()


def turn(ids: Sequence[int], max_new: int, position: int = 0) -> Turn:
    return Turn(position, tuple(ids[position:]), max_new, Sampling(), (), tuple(ids))


async def listen(session: OpenSession) -> list[int]:
    """The tokens of the running turn, to its end."""
    tokens: list[int] = []
    while True:
        event = await session.wait()
        assert isinstance(event, Emit)
        assert event.token is not None
        tokens.append(event.token)
        if event.finish:
            return tokens
