"""When machines die: sessions notice, mend their routes or begin anew.

A session whose stage died stands still until it notices, after `Settings.detect_s`: what was under
way at its other stages is dropped (its epoch is over). Then the policy mends the route (`repair`):
the stages in the hole are opened, the tokens that are known are replayed to them from the journal
of the stage before the hole, and the step that was under way is sent once more by the client.
Where the policy cannot mend, the request begins anew with its tokens so far as part of the prompt.
A request whose prompt was not through has nothing to replay: its prompt is sent again.

Holes that are apart are mended as one, from the first dead stage to the last: what lives between
them is computed once more. So is the replay of a stage that had not caught up when another died.
"""

from __future__ import annotations

from dataclasses import replace

from hexswarm.simulator.clients import Clients, Wish
from hexswarm.simulator.opening import places
from hexswarm.simulator.policy import Visits
from hexswarm.simulator.records import Session
from hexswarm.simulator.stage import Stage


class Mending:
    """Deaths and returns of units, for the sessions that they concern."""

    def __init__(self, clients: Clients) -> None:
        self.clients, self.opening, self.swarm = clients, clients.opening, clients.swarm
        self.agenda, self.policy = clients.agenda, clients.policy

    def die(self, now: float, number: int) -> None:
        """A unit is gone, with the KV of its sessions."""
        for session in self.swarm.go(now, number):
            if session.life.done:  # its last token is under way
                continue
            if not session.lost:
                self.agenda.at(now + self.clients.settings.detect_s, self._mend, session)
            session.lost.add(number)
            self._halt(session)

    def come_back(self, now: float, number: int) -> None:
        """A unit is up again, empty, and says so."""
        stage = self.swarm.come(now, number)
        again_s = self.opening.board.announce(stage, now)
        self.agenda.at(again_s, self.announce, stage)
        self.clients.try_waiting(now)

    def announce(self, now: float, stage: Stage) -> None:
        """One word of many, as long as the unit lives."""
        if stage.alive:
            self.agenda.at(self.opening.board.announce(stage, now), self.announce, stage)

    def _halt(self, session: Session) -> None:
        """What is under way is of the past."""
        session.epoch += 1
        session.replay_to = -1
        for visit in session.visits:
            stage = self.swarm.stages[visit.unit]
            if stage is not None and visit.unit not in session.lost:
                stage.cancel(session.key)

    def _mend(self, now: float, session: Session) -> None:
        """The loss is noticed, unless the last token was under way to the client and came."""
        if session.key not in self.swarm.sessions:
            return
        session.life.repairs += 1
        for unit in session.lost:
            self.policy.lost(now, unit)
        refused: frozenset[int] = frozenset()
        for _ in range(self.clients.settings.attempts):
            request, dead = session.request, frozenset(session.lost)
            known = session.known if session.made else request.input_tokens
            view = self.opening.board.view(request.client, now, refused)
            visits = self.policy.repair(now, request, session.visits, dead, known, view)
            if visits is None:
                break
            refusing = self._fill(now, session, visits)
            if refusing is None:
                return
            refused |= refusing
        self._anew(now, session)

    def _fill(self, now: float, session: Session, visits: Visits) -> frozenset[int] | None:
        """Take the new stages in; None if they came, else who refused."""
        self.opening.check(visits)
        old = session.visits
        before = {visit.unit for visit in old} - session.lost
        fresh = [place for place, visit in enumerate(visits) if visit.unit not in before]
        changed = replace(session, visits=visits, lost=set())
        refusing, takes_s = self.opening.ask(now, changed, fresh)
        if refusing:
            return refusing
        kept = {visit.unit for visit in visits}
        for visit in old:
            stage = self.swarm.stages[visit.unit]
            if stage is not None and visit.unit not in kept | session.lost:
                stage.close(session.key, now)
        session.visits, session.lost = visits, set()
        session.empty = kept & (session.empty | {visits[place].unit for place in fresh})
        session.spans, session.stage_of = self.opening.spans(visits), places(visits)
        self.agenda.at(now + takes_s, self._go_on, session, session.epoch)
        return None

    def _go_on(self, now: float, session: Session, epoch: int) -> None:
        """The route is whole again: replay, or the prompt once more, which fills all stages."""
        if session.epoch != epoch:
            return
        if not session.made:
            session.empty.clear()
            self.swarm.send_prompt(now, session)
            return
        lacking = sorted(session.stage_of[unit] for unit in session.empty)
        session.replay_to = lacking[-1]
        self.swarm.send_replay(now, session, lacking[0])

    def _anew(self, now: float, session: Session) -> None:
        """Another route for all of it, the tokens so far in the prompt."""
        life, request = session.life, session.request
        self.clients.leave(now, session)
        done = life.tokens - (life.request.output_tokens - request.output_tokens)
        rest = replace(
            request,
            input_tokens=request.input_tokens + done,
            output_tokens=request.output_tokens - done,
        )
        self.clients.wish(now, Wish(life, rest, now))
