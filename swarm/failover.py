"""Keeping answers going: hears that a running turn is in trouble and finds it another route.

One `Mender` serves all turns of a client. While any runs it beats every `BEAT_S`: links are pinged
where it is quiet, and each turn's `Detector` says whom to suspect. A turn that lost stages stands
still (`hexswarm.session`), and one task per turn mends it:

    replan the hole ──▶ reroute ──▶ all stages opened in time? ──yes──▶ it goes on
       ▲    │ NoRoute                     │ no: suspect the silent ones
       └────┴── wait a moment, read the directory ◀┘

More losses meanwhile only make the next attempt larger. There may be any number of attempts as long
as tokens come between them; without one, `repair_s` after the loss the turn ends with `PeerLost`,
which names the layers and what is missing.

The same task *moves* a turn whose stages are all well: away from one that drains, unless the answer
will be complete in half of the time that is left, and away from a straggler, if the new
route should be `WORTH` times as fast as the ring is now. The new peers are dialled before
the ring is stopped for them. If there is nobody else, the turn stays where it is.

Who failed is remembered (`Planner.failed`), but not on hearsay: if a neighbour says that a peer is
lost and our own link to it lives, it is passed over in this session and not banned.

Rejected: the spares that were planned with the route (chosen on an old view for the whole
route; planning the hole takes milliseconds); opening a second session from the start
(it would compute everything again).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterable, Mapping

from hexswarm.clock import Clock
from hexswarm.detector import BEAT_S, Ask, Decision, Detector, Pulse, Slow, Suspect
from hexswarm.errors import HexswarmError, NoRoute, PeerLost, Refused, RemoteProtocolError
from hexswarm.instructions import Turn
from hexswarm.membership import Membership
from hexswarm.planning import Plan, Planner
from hexswarm.records import PeerId
from hexswarm.runtime import OpenSession, SessionRuntime
from hexswarm.trace import Repair
from hexswarm.wards import Ward, expected, lost_for_good, pays, promised, replay_s

log = logging.getLogger(__name__)

ATTEMPT_S = 2.5
"""So long all stages of a new route may take to open: a dial and a lease. Longer after each attempt
that took too long, by `PATIENCE`: the machine may be busy."""
PATIENCE = 1.5
ASK_S = 1.5
"""So long stages may take to say how far they are."""
PAUSE_S = (0.2, 1.0)
"""First and longest wait for a peer to come back where there is no route."""
RUMOUR_S = 2.0
"""So long our own link has to show that a peer is dead that others call lost."""
CUT_S = 10.0
"""So long the verdict on a way counts for other turns."""
FAREWELL_S = 5.0
"""So much longer than it said a peer that leaves may take to be gone."""
DIAL_S = 2.0
"""For links to the peers to which a turn moves that could also stay."""
WITNESSES = 8
"""So many other neighbours are pinged too: they tell a lost network from lost stages, and one that
is silent does not take over."""


class Mender:
    """Call `begin` before each turn, `end` after it."""

    def __init__(
        self,
        planner: Planner,
        member: Membership,
        runtime: SessionRuntime,
        clock: Clock,
        repair_s: float,
    ) -> None:
        self._planner = planner
        self._member = member
        self._clock = clock
        self._repair_s = repair_s
        self._wards: dict[OpenSession, Ward] = {}
        self._pulse = Pulse()
        self._rumours: dict[PeerId, float] = {}
        """Peers that others called lost, and since when."""
        self._farewells: dict[PeerId, float] = {}
        """Peers that said they would go, and by when: their loss is no failure."""
        self._cuts: dict[tuple[PeerId, PeerId], float] = {}
        """Ways that a turn has lost, to the first from the second, and when: what is known to one
        need not be found out by all."""
        self._reading: asyncio.Task[None] | None = None
        self._ticker: asyncio.Task[None] | None = None
        runtime.on_broken = self._on_broken
        runtime.on_draining = self._on_draining
        runtime.on_mended = self._on_mended

    # --- turns ----------------------------------------------------------------------------------

    def begin(self, session: OpenSession, plan: Plan, turn: Turn) -> None:
        """Watch over a turn that begins now."""
        detector = Detector(
            self._clock.monotonic(),
            turn.end,
            ttft_s=plan.route.ttft_s,
            tpot_s=plan.route.tpot_s,
            expected_s=expected(plan),
        )
        self._wards[session] = Ward(session, plan, turn, detector, promised(plan))
        if self._ticker is None:
            self._ticker = asyncio.create_task(self._tick())

    async def close(self) -> None:
        """Watch over nothing any more."""
        for session in list(self._wards):
            self.end(session)
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.gather(self._reading, return_exceptions=True)

    def end(self, session: OpenSession) -> tuple[Plan, tuple[Repair, ...]] | None:
        """The turn is over: the plan that it followed at last, and its repairs."""
        ward = self._wards.pop(session, None)
        if ward is None:
            return None
        if session.machine.failed is None:
            ward.settle(self._clock.monotonic(), over=True)  # the last token is not counted
        for task in (ward.mending, ward.asking):
            if task is not None:
                task.cancel()
        if not self._wards and self._ticker is not None:
            self._ticker.cancel()
            self._ticker = None
        return ward.plan, tuple(ward.repairs)

    # --- what happens ---------------------------------------------------------------------------

    def _on_broken(self, session: OpenSession) -> None:
        ward, broken = self._wards.get(session), session.machine.broken
        if ward is None:  # nobody watches over it
            session.give_up(next(iter(broken.values())))
            return
        for peer, error in broken.items():
            self._note_loss(ward, peer, error)
        ward.news.set()
        self._mend(ward)

    def _on_draining(self, session: OpenSession, peer: PeerId, exit_s: float) -> None:
        now = self._clock.monotonic()
        self._farewells = {p: by_s for p, by_s in self._farewells.items() if by_s > now}
        self._farewells[peer] = now + exit_s + FAREWELL_S
        ward = self._wards.get(session)
        if ward is None:
            return
        route, pace_s = ward.plan.route, ward.detector.pace_s
        likely_s = ward.left * (pace_s or route.tpot_s) + (0.0 if pace_s else route.ttft_s)
        if likely_s > exit_s / 2:
            ward.leaving.add(peer)
            self._mend(ward)

    def _on_mended(self, session: OpenSession) -> None:
        ward = self._wards.get(session)
        if ward is not None:
            self._replaced(ward)
            ward.news.set()

    def _note_loss(self, ward: Ward, peer: PeerId, error: HexswarmError) -> None:
        if peer in ward.noted:
            return
        ward.noted.add(peer)
        log.info("session %s: %s", ward.session.name, error.cause)
        how = error.how if isinstance(error, PeerLost) else error.cause
        ward.stop(self._clock.monotonic()).gone.setdefault(peer, how)
        if isinstance(error, PeerLost) and error.beside is not None:
            self._cut(ward, peer, PeerId(error.beside))
        retry_s = error.retry_s if isinstance(error, Refused) else 0.0
        ward.avoid_for_now(peer, self._clock.monotonic(), retry_s)
        if isinstance(error, PeerLost) and self._member.links.connected(peer):
            self._rumours.setdefault(peer, self._clock.monotonic())
        elif isinstance(error, PeerLost | RemoteProtocolError) or _at_fault(error):
            farewell_s = self._farewells.get(peer, 0.0)
            self._planner.failed(peer, blameless=farewell_s > self._clock.monotonic())

    def _cut(self, ward: Ward, peer: PeerId, beside: PeerId) -> None:
        """The way between two stages is lost, as far as is known."""
        ward.cut(peer, beside)
        if self._lives(peer) and self._lives(beside):
            self._planner.cut(peer, beside)

    def _avoided(self, ward: Ward, *, alone: bool = False) -> frozenset[PeerId]:
        """Who does not come in; with `alone`, who does not though there is nobody else."""
        now = self._clock.monotonic()
        silent = frozenset(p for p in self._pulse.peers if self._pulse.silent(p, now))
        return ward.avoided(now, alone=alone) | silent

    def _check_rumours(self, now: float) -> None:
        """Others called these lost: our own link to them decides."""
        links = self._member.links
        for peer, since_s in list(self._rumours.items()):
            if not links.connected(peer) or self._pulse.silent(peer, now):
                self._planner.failed(peer)
            elif now - since_s < RUMOUR_S:
                continue
            del self._rumours[peer]

    def _replaced(self, ward: Ward) -> None:
        """The stages know how to go on: what they have to replay is nobody's fault."""
        if ward.stall is not None:
            ward.stall.mended_at = ward.known
        plan, before = ward.plan, {*ward.promised_s}
        ward.promised_s = promised(plan)
        ward.noted.clear()
        ward.detector.replaced(
            self._clock.monotonic(),
            ward.known,
            replay_s=replay_s(plan, ward.known, before),
            tpot_s=plan.route.tpot_s,
            expected_s=expected(plan),
        )

    # --- the beat -------------------------------------------------------------------------------

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(BEAT_S)
            try:
                self._beat(self._clock.monotonic())
            except Exception:  # a mistake of ours must not leave all turns unwatched
                log.exception("watching over turns failed")

    def _beat(self, now: float) -> None:
        links = self._member.links
        wards = [ward for ward in self._wards.values() if ward.alive]
        stages = dict.fromkeys(s.peer for ward in wards for s in ward.session.route.stages)
        others = [peer for peer in links.peers() if peer not in stages][:WITNESSES]
        silent_s = {peer: links.silent_s(peer, now) for peer in (*stages, *others, *self._rumours)}
        for peer in self._pulse.beat(now, silent_s):
            links.ping(peer)
        self._check_rumours(now)
        rtts_s = links.rtts
        for ward in wards:
            machine = ward.session.machine
            if machine.mending:
                if not machine.broken and self._mute(ward):
                    ward.news.set()
                continue
            made = ward.detector.beat(now, ward.known, self._pulse, rtts_s, owed=machine.awaited)
            ward.settle(ward.detector.token_s)
            self._decide(ward, made)

    def _decide(self, ward: Ward, decisions: Iterable[Decision]) -> None:
        for decision in decisions:
            match decision:
                case Ask() if ward.asking is None or ward.asking.done():
                    ward.asking = asyncio.create_task(self._ask(ward))
                case Suspect(peer=peer, how=how, beside=beside):
                    self._suspect(ward, peer, how, beside)
                    if beside is not None:
                        self._cuts[peer, beside] = self._clock.monotonic()
                case Slow(peer=peer, step_s=step_s):
                    ward.slow[peer] = step_s
                    self._mend(ward)

    async def _ask(self, ward: Ward) -> None:
        told = await ward.session.progress(ASK_S)
        machine = ward.session.machine
        if ward.alive and not machine.mending:
            now = self._clock.monotonic()
            self._cuts = {way: at_s for way, at_s in self._cuts.items() if now - at_s < CUT_S}
            made = ward.detector.progress(now, told, ward.known)
            self._decide(ward, made or ward.detector.agree(self._cuts))

    def _suspect(self, ward: Ward, peer: PeerId, how: str, beside: PeerId | None = None) -> None:
        """Our own verdict on a stage."""
        spans = {stage.peer: stage.span for stage in ward.session.route.stages}
        if peer not in spans or not ward.alive:
            return
        self._planner.failed(peer, heard=beside is not None and self._lives(peer))
        ward.stop(self._clock.monotonic()).gone[peer] = how
        ward.noted.add(peer)
        if beside is not None:
            self._cut(ward, peer, beside)
        ward.avoid_for_now(peer, self._clock.monotonic())
        log.info("session %s: peer %s %s", ward.session.name, peer[-8:], how)
        layers = spans[peer].first, spans[peer].end
        ward.session.suspect(peer, PeerLost(peer, layers, how))

    # --- mending --------------------------------------------------------------------------------

    def _mend(self, ward: Ward) -> None:
        if ward.mending is None or ward.mending.done():
            ward.mending = asyncio.create_task(self._care(ward))

    async def _care(self, ward: Ward) -> None:
        """Until nothing is wrong with the turn."""
        try:
            while ward.alive:
                if ward.session.machine.mending:
                    await self._repair(ward)
                elif ward.slow or ward.leaving:
                    await self._move(ward)
                else:
                    return
        except HexswarmError as error:
            ward.session.give_up(error)
        except Exception as error:  # a mistake of ours: the caller must not wait for ever
            log.exception("session %s could not be mended", ward.session.name)
            ward.session.give_up(HexswarmError(f"the route could not be mended: {error!r}"))

    async def _repair(self, ward: Ward) -> None:
        """Attempts, until the stages know how to go on or there is no point in more."""
        machine = ward.session.machine
        pause_s, attempt_s, why = PAUSE_S[0], ATTEMPT_S, None
        while ward.alive and machine.mending:
            self._member.transport.check()  # cut off from all, there is nobody to mend it with
            if self._too_late(ward):
                ward.session.give_up(lost_for_good(ward, why, self._repair_s))
                return
            ward.news.clear()
            if machine.broken:
                try:
                    plan = await self._replan(ward, frozenset(machine.broken))
                except NoRoute as error:
                    why = error
                    await self._pause(ward, pause_s)
                    pause_s = min(2 * pause_s, PAUSE_S[1])
                    continue
                if ward.news.is_set() or not ward.alive:
                    continue  # more was lost meanwhile
                self._reroute(ward, plan)
            if not await self._opened(ward, attempt_s):
                attempt_s *= PATIENCE

    def _too_late(self, ward: Ward) -> bool:
        """The answer has stood still for too long; what moves it, if slowly, is not too late."""
        stall = ward.stall
        if stall is None or not ward.session.machine.broken:
            return False
        if ward.known > stall.position:  # the old tail had sent more
            stall.position, stall.began_s = ward.known, self._clock.monotonic()
        return self._clock.monotonic() - stall.began_s >= self._repair_s

    async def _replan(self, ward: Ward, gone: frozenset[PeerId]) -> Plan:
        """A plan without these, and if possible without those that are about to leave.

        Who was cut off from a neighbour may stay, and the neighbour gives way to another: where
        nobody else serves its layers, or if the neighbour was an end of more ways that were lost.
        """
        avoid, args = self._avoided(ward), (ward.known, ward.left)
        leaving = frozenset(ward.leaving & {stage.peer for stage in ward.session.route.stages})
        if leaving - gone:
            with contextlib.suppress(NoRoute):
                both = gone | leaving
                return await self._planner.replan(ward.plan, both, *args, avoid | leaving)
        ways = [(gone, avoid)]
        if kept := frozenset(peer for peer in gone & ward.beside.keys() if self._lives(peer)):
            others = ward.instead(kept)
            worse = sum(ward.cuts[p] for p in others) > sum(ward.cuts[p] for p in kept)
            ways.insert(0 if worse else 1, (gone - kept | others, avoid - kept | others))
        for without, avoided in ways:
            with contextlib.suppress(NoRoute):
                plan = await self._planner.replan(ward.plan, without, *args, avoided)
                for peer in without - gone:
                    ward.avoid_for_now(peer, self._clock.monotonic())
                return plan
        return await self._planner.replan(ward.plan, gone, *args, self._avoided(ward, alone=True))

    def _lives(self, peer: PeerId) -> bool:
        """As far as our own link to it tells."""
        now = self._clock.monotonic()
        return self._member.links.connected(peer) and not self._pulse.silent(peer, now)

    def _reroute(self, ward: Ward, plan: Plan) -> None:
        ward.stop(self._clock.monotonic())
        ward.plan = plan
        ward.noted.clear()
        ward.beside.clear()
        new = promised(plan)
        budgets = [ward.promised_s.get(s.peer, new[s.peer]) for s in plan.route.stages]
        log.info("session %s goes on along %s", ward.session.name, plan.route)
        ward.session.reroute(plan.route, budgets)

    async def _opened(self, ward: Ward, within_s: float) -> bool:
        """Wait for news of the new route; whoever is silent at the end is suspected. False if all
        of the time was used up: the machine may be busy."""
        machine = ward.session.machine
        began_s, mute = self._clock.monotonic(), list[PeerId]()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                while ward.alive and machine.mending and not machine.broken and not mute:
                    await ward.news.wait()
                    ward.news.clear()
                    mute = self._mute(ward)
        if not ward.alive or not machine.mending or machine.broken:
            return True
        took_s = self._clock.monotonic() - began_s
        route = [stage.peer for stage in machine.route.stages]
        for peer in mute or self._holding_up(ward):
            # One that lives waits for the next one, most likely.
            after = route[(route.index(peer) + 1) % len(route)] if self._lives(peer) else peer
            beside = after if after != peer else None
            self._suspect(ward, peer, f"did not open within {took_s:.1f} s", beside)
        return bool(mute)

    def _mute(self, ward: Ward) -> list[PeerId]:
        """Stages of the new route that we wait for in vain: links that do not answer, of a network
        that does."""
        now, rtts_s = self._clock.monotonic(), self._member.links.rtts
        silent = (stage.peer for stage in ward.session.machine.silent)
        return [
            peer
            for peer in silent
            if self._member.links.connected(peer)
            and self._pulse.alone(peer, rtts_s)
            and self._pulse.silent(peer, now, rtts_s.get(peer, 0.0))
        ]

    def _holding_up(self, ward: Ward) -> list[PeerId]:
        """Whom the others wait for: a stage also keeps silent while it waits for the next one."""
        silent = [stage.peer for stage in ward.session.machine.silent]
        links, now = self._member.links, self._clock.monotonic()
        for suspects in (
            [p for p in silent if not links.connected(p) or self._pulse.silent(p, now)],
            [peer for peer in silent if peer not in ward.promised_s],
        ):
            if suspects:
                return suspects
        return silent[:1]

    async def _pause(self, ward: Ward, seconds: float) -> None:
        """A moment in which a peer may come, or come back; it ends with any news."""
        if self._reading is None or self._reading.done():
            # Reading the directory may take longer than the pause, and serves all turns.
            self._reading = asyncio.create_task(self._read(ward.plan.request.model))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await ward.news.wait()
                ward.news.clear()

    async def _read(self, model: str) -> None:
        try:
            await self._member.refresh(model)
        except Exception as error:  # hivemind raises many kinds; the view stays old
            log.warning("reading the directory failed: %r", error)

    # --- moving ---------------------------------------------------------------------------------

    async def _move(self, ward: Ward) -> None:
        """Away from stages that are slow or about to leave, if there is somebody better."""
        slow, ward.slow = ward.slow, {}
        route = {stage.peer for stage in ward.session.route.stages}
        gone = frozenset(ward.leaving | slow.keys()) & route
        ward.leaving &= route
        if not gone:
            return
        for peer, step_s in slow.items():
            self._planner.told(self._planner.announced(ward.plan), {peer: step_s})
        deny = self._avoided(ward) | gone
        plan: Plan | None = None
        with contextlib.suppress(NoRoute):
            plan = await self._planner.replan(ward.plan, gone, ward.known, ward.left, deny)
        if plan is not None and (ward.leaving or pays(ward.plan, plan, slow, ward.detector.pace_s)):
            lost = await self._dial(plan)
            if self._still(ward) and not lost:
                self._begin_move(ward, plan, slow)
                return
            for peer in lost:
                self._planner.failed(peer)
        if ward.leaving and self._still(ward):
            await self._pause(ward, PAUSE_S[1])  # somebody may come before it goes

    def _begin_move(self, ward: Ward, plan: Plan, slow: Mapping[PeerId, float]) -> None:
        stall = ward.stop(self._clock.monotonic())
        stays = {stage.peer for stage in plan.route.stages}
        for stage in ward.session.route.stages:
            if stage.peer not in stays:
                how = "leaves the swarm" if stage.peer in ward.leaving else "gave way"
                stall.gone[stage.peer] = "was slow" if stage.peer in slow else how
        ward.leaving &= stays
        ward.news.clear()
        self._reroute(ward, plan)

    def _still(self, ward: Ward) -> bool:
        return ward.alive and not ward.session.machine.mending

    async def _dial(self, plan: Plan) -> list[PeerId]:
        """Have links to all stages; those that could not be reached in time."""
        links = self._member.links

        async def reach(peer: PeerId, addresses: tuple[str, ...]) -> bool:
            try:
                async with asyncio.timeout(DIAL_S):
                    await links.connect(peer, addresses)
            except (TimeoutError, HexswarmError):
                return False
            return True

        stages = plan.route.stages
        reached = await asyncio.gather(*(reach(s.peer, s.addresses) for s in stages))
        return [s.peer for s, here in zip(stages, reached, strict=True) if not here]


def _at_fault(error: HexswarmError) -> bool:
    """A stage failed by its own doing; being full or about to leave is none."""
    return isinstance(error, Refused) and error.code in ("engine", "gap", "conflict", "input")
