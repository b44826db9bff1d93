"""Opening a session along the best route that accepts it.

All stages are asked at once. Where one refuses or cannot be reached, the next route is tried in the
same breath: the first spare of the last choice that avoids every peer that said no, else a new
choice without them. Spares were chosen within the request's limits and on the same view, so nothing
is lost by taking them; one with unmeasured ways is passed over if there is a limit to keep.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import replace

from hexswarm.clock import Clock
from hexswarm.errors import NoRoute, PeerLost, Refused
from hexswarm.membership import Membership
from hexswarm.planning import Plan, Planner
from hexswarm.records import PeerId, Route, RouteRequest
from hexswarm.runtime import OpenSession, SessionRuntime

ATTEMPTS = 4
"""Routes that may refuse one session before the last refusal is the answer."""
SEARCH_S = 20.0
"""So long dead peers, which the directory names for another minute or two, are passed over."""


class Opener:
    """From a request to an open session."""

    def __init__(
        self,
        planner: Planner,
        member: Membership,
        runtime: SessionRuntime,
        clock: Clock,
    ) -> None:
        self._planner = planner
        self._member = member
        self._runtime = runtime
        self._clock = clock

    async def open(
        self, request: RouteRequest, connect_s: float, *, client_loop: bool = False
    ) -> tuple[OpenSession, Plan]:
        """A session for `request` and the plan that it follows.

        Raises NoRoute, Refused or PeerLost: the last refusal, once others have been tried.
        """
        avoid: set[PeerId] = set()
        plan: Plan | None = None
        refusal: Refused | PeerLost | None = None
        refusals, give_up_s = 0, self._clock.monotonic() + SEARCH_S
        while refusals < ATTEMPTS and self._clock.monotonic() < give_up_s:
            try:
                plan = await self._next(request, plan, avoid)
            except NoRoute:
                if refusal is not None:
                    raise refusal from None
                raise
            session = self._runtime.open(
                plan.route, request.model, request.kv_tokens, client_loop=client_loop
            )
            try:
                await self._opened(session, connect_s)
            except (Refused, PeerLost) as error:
                self._planner.answered(session)
                refusal = error
                refusals += isinstance(error, Refused)
                avoid |= {PeerId(error.peer), *session.refusing}
                self._planner.leave(avoid)
                self.forget_lost(error)
            else:
                self._planner.answered(session)
                self._planner.use(plan.route)
                return session, replace(plan, request=request)
        assert refusal is not None
        raise refusal

    async def _next(self, request: RouteRequest, last: Plan | None, avoid: set[PeerId]) -> Plan:
        """The plan to try: of the last one's spares, else a new one without those to avoid."""
        if last is not None:
            spare = next_spare(request, last.route.spares, avoid)
            if spare is not None:
                left = last.route.spares[last.route.spares.index(spare) + 1 :]
                return replace(last, route=replace(spare, spares=left))
        if not avoid:
            return await self._planner.plan(request)
        return await self._planner.plan(replace(request, deny=request.deny | avoid), once=True)

    async def _opened(self, session: OpenSession, connect_s: float) -> None:
        """Wait until the session is open; it is closed if it does not come to that."""
        try:
            async with asyncio.timeout(connect_s):
                await session.ready()
        except TimeoutError:
            silent = session.machine.silent
            if not silent:
                return  # the last one answered at that very moment
            session.close()
            # A stage also keeps silent while it waits for the next one: blame one without a link.
            connected = self._member.links.connected
            stage = next((stage for stage in silent if not connected(stage.peer)), silent[0])
            how = f"did not open within {connect_s:.0f} s"
            raise PeerLost(stage.peer, (stage.span.first, stage.span.end), how) from None
        except BaseException:
            session.close()
            raise

    def forget_lost(self, error: Exception) -> None:
        """A peer that was seen dead is not used again until it announces itself anew."""
        if isinstance(error, PeerLost):
            self._member.directory.forget(PeerId(error.peer))


def next_spare(request: RouteRequest, spares: Iterable[Route], avoid: set[PeerId]) -> Route | None:
    """The first spare without the peers to avoid that is known to keep the request's limits."""
    limited = request.tpot_s is not None or request.ttft_s is not None
    for spare in spares:
        if avoid.isdisjoint(stage.peer for stage in spare.stages):
            if limited and spare.unmeasured:
                continue
            return spare
    return None
