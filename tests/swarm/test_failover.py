"""Answers that go on when peers are lost, freeze, leave or grow slow: the real client on virtual
time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest

from hexswarm.bans import Bans
from hexswarm.client import AsyncClient
from hexswarm.conversation import Answer, Completion
from hexswarm.detector import ASK_AGAIN_S
from hexswarm.directory import SignedAnnouncement
from hexswarm.errors import PeerLost
from hexswarm.explained import repair_text
from hexswarm.failover import ATTEMPT_S
from hexswarm.planning import MEASURE_S, REPAIR_MEASURE_S, Planner
from hexswarm.records import Link, PeerId, Route, Span, Stage
from hexswarm.runtime import OpenSession
from hexswarm.trace import Place, Repair
from hexswarm.view import UNREACHABLE_FOR_S
from hexswarm.wards import repaired
from tests import virtual
from tests.asking import PROMPT, THREE, client, scenario
from tests.loopback import answer
from tests.world import Peer, World

TWICE = (*THREE, *THREE)
"""Three stages of two peers each: p0 to p2 are the faster ones."""
SEVEN = (*TWICE, (2, 4))

Blow = Callable[[World, Route], object]
"""What happens to a world and the route of an answer."""


def now() -> float:
    return asyncio.get_running_loop().time()


def at(route: Route, places: tuple[int, ...]) -> list[PeerId]:
    return [route.stages[place].peer for place in places]


def kill(*places: int) -> Blow:
    return lambda w, route: [w.network.cut(peer) for peer in at(route, places)]


def freeze(*places: int) -> Blow:
    return lambda w, route: [w.network.freeze(peer) for peer in at(route, places)]


def slow(step_s: float, place: int) -> Blow:
    def act(w: World, route: Route) -> None:
        host(w, route.stages[place].peer).device.step_s = step_s

    return act


def drain(exit_s: float, place: int) -> Blow:
    def act(w: World, route: Route) -> None:
        peer = host(w, route.stages[place].peer)
        peer.server.carry_out(peer.host.table.drain(exit_s))

    return act


def host(w: World, name: str) -> Peer:
    return next(peer for peer in w.peers if peer.peer == name)


def route_now(c: AsyncClient) -> Route:
    """Of the only session."""
    (session,) = c._runtime._sessions.values()
    return session.route


async def rest(stream: Answer) -> None:
    async for _ in stream:
        continue


@dataclass
class Struck:
    """An answer during which something happened."""

    done: Completion
    gap_s: float
    """Its longest."""
    before: list[str]
    """Its first route."""

    @property
    def after(self) -> list[str]:
        return [stage.peer for stage in self.done.route.stages]

    @property
    def kept(self) -> list[bool]:
        return [a == b for a, b in zip(self.before, self.after, strict=True)]


async def struck(w: World, c: AsyncClient, *blows: tuple[int, Blow], new: int = 40) -> Struck:
    """An answer during which blows fall after so many tokens."""
    left = list(blows)
    stream = c.stream(PROMPT, max_new_tokens=new)
    count, last_s, gap_s = 0, now(), 0.0
    before: list[str] = []
    while True:
        if left and left[0][0] == count:
            left.pop(0)[1](w, route_now(c))
        try:
            await anext(stream)
        except StopAsyncIteration:
            break
        if count:
            gap_s = max(gap_s, now() - last_s)
        else:
            before = [stage.peer for stage in route_now(c).stages]
        last_s, count = now(), count + 1
    assert not left
    done = stream.completion
    assert list(done.ids) == answer(PROMPT, new, 6)
    return Struck(done, gap_s, before)


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("token", [1, 5, 30])
def test_any_stage_may_die_at_any_token(place: int, token: int) -> None:
    async def act() -> None:
        async with client(*TWICE) as (w, c):
            it = await struck(w, c, (token, kill(place)))
            assert it.kept == [index != place for index in range(3)]
            assert it.gap_s < 1.0
            (mend,) = it.done.mends
            span = Span(2 * place, 2 * place + 2)
            assert mend.lost == (Place(PeerId(it.before[place]), span),)
            assert mend.by == (Place(PeerId(it.after[place]), span),)
            assert mend.stall_s == pytest.approx(it.gap_s, abs=0.2)
            assert mend.why

    virtual.run(act())


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_stage_may_die_before_the_first_token(place: int) -> None:
    async def act() -> None:
        async with client(*TWICE) as (w, c):
            begun, begin = asyncio.Event(), c._mender.begin

            def note(*args: Any) -> None:
                begin(*args)
                asyncio.get_running_loop().call_later(0.001, begun.set)

            c._mender.begin = note  # type: ignore[method-assign]
            request = asyncio.create_task(c.generate(PROMPT * 10, max_new_tokens=5))
            await begun.wait()
            kill(place)(w, route_now(c))
            done = await request
            assert list(done.ids) == answer(PROMPT * 10, 5, 6)
            assert len(done.mends) == 1

    virtual.run(act())


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_frozen_stage_is_left_within_three_seconds(place: int) -> None:
    async def act() -> None:
        async with client(*TWICE) as (w, c):
            it = await struck(w, c, (10, freeze(place)))
            assert it.kept == [index != place for index in range(3)]
            assert it.gap_s < 3.0
            assert "silent" in it.done.mends[0].why
            w.network.cut(PeerId(it.before[place]))

    virtual.run(act())


@pytest.mark.parametrize("both", [(0, 1), (1, 2), (0, 2), (0, 1, 2)])
def test_several_at_once(both: tuple[int, ...]) -> None:
    async def act() -> None:
        async with client(*TWICE) as (w, c):
            it = await struck(w, c, (10, kill(*both)))
            assert it.kept == [index not in both for index in range(3)]
            assert it.gap_s < 2.0

    virtual.run(act())


def test_a_replacement_that_falls_silent_is_left_before_its_time_is_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And its silence holds nothing up while somebody else is being chosen."""

    async def one_by_one() -> None:
        async with client(*SEVEN) as (w, c):
            chosen: list[PeerId] = []
            reroute, measure = OpenSession.reroute, Planner._measure

            def freezing(session: OpenSession, route: Route, *more: Any) -> None:
                if not chosen:
                    chosen.extend(at(route, (1,)))
                    w.network.freeze(*chosen)
                    c._planner._view.told._ways.clear()  # the next choice has to measure
                reroute(session, route, *more)

            async def in_vain(planner: Planner, *args: Any) -> None:
                if not chosen:
                    return await measure(planner, *args)
                return await asyncio.sleep(REPAIR_MEASURE_S)

            monkeypatch.setattr(OpenSession, "reroute", freezing)
            monkeypatch.setattr(Planner, "_measure", in_vain)
            it = await struck(w, c, (10, freeze(1)))
            assert (it.before[1], chosen, it.after[1]) == ("p1", ["p4"], "p6")
            assert it.gap_s < 1.6 + ATTEMPT_S, "each was suspected, and no attempt was waited for"
            w.network.heal(*chosen)

    virtual.run(one_by_one())


