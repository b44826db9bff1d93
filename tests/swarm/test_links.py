"""Links over the in-memory network, on virtual time: no test waits for a clock."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from hexswarm.errors import PeerLost
from hexswarm.guests import GUEST, PARTNER, PARTNER_BACKLOG_BYTES
from hexswarm.links import BULK, MAX_DIALLING, STEP, Links
from hexswarm.lobby import HELLO_S, MAX_HALF_OPEN, MAX_HALF_OPEN_EACH
from hexswarm.messages import PROTOCOL_VERSION, GoAway, Hello, Message, Ping, Pong
from hexswarm.records import PeerId
from hexswarm.transports.base import Stream
from hexswarm.transports.memory import MemoryNetwork
from hexswarm.wire import Frame, FrameDecoder, Limits, pack
from tests import virtual

A, B, C = PeerId("A"), PeerId("B"), PeerId("C")
SILENCE_S = 4.0


class Node:
    """Links of one peer; what they tell is kept in `reads` (one item a call) and `lost`."""

    def __init__(self, network: MemoryNetwork, peer: PeerId, **options: Any) -> None:
        self.network, self.peer = network, peer
        self.transport = network.transport(peer)
        self.reads: asyncio.Queue[tuple[PeerId, list[Frame]]] = asyncio.Queue()
        self.lost: list[tuple[PeerId, str]] = []
        self.links = Links(
            self.transport,
            virtual.LoopClock(),
            lambda peer, frames: self.reads.put_nowait((peer, frames)),
            lambda peer, how: self.lost.append((peer, how)),
            silence_s=SILENCE_S,
            **options,
        )

    async def close(self) -> None:
        await self.links.close()
        await self.transport.close()

    async def reach(self, other: Node) -> None:
        await self.links.connect(other.peer, ())

    def say(self, other: Node, *exit_s: float, lane: int = STEP) -> bool:
        """Send messages that carry numbers."""
        return self.links.send(other.peer, [(GoAway(value), b"") for value in exit_s], lane)

    async def hear(self, count: int = 0) -> list[float]:
        """The numbers of the next read, or of as many reads as give `count`."""
        heard: list[float] = []
        while len(heard) < (count or 1):
            _, frames = await self.reads.get()
            heard += [f.message.exit_s for f in frames if isinstance(f.message, GoAway)]
        return heard


@asynccontextmanager
async def nodes(*peers: PeerId, delay_s: float = 0.01) -> AsyncIterator[list[Node]]:
    """Listening nodes on one network, closed at the end without a task left."""
    network = MemoryNetwork(delay_s)
    made = [Node(network, peer) for peer in peers]
    for node in made:
        await node.links.start(listen=True)
    try:
        yield made
    finally:
        for node in made:
            await node.close()
        assert virtual.others() == set()


def scenario(test: Any) -> Any:
    """Run a coroutine function as a test on virtual time."""

    def run() -> None:
        virtual.run(test())

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


async def hello(
    stream: Stream, lane: int, name: bytes = b"n" * 16, version: int = PROTOCOL_VERSION
) -> None:
    """What a dialler says first."""
    stream.write(pack(Hello(version, "", lane, name)))


async def answer(stream: Stream) -> Message | None:
    """The next frame of a raw stream, None at its end."""
    decoder, data = FrameDecoder(), b""
    while data := await stream.read(1 << 16):
        if frames := decoder.feed(data, 0.0):
            return frames[0].message
    return None


async def settle() -> None:
    """Let everything under way arrive (virtual seconds)."""
    await asyncio.sleep(1.0)


# --- making links -------------------------------------------------------------------------------


@scenario
async def test_frames_sent_together_arrive_together_on_both_lanes() -> None:
    async with nodes(A, B) as (a, b):
        await a.reach(b)
        for lane in (STEP, BULK):
            assert a.say(b, 1, 2, 3, lane=lane)
            assert await b.hear() == [1, 2, 3]
            assert b.say(a, 4, 5, lane=lane)
            assert await a.hear() == [4, 5]
        a.links.send(B, [(GoAway(1), b"payload")], BULK)
        assert (await b.reads.get()) == (A, [Frame(GoAway(1.0), b"payload")])


@scenario
async def test_connecting_again_is_free() -> None:
    async with nodes(A, B, C) as (a, b, c):
        await asyncio.gather(*(a.reach(b) for _ in range(5)), a.reach(c))
        await a.reach(b)
        assert len(a.links._links[B]) == len(b.links._links[A]) == 1
        assert sorted(a.links.peers()) == [B, C]


@scenario
async def test_nobody_there_and_hung_up() -> None:
    async def hang_up(stream: Stream) -> None:
        return

    async def no_answer(stream: Stream) -> None:
        await asyncio.sleep(1000)

    async with nodes(A) as (a,):
        with pytest.raises(PeerLost, match="cannot be reached"):
            await a.links.connect(B, ())
        other = a.network.transport(B)
        await other.listen(hang_up)
        with pytest.raises(PeerLost, match="hung up"):
            await a.links.connect(B, ())
        await other.listen(no_answer)
        with pytest.raises(PeerLost, match="did not answer"):
            await a.links.connect(B, ())
        assert a.lost == [], "what never was is not lost"
        await other.close()


@scenario
async def test_another_protocol_version_is_refused_and_both_know_why() -> None:
    async def future(stream: Stream) -> None:
        await hello(stream, STEP, version=PROTOCOL_VERSION + 1)
        await asyncio.sleep(100)

    async with nodes(A) as (a,):
        other = a.network.transport(B)
        await other.listen(future)
        with pytest.raises(PeerLost, match=f"protocol version {PROTOCOL_VERSION + 1} instead"):
            await a.links.connect(B, ())
        stream = await other.dial(A)
        await hello(stream, STEP, version=PROTOCOL_VERSION + 1)
        said = await answer(stream)
        assert isinstance(said, Hello)
        assert said.version == PROTOCOL_VERSION
        assert await answer(stream) is None
        await other.close()


@scenario
async def test_lanes_may_arrive_in_either_order() -> None:
    async with nodes(A) as (a,):
        other = a.network.transport(B)
        lanes = {}
        for lane in (BULK, STEP):
            lanes[lane] = await other.dial(A)
            await hello(lanes[lane], lane)
            assert isinstance(await answer(lanes[lane]), Hello)
        lanes[STEP].write(pack(GoAway(1)))
        assert await a.hear() == [1]
        assert a.links.send(B, [(GoAway(2), b"")], BULK)
        assert await answer(lanes[BULK]) == GoAway(2.0)
        await other.close()


@scenario
async def test_both_dial_at_once_and_no_frame_is_lost_or_overtaken() -> None:
    """Two links come up; whatever is sent meanwhile arrives once and in order."""
    async with nodes(A, B) as (a, b):
        a.network.shape(A, B, delay_s=0.05, one_way=True)
        await asyncio.gather(a.reach(b), b.reach(a))
        assert len(a.links._links[B]) == len(b.links._links[A]) == 2
        for value in range(20):
            assert a.say(b, value)
            assert b.say(a, value)
            await asyncio.sleep(0.005)
        for node in (a, b):
            assert await node.hear(20) == list(range(20))
        assert a.lost == b.lost == []


@scenario
async def test_a_second_link_does_not_take_the_traffic_over() -> None:
    """Else frames of one session, sent before and after it is ready, could overtake each other."""
    async with nodes(A, B) as (a, b):
        dial = asyncio.create_task(b.reach(a))
        await a.reach(b)
        a.say(b, 1)
        await dial
        a.say(b, 2)
        assert await b.hear(2) == [1, 2]
        assert [link.used for link in a.links._links[B]] == [True, False]


@scenario
async def test_a_failed_dial_does_not_matter_if_the_other_got_through() -> None:
    async with nodes(A, B) as (a, b):
        failed = asyncio.Event()

        async def fail(*_: Any) -> Stream:
            await failed.wait()
            raise PeerLost(B, None, "cannot be reached")

        a.transport.dial = fail  # type: ignore[method-assign]
        dial = asyncio.create_task(a.reach(b))
        await b.reach(a)
        failed.set()
        await dial
        assert a.say(b, 1)
        assert await b.hear() == [1]


@scenario
async def test_a_peer_that_dials_anew_has_lost_the_old_link() -> None:
    """A process that restarted with the same identity: the old link ends, the new one serves."""
    async with nodes(A, B) as (a, b):
        await b.reach(a)
        b.say(a, 1)
        assert await a.hear() == [1]
        a.network.freeze(A, B)  # B's machine goes away without a word
        b.links._links.clear()
        b.network.heal(A, B)
        await b.reach(a)
        assert a.lost == [(B, "began anew")]
        assert len(a.links._links[B]) == 1
        assert a.say(b, 2)
        assert await b.hear() == [2]


@scenario
async def test_half_open_links_are_few_and_short() -> None:
    """Lanes without their sibling neither pile up nor keep others out."""
    async with nodes(A, B) as (a, b):
        hostile = a.network.transport(C)
        streams = []
        for index in range(3 * MAX_HALF_OPEN_EACH):
            stream = await hostile.dial(A)
            await hello(stream, STEP, index.to_bytes(16, "big"))
            streams.append(stream)
        await settle()
        assert len(a.links._lobby.half_open) == MAX_HALF_OPEN_EACH
        await b.reach(a)
        assert b.say(a, 1)
        assert await a.hear() == [1]
        await asyncio.sleep(HELLO_S + 1)
        assert a.links._lobby.half_open == {}
        last = streams[-1]
        assert isinstance(await answer(last), Hello)
        assert await answer(last) is None, "closed"
        await hostile.close()


@scenario
async def test_many_peers_half_open_let_the_newest_in() -> None:
    async with nodes(A, B) as (a, b):
        crowd = [a.network.transport(PeerId(f"x{n}")) for n in range(MAX_HALF_OPEN + 9)]
        for other in crowd:
            await hello(await other.dial(A), STEP)
        await settle()
        assert len(a.links._lobby.half_open) == MAX_HALF_OPEN
        await b.reach(a)
        assert a.links.connected(B)
        for other in crowd:
            await other.close()


@scenario
async def test_frames_before_both_greetings_are_refused() -> None:
    """Somebody without a whole link could not be answered, nor be lost."""
    async with nodes(A) as (a,):
        other = a.network.transport(B)
        stream = await other.dial(A)
        await hello(stream, STEP)
        assert isinstance(await answer(stream), Hello)
        stream.write(pack(GoAway(1)))
        assert await answer(stream) is None
        assert a.reads.empty()
        assert a.lost == []
        await other.close()


@scenario
async def test_a_lane_is_greeted_once() -> None:
    async with nodes(A) as (a,):
        other = a.network.transport(B)
        first, second = await other.dial(A), await other.dial(A)
        for stream in (first, second):
            await hello(stream, STEP)
        assert isinstance(await answer(first), Hello)
        assert await answer(second) is None
        await other.close()


# --- ends ---------------------------------------------------------------------------------------


@scenario
async def test_the_end_of_a_link_is_told_once() -> None:
    async with nodes(A, B) as (a, b):
        await a.reach(b)
        a.network.cut(A, B)
        await settle()
        assert a.lost == [(B, "vanished")]
        assert b.lost == [(A, "vanished")]
        assert not a.say(b, 1)
        assert not a.links.connected(B)
        with pytest.raises(PeerLost):
            await a.reach(b)
        a.network.heal(A, B)
        await a.reach(b)
        assert a.say(b, 1)
        assert await b.hear() == [1]


@scenario
async def test_one_lane_takes_the_other_with_it() -> None:
    async with nodes(A, B) as (a, b):
        await a.reach(b)
        b.links._links[A][0].lanes[BULK].close()
        await settle()
        assert len(a.lost) == len(b.lost) == 1


@scenario
async def test_a_link_that_carried_something_is_missed_despite_a_sibling() -> None:
    """What was under way on it will not come: silence about that would stall a session."""
    async with nodes(A, B) as (a, b):
        await asyncio.gather(a.reach(b), b.reach(a))
        a.say(b, 1)
        await settle()
        a.links._links[B][0].close()
        await settle()
        assert a.lost == [(B, "vanished")]
        assert len(b.lost) == 1
        assert a.links.peers() == b.links.peers() == []


@scenario
async def test_a_link_never_used_is_not_missed() -> None:
    async with nodes(A, B) as (a, b):
        await asyncio.gather(a.reach(b), b.reach(a))
        a.say(b, 1)
        b.say(a, 1)
        await settle()
        unused = [link for link in a.links._links[B] if not link.used]
        for link in unused:
            link.close()
        await settle()
        assert a.lost == b.lost == []
        assert a.say(b, 2)


@scenario
async def test_a_broken_protocol_ends_the_link() -> None:
    async with nodes(A, B) as (a, b):
        for data, how in ((b"\xff" * 8, "over the limits"), (b"\0\0\0\1\0\0\0\0\xc0", "malformed")):
            await a.reach(b)
            a.links._links[B][0].lanes[STEP].write([data])
            await settle()
            assert how in b.lost.pop()[1]
            assert b.reads.empty()


@scenario
async def test_a_second_greeting_ends_the_link() -> None:
    async with nodes(A, B) as (a, b):
        await a.reach(b)
        a.links._links[B][0].lanes[STEP].write(pack(Hello(PROTOCOL_VERSION, "", 0, bytes(16))))
        await settle()
        assert "two greetings" in b.lost[0][1]


@scenario
async def test_nothing_is_handed_over_after_the_loss_was_told() -> None:
    """An Open read after its client was lost would lease KV for nobody."""
    async with nodes(A, B) as (a, b):
        await a.reach(b)
        link = b.links._links[A][0]
        a.say(b, 1)
        b.links._drop(link, "for the test")
        await settle()
        assert b.lost == [(A, "for the test")]
        assert b.reads.empty()


@scenario
async def test_a_mistake_in_the_handler_is_loud_and_ends_that_link_only() -> None:
    lines: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = lines.append  # type: ignore[method-assign]
    logging.getLogger("hexswarm.links").addHandler(handler)

    def broken(peer: PeerId, _: Any) -> None:
        if peer == B:
            raise KeyError("a mistake of ours")

    try:
        async with nodes(A, B, C) as (a, b, c):
            a.links._on_frames = broken
            a.links._on_lost = broken
            await b.reach(a)
            await c.reach(a)
            b.say(a, 1)
            c.say(a, 1)
            await settle()
            assert a.links.peers() == [C]
            assert b.lost
            assert len(lines) == 2
    finally:
        logging.getLogger("hexswarm.links").removeHandler(handler)


@scenario
async def test_a_choked_neighbour_is_lost() -> None:
    async with nodes(A, B) as (a, b):
        await a.reach(b)
        a.links.watch(B)
        a.network.freeze(A, B)
        payload = bytes(4 << 20)
        sent = 0
        while a.links.send(B, [(GoAway(1), payload)], BULK):
            sent += 1
        assert sent == PARTNER_BACKLOG_BYTES // len(payload) - 1
        assert a.lost == [(B, "does not read what it is sent")]
        a.network.cut(A, B)


@scenario
async def test_close_ends_everything_and_tells_no_loss() -> None:
    async with nodes(A, B, C) as (a, b, c):
        await a.reach(b)
        await c.reach(a)
        a.network.freeze(A, B)
        hanging = asyncio.create_task(a.links.connect(PeerId("nobody"), ()))
        other = a.network.transport(PeerId("half"))
        await hello(await other.dial(A), STEP)
        await other.dial(A)
        await settle()
        await a.links.close()
        await asyncio.gather(hanging, return_exceptions=True)
        await settle()
        assert a.lost == []
        assert c.lost == [(A, "vanished")]
        a.network.heal(A, B)
        await settle()
        assert b.lost == [(A, "vanished")]
        with pytest.raises(PeerLost):
            await c.reach(a)
        await other.close()


@scenario
async def test_nobody_is_dialled_after_the_end() -> None:
    """A request that still looks for a way leaves nothing behind."""
    async with nodes(A, B) as (a, b):
        before = virtual.others()
        await a.links.close()
        with pytest.raises(PeerLost, match="were closed"):
            await a.reach(b)
        await settle()
        assert not a.links.connected(B)
        assert virtual.others() < before


@scenario
async def test_dials_under_way_are_bounded() -> None:
    """Strangers name peers for us to dial; those who do not answer must not pile up."""
    async with nodes(A, B) as (a, b):
        nobody = [a.network.transport(PeerId(f"x{number}")) for number in range(MAX_DIALLING)]
        a.network.freeze(A)
        a.network.heal(A, B)
        hanging = [asyncio.create_task(a.links.connect(other.local, ())) for other in nobody]
        await settle()
        with pytest.raises(PeerLost, match="too many"):
            await a.reach(b)
        hanging[0].cancel()
        a.network.cut(A, nobody[0].local)
        await settle()
        await a.reach(b)
        for task in hanging:
            task.cancel()
        await asyncio.gather(*hanging, return_exceptions=True)
        for other in nobody:
            a.network.cut(A, other.local)
            await other.close()


@scenario
async def test_whoever_waits_for_a_dial_may_be_cancelled() -> None:
    """The dial goes on for the others who wait, and its failure is nobody's surprise."""
    async with nodes(A, B) as (a, b):
        a.network.freeze(A, B)
        first, second = (asyncio.create_task(a.reach(b)) for _ in range(2))
        await settle()
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        a.network.heal(A, B)
        await second
        assert a.links.connected(B)


