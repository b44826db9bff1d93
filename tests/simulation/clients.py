"""A client of the simulated world: one process with the product's whole client in it."""

from __future__ import annotations

import asyncio
import contextlib
import random
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from hexswarm.client import AsyncClient
from hexswarm.config import ClientConfig
from hexswarm.errors import HexswarmError
from hexswarm.records import ModelSpec
from hexswarm.runtime import SessionRuntime
from tests.loopback import MODEL, VOCABULARY
from tests.simulation.invariants import Ask
from tests.simulation.peers import Member, name_of
from tests.simulation.plans import LAYERS
from tests.simulation.processes import Process, ProcessClock

if TYPE_CHECKING:
    from tests.simulation.world import World


class Letters:
    """A tokenizer of one letter a token."""

    def __init__(self, stops: frozenset[int]) -> None:
        self.stop_ids = stops

    def encode_prompt(self, text: str) -> list[int]:
        return [ord(letter) - 200 for letter in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(200 + number) for number in ids)


class SimulatedClient:
    """One process that asks, with the product's whole client in it."""

    def __init__(self, number: int, world: World) -> None:
        self.number, self.peer = number, name_of(number)
        self.process = Process(f"client{number}")
        self.killed = False
        self.whole: list[tuple[float, bool]] = []
        """When the swarm became whole for this client, or ceased to be."""
        config = ClientConfig(home=Path("/nonexistent"))
        self.transport = world.wires.transport(self.process, self.peer)
        self.member = Member(config, ProcessClock(self.process), software="simulated")
        made: Any = AsyncClient(["/ip4/1.2.3.4/tcp/5/p2p/x"], config=config)
        clock = self.member.clock
        self.runtime = made._runtime = SessionRuntime(clock)
        made._member, made._clock = self.member, clock
        made._tokenizer = Letters(world.plan.stops)
        spec = ModelSpec(MODEL, "Integers", "None", LAYERS, 1, VOCABULARY, 400, 16)
        made._folder = SimpleNamespace(spec=spec)
        made._set_up(random.Random(f"client {world.plan.seed} {number}"))
        self.member.enter(
            self.transport,
            world.board,
            self.runtime.on_frames,
            self.runtime.on_lost,
            config.silence_s,
        )
        self.runtime.links = self.member.links
        self.client: AsyncClient = made

    async def start(self) -> None:
        await self.member.begin(listen=False)
        self.member.follow(MODEL)
        with contextlib.suppress(HexswarmError):
            await self.member.refresh(MODEL)
        self.client._planner.start()

    async def ask(self, ask: Ask) -> None:
        """Have it answered; what comes is written into it."""
        now = asyncio.get_running_loop().time
        try:
            match ask.style:
                case "logits":
                    await self._logits(ask)
                case "talk":
                    await self._talk(ask)
                case _:
                    await self._stream(ask)
            ask.done = True
        except HexswarmError as error:
            ask.error = error
        finally:
            if self.killed:
                ask.abandoned, ask.error = True, None
            ask.ended_s = now()

    async def _take(self, answer: Any, ask: Ask, most: int = 1 << 20) -> None:
        async for piece in answer:
            for letter in piece:
                ask.got.append(ord(letter) - 200)
                ask.arrivals_s.append(asyncio.get_running_loop().time())
            if len(ask.got) >= most:
                await answer.aclose()
                return

    async def _stream(self, ask: Ask) -> None:
        answer = self.client.stream(ask.prompt, max_new_tokens=ask.max_new, seed=1)
        most = 1 + len(ask.prompt) % 7 if ask.style == "cancel" else 1 << 20
        await self._take(answer, ask, most)
        if ask.style != "cancel":
            ids = list(answer.completion.ids)
            ask.got += ids[len(ask.got) :]  # the stop token has no letter

    async def _talk(self, ask: Ask) -> None:
        """Two turns; the second says all of the first, and a little more."""
        async with self.client.conversation() as talk:
            half = max(1, ask.max_new // 2)
            answer = talk.stream(ask.prompt, max_new_tokens=half, seed=1)
            await self._take(answer, ask)
            ids = list(answer.completion.ids)
            ask.got += ids[len(ask.got) :]
            again = [*ask.prompt, *ids, 5, 6, 7]
            answer = talk.stream(again, max_new_tokens=half, seed=1)
            await self._take(answer, ask)
            more = list(answer.completion.ids)
            ask.got += more[len(ask.got) - len(ids) :]

    async def _logits(self, ask: Ask) -> None:
        async with contextlib.aclosing(self.client.logits(ask.prompt, ask.max_new)) as steps:
            async for row in steps:
                ask.got.append(int(row.argmax()))
                ask.arrivals_s.append(asyncio.get_running_loop().time())
