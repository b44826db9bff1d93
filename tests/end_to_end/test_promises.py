"""Promises of time by real peers: a crowd is seen before it is felt, and a promise protects."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Sequence

import pytest

from hexswarm.blocking import Client
from hexswarm.client import AsyncClient
from hexswarm.config import ClientConfig
from hexswarm.errors import NoRoute, Refused
from hexswarm.planning import Plan
from hexswarm.runtime import OpenSession
from tests.end_to_end.conftest import POOL
from tests.end_to_end.swarm import LocalSwarm, pool_is_announced_free, until

pytestmark = pytest.mark.end_to_end

CROWD = 12
PROMPT = [5, 6, 7]


@contextlib.asynccontextmanager
async def two_clients(local: LocalSwarm) -> AsyncIterator[tuple[AsyncClient, AsyncClient]]:
    """One cannot know what the other was told; neither waits for what it cannot have now."""
    known = tuple(local.bootstrap)
    homes = [local.home / name for name in ("promised-a", "promised-b")]
    async with (
        AsyncClient(config=ClientConfig(known, homes[0], model=local.model, patience_s=0)) as one,
        AsyncClient(config=ClientConfig(known, homes[1], model=local.model, patience_s=0)) as other,
    ):
        yield one, other


async def opened(client: AsyncClient, plan: Plan, budgets: Sequence[float] = ()) -> OpenSession:
    route, request = plan.route, plan.request
    session = client._runtime.open(route, request.model, request.kv_tokens, budgets=budgets)
    try:
        async with asyncio.timeout(20):
            await session.ready()
    except BaseException:
        session.close()
        raise
    return session


async def granted(client: AsyncClient, plan: Plan, budgets: Sequence[float]) -> OpenSession:
    """The same, as soon as what was computed before is no load any more.

    The budgets grow a little each time: a stage may be a few percent slower than it announced, too
    few to announce it anew.
    """
    async with asyncio.timeout(40):
        for attempt in itertools.count():
            try:
                return await opened(client, plan, [1.005**attempt * step_s for step_s in budgets])
            except Refused as error:
                if error.code not in ("slow", "busy"):
                    raise
                await asyncio.sleep(0.5)
    raise AssertionError("the count ends never")


def alone_s(plan: Plan) -> list[float]:
    """What a step takes at each stage while nobody else is there."""
    found = []
    for stage in plan.route.stages:
        speed = plan.snapshot.announcement(plan.request.model, stage.peer).speed
        head_s = speed.head_s if stage == plan.route.tail else 0.0
        found.append(len(stage.span) * speed.decode_layer_s + head_s)
    return found


@pytest.fixture(autouse=True)
def room(tiny_client: Client) -> None:
    """Nobody else is there, and new clients can know it."""
    until(lambda: pool_is_announced_free(tiny_client, POOL), 30, "all peers say that they are free")


def test_a_crowd_is_seen_before_it_is_felt(tiny_swarm: LocalSwarm) -> None:
    """Sessions that have computed nothing yet leave no room for a tight limit, and some for a
    loose one."""

    async def act() -> None:
        async with two_clients(tiny_swarm) as (one, other):
            plan = await one.plan(8, 8)
            quiet = await granted(one, plan, [2 * step_s for step_s in alone_s(plan)])
            quiet.close()
            crowd = [await opened(other, plan) for _ in range(CROWD)]
            with pytest.raises(Refused) as refused:
                await opened(one, plan, [2 * step_s for step_s in alone_s(plan)])
            assert refused.value.code == "slow"
            assert refused.value.retry_s > 0
            tight_s = sum(alone_s(plan)) * 1.2
            with pytest.raises(NoRoute) as caught:
                await one.generate(PROMPT, max_new_tokens=4, max_latency=tight_s)
            assert caught.value.binding == "tpot"
            assert caught.value.achievable["tpot_s"] > tight_s
            done = await one.generate(PROMPT, max_new_tokens=4, max_latency=5.0)
            assert len(done.ids) == 4
            for session in crowd:
                session.close()

    asyncio.run(act())


def test_a_promise_protects(tiny_swarm: LocalSwarm) -> None:
    """Against those who come later, with a limit or without, until its session ends."""

    async def act() -> None:
        async with two_clients(tiny_swarm) as (one, other):
            plan = await one.plan(8, 8)
            held = await granted(one, plan, [1.02 * step_s for step_s in alone_s(plan)])
            with pytest.raises(Refused) as refused:
                await other.generate(PROMPT, max_new_tokens=4)
            assert refused.value.code == "busy"
            with pytest.raises(NoRoute) as caught:
                await other.generate(PROMPT, max_new_tokens=4, max_latency=5.0)
            assert caught.value.binding == "tpot"
            assert "was promised" in str(caught.value)
            held.close()
            session = await granted(other, plan, [0.0] * len(plan.route.stages))
            session.close()

    asyncio.run(act())
