"""Many sessions through one client: no error, no hang, and all memory for KV comes back."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from hexswarm.blocking import Client
from hexswarm.client import AsyncClient
from hexswarm.conversation import Completion
from tests.end_to_end.conftest import POOL
from tests.end_to_end.swarm import LocalSwarm, until, whole_pool_is_free

pytestmark = pytest.mark.end_to_end


def prompts(count: int) -> list[list[int]]:
    """Prompts of different lengths."""
    return [[7 + number % 11] * (1 + number % 23) for number in range(count)]


async def ask(
    local: LocalSwarm, in_a_row: int, at_once: int, tokens: int
) -> tuple[Sequence[Completion], Sequence[Completion]]:
    """The answers of so many requests in a row, then of so many at once."""
    async with AsyncClient(
        local.bootstrap, model=local.model, home=local.home / f"load-{in_a_row}"
    ) as client:
        rowed = [
            await client.generate(prompt, max_new_tokens=tokens) for prompt in prompts(in_a_row)
        ]
        tasks = (client.generate(prompt, max_new_tokens=tokens) for prompt in prompts(at_once))
        return rowed, await asyncio.gather(*tasks)


def check(rowed: Sequence[Completion], together: Sequence[Completion], tokens: int) -> None:
    """All complete, and equal prompts got equal answers, however many were asked at once."""
    alone = {
        tuple(prompt): answer.ids for prompt, answer in zip(prompts(len(rowed)), rowed, strict=True)
    }
    for prompt, answer in zip(prompts(len(together)), together, strict=True):
        assert answer.finish == "stop" or len(answer.ids) == tokens
        assert answer.ids == alone.get(tuple(prompt), answer.ids)
    for answer in rowed:
        assert answer.finish == "stop" or len(answer.ids) == tokens


def test_twenty_in_a_row_then_sixteen_at_once(tiny_swarm: LocalSwarm, tiny_client: Client) -> None:
    check(*asyncio.run(ask(tiny_swarm, 20, 16, 8)), 8)
    until(lambda: whole_pool_is_free(tiny_client, POOL), 15, "all KV has come back")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_hundred_in_a_row_then_fifty_at_once(swarm: LocalSwarm) -> None:
    """With the default model, as the issue asks."""

    async def bounded() -> tuple[Sequence[Completion], Sequence[Completion]]:
        async with asyncio.timeout(840):
            return await ask(swarm, 200, 50, 8)

    check(*asyncio.run(bounded()), 8)
