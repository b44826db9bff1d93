"""Where this peer is in the network, and whether its speed is still the one it told.

To *settle* is to measure a few neighbours before the first word of serving, so that it tells where
this peer is; nobody waits for it longer than `SETTLE_S`.
"""

from __future__ import annotations

import asyncio

from hexswarm.membership import FEW_PEERS
from hexswarm.peer.life import Life
from hexswarm.peer.neighbours import to_measure
from hexswarm.peer.probe import again
from hexswarm.router import vivaldi

SETTLE_S = 3.0
SETTLE_PINGS = 3
MEASURE_EVERY_S = 20.0
"""A round of pings to a few neighbours."""
YOUNG_S = 60.0
"""A peer that is so young, or knows fewer than two others, measures them more often:"""
YOUNG_EVERY_S = 2.0
REST_S = 10.0
"""A step of our own that takes longer is waited for no more."""


class Surveyor:
    """`settle` once, then `for_ever`."""

    def __init__(self, life: Life) -> None:
        self._life = life

    async def settle(self) -> None:
        """Find out where we are before we say that we are there."""
        await self._measure(SETTLE_PINGS, SETTLE_S)

    async def for_ever(self) -> None:
        """Keep links to a few peers, measure the ways to them, and move with what is found."""
        life = self._life
        while True:
            young = life.clock.monotonic() - life.online_s < YOUNG_S
            few = len(life.member.others()) < FEW_PEERS
            await asyncio.sleep(YOUNG_EVERY_S if young or few else MEASURE_EVERY_S)
            await self._measure(1, SETTLE_S)
            await self._time_at_rest()

    async def _time_at_rest(self) -> None:
        """If nobody uses us, a step of our own tells whether the announced speed is still ours."""
        engine = self._life.engine
        if engine is None:
            return  # between two spans
        served = self._life.served
        spec, span = served.folder.spec, served.span
        timed = engine.at_rest(lambda run: again(run, span, spec.layers, spec.hidden, served.dtype))
        if timed is not None:  # whatever it raises, lost ranks above all, is the daemon's matter
            done, _ = await asyncio.wait({asyncio.wrap_future(timed)}, timeout=REST_S)
            for future in done:
                if not future.cancelled():
                    future.exception()

    async def _measure(self, pings: int, within_s: float) -> None:
        """One round: measure some neighbours at the same time, and correct our coordinates."""
        life = self._life
        chosen = to_measure(life.member.others(), life.place, life.rng)
        targets = [(item.peer, item.addresses) for item in chosen]
        ways = await life.member.links.measure_all(targets, pings, within_s)
        samples = [
            (item.coordinates, ways[item.peer].rtt_s) for item in chosen if item.peer in ways
        ]
        if life.place is None:
            placed = [(at, rtt_s) for at, rtt_s in samples if at is not None]
            life.place = vivaldi.fit(placed, life.rng)
        # Among newcomers alone nobody has a place yet: the first to measure takes one.
        for at, rtt_s in samples:
            life.place = vivaldi.step(life.place, at, rtt_s, life.rng)
