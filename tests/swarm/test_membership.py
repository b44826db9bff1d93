"""Being in a swarm: where a client is, and how often who is there is looked up."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hexswarm.clock import Clock, VirtualClock
from hexswarm.config import ListenConfig, NetworkConfig
from hexswarm.directory import EXPIRE_S, INDEX, SKEW_S, SignedAnnouncement
from hexswarm.membership import (
    PLACE_EVERY_S,
    PLACE_PEERS,
    PLACE_RETRY_S,
    REFRESH_S,
    YOUNG_REFRESH_S,
    YOUNG_S,
    Membership,
)
from hexswarm.records import Announcement, Coordinates, PeerId
from hexswarm.skew import Sample
from tests import virtual
from tests.peer.test_announcer import ME
from tests.swarm.test_links import A, B, C, Node, nodes, scenario

D = PeerId("D")


def about(value: float) -> Any:
    return pytest.approx(value, rel=1e-6)


async def now() -> float:
    return asyncio.get_running_loop().time()


def member(node: Node, others: Sequence[Announcement]) -> Membership:
    """A membership on the in-memory network that knows `others`."""
    made = Membership(NetworkConfig(home=Path("/nonexistent")), virtual.LoopClock(), software="")
    made.links = node.links
    made.transport = node.transport  # type: ignore[assignment]
    made.alive = lambda: tuple(others)  # type: ignore[method-assign]
    return made


def at(peer: PeerId, x_s: float | None) -> Announcement:
    place = None if x_s is None else Coordinates((x_s, 0.0, 0.0), 0.0, 0.1)
    return replace(ME, peer=peer, coordinates=place)


@scenario
async def test_a_client_finds_its_place_by_a_few_round_trips() -> None:
    asked: list[list[tuple[Coordinates, float]]] = []

    def fit(samples: Sequence[tuple[Coordinates, float]], _: random.Random) -> Coordinates | None:
        asked.append(sorted(samples, key=lambda sample: sample[1]))
        return samples[0][0]

    async with nodes(A, B, C, D) as (a, *_):
        a.network.shape(A, B, delay_s=0.03)
        a.network.freeze(A, D)
        here = member(a, [at(A, 9.0), at(B, 0.1), at(C, 0.2), at(D, 0.3)])
        begun = await now()
        found = await here.place(random.Random(1), fit)
        assert await now() - begun <= 1.0 + 1e-9
        assert found is not None
        (samples,) = asked
        assert [(place.position_s[0], rtt_s) for place, rtt_s in samples] == [
            (0.2, about(0.02)),
            (0.1, about(0.06)),
        ]
        assert set(a.links.ways) == {B, C}
        assert await here.place(random.Random(1), fit) == found
        assert len(asked) == 1, "known for a while"
        await asyncio.sleep(PLACE_EVERY_S + 1)
        assert await here.place(random.Random(1), fit) is not None
        assert len(asked) == 2
        a.network.cut(A, D)


@scenario
async def test_without_coordinates_of_others_there_is_no_place_yet() -> None:
    def fit(samples: Sequence[tuple[Coordinates, float]], _: random.Random) -> Coordinates | None:
        return samples[0][0]

    async with nodes(A, B) as (a, _):
        known = [at(B, None)]
        here = member(a, known)
        assert await here.place(random.Random(1), fit) is None
        known[:] = [at(B, 0.5)]
        assert await here.place(random.Random(1), fit) is None, "not asked all the time"
        await asyncio.sleep(PLACE_RETRY_S)
        assert await here.place(random.Random(1), fit) is not None


@scenario
async def test_a_client_of_a_large_swarm_measures_a_few() -> None:
    crowd = [PeerId(f"p{n}") for n in range(3 * PLACE_PEERS)]
    async with nodes(A, *crowd) as (a, *_):
        here = member(a, [at(peer, 0.1) for peer in crowd])
        await here.place(random.Random(1), lambda samples, _: samples[0][0])
        assert len(a.links.ways) == PLACE_PEERS


@pytest.mark.parametrize(
    ("config", "others", "later", "every_s"),
    [
        (ListenConfig, 5, False, YOUNG_REFRESH_S),
        (ListenConfig, 1, True, YOUNG_REFRESH_S),
        (ListenConfig, 5, True, REFRESH_S),
        (NetworkConfig, 5, False, REFRESH_S),
    ],
)
def test_a_young_node_looks_around_more_often(
    config: type[NetworkConfig], others: int, later: bool, every_s: float
) -> None:
    """Two that start together must not wait for each other; a client is told by its own needs."""

    async def act() -> None:
        async with nodes(A) as (a,):
            here = member(a, [at(PeerId(f"p{n}"), None) for n in range(others)])
            here.config = config(home=Path("/nonexistent"))
            here.follow(INDEX)
            reads: list[float] = []

            async def refresh(model: str) -> None:
                assert model == INDEX
                reads.append(await now())

            here.refresh = refresh  # type: ignore[method-assign, assignment]
            here._joined_s = await now() - (YOUNG_S + 1 if later else 0)
            looking = asyncio.create_task(here._refresh_for_ever())
            await asyncio.sleep(25.0)
            looking.cancel()
            await asyncio.gather(looking, return_exceptions=True)
            assert len(reads) == int(25.0 / every_s)

    virtual.run(act())


# --- clocks ---------------------------------------------------------------------------------------


class Machine(VirtualClock):
    """A machine's clock that somebody sets."""

    set_s = 0.0

    def wall(self) -> float:
        return super().wall() + self.set_s


