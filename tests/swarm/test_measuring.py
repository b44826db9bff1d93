"""Ways measured over the in-memory network, on virtual time; what strangers may not cause."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import pytest

from hexswarm.links import BULK, STEP
from hexswarm.measuring import (
    ASK_S,
    ASKS_AT_ONCE,
    ASKS_EACH,
    ASKS_S,
    CASUAL_S,
    MAX_ASKED,
    MAX_PROBE_BYTES,
    MEASURE_S,
    PROBE_AGAIN_S,
    PROBE_BYTES,
    PROBE_EVERY_S,
    PROBES_EACH,
    REMEMBER_S,
)
from hexswarm.messages import GoAway, Measure, Measured, Pong, Probe, Probed
from hexswarm.meter import LEAST_S
from hexswarm.records import PeerId
from tests import virtual
from tests.swarm.test_links import A, B, C, Node, nodes, scenario, settle

D = PeerId("D")
LATE = pytest.approx(0.0, abs=1e-6)


def about(value: float) -> Any:
    return pytest.approx(value, rel=1e-6)


async def now() -> float:
    return asyncio.get_running_loop().time()


# --- round trips ----------------------------------------------------------------------------------


@scenario
async def test_a_way_is_measured_even_to_somebody_new() -> None:
    async with nodes(A, B, delay_s=0.04) as (a, b):
        way = await a.links.measure(B, ("/x",))
        assert way is not None
        assert (way.rtt_s, way.jitter_s, way.bytes_per_s) == (about(0.08), LATE, math.inf)
        assert not way.relayed
        assert a.links.ways == {B: way}
        assert a.links.rtts == {B: way.rtt_s}
        assert b.links.ways == {}, "it did not measure"
        assert a.reads.empty(), "no session hears of it"
        assert not any(link.used for node in (a, b) for link in node.links._links[_other(node)])


def _other(node: Node) -> PeerId:
    return B if node.peer == A else A


@scenario
async def test_the_next_ping_goes_when_the_pong_came() -> None:
    """Pings in a row would measure each other's queues on a narrow way."""
    async with nodes(A, B, delay_s=0.05) as (a, b):
        await a.reach(b)
        begun = await now()
        await a.links.measure(B, (), samples=4)
        assert await now() - begun == about(0.4)


@scenario
async def test_jitter_is_measured_under_changing_delay() -> None:
    async with nodes(A, B) as (a, b):
        await a.reach(b)
        for n in range(16):
            a.network.shape(A, B, delay_s=0.07 if n % 4 == 3 else 0.05)
            a.links.ping(B)
            await settle()
        way = a.links.ways[B]
        assert way.rtt_s == about(0.1)
        assert way.jitter_s == about(0.02), "the 95th percentile of the way one way"


@scenario
async def test_nobody_waits_longer_than_the_limit() -> None:
    async with nodes(A, B) as (a, b):
        await a.reach(b)
        a.network.freeze(A, B)
        begun = await now()
        assert await a.links.measure(B, ()) is None
        assert await a.links.measure(C, ()) is None, "nobody of that name"
        assert await now() - begun == about(MEASURE_S)
        a.network.cut(A, B)


@scenario
async def test_what_came_before_the_limit_counts() -> None:
    async with nodes(A, B, delay_s=0.4) as (a, b):
        await a.reach(b)
        way = await a.links.measure(B, (), samples=100)
        assert way is not None
        assert way.rtt_s == about(0.8)


@scenario
async def test_many_are_measured_at_the_same_time() -> None:
    async with nodes(A, B, C, delay_s=0.1) as (a, _, _):
        a.network.shape(A, C, delay_s=0.3)
        begun = await now()
        ways = await a.links.measure_all([(B, ()), (C, ()), (D, ())], samples=2, within_s=3.5)
        assert {peer: way.rtt_s for peer, way in ways.items()} == {B: about(0.2), C: about(0.6)}
        assert await now() - begun == about(3.0), (
            "as long as the farthest, three round trips of dialling"
        )
        assert await a.links.measure_all([]) == {}


@scenario
async def test_a_link_that_ends_ends_the_waiting() -> None:
    async with nodes(A, B, C) as (a, b, c):
        await a.reach(b)
        await a.reach(c)
        a.network.freeze(A, B)
        waiting = [
            asyncio.create_task(a.links.measure(B, ())),
            asyncio.create_task(a.links.ask(B, C, ())),
        ]
        await asyncio.sleep(0.1)
        begun = await now()
        a.network.cut(A, B)
        assert await asyncio.gather(*waiting) == [None, None]
        assert await now() == begun