# --- life ---------------------------------------------------------------------------------------


@scenario
async def test_a_frozen_neighbour_is_lost_in_time_if_watched() -> None:
    async with nodes(A, B) as (a, b):
        await a.reach(b)
        a.links.watch(B)
        await asyncio.sleep(100)
        assert a.lost == [], "an idle neighbour answers pings"
        a.network.freeze(A, B)
        await asyncio.sleep(SILENCE_S - 1.5)
        assert a.lost == []
        await asyncio.sleep(2.5)
        assert a.lost == [(B, "has been silent for 4 s")]
        assert b.lost == [], "B did not depend on A"
        a.network.cut(A, B)


@scenario
async def test_an_unwatched_neighbour_may_be_silent() -> None:
    async with nodes(A, B) as (a, b):
        await a.reach(b)
        a.links.watch(B)
        a.links.watch(B)
        a.links.unwatch(B)
        a.links.unwatch(B)
        a.network.freeze(A, B)
        await asyncio.sleep(1000)
        assert a.lost == []
        a.links.watch(B)
        await asyncio.sleep(SILENCE_S + 0.5)
        assert len(a.lost) == 1, "silence counts from the moment when it matters, and in time"
        a.network.cut(A, B)


@pytest.mark.parametrize("silence_s", [0.05, 0.5, 30.0])
def test_any_silence_limit_leaves_time_for_an_answer(silence_s: float) -> None:
    async def act() -> None:
        network = MemoryNetwork(0.001)
        a, b = Node(network, A), Node(network, B)
        a.links = Links(
            a.transport,
            virtual.LoopClock(),
            lambda *_: None,
            lambda peer, how: a.lost.append((peer, how)),
            silence_s=silence_s,
        )
        for node in (a, b):
            await node.links.start(listen=True)
        await a.reach(b)
        await asyncio.sleep(100)
        a.links.watch(B)
        b.links.watch(A)
        await asyncio.sleep(100)
        assert a.lost == []
        network.freeze(A, B)
        await asyncio.sleep(1.5 * silence_s)
        assert len(a.lost) == 1
        network.cut(A, B)
        await a.close()
        await b.close()

    virtual.run(act())


