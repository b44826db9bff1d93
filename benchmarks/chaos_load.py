"""A thousand sessions at once on one stage set that has room for some of them.

Several clients (a peer grants one client 256 sessions at most) ask for everything in the same
moment. Whoever is admitted keeps its session, and so its KV, until all others have had their
answer, so that the pool is full for as long as anybody still asks; the others must be told at the
opening, with a time after which to ask again. Three rounds: between the first and the third the
peers' memory may not grow. After each round the whole pool must be free again.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from chaos_soak import client_of
from chaos_swarm import Replicas, announced, family, online

from hexswarm.client import AsyncClient
from hexswarm.errors import HexswarmError

PROMPT_TOKENS, NEW_TOKENS = 8, 8
CLIENTS = 5
PATIENCE_S = 10.0
"""So long a client asks again by itself."""
FREE_S = 60.0
GROWTH = 0.05


class Round:
    """One rush of all sessions."""

    def __init__(self, sessions: int) -> None:
        self._sessions = sessions
        self.outcomes: Counter[str] = Counter()
        self.examples: dict[str, str] = {}
        self.waits_s: list[float] = []
        """From the rush to the first token of those that were admitted."""
        self._over = asyncio.Event()

    async def run(self, clients: list[AsyncClient]) -> None:
        async with asyncio.TaskGroup() as tasks:
            for number in range(self._sessions):
                tasks.create_task(self._one(clients[number % len(clients)], number))

    def _told(self, kind: str) -> None:
        """One more knows; after the last one all leave."""
        self.outcomes[kind] += 1
        if self.outcomes.total() == self._sessions:
            self._over.set()

    async def _one(self, client: AsyncClient, number: int) -> None:
        began_s, tokens = time.monotonic(), 0
        prompt = [100 + (number * 31 + place * 7) % 1000 for place in range(PROMPT_TOKENS)]
        async with client.conversation() as talk:
            try:
                async for _ in talk.stream(prompt, max_new_tokens=NEW_TOKENS):
                    tokens += 1
                    if tokens == 1:
                        self.waits_s.append(time.monotonic() - began_s)
                self._told("answered")
            except HexswarmError as error:
                self._failed(error, tokens)
            await self._over.wait()

    def _failed(self, error: HexswarmError, tokens: int) -> None:
        """Refused with or without a time to ask again, or lost before or after the first token."""
        retry_s = getattr(error, "retry_s", 0.0)
        if tokens:
            kind = "failed_after_first_token"
        elif retry_s > 0 or "try again in" in str(error):
            kind = "refused_with_retry"
        else:
            kind = "failed_at_open"
        self._told(kind)
        self.examples.setdefault(kind, f"{type(error).__name__}: {error}")


async def load(
    swarm: Replicas, sessions: int, rounds: int, said: Callable[[str], None]
) -> dict[str, Any]:
    found: list[Round] = []
    rss: list[list[int]] = []
    freed_s: list[float] = []
    began_s = time.monotonic()
    async with contextlib.AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(
                client_of(swarm, f"client-{number}", patience_s=PATIENCE_S)
            )
            for number in range(CLIENTS)
        ]
        for client in clients:
            await online(client, swarm.ids())
            await client.generate([5, 6, 7], max_new_tokens=2)
        for number in range(rounds):
            found.append(Round(sessions))
            await found[-1].run(clients)
            freed_s.append(await _all_free(clients[0]))
            rss.append(memory(swarm))
            told = ", ".join(f"{count} {name}" for name, count in found[-1].outcomes.items())
            said(f"round {number + 1}: {told}")
    growth = max(last / first - 1 for first, last in zip(rss[0], rss[-1], strict=True))
    total = sum((item.outcomes for item in found), Counter[str]())
    return {
        "sessions": sessions,
        "rounds": [dict(item.outcomes) for item in found],
        "examples": {name: text for item in found for name, text in item.examples.items()},
        "first_token_max_s": max(wait for item in found for wait in item.waits_s),
        "pool_free_after_s": max(freed_s),
        "peer_mib": [[value / 2**20 for value in values] for values in rss],
        "growth_1_to_last": growth,
        "deaths": sum(process.process.poll() is not None for process in swarm.peers),
        "tracebacks": swarm.tracebacks(),
        "whole_s": time.monotonic() - began_s,
        "met": total["answered"] + total["refused_with_retry"] == sessions * rounds
        and growth <= GROWTH
        and all(swarm.lives(number) for number in range(len(swarm.peers))),
    }


def memory(swarm: Replicas) -> list[int]:
    """Resident bytes of each peer with its daemon."""
    return [sum(item.memory_info().rss for item in family(peer)) for peer in swarm.peers]


async def _all_free(client: AsyncClient) -> float:
    """Wait until every peer says that its whole pool is free; the seconds it took."""
    began_s = time.monotonic()
    while time.monotonic() - began_s < FREE_S:
        if all(item.free_kv_tokens >= item.kv_tokens for item in await announced(client)):
            return time.monotonic() - began_s
        await asyncio.sleep(0.5)
    return float("inf")
