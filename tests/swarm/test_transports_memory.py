"""The network in one process: what holds for real streams holds here, on virtual time."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hexswarm.errors import NetworkError, PeerLost
from hexswarm.records import PeerId
from hexswarm.transports.base import Stream
from hexswarm.transports.memory import (
    DRAINED_BYTES,
    SEGMENT_BYTES,
    WINDOW_BYTES,
    MemoryNetwork,
    MemoryTransport,
)
from tests import virtual

A, B, C = PeerId("A"), PeerId("B"), PeerId("C")


def now() -> float:
    return asyncio.get_running_loop().time()


class World:
    """A and B; what B's handler was given waits in `accepted`."""

    def __init__(self, delay_s: float = 0.0, bytes_per_s: float = float("inf")) -> None:
        self.network = MemoryNetwork(delay_s, bytes_per_s)
        self.a, self.b = self.network.transport(A), self.network.transport(B)
        self.accepted: asyncio.Queue[Stream] = asyncio.Queue()

    async def pair(self) -> tuple[Stream, Stream]:
        """Both ends of a stream from A to B."""
        await self.b.listen(self.keep)
        return await self.a.dial(B), await self.accepted.get()

    async def keep(self, stream: Stream) -> None:
        self.accepted.put_nowait(stream)
        await asyncio.get_running_loop().create_future()


def world(
    delay_s: float = 0.0, bytes_per_s: float = float("inf")
) -> Callable[[Callable[[World], Coroutine[Any, Any, None]]], Callable[[], None]]:
    """Run a test as a scenario in a world of its own."""

    def wrap(scenario: Callable[[World], Coroutine[Any, Any, None]]) -> Callable[[], None]:
        def test() -> None:
            async def act() -> None:
                made = World(delay_s, bytes_per_s)
                try:
                    await scenario(made)
                finally:
                    await made.a.close()
                    await made.b.close()

            virtual.run(act())

        test.__name__, test.__doc__ = scenario.__name__, scenario.__doc__
        return test

    return wrap


async def read_all(stream: Stream) -> bytes:
    data = b""
    while piece := await stream.read(1 << 20):
        data += piece
    return data


@world()
async def test_bytes_go_both_ways_in_order(w: World) -> None:
    near, far = await w.pair()
    assert (near.remote, far.remote) == (B, A)
    near.write([b"one", memoryview(b"two")])
    near.write([b"three"])
    assert await far.read(4) == b"onet"
    assert await far.read(99) == b"wothree"
    far.write([b"back"])
    assert await near.read(99) == b"back"


@world(delay_s=0.1)
async def test_delay_is_one_way_and_a_dial_a_round_trip(w: World) -> None:
    w.network.shape(A, B, delay_s=0.3, one_way=True)
    near, far = await w.pair()
    assert now() == pytest.approx(0.4)
    near.write([b"x"])
    await far.read(9)
    assert now() == pytest.approx(0.7)
    far.write([b"x"])
    await near.read(9)
    assert now() == pytest.approx(0.8)


@world(delay_s=0.1)
async def test_what_is_written_together_arrives_together(w: World) -> None:
    near, far = await w.pair()
    near.write([b"a" * 100_000, b"b" * 100_000])
    assert len(await far.read(1 << 20)) == 200_000


@world(delay_s=1.0)
async def test_a_shorter_way_does_not_overtake(w: World) -> None:
    near, far = await w.pair()
    near.write([b"first"])
    w.network.shape(A, B, delay_s=0.0)
    near.write([b"second"])
    assert await far.read(99) == b"firstsecond"


@world(delay_s=0.1)
async def test_close_sends_what_was_written_and_then_the_end(w: World) -> None:
    near, far = await w.pair()
    near.write([b"last words"])
    near.close()
    near.close()
    near.write([b"too late"])
    assert await near.read(9) == b""
    assert await read_all(far) == b"last words"
    far.write([b"to nobody"])
    assert far.backlog == 0


@world(delay_s=0.1)
async def test_cut_ends_both_sides_at_once_until_healed(w: World) -> None:
    near, far = await w.pair()
    far.write([b"here"])
    await asyncio.sleep(1)
    near.write([b"lost on the way"])
    w.network.cut(A, B)
    began = now()
    assert await read_all(near) == b"here"
    assert await read_all(far) == b""
    assert now() == began
    with pytest.raises(PeerLost, match="cannot be reached"):
        await w.a.dial(B)
    w.network.heal(A, B)
    near = await w.a.dial(B)
    near.write([b"again"])
    assert await (await w.accepted.get()).read(9) == b"again"


@world(delay_s=0.1)
async def test_cut_fails_a_dial_under_way(w: World) -> None:
    await w.b.listen(w.keep)
    dial = asyncio.create_task(w.a.dial(B))
    await asyncio.sleep(0.15)
    w.network.cut(A)
    with pytest.raises(PeerLost):
        await dial
    assert await read_all(w.accepted.get_nowait()) == b""


