"""Being in a swarm: where a client is, and how often who is there is looked up."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hexswarm.config import ListenConfig, NetworkConfig
from hexswarm.directory import INDEX
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