@scenario
async def test_each_of_two_links_is_asked_and_answers_itself() -> None:
    """The link that only the other side uses would otherwise seem silent, or hide a dead one."""
    async with nodes(A, B) as (a, b):
        await asyncio.gather(a.reach(b), b.reach(a))
        a.links.watch(B)
        b.links.watch(A)
        a.say(b, 1)
        b.say(a, 1)
        await asyncio.sleep(100)
        assert a.lost == b.lost == []
        assert len(a.links._links[B]) == 2


@scenario
async def test_our_own_delay_is_nobodys_silence() -> None:
    """After the loop stood still for longer than the limit, the neighbour still gets its time."""
    async with nodes(A, B) as (a, b):
        await a.reach(b)
        a.links.watch(B)
        await settle()
        loop = asyncio.get_running_loop()
        assert isinstance(loop, virtual.VirtualLoop)
        loop._jump.now_s += 10 * SILENCE_S
        await settle()
        await asyncio.sleep(SILENCE_S)
        assert a.lost == []


@scenario
async def test_round_trips_are_measured() -> None:
    async with nodes(A, B, delay_s=0.04) as (a, b):
        await a.reach(b)
        assert a.links.rtts == {}
        a.links.ping(B)
        a.links.ping(C)
        await settle()
        assert a.links.rtts == {B: pytest.approx(0.08)}
        a.network.shape(A, B, delay_s=0.09)
        for _ in range(50):
            a.links.ping(B)
            await settle()
        assert a.links.rtts[B] == pytest.approx(0.18, rel=0.01)
        a.network.cut(A, B)
        await settle()
        assert a.links.rtts == {}