@world()
async def test_freeze_holds_everything_and_tells_nobody(w: World) -> None:
    near, far = await w.pair()
    w.network.freeze(A, B)
    near.write([b"held"])
    assert near.backlog == 4
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(far.read(9), 1000)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(w.a.dial(B), 1000)
    w.network.heal(A, B)
    assert await far.read(9) == b"held"
    late = await w.accepted.get()
    assert await late.read(9) == b"", "the caller of the second stream had given up"


@world(delay_s=0.1)
async def test_freeze_also_holds_what_flies(w: World) -> None:
    near, far = await w.pair()
    near.write([b"flying"])
    near.close()
    w.network.freeze(A)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(far.read(9), 10)
    w.network.heal(A)
    assert await read_all(far) == b"flying"


@world(bytes_per_s=1e6)
async def test_bandwidth_is_shared_in_turns(w: World) -> None:
    """A megabyte on one stream delays a small message on another by a segment or two, not 1 s."""
    bulk, bulk_end = await w.pair()
    step, step_end = await w.pair()
    bulk.write([bytes(1_000_000)])
    began = now()
    step.write([b"token"])
    assert await step_end.read(9) == b"token"
    assert now() - began < 2.1 * SEGMENT_BYTES / 1e6
    assert bulk.backlog > 800_000
    await bulk.drain()
    bulk.close()
    assert len(await read_all(bulk_end)) == 1_000_000
    assert now() - began == pytest.approx(1.0, rel=0.01)


@world(delay_s=0.1)
async def test_a_reader_that_does_not_read_stops_the_writer(w: World) -> None:
    near, far = await w.pair()
    near.write([bytes(WINDOW_BYTES + DRAINED_BYTES + 1)])
    assert near.backlog == DRAINED_BYTES + 1
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(near.drain(), 10)
    assert len(await far.read(1 << 30)) == WINDOW_BYTES
    await near.drain()
    assert len(await far.read(1 << 30)) == DRAINED_BYTES + 1


@world()
async def test_nobody_there(w: World) -> None:
    with pytest.raises(PeerLost, match="cannot be reached"):
        await w.a.dial(B)
    with pytest.raises(PeerLost):
        await w.a.dial(C)
    with pytest.raises(NetworkError, match="already"):
        w.network.transport(A)


@world()
async def test_a_peer_may_leave_and_come_back(w: World) -> None:
    near, _ = await w.pair()
    await w.b.close()
    assert await near.read(9) == b""
    with pytest.raises(PeerLost):
        await w.a.dial(B)
    w.b = w.network.transport(B)
    near, far = await w.pair()
    near.write([b"hello"])
    assert await far.read(9) == b"hello"


@world()
async def test_a_broken_handler_is_logged_and_its_stream_ends(
    w: World,
) -> None:
    async def broken(stream: Stream) -> None:
        raise KeyError(stream.remote)

    lines: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = lines.append  # type: ignore[method-assign]
    logger = logging.getLogger("hexswarm.transports.memory")
    logger.addHandler(handler)
    try:
        await w.b.listen(broken)
        near = await w.a.dial(B)
        assert await near.read(9) == b""
    finally:
        logger.removeHandler(handler)
    assert lines[0].exc_info is not None


def test_close_leaves_no_task_behind() -> None:
    async def scenario() -> None:
        w = World(0.1)
        near, _ = await w.pair()
        near.write([b"x"])
        await w.b.close()
        await w.a.close()
        assert virtual.others() == set()

    virtual.run(scenario())


@settings(max_examples=50)
@given(
    writes=st.lists(st.tuples(st.integers(0, 2), st.binary(max_size=300)), max_size=12),
    delay_s=st.sampled_from([0.0, 0.01]),
    bytes_per_s=st.sampled_from([float("inf"), 100.0, 1e4]),
    limit=st.integers(1, 400),
)
def test_any_traffic_arrives_whole_on_every_stream(
    writes: list[tuple[int, bytes]], delay_s: float, bytes_per_s: float, limit: int
) -> None:
    """Whatever is written on several streams at once is read from each, complete and in order."""

    async def drain(stream: Stream) -> bytes:
        data = b""
        while piece := await stream.read(limit):
            assert len(piece) <= limit
            data += piece
        return data

    async def scenario() -> None:
        w = World(delay_s, bytes_per_s)
        pairs = [await w.pair() for _ in range(3)]
        for index, data in writes:
            pairs[index][0].write([data])
        for near, _ in pairs:
            near.close()
        for index, (_, far) in enumerate(pairs):
            assert await drain(far) == b"".join(data for at, data in writes if at == index)

    virtual.run(scenario())


def test_it_is_a_transport() -> None:
    """The loop's own clock works too: nothing here needs virtual time."""

    async def scenario() -> bytes:
        network = MemoryNetwork(delay_s=0.001)
        transport: MemoryTransport = network.transport(B)

        async def echo(stream: Stream) -> None:
            stream.write([await stream.read(99)])

        await transport.listen(echo)
        near = await network.transport(A).dial(B, ["/ip4/ignored"])
        near.write([b"echo"])
        return await near.read(99)

    assert asyncio.run(scenario()) == b"echo"
