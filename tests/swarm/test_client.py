"""The asyncio client over a swarm in memory: retries, cancellation, and what is left behind."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace
from typing import Any

import pytest

from hexswarm.client import AsyncClient
from hexswarm.conversation import Answer
from hexswarm.errors import (
    ContextTooLong,
    HexswarmError,
    NetworkError,
    NoRoute,
    PeerLost,
    Refused,
    SessionClosed,
    UsageError,
)
from hexswarm.records import PeerId
from tests import virtual
from tests.asking import PROMPT, SPARED, THREE, Letters, client, scenario
from tests.loopback import VOCABULARY, answer


@scenario
async def test_an_answer() -> None:
    async with client(*THREE) as (_, c):
        done = await c.generate(PROMPT, max_new_tokens=5)
        assert list(done.ids) == answer(PROMPT, 5, 6)
        assert done.text == Letters().decode(list(done.ids))
        assert (done.finish, done.prompt_tokens) == ("length", 8)
        assert str(done.route) == "p0 [0:2] -> p1 [2:4] -> p2 [4:6]"
        text = Letters().decode(PROMPT)
        assert (await c.generate(text, max_new_tokens=5)).ids == done.ids


@scenario
async def test_an_answer_piece_by_piece() -> None:
    async with client(*THREE) as (_, c):
        stream = c.stream(PROMPT, max_new_tokens=5)
        with pytest.raises(SessionClosed):
            _ = stream.completion
        pieces = [piece async for piece in stream]
        assert "".join(pieces) == stream.completion.text
        assert len(pieces) == 5


@scenario
async def test_the_pace_of_the_ring_does_not_depend_on_who_takes_the_tokens() -> None:
    async with client(*THREE) as (_, c):
        quick = await c.generate(PROMPT, max_new_tokens=12)
        slow = c.stream(PROMPT, max_new_tokens=12)
        async for _ in slow:
            await asyncio.sleep(1.0)
        assert quick.tpot_s is not None
        assert slow.completion.tpot_s == pytest.approx(quick.tpot_s)
        assert slow.completion.tokens_per_s == pytest.approx(1.0)
        assert quick.tokens_per_s == pytest.approx(1 / quick.tpot_s)


@scenario
async def test_a_stop_string_ends_the_turn_at_the_peers_too() -> None:
    async with client(*THREE) as (w, c):
        whole = (await c.generate(PROMPT, max_new_tokens=12)).text
        done = await c.generate(PROMPT, max_new_tokens=50, stop=whole[3:5])
        assert done.text == whole[: whole.index(whole[3:5])]
        assert done.finish == "stop"
        await w.settle()
        assert w.clean


@scenario
async def test_a_conversation_sends_what_is_new() -> None:
    async with client(*THREE) as (_, c), c.conversation() as talk:
        first = await talk.generate(PROMPT, max_new_tokens=4)
        longer = [*PROMPT, *first.ids, 5, 5]
        second = await talk.generate(longer, max_new_tokens=4)
        assert second.reused_tokens == len(PROMPT) + 3
        assert list(second.ids) == answer(longer, 4, 6)


@scenario
async def test_logits() -> None:
    async with client(*THREE) as (_, c):
        chosen = [int(row.argmax()) async for row in c.logits(PROMPT, max_new_tokens=4)]
        assert chosen == answer(PROMPT, 4, 6)
        rows = c.logits(PROMPT, max_new_tokens=9)
        await anext(rows)
        await rows.asend(7)
        await rows.aclose()


# --- cancelling -----------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [0.0, 0.005, 0.02, 0.045, 0.065, 0.08, 0.12, 0.3])
def test_cancelling_a_request_at_any_time_frees_everything(seconds: float) -> None:
    """While it routes, dials, opens, waits for its first token, or streams."""

    async def act() -> None:
        async with client(*THREE) as (w, c):
            request = asyncio.create_task(c.generate(PROMPT, max_new_tokens=100))
            await asyncio.sleep(seconds)
            request.cancel()
            with pytest.raises(asyncio.CancelledError):
                await request
            await w.settle()
            assert w.clean

    virtual.run(act())


@scenario
async def test_leaving_a_stream_early_frees_everything() -> None:
    async with client(*THREE) as (w, c):
        stream = c.stream(PROMPT, max_new_tokens=100)
        async for _ in stream:
            break
        await stream.aclose()
        await w.settle()
        assert w.clean
        async for _ in c.stream(PROMPT, max_new_tokens=100):
            break
        await w.settle()
        assert w.clean, "dropped without a word"


@scenario
async def test_a_conversation_goes_on_after_a_cancelled_turn() -> None:
    async with client(*THREE) as (_, c), c.conversation() as talk:
        stream = talk.stream(PROMPT, max_new_tokens=100)
        await anext(stream)
        with pytest.raises(SessionClosed, match="busy"):
            await talk.generate(PROMPT)
        await stream.aclose()
        done = await talk.generate(PROMPT, max_new_tokens=4)
        assert list(done.ids) == answer(PROMPT, 4, 6)
        assert done.reused_tokens == len(PROMPT) - 1


@pytest.mark.parametrize("seconds", [0.0, 0.005, 0.02, 0.045, 0.2])
def test_the_client_may_close_while_requests_run(seconds: float) -> None:
    """Or while they look for a route, or open it: nothing of them goes on."""

    async def act() -> None:
        async with client(*THREE) as (w, c):
            request = asyncio.create_task(c.generate(PROMPT, max_new_tokens=100))
            await asyncio.sleep(seconds)
            await c.close()
            with pytest.raises(HexswarmError):
                await request
            await w.settle()
            assert w.clean
            assert not c._mender._wards

    virtual.run(act())


# --- other routes ---------------------------------------------------------------------------------


@scenario
async def test_a_refusal_leads_to_the_next_best_route() -> None:
    async with client(*SPARED) as (w, c):
        w.peers[1].server.carry_out(w.peers[1].host.table.drain(1.0))
        done = await c.generate(PROMPT, max_new_tokens=3)
        assert list(done.ids) == answer(PROMPT, 3, 6)
        assert [stage.peer for stage in done.route.stages] == ["p0", "p3", "p2"]


@pytest.mark.parametrize("seen_by", ["client", "p0"])
def test_a_dead_peer_leads_to_the_next_best_route(seen_by: str) -> None:
    """Whoever finds out first: not the one that reports it is left out, but the dead one."""

    async def act() -> None:
        async with client(*SPARED) as (w, c):
            w.network.cut(PeerId("p1"), PeerId(seen_by))
            done = await c.generate(PROMPT, max_new_tokens=3)
            assert [stage.peer for stage in done.route.stages] == ["p0", "p3", "p2"]
            began_s = asyncio.get_running_loop().time()
            again = await c.generate(PROMPT, max_new_tokens=3)
            assert [stage.peer for stage in again.route.stages] == ["p0", "p3", "p2"]
            assert asyncio.get_running_loop().time() - began_s < 1, "it is not tried again"

    virtual.run(act())


@scenario
async def test_refused_by_all_is_said_as_it_was() -> None:
    async with client(*THREE) as (w, c):
        w.peers[1].server.carry_out(w.peers[1].host.table.drain(1.0))
        began_s = asyncio.get_running_loop().time()
        with pytest.raises(Refused, match="about to leave"):
            await c.generate(PROMPT, max_new_tokens=3)
        waited_s = asyncio.get_running_loop().time() - began_s
        assert 25 < waited_s < 31, "somebody might have come"


@scenario
async def test_no_route_names_what_is_missing() -> None:
    async with client((0, 2), (4, 6)) as (_, c):
        with pytest.raises(NoRoute) as caught:
            await c.generate(PROMPT, max_new_tokens=3)
        assert caught.value.missing == ((2, 4),)


@scenario
async def test_a_stage_that_does_not_answer() -> None:
    async with client(*THREE) as (w, c):
        c.config = replace(c.config, connect_s=2.0)  # type: ignore[misc]
        w.network.freeze(PeerId("p1"))
        with pytest.raises(NetworkError, match="did not open within 2 s"):
            await c.generate(PROMPT, max_new_tokens=3)
        w.network.cut(PeerId("p1"))


@scenario
async def test_a_peer_lost_in_mid_answer_is_replaced_and_forgotten() -> None:
    async with client(*SPARED) as (w, c):
        stream = c.stream(PROMPT, max_new_tokens=50)
        await anext(stream)
        w.network.cut(PeerId("p1"))
        await _rest(stream)
        assert list(stream.completion.ids) == answer(PROMPT, 50, 6)
        assert stream.completion.route.stages[1].peer == "p3"
        again = await c.generate(PROMPT, max_new_tokens=3)
        assert again.route.stages[1].peer == "p3"


async def _rest(stream: Answer) -> list[str]:
    return [piece async for piece in stream]


@scenario
async def test_any_number_of_dead_peers_is_passed_over() -> None:
    """The directory names the dead for a minute and a half; one living peer is enough."""
    async with client((0, 2), *[(2, 4)] * 9, (4, 6)) as (w, c):
        for number in range(1, 9):
            w.network.cut(PeerId(f"p{number}"))
        found = await c.generate(PROMPT, max_new_tokens=3)
        assert found.route.stages[1].peer == "p9"


@scenario
async def test_a_conversation_moves_when_its_peers_go() -> None:
    async with client(*SPARED) as (w, c), c.conversation() as talk:
        first = await talk.generate(PROMPT, max_new_tokens=3)
        w.peers[1].server.carry_out(w.peers[1].host.table.drain(9.0))
        await w.settle()
        longer = [*PROMPT, *first.ids, 9]
        second = await talk.generate(longer, max_new_tokens=3)
        assert list(second.ids) == answer(longer, 3, 6)
        assert second.reused_tokens == 0
        assert second.route.stages[1].peer == "p3"
        w.network.cut(PeerId("p3"))
        await w.settle()
        with pytest.raises((NoRoute, Refused, PeerLost)):
            await talk.generate(longer, max_new_tokens=3)


@scenario
async def test_an_extension_that_nobody_answers_opens_a_new_session() -> None:
    async with client(*SPARED) as (w, c), c.conversation() as talk:
        await talk.generate(PROMPT, max_new_tokens=3)
        c.config = replace(c.config, connect_s=0.5)  # type: ignore[misc]
        w.network.freeze(PeerId("p1"))
        with contextlib.suppress(NetworkError):
            await talk.generate(PROMPT, max_new_tokens=50)
        w.network.cut(PeerId("p1"))
        done = await talk.generate(PROMPT, max_new_tokens=50)
        assert done.route.stages[1].peer == "p3"


@scenario
async def test_a_stall_ends_the_session() -> None:
    """Everybody is alive and nothing comes: the caller is told, the stages are freed."""
    async with client(*THREE) as (w, c), c.conversation() as talk:
        w.peers[1].device.step_s = 1e5
        with pytest.raises(PeerLost, match="does not finish its step") as caught:
            await talk.generate(PROMPT, max_new_tokens=3)
        assert caught.value.peer == "p1"
        await w.settle()
        assert all(len(peer.host.table) == 0 for peer in w.peers)
        w.peers[1].device._timer.cancel()  # type: ignore[union-attr]
        w.peers[1].host.running = None


# --- arguments ------------------------------------------------------------------------------------


@scenario
async def test_what_cannot_be_asked() -> None:
    async with client(*THREE) as (_, c):
        with pytest.raises(ContextTooLong):
            await c.generate(PROMPT, max_new_tokens=193)
        for prompt in ("", [VOCABULARY], [-1]):
            with pytest.raises(UsageError):
                await c.generate(prompt)
        for wrong in ({"max_new_tokens": 0}, {"temperature": -1.0}, {"stop": ""}):
            with pytest.raises(UsageError):
                await c.generate(PROMPT, **wrong)
    with pytest.raises(UsageError, match="list"):
        AsyncClient("one address")


@scenario
async def test_a_start_that_fails_leaves_nothing_behind() -> None:
    calls = []

    class Broken:
        async def join(self, *_: Any, **__: Any) -> None:
            calls.append("join")

        def follow(self, digest: str) -> None:
            return

        async def refresh(self, digest: str) -> None:
            raise OSError("the network is down")

        async def close(self) -> None:
            calls.append("close")

        links = None

    async with client(*THREE) as (_, c):
        folder = c._folder
        c._folder, c._member = None, Broken()  # type: ignore[assignment]
        c._join = Broken().join  # type: ignore[method-assign]
        patch = pytest.MonkeyPatch()
        patch.setattr(asyncio, "to_thread", _answer_with(folder, Letters()))
        try:
            with pytest.raises(OSError, match="down"):
                await c.start()
        finally:
            patch.undo()
        assert calls == ["join", "close"]


def _answer_with(*values: Any) -> Any:
    """A `to_thread` that knows the answers."""
    left = iter(values)

    async def answer_next(*_: Any, **__: Any) -> Any:
        return next(left)

    return answer_next
