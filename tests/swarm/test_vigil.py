"""While a route opens: a stage that is dead is given up soon, one that is slow is not."""

from __future__ import annotations

import asyncio
import math
from dataclasses import replace

import pytest

from hexswarm.client import AsyncClient
from hexswarm.directory import SignedAnnouncement
from hexswarm.records import PeerId, Speed
from tests import virtual
from tests.asking import PROMPT, SPARED, THREE, client, scenario
from tests.loopback import answer
from tests.world import World

MIDDLE = PeerId("p1")


def alone(w: World, c: AsyncClient) -> None:
    """Nothing else finds the dead: links bear a minute of silence, opening too, and who could stand
    in for MIDDLE is said to be so slow that nobody asks it first."""
    w.links._silence_s = 60.0
    c.config = replace(c.config, connect_s=60.0)  # type: ignore[misc]
    held = c._member.directory._records[PeerId("p3")].announcement
    slow = replace(held, sequence=held.sequence + 1, speed=Speed(0.2, 0.2, 0.2))
    c._member.directory.merge([SignedAnnouncement(slow, 1e12, b"")])


@scenario
async def test_a_stage_that_falls_silent_is_passed_over_long_before_the_deadline() -> None:
    async with client(*SPARED) as (w, c):
        alone(w, c)
        first = await c.generate(PROMPT, max_new_tokens=3)
        assert first.route.stages[1].peer == MIDDLE
        w.network.freeze(MIDDLE)
        now = asyncio.get_running_loop().time
        began_s = now()
        done = await c.generate(PROMPT, max_new_tokens=3)
        assert [stage.peer for stage in done.route.stages][1] == "p3"
        assert 1.0 < now() - began_s < 4.0
        w.network.cut(MIDDLE)


@scenario
async def test_what_comes_of_itself_is_no_answer() -> None:
    """Of a link of which one direction is dead, it may be the other that we hear."""
    async with client(*SPARED) as (w, c):
        alone(w, c)
        await c.generate(PROMPT, max_new_tokens=3)
        w.network.freeze(MIDDLE)
        real = w.links.silent_s
        w.links.silent_s = (  # type: ignore[method-assign]
            lambda peer, now: 0.0 if peer == MIDDLE else real(peer, now)
        )
        began_s = asyncio.get_running_loop().time()
        done = await c.generate(PROMPT, max_new_tokens=3)
        assert done.route.stages[1].peer == "p3"
        assert asyncio.get_running_loop().time() - began_s < 4.0
        w.network.cut(MIDDLE)


@scenario
async def test_so_is_one_that_shall_prolong_a_conversation() -> None:
    async with client(*SPARED) as (w, c), c.conversation() as talk:
        alone(w, c)
        first = await talk.generate(PROMPT, max_new_tokens=3)
        assert first.route.stages[1].peer == MIDDLE
        w.network.freeze(MIDDLE)
        now = asyncio.get_running_loop().time
        began_s = now()
        done = await talk.generate(PROMPT, max_new_tokens=50)
        assert list(done.ids) == answer(PROMPT, 50, 6)
        assert done.route.stages[1].peer == "p3"
        assert now() - began_s < 8.0
        w.network.cut(MIDDLE)


@pytest.mark.parametrize("delay_s", [0.2, 0.6, 1.0])
def test_late_answers_of_all_are_nobodys_death(delay_s: float) -> None:
    async def act() -> None:
        async with client(*THREE) as (w, c):
            await c.generate(PROMPT, max_new_tokens=3)
            for peer in ("p0", "p1", "p2"):
                w.network.shape(PeerId("client"), PeerId(peer), delay_s=delay_s)
            began_s = asyncio.get_running_loop().time()
            done = await c.generate(PROMPT, max_new_tokens=3)
            assert asyncio.get_running_loop().time() - began_s > 4 * delay_s
            assert list(done.ids) == answer(PROMPT, 3, 6)
            assert not done.mends
            assert math.isinf(c._planner.lost_s), "nobody was given up"
            await asyncio.sleep(10 * delay_s)  # what is still under way

    virtual.run(act())