@scenario
async def test_the_replacement_dies_too() -> None:
    async with client(*SEVEN) as (w, c):
        it = await struck(w, c, (5, kill(1)), (9, kill(1)))
        assert it.kept == [True, False, True]
        assert len(it.done.mends) == 2


@scenario
async def test_a_replacement_that_was_dead_before_is_passed_over() -> None:
    async with client(*SEVEN) as (w, c):
        idle: list[PeerId] = []

        def both(w: World, route: Route) -> None:
            middle = [PeerId(name) for name in ("p1", "p4", "p6")]
            idle.append(next(peer for peer in middle if peer != route.stages[1].peer))
            w.network.freeze(idle[0])  # nobody knows: it has no session
            kill(1)(w, route)

        it = await struck(w, c, (5, both))
        assert it.kept == [True, False, True]
        assert it.after[1] != idle[0]
        assert it.gap_s < 4.0
        w.network.cut(idle[0])


@scenario
async def test_who_is_silent_does_not_take_over() -> None:
    """p3 is the better one, and has been frozen for seconds."""
    async with client(*TWICE, (0, 2)) as (w, c):
        for others in (["p0", "p3"], ["p0", "p6"], ["p3", "p6"]):  # the ways are known
            await c.generate(PROMPT, max_new_tokens=3, deny=others)
        w.network.freeze(PeerId("p3"))
        it = await struck(w, c, (90, kill(0)), new=100)
        assert (it.before[0], it.after[0]) == ("p0", "p6")
        assert it.gap_s < 1.0


