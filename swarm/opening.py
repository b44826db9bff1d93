"""Opening a session along the best route that accepts it.

All stages are asked at once. Where one refuses, falls silent (`hexswarm.vigil`) or cannot be
reached, the next route is tried in the same breath: the first spare of the last choice that avoids
every peer that said no, else a new choice without them. Spares were chosen within the request's
limits and on the same view, so nothing is lost by taking them; one with unmeasured ways is passed
over if there is a limit to keep.

Under a limit on the time per token each stage is asked to promise its part of it
(`router.cost.budgets`), and says *slow* if it cannot, or *busy* if it could not keep what it has
promised to others. A refusal tells the stage's load. So before a request is given up those that
said slow are asked once more: by what is known now, other stages may have time to spare for them.
What remains is NoRoute, with the time per token that can be had.

Where all are full or busy, or the only peers of some layers are about to leave or were lost a
moment ago, a person would try again, so the opener does: after the time that the refusal names, and
as long as `patience_s` lasts. A limit that nobody can promise is no such case: waiting is not what
was asked for. Nor is a swarm that never had the layers.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import count

from hexswarm import blame
from hexswarm.clock import Clock
from hexswarm.errors import HexswarmError, NoRoute, PeerLost, Refused
from hexswarm.membership import Membership
from hexswarm.planning import Plan, Planner
from hexswarm.records import PeerId, Route, RouteRequest, Stage
from hexswarm.runtime import OpenSession, SessionRuntime
from hexswarm.vigil import Vigil

log = logging.getLogger(__name__)

ATTEMPTS = 4
"""Routes that may refuse one session before the last refusal is the answer."""
HEARD_S = 3.0
"""A peer that was heard so lately lives: watched links are pinged after two seconds of silence."""
SEARCH_S = 20.0
"""So long dead peers, which the directory names for another minute or two, are passed over."""
LONGEST_WAIT_S = 5.0
"""However late a refusal says that it is worth asking again."""
SOON_S = 1.0
"""When to ask again if nobody said when."""


class _Said:
    """What the peers that were asked for one session have said."""

    def __init__(self) -> None:
        self.avoid: set[PeerId] = set()
        self.slow: set[PeerId] = set()
        """Who would promise more time than was asked."""
        self.last: Refused | PeerLost | None = None
        self.refusals = 0
        self.promises_refused = False
        self._again = False

    def no(self, error: Refused | PeerLost, session: OpenSession) -> None:
        self.last = error
        if isinstance(error, Refused):
            self.refusals += 1
            self.promises_refused |= error.code in ("slow", "busy")
        self.avoid |= {PeerId(error.peer), *session.refusing}
        self.slow |= session.machine.too_slow

    def ask_again(self) -> bool:
        """Let those be asked once more that said slow; False if there are none."""
        if self._again or not self.slow:
            return False
        self._again = True
        self.avoid -= self.slow
        return True


class Opener:
    """From a request to an open session."""

    def __init__(
        self,
        planner: Planner,
        member: Membership,
        runtime: SessionRuntime,
        clock: Clock,
        rng: random.Random,
        *,
        patience_s: float,
    ) -> None:
        self._planner = planner
        self._rng = rng
        self._patience_s = patience_s
        self._member = member
        self._runtime = runtime
        self._clock = clock
        self.vigil = Vigil(member, clock)

    async def open(
        self,
        request: RouteRequest,
        connect_s: float,
        *,
        client_loop: bool = False,
        prompt: Sequence[int] = (),
    ) -> tuple[OpenSession, Plan]:
        """A session for `request` and the plan that it follows; waits for room if need be.

        `prompt`, if given, is what its first turn will say: stages may have the KV of it.
        Raises NoRoute; Refused or PeerLost: the last refusal, once others have been tried;
        NetworkError if this process is cut off from all of them.
        """
        give_up_s = self._clock.monotonic() + self._patience_s
        why: HexswarmError | None = None
        level = logging.WARNING
        for tries in count():
            try:
                return await self._open(request, connect_s, client_loop, prompt)
            except (NoRoute, Refused, PeerLost) as error:
                # That nobody is left to ask says less than what the last one said.
                why = why if why is not None and isinstance(error, NoRoute) else error
                wait_s = self._again_s(request, error, tries)
            self._member.transport.check()  # cut off from all, waiting does not help
            if wait_s is None or self._clock.monotonic() + wait_s >= give_up_s:
                if wait_s is not None and isinstance(why, NoRoute) and why.binding == "kv":
                    why.retry_s = LONGEST_WAIT_S
                    why.remedy = f"try again in {why.retry_s:.0f} s, or ask for fewer tokens"
                raise why
            log.log(level, "%s; trying again in %.1f s", why.cause, wait_s)
            level = logging.INFO  # one word to whoever waits is enough
            await asyncio.sleep(wait_s)
            await self._look_again(request)
        raise AssertionError("it tries until it raises")

    def _again_s(
        self, request: RouteRequest, error: NoRoute | Refused | PeerLost, tries: int
    ) -> float | None:
        """When it is worth trying again; None if it is not."""
        if isinstance(error, Refused):
            if error.code not in ("full", "busy", "late", "draining"):
                return None
            if error.code == "full" and not self._planner.roomy(request):
                return None
            again_s = error.retry_s or SOON_S
        elif isinstance(error, NoRoute) and error.binding == "kv":
            again_s = SOON_S * 2.0 ** min(tries, 8)  # nobody said when
            if not self._planner.roomy(request):
                return None
        elif isinstance(error, PeerLost) or error.binding in ("coverage", "state"):
            again_s = SOON_S
            if self._clock.monotonic() - self._planner.lost_s > self._patience_s:
                return None
        else:
            return None
        return min(LONGEST_WAIT_S, again_s) * self._rng.uniform(0.8, 1.2)  # not all at once

    async def _look_again(self, request: RouteRequest) -> None:
        """Suppose that those who were full have room by now, and hear who has come.

        They correct us if not; what they said is too old to keep us from asking.
        """
        now = self._clock.monotonic()
        for peer, (_, load) in list(self._runtime.loads.items()):
            if load.free_kv_tokens < request.kv_tokens:
                guess = replace(load, free_kv_tokens=request.kv_tokens)
                self._runtime.loads[peer] = now, guess
        try:
            await self._member.refresh(request.model)
        except Exception as error:  # hivemind raises many kinds; the view stays old
            log.warning("reading the directory failed: %r", error)

    async def _open(
        self, request: RouteRequest, connect_s: float, client_loop: bool, prompt: Sequence[int]
    ) -> tuple[OpenSession, Plan]:
        """The same once."""
        said, plan = _Said(), None
        give_up_s = self._clock.monotonic() + SEARCH_S
        while said.refusals < ATTEMPTS and self._clock.monotonic() < give_up_s:
            try:
                plan = await self._next(request, plan, said.avoid)
            except NoRoute:
                if said.last is None:
                    raise
                if not said.ask_again():
                    break
                plan = None
                continue
            session = self._runtime.open(
                plan.route,
                request.model,
                request.kv_tokens,
                client_loop=client_loop,
                budgets=plan.promises(),
                prompt=prompt,
            )
            self._planner.asked(session)
            try:
                await self._opened(session, connect_s)
            except (Refused, PeerLost) as error:
                self._planner.answered(session)
                said.no(error, session)
                self._planner.leave(said.avoid)
                self.forget_lost(error)
            else:
                self._planner.answered(session)
                self._planner.use(plan.route)
                return session, replace(plan, request=request)
        raise await self._reason(request, said)

    async def _reason(self, request: RouteRequest, said: _Said) -> HexswarmError:
        """The last refusal, or NoRoute if the limit was the reason of any."""
        assert said.last is not None
        if request.tpot_s is None or not said.promises_refused:
            return said.last
        without = request.deny | (said.avoid - said.slow)
        quickest_s = await self._planner.quickest_s(replace(request, deny=without))
        reason = not_promised(request, said.last, quickest_s)
        reason.__cause__ = said.last
        return reason

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
            await self.vigil.wait(session, session.ready(), connect_s)
        except TimeoutError:
            silent = session.machine.silent
            if not silent:
                session.check()
                return  # the last one answered at that very moment
            session.close()
            # A stage also keeps silent while it waits for the next one: blame one without a link.
            connected = self._member.links.connected
            stage = next((stage for stage in silent if not connected(stage.peer)), silent[0])
            for a, b in blame.waits(session.route, silent):
                if connected(a) and connected(b):
                    self._planner.cut(a, b)
            raise self._late(stage, connect_s) from None
        except BaseException:
            session.close()
            raise

    def _late(self, stage: Stage, connect_s: float) -> Refused | PeerLost:
        """One that answers pings is busy, and worth asking again."""
        how = f"did not open within {connect_s:.0f} s"
        if self._member.links.missed_s(stage.peer, self._clock.monotonic()) < HEARD_S:
            return Refused(stage.peer, "late", f"is busy, and {how}", LONGEST_WAIT_S)
        return PeerLost(stage.peer, (stage.span.first, stage.span.end), how)

    def forget_lost(self, error: Exception) -> None:
        """A peer that was seen dead is not used again until it announces itself anew.

        One that we hear ourselves is busy, or somebody else called it lost: it is passed over in
        this attempt alone. In a swarm of few peers a crowd would else find nobody left.
        """
        if not isinstance(error, PeerLost):
            return
        peer, now = PeerId(error.peer), self._clock.monotonic()
        if self._member.links.missed_s(peer, now) < HEARD_S:
            self._planner.lost_s = now
            if error.beside is not None:
                self._planner.cut(peer, PeerId(error.beside))
        else:
            self._planner.failed(peer)


def not_promised(
    request: RouteRequest, refusal: Refused | PeerLost, quickest_s: float | None
) -> NoRoute:
    """The limit is the reason why no route is left; `quickest_s` is the least that can be had."""
    assert request.tpot_s is not None
    cause = f"no route promises {request.tpot_s:g} s a token"
    again_s = refusal.retry_s if isinstance(refusal, Refused) else 0.0
    remedy = f"try again in {again_s:.0f} s" if again_s else "try again"
    if quickest_s is None or quickest_s <= request.tpot_s:
        return NoRoute(f"{cause}: {refusal.cause}", remedy=remedy, binding="tpot")
    return NoRoute(
        f"{cause}: under the load of now the fastest needs {quickest_s:.3g} s",
        remedy=f"allow {quickest_s * 1.05:.2g} s a token, or {remedy}",
        binding="tpot",
        achievable={"tpot_s": quickest_s},
    )


def next_spare(request: RouteRequest, spares: Iterable[Route], avoid: set[PeerId]) -> Route | None:
    """The first spare without the peers to avoid that is known to keep the request's limits."""
    limited = request.tpot_s is not None or request.ttft_s is not None
    for spare in spares:
        if avoid.isdisjoint(stage.peer for stage in spare.stages):
            if limited and spare.unmeasured:
                continue
            return spare
    return None
