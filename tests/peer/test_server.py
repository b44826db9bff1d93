"""The effects of a stage: whatever the table decides is carried out, and a lost link harms nobody.

Whole rings over real links are in `swarm/test_runtime.py`; here is what only the server does, once
with the real engine and its thread.
"""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from hexswarm.clock import RealClock
from hexswarm.errors import NetworkError, PeerLost
from hexswarm.links import Links
from hexswarm.messages import Close, Hidden, Open, Opened, Refuse
from hexswarm.peer.cache import BlockTables
from hexswarm.peer.engine import Engine
from hexswarm.peer.scheduler import Policy, Scheduler
from hexswarm.peer.server import EXPIRE_EVERY_S, PeerServer
from hexswarm.peer.stage import Hosted, StageTable
from hexswarm.peer.steps import Batch, Result, Row
from hexswarm.records import PeerId, Route, Span, Stage
from hexswarm.runtime import SessionRuntime
from hexswarm.transports.memory import MemoryNetwork
from hexswarm.wire import Frame
from tests import virtual
from tests.loopback import CLIENT, MODEL, IntegerModel, answer
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


def test_a_ring_of_real_engines() -> None:
    """Threads, scheduler and KV accounting as in production; only model and network are not."""

    async def act() -> None:
        network = MemoryNetwork()
        peers = [Threaded(network, f"p{i}", Span(*span), 6) for i, span in enumerate(THREE)]
        for peer in peers:
            peer.engine.start()
            await peer.links.start(listen=True)
        runtime = SessionRuntime()
        transport = network.transport(CLIENT)
        runtime.links = Links(transport, RealClock(), runtime.on_frames, runtime.on_lost)
        await runtime.links.start(listen=False)
        stages = tuple(
            Stage(peer.peer, Span(*span)) for peer, span in zip(peers, THREE, strict=True)
        )
        route = Route(stages, 0.0, 0.0)

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
        for peer in peers:
            await peer.server.quiet(10.0)
            assert peer.tables.free_blocks == 64
            assert await asyncio.to_thread(peer.engine.stop)
            await peer.links.close()
        await runtime.links.close()

    asyncio.run(act())


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
