"""The effects of a stage: whatever the table decides is carried out, and a lost link harms nobody.

Whole rings over real links are in `swarm/test_runtime.py`; here is what only the server does, once
with the real engine and its thread.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from hexswarm.clock import RealClock, VirtualClock
from hexswarm.errors import NetworkError, PeerLost, SessionClosed
from hexswarm.links import Links, Outgoing
from hexswarm.messages import (
    AskProgress,
    Cancel,
    Close,
    Hidden,
    Message,
    Open,
    Opened,
    Progress,
    Refuse,
    Tokens,
    Trace,
    Traced,
)
from hexswarm.peer.actions import Send
from hexswarm.peer.admission import RESERVE_S, Hosted
from hexswarm.peer.cache import BlockTables
from hexswarm.peer.engine import Engine
from hexswarm.peer.scheduler import Policy, Scheduler
from hexswarm.peer.server import ANNOUNCE_S, EXPIRE_EVERY_S, PeerServer
from hexswarm.peer.stage import StageTable
from hexswarm.peer.steps import Activations, Batch, Result, Row
from hexswarm.records import PeerId, Route, Span, Stage
from hexswarm.runtime import SessionRuntime
from hexswarm.transports.memory import MemoryNetwork
from hexswarm.wire import Frame
from tests import virtual
from tests.loopback import CLIENT, MODEL, Host, IntegerModel, answer
from tests.world import listen, turn, world

THREE = ((0, 2), (2, 4), (4, 6))
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


def scenario(test: Any) -> Any:
    """Run a coroutine function as a test on virtual time."""

    def run() -> None:
        virtual.run(test())

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


@scenario
async def test_results_for_a_neighbour_that_is_gone_are_dropped() -> None:
    async with world(*THREE) as w:
        session = await w.opened()
        session.generate(turn(PROMPT, 50))
        await session.wait()
        server = w.peers[1].server
        w.peers[1].links._links.clear()
        server.carry_out(w.peers[1].host.table.drain(1.0))
        await w.settle()
        session.close()


@scenario
async def test_a_dial_that_fails_in_any_way_is_answered() -> None:
    """Else the client would wait, and the lease stay, until both run out."""
    async with world(*THREE) as w:

        async def fail(*_: object) -> None:
            raise NetworkError("the daemon is ill")

        w.peers[1].links.connect = fail  # type: ignore[method-assign]
        session = w.open()
        with pytest.raises(PeerLost, match="cannot be reached"):
            await session.ready()
        await w.settle()
        assert w.clean


@scenario
async def test_leases_run_out_by_the_server() -> None:
    async with world(*THREE) as w:
        session = await w.opened()
        ticking = asyncio.create_task(w.peers[1].server.expire_for_ever())
        w.peers[1].host.ledger.now = 1000.0
        await w.settle(EXPIRE_EVERY_S + 1)
        assert session.machine.failed is not None
        assert w.clean
        ticking.cancel()


@scenario
async def test_a_reservation_ends_to_the_moment() -> None:
    """And with it the session at the other stages; one that began stays."""
    async with world(*THREE) as w:
        loop = asyncio.get_running_loop()
        used = await w.opened()
        used.generate(turn(PROMPT, 3))
        await listen(used)
        ticking = asyncio.create_task(w.peers[1].server.expire_for_ever())
        await w.settle(1.7)
        began, unused = loop.time(), await w.opened()
        assert loop.time() - began < 0.1
        with pytest.raises(SessionClosed, match="nothing came within 10 s"):
            await unused.wait()
        assert 0 <= loop.time() - began - RESERVE_S < 0.05, "with the ways there and back"
        await w.settle(0.1)
        assert all(len(peer.host.table) == 1 for peer in w.peers)
        await w.settle(3 * RESERVE_S)
        assert used.machine.open
        used.close()
        ticking.cancel()
        await w.settle()
        assert w.clean


@scenario
async def test_draining_ends_with_the_last_session_and_at_the_deadline() -> None:
    """Clients are told before the directory is; a directory that hangs holds nobody up."""
    async with world(*THREE) as w:
        loop = asyncio.get_running_loop()

        async def hang() -> None:
            assert any(peer.host.table.draining for peer in w.peers)
            await asyncio.Event().wait()

        server = w.peers[0].server
        keys = [_stand(server, bytes([index]) * 16) for index in range(3)]
        for late_s, key in zip((5.0, 6.0), keys, strict=False):
            loop.call_later(late_s, server.on_frames, CLIENT, [Frame(Close(key))])
        began = loop.time()
        await server.drain(25.0, hang)
        assert loop.time() - began == 25.0, "one is never closed"
        assert len(server.table) == 0
        assert w.peers[0].clean
        key = _stand(w.peers[1].server, keys[0])
        loop.call_later(6.0, w.peers[1].server.on_frames, CLIENT, [Frame(Close(key))])
        began = loop.time()
        await w.peers[1].server.drain(25.0, hang)
        assert loop.time() - began == 6.0
        began = loop.time()
        await w.peers[2].server.drain(25.0, hang)
        assert loop.time() - began == ANNOUNCE_S, "nobody is there"


def _stand(server: PeerServer, key: bytes = b"k" * 16) -> bytes:
    """A session that somebody opened, and goes on to nobody."""
    first, end = server.table._hosted.span.first, server.table._hosted.span.end
    server.on_frames(CLIENT, [Frame(Open(key, 0, MODEL, first, end, "before", "p1", (), 32))])
    return key


@scenario
async def test_what_is_dropped_is_not_begun_by_what_came_just_before() -> None:
    """Steps are handed over at the end of a delivery; what ends them may stand behind them."""
    async with world(*THREE) as w:
        peer = w.peers[1]
        _stand(peer.server)
        step = Hidden(b"k" * 16, 0, 0, 0, 1, True, "float32")
        made = peer.host.table.on_frames(PeerId("before"), [Frame(step, bytes(4))], 0.0)
        made += peer.host.table.on_frames(CLIENT, [Frame(Cancel(b"k" * 16, 0, 0))], 0.0)
        peer.server.carry_out(made)
        assert not peer.host.steps
        assert peer.host.running is None
        peer.server.carry_out(peer.host.table.end_all())


@scenario
async def test_quiet_waits_for_the_last_session_and_not_for_ever() -> None:
    async with world(*THREE) as w:
        loop = asyncio.get_running_loop()
        server = w.peers[0].server
        await server.quiet(10.0)
        assert loop.time() == 0.0
        sessions = [await w.opened() for _ in range(2)]
        began = loop.time()
        await server.quiet(3.0)
        assert loop.time() - began == 3.0
        loop.call_later(1.0, sessions[0].close)
        loop.call_later(2.0, sessions[1].close)
        await server.quiet(100.0)
        assert 5.0 < loop.time() - began < 5.1


@scenario
async def test_frames_of_one_batch_leave_in_one_write() -> None:
    """The next stage reads the convoy at once and keeps it together."""
    async with world(*THREE) as w:
        reads: list[list[Frame]] = []
        server = w.peers[1].server
        original = server.on_frames

        def record(peer: PeerId, frames: list[Frame]) -> None:
            reads.append(frames)
            original(peer, frames)

        server.on_frames = record  # type: ignore[method-assign]
        sessions = [await w.opened() for _ in range(3)]
        head = w.peers[0]
        rows = []
        for session in sessions:
            lease = head.host.ledger.tables.lease_of(session.machine.key)
            rows.append(Row(session.machine.key, 0, 1, [5], True, lease.blocks))
        reads.clear()
        head.server.deliver([head.host.model.run(row) for row in rows])
        await w.settle()
        (together,) = reads
        told = [frame.message.siblings for frame in together if isinstance(frame.message, Hidden)]
        assert told == [2, 1, 0]
        for session in sessions:
            session.close()
        await w.settle()
        assert w.clean


class Threaded:
    """A peer with the real engine on the integer model."""

    def __init__(self, network: MemoryNetwork, name: str, span: Span, layers: int) -> None:
        self.peer = PeerId(name)
        self.model = IntegerModel(span, layers, 64)
        self.tables = BlockTables(64)
        clock = RealClock()
        scheduler = Scheduler(Policy(head=span.first == 0), self.tables.blocks)
        self.engine = Engine(
            self, scheduler, self.tables, clock=clock, deliver=lambda r: self.server.deliver(r)
        )
        self.transport = network.transport(self.peer)
        self.links = Links(
            self.transport,
            clock,
            lambda peer, frames: self.server.on_frames(peer, frames),
            lambda peer, how: self.server.on_lost(peer, how),
        )
        hosted = Hosted(self.peer, MODEL, span, layers, 1)
        self.server = PeerServer(StageTable(hosted, self.engine), self.engine, self.links, clock)

    def run(self, batch: Batch) -> list[Result]:
        return [self.model.run(row) for row in batch.rows]


@asynccontextmanager
async def engines(*spans: tuple[int, int]) -> AsyncIterator[tuple[list[Threaded], SessionRuntime]]:
    """A ring of real engines and a client, on real time; at its end no block is leased."""
    network = MemoryNetwork()
    peers = [Threaded(network, f"p{i}", Span(*span), 6) for i, span in enumerate(spans)]
    for peer in peers:
        peer.engine.start()
        await peer.links.start(listen=True)
    runtime = SessionRuntime()
    runtime.links = Links(
        network.transport(CLIENT), RealClock(), runtime.on_frames, runtime.on_lost
    )
    await runtime.links.start(listen=False)
    try:
        yield peers, runtime
        for peer in peers:
            await peer.server.quiet(10.0)
            assert peer.tables.free_blocks == 64
    finally:
        for peer in peers:
            assert await asyncio.to_thread(peer.engine.stop)
            await peer.links.close()
        await runtime.links.close()


def test_a_ring_of_real_engines() -> None:
    """Threads, scheduler and KV accounting as in production; only model and network are not."""

    async def act() -> None:
        async with engines(*THREE) as (peers, runtime):
            route = Route(tuple(Stage(peer.peer, peer.model.span) for peer in peers), 0.0, 0.0)

            async def ask(number: int) -> None:
                session = runtime.open(route, MODEL, 100)
                await session.ready()
                prompt = [number, *PROMPT, *range(number)]
                session.generate(turn(prompt, 100))
                await session.wait()
                session.cancel()
                session.generate(turn(prompt, 10))
                assert await listen(session) == answer(prompt, 10, 6)
                session.close()

            await asyncio.gather(*(ask(number) for number in range(0, 40, 8)))

    asyncio.run(act())


def test_a_peer_whose_device_hangs_says_so() -> None:
    """The network lives on another thread: who asks is told that input waits."""

    async def act() -> None:
        async with engines(*THREE) as (peers, runtime):
            entered, leave = threading.Event(), threading.Event()
            sick, compute = peers[1], peers[1].model.run

            def hang(row: Row) -> Result:
                entered.set()
                assert leave.wait(10)
                return compute(row)

            sick.model.run = hang  # type: ignore[method-assign]
            route = Route(tuple(Stage(peer.peer, peer.model.span) for peer in peers), 0.0, 0.0)
            session = runtime.open(route, MODEL, 100)
            await session.ready()
            session.generate(turn(PROMPT, 3))
            assert await asyncio.to_thread(entered.wait, 5)
            ask = AskProgress(session.machine.key, session.machine.epoch, 1)
            (told,) = sick.server.table.on_frame(CLIENT, Frame(ask), 0.0)
            assert isinstance(told, Send)
            assert isinstance(told.message, Progress)
            assert (told.message.received, told.message.done) == (len(PROMPT), 0)
            leave.set()
            assert await listen(session) == answer(PROMPT, 3, 6)
            session.close()

    asyncio.run(act())


def test_what_a_stage_traces_is_what_passes_there() -> None:
    """On real time: the parts sum to what lies between a step's arrival and its frames' leave."""

    async def act() -> None:
        async with engines(*THREE) as (peers, runtime):
            route = Route(tuple(Stage(peer.peer, peer.model.span) for peer in peers), 0.0, 0.0)
            spent_s = [_residence(peer) for peer in peers]
            session = runtime.open(route, MODEL, 200)
            await session.ready()
            session.generate(turn(PROMPT, 100))
            await listen(session)
            traces = await session.trace()
            for peer, visits in zip(peers, spent_s, strict=True):
                told = traces[peer.peer]
                parts_s = told.wait_s + told.compute_s + told.handle_s
                assert told.steps == 99
                assert min(told.wait_s, told.compute_s, told.handle_s) > 0
                assert told.rows == 1.0
                assert told.successor_rtt_s > 0
                seen_s = sum(visits[1:])
                assert 0.5 * seen_s < parts_s <= seen_s, "the first was the prompt's"
            session.close()

    asyncio.run(act())


class SlowLinks:
    """Links whose every write takes half a second of `clock`."""

    def __init__(self, clock: VirtualClock) -> None:
        self.rtts = {PeerId("next"): 0.25}
        self.sent: list[Message] = []
        self._clock = clock

    async def connect(self, peer: PeerId, addresses: tuple[str, ...]) -> None: ...
    def ping(self, peer: PeerId) -> None: ...
    def watch(self, peer: PeerId) -> None: ...

    def send(self, peer: PeerId, outgoing: list[Outgoing], lane: int) -> bool:
        self._clock.advance(0.5)
        self.sent += [message for message, _ in outgoing]
        return True


@scenario
async def test_sending_on_is_part_of_a_steps_time() -> None:
    """The frames of a batch are out when all of them are."""
    clock = VirtualClock()
    host = Host(PeerId("p0"), Span(0, 6), 6, 64)
    device: Any = SimpleNamespace(submit=lambda steps: None)
    links: Any = SlowLinks(clock)
    server = PeerServer(host.table, device, links, clock)
    key, before = b"k" * 16, PeerId("previous")
    server.on_frames(CLIENT, [Frame(Open(key, 0, MODEL, 2, 4, before, "next", (), 64))])
    for position in range(3):
        step = Hidden(key, 0, 0, position, 1, True, "float32")
        server.on_frames(before, [Frame(step, bytes(4))])
        row = Row(key, position, 1, None, True, ())
        server.deliver([Result(row, activations=Activations(bytes(4), "float32"))])
    server.on_frames(CLIENT, [Frame(Trace(key, 0))])
    told = links.sent[-1]
    assert isinstance(told, Traced)
    assert (told.steps, told.handle_s) == (2, 1.0)
    assert told.successor_rtt_s == 0.25
    await asyncio.gather(*server._dials)


def _residence(peer: Threaded) -> list[float]:
    """Filled with how long each step of a ring stays at `peer`, seen from outside."""
    visits: list[float] = []
    clock, take, give = time.monotonic, peer.server.on_frames, peer.server.deliver
    arrived_s: list[float] = []

    def on_frames(source: PeerId, frames: list[Frame]) -> None:
        if any(isinstance(frame.message, Hidden | Tokens) for frame in frames):
            arrived_s.append(clock())
        take(source, frames)

    def deliver(results: list[Result]) -> None:
        give(results)
        if results[0].row.sample:
            visits.append(clock() - arrived_s[-1])

    peer.server.on_frames = on_frames  # type: ignore[method-assign]
    peer.server.deliver = deliver  # type: ignore[method-assign]
    return visits


def test_the_server_speaks_the_table_words() -> None:
    """What goes out is what the table said: a grant for the asker, nothing for a close."""

    async def act() -> None:
        async with world((0, 6)) as w:
            sent: list[object] = []
            peer = w.peers[0]
            peer.links.send = lambda _, out, __: bool(sent.extend(m for m, _ in out)) or True
            ask = Open(b"k" * 16, 0, MODEL, 0, 6, "p0", "p0", (), 32)
            peer.server.on_frames(CLIENT, [Frame(ask)])
            peer.server.on_frames(CLIENT, [Frame(Open(b"l" * 16, 0, "x", 0, 6, "", "", (), 32))])
            peer.server.on_frames(CLIENT, [Frame(Close(b"k" * 16))])
            assert [type(message) for message in sent] == [Opened, Refuse]
            assert peer.clean

    virtual.run(act())
