"""The effects around advice, on virtual time: a drawn peer publishes, the next in turn claims."""

from __future__ import annotations

import asyncio
import random
from types import SimpleNamespace
from typing import Any

import pytest

from hexswarm.advice import SignedAdvice
from hexswarm.peer import moving
from hexswarm.peer.moving import Mover
from hexswarm.peer.placement import Placement
from hexswarm.router import native
from hexswarm.router.placement import advice
from tests import virtual
from tests.peer.test_advising import LONGEST, MODEL, Volunteer, crowd

pytestmark = pytest.mark.skipif(not native.available(), reason="no compiled search here")


class Crowd:
    """A directory that shows what its peers are; what one publishes all read."""

    def __init__(self, peers: list[Volunteer]) -> None:
        self.peers = peers
        self.published: list[SignedAdvice] = []
        self.links = SimpleNamespace(up_bytes_per_s=None, down_bytes_per_s=None)
        self.told = 0

    @property
    def advice(self) -> tuple[SignedAdvice, ...]:
        return tuple(self.published)

    def alive(self) -> tuple[Any, ...]:
        return tuple(peer.word() for peer in self.peers)

    others = alive

    async def refresh(self) -> None:
        await asyncio.sleep(0.1)

    async def advise(self, told: SignedAdvice) -> bool:
        self.published.append(told)
        return True

    async def announce(self) -> None:
        self.told += 1


def mover(peer: Volunteer, swarm: Crowd) -> tuple[Mover, Any]:
    placement = Placement(peer.identity.peer, MODEL, LONGEST, 100, random.Random(peer.number))
    life = SimpleNamespace(
        member=swarm,
        clock=virtual.LoopClock(),
        identity=peer.identity,
        placement=placement,
        advising=peer.advising,
        served=SimpleNamespace(span=peer.span),
        state="online",
        claimed=None,
    )
    teller: Any = swarm
    return Mover(life, teller), life  # type: ignore[arg-type]


def test_one_publishes_and_another_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of the order, to where it says, without asking anybody else for the layers."""
    monkeypatch.setattr(advice, "TRIES", 2)

    async def here(call: Any) -> Any:
        return call()  # virtual time has no threads

    monkeypatch.setattr(moving.asyncio, "to_thread", here)
    swarm = Crowd(crowd())
    movers = [mover(peer, swarm) for peer in swarm.peers]

    async def act() -> list[Any]:
        tasks = [asyncio.create_task(one.advise_for_ever()) for one, _ in movers]
        wishes = [asyncio.create_task(one.wish()) for one, _ in movers]
        await asyncio.wait(wishes, return_when=asyncio.FIRST_COMPLETED)
        done = [pair for pair, wish in zip(movers, wishes, strict=True) if wish.done()]
        for one, _ in done:
            await one.claim_again()
        for task in (*tasks, *wishes):
            task.cancel()
        await asyncio.gather(*tasks, *wishes, return_exceptions=True)
        return [life for _, life in done]

    moved = virtual.run(act())
    assert len(swarm.published) == len(moved) == 1
    tail, to = swarm.published[0].proposal.moves[0]
    assert moved[0].identity.peer.endswith(tail)
    assert moved[0].claimed == to
    assert swarm.told == 1, "it says so once, and does not look again"


def test_without_advising_nothing_is_published() -> None:
    swarm = Crowd(crowd())
    one, life = mover(swarm.peers[0], swarm)
    life.advising = None
    virtual.run(one.advise_for_ever())
    assert swarm.published == []
