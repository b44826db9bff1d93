"""What strangers can hold and say, and what it costs others: hostile frames on real links."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from hexswarm import guests, links, lobby, quota
from hexswarm.guests import (
    GRACE_S,
    GUEST,
    GUEST_BACKLOG_BYTES,
    GUESTS_UNFINISHED_BYTES,
    MAX_GUESTS,
    MAX_GUESTS_BLOCK,
    PARTNER,
    gives_way,
    heaviest,
)
from hexswarm.link import Link
from hexswarm.links import BULK, STEP
from hexswarm.lobby import HELLO_S, MAX_UNGREETED, MAX_UNGREETED_EACH
from hexswarm.messages import Close, GoAway, Message, Ping, Pong, Probe
from hexswarm.records import PeerId
from hexswarm.transports.base import Stream
from hexswarm.transports.memory import MemoryTransport
from hexswarm.wire import Frame, pack
from tests.swarm.test_links import A, B, Node, answer, hello, nodes, scenario, settle

ROOM = PARTNER.payload_bytes


def data_of(message: Message, payload: bytes = b"") -> bytes:
    return b"".join(pack(message, payload))


class Raw:
    """A stranger that speaks bytes."""

    def __init__(self, node: Node, name: str) -> None:
        self.peer = PeerId(name)
        self.target = node.peer
        self.transport: MemoryTransport = node.network.transport(self.peer)
        self.lanes: list[Stream] = []

    async def link(self) -> list[Stream]:
        """Greet on both lanes."""
        self.lanes = []
        for lane in (STEP, BULK):
            stream = await self.transport.dial(self.target)
            await hello(stream, lane, self.peer.encode()[:16].ljust(16))
            self.lanes.append(stream)
        for stream in self.lanes:
            assert await answer(stream) is not None
        return self.lanes

    async def thrown_out(self, stream: Stream | None = None) -> bool:
        """Its stream ends within two deadlines of a guest."""
        try:
            async with asyncio.timeout(2 * GUEST.deadline_s):
                while await (stream or self.lanes[STEP]).read(1 << 16):
                    pass
        except TimeoutError:
            return False
        return True


@asynccontextmanager
async def strangers(count: int) -> AsyncIterator[tuple[Node, Node, list[Raw]]]:
    """A node, an honest partner of it, and as many strangers."""
    async with nodes(A, B) as (a, b):
        await b.reach(a)
        a.links.watch(B)
        b.links.watch(A)
        crowd = [Raw(a, f"stranger {number}") for number in range(count)]
        try:
            yield a, b, crowd
            assert b.say(a, 7)
            while await a.hear() != [7]:
                pass
            assert (a.lost, b.lost) == ([item for item in a.lost if item[0] != B], [])
        finally:
            for stranger in crowd:
                await stranger.transport.close()


# --- frames -------------------------------------------------------------------------------------


@scenario
async def test_a_guest_may_send_a_probe_and_nothing_larger() -> None:
    async with strangers(2) as (a, _, (small, large)):
        step, bulk = await small.link()
        bulk.write([data_of(Probe(1), bytes(GUEST.payload_bytes))])
        assert await answer(step) is not None, "told how fast it came"
        _, bulk = await large.link()
        bulk.write([data_of(GoAway(1.0), bytes(GUEST.payload_bytes + 1))[:9]])
        assert await large.thrown_out()
        assert "over the limits" in dict(a.lost)[large.peer]
        assert a.links.connected(small.peer)


@scenario
async def test_a_partner_may_send_pieces_of_prompts_and_an_old_one_what_is_under_way() -> None:
    async with nodes(A, B) as (a, b):
        await b.reach(a)
        a.links.watch(B)
        b.links.watch(A)
        assert b.links.send(A, [(GoAway(1.0), bytes(ROOM))], BULK)
        assert await a.hear() == [1.0]
        a.links.unwatch(B)
        await asyncio.sleep(GRACE_S - 2)
        assert b.links.send(A, [(GoAway(2.0), bytes(ROOM))], BULK)
        assert await a.hear() == [2.0]
        await asyncio.sleep(4)
        b.links.send(A, [(GoAway(3.0), bytes(ROOM))], BULK)
        await settle()
        assert "over the limits" in a.lost[0][1]


@scenario
async def test_whoever_becomes_a_partner_may_go_on_at_once() -> None:
    """The first large frame comes right after the session's opening was granted."""
    async with nodes(A, B) as (a, b):

        def open_then_hear(peer: PeerId, frames: list[Frame]) -> None:
            a.links.watch(peer)
            a.reads.put_nowait((peer, frames))

        a.links._on_frames = open_then_hear
        await b.reach(a)
        b.links.watch(A)
        assert b.say(a, 1.0)
        assert await a.hear() == [1.0]
        assert b.links.send(A, [(GoAway(2.0), bytes(ROOM))], BULK)
        assert await a.hear() == [2.0]


