"""Real peers that can be killed, frozen and started again, and answers heard token by token.

For `chaos.py` and its parts. Every stage is held by several peers; which of them serves an answer
is read from the answer's own route, so that the one that is struck is the one that works.

A peer is struck by its process id alone, as an operator or the kernel would; its libp2p daemon then
dies by itself, or, if the peer is frozen, lives on and keeps its connections open, which is the
half-open link that a client must see through. `strike(..., whole=True)` stops the daemon too, as
a machine that sleeps does.

Starting a peer takes seconds of CPU, which on a small machine would be felt by whatever is being
measured; so `revive` starts all that are gone at once and returns when they serve.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil

from hexswarm.client import AsyncClient
from hexswarm.conversation import Completion, Conversation, Prompt
from hexswarm.demo import READY_S, LocalSwarm, Process
from hexswarm.errors import HexswarmError
from hexswarm.records import Announcement, PeerId, Route

REFRESH_S = 0.3
ONLINE_S = 60.0
ANSWER_S = 120.0
"""An answer that takes longer counts as hung."""
PEER_BYTES = 800 << 20
"""Resident memory of a peer of the default model in thirds, and of its daemon."""


class TooSmall(HexswarmError):
    """The machine lacks the memory for what was asked."""


class Replicas(LocalSwarm):
    """Peers by number: number n serves `spans[n % len(spans)]`."""

    def __init__(self, spans: Sequence[str], replicas: int, *, seeds: int = 1, **more: Any) -> None:
        self.stages = tuple(spans)
        self.seeds: list[Process] = []
        self._seed_count = seeds
        super().__init__([*spans] * replicas, threads=1, **more)
        need, free = len(self._spans) * PEER_BYTES, psutil.virtual_memory().available
        if free < need:
            raise TooSmall(f"{len(self._spans)} peers need {need >> 20} MiB, {free >> 20} are free")

    # --- processes

    @property
    def bootstrap(self) -> list[str]:
        return [line for seed in self.seeds for line in seed.lines if "/p2p/" in line]

    @property
    def processes(self) -> list[Process]:
        return [*self.seeds, *self.peers]

    def start_seed(self, port: int = 0) -> Process:
        """Start all bootstrap nodes; each later one knows those before it."""
        for number in range(self._seed_count):
            words = ["bootstrap", "--port", str(port)]
            for address in self.bootstrap:
                words += ["--bootstrap", address]
            seed = self._spawn(f"bootstrap-{number}", words)
            self.seeds.append(seed)
            seed.wait_for("/p2p/", READY_S)
        self.seed = self.seeds[0]
        return self.seed

    def stop(self) -> list[int]:
        """The frozen cannot end: they are woken first."""
        for process in self.processes:
            self._wake(process)
        return super().stop()

    def restart(self, number: int) -> None:
        """Start a peer that has ended once more, in its old home and with its identity."""
        words = ["peer", "--model", self.model, "--span", str(self._spans[number])]
        words += ["--threads", str(self._threads)]
        for address in self.bootstrap:
            words += ["--bootstrap", address]
        self.peers[number] = self._spawn(f"peer-{number}", [*words, *self._extra])

    def revive(self) -> None:
        """Wake the frozen and start those that are gone; returns when all serve. It blocks."""
        fresh = []
        for number, process in enumerate(self.peers):
            self._wake(process)
            if process.process.poll() is not None:
                self.restart(number)
                fresh.append(self.peers[number])
        for process in fresh:
            process.wait_for("address", READY_S)

    def _wake(self, process: Process) -> None:
        for item in family(process):
            with contextlib.suppress(psutil.NoSuchProcess):
                item.send_signal(signal.SIGCONT)

    # --- who is who

    def id_of(self, number: int) -> PeerId:
        line = next(line for line in self.peers[number].lines if "/p2p/" in line)
        return PeerId(line.rpartition("/p2p/")[2])

    def number_of(self, peer: PeerId) -> int:
        return next(number for number in range(len(self.peers)) if self.id_of(number) == peer)

    def ids(self) -> list[PeerId]:
        return [self.id_of(number) for number in range(len(self.peers))]

    def stage_of(self, number: int) -> int:
        return number % len(self.stages)

    def lives(self, number: int) -> bool:
        process = self.peers[number]
        return process.process.poll() is None and any("/p2p/" in line for line in process.lines)

    # --- strikes

    def strike(self, route: Route, stage: int, number: signal.Signals, whole: bool = False) -> int:
        """Send a signal to the peer that serves `stage` in `route`; the peer's number."""
        struck = self.number_of(route.stages[stage].peer)
        process = self.peers[struck]
        targets = family(process) if whole else family(process)[:1]
        for item in targets:
            item.send_signal(number)
        return struck

    def tracebacks(self) -> int:
        """How many there are in the logs of all peers."""
        return sum(process.log_text.count("Traceback") for process in self.processes)


