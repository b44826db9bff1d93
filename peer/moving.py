"""Which layers this peer claims, first and later: the effects around `placement`.

A claim is announced, and looked at again after a jitter, until nobody who came first claims the
same. While it serves, `wish` waits until the swarm would be better off with this peer elsewhere, by
its own rule or because it is its turn in an advice that it follows. The turn was given to it alone:
there it claims without looking again. Beside, `advise_for_ever` publishes advice when drawn.
"""

from __future__ import annotations

import asyncio
import logging

from hexswarm import advice
from hexswarm.peer.life import Life
from hexswarm.peer.placement import LOOKS, Placement
from hexswarm.peer.telling import Teller
from hexswarm.records import Span

log = logging.getLogger(__name__)

ADVISE_EVERY_S = 5.0
"""Whether we are drawn is asked so often."""


class Mover:
    """`claim` before the first load, `wish` while serving, `claim_again` before each later load."""

    def __init__(self, life: Life, teller: Teller) -> None:
        self._life = life
        self._teller = teller
        self._advised = False
        """The move under way is our turn in an advice."""

    async def claim(self) -> None:
        """Say which layers we are about to hold, and yield to those who said so before."""
        life = self._life
        if life.placement is None:  # who waits for a group claims nothing
            life.claimed = life.config.span or Span(0, life.folder.spec.layers)
            return
        life.claimed = life.placement.choose(life.member.alive())
        await self._hold_claim(life.placement)

    async def claim_again(self) -> None:
        """The same for the layers that we move to."""
        assert self._life.placement is not None
        if self._advised:
            await self._teller.announce()
            return
        await self._hold_claim(self._life.placement)

    async def wish(self) -> None:
        """Wait until the swarm would be better off with us elsewhere, and claim that."""
        life, placement = self._life, self._life.placement
        if placement is None:
            await asyncio.Event().wait()
            return
        while True:
            await asyncio.sleep(placement.look_s())
            links = life.member.links
            placement.up_bytes_per_s = links.up_bytes_per_s
            placement.down_bytes_per_s = links.down_bytes_per_s
            self._advised = await self._follow()
            if self._advised:
                return
            if self._wished(placement) is None:
                continue
            await asyncio.sleep(placement.jitter_s())
            await life.member.refresh()
            wished = self._wished(placement)
            if wished is not None:
                life.claimed = wished
                return
            placement.settle(life.clock.monotonic())

    def _wished(self, placement: Placement) -> Span | None:
        life, now = self._life, self._life.clock.monotonic()
        wished = placement.wish(life.member.others(), life.served.span, now)
        if wished is None or life.advising is None:
            return wished
        if life.advising.harmful(life.member.alive(), wished):
            placement.settle(now)
            return None
        return wished

    async def _follow(self) -> bool:
        """True if it is our turn to move, also in the view of this moment: then it is claimed."""
        if self._turn() is None:
            return False
        await self._life.member.refresh()
        to = self._turn()
        if to is None:
            return False
        self._life.claimed = to
        return True

    def _turn(self) -> Span | None:
        """Where the advice that we follow wants us now, if we follow any."""
        life, member = self._life, self._life.member
        if life.advising is None or life.placement is None:
            return None
        now, view = life.clock.wall(), member.alive()
        life.advising.hear(member.advice, view, now)
        to = life.advising.turn(view, life.served.span, now)
        if life.advising.following:  # the rule does not interfere
            life.placement.settle(life.clock.monotonic())
        return to

    async def advise_for_ever(self) -> None:
        """Publish an advice when we are drawn and know a better placement."""
        life, member = self._life, self._life.member
        while life.advising is not None:
            await asyncio.sleep(ADVISE_EVERY_S)
            task = life.advising.task(member.alive(), life.clock.wall())
            found = None if task is None else await asyncio.to_thread(task.run)
            if found is None or life.state != "online":
                continue
            signed = advice.sign(life.advising.proposal(found), life.identity)
            log.info("advising %d moves, to %.0f tokens/s", len(found.moves), found.tokens_per_s)
            if await member.advise(signed):
                life.advising.hear([signed], member.alive(), life.clock.wall())

    async def _hold_claim(self, placement: Placement) -> None:
        """Announce what we claim, and claim something else as long as others came first."""
        life = self._life
        for _ in range(LOOKS):
            await self._teller.announce()
            await asyncio.sleep(placement.jitter_s())
            await life.member.refresh()
            said, life.claimed = life.claimed, placement.again(life.member.alive(), life.claimed)
            if said == life.claimed:
                return