@scenario
async def test_slow_frames_of_many_strangers_hold_bounded_memory() -> None:
    """Each within its own limits; together they are not: whoever holds most goes first."""
    count = 2 * GUESTS_UNFINISHED_BYTES // GUEST.payload_bytes
    async with strangers(count) as (a, _, crowd):
        for stranger in crowd:
            _, bulk = await stranger.link()
            bulk.write([data_of(Probe(1), bytes(GUEST.payload_bytes))[:-1]])
            held = sum(link.unfinished for link in a.links._all())
            assert held <= GUESTS_UNFINISHED_BYTES + GUEST.payload_bytes
        await settle()
        assert sum(link.unfinished for link in a.links._all()) <= GUESTS_UNFINISHED_BYTES
        assert {how for _, how in a.lost} == {"held too much that it did not finish"}
        await asyncio.sleep(GUEST.deadline_s + 1)
        assert [link.peer for link in a.links._all()] == [B]
        a.lost.clear()


@scenario
async def test_even_partners_together_hold_bounded_memory() -> None:
    """Sessions are cheap to open: the pool for all holds against a crowd of them, too."""
    async with strangers(20) as (a, _, crowd):
        for stranger in crowd:
            a.links.watch(stranger.peer)
            _, bulk = await stranger.link()
            bulk.write([data_of(GoAway(1.0), bytes(ROOM))[:-1]])
            await settle()
            held = sum(link.unfinished for link in a.links._all())
            assert held <= guests.UNFINISHED_BYTES
        assert 0 < len(a.lost) < 20
        a.lost.clear()


# --- streams and links ----------------------------------------------------------------------------


@scenario
async def test_streams_that_never_greet_are_few_and_short() -> None:
    async with strangers(MAX_UNGREETED) as (a, _, crowd):
        streams = [
            await stranger.transport.dial(A)
            for stranger in crowd
            for _ in range(2 if stranger is not crowd[0] else 2 * MAX_UNGREETED_EACH)
        ]
        await settle()
        assert len(a.links._lobby._ungreeted) == MAX_UNGREETED
        newcomer = Node(a.network, PeerId("newcomer"))
        await newcomer.links.start(listen=False)
        await newcomer.reach(a)
        assert newcomer.links.connected(A)
        await asyncio.sleep(HELLO_S + 1)
        assert a.links._lobby._ungreeted == {}
        assert [await stream.read(1) for stream in streams] == [b""] * len(streams)
        await newcomer.close()


@scenario
async def test_half_a_greeting_and_a_long_one_end() -> None:
    async with strangers(2) as (a, _, (half, long)):
        stream = await half.transport.dial(A)
        stream.write([b"\0\0\0"])
        assert await half.thrown_out(stream)
        stream = await long.transport.dial(A)
        stream.write([b"\0\0\x08\0\0\0\0\0"])
        await asyncio.sleep(0.1)
        assert await stream.read(1) == b"", "eight bytes were enough"
        assert a.links._lobby._ungreeted == {}