@scenario
async def test_ways_are_remembered_for_a_while() -> None:
    async with nodes(A, B) as (a, _):
        way = await a.links.measure(B, ())
        a.network.cut(A, B)
        await settle()
        assert a.links.rtts == {}, "of neighbours only"
        assert a.links.ways == {B: way}
        await asyncio.sleep(REMEMBER_S - 5)
        assert a.links.ways == {B: way}
        await asyncio.sleep(10)
        assert a.links.ways == {}
        assert a.links._measuring._meters == {}


@scenario
async def test_a_way_through_relays_is_marked() -> None:
    async with nodes(A, B, C) as (a, _, _):
        relayed = ("/ip4/1.2.3.4/tcp/1/p2p/x/p2p-circuit",)
        assert (await a.links.measure(B, relayed)).relayed  # type: ignore[union-attr]
        mixed = (*relayed, "/ip4/1.2.3.4/tcp/2")
        assert not (await a.links.measure(C, mixed)).relayed  # type: ignore[union-attr]


@scenario
async def test_pongs_of_others_do_not_count() -> None:
    """Else a neighbour could shorten the way to another one, if it saw its nonce."""
    async with nodes(A, B, C) as (a, b, c):
        await a.reach(b)
        await a.reach(c)
        a.network.freeze(A, B)
        a.links.ping(B)
        (nonce,) = a.links._measuring._pings
        c.links.tell(A, Pong(nonce))
        await settle()
        assert a.links.ways == {}
        a.network.heal(A, B)
        await settle()
        assert set(a.links.ways) == {B}


@scenario
async def test_a_link_made_to_measure_alone_ends() -> None:
    """And quietly: it never carried anything, so nobody misses it."""
    async with nodes(A, B, C) as (a, b, c):
        await a.links.measure(B, ())
        await a.links.measure(C, ())
        await a.reach(c)
        await asyncio.sleep(CASUAL_S - 5)
        assert a.links.connected(B)
        await a.links.measure(B, (), samples=1)
        await asyncio.sleep(CASUAL_S - 5)
        assert a.links.connected(B), "measured again meanwhile"
        await asyncio.sleep(10)
        assert not a.links.connected(B)
        assert a.links.connected(C), "somebody wanted that one"
        assert B in a.links.ways
        await asyncio.gather(a.links.measure(B, ()), b.links.measure(C, ()), c.reach(b))


@scenario
async def test_a_link_that_a_session_uses_stays() -> None:
    async with nodes(A, B, C) as (a, b, c):
        await a.links.measure(B, ())
        await a.links.measure(C, ())
        a.say(b, 1)
        a.links.watch(C)
        await asyncio.sleep(3 * CASUAL_S)
        assert sorted(a.links.peers()) == [B, C]
        assert a.lost == b.lost == c.lost == []


# --- on behalf of others --------------------------------------------------------------------------


@scenario
async def test_a_neighbour_measures_its_way_to_a_third() -> None:
    async with nodes(A, B, C, delay_s=0.01) as (a, b, _):
        a.network.shape(B, C, delay_s=0.06)
        await a.reach(b)
        begun = await now()
        way = await a.links.ask(B, C, ())
        assert way is not None
        assert (way.rtt_s, way.bytes_per_s) == (about(0.12), math.inf)
        assert await now() - begun < 1.0
        assert a.links.peers() == [B], "we do not go there ourselves"
        assert set(b.links.ways) == {C}


@scenario
async def test_whom_nobody_reaches_is_not_known() -> None:
    async with nodes(A, B) as (a, b):
        assert await a.links.ask(B, C, ()) is None, "no link"
        await a.reach(b)
        begun = await now()
        assert await a.links.ask(B, C, ()) is None
        assert await now() - begun < MEASURE_S
        a.network.freeze(A, B)
        begun = await now()
        assert await a.links.ask(B, C, ()) is None
        assert await now() - begun == about(ASK_S)
        a.network.cut(A, B)


@scenario
async def test_who_asks_too_much_gets_no_more() -> None:
    """The answer comes at once, and nothing is measured for it; later it may ask again."""
    async with nodes(A, B, C) as (a, b, _):
        await a.reach(b)
        for _ in range(ASKS_EACH):
            assert await a.links.ask(B, C, ()) is not None
        begun = await now()
        assert await a.links.ask(B, C, ()) is None
        assert await now() - begun < 0.1
        await asyncio.sleep(ASKS_S)
        assert await a.links.ask(B, C, ()) is not None