def family(process: Process) -> list[psutil.Process]:
    """A process and its descendants; nobody if it has ended."""
    if process.process.poll() is not None:
        return []
    try:
        parent = psutil.Process(process.pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


# --- the client's side ----------------------------------------------------------------------------


@dataclass
class Heard:
    """One answer as its caller heard it; times count from the call."""

    times_s: list[float] = field(default_factory=list)
    """When each piece of text came."""
    struck_s: float | None = None
    whole_s: float = 0.0
    completion: Completion | None = None
    error: str = ""

    @property
    def ids(self) -> tuple[int, ...]:
        return self.completion.ids if self.completion is not None else ()

    @property
    def signs_s(self) -> list[float]:
        """When anything came: of an answer that failed, the error ends the last silence."""
        return [*self.times_s, self.whole_s] if self.error else self.times_s

    @property
    def mends(self) -> int:
        return len(self.completion.mends) if self.completion is not None else 0

    @property
    def gaps_s(self) -> list[float]:
        return [b - a for a, b in itertools.pairwise(self.times_s)]


Strike = Callable[[Route], None]


async def hear(
    client: AsyncClient,
    prompt: Prompt,
    tokens: int,
    *,
    strike: Strike | None = None,
    piece: int | None = None,
    after_open_s: float | None = None,
) -> Heard:
    """One answer; `strike` is called once with its route: when `piece` pieces have come, or
    `after_open_s` after its stages were opened. What goes wrong is told in `error`."""
    heard, began_s = Heard(), time.monotonic()

    def hit(route: Route) -> None:
        assert strike is not None
        heard.struck_s = time.monotonic() - began_s
        strike(route)

    async with client.conversation() as talk, asyncio.TaskGroup() as tasks:
        early = None
        if after_open_s is not None:
            early = tasks.create_task(_hit_later(talk, after_open_s, hit))
        try:
            async with asyncio.timeout(ANSWER_S):
                stream = talk.stream(prompt, max_new_tokens=tokens)
                async for _ in stream:
                    heard.times_s.append(time.monotonic() - began_s)
                    if len(heard.times_s) == piece:
                        hit(running_route(talk))
                heard.completion = stream.completion
        except (HexswarmError, TimeoutError) as error:
            heard.error = f"{type(error).__name__}: {error}"
        finally:
            if early is not None:
                early.cancel()
    heard.whole_s = time.monotonic() - began_s
    return heard


async def _hit_later(talk: Conversation, after_s: float, hit: Strike) -> None:
    while talk._session is None or not talk._session.machine.open:  # noqa: ASYNC110  nobody tells
        await asyncio.sleep(0.005)
    route = running_route(talk)
    await asyncio.sleep(after_s)
    hit(route)


def running_route(talk: Conversation) -> Route:
    """The route of an answer that is being given: a completion tells it only at the end."""
    session = talk._session
    assert session is not None
    return session.route


async def announced(client: AsyncClient) -> tuple[Announcement, ...]:
    """The announcements of the client's model, read from the directory now."""
    await client._member.refresh(client.spec_digest)
    return (await client.snapshot()).of_model(client.spec_digest)


async def online(client: AsyncClient, peers: Iterable[PeerId], within_s: float = ONLINE_S) -> float:
    """Wait until the client knows that all these serve; the seconds it took."""
    wanted, began_s = {*peers}, time.monotonic()
    while True:
        serving = {item.peer for item in await announced(client) if item.serving}
        if wanted <= serving:
            return time.monotonic() - began_s
        if time.monotonic() - began_s > within_s:
            missing = ", ".join(peer[-8:] for peer in wanted - serving)
            raise HexswarmError(f"after {within_s:.0f} s the client does not see {missing}")
        await asyncio.sleep(REFRESH_S)


def resident(process: Process) -> int:
    """Bytes of a peer without its daemon."""
    rss: int = psutil.Process(process.pid).memory_info().rss
    return rss
