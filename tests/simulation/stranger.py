"""Somebody who means no good: fills peers with sessions it never uses, and sends what is malformed.

It has an identity like everybody else and speaks through the same network. What it does to a peer
must harm nobody else's sessions.
"""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING

from hexswarm.errors import HexswarmError
from hexswarm.links import Links
from hexswarm.messages import Close, Hidden, Open, Resume, Tokens
from hexswarm.peer.steps import SessionKey
from hexswarm.records import PeerId
from hexswarm.wire import Frame
from tests.loopback import MODEL
from tests.simulation.peers import name_of
from tests.simulation.processes import Process, ProcessClock

if TYPE_CHECKING:
    from tests.simulation.world import World

NUMBER = 91
AGAIN_S = 3.0
"""Reservations end by themselves: it takes them anew."""


class Stranger:
    """Joins the network when it is first needed."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._rng = random.Random(f"stranger {world.plan.seed}")
        self.process = Process("stranger")
        self.peer = name_of(NUMBER)
        self._links: Links | None = None
        self._hogging: dict[PeerId, int] = {}
        self._opened: dict[SessionKey, PeerId] = {}

    def owns(self, session: SessionKey) -> bool:
        return session in self._opened and self._opened[session] in self._hogging

    def hogs(self, peer: PeerId) -> bool:
        return peer in self._hogging

    def hog(self, peer: PeerId) -> None:
        self._hogging[peer] = self._hogging.get(peer, 0) + 1
        if self._hogging[peer] == 1:
            self.process.spawn(self._hog(peer))

    def let_go(self, peer: PeerId) -> None:
        """It closes what it has, and has nothing more to do with the peer."""
        self._hogging[peer] -= 1
        if not self._hogging[peer]:
            del self._hogging[peer]
            if self._links is not None:
                mine = [key for key, owner in self._opened.items() if owner == peer]
                self.process.call(self._links.send, peer, [(Close(key), b"") for key in mine])

    def pester(self, peer: PeerId, amount: float) -> None:
        self.process.spawn(self._pester(peer, amount))

    async def close(self) -> None:
        for task in self.process.tasks:
            task.cancel()
        if self._links is not None:
            await self._links.close()

    # --- what it does ---------------------------------------------------------------------------

    async def _join(self) -> Links:
        if self._links is None:
            transport = self._world.wires.transport(self.process, name_of(NUMBER))
            clock = ProcessClock(self.process)
            self._links = Links(transport, clock, self._on_frames, self._on_lost)
            await self._links.start(listen=False)
        return self._links

    def _on_frames(self, peer: PeerId, frames: list[Frame]) -> None:
        """It listens to nobody."""

    def _on_lost(self, peer: PeerId, how: str) -> None:
        """And misses nobody."""

    def _open(self, peer: PeerId, tokens: int) -> Open:
        spec = self._world.spec_of(peer)
        key = self._rng.randbytes(16)
        self._opened[key] = peer
        first, end = spec.span.first, spec.span.end
        return Open(key, 0, MODEL, first, end, peer, peer, ("/x",), tokens)

    async def _hog(self, peer: PeerId) -> None:
        links = await self._join()
        while peer in self._hogging:
            try:
                await links.connect(peer, ("/x",))
            except HexswarmError:
                await asyncio.sleep(AGAIN_S)
                continue
            if peer not in self._hogging:
                return  # it was told to let go while it dialled
            opens = [(self._open(peer, size), b"") for size in (512, 256, 128, 64, 64, 32, 16)]
            links.send(peer, opens)
            await asyncio.sleep(AGAIN_S)

    async def _pester(self, peer: PeerId, amount: float) -> None:
        """Frames for sessions of others, frames that cannot be, bytes that are no frames."""
        links = await self._join()
        try:
            await links.connect(peer, ("/x",))
        except HexswarmError:
            return
        held = self._world.peers.get(self._world.spec_of(peer).number)
        serves = held is not None and held.engine is not None
        keys = list(held.engine.tables.sessions) if held is not None and serves else []
        for key in [*keys, self._rng.randbytes(16)]:
            position = self._rng.randrange(64)
            links.send(
                peer,
                [
                    (Tokens(key, 0, 1, position, True), b"\1\0\0\0"),
                    (Hidden(key, 0, 1, position, 1, True, "float32"), b"\0\0\0\0"),
                    (Resume(key, 0, 1, 0, 0, 1), b""),
                    (Close(key), b""),
                ],
            )
        link = links._links[peer][0] if links.connected(peer) else None
        if link is not None and amount > 0.5:
            wire = link.lanes[0]
            wire._inner.write([self._rng.randbytes(64)])  # type: ignore[attr-defined]