@scenario
async def test_one_identity_that_dials_for_ever_is_refused_and_hung_up_on() -> None:
    async with strangers(1) as (a, _, (flood,)):
        served = 0
        for _ in range(4 * int(quota.STREAMS_EACH.burst)):
            stream = await flood.transport.dial(A)
            await hello(stream, STEP, bytes(16))
            served += await answer(stream) is not None
        assert served <= quota.STREAMS_EACH.burst + 4
        await asyncio.sleep(60.0)
        assert a.links._lobby.half_open == {}, "the rest of it went with the connection"
        await flood.link()
        assert a.links.connected(flood.peer), "later it may come again"


@scenario
async def test_guests_are_few_and_the_useless_give_way_however_they_talk() -> None:
    async with strangers(MAX_GUESTS) as (a, _, crowd):
        for number, stranger in enumerate(crowd):
            step, _ = await stranger.link()
            if number % 2:
                step.write([data_of(Ping(1))])
            await asyncio.sleep(0.05)
        assert len(a.links.peers()) == MAX_GUESTS + 1
        crowd[0].lanes[STEP].write([data_of(Ping(1))])
        late = Node(a.network, PeerId("late"))
        await late.links.start(listen=False)
        await late.reach(a)
        await settle()
        assert a.lost == [(crowd[0].peer, "gave way to others: no session used it")]
        assert await crowd[0].thrown_out()
        assert late.links.connected(A)
        await late.close()


@scenario
async def test_whoever_shares_a_session_never_gives_way() -> None:
    async with strangers(MAX_GUESTS + 20) as (a, b, crowd):
        for stranger in crowd:
            await stranger.link()
        await settle()
        assert len(a.lost) == 20
        assert b.links.connected(A)


# --- floods ---------------------------------------------------------------------------------------


@scenario
async def test_a_flood_of_pings_costs_its_sender_the_link() -> None:
    async with strangers(1) as (a, b, (flood,)):
        step, _ = await flood.link()
        step.write([data_of(Ping(1)) * (int(quota.GUEST_FRAMES.burst) + 100)])
        assert b.say(a, 1)
        assert await flood.thrown_out()
        assert "too many frames" in dict(a.lost)[flood.peer]


@scenario
async def test_a_flood_leaves_turns_to_others() -> None:
    """What one read gave is taken a few frames at a time; who comes meanwhile is heard between."""
    async with strangers(1) as (a, b, (flood,)):
        heard: list[PeerId] = []
        a.links._on_frames = lambda peer, frames: heard.extend([peer] * len(frames))
        a.links.watch(flood.peer)
        step, _ = await flood.link()
        step.write([data_of(Close(bytes(16))) * 2000])
        assert b.say(a, 1)
        await settle()
        assert heard.count(flood.peer) == 2000
        assert heard.index(B) < 1000
        a.links._on_frames = lambda peer, frames: a.reads.put_nowait((peer, frames))