@scenario
async def test_few_are_measured_at_once() -> None:
    async with nodes(A, B, C, delay_s=0.01) as (a, b, c):
        a.network.shape(B, C, delay_s=0.2)
        await a.reach(b)
        await b.reach(c)
        answers = await asyncio.gather(*(a.links.ask(B, C, ()) for _ in range(ASKS_AT_ONCE + 3)))
        assert sum(way is not None for way in answers) == ASKS_AT_ONCE
        assert b.links._measuring._tasks == set()


@scenario
async def test_questions_of_our_own_are_bounded() -> None:
    async with nodes(A, B) as (a, b):
        await a.reach(b)
        a.network.freeze(A, B)
        asking = [asyncio.create_task(a.links.ask(B, C, ())) for _ in range(MAX_ASKED + 9)]
        await asyncio.sleep(0.1)
        assert len(a.links._measuring._asked) == MAX_ASKED
        assert sum(task.done() for task in asking) == 9
        await asyncio.gather(*asking)
        assert a.links._measuring._asked == {}
        a.network.cut(A, B)


@scenario
async def test_answers_of_others_or_about_others_do_not_count() -> None:
    async with nodes(A, B, C) as (a, b, c):
        await a.reach(b)
        await a.reach(c)
        a.network.freeze(A, B)
        asking = asyncio.create_task(a.links.ask(B, D, ()))
        await asyncio.sleep(0.1)
        (nonce,) = a.links._measuring._asked
        c.links.tell(A, Measured(nonce, D, 0.001, 0.0, 0.0))
        a.links._measuring.take(B, Measured(nonce, C, 0.001, 0.0, 0.0), 0, 0.0)
        assert await asking is None
        a.network.cut(A, B)


@scenario
async def test_closing_ends_what_is_under_way() -> None:
    async with nodes(A, B, C) as (a, b, c):
        await a.reach(b)
        await b.reach(c)
        a.network.freeze(B, C)
        asking = asyncio.create_task(a.links.ask(B, C, ()))
        await asyncio.sleep(0.1)
        await b.links.close()
        assert await asking is None
        measuring = asyncio.create_task(a.links.measure(C, ()))
        await asyncio.sleep(0.1)
        await a.links.close()
        await measuring
        a.network.heal(B, C)


# --- bandwidth ------------------------------------------------------------------------------------


@scenario
async def test_a_probe_tells_both_sides_how_fast_the_line_is() -> None:
    async with nodes(A, B, delay_s=0.02) as (a, b):
        a.network.shape(A, B, bytes_per_s=1e6)
        a.network.shape(B, A, bytes_per_s=4e6, one_way=True)
        await a.links.measure(B, ())
        assert a.links.up_bytes_per_s is None
        assert b.links.down_bytes_per_s is None
        assert a.links.probe([C, B]) == B
        await settle()
        assert a.links.up_bytes_per_s == pytest.approx(1e6, rel=0.02)
        assert a.links.ways[B].bytes_per_s == pytest.approx(1e6, rel=0.02)
        assert b.links.down_bytes_per_s == pytest.approx(1e6, rel=0.02)
        assert a.links.down_bytes_per_s is b.links.up_bytes_per_s is None
        await a.links.measure(B, ())
        told = await b.links.measure(A, ())
        assert told is not None
        assert told.bytes_per_s == math.inf
        assert a.reads.empty()
        assert b.reads.empty()


@scenario
async def test_others_are_told_of_the_bandwidth() -> None:
    async with nodes(A, B, C) as (a, b, c):
        a.network.shape(B, C, bytes_per_s=2e6)
        await a.reach(b)
        await b.reach(c)
        b.links.probe([C])
        await settle()
        way = await a.links.ask(B, C, ())
        assert way is not None
        assert way.bytes_per_s == pytest.approx(2e6, rel=0.02)


@scenario
async def test_traffic_of_sessions_is_measured_by_who_gets_it() -> None:
    async with nodes(A, B) as (a, b):
        a.network.shape(A, B, bytes_per_s=3e6)
        await a.reach(b)
        a.links.watch(B)
        b.links.watch(A)
        a.links.send(B, [(GoAway(1), bytes(1 << 20))], BULK)
        await settle()
        assert b.links.down_bytes_per_s == pytest.approx(3e6, rel=0.01)
        a.links.send(B, [(GoAway(1), bytes(1 << 20))], STEP)
        await settle()
        assert len(b.links._measuring._meters[A]._arrived) == 1, "steps are not timed"