@pytest.mark.parametrize("limits", [GUEST, PARTNER])
def test_a_frame_that_never_ends_ends_the_link(limits: Limits) -> None:
    """Also while the other lane is lively; a guest has less time."""

    async def act() -> None:
        async with nodes(A, B) as (a, b):
            await a.reach(b)
            if limits is PARTNER:
                b.links.watch(A)
            a.links._links[B][0].lanes[BULK].write([pack(GoAway(1))[0][:-1]])
            for _ in range(int(limits.deadline_s) - 1):
                a.say(b, 1)
                await settle()
            assert b.lost == []
            await asyncio.sleep(2)
            assert b.lost == [(A, "takes too long for a frame")]

    virtual.run(act())


@scenario
async def test_pings_of_a_stranger_are_answered_and_forged_pongs_ignored() -> None:
    async with nodes(A, B) as (a, b):
        await a.reach(b)
        link = a.links._links[B][0]
        link.write([(Ping(7), b"")])
        link.write([(Pong(7), b"")])
        await settle()
        assert b.links.rtts == {}
        assert a.lost == b.lost == []


@scenario
async def test_to_depend_on_a_peer_is_no_sign_of_its_life() -> None:
    """Else each new session would give a frozen peer another while."""
    async with nodes(A, B) as (a, _):
        await a.links.connect(B, ())
        a.network.freeze(A, B)
        a.network.freeze(B, A)
        loop = asyncio.get_running_loop()
        before_s = a.links.silent_s(B, loop.time())
        await asyncio.sleep(3)
        a.links.watch(B)
        assert a.links.silent_s(B, loop.time()) == pytest.approx(before_s + 3)
        assert math.isinf(a.links.silent_s(PeerId("nobody"), loop.time()))
