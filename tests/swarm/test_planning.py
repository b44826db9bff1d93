"""What a client chooses, measures and learns, over a swarm in memory."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest

from hexswarm import planning
from hexswarm.errors import NoRoute, Refused, UsageError
from hexswarm.opening import next_spare
from hexswarm.options import Wishes
from hexswarm.planning import without_habits
from hexswarm.records import Link, PeerId, Route, RouteRequest, Span, Stage
from tests import virtual
from tests.asking import PROMPT, SPARED, THREE, client, scenario
from tests.world import World

P0, P1, P2, P3 = (PeerId(f"p{number}") for number in range(4))


def peers(route: Route) -> list[str]:
    return [stage.peer for stage in route.stages]


def counted(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The requests that the router is asked from now on."""
    asked: list[Any] = []
    real = planning.find_route

    def find_route(view: Any, request: Any, now: float, rng: Any) -> Route:
        asked.append(request)
        return real(view, request, now, rng)

    monkeypatch.setattr(planning, "find_route", find_route)
    return asked


# --- measuring ------------------------------------------------------------------------------------


@scenario
async def test_every_way_of_a_route_is_measured_before_it_is_used() -> None:
    async with client(*THREE) as (_, c):
        plan = await c.plan(8, 4)
        assert plan.route.unmeasured == ()
        assert [hop.origin for hop in plan.budget().hops] == ["measured"] * 3
        assert all(hop.rtt_s == pytest.approx(0.02) for hop in plan.budget().hops)
        took_s = plan.route.tpot_s
        assert took_s == pytest.approx(sum(_sum(hop) for hop in plan.budget().hops))
        assert took_s > 0.03, "three ways of 10 ms"


def _sum(hop: Any) -> float:
    return float(hop.compute_s + hop.queue_s + hop.link_s + hop.serialise_s)


@scenario
async def test_a_newcomer_takes_the_best_route_at_its_first_request() -> None:
    """Ways that nobody knows count as none: routes over them look best until each is measured."""
    async with client(*THREE, *THREE, (2, 4)) as (_, c):
        assert peers((await c.plan(8, 40)).route) == ["p0", "p1", "p2"]


