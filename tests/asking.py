"""The real asyncio client over a swarm in memory, on virtual time.

Its membership is a stand-in that knows the peers of a `World`; its tokenizer writes every id as a
letter; its state goes to a folder of its own.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from hexswarm.client import AsyncClient
from hexswarm.config import ClientConfig
from hexswarm.directory import Directory, SignedAnnouncement
from hexswarm.records import Announcement, ModelSpec, Speed
from tests import virtual
from tests.loopback import MODEL, VOCABULARY
from tests.world import World, world

THREE = ((0, 2), (2, 4), (4, 6))
SPARED = ((0, 2), (2, 4), (4, 6), (2, 4))
"""p3 can stand in for p1."""
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


class Letters:
    """A tokenizer of one letter a token."""

    stop_ids: frozenset[int] = frozenset()

    def encode_prompt(self, text: str) -> list[int]:
        return [ord(letter) - 33 for letter in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(33 + number) for number in ids)


class Member:
    """What the client asks of a `Membership`."""

    def __init__(self, w: World) -> None:
        self.links, self.transport, self.directory = w.links, w.transport, Directory()
        self.directory.merge(
            SignedAnnouncement(self._word(w, index), 1e12, b"") for index in range(len(w.peers))
        )

    def _word(self, w: World, index: int) -> Announcement:
        peer = w.peers[index]
        # the first peers are the faster ones
        speed = peer.host.ledger.speed = Speed(0.001 * (1 + index), 0.001, 0.001)
        return Announcement(
            peer=peer.peer,
            model=MODEL,
            model_name="Integers",
            layers=w.layers,
            span=peer.host.model.span,
            state="online",
            dtype="float32",
            device="cpu",
            speed=speed,
            free_kv_tokens=1024,
            queue_s=0.0,
            addresses=("/x",),
        )

    def alive(self) -> tuple[Announcement, ...]:
        return self.directory.alive(0.0)

    async def refresh(self, *_: object, **__: object) -> None:
        await asyncio.sleep(0)

    async def place(self, *_: object) -> None:
        return

    async def close(self) -> None:
        return


@asynccontextmanager
async def client(*spans: tuple[int, int]) -> AsyncIterator[tuple[World, AsyncClient]]:
    """A client in a world; at the end nobody may hold anything."""
    folder = tempfile.TemporaryDirectory(prefix="hexswarm-")
    async with world(*spans) as w:
        home = Path(folder.name)
        made: Any = AsyncClient(["/ip4/1.2.3.4/tcp/5/p2p/x"], config=ClientConfig(home=home))
        made._member, made._runtime, made._tokenizer = Member(w), w.runtime, Letters()
        spec = ModelSpec(MODEL, "Integers", "None", w.layers, 1, VOCABULARY, 200, 16)
        made._folder = SimpleNamespace(spec=spec)
        made._clock = virtual.LoopClock()
        made._set_up(random.Random(7))
        made._planner.spread = 0.0  # the better route, whichever the dice say
        yield w, made
        await w.settle()
        assert w.clean
    folder.cleanup()


def scenario(test: Any) -> Any:
    """Run a coroutine function as a test on virtual time."""

    def run() -> None:
        virtual.run(test())

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run
