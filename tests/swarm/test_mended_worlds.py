"""Sessions that lose stages over real links on virtual time: the runtime's part of a repair.

Here a stand-in plans the routes: the next peer of the same span, at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from hexswarm.errors import HexswarmError, PeerLost, SessionClosed
from hexswarm.instructions import EmitLogits, Mend
from hexswarm.records import PeerId, Route
from hexswarm.runtime import OpenSession
from tests import virtual
from tests.loopback import answer
from tests.world import SILENCE_S, World, listen, turn, world

THREE = ((0, 2), (2, 4), (4, 6))
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
NEW = 30


def scenario(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    """Run a coroutine function as a test on virtual time."""

    def run() -> None:
        virtual.run(test())

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


def substitute(w: World, session: OpenSession) -> Route | None:
    """Broken stages give way to living peers of their spans."""
    stages = []
    taken = {stage.peer for stage in session.route.stages}
    for stage in session.route.stages:
        if stage.peer in session.machine.broken:
            fit = [
                peer.peer
                for peer in w.peers
                if peer.host.model.span == stage.span and peer.peer not in w.dead | taken
            ]
            if not fit:
                return None
            taken.add(fit[0])
            stage = replace(stage, peer=fit[0])
        stages.append(stage)
    return Route(tuple(stages), 0.0, 0.0)


@asynccontextmanager
async def mending(copies: int = 2, **options: Any) -> AsyncIterator[World]:
    async with world(*THREE, copies=copies, **options) as w:

        def mend(session: OpenSession) -> None:
            route = substitute(w, session)
            if route is None:
                session.give_up(next(iter(session.machine.broken.values())))
            else:
                session.reroute(route)

        w.runtime.on_broken = mend
        yield w


async def tidy(w: World) -> None:
    await w.settle()
    assert w.clean


async def failure(session: OpenSession) -> HexswarmError:
    """What ends the session, whatever is told before."""
    while True:
        try:
            await session.wait()
        except HexswarmError as error:
            return error


def now() -> float:
    return asyncio.get_running_loop().time()


# --- what a listener sees -------------------------------------------------------------------------


@pytest.mark.parametrize("victim", ["p0", "p1", "p2"])
@pytest.mark.parametrize("after", [0, 1, 7])
def test_a_killed_stage_is_a_longer_wait_and_nothing_else(victim: str, after: int) -> None:
    async def act() -> None:
        async with mending() as w:
            mended: list[tuple[str, float]] = []
            w.runtime.on_mended = lambda session: mended.append((session.name, now()))
            session = await w.opened()
            session.generate(turn(PROMPT, NEW))
            tokens = []
            for _ in range(after):
                event = await session.wait()
                assert not isinstance(event, EmitLogits)
                tokens.append(event.token)  # type: ignore[union-attr]
            await w.kill(victim)
            began = now()
            assert [*tokens, *await listen(session)] == answer(PROMPT, NEW, 6)
            assert [name for name, _ in mended] == [session.name]
            assert mended[0][1] - began < 0.2, "some round trips"
            (mend,) = session.machine.mends
            assert isinstance(mend, Mend)
            assert mend.lost == (victim,)
            assert PeerId(victim) not in {stage.peer for stage in session.route.stages}
            session.close()
            await tidy(w)

    virtual.run(act())


@scenario
async def test_the_client_watches_who_came_and_no_longer_who_left() -> None:
    async with mending() as w:
        session = await w.opened()
        session.generate(turn(PROMPT, NEW))
        await session.wait()
        session.reroute(w.along("p0", "p4", "p2"))
        assert set(w.links._watched) == {"p0", "p4", "p2"}
        await listen(session)
        session.close()
        assert not w.links._watched
        await tidy(w)


@scenario
async def test_the_way_between_two_stages_ends() -> None:
    async with mending() as w:
        session = await w.opened()
        session.generate(turn(PROMPT, NEW))
        await session.wait()
        w.network.cut(PeerId("p1"), PeerId("p2"))
        assert len(await listen(session)) == NEW - 1
        assert len(session.machine.mends) == 1
        session.close()
        await tidy(w)


@scenario
async def test_a_suspect_that_hangs_is_left_and_wakes_to_nothing() -> None:
    async with mending() as w:
        session = await w.opened()
        session.generate(turn(PROMPT, NEW))
        tokens = [(await session.wait()).token]  # type: ignore[union-attr]
        w.network.freeze(PeerId("p1"))
        await w.settle(1.0)
        session.suspect(PeerId("p1"), PeerLost("p1", (2, 4), "has been silent for 1 s"))
        tokens += await listen(session)
        assert tokens == answer(PROMPT, NEW, 6)
        session.close()
        w.network.heal(PeerId("p1"))
        await w.settle(2 * SILENCE_S)
        assert w.clean


@scenario
async def test_many_sessions_lose_the_same_stage() -> None:
    async with mending() as w:

        async def one(number: int) -> None:
            prompt = [number, *PROMPT]
            session = await w.opened()
            session.generate(turn(prompt, NEW))
            assert await listen(session) == answer(prompt, NEW, 6)
            session.close()

        async def strike() -> None:
            for victim in ("p1", "p0"):
                await asyncio.sleep(0.3)
                await w.kill(victim)

        await asyncio.gather(strike(), *(one(number) for number in range(6)))
        await tidy(w)


@scenario
async def test_a_newcomer_that_cannot_be_dialled_is_broken_too() -> None:
    async with mending(copies=3) as w:
        session = await w.opened()
        session.generate(turn(PROMPT, NEW))
        tokens = [(await session.wait()).token]  # type: ignore[union-attr]
        w.network.cut(w.transport.local, PeerId("p4"))
        await w.kill("p1")
        tokens += await listen(session)
        assert tokens == answer(PROMPT, NEW, 6)
        assert session.machine.mends[0].lost == ("p1", "p4")
        assert session.route.stages[1].peer == "p7"
        session.close()
        await tidy(w)


@scenario
async def test_a_newcomer_that_hangs_is_left_by_a_verdict_and_its_late_dial_opens_nothing() -> None:
    async with mending(copies=3) as w:
        session = await w.opened()
        session.generate(turn(PROMPT, NEW))
        tokens = [(await session.wait()).token]  # type: ignore[union-attr]
        w.network.freeze(w.transport.local, PeerId("p4"))
        await w.kill("p1")
        await w.settle(1.0)
        assert [stage.peer for stage in session.machine.silent] == ["p4"]
        session.suspect(PeerId("p4"), PeerLost("p4", (2, 4), "does not answer"))
        w.network.heal(w.transport.local, PeerId("p4"))
        tokens += await listen(session)
        assert tokens == answer(PROMPT, NEW, 6)
        await w.settle()
        assert len(w.named("p4").host.table) == 0
        session.close()
        await tidy(w)


@scenario
async def test_a_restarted_peer_serves_its_session_again() -> None:
    async with world(*THREE) as w:
        stalled = asyncio.Event()
        w.runtime.on_broken = lambda session: stalled.set()
        session = await w.opened()
        session.generate(turn(PROMPT, NEW))
        tokens = [(await session.wait()).token]  # type: ignore[union-attr]
        await w.kill("p1")
        await stalled.wait()
        await w.restart("p1")
        session.reroute(w.route)
        tokens += await listen(session)
        assert tokens == answer(PROMPT, NEW, 6)
        session.close()
        await tidy(w)


@scenario
async def test_the_client_loop_waits_too() -> None:
    async with mending() as w:
        session = w.open(client_loop=True)
        await session.ready()
        session.generate(turn(PROMPT, 4))
        assert isinstance(await session.wait(), EmitLogits)
        await w.kill("p1")
        session.feed(1)
        await w.settle(0.5)
        assert isinstance(await session.wait(), EmitLogits)
        assert session.events.empty()
        session.close()
        await tidy(w)


# --- the ends -------------------------------------------------------------------------------------


@scenario
async def test_who_gives_up_says_why() -> None:
    async with mending(copies=1) as w:
        session = await w.opened()
        session.generate(turn(PROMPT, NEW))
        await session.wait()
        await w.kill("p1")
        with pytest.raises(PeerLost) as caught:
            await listen(session)
        assert caught.value.layers == (2, 4)
        await tidy(w)


@scenario
async def test_closed_or_cancelled_while_it_stands_still() -> None:
    async with world(*THREE) as w:
        for end in (OpenSession.close, OpenSession.cancel):
            stalled = asyncio.Event()
            w.runtime.on_broken = lambda session, told=stalled: told.set()  # type: ignore[misc]
            session = await w.opened()
            session.generate(turn(PROMPT, NEW))
            await session.wait()
            await w.kill("p1")
            await stalled.wait()
            end(session)
            assert isinstance(await failure(session), SessionClosed)
            session.reroute(w.route)
            assert session.machine.epoch == 0
            await tidy(w)
            await w.restart("p1")


@scenario
async def test_a_loss_as_the_last_token_comes_ends_the_session_and_not_the_answer() -> None:
    async with world(*THREE) as w:
        w.runtime.on_broken = lambda session: None
        w.network.shape(PeerId("p2"), w.transport.local, delay_s=0.5, one_way=True)
        session = await w.opened()
        session.generate(turn(PROMPT, NEW))
        await w.settle(1.3)
        await w.kill("p0")
        assert await listen(session) == answer(PROMPT, NEW, 6)
        with pytest.raises((SessionClosed, PeerLost)):
            await session.wait()
        await tidy(w)


# --- news and questions ---------------------------------------------------------------------------


@scenario
async def test_who_drains_is_told_while_the_turn_goes_on() -> None:
    async with mending() as w:
        told: list[tuple[PeerId, float]] = []

        def migrate(session: OpenSession, peer: PeerId, exit_s: float) -> None:
            told.append((peer, exit_s))
            session.reroute(w.along("p0", "p4", "p2"))

        w.runtime.on_draining = migrate
        session = await w.opened()
        session.generate(turn(PROMPT, NEW))
        tokens = [(await session.wait()).token]  # type: ignore[union-attr]
        leaver = w.named("p1")
        leaver.server.carry_out(leaver.host.table.drain(9.0))
        tokens += await listen(session)
        assert tokens == answer(PROMPT, NEW, 6)
        assert told == [("p1", 9.0)]
        assert len(leaver.host.table) == 0
        assert session.machine.failed is None, "no stage of it leaves any more"
        session.close()
        await tidy(w)


@scenario
async def test_progress_tells_who_is_behind() -> None:
    async with world(*THREE, step_s=0.005) as w:
        session = await w.opened()
        session.generate(turn(PROMPT, NEW))
        for _ in range(5):
            await session.wait()
        told = await session.progress(1.0)
        assert set(told) == {"p0", "p1", "p2"}
        assert all(0 < each.done <= each.received <= 64 for each in told.values())
        assert all(each.step_s == pytest.approx(0.005) for each in told.values())
        w.network.freeze(PeerId("p1"))
        began = now()
        assert set(await session.progress(0.5)) == {"p0", "p2"}
        assert now() - began == pytest.approx(0.5)
        waiting = asyncio.create_task(session.progress(9.0))
        await asyncio.sleep(0.1)
        session.close()
        assert set(await waiting) == {"p0", "p2"}
        assert await session.progress(9.0) == {}
