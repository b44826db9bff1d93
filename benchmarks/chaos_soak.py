"""A swarm that is never whole: peers killed for minutes, all restarted in turn, bootstraps dead.

All three let a number of *callers* ask without a pause, each answer compared with the same answer
of the whole swarm, while somebody else is at the peers:

- `loop`: a random peer is killed every few seconds and a supervisor starts it again. The last
  living peer of a stage is spared (there is nobody to go on with), and one peer is never killed, so
  that its memory can be watched, as that of the client is.
- `rolling`: every peer in turn is told to end, started again, and the next one follows when the new
  one is online. When its draining is announced is seen by a client of its own, as anybody would.
- `bootstraps`: all bootstrap nodes are killed and stay dead; at the end a peer that was never here
  joins, with nothing but the file of remembered peers of another one.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import shutil
import signal
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import psutil
from chaos_figures import quantile, slope_share
from chaos_matrix import prompt
from chaos_swarm import Heard, Replicas, announced, hear, online

from hexswarm.client import AsyncClient
from hexswarm.config import ClientConfig
from hexswarm.demo import READY_S
from hexswarm.records import PeerId

TOKENS = 32
QUESTIONS = 4
"""Different prompts."""
SAMPLE_S = 2.0
WARM_SHARE = 0.4
"""Of the time, before memory is expected to stand still."""
SLOPE_S = 600.0
SLOPE = 0.01
EXIT_S = 40.0
DRAINING_S, LEFT_S, JOINED_S = 2.0, 30.0, 10.0
"""Bars: draining announced, process ended, newcomer joined."""


@dataclass
class Tally:
    """What the callers heard."""

    answers: int = 0
    same: int = 0
    tokens: int = 0
    mends: int = 0
    gaps_s: list[float] = field(default_factory=list)
    """The longest silence of each answer."""
    errors: list[str] = field(default_factory=list)

    def add(self, heard: Heard, expected: tuple[int, ...]) -> None:
        self.answers += 1
        self.same += heard.ids == expected
        self.tokens += len(heard.ids)
        self.mends += heard.mends
        if heard.error:
            self.errors.append(heard.error)
        elif heard.ids != expected:
            self.errors.append("other tokens than the whole swarm's")
        self.gaps_s.append(max([*heard.gaps_s, heard.times_s[0]] if heard.times_s else [0.0]))

    def figures(self) -> dict[str, Any]:
        return {
            "answers": self.answers,
            "same_tokens": self.same,
            "mends": self.mends,
            "tokens": self.tokens,
            "silence_p50_s": quantile(self.gaps_s, 0.5),
            "silence_p95_s": quantile(self.gaps_s, 0.95),
            "silence_max_s": max(self.gaps_s, default=0.0),
            "errors": self.errors[:10],
        }


class Callers:
    """So many at once, each asking one answer after the other until told to stop."""

    def __init__(
        self, client: AsyncClient, count: int, tokens: tuple[int, ...] = (TOKENS,)
    ) -> None:
        self.tally = Tally()
        self._client = client
        self._count = count
        self._tokens = tokens
        self._expected: dict[int, tuple[int, ...]] = {}
        self._over = False

    async def learn(self) -> None:
        """Hear every answer once while nobody disturbs; shorter ones are their beginnings."""
        for seed in range(QUESTIONS):
            heard = await hear(self._client, prompt(self._client, seed), max(self._tokens))
            if heard.error or len(heard.ids) != max(self._tokens):
                raise SystemExit(f"chaos.py: nothing to compare with: {heard.error or heard.ids}")
            self._expected[seed] = heard.ids

    @contextlib.asynccontextmanager
    async def asking(self) -> AsyncIterator[Tally]:
        """All ask while the block runs; afterwards every answer that was begun is finished."""
        async with asyncio.TaskGroup() as tasks:
            for number in range(self._count):
                tasks.create_task(self._ask(number))
            try:
                yield self.tally
            finally:
                self._over = True

    async def _ask(self, number: int) -> None:
        tokens = self._tokens[number % len(self._tokens)]
        for turn in itertools.count(number):
            if self._over:
                return
            seed = turn % QUESTIONS
            heard = await hear(self._client, prompt(self._client, seed), tokens)
            self.tally.add(heard, self._expected[seed][:tokens])


class Memory:
    """Resident bytes of some processes over time."""

    def __init__(self, pids: dict[str, int]) -> None:
        self._pids = pids
        self._samples: dict[str, list[tuple[float, float]]] = {name: [] for name in pids}
        self._began_s = time.monotonic()

    async def watch(self) -> None:
        while True:
            for name, pid in self._pids.items():
                at = time.monotonic() - self._began_s
                self._samples[name].append((at, float(psutil.Process(pid).memory_info().rss)))
            await asyncio.sleep(SAMPLE_S)

    def figures(self) -> dict[str, Any]:
        """Growth in ten minutes, as a share, and what the processes held at the end."""
        found: dict[str, Any] = {}
        for name, samples in self._samples.items():
            warm_s = samples[-1][0] * WARM_SHARE
            found[f"{name}_slope_10min"] = slope_share(samples, warm_s, SLOPE_S)
            found[f"{name}_mib"] = samples[-1][1] / 2**20
        return found


def client_of(swarm: Replicas, name: str, **settings: Any) -> AsyncClient:
    home, known = swarm.home / name, tuple(swarm.bootstrap)
    return AsyncClient(config=ClientConfig(known, home, model=swarm.model, **settings))


# --- loop -----------------------------------------------------------------------------------------


async def loop(
    swarm: Replicas,
    minutes: float,
    every_s: float,
    sessions: int,
    seed: int,
    said: Callable[[str], None],
) -> dict[str, Any]:
    rng, spared = random.Random(seed), 1
    kills = 0
    async with client_of(swarm, "client") as client:
        await online(client, swarm.ids())
        callers = Callers(client, sessions)
        await callers.learn()
        memory = Memory({"client": psutil.Process().pid, "peer": swarm.peers[spared].pid})
        starting: set[asyncio.Task[None]] = set()
        until_s = time.monotonic() + minutes * 60
        async with callers.asking() as tally, _running(memory.watch()):
            while time.monotonic() + every_s <= until_s:
                await asyncio.sleep(every_s)
                victim = _victim(swarm, spared, rng)
                if victim is not None:
                    kills += 1
                    swarm.peers[victim].send(signal.SIGKILL)
                    starting.add(asyncio.create_task(_start_again(swarm, victim)))
                said(f"{kills} killed, {tally.answers} answers, {len(tally.errors)} wrong")
        await asyncio.gather(*starting)
    told = {"kills": kills, **callers.tally.figures(), **memory.figures()}
    told["tracebacks"] = swarm.tracebacks()
    told["met"] = (
        callers.tally.same == callers.tally.answers > 0
        and told["client_slope_10min"] < SLOPE
        and told["peer_slope_10min"] < SLOPE
    )
    return told


def _victim(swarm: Replicas, spared: int, rng: random.Random) -> int | None:
    """A living peer whose stage another one serves."""
    living = [number for number in range(len(swarm.peers)) if swarm.lives(number)]
    held = [swarm.stage_of(number) for number in living]
    fair = [n for n in living if n != spared and held.count(swarm.stage_of(n)) > 1]
    return rng.choice(fair) if fair else None


async def _start_again(swarm: Replicas, number: int) -> None:
    """The supervisor: a peer that has ended is started again at once."""
    await asyncio.to_thread(swarm.peers[number].wait)
    swarm.restart(number)
    await asyncio.to_thread(swarm.peers[number].wait_for, "address", READY_S)


@contextlib.asynccontextmanager
async def _running(work: Any) -> AsyncIterator[None]:
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


# --- rolling --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Leaving:
    """How one peer went."""

    announced_s: float
    exit_s: float
    status: int


async def rolling(swarm: Replicas, sessions: int, said: Callable[[str], None]) -> dict[str, Any]:
    """Most callers want short answers, and every tenth one that outlasts a draining."""
    tokens = (*([8] * 9), 64)
    leavings: list[Leaving] = []
    async with client_of(swarm, "client") as client, client_of(swarm, "observer") as observer:
        await online(client, swarm.ids())
        callers = Callers(client, sessions, tokens)
        await callers.learn()
        began_s = time.monotonic()
        async with callers.asking() as tally:
            for number in range(len(swarm.peers)):
                leavings.append(await _leave(swarm, number, observer))
                swarm.restart(number)
                await asyncio.to_thread(swarm.peers[number].wait_for, "address", READY_S)
                await online(client, [swarm.id_of(number)])
                last = leavings[-1]
                said(
                    f"peer {number}: draining seen after {last.announced_s:.1f} s, exit "
                    f"{last.status} after {last.exit_s:.1f} s; {tally.answers} answers, "
                    f"{len(tally.errors)} wrong"
                )
        took_s = time.monotonic() - began_s
    told = {
        **callers.tally.figures(),
        "sessions": sessions,
        "answers_per_s": callers.tally.answers / took_s,
        "tokens_per_s": callers.tally.tokens / took_s,
        "restarts": len(leavings),
        "draining_seen_max_s": max(item.announced_s for item in leavings),
        "exit_max_s": max(item.exit_s for item in leavings),
        "statuses": sorted({item.status for item in leavings}),
        "tracebacks": swarm.tracebacks(),
    }
    told["met"] = (
        callers.tally.same == callers.tally.answers > 0
        and told["draining_seen_max_s"] <= DRAINING_S
        and told["exit_max_s"] <= LEFT_S
        and told["statuses"] == [0]
    )
    return told


async def _leave(swarm: Replicas, number: int, observer: AsyncClient) -> Leaving:
    """Tell a peer to end; when others could read that it drains, and when it had ended."""
    peer, process = swarm.id_of(number), swarm.peers[number]
    process.send(signal.SIGTERM)
    began_s = time.monotonic()
    ended: list[float] = []
    gone = asyncio.create_task(asyncio.to_thread(process.wait, EXIT_S))
    gone.add_done_callback(lambda _: ended.append(time.monotonic() - began_s))
    seen_s = await _draining_seen(observer, peer, gone) - began_s
    status = await gone
    return Leaving(seen_s, ended[0], status)


async def _draining_seen(observer: AsyncClient, peer: PeerId, gone: asyncio.Task[int]) -> float:
    """When the directory said so; infinity if the peer ended without a word of it."""
    while True:
        over = gone.done()  # before the reading: what was said before the end is still to be read
        states = {item.peer: item.state for item in await announced(observer)}
        if states.get(peer) == "draining":
            return time.monotonic()
        if over:
            return float("inf")
        await asyncio.sleep(0.1)


# --- bootstraps -----------------------------------------------------------------------------------


async def bootstraps(
    swarm: Replicas, minutes: float, sessions: int, said: Callable[[str], None]
) -> dict[str, Any]:
    async with client_of(swarm, "client") as client:
        await online(client, swarm.ids())
        callers = Callers(client, sessions)
        await callers.learn()
        for seed in swarm.seeds:
            seed.end(signal.SIGKILL)
        until_s = time.monotonic() + minutes * 60
        async with callers.asking() as tally:
            while time.monotonic() < until_s:
                await asyncio.sleep(min(5.0, max(0.0, until_s - time.monotonic())))
                said(f"{tally.answers} answers, {len(tally.errors)} wrong")
        joined_s, seen_s = await _newcomer(swarm, client)
    told = {
        **callers.tally.figures(),
        "bootstraps_killed": len(swarm.seeds),
        "minutes": minutes,
        "newcomer_serves_s": joined_s,
        "newcomer_seen_s": seen_s,
        "tracebacks": swarm.tracebacks(),
    }
    told["met"] = callers.tally.same == callers.tally.answers > 0 and joined_s <= JOINED_S
    return told


async def _newcomer(swarm: Replicas, client: AsyncClient) -> tuple[float, float]:
    """Start a peer that knows dead bootstraps and another's remembered peers: the seconds until it
    serves, loading included, and until a client can see it."""
    home = swarm.home / f"peer-{len(swarm.peers)}"
    home.mkdir()
    shutil.copy(swarm.home / "peer-0" / "peers.json", home)
    began_s = time.monotonic()
    process = swarm.spawn_peer(swarm.stages[0])
    await asyncio.to_thread(process.wait_for, "address", READY_S)
    joined_s = time.monotonic() - began_s
    await online(client, [swarm.id_of(len(swarm.peers) - 1)])
    return joined_s, time.monotonic() - began_s