@scenario
async def test_the_hole_is_widened_where_spans_do_not_fit() -> None:
    """Nobody else has just the layers of p1."""
    async with client((0, 2), (2, 4), (4, 6), (0, 3), (3, 6)) as (w, c):
        stages = tuple(Stage(p.peer, p.host.model.span, ("/x",)) for p in w.peers[:3])
        c._planner._previous = Route(stages, 0.0, 0.0)
        it = await struck(w, c, (5, kill(1)))
        assert "p1" not in it.after


@scenario
async def test_without_anybody_else_the_layers_are_named_in_time() -> None:
    async with client(*THREE) as (w, c):
        stream = c.stream(PROMPT, max_new_tokens=50)
        await anext(stream)
        began_s = now()
        kill(1)(w, route_now(c))
        with pytest.raises(PeerLost, match="nobody else was found for these layers") as caught:
            await rest(stream)
        assert caught.value.layers == (2, 4)
        assert "--span 2:4" in caught.value.remedy
        assert now() - began_s < 32


@scenario
async def test_a_peer_that_comes_back_is_taken_again() -> None:
    async with client(*THREE) as (w, c):

        def fall(w: World, route: Route) -> None:
            kill(1)(w, route)
            asyncio.get_running_loop().call_later(4.0, revive)

        def revive() -> None:
            w.network.heal(PeerId("p1"))
            held = c._member.directory._records[PeerId("p1")].announcement
            newer = replace(held, sequence=held.sequence + 1)
            c._member.directory.merge([SignedAnnouncement(newer, 1e12, b"")])

        it = await struck(w, c, (5, fall))
        assert it.after == ["p0", "p1", "p2"]
        assert 4.0 < it.gap_s < 6.0
        assert it.done.mends[0].lost == it.done.mends[0].by


# --- leaving ------------------------------------------------------------------------------------


@scenario
async def test_a_long_answer_moves_before_its_peer_goes() -> None:
    async with client(*TWICE) as (w, c):
        it = await struck(w, c, (10, drain(1.0, 1)), new=100)
        assert it.kept == [True, False, True]
        assert it.gap_s < 0.5
        assert it.done.mends[0].why == "leaves the swarm"


@scenario
async def test_a_short_answer_stays_with_the_peer_that_goes() -> None:
    async with client(*TWICE) as (w, c):
        it = await struck(w, c, (10, drain(60.0, 1)))
        assert it.kept == [True, True, True]
        assert it.done.mends == ()


@scenario
async def test_who_said_that_it_would_go_is_not_banned_for_going() -> None:
    async with client(*TWICE) as (w, c):
        it = await struck(w, c, (5, drain(60.0, 1)), (12, kill(1)))
        assert it.kept == [True, False, True]
        assert len(c._planner.bans) == 0


@scenario
async def test_nobody_else_so_it_stays_to_the_end() -> None:
    async with client(*THREE) as (w, c):
        it = await struck(w, c, (10, drain(1.0, 1)), new=60)
        assert it.done.mends == ()


# --- slow ---------------------------------------------------------------------------------------


@scenario
async def test_a_straggler_is_left() -> None:
    async with client(*TWICE) as (w, c):
        it = await struck(w, c, (30, slow(0.5, 1)), new=100)
        assert it.kept == [True, False, True]
        (mend,) = it.done.mends
        assert mend.why == "was slow"
        assert mend.position - len(PROMPT) - 30 <= 12


@scenario
async def test_where_all_are_slow_it_stays() -> None:
    async with client(*TWICE) as (w, c):

        def all_slow(w: World, route: Route) -> None:
            for place in range(3):
                slow(0.15, place)(w, route)

        it = await struck(w, c, (30, all_slow), new=80)
        assert it.done.mends == ()


@scenario
async def test_a_stage_that_hangs_is_left() -> None:
    async with client(*TWICE) as (w, c):
        it = await struck(w, c, (10, slow(1e5, 1)))
        assert it.kept == [True, False, True]
        assert it.gap_s < 6.0
        hung = host(w, it.before[1])
        hung.device._timer.cancel()  # type: ignore[union-attr]
        hung.host.running = None


