"""An engine whose device computes while the host goes on: nobody hears of another's rows.

The device is a double: it computes when it is told (as one stream would, in order), and tells the
results when it is let.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from hexswarm.clock import RealClock
from hexswarm.peer.cache import BlockTables
from hexswarm.peer.engine import Engine
from hexswarm.peer.scheduler import Policy, Scheduler
from hexswarm.peer.steps import Batch, Result, Step, TailPolicy
from hexswarm.records import Sampling
from tests.peer.test_engine import A, B, C, IntegerRunner, decode, prompt

POLICY = TailPolicy(Sampling())
LIMIT = 1 << 40


@dataclass
class Flight:
    """Results that wait for `landed`."""

    made: Sequence[Result]
    chosen: dict[int, Any]
    landed: threading.Event = field(default_factory=threading.Event)
    fails: bool = False
    pending: bool = True

    def results(self) -> Sequence[Result]:
        assert self.landed.wait(5), "nobody let it land"
        if self.fails:
            raise RuntimeError("the device is ill")
        return self.made


class Device(IntegerRunner):
    """Lands by itself if `free`; `ring` foresees. `told` counts launches."""

    def __init__(self, blocks: int, *, free: bool, ring: bool) -> None:
        super().__init__(blocks)
        self.flights: list[Flight] = []
        self.told = threading.Condition()
        self.free, self.ring, self.over = free, ring, False

    def launch(self, batch: Batch) -> Flight:
        made = self.run(batch)
        chosen = {i: [one.token] for i, one in enumerate(made) if one.token is not None}
        flight = Flight(made, chosen if self.ring else {})
        if self.free:
            flight.landed.set()
        with self.told:
            self.flights.append(flight)
            self.told.notify_all()
        return flight

    async def launched(self, count: int) -> list[Flight]:
        def wait() -> bool:
            with self.told:
                return self.told.wait_for(lambda: self.over or len(self.flights) >= count, 5)

        assert await asyncio.to_thread(wait), f"{len(self.flights)} launches"
        return self.flights

    def end(self) -> None:
        """Nobody waits any longer."""
        with self.told:
            self.over = True
            self.told.notify_all()


class Bench:
    def __init__(self, *, free: bool = False, ring: bool = True, rows: int = 8) -> None:
        self.device = Device(64, free=free, ring=ring)
        self.cache = BlockTables(64)
        self.deliveries: asyncio.Queue[list[Result]] = asyncio.Queue()
        self.engine = Engine(
            self.device,
            Scheduler(Policy(max_rows=rows), self.cache.blocks),
            self.cache,
            clock=RealClock(),
            deliver=self.deliveries.put_nowait,
            forget=self.erase,
        )

    def erase(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            self.device.cells[block] = [0] * 16

    async def results(self) -> list[Result]:
        async with asyncio.timeout(5):
            return await self.deliveries.get()

    async def begin(self, *sessions: bytes, tokens: int = 64) -> list[Result]:
        """Prompts of one token, computed."""
        for session in sessions:
            self.engine.open(session, tokens)
        self.engine.submit([step(prompt(session, [1])) for session in sessions])
        flights = await self.device.launched(len(self.device.flights) + 1)
        flights[-1].landed.set()
        return await self.results()


def step(made: Step) -> Step:
    return replace(made, policy=POLICY)


@asynccontextmanager
async def bench(**given: Any) -> AsyncIterator[Bench]:
    made = Bench(**given)
    made.engine.start()
    try:
        yield made
    finally:
        made.device.free = True
        for flight in made.device.flights:
            flight.landed.set()
        assert made.engine.stop(5.0)


def test_the_next_batch_begins_before_the_last_has_landed() -> None:
    async def main() -> None:
        async with bench(ring=False) as b:
            await b.begin(A, B)
            b.engine.submit([step(decode(A, 1, 5))])
            await b.device.launched(2)
            b.engine.submit([step(decode(B, 1, 7))])
            first, second = (await b.device.launched(3))[1:]
            assert b.deliveries.empty()
            first.landed.set()
            assert [r.token for r in await b.results()] == [6]
            second.landed.set()
            assert [r.token for r in await b.results()] == [8]

    asyncio.run(main())


def test_a_session_is_not_in_two_batches_and_a_prompt_waits_for_the_last_to_land() -> None:
    async def main() -> None:
        async with bench(ring=False) as b:
            await b.begin(A, B)
            b.engine.submit([step(decode(A, 1, 5))])
            (_, first) = await b.device.launched(2)
            b.engine.submit([step(decode(A, 2, 5))])
            b.engine.open(C, 64)
            b.engine.submit([step(prompt(C, [1, 2]))])
            b.engine.submit([step(decode(B, 1, 7))])
            assert len(b.device.flights) == 2
            first.landed.set()
            assert [r.token for r in await b.results()] == [6]
            (_, _, then, *_) = await b.device.launched(3)
            sessions = [row.session for row in b.device.batches[2].rows]
            assert sessions == [B, C], "A's next step was still to come"
            then.landed.set()
            assert [r.token for r in await b.results()] == [8, 3]

    asyncio.run(main())


def test_a_ring_of_one_goes_on_before_it_is_asked() -> None:
    async def main() -> None:
        async with bench() as b:
            (first,) = await b.begin(A)
            assert first.token == 1
            b.engine.submit([step(decode(A, 1, 1))])
            await b.device.launched(3)  # the prompt, the step, and the one that is foreseen
            assert b.device.batches[2].rows[0].position == 2
            b.device.flights[1].landed.set()
            assert (await b.results())[0].token == 2
            b.engine.submit([step(decode(A, 2, 2))])
            await b.device.launched(4)
            b.device.flights[2].landed.set()
            (claimed,) = await b.results()
            assert (claimed.token, claimed.row.position, claimed.wait_s) == (4, 2, 0.0)
            assert b.cache.length(A) == 3

    asyncio.run(main())


def test_what_was_computed_before_it_was_asked_for_is_given_at_once() -> None:
    async def main() -> None:
        async with bench(free=True) as b:
            await b.begin(A)
            b.engine.submit([step(decode(A, 1, 1))])
            assert (await b.results())[0].token == 2
            await b.device.launched(3)
            await asyncio.wrap_future(b.engine.between(lambda: None))  # it has landed
            b.engine.submit([step(decode(A, 2, 2))])
            assert (await b.results())[0].token == 4
            assert len(b.device.batches) == 3

    asyncio.run(main())


@pytest.mark.parametrize("what", ["another token", "cancelled", "closed", "another turn"])
def test_nobody_hears_of_a_row_that_was_not_claimed(what: str) -> None:
    async def main() -> None:
        async with bench() as b:
            await b.begin(A, B)
            b.engine.submit([step(decode(A, 1, 1))])
            await b.device.launched(3)
            b.device.flights[1].landed.set()
            assert (await b.results())[0].token == 2
            b.device.free = True
            if what == "closed":
                b.engine.close(A)
            if what == "cancelled":
                b.engine.cancel(A, 2)
            if what in ("another token", "cancelled"):
                b.engine.submit([step(decode(A, 2, 9))])
            if what == "another turn":
                b.engine.submit([replace(step(decode(A, 2, 2)), turn=1)])
            b.device.flights[2].landed.set()
            if what == "closed":
                b.engine.submit([step(decode(B, 1, 1))])
                (other,) = await b.results()
                assert (other.row.session, other.token) == (B, 2)
                return
            (one,) = await b.results()
            assert one.row.turn == (what == "another turn")
            assert one.token == (4 if what == "another turn" else 11)

    asyncio.run(main())


def test_whoever_waits_goes_before_what_is_foreseen() -> None:
    async def main() -> None:
        async with bench(rows=2, ring=False) as b:
            for session in (A, B, C):
                await b.begin(session)
            b.device.ring = True
            b.engine.submit([step(decode(session, 1, 1)) for session in (A, B, C)])
            await b.device.launched(5)
            sessions = [[row.session for row in batch.rows] for batch in b.device.batches[3:5]]
            assert sessions[0] == [A, B]
            assert C in sessions[1]
            assert len(sessions[1]) == 2, "there was room for one that is foreseen"

    asyncio.run(main())


def test_a_flight_that_fails_is_tried_again_and_what_was_built_on_it_is_void() -> None:
    async def main() -> None:
        async with bench() as b:
            await b.begin(A)
            b.engine.submit([step(decode(A, 1, 1))])
            await b.device.launched(3)
            b.device.flights[1].fails = True
            b.device.flights[1].landed.set()
            (failed,) = await b.results()
            assert failed.error
            b.device.free = True
            b.device.flights[2].landed.set()
            b.engine.submit([step(decode(A, 1, 3))])
            assert (await b.results())[0].token == 4

    asyncio.run(main())


def test_the_end_of_a_lease_is_the_end_of_foresight() -> None:
    async def main() -> None:
        async with bench() as b:
            await b.begin(A, tokens=2)
            b.engine.submit([step(decode(A, 1, 1))])
            await b.device.launched(2)
            b.device.flights[1].landed.set()
            await b.results()
            await asyncio.wrap_future(b.engine.between(lambda: None))
            assert len(b.device.batches) == 2

    asyncio.run(main())


def expected(first: int, tokens: int) -> list[int]:
    """What a session hears that starts with `first` and is fed its own tokens."""
    inputs = [first]
    for _ in range(tokens):
        inputs.append(sum(inputs))
    return inputs[1:]


async def land(device: Device, rng: random.Random) -> None:
    """All flights in order, sooner or later."""
    for number in itertools.count():
        flights = await device.launched(number + 1)
        for _ in range(rng.choice([0, 1, 20])):
            await asyncio.sleep(0)
        if device.over:
            return
        flights[number].landed.set()


@pytest.mark.parametrize("seed", range(12))
def test_sessions_hear_what_they_would_hear_alone(seed: int) -> None:
    """Whatever the order of landings, cancels and ends: sums over one's own KV, no token twice."""
    rng = random.Random(seed)

    async def main() -> None:
        async with bench(free=seed % 2 == 0, ring=seed % 3 != 0, rows=rng.choice([2, 4, 8])) as b:
            device, heard = b.device, dict[bytes, list[int]]()
            wanted = {bytes([i]) * 16: rng.randint(3, 25) for i in range(6)}
            for session in wanted:
                b.engine.open(session, 40)
                heard[session] = []
            b.engine.submit([step(prompt(s, [s[0] + 1])) for s in wanted])
            left = set(wanted)
            landing = asyncio.create_task(land(device, rng))
            while left:
                for result in await b.results():
                    session, tokens = result.row.session, heard[result.row.session]
                    if session not in left:
                        continue  # it ended meanwhile
                    assert result.error is None
                    assert result.token is not None
                    tokens.append(result.token)
                    if len(tokens) == wanted[session]:
                        left.discard(session)
                        b.engine.close(session)
                    else:
                        position = len(tokens)
                        if rng.random() < 0.1:
                            b.engine.cancel(session, position)
                        b.engine.submit([step(decode(session, position, result.token))])
            device.end()
            await landing
            for session, tokens in heard.items():
                assert tokens == expected(session[0] + 1, wanted[session])

    asyncio.run(asyncio.wait_for(main(), 20))
