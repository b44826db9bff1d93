"""How far peers are that offer themselves: the shortest way counts, and a door is knocked at only
where the link goes."""

from __future__ import annotations

import asyncio
import math
import socket
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from hexswarm.clock import VirtualClock
from hexswarm.errors import PeerLost
from hexswarm.peer.groups.invitation import LAN_RTT_S
from hexswarm.peer.groups.near import AGAIN_S, COUNTS_S, PINGS, RETRY_S, Near, knock_s
from hexswarm.records import Announcement, GroupOffer
from tests.peer.lan import announced, peer_name

PEER = peer_name(1)


class Lines:
    """Links whose pings take as long as is said, on a clock that stands still otherwise."""

    def __init__(self, clock: VirtualClock) -> None:
        self.clock, self.pings, self.asked, self.up = clock, list[float](), 0, True

    def connected(self, peer: str) -> bool:
        return self.up

    async def connect(self, peer: Any, addresses: Any) -> None:
        if not self.up:
            raise PeerLost(peer, None, "is gone")

    async def measure(self, peer: Any, addresses: Any, samples: int, within_s: float) -> Any:
        self.asked += 1
        await asyncio.sleep(0)
        self.clock.advance(self.pings.pop(0))
        return SimpleNamespace()


def offering(host: str = "127.0.0.1", port: int = 9, address: str = "127.0.0.1") -> Announcement:
    item = announced(PEER, addresses=(f"/ip4/{address}/tcp/4",))
    return replace(item, offer=GroupOffer("home", 1, host, port))


class World:
    def __init__(self) -> None:
        self.clock = VirtualClock(1000.0)
        self.lines: Any = Lines(self.clock)
        self.near = Near(self.lines, self.clock)

    def look(self, item: Announcement, *pings: float) -> float | None:
        self.lines.pings = [*pings, *[max(pings, default=0.0)] * PINGS][:PINGS]
        asyncio.run(self.near.measure([item]))
        return self.near.rtts.get(PEER)


def test_the_shortest_way_counts_for_a_while() -> None:
    world = World()
    assert world.look(offering(), 0.03, 0.0007, 0.02) == pytest.approx(0.0007)
    assert world.lines.asked == PINGS
    world.look(offering())
    assert world.lines.asked == PINGS  # not again so soon
    world.clock.advance(AGAIN_S)
    assert world.look(offering(), 1.0, 1.0) == pytest.approx(0.0007)
    world.clock.advance(COUNTS_S)
    assert world.look(offering(), 1.5) == pytest.approx(1.5)


def test_who_seems_far_is_asked_again_soon() -> None:
    world = World()
    assert world.look(offering(), 0.1, 0.2) == pytest.approx(0.1)
    world.clock.advance(RETRY_S)
    assert world.look(offering(), 0.001) == pytest.approx(0.001)


def test_who_is_not_linked_is_not_near() -> None:
    world = World()
    world.look(offering(), 0.0001)
    world.lines.up = False
    assert world.look(offering()) is None
    world.clock.advance(RETRY_S)
    assert world.look(offering()) is None


def test_who_is_not_known_is_met_once() -> None:
    world = World()
    assert world.near.unknown(PEER)
    world.lines.pings = [0.001] * PINGS
    asyncio.run(world.near.get_to_know(offering()))
    assert not world.near.unknown(PEER)
    assert world.near.rtts == {PEER: pytest.approx(0.001)}


def test_who_is_being_measured_is_waited_for() -> None:
    """An invitation comes while the first pings are under way."""
    world = World()
    world.lines.pings = [0.001] * PINGS

    async def meet() -> None:
        measuring = asyncio.create_task(world.near.measure([offering()]))
        for _ in range(3):  # until the first ping is under way
            await asyncio.sleep(0)
        assert world.near.unknown(PEER)
        await world.near.get_to_know(offering())
        assert world.near.rtts == {PEER: pytest.approx(0.001)}
        await measuring

    asyncio.run(meet())
    assert world.lines.asked == PINGS


def test_who_does_not_answer_is_not_asked_at_every_word() -> None:
    world = World()
    world.lines.up = False
    asyncio.run(world.near.get_to_know(offering()))
    assert not world.near.unknown(PEER)
    world.clock.advance(RETRY_S)
    assert world.near.unknown(PEER)


@pytest.mark.parametrize(("address", "near"), [("127.0.0.1", True), ("10.0.0.9", False)])
def test_a_door_is_knocked_at_where_the_link_goes(address: str, near: bool) -> None:
    """Pings of a busy machine say 10 ms; the kernel answers as fast as ever."""
    with socket.create_server(("127.0.0.1", 0)) as door:
        item = offering(port=door.getsockname()[1], address=address)
        rtt_s = World().look(item, 0.01)
    assert rtt_s is not None
    assert (rtt_s <= LAN_RTT_S) is near


def test_nobody_opens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as door:
        port = door.getsockname()[1]
    assert knock_s("127.0.0.1", port) == math.inf
