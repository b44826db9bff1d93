"""Promises of time: a stage that cannot keep its part is passed over, or asked for more."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest

from hexswarm.client import AsyncClient
from hexswarm.directory import SignedAnnouncement
from hexswarm.errors import NetworkError, NoRoute, PeerLost, Refused
from hexswarm.messages import Opened
from hexswarm.opening import not_promised
from hexswarm.peer.actions import Action
from hexswarm.peer.stage import StageTable
from hexswarm.records import Load, PeerId, RouteRequest
from hexswarm.runtime import OpenSession
from tests import virtual
from tests.asking import PROMPT, SPARED, THREE, client, scenario
from tests.loopback import MODEL, answer
from tests.world import World, listen, turn


def quiet(w: World, **queues_s: float) -> None:
    """Nobody is busy but those named, whose queues nobody has heard of yet."""
    for peer in w.peers:
        peer.host.ledger.load = Load(queue_s=queues_s.get(peer.peer, 0.0))


async def ask(c: AsyncClient, limit_s: float | None) -> list[str]:
    done = await c.generate(PROMPT, max_new_tokens=3, max_latency=limit_s, percentile=50)
    return [stage.peer for stage in done.route.stages]


async def promised(w: World, **budgets_s: float) -> OpenSession:
    """A session of somebody else along all peers, which promised him that."""
    budgets = [budgets_s.get(peer.peer, 0.0) for peer in w.peers]
    session = w.runtime.open(w.route, MODEL, 64, budgets=budgets)
    await session.ready()
    return session


@scenario
async def test_a_peer_busier_than_it_announced_is_passed_over_under_a_limit_alone() -> None:
    async with client(*SPARED) as (w, c):
        quiet(w, p1=0.5)
        assert await ask(c, None) == ["p0", "p1", "p2"]
        c._runtime.loads.clear()
        assert await ask(c, 0.1) == ["p0", "p3", "p2"]
        assert c._runtime.loads[PeerId("p1")][1].queue_s >= 0.5


@scenario
async def test_a_loose_limit_is_promised_by_the_busy() -> None:
    async with client(*SPARED) as (w, c):
        quiet(w, p1=0.5)
        assert await ask(c, 3.0) == ["p0", "p1", "p2"]


@scenario
async def test_the_limit_is_told_as_the_reason_with_what_can_be_had() -> None:
    async with client(*THREE) as (w, c):
        quiet(w, p1=0.5)
        with pytest.raises(NoRoute, match=r"no route promises 0\.1 s a token") as caught:
            await ask(c, 0.1)
        assert caught.value.binding == "tpot"
        best_s = caught.value.achievable["tpot_s"]
        assert 0.5 < best_s < 0.6
        assert isinstance(caught.value.__cause__, Refused)
        await w.settle()
        assert w.clean
        assert await ask(c, best_s * 1.05) == ["p0", "p1", "p2"]


@scenario
async def test_what_others_do_not_need_is_given_to_the_busy() -> None:
    """Its share by the old view was too small; by what it told, the limit can be kept."""
    async with client(*THREE) as (w, c):
        quiet(w, p1=0.15)
        said: list[Any] = []
        real = c._runtime.open

        def opening(*args: Any, **options: Any) -> OpenSession:
            said.append(options["budgets"])
            return real(*args, **options)

        c._runtime.open = opening  # type: ignore[method-assign]
        assert await ask(c, 0.3) == ["p0", "p1", "p2"]
        first, second = said
        assert first[1] < 0.154 < second[1]
        assert sum(second) == pytest.approx(sum(first), rel=0.1)


@scenario
async def test_a_promise_to_another_protects_him() -> None:
    """Also against those who ask for no promise, and until he has gone."""
    async with client(*THREE) as (w, c):
        quiet(w)
        other = await promised(w, p1=0.004)
        with pytest.raises(Refused, match=r"another session was promised 4\.0 ms") as caught:
            await ask(c, None)
        assert (caught.value.peer, caught.value.code) == ("p1", "busy")
        with pytest.raises(NoRoute) as without:
            await ask(c, 3.0)
        assert without.value.binding == "tpot"
        assert without.value.achievable == {}, "no limit would help"
        other.close()
        assert await ask(c, 3.0) == ["p0", "p1", "p2"]


@scenario
async def test_a_client_does_not_stand_in_its_own_way() -> None:
    """Its last session is still open, for the sake of its trace, when the next one comes."""
    async with client(*THREE) as (w, c):
        quiet(w)
        limit_s = 1.01 * (await c.plan(8, 3)).route.tpot_s
        for _ in range(3):
            assert await ask(c, limit_s) == ["p0", "p1", "p2"]


@scenario
async def test_a_longer_lease_keeps_what_was_promised() -> None:
    async with client(*THREE) as (w, _):
        quiet(w)
        session = await promised(w, p1=0.004)
        w.peers[1].host.ledger.load = Load(queue_s=0.5)
        await session.extend(128)
        assert session.machine.open
        session.close()


@scenario
async def test_a_peer_that_does_not_know_its_speed_promises_nothing() -> None:
    async with client(*SPARED) as (w, c):
        quiet(w)
        w.peers[1].host.ledger.speed = None
        assert await ask(c, None) == ["p0", "p1", "p2"]
        assert await ask(c, 3.0) == ["p0", "p3", "p2"]


def test_the_reason_is_told_once() -> None:
    request = RouteRequest(MODEL, 6, 4, 8, 8, tpot_s=0.1)
    slow = Refused("p1", "slow", "a step here takes 90 ms, not 20", 10.0)
    told = not_promised(request, slow, 0.2)
    assert (told.binding, told.achievable) == ("tpot", {"tpot_s": 0.2})
    assert told.remedy == "allow 0.21 s a token, or try again in 10 s"
    for quickest_s in (None, 0.09):  # what is refused for other reasons than its prediction
        told = not_promised(request, slow, quickest_s)
        assert "p1 refused: a step here takes 90 ms" in told.cause
        assert told.achievable == {}
    assert not_promised(request, PeerLost("p1", None, "is gone"), None).remedy == "try again"


# --- patience -------------------------------------------------------------------------------------


async def filled(w: World, seconds: float) -> None:
    """All KV of p1 belongs to somebody else, for so long."""
    blocks = w.runtime.open(w.route, MODEL, 1024)
    await blocks.ready()
    turn_ = turn([1, 2, 3], 1)
    blocks.generate(turn_)
    await listen(blocks)
    asyncio.get_running_loop().call_later(seconds, blocks.close)


@scenario
async def test_one_waits_for_room() -> None:
    """Refused as all are full, and served as soon as somebody has gone."""
    async with client(*THREE) as (w, c):
        await filled(w, 7.0)
        began_s = asyncio.get_running_loop().time()
        assert await ask(c, None) == ["p0", "p1", "p2"]
        assert 5.0 < asyncio.get_running_loop().time() - began_s < 15.0


@scenario
async def test_patience_ends_with_the_refusal_and_its_time() -> None:
    async with client(*THREE) as (w, c):
        await filled(w, 100.0)
        began_s = asyncio.get_running_loop().time()
        with pytest.raises(Refused, match="full") as caught:
            await ask(c, None)
        assert 20.0 < asyncio.get_running_loop().time() - began_s <= 31.0
        assert caught.value.code == "full"
        await w.settle(100.0)


@scenario
async def test_where_all_are_known_to_be_full_it_is_said_when_to_come_back() -> None:
    """Others were refused a moment ago, so nobody is asked: that, too, is a refusal with a time."""
    async with client(*THREE) as (w, c):
        c._opener._patience_s = 0.0
        now = asyncio.get_running_loop().time()
        for peer in w.peers:
            c._runtime.loads[peer.peer] = now, Load(free_kv_tokens=0)
        with pytest.raises(NoRoute, match="try again in 5 s") as caught:
            await ask(c, None)
        assert (caught.value.binding, caught.value.retry_s) == ("kv", 5.0)


@scenario
async def test_where_all_are_full_it_looks_again_less_and_less_often() -> None:
    """A crowd that waits for room has the machine plan for each of it."""
    async with client(*THREE) as (w, c):
        c._opener._patience_s = 20.0
        looked, now = list[float](), asyncio.get_running_loop().time

        async def nothing_new(_: RouteRequest) -> None:
            looked.append(now())

        c._opener._look_again = nothing_new  # type: ignore[method-assign]
        for peer in w.peers:
            c._runtime.loads[peer.peer] = now(), Load(free_kv_tokens=0)
        with pytest.raises(NoRoute, match="try again in 5 s"):
            await ask(c, None)
        assert len(looked) <= 7, "after 1, 2, 4, 5, 5 s"


@scenario
async def test_what_will_never_fit_is_said_at_once() -> None:
    async with client(*THREE) as (w, c):
        for number, peer in enumerate(w.peers):
            held = c._member.directory._records[peer.peer].announcement
            small = replace(held, sequence=1, kv_tokens=8 if number == 1 else 1024)
            c._member.directory.merge([SignedAnnouncement(small, 1e12, b"")])
        began_s = asyncio.get_running_loop().time()
        with contextlib.suppress(Refused, NoRoute):
            await filled(w, 100.0)
            await ask(c, None)
        assert asyncio.get_running_loop().time() - began_s < 5.0
        await w.settle(110.0)


@scenario
async def test_a_swarm_that_never_had_the_layers_is_said_at_once() -> None:
    async with client((0, 2), (4, 6)) as (_, c):
        began_s = asyncio.get_running_loop().time()
        with pytest.raises(NoRoute):
            await c.generate(PROMPT, max_new_tokens=3)
        assert asyncio.get_running_loop().time() - began_s < 1.0


@scenario
async def test_layers_lost_a_moment_ago_are_waited_for() -> None:
    async with client(*THREE) as (w, c):
        w.network.cut(PeerId("p1"))

        def back() -> None:
            w.network.heal(PeerId("p1"))
            held = c._member.directory._records[PeerId("p1")].announcement
            newer = replace(held, sequence=held.sequence + 1)
            c._member.directory.merge([SignedAnnouncement(newer, 1e12, b"")])

        asyncio.get_running_loop().call_later(6.0, back)
        done = await c.generate(PROMPT, max_new_tokens=3)
        assert len(done.ids) == 3
        assert asyncio.get_running_loop().time() < 10.0


@scenario
async def test_nobody_is_banned_for_what_a_neighbour_says() -> None:
    async with client(*SPARED) as (w, c):
        w.network.cut(PeerId("p1"), PeerId("p0"))
        await ask(c, None)
        assert len(c._planner.bans) == 0
        w.network.cut(PeerId("p3"))
        with pytest.raises((PeerLost, NoRoute, Refused)):
            await ask(c, None)
        assert c._planner.bans.strikes(PeerId("p3"), 0.0) == 1.0


@scenario
async def test_a_peer_that_we_hear_is_not_forgotten() -> None:
    """Busy is not dead: in a swarm of few peers a crowd would find nobody left."""
    async with client(*THREE) as (w, c):
        lost = PeerLost("p1", (2, 4), "did not open within 8 s")

        def known() -> set[PeerId]:
            return {item.peer for item in c._member.alive()}

        await w.links.connect(PeerId("p1"), ("/x",))
        c._opener.forget_lost(lost)
        assert "p1" in known()
        w.network.freeze(PeerId("p1"))
        await asyncio.sleep(4.0)
        c._opener.forget_lost(lost)
        assert "p1" not in known()


@scenario
async def test_a_stage_that_lives_but_does_not_answer_is_busy_and_asked_again() -> None:
    """A crowd is told when to come back; it finds the stage once that has time for it."""
    async with client(*THREE) as (w, c):
        c.config = replace(c.config, connect_s=2.0)  # type: ignore[misc]
        table = w.peers[1].host.table
        at_once, asked = table._open, list[float]()

        def never(*_: object) -> list[Action]:
            asked.append(asyncio.get_running_loop().time())
            return []

        table._open = never  # type: ignore[method-assign]
        with pytest.raises(Refused, match="is busy, and did not open within 2 s; try again in 5 s"):
            await ask(c, None)
        assert 3 <= len(asked) <= 8
        asyncio.get_running_loop().call_later(5.0, setattr, table, "_open", at_once)
        assert await ask(c, None) == ["p0", "p1", "p2"]
        assert c._planner.bans.strikes(PeerId("p1"), 0.0) == 0.0


@scenario
async def test_cut_off_from_all_it_does_not_wait() -> None:
    async with client(*THREE) as (w, c):
        for peer in w.peers:
            w.network.cut(peer.peer)

        def dead() -> None:
            raise NetworkError("the daemon has died")

        w.transport.check = dead  # type: ignore[method-assign]
        began_s = asyncio.get_running_loop().time()
        with pytest.raises(NetworkError, match="daemon has died"):
            await ask(c, None)
        assert asyncio.get_running_loop().time() - began_s < 5.0


# --- one read with the last answer ----------------------------------------------------------------


def in_one_read(w: World, says: Callable[[StageTable], Iterable[Action]]) -> None:
    """p1 answers last, as one that stood still, and says more in the same breath."""
    peer = w.named("p1")
    send = peer.links.send

    def held(to: PeerId, outgoing: Any, lane: int = 0) -> bool:
        if not any(isinstance(message, Opened) for message, _ in outgoing):
            return send(to, outgoing, lane)

        def awake() -> None:
            send(to, outgoing, lane)
            peer.server.carry_out(says(peer.host.table))

        peer.links.send = send  # type: ignore[method-assign]
        asyncio.get_running_loop().call_later(0.5, awake)
        return True

    peer.links.send = held  # type: ignore[method-assign]


@pytest.mark.parametrize(
    "says",
    [
        StageTable.end_all,
        lambda table: table.drain(25.0),
        lambda table: table.on_lost(PeerId("p0")),
    ],
    ids=["has left", "leaves", "lost its neighbour"],
)
def test_a_session_that_ends_as_it_opens_is_opened_anew(
    says: Callable[[StageTable], Iterable[Action]],
) -> None:
    """Nothing was asked of it yet, so its caller need not know."""

    async def act() -> None:
        async with client(*SPARED) as (w, c):
            in_one_read(w, says)
            done = await c.generate(PROMPT, max_new_tokens=3)
            assert list(done.ids) == answer(PROMPT, 3, 6)
            assert not done.mends
            assert asyncio.get_running_loop().time() < 3.0

    virtual.run(act())


@scenario
async def test_so_is_one_that_ends_as_it_is_prolonged() -> None:
    async with client(*SPARED) as (w, c), c.conversation() as talk:
        await talk.generate(PROMPT, max_new_tokens=3)
        in_one_read(w, StageTable.end_all)
        done = await talk.generate(PROMPT, max_new_tokens=50)
        assert list(done.ids) == answer(PROMPT, 50, 6)


@scenario
async def test_at_the_deadline_too() -> None:
    """The last answer, and what follows it, come at the moment at which waiting ends."""
    async with client(*SPARED) as (w, c):
        in_one_read(w, StageTable.end_all)

        async def late(session: OpenSession, ready: Any, within_s: float) -> None:
            c._opener.vigil.wait = wait  # type: ignore[method-assign]
            ready.close()
            await asyncio.sleep(1.0)
            raise TimeoutError

        wait = c._opener.vigil.wait
        c._opener.vigil.wait = late  # type: ignore[method-assign]
        assert await ask(c, None) == ["p0", "p3", "p2"]