@scenario
async def test_stages_that_cannot_reach_each_other() -> None:
    """Half open: both are alive for the client, and nothing comes from one to the other. Others are
    preferred to the one that gave way, but it stays known: if they fail, it is there."""
    async with client(*TWICE) as (w, c):
        pairs: list[list[PeerId]] = []

        def part(w: World, route: Route) -> None:
            pairs.append(at(route, (0, 1)))
            w.network.freeze(*pairs[0])

        it = await struck(w, c, (10, part))
        (left,) = (PeerId(p) for p, kept in zip(it.before, it.kept, strict=True) if not kept)
        assert left in pairs[0]
        assert it.gap_s < 8.0
        assert left in {item.peer for item in c._member.alive()}
        assert left in c._planner.bans.banned(now())
        w.network.heal(*pairs[0])


@scenario
async def test_a_way_that_was_lost_is_measured_before_another_session_takes_it() -> None:
    """It is half open still when nobody is banned any more. One session waits for the measuring;
    without it each that comes along would wait for stages to open that do not hear each other."""
    async with client(*TWICE) as (w, c):
        pair: list[PeerId] = []

        def part(w: World, route: Route) -> None:
            pair.extend(at(route, (0, 1)))
            w.network.freeze(*pair)

        await struck(w, c, (10, part))
        took_s = [await without_memory(w, c, pair) for _ in range(5)]
        assert max(took_s) < MEASURE_S + 2.0
        assert sorted(took_s)[-2] < 2.0
        w.network.heal(*pair)


@pytest.mark.parametrize("act", ["freeze", "cut"])
def test_a_way_that_held_up_an_opening_does_so_once(act: str) -> None:
    """It was well when it was measured. Whoever opens along it waits for stages that wait for each
    other, or is refused, and remembers: later sessions open as they did when all was well."""

    async def held_up() -> None:
        async with client(*TWICE) as (w, c):
            pair = PeerId("p0"), PeerId("p1")
            c._planner._view.told.remember(pair, Link(0.001), now())
            getattr(w.network, act)(*pair)
            took_s = [await without_memory(w, c, pair) for _ in range(6)]
            assert max(took_s) < c.config.connect_s + MEASURE_S + 2.0
            w.network.heal(*pair)
            await asyncio.sleep(UNREACHABLE_FOR_S)
            well_s = [await without_memory(w, c, ()) for _ in range(3)]
            assert took_s[-1] == pytest.approx(well_s[-1], abs=0.01)

    virtual.run(held_up())


async def without_memory(w: World, c: AsyncClient, avoided: Sequence[PeerId]) -> float:
    """Seconds of an answer, some time later, by a client that holds nothing against anybody; its
    route has not all of `avoided`, and stays as it is."""
    await asyncio.sleep(5)
    c._planner.bans, c._planner._previous = Bans(), None
    began_s = now()
    it = await struck(w, c)
    assert all(it.kept)
    assert not avoided or not {*avoided} <= {*it.before}
    return now() - began_s


@scenario
async def test_what_one_answer_has_found_out_the_others_know() -> None:
    """A way is cut. Where another turn has just lost it, one answer less is waited for."""
    gaps_s: list[float] = []
    for known in (False, True):
        async with client(*TWICE) as (w, c):

            def part(w: World, route: Route, c: AsyncClient = c, known: bool = known) -> None:
                head, second = at(route, (0, 1))
                w.network.freeze(head, second)
                if known:
                    c._mender._cuts[second, head] = now()

            gaps_s.append((await struck(w, c, (10, part))).gap_s)
            w.network.heal(PeerId("p0"), PeerId("p1"))
    assert gaps_s[1] < gaps_s[0] - ASK_AGAIN_S / 2


@scenario
async def test_where_only_one_end_of_a_lost_way_can_be_replaced_it_is_that_one() -> None:
    """The head does not get what the tail sends, and nobody else serves its layers."""
    async with client((0, 2), (2, 4), (4, 6), (4, 6)) as (w, c):
        it = await struck(w, c, (10, lambda w, route: w.network.freeze(*at(route, (0, 2)))))
        assert it.kept == [True, True, False]
        assert it.gap_s < 4.0
        w.network.heal(PeerId(it.before[0]), PeerId(it.before[2]))