class Others:
    """The DHT as this process meets it: whether it takes words, and what time it says it is."""

    def __init__(self, machine: Machine, *, takes: bool) -> None:
        self.machine, self.takes = machine, takes

    async def announce(self, record: SignedAnnouncement) -> bool:
        return self.takes

    async def times(self, clock: Clock) -> list[Sample]:
        theirs_s = self.machine.wall() - self.machine.set_s
        return [Sample(clock.wall() - theirs_s, 0.01)] * 3


def timed(*, takes: bool) -> tuple[Membership, Machine]:
    machine = Machine()
    made = Membership(NetworkConfig(home=Path("/nonexistent")), machine, software="")
    made.dht = Others(machine, takes=takes)  # type: ignore[assignment]
    return made, machine


def word(expires_s: float) -> SignedAnnouncement:
    return SignedAnnouncement(ME, expires_s, b"")


@pytest.mark.parametrize(
    ("set_s", "said"),
    [
        (0.0, "does any other node run?"),
        (-60.0, "clock is 60.0 s behind the swarm's (as 3 nodes told)"),
        (3600.0, "clock is 3,600.0 s ahead of the swarm's"),
    ],
)
def test_a_word_that_nobody_takes_is_explained(
    caplog: pytest.LogCaptureFixture, set_s: float, said: str
) -> None:
    here, machine = timed(takes=False)
    machine.set_s = set_s
    assert not asyncio.run(here.announce(word(machine.wall() + 90)))
    (record,) = caplog.records
    assert said in record.getMessage()
    caplog.clear()
    assert asyncio.run(timed(takes=True)[0].announce(word(0.0)))
    assert not caplog.records


def test_a_clock_that_is_set_is_named_once_and_changes_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Neither do the living vanish, nor do the dead stay for what the clock was put back."""
    here, machine = timed(takes=True)
    here.take([word(machine.wall() + 90.0)])
    for set_s in (3600.0, -3600.0):
        machine.set_s = set_s
        assert here.clock.due
        for _ in range(2):
            asyncio.run(here._check_time())
        assert len(here.alive()) == 1
    assert len([r for r in caplog.records if "clock is" in r.getMessage()]) == 1
    machine.advance(91.0)
    assert here.alive() == ()


def test_a_word_from_a_clock_far_ahead_ends_like_all_others() -> None:
    here, machine = timed(takes=True)
    here.take([word(machine.wall() + 3690.0)])
    machine.advance(EXPIRE_S + SKEW_S - 0.1)
    assert len(here.alive()) == 1
    machine.advance(0.2)
    assert here.alive() == ()
