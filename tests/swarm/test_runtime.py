"""Sessions over real links to real stages: what is opened is closed, whatever happens between."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from hexswarm.errors import NetworkError, PeerLost, Refused, SessionClosed
from hexswarm.messages import Opened
from hexswarm.records import Load, PeerId
from hexswarm.runtime import MAX_LOADS, TRACE_S, OpenSession
from hexswarm.session import Emit, EmitLogits
from hexswarm.wire import Frame
from tests import virtual
from tests.loopback import CLIENT, answer
from tests.world import SILENCE_S, World, listen, turn, world

THREE = ((0, 2), (2, 4), (4, 6))
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


def scenario(test: Any) -> Any:
    """Run a coroutine function as a test on virtual time."""

    def run() -> None:
        virtual.run(test())

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


async def failure(session: OpenSession) -> BaseException:
    """What ends the session."""
    try:
        while True:
            await session.wait()
    except (NetworkError, Refused, SessionClosed) as error:
        return error


async def tidy(w: World) -> None:
    await w.settle()
    assert w.clean


# --- the way it should go -----------------------------------------------------------------------


@pytest.mark.parametrize("spans", [((0, 6),), ((0, 3), (3, 6)), THREE], ids=len)
def test_tokens_go_round(spans: tuple[tuple[int, int], ...]) -> None:
    """Also in a ring of two, where both stages dial each other at the same moment."""

    async def act() -> None:
        async with world(*spans) as w:
            session = await w.opened()
            session.generate(turn(PROMPT, 6))
            assert await listen(session) == answer(PROMPT, 6, 6)
            session.close()
            await tidy(w)

    virtual.run(act())


@scenario
async def test_the_client_is_not_in_the_loop() -> None:
    """A token takes one way round the ring, however far away the client is."""
    async with world(*THREE, delay_s=0.01) as w:
        for peer in w.peers:
            w.network.shape(CLIENT, peer.peer, delay_s=0.5)
        session = await w.opened()
        session.generate(turn(PROMPT, 20))
        await session.wait()
        began = asyncio.get_running_loop().time()
        await listen(session)
        each = (asyncio.get_running_loop().time() - began) / 19
        assert each == pytest.approx(3 * (0.01 + 0.001), rel=0.01)


@scenario
async def test_many_sessions_share_the_links() -> None:
    async with world(*THREE) as w:

        async def one(number: int) -> None:
            prompt = [number, *PROMPT]
            session = await w.opened()
            session.generate(turn(prompt, 5))
            assert await listen(session) == answer(prompt, 5, 6)
            session.close()

        await asyncio.gather(*(one(number) for number in range(6)))
        assert len(w.links.peers()) == 3
        await tidy(w)


@scenario
async def test_turns_and_extension() -> None:
    async with world(*THREE) as w:
        session = await w.opened(12)
        session.generate(turn(PROMPT, 3))
        tokens = await listen(session)
        await session.extend(11)
        await session.extend(60)
        longer = [*PROMPT, *tokens, 7, 7]
        session.generate(turn(longer, 9, len(session.machine.cached)))
        assert await listen(session) == answer(longer, 9, 6)
        session.close()
        await tidy(w)


@scenario
async def test_a_cancelled_turn_leaves_no_events() -> None:
    async with world(*THREE) as w:
        session = await w.opened()
        session.generate(turn(PROMPT, 30))
        await session.wait()
        await w.settle(0.1)
        assert not session.events.empty()
        session.cancel()
        assert session.events.empty()
        session.generate(turn(PROMPT, 4))
        assert await listen(session) == answer(PROMPT, 4, 6)
        session.close()
        await tidy(w)


@scenario
async def test_the_client_loop_gets_logits() -> None:
    async with world(*THREE) as w:
        session = w.open(client_loop=True)
        await session.ready()
        session.generate(turn(PROMPT, 4))
        event = await session.wait()
        assert isinstance(event, EmitLogits)
        session.feed(1)
        assert isinstance(await session.wait(), EmitLogits)
        session.close()
        await tidy(w)


# --- the ways it may end --------------------------------------------------------------------------


@scenario
async def test_a_dead_stage_is_told_by_its_stream() -> None:
    async with world(*THREE) as w:
        session = await w.opened()
        session.generate(turn(PROMPT, 50))
        await session.wait()
        w.network.cut(PeerId("p1"))
        error = await failure(session)
        assert isinstance(error, PeerLost)
        assert (error.peer, error.layers) == ("p1", (2, 4))
        await tidy(w)


@scenario
async def test_a_hanging_stage_is_told_by_its_silence() -> None:
    async with world(*THREE) as w:
        session = await w.opened()
        session.generate(turn(PROMPT, 50))
        await session.wait()
        began = asyncio.get_running_loop().time()
        w.network.freeze(PeerId("p1"))
        error = await failure(session)
        assert isinstance(error, PeerLost)
        assert error.peer == "p1"
        assert asyncio.get_running_loop().time() - began < SILENCE_S + 1
        await w.settle(2 * SILENCE_S)
        assert w.clean, "the hanging stage missed its client, too"
        w.network.cut(PeerId("p1"))


@scenario
async def test_a_way_between_two_stages_that_ends() -> None:
    async with world(*THREE) as w:
        session = await w.opened()
        session.generate(turn(PROMPT, 50))
        await session.wait()
        w.network.cut(PeerId("p1"), PeerId("p2"))
        error = await failure(session)
        assert isinstance(error, PeerLost)
        assert error.peer in ("p1", "p2")
        await tidy(w)


@scenario
async def test_a_client_that_dies_frees_everything() -> None:
    async with world(*THREE) as w:
        session = await w.opened()
        session.generate(turn(PROMPT, 50))
        await session.wait()
        w.network.cut(CLIENT)
        await w.settle()
        assert all(peer.clean for peer in w.peers)


@scenario
async def test_a_failed_session_holds_nothing_even_if_nobody_closes_it() -> None:
    async with world(*THREE) as w:
        session = await w.opened()
        w.network.cut(PeerId("p0"))
        await tidy(w)
        session.close()
        session.close()
        assert isinstance(await failure(session), PeerLost)
        w.network.heal(PeerId("p0"))
        session = await w.opened()
        session.close()
        await tidy(w)


@scenario
async def test_refused_by_one() -> None:
    async with world(*THREE) as w:
        with pytest.raises(Refused, match="KV is full"):
            await w.opened(5000)
        await tidy(w)
        w.peers[1].server.carry_out(w.peers[1].host.table.drain(1.0))
        with pytest.raises(Refused, match="about to leave"):
            await w.opened()
        await tidy(w)


@scenario
async def test_a_refusal_is_told_in_the_same_breath() -> None:
    """The caller does not wait for a stage that is far away, and the others are free again."""
    async with world(*THREE, delay_s=0.01) as w:
        await (await w.opened()).extend(60)  # so that all links exist
        w.runtime.close_all()
        w.runtime.closed = False
        await w.settle()
        w.network.shape(CLIENT, PeerId("p2"), delay_s=5.0)
        w.peers[1].server.carry_out(w.peers[1].host.table.drain(9.0))
        began = asyncio.get_running_loop().time()
        session = w.open()
        with pytest.raises(Refused, match="about to leave"):
            await session.ready()
        assert asyncio.get_running_loop().time() - began == pytest.approx(0.02, abs=1e-3)
        assert session.refusing == {"p1"}
        await w.settle(0.011)
        assert w.peers[0].host.kv_in_use == 0, "closed one way later"
        await w.settle(11.0)
        assert w.clean


@scenario
async def test_who_refuses_a_moment_later_is_known_as_well() -> None:
    async with world(*THREE) as w:
        await w.opened()
        w.runtime.close_all()
        w.runtime.closed = False
        await w.settle()
        for index in (0, 2):
            w.peers[index].server.carry_out(w.peers[index].host.table.drain(9.0))
        session = w.open()
        with pytest.raises(Refused):
            await session.ready()
        await w.settle(0.1)
        assert session.refusing == {"p0", "p2"}
        await tidy(w)


@scenario
async def test_the_load_of_every_stage_is_remembered() -> None:
    """Also of those that refused, and of sessions that failed."""
    async with world(*THREE) as w:
        (await w.opened()).close()
        loads = w.runtime.loads
        assert {peer: load for peer, (_, load) in loads.items()} == {
            peer.peer: Load(0.25, 1.5, 0.5, 60 * 16) for peer in w.peers
        }
        await tidy(w)
        earlier_s = {peer: heard_s for peer, (heard_s, _) in loads.items()}
        w.peers[1].server.carry_out(w.peers[1].host.table.drain(9.0))
        with pytest.raises(Refused):
            await w.opened()
        await tidy(w)
        assert loads[PeerId("p1")][1] == Load(0.25, 1.5, 0.5, 64 * 16)
        now = asyncio.get_running_loop().time()
        assert all(earlier_s[peer] < heard_s < now for peer, (heard_s, _) in loads.items())


@scenario
async def test_so_many_loads_are_remembered_and_the_newest() -> None:
    async with world((0, 6)) as w:
        runtime = w.runtime
        for index in [*range(MAX_LOADS), 0, MAX_LOADS]:
            opened = Opened(bytes(16), 0, 1, 0.5, 1.0, 0.5, index)
            runtime.on_frames(PeerId(f"peer{index}"), [Frame(opened)])
        assert len(runtime.loads) == MAX_LOADS
        assert "peer1" not in runtime.loads, "the oldest gave way"
        assert list(runtime.loads)[-2:] == ["peer0", f"peer{MAX_LOADS}"]


@scenario
async def test_unreachable_for_the_client() -> None:
    async with world(*THREE) as w:
        w.network.cut(CLIENT, PeerId("p2"))
        with pytest.raises(PeerLost, match="cannot be reached") as caught:
            await w.opened()
        assert caught.value.layers == (4, 6)
        await tidy(w)


@scenario
async def test_unreachable_for_a_neighbour() -> None:
    async with world(*THREE) as w:
        w.network.cut(PeerId("p0"), PeerId("p1"))
        with pytest.raises(PeerLost, match="cannot be reached by its neighbour") as caught:
            await w.opened()
        assert caught.value.peer == "p1"
        await tidy(w)


@scenario
async def test_closed_while_it_opens() -> None:
    """Dials that end later must not open anything."""
    async with world(*THREE) as w:
        for seconds in (0.0, 0.015, 0.03, 0.05, 0.07):
            session = w.open()
            await asyncio.sleep(seconds)
            session.close()
            await tidy(w)


@scenario
async def test_closed_while_somebody_waits() -> None:
    async with world(*THREE) as w:
        session = await w.opened()
        waiting = asyncio.create_task(session.wait())
        await asyncio.sleep(0)
        w.runtime.close_all()
        with pytest.raises(SessionClosed):
            await waiting
        await tidy(w)


@scenario
async def test_a_stage_that_leaves_lets_the_turn_end() -> None:
    async with world(*THREE) as w:
        session = await w.opened()
        session.generate(turn(PROMPT, 10))
        event = await session.wait()
        assert isinstance(event, Emit)
        peer = w.peers[1]
        peer.server.carry_out(peer.host.table.drain(20.0))
        assert [event.token, *await listen(session)] == answer(PROMPT, 10, 6)
        assert session.machine.leaving
        session.close()
        await peer.server.quiet(20.0)
        assert len(peer.host.table) == 0
        await tidy(w)


@scenario
async def test_all_tasks_end_with_the_links() -> None:
    """`world` checks that none is left, also of a session that was opening."""
    async with world(*THREE) as w:
        w.network.freeze(PeerId("p1"))
        w.open()
        await w.settle(0.1)
    async with world(*THREE) as w:
        session = await w.opened()
        session.generate(turn(PROMPT, 50))
        await session.wait()


# --- tracing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("spans", [((0, 6),), ((0, 3), (3, 6)), THREE], ids=len)
def test_a_trace_explains_the_time_per_token(spans: tuple[tuple[int, int], ...]) -> None:
    """The law: what the stages took, plus the one-way links between them, is what was seen."""

    async def act() -> None:
        async with world(*spans, delay_s=0.02, step_s=0.003) as w:
            session = await w.opened()
            session.generate(turn(PROMPT, 11))
            await session.wait()
            began = asyncio.get_running_loop().time()
            await listen(session)
            seen_s = (asyncio.get_running_loop().time() - began) / 10
            traces = await session.trace()
            assert list(traces) == [peer.peer for peer in w.peers]
            law_s = 0.0
            for traced in traces.values():
                assert traced.steps == 10
                law_s += (traced.wait_s + traced.compute_s + traced.handle_s) / traced.steps
                law_s += traced.successor_rtt_s / 2
            assert law_s == pytest.approx(seen_s, rel=1e-6)
            session.close()
            await tidy(w)

    virtual.run(act())


@scenario
async def test_waiting_is_told_apart_from_computing() -> None:
    """Two sessions share a device that takes one step at a time."""
    async with world((0, 6), step_s=0.01) as w:
        one, other = await w.opened(), await w.opened()
        for session in (one, other):
            session.generate(turn(PROMPT, 12))
        await asyncio.gather(listen(one), listen(other))
        traced = (await one.trace())[PeerId("p0")]
        assert traced.compute_s / traced.steps == pytest.approx(0.01)
        assert traced.wait_s == pytest.approx(0.03 + 10 * 0.01), "first for the other's prompt"
        assert traced.handle_s == pytest.approx(0.0, abs=1e-9)
        assert traced.rows == 1.0


@scenario
async def test_a_trace_is_of_the_last_turn() -> None:
    async with world(*THREE) as w:
        session = await w.opened()
        session.generate(turn(PROMPT, 9))
        tokens = await listen(session)
        ids = [*PROMPT, *tokens, 1, 2]
        session.generate(turn(ids, 4, len(session.machine.cached)))
        await listen(session)
        traces = await session.trace()
        assert [traced.steps for traced in traces.values()] == [3, 3, 3]
        assert all(traced.prompt_compute_s > 0 for traced in traces.values())
        both = await asyncio.gather(session.trace(), session.trace())
        for again in both:
            assert {peer: replace(told, nonce=1) for peer, told in again.items()} == traces
        session.close()
        await tidy(w)


@scenario
async def test_a_trace_waits_for_a_silent_stage_and_not_for_long() -> None:
    async with world(*THREE) as w:
        session = await w.opened()
        session.generate(turn(PROMPT, 4))
        await listen(session)
        w.network.freeze(PeerId("p1"))
        loop = asyncio.get_running_loop()
        began = loop.time()
        assert set(await session.trace()) == {"p0", "p2"}
        assert loop.time() - began == pytest.approx(TRACE_S)
        waiting = asyncio.create_task(session.trace())
        loop.call_later(0.1, session.close)
        began = loop.time()
        assert set(await waiting) == {"p0", "p2"}
        assert loop.time() - began == pytest.approx(0.1)
        assert await session.trace() == {}, "nobody can be asked any more"
        assert session.name == session.machine.key.hex()[:8]
