"""Waits of those that misbehaved: how long, and what they mean for streams."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hexswarm import lobby, waits
from hexswarm.lobby import HELLO_S, MAX_WAITING, MAX_WAITING_EACH
from hexswarm.waits import (
    BLOCK_LONGEST_S,
    BLOCK_OFFENCES,
    FIRST_S,
    FORGIVE_S,
    LONGEST_S,
    Patience,
    Strikes,
    Waits,
)
from tests.swarm.test_guests import strangers
from tests.swarm.test_links import STEP, A, Node, PeerId, answer, hello, scenario, settle

NOISE = b"\0\0\x04\0" + b"\0" * 4 + b"\xc1" * 1024


# --- how long ---------------------------------------------------------------------------------


def test_each_offence_after_a_wait_doubles_the_next() -> None:
    known, now, seen = Waits(), 0.0, []
    for _ in range(8):
        known.offend("x", "", now)
        seen.append(known.wait_s("x", "", now))
        now += seen[-1]
    assert seen == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 32.0, 32.0]
    assert known.wait_s("x", "", now) == 0.0
    assert known.wait_s("y", "", 0.0) == 0.0


def test_what_happens_within_a_wait_is_no_further_offence() -> None:
    known = Waits()
    for _ in range(100):
        known.offend("x", "", 0.0)
    assert known.wait_s("x", "", 0.0) == FIRST_S
    known.offend("x", "", FIRST_S)
    assert known.wait_s("x", "", FIRST_S) == pytest.approx(2 * FIRST_S)


def test_good_conduct_is_rewarded() -> None:
    known = Waits()
    known.offend("x", "", 0.0)
    known.offend("x", "", 1.0)
    known.offend("x", "", 3.0 + 2 * FORGIVE_S)
    assert known.wait_s("x", "", 3.0 + 2 * FORGIVE_S) == FIRST_S


def test_a_block_waits_after_many_offences_and_not_for_long() -> None:
    known, now = Waits(), 0.0
    for number in range(int(BLOCK_OFFENCES)):
        known.offend(f"x{number}", "block", now)
    assert known.wait_s("newcomer", "block", now) == 0.0
    for number in range(20):
        known.offend(f"y{number}", "block", now)
        now += known.wait_s("newcomer", "block", now)
    known.offend("z", "block", now)
    assert known.wait_s("newcomer", "block", now) == BLOCK_LONGEST_S
    assert known.wait_s("newcomer", "elsewhere", now) == 0.0


def test_one_identity_alone_makes_no_block_wait_by_what_it_does_while_it_waits() -> None:
    known = Waits()
    for _ in range(100):
        known.offend("x", "block", 0.0)
    assert known.wait_s("newcomer", "block", 0.0) == 0.0


def test_the_one_that_offended_longest_ago_is_forgotten_first() -> None:
    table = Strikes(Patience(0.0, LONGEST_S), most_keys=2)
    for key, now in (("a", 0.0), ("b", 0.1), ("a", 0.2), ("c", 0.3)):
        table.add(key, now)
    assert len(table) == 2
    assert table.wait_s("b", 0.3) == 0.0
    assert table.wait_s("a", 0.3) > 0.0


@given(st.lists(st.floats(0.0, 200.0), max_size=200))
def test_nobody_waits_longer_than_the_longest(pauses_s: list[float]) -> None:
    """Whatever somebody does, it is served again within `LONGEST_S`."""
    known, now = Waits(), 0.0
    for pause_s in pauses_s:
        known.offend("x", "b", now)
        assert 0.0 < known.wait_s("x", "b", now) <= LONGEST_S
        assert known.wait_s("y", "b", now) <= BLOCK_LONGEST_S
        now += pause_s


def test_an_honest_newcomer_waits_less_than_it_takes_to_give_up() -> None:
    assert BLOCK_LONGEST_S < HELLO_S
    assert waits.FIRST_S < HELLO_S


# --- what it means ------------------------------------------------------------------------------


@scenario
async def test_an_offender_waits_and_is_served_after_that() -> None:
    async with strangers(1) as (a, _, (bad,)):
        step, _ = await bad.link()
        step.write([NOISE])
        assert await bad.thrown_out()
        loop, a.lost = asyncio.get_running_loop(), []
        since_s = loop.time()
        stream = await bad.transport.dial(A)
        await hello(stream, STEP, bytes(16))
        assert await answer(stream) is not None
        assert FIRST_S * 0.9 < loop.time() - since_s < FIRST_S * 1.5


@scenario
async def test_nobody_else_waits_meanwhile() -> None:
    async with strangers(1) as (a, _, (bad,)):
        step, _ = await bad.link()
        step.write([NOISE])
        assert await bad.thrown_out()
        since_s = asyncio.get_running_loop().time()
        newcomer = Node(a.network, PeerId("newcomer"))
        await newcomer.links.start(listen=False)
        await newcomer.reach(a)
        assert asyncio.get_running_loop().time() - since_s < FIRST_S / 2
        await newcomer.close()
        await settle()
        a.lost.clear()


@scenario
async def test_a_partner_never_waits() -> None:
    async with strangers(1) as (a, _, (friend,)):
        step, _ = await friend.link()
        step.write([NOISE])
        assert await friend.thrown_out()
        a.lost.clear()
        a.links.watch(friend.peer)
        since_s = asyncio.get_running_loop().time()
        await friend.link()
        assert asyncio.get_running_loop().time() - since_s < FIRST_S / 2
        a.links.unwatch(friend.peer)


@asynccontextmanager
async def few_wait(most: int) -> AsyncIterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lobby, "MAX_WAITING", most)
        yield


@scenario
async def test_few_wait_and_the_rest_is_closed_on() -> None:
    async with few_wait(MAX_WAITING_EACH + 4), strangers(2) as (a, _, crowd):
        streams = []
        for bad in crowd:
            step, _ = await bad.link()
            step.write([NOISE])
            assert await bad.thrown_out()
            streams += [await bad.transport.dial(A) for _ in range(MAX_WAITING_EACH + 2)]
        await asyncio.sleep(0.1)
        assert a.links._lobby._waiting.total() == MAX_WAITING_EACH + 4
        assert max(a.links._lobby._waiting.values()) == MAX_WAITING_EACH
        closed = [stream for stream in streams if stream._outgoing._ended]
        assert len(closed) == len(streams) - MAX_WAITING_EACH - 4
        await asyncio.sleep(FIRST_S)
        assert not a.links._lobby._waiting
        a.lost.clear()
    assert MAX_WAITING_EACH < MAX_WAITING


@scenario
async def test_who_closes_does_not_wait_for_those_that_wait() -> None:
    async with strangers(1) as (a, _, (bad,)):
        step, _ = await bad.link()
        step.write([NOISE])
        assert await bad.thrown_out()
        stream = await bad.transport.dial(A)
        await asyncio.sleep(0.1)
        assert a.links._lobby._waiting
        served = list(a.links._tasks)
        a.lost.clear()
    assert all(task.done() for task in served)
    assert sum(task.cancelled() for task in served) <= 1, "the ticker"
    assert await stream.read(1) == b""
