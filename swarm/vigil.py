"""Waiting for all stages of a route to answer, for no longer than there is hope.

A stage may take seconds to answer an `Open`: it dials the next one, which may first need a way
through a router at home. So a deadline for all has to be long (`connect_s`), and one stage to which
our link is dead, of which nobody was told (a half-open link, a machine without power), would cost
all of it while others could take over. A stage that lives answers pings, whatever it waits for.

So a stage that has not answered is pinged, and given up once no ping was answered for as long as
`hexswarm.detector.Pulse` allows, while others answer promptly: where answers are late in general, a
crowd is there, and patience is all that helps. What else comes from the stage does not count: of a
link of which one direction is dead, it may be the other that we hear. A peer without a link is
being dialled, which has limits of its own. Whether it is used again is for the opener to say.

Rejected: a shorter deadline for all (honest stages behind slow ways would never open); asking a
second route meanwhile in any case (each open holds KV at every stage of it for ten seconds).
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from hexswarm.blame import lost
from hexswarm.clock import Clock
from hexswarm.detector import BEAT_S, Pulse
from hexswarm.membership import Membership
from hexswarm.records import PeerId
from hexswarm.runtime import OpenSession

WITNESSES = 8
"""So many other neighbours are pinged too: they tell a lost network from a lost stage."""


class Vigil:
    """One for each client."""

    def __init__(self, member: Membership, clock: Clock) -> None:
        self._member = member
        self._clock = clock

    async def wait(
        self, session: OpenSession, answers: Coroutine[Any, Any, None], within_s: float
    ) -> None:
        """Until `answers` is done, which waits for the session's stages.

        Raises what it raises, PeerLost for a stage that is given up, TimeoutError after `within_s`.
        """
        pulse, waiting = Pulse(), asyncio.ensure_future(answers)
        try:
            async with asyncio.timeout(within_s):
                while not (await asyncio.wait({waiting}, timeout=BEAT_S))[0]:
                    self._beat(session, pulse)
            waiting.result()
        finally:
            waiting.cancel()

    def _beat(self, session: OpenSession, pulse: Pulse) -> None:
        links, now = self._member.links, self._clock.monotonic()
        stages = dict.fromkeys(stage.peer for stage in session.route.stages)
        others = [peer for peer in links.peers() if peer not in stages][:WITNESSES]
        if not pulse.peers:
            for stage in session.machine.silent:
                links.ping(stage.peer)
        silent_s = {
            peer: max(links.silent_s(peer, now), links.unanswered_s(peer, now))
            for peer in (*stages, *others)
        }
        for peer in pulse.beat(now, silent_s):
            links.ping(peer)
        for stage in session.machine.silent:
            if links.connected(stage.peer) and self._silent(stage.peer, pulse, now):
                how = f"was silent for {pulse.quiet_s(stage.peer):.1f} s"
                raise lost(session.route, stage.peer, how)

    def _silent(self, peer: PeerId, pulse: Pulse, now: float) -> bool:
        rtts_s = self._member.links.rtts
        return pulse.alone(peer, rtts_s) and pulse.silent(peer, now, rtts_s.get(peer, 0.0))