def test_one_route_is_chosen_in_each_turn_of_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many are asked for at once: pings are answered in between."""
    turns, chosen_at = 0, list[int]()
    real = planning.find_route

    def find_route(*given: Any) -> Route:
        chosen_at.append(turns)
        return real(*given)

    async def count() -> None:
        nonlocal turns
        while len(chosen_at) < 50:
            turns += 1
            await asyncio.sleep(0)

    async def act() -> None:
        async with client(*THREE) as (_, c):
            await c.plan(8, 4)
            monkeypatch.setattr(planning, "find_route", find_route)
            await asyncio.gather(count(), *(c.plan(8, 4) for _ in range(50)))
            assert len({*chosen_at}) == 50

    virtual.run(act())


@scenario
async def test_what_was_measured_is_not_measured_again() -> None:
    async with client(*THREE) as (_, c):
        await c.plan(8, 4)
        began_s = asyncio.get_running_loop().time()
        await c.plan(8, 4)
        assert asyncio.get_running_loop().time() == began_s


@scenario
async def test_a_peer_that_does_not_answer_is_passed_over_within_seconds() -> None:
    async with client(*SPARED) as (w, c):
        w.network.freeze(P1)
        began_s = asyncio.get_running_loop().time()
        plan = await c.plan(8, 4)
        assert peers(plan.route) == ["p0", "p3", "p2"]
        assert asyncio.get_running_loop().time() - began_s < planning.MEASURE_ALL_S + 1.0
        w.network.cut(P1)


@scenario
async def test_however_many_do_not_answer_measuring_ends_within_seconds() -> None:
    async with client(*SPARED, (2, 4)) as (w, c):
        silent = [P1, P3]
        for peer in silent:
            w.network.freeze(peer)
        began_s = asyncio.get_running_loop().time()
        plan = await c.plan(8, 4)
        assert peers(plan.route) == ["p0", "p4", "p2"]
        assert asyncio.get_running_loop().time() - began_s < planning.MEASURE_ALL_S + 1.0
        for peer in silent:
            w.network.cut(peer)


@scenario
async def test_an_unchanged_swarm_is_one_snapshot() -> None:
    async with client(*THREE) as (_, c):
        await c.plan(8, 4)
        assert await c.snapshot() is await c.snapshot()


# --- wishes ---------------------------------------------------------------------------------------


@scenario
async def test_a_limit_that_can_be_kept() -> None:
    async with client(*SPARED) as (_, c):
        done = await c.generate(PROMPT, max_new_tokens=3, max_latency=10.0, ttft=60.0)
        assert len(done.ids) == 3
        assert done.route.tpot_p95_s <= 10


@scenario
async def test_a_limit_that_nobody_can_keep() -> None:
    async with client(*SPARED) as (w, c):
        with pytest.raises(NoRoute) as caught:
            await c.generate(PROMPT, max_new_tokens=3, max_latency=0.001)
        assert caught.value.binding == "tpot"
        assert 0.03 < caught.value.achievable["tpot_s"] < 0.2
        assert all(len(peer.host.table) == 0 for peer in w.peers)


@scenario
async def test_peers_to_do_without_and_peers_to_trust() -> None:
    async with client(*SPARED) as (_, c):
        assert peers((await c.plan(8, 4, deny=["p1"])).route) == ["p0", "p3", "p2"]
        assert peers((await c.plan(8, 4, allow=["p0", "p3", "p2"])).route) == ["p0", "p3", "p2"]
        assert peers((await c.plan(8, 4, trusted=["p0", "p3", "p2"])).route) == ["p0", "p3", "p2"]
        for wish in ({"deny": ["p0"]}, {"allow": ["p1"]}, {"dtypes": ["bfloat16"]}):
            with pytest.raises(NoRoute):
                await c.plan(8, 4, **wish)
        with pytest.raises(UsageError):
            await c.plan(8, 4, max_latency=-1)


@scenario
async def test_a_conversation_moves_when_its_wishes_do() -> None:
    async with client(*SPARED) as (_, c), c.conversation() as talk:
        first = await talk.generate(PROMPT, max_new_tokens=3)
        again = await talk.generate(PROMPT, max_new_tokens=3)
        assert (first.session, again.reused_tokens) == (again.session, len(PROMPT) - 1)
        moved = await talk.generate(PROMPT, max_new_tokens=3, deny=["p1"])
        assert peers(moved.route) == ["p0", "p3", "p2"]
        assert moved.session != first.session


# --- refusals -------------------------------------------------------------------------------------


def test_a_spare_is_taken_without_asking_the_router(monkeypatch: pytest.MonkeyPatch) -> None:
    async def act() -> None:
        async with client(*SPARED) as (w, c):
            await c.plan(8, 4)
            await c.plan(8, 4, deny=["p1"])  # all ways are known now
            w.peers[1].server.carry_out(w.peers[1].host.table.drain(1.0))
            asked = counted(monkeypatch)
            done = await c.generate(PROMPT, max_new_tokens=3)
            assert peers(done.route) == ["p0", "p3", "p2"]
            assert len(asked) == 1

    virtual.run(act())


def test_without_a_spare_the_router_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async def act() -> None:
        async with client(*SPARED) as (w, c):
            await c.plan(8, 4)
            for number in (1, 3):
                w.peers[number].server.carry_out(w.peers[number].host.table.drain(1.0))
            asked = counted(monkeypatch)
            with pytest.raises(Refused):
                await c.generate(PROMPT, max_new_tokens=3)
            assert {"p1", "p3"} <= asked[-1].deny

    virtual.run(act())


@scenario
async def test_a_refusal_tells_the_load() -> None:
    """A peer that turned out to be full is not asked again, until it says otherwise."""
    async with client(*SPARED) as (w, c):
        hold = w.peers[1].host.ledger.tables
        hold.lease(bytes(16), 64 * 16, 0.0)
        assert peers((await c.generate(PROMPT, max_new_tokens=3)).route) == ["p0", "p3", "p2"]
        assert "p1" in c._runtime.loads
        hold.release(bytes(16), 0.0)


@scenario
async def test_what_we_gave_back_is_free_again() -> None:
    """A stage counts our lease as taken when it grants it; nobody tells that it is free again."""
    async with client(*THREE) as (w, c):
        for _ in range(2):
            done = await c.generate(PROMPT, max_new_tokens=100)
            await w.settle()
            free = [item.free_kv_tokens for item in (await c.snapshot()).announcements]
            assert free == [1024, 1024, 1024]
        async with c.conversation() as talk:
            await talk.generate(PROMPT, max_new_tokens=30)
            await talk.generate(PROMPT, max_new_tokens=100)
            held = [item.free_kv_tokens for item in (await c.snapshot()).announcements]
            assert max(held) < 1024 - 100
        await w.settle()
        free = [item.free_kv_tokens for item in (await c.snapshot()).announcements]
        assert free == [1024, 1024, 1024]
        assert len(done.ids) == 100


@scenario
async def test_what_was_given_back_while_others_were_asked_is_free_again() -> None:
    """The answer still counts the lease that ends between the question and itself."""
    async with client(*THREE) as (w, c):
        async with c.conversation() as talk:
            await talk.generate(PROMPT, max_new_tokens=30)
            await w.settle()
            asked = asyncio.create_task(c.generate(PROMPT, max_new_tokens=3))
            await asyncio.sleep(0.005)  # half of a way
            assert len(c._runtime) == 2
        await asked
        await w.settle()
        told = [load.free_kv_tokens for _, load in c._runtime.loads.values()]
        assert max(told) < 1024 - 38, "both leases were counted"
        free = [item.free_kv_tokens for item in (await c.snapshot()).announcements]
        assert free == [1024, 1024, 1024]


def route(*names: str, unmeasured: tuple[tuple[PeerId, PeerId], ...] = ()) -> Route:
    stages = tuple(Stage(PeerId(name), Span(index, index + 1)) for index, name in enumerate(names))
    return Route(stages, 1.0, 1.0, unmeasured=unmeasured)


def test_which_spare() -> None:
    asked = RouteRequest("m", 2, 4, 8, 8)
    spares = [route("a", "b"), route("a", "c", unmeasured=((PeerId("a"), PeerId("c")),))]
    spares.append(route("d", "c"))
    assert next_spare(asked, spares, set()) is spares[0]
    assert next_spare(asked, spares, {PeerId("b")}) is spares[1]
    assert next_spare(replace(asked, tpot_s=0.1), spares, {PeerId("b")}) is spares[2]
    assert next_spare(asked, spares, {PeerId("c"), PeerId("b")}) is None


# --- habits ---------------------------------------------------------------------------------------


@scenario
async def test_the_last_route_is_a_habit_until_it_fails() -> None:
    async with client(*SPARED) as (_, c):
        spec = c.folder.spec
        assert c._planner.request(spec, 8, 4, Wishes()).previous is None
        done = await c.generate(PROMPT, max_new_tokens=3)
        asked = c._planner.request(spec, 8, 4, Wishes())
        assert asked.previous == done.route
        assert asked.warm >= {P0, P1, P2}
        assert without_habits(asked).previous is None
        c._planner.leave([P3])
        assert c._planner.request(spec, 8, 4, Wishes()).previous == done.route
        c._planner.leave([P1])
        assert c._planner.request(spec, 8, 4, Wishes()).previous is None


# --- learning -------------------------------------------------------------------------------------


@scenario
async def test_a_peer_that_announces_too_much_is_found_out() -> None:
    """p1 says 2 ms a layer and takes 40 ms a step: after two answers p3 is preferred."""
    async with client(*SPARED) as (w, c):
        w.peers[1].device.step_s = 0.04
        first = await c.generate(PROMPT, max_new_tokens=30)
        assert peers(first.route) == ["p0", "p1", "p2"]
        assert first.tpot_s is not None
        await w.settle()
        await c.generate(PROMPT, max_new_tokens=30)
        await w.settle()
        third = await c.generate(PROMPT, max_new_tokens=30)
        assert peers(third.route) == ["p0", "p3", "p2"]
        now = c._clock.monotonic()
        assert c._planner.experience.factor(P1, now) > 2


@scenario
async def test_an_answer_is_traced() -> None:
    async with client(*THREE) as (w, c):
        done = await c.generate(PROMPT, max_new_tokens=20)
        await w.settle()
        trace = await c.trace(done.session)
        assert trace == await c.trace()
        assert (trace.prompt_tokens, trace.new_tokens) == (8, 20)
        assert trace.tpot_s == done.tpot_s
        assert [hop.peer for hop in trace.hops] == ["p0", "p1", "p2"]
        assert trace.predicted_tpot_s == done.route.tpot_s
        assert trace.complete


@scenario
async def test_each_turn_of_a_conversation_is_traced() -> None:
    async with client(*THREE) as (w, c), c.conversation() as talk:
        first = await talk.generate(PROMPT, max_new_tokens=9)
        await w.settle()
        assert (await c.trace()).new_tokens == 9
        await talk.generate([*PROMPT, *first.ids], max_new_tokens=12)
        await w.settle()
        assert (await c.trace(first.session)).new_tokens == 12


@scenario
async def test_a_trace_delays_no_answer() -> None:
    """A stage that tells nothing: the answer is there at once, the session goes a second later."""
    async with client(*THREE) as (w, c):
        stream = c.stream(PROMPT, max_new_tokens=9)
        for _ in range(9):
            await anext(stream)
        w.network.freeze(P1)
        began_s = asyncio.get_running_loop().time()
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
        assert asyncio.get_running_loop().time() == began_s
        assert len(stream.completion.ids) == 9
        await w.settle(1.5)
        assert len(c._runtime) == 0
        trace = await c.trace()
        assert [hop.measured is None for hop in trace.hops] == [False, True, False]
        w.network.cut(P1)


@scenario
async def test_a_client_that_closes_waits_for_its_traces() -> None:
    async with client(*THREE) as (w, c):
        done = await c.generate(PROMPT, max_new_tokens=9)
        folder = c._tracer.folder
        await c.close()
        assert [path.stem for path in folder.glob("*.json")] == [done.session]
        await w.settle()
        assert w.clean


@scenario
async def test_a_cancelled_answer_leaves_no_trace() -> None:
    async with client(*THREE) as (w, c):
        stream = c.stream(PROMPT, max_new_tokens=50)
        await anext(stream)
        await stream.aclose()
        await w.settle()
        assert not c._tracer.folder.exists()
        with pytest.raises(UsageError, match="no trace"):
            await c.trace()


# --- peers that failed ------------------------------------------------------------------------


@scenario
async def test_the_banned_are_done_without_where_that_can_be() -> None:
    async with client(*SPARED) as (_, c):
        planner = c._planner
        planner.bans.strike(PeerId("p1"), 0.0, random.Random(1))
        plan = await c.plan(8, 3)
        assert plan.route.stages[1].peer == "p3"
        assert plan.request.deny == frozenset(), "that is no wish of the request"
        planner.bans.strike(PeerId("p3"), 0.0, random.Random(1))
        plan = await c.plan(8, 3)
        assert plan.route.stages[1].peer in ("p1", "p3"), "a banned one is better than none"


@scenario
async def test_one_on_probation_gets_few_sessions_and_some() -> None:
    async with client(*SPARED) as (_, c):
        planner, until_s = c._planner, 0.0
        await c.plan(8, 3)
        for _ in range(3):
            until_s = planner.bans.strike(PeerId("p1"), until_s, random.Random(1))
        await asyncio.sleep(until_s + 1.0)
        chosen = [(await c.plan(8, 3)).route.stages[1].peer for _ in range(100)]
        assert 0 < chosen.count(PeerId("p1")) < 20


@scenario
async def test_a_hole_is_planned_without_the_banned_and_with_them_if_need_be() -> None:
    async with client(*SPARED, (2, 4)) as (_, c):
        plan = await c.plan(8, 30)
        middle = plan.route.stages[1].peer
        others = sorted({"p1", "p3", "p4"} - {middle})
        gone = frozenset({middle})
        c._planner.bans.strike(PeerId(others[0]), 0.0, random.Random(1))
        mended = await c._planner.replan(plan, gone, 20, 18, gone)
        assert mended.route.stages[1].peer == others[1]
        assert mended.request == replace(plan.request, tpot_s=None)
        assert len(mended.budget().hops) == 3
        deny = gone | {PeerId(others[1])}
        mended = await c._planner.replan(plan, gone, 20, 18, deny)
        assert mended.route.stages[1].peer == others[0]
        with pytest.raises(NoRoute):
            await c._planner.replan(plan, gone, 20, 18, deny | {PeerId(others[0])})


async def vanish(w: World, peer: PeerId) -> None:
    """Its links end, and nothing comes back from it any more."""
    w.network.cut(peer)
    await asyncio.sleep(0.1)
    assert not w.links.connected(peer)
    w.network.heal(peer)
    w.network.freeze(peer)


@scenario
async def test_those_who_may_come_in_are_asked_at_once_whether_they_live() -> None:
    async with client(*SPARED, (2, 4)) as (w, c):
        link, told = Link(0.001), c._planner._view.told
        gone, dead, alive = frozenset({P1}), P3, PeerId("p4")
        known = list(combinations((P0, P1, P2, dead, alive, w.transport.local), 2))
        for pair in known:
            told.remember(pair, link, 0.0)
        plan = await c.plan(8, 30)
        assert peers(plan.route) == ["p0", "p1", "p2"]
        mended = await c._planner.replan(plan, gone, 20, 18, gone)
        assert peers(mended.route) == ["p0", "p3", "p2"], "the faster one"
        await vanish(w, dead)
        began_s = asyncio.get_running_loop().time()
        mended = await c._planner.replan(plan, gone, 20, 18, gone)
        assert peers(mended.route) == ["p0", "p4", "p2"], "the one that answers"
        assert asyncio.get_running_loop().time() - began_s <= planning.REPAIR_MEASURE_S
        await vanish(w, alive)
        mended = await c._planner.replan(plan, gone, 20, 18, gone)
        assert peers(mended.route) == ["p0", "p3", "p2"], "nobody answers: it may be far away"


@scenario
async def test_who_answers_is_not_taken_if_more_of_the_route_would_have_to_change() -> None:
    async with client((0, 4), (2, 4), (4, 6), (2, 4)) as (w, c):
        for pair in combinations((P0, P1, P2, P3, w.transport.local), 2):
            c._planner._view.told.remember(pair, Link(0.001), 0.0)
        plan = await c.plan(8, 30)
        stages = Stage(P0, Span(0, 2)), Stage(P1, Span(2, 4)), Stage(P2, Span(4, 6))
        plan = replace(plan, route=replace(plan.route, stages=stages))
        await vanish(w, P3)
        gone = frozenset({P1})
        mended = await c._planner.replan(plan, gone, 20, 18, gone)
        assert peers(mended.route) == ["p0", "p3", "p2"], "p0 alone would compute its part again"


@scenario
async def test_a_stage_that_goes_on_need_not_be_in_the_directory() -> None:
    async with client(*SPARED) as (_, c):
        plan = await c.plan(8, 30)
        c._member.directory.forget(PeerId("p0"))
        gone = frozenset({plan.route.stages[1].peer})
        mended = await c._planner.replan(plan, gone, 20, 18, gone)
        assert mended.route.head.peer == "p0"
        assert mended.budget().hops[0].peer == "p0"
        with pytest.raises(NoRoute):
            await c._planner.replan(plan, gone | {PeerId("p0")}, 20, 18, gone)