@scenario
async def test_a_line_without_limit_counts_as_a_gigabit() -> None:
    async with nodes(A, B) as (a, b):
        await a.links.measure(B, ())
        a.links.probe([B])
        await settle()
        assert b.links.down_bytes_per_s == pytest.approx(PROBE_BYTES / LEAST_S, rel=0.01)


@scenario
async def test_probes_are_few() -> None:
    """One in five seconds, each neighbour again after ten minutes, and none beside sessions."""
    async with nodes(A, B, C) as (a, b, c):
        await a.reach(b)
        await a.reach(c)
        assert a.links.probe([B, C]) == B
        assert a.links.probe([B, C]) is None
        await asyncio.sleep(PROBE_EVERY_S)
        a.links.send(B, [(GoAway(1), bytes(1 << 17))], BULK)
        assert a.links.probe([B, C]) is None, "somebody's prompt is under way"
        await asyncio.sleep(PROBE_EVERY_S)
        a.say(c, 1)
        assert a.links.probe([B, C]) is None, "somebody's steps are under way there"
        await asyncio.sleep(PROBE_EVERY_S)
        assert a.links.probe([B, C]) == C
        await asyncio.sleep(PROBE_AGAIN_S / 2)
        assert a.links.probe([B, C]) is None
        await asyncio.sleep(PROBE_AGAIN_S / 2)
        assert a.links.probe([B, C]) == B


@pytest.mark.parametrize(("count", "size"), [(1, MAX_PROBE_BYTES + 1), (PROBES_EACH + 1, 9)])
def test_a_neighbour_that_floods_us_is_lost(count: int, size: int) -> None:
    async def act() -> None:
        async with nodes(A, B) as (a, b):
            await b.reach(a)
            a.links.watch(B)  # a guest's payload would be refused unread
            for nonce in range(count - 1):
                b.links.tell(A, Probe(nonce), bytes(size), BULK)
            await settle()
            assert a.lost == []
            b.links.tell(A, Probe(99), bytes(size), BULK)
            await settle()
            assert "probe" in a.lost[0][1]
            await b.reach(a)

    virtual.run(act())


@scenario
async def test_a_minute_later_probes_are_welcome_again() -> None:
    async with nodes(A, B) as (a, b):
        await b.reach(a)
        for nonce in range(3 * PROBES_EACH):
            b.links.tell(A, Probe(nonce), b"", BULK)
            await asyncio.sleep(60 / PROBES_EACH + 0.1)
        assert a.lost == []


@scenario
async def test_claims_of_speed_are_believed_within_what_we_saw() -> None:
    async with nodes(A, B, C, delay_s=0.05) as (a, b, c):
        a.network.shape(A, B, bytes_per_s=1e6)
        await a.reach(b)
        await a.reach(c)
        await a.links.measure(B, ())
        b.links._measuring.take = lambda *_: None  # type: ignore[method-assign, assignment]
        a.links.probe([B])
        (nonce,) = a.links._measuring._probes
        c.links.tell(A, Probed(nonce, 1e15))
        await asyncio.sleep(0.05 + PROBE_BYTES / 1e6)
        assert a.links.up_bytes_per_s is None, "C was not asked"
        b.links.tell(A, Probed(nonce, 1e15))
        b.links.tell(A, Probed(nonce, 1e15))
        await settle()
        assert a.links.up_bytes_per_s is not None
        assert a.links.up_bytes_per_s < 1e7
        assert len(a.links._measuring._meters[B]._sent) == 1


@scenario
async def test_unknown_words_change_nothing() -> None:
    async with nodes(A, B) as (a, b):
        await a.reach(b)
        b.links.tell(A, Probed(5, 1e9))
        b.links.tell(A, Measured(5, C, 0.1, 0.0, 0.0))
        b.links.tell(A, Measure(5, B, ()))
        await settle()
        assert a.links.up_bytes_per_s is None
        assert a.lost == b.lost == []


@scenario
async def test_recent_partners_are_known() -> None:
    async with nodes(A, B, C) as (a, b, c):
        await a.reach(b)
        await a.reach(c)
        a.say(b, 1)
        await settle()
        assert a.links.used_within(10) == [B]
        assert b.links.used_within(10) == [A]
        await asyncio.sleep(20)
        assert a.links.used_within(10) == []
