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
import logging
from collections.abc import Coroutine, Mapping
from typing import Any

from hexswarm import blame
from hexswarm.clock import Clock
from hexswarm.detector import BEAT_S, Pulse
from hexswarm.membership import Membership
from hexswarm.records import PeerId
from hexswarm.runtime import OpenSession

log = logging.getLogger(__name__)

WITNESSES = 8
"""So many other neighbours are pinged too: they tell a lost network from a lost stage."""


class Vigil:
    """One for each client: a crowd of sessions that wait shares its pings."""

    def __init__(self, member: Membership, clock: Clock) -> None:
        self._member = member
        self._clock = clock
        self._waiting: dict[OpenSession, asyncio.Future[None]] = {}
        """Sessions, and whom to tell that a stage of theirs is given up."""
        self._pulse = Pulse()
        self._ticker: asyncio.Task[None] | None = None

    async def wait(
        self, session: OpenSession, answers: Coroutine[Any, Any, None], within_s: float
    ) -> None:
        """Until `answers` is done, which waits for the session's stages.

        Raises what it raises, PeerLost for a stage that is given up, TimeoutError after `within_s`;
        and what has ended the session meanwhile: a loss may come in one read with the last answer.
        """
        given_up = asyncio.get_running_loop().create_future()
        waiting = asyncio.ensure_future(answers)
        self._begin(session, given_up)
        try:
            async with asyncio.timeout(within_s):
                await asyncio.wait({waiting, given_up}, return_when=asyncio.FIRST_COMPLETED)
            (waiting if waiting.done() else given_up).result()
            session.check()
        finally:
            waiting.cancel()
            if not given_up.cancel():
                given_up.exception()  # it is told, or something else was first
            self._end(session)

    def _begin(self, session: OpenSession, given_up: asyncio.Future[None]) -> None:
        self._waiting[session] = given_up
        for stage in session.machine.silent:
            if stage.peer not in self._pulse.peers:
                self._member.links.ping(stage.peer)
        if self._ticker is None:
            self._ticker = asyncio.create_task(self._tick())

    def _end(self, session: OpenSession) -> None:
        del self._waiting[session]
        if not self._waiting and self._ticker is not None:
            self._ticker.cancel()
            self._ticker, self._pulse = None, Pulse()

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(BEAT_S)
            try:
                self._beat(self._clock.monotonic())
            except Exception:  # a mistake of ours must not leave all sessions unwatched
                log.exception("watching over sessions that open failed")

    def _beat(self, now: float) -> None:
        links, pulse = self._member.links, self._pulse
        stages = {stage.peer for session in self._waiting for stage in session.route.stages}
        others = [peer for peer in links.peers() if peer not in stages][:WITNESSES]
        silent_s = {
            peer: max(links.silent_s(peer, now), links.unanswered_s(peer, now))
            for peer in (*sorted(stages), *others)
        }
        for peer in pulse.beat(now, silent_s):
            links.ping(peer)
        rtts_s = links.rtts
        lost = {
            peer: f"was silent for {pulse.quiet_s(peer):.1f} s"
            for peer in silent_s.keys() & stages
            if links.connected(peer) and self._silent(peer, now, rtts_s)
        }
        for session, given_up in self._waiting.items() if lost else ():
            for stage in session.machine.silent:
                if stage.peer in lost and not given_up.done():
                    given_up.set_exception(blame.lost(session.route, stage.peer, lost[stage.peer]))

    def _silent(self, peer: PeerId, now: float, rtts_s: Mapping[PeerId, float]) -> bool:
        alone = self._pulse.alone(peer, rtts_s)
        return alone and self._pulse.silent(peer, now, rtts_s.get(peer, 0.0))