@scenario
async def test_who_is_an_end_of_every_lost_way_is_replaced() -> None:
    """Its neighbour was replaced first, in vain: the ways of both end at the same peer."""
    spans = ((0, 2), (2, 4), (4, 6), (2, 4), (2, 4), (0, 2))
    async with client(*spans) as (w, c):

        def alone(w: World, route: Route) -> None:
            (head,) = at(route, (0,))
            for peer in ("p1", "p3", "p4"):
                w.network.freeze(head, PeerId(peer))

        it = await struck(w, c, (10, alone))
        assert (it.before[0], it.after[0]) == ("p0", "p5")
        assert it.gap_s < 8.0
        for peer in ("p1", "p3", "p4"):
            w.network.heal(PeerId("p0"), PeerId(peer))


# --- afterwards ---------------------------------------------------------------------------------


@scenario
async def test_a_dead_peer_is_not_asked_again_and_the_new_one_is_not_blamed() -> None:
    async with client(*TWICE) as (w, c):
        it = await struck(w, c, (10, kill(1)))
        dead, new = PeerId(it.before[1]), PeerId(it.after[1])
        assert dead in c._planner.bans.banned(now())
        assert c._planner.experience.factor(new, now()) == 1.0
        again = await c.generate(PROMPT, max_new_tokens=3)
        assert dead not in [stage.peer for stage in again.route.stages]
        assert again.mends == ()


@scenario
async def test_the_trace_tells_of_the_route_at_the_end_and_the_repair() -> None:
    async with client(*TWICE) as (w, c):
        it = await struck(w, c, (10, kill(1)))
        trace = await c.trace()
        assert [hop.peer for hop in trace.hops] == it.after
        assert trace.repairs == it.done.mends
        text = repair_text(trace.repairs[0])
        assert text.startswith(f"peer {it.before[1]} (layers 2-3): ")
        assert f"peer {it.after[1]} (layers 2-3) took over after" in text


@scenario
async def test_a_conversation_goes_on_along_the_mended_route() -> None:
    async with client(*TWICE) as (w, c), c.conversation() as talk:
        stream = talk.stream(PROMPT, max_new_tokens=20)
        await anext(stream)
        kill(1)(w, route_now(c))
        await rest(stream)
        first = stream.completion
        longer = [*PROMPT, *first.ids, 5]
        second = await talk.generate(longer, max_new_tokens=4)
        assert list(second.ids) == answer(longer, 4, 6)
        assert second.reused_tokens > len(PROMPT)
        assert second.mends == ()
        assert second.route.stages == first.route.stages


@scenario
async def test_logits_go_on_as_well() -> None:
    async with client(*TWICE) as (w, c):
        tokens = []
        async for row in c.logits(PROMPT, max_new_tokens=12):
            tokens.append(int(row.argmax()))
            if len(tokens) == 5:
                kill(1)(w, route_now(c))
            if len(tokens) == 8:
                await asyncio.sleep(30.0)  # the caller thinks: nobody is late
        assert tokens == answer(PROMPT, 12, 6)


@scenario
async def test_many_answers_at_once() -> None:
    async with client(*SEVEN) as (w, c):
        asked = [asyncio.create_task(c.generate(PROMPT, max_new_tokens=30)) for _ in range(8)]
        await asyncio.sleep(0.7)
        sessions = list(c._runtime._sessions.values())
        assert len(sessions) == 8
        dead = sessions[0].route.stages[1].peer
        w.network.cut(dead)
        for request in asked:
            assert list((await request).ids) == answer(PROMPT, 30, 6)
        assert c._planner.bans.strikes(dead, now()) == 1.0


def test_what_a_repair_was() -> None:
    def route(*stages: tuple[str, int, int]) -> Route:
        made = tuple(Stage(PeerId(name), Span(first, end)) for name, first, end in stages)
        return Route(made, 0.0, 0.0)

    before = route(("a", 0, 2), ("b", 2, 6))
    assert repaired(before, before, {}, 9, 1.0) is None
    after = route(("a", 0, 2), ("c", 2, 4), ("d", 4, 6))
    gone = {PeerId("b"): "vanished"}
    assert repaired(before, after, gone, 9, 1.0) == Repair(
        (Place(PeerId("b"), Span(2, 6)),),
        (Place(PeerId("c"), Span(2, 4)), Place(PeerId("d"), Span(4, 6))),
        9,
        1.0,
        "vanished",
    )