@scenario
async def test_a_partner_that_floods_is_read_more_slowly_and_kept() -> None:
    async with strangers(1) as (a, _, (flood,)):
        heard: list[float] = []
        loop = asyncio.get_running_loop()
        hear = a.links._on_frames
        a.links._on_frames = lambda peer, frames: heard.extend([loop.time()] * len(frames))
        a.links.watch(flood.peer)
        step, _ = await flood.link()
        count = int(quota.CONTROL_FRAMES.burst + 5 * quota.CONTROL_FRAMES.per_s)
        for _ in range(count // 100):
            step.write([data_of(Close(bytes(16))) * 100])
        await asyncio.sleep(3.0)
        assert len(heard) < count
        await asyncio.sleep(3.0)
        assert len(heard) == count // 100 * 100
        assert a.lost == []
        a.links._on_frames = hear


@scenario
async def test_who_asks_and_does_not_read_is_lost() -> None:
    """A guest is owed little: what waits for it is small when its link ends."""
    async with strangers(1) as (a, _, (deaf,)):
        await deaf.link()
        a.network.freeze(A, deaf.peer)
        sent = 0
        while a.links.tell(deaf.peer, Probe(sent), bytes(1 << 17), BULK):
            sent += 1
            assert sent * (1 << 17) <= GUEST_BACKLOG_BYTES
        assert a.lost == [(deaf.peer, "does not read what it is sent")]
        a.network.heal(A, deaf.peer)


@scenario
async def test_nothing_is_handed_on_of_whoever_was_lost_by_our_answer() -> None:
    async with strangers(1) as (a, _, (deaf,)):
        step, _ = await deaf.link()
        a.network.wire(A, deaf.peer).freeze()
        assert a.links.tell(
            deaf.peer, Probe(1), bytes(GUEST_BACKLOG_BYTES - len(data_of(Probe(1))))
        )
        step.write([data_of(Ping(1)) + data_of(GoAway(1.0))])
        await settle()
        assert a.lost == [(deaf.peer, "does not read what it is sent")]
        assert a.reads.empty()
        a.network.wire(A, deaf.peer).thaw()


@scenario
async def test_what_waits_for_all_together_is_bounded() -> None:
    """Nobody is over the limit of one; the one for which most waits is lost."""
    async with strangers(3) as (a, _, crowd):
        for stranger in crowd:
            await stranger.link()
            a.links.watch(stranger.peer)
            a.network.freeze(A, stranger.peer)
        payload, total = bytes(4 << 20), 0
        while not a.lost:
            for stranger in crowd[: 1 + (total < guests.BACKLOG_BYTES // 2)]:
                a.links.send(stranger.peer, [(GoAway(1.0), payload)], BULK)
                total += len(payload)
            if total >= guests.BACKLOG_BYTES // 2:
                a.links.send(crowd[2].peer, [(GoAway(1.0), payload)], BULK)
                total += len(payload)
            assert total <= guests.BACKLOG_BYTES + (16 << 20)
        assert len(a.lost) == 1
        a.lost.clear()
        for stranger in crowd:
            a.network.cut(A, stranger.peer)
        a.lost.clear()


# --- who goes -------------------------------------------------------------------------------------


def link(name: str, since_s: float, block: str = "") -> Link:
    return Link(PeerId(name), bytes(16), since_s, dialled=False, block=block)


def test_the_most_crowded_block_gives_way_first() -> None:
    crowd = [link(f"c{n}", 100.0 + n, "crowd") for n in range(5)]
    others = [link(f"o{n}", float(n), f"block {n}") for n in range(MAX_GUESTS - 5)]
    newcomer = link("new", 200.0, "elsewhere")
    assert gives_way([*others[1:], *crowd, newcomer], newcomer) is None
    assert gives_way([*others, *crowd, newcomer], newcomer) is crowd[0]


def test_a_block_has_its_own_limit() -> None:
    crowd = [link(f"c{n}", float(n), "crowd") for n in range(MAX_GUESTS_BLOCK)]
    others = [link("o", -1.0, "other")]
    assert gives_way([*crowd, *others], link("new", 99.0, "crowd")) is crowd[0]
    assert gives_way([*crowd, *others], link("new", 99.0, "other")) is None


def test_who_was_of_use_lately_stays_longer() -> None:
    crowd = [link(f"c{n}", float(n)) for n in range(MAX_GUESTS)]
    crowd[0].partner_s = 500.0
    assert gives_way(crowd, link("new", 600.0)) is crowd[1]


def test_the_heaviest_is_named_only_beyond_the_limit() -> None:
    some = [link(f"c{n}", float(n)) for n in range(4)]
    weights = {"c0": 5, "c1": 9, "c2": 9, "c3": 1}
    assert heaviest(some, 24, lambda item: weights[item.peer]) is None
    assert heaviest(some, 23, lambda item: weights[item.peer]) is some[1], "the older of two"
    assert heaviest([], 0, lambda item: 1) is None


def test_limits_fit_what_honest_guests_send() -> None:
    assert GUEST.payload_bytes < 1 << 18 < PARTNER.payload_bytes
    assert 2 * GUEST.payload_bytes < GUEST_BACKLOG_BYTES
    assert PARTNER.deadline_s <= GRACE_S
    assert lobby.GREETING.payload_bytes == 0
    assert GUEST.payload_bytes <= links.READ_BYTES


@pytest.mark.parametrize("message", [Pong(1), Ping(1)])
def test_a_greeting_is_short(message: Message) -> None:
    assert len(data_of(message)) < lobby.GREETING.header_bytes
