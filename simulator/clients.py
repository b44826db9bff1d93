"""Requests from their arrival to their end: choosing, waiting, hearing tokens.

If a stage refuses, the policy is asked again in the same breath, knowing who refused, up to
`Settings.attempts` times; what each attempt takes, `opening.py` says. Then the request waits: for
`Execution.retry_s`, or, with one coordinator, in a queue that is tried from its front whenever a
request ends or a unit comes, and every `retry_s` besides.

Times are the client's: a token counts when it reaches the client. The gap between two tokens of a
request is thus the time of a token's way around, as Helix measures a decode iteration at its
coordinator.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from hexswarm.simulator.opening import Opening
from hexswarm.simulator.policy import Request
from hexswarm.simulator.records import Life, Session


@dataclass(slots=True)
class Wish:
    """A request that wants a route."""

    life: Life
    request: Request
    since_s: float
    tried: int = 0
    refused: frozenset[int] = frozenset()


class Clients:
    """All requests of a run."""

    def __init__(
        self, opening: Opening, requests: Sequence[Request], window_s: tuple[float, float]
    ) -> None:
        self.opening, self.swarm = opening, opening.swarm
        self.agenda, self.policy = self.swarm.agenda, self.swarm.policy
        self.settings, self.execution = self.swarm.settings, self.swarm.execution
        self.lives = [Life(request) for request in requests]
        self.arrived = self.ended = 0
        self.gaps_s = array("d")
        """Between two tokens of a request, for all tokens that came within the window."""
        self.heard_tokens = 0
        """Within the window, first ones included."""
        self._window_s = window_s
        self._waiting: deque[Wish] = deque()
        self._ticking = False
        self.swarm.audience = self
        self._next_arrival()

    # --- choosing --------------------------------------------------------------------------------

    def _next_arrival(self) -> None:
        if self.arrived < len(self.lives):
            self.agenda.at(self.lives[self.arrived].request.arrives_s, self._arrive)

    def _arrive(self, now: float) -> None:
        life = self.lives[self.arrived]
        self.arrived += 1
        self._next_arrival()
        self.wish(now, Wish(life, life.request, now))

    def wish(self, now: float, wish: Wish) -> None:
        """Try at once, unless others wait already for the one coordinator."""
        if self._waiting:
            self._queue(now, wish)
        else:
            self._again(now, wish)

    def _again(self, now: float, wish: Wish) -> None:
        if self._attempt(now, wish):
            return
        wish.tried, wish.refused = 0, frozenset()
        if self._lost_patience(now, wish):
            self._over(now, wish.life)
        elif self.execution.central:
            self._queue(now, wish)
        else:
            self.agenda.at(now + self.execution.retry_s, self._again, wish)

    def _attempt(self, now: float, wish: Wish) -> bool:
        """Whether a route took the request, or answers are under way."""
        while wish.tried < self.settings.attempts:
            view = self.opening.board.view(wish.request.client, now, wish.refused)
            visits = self.policy.route(now, wish.request, view)
            if visits is None:
                return False
            wish.tried += 1
            session = self.opening.session(wish.life, wish.request, visits)
            refusing, takes_s = self.opening.ask(now, session, range(len(visits)))
            if not refusing:
                self.swarm.sessions[session.key] = session
                self._taken(now, session)
                self.agenda.at(now + takes_s, self.begin, session, session.epoch)
                return True
            wish.refused |= refusing
            wish.life.refusals += 1
            if takes_s:
                self.agenda.at(now + takes_s, self._again, wish)
                return True
        return False

    def _taken(self, now: float, session: Session) -> None:
        life = session.life
        if life.begun_s != life.begun_s:
            life.begun_s, life.stages = now, len(session.visits)

    def _queue(self, now: float, wish: Wish) -> None:
        self._waiting.append(wish)
        if not self._ticking:
            self._tick(now)

    def _tick(self, now: float) -> None:
        """Ends wake the queue; but what it waits for may be a word in the directory."""
        self._ticking = bool(self._waiting)
        if self._ticking:
            self.agenda.at(now + self.execution.retry_s, self._tock)

    def _tock(self, now: float) -> None:
        self.try_waiting(now)
        self._tick(now)

    def try_waiting(self, now: float) -> None:
        """Those who wait for the coordinator, oldest first, until one has to go on waiting."""
        while self._waiting:
            wish = self._waiting.popleft()
            if self._lost_patience(now, wish):
                self._over(now, wish.life)
            elif not self._attempt(now, wish):
                wish.tried, wish.refused = 0, frozenset()
                self._waiting.appendleft(wish)
                return

    def _lost_patience(self, now: float, wish: Wish) -> bool:
        return now - wish.since_s >= self.settings.patience_s

    # --- answers ---------------------------------------------------------------------------------

    def begin(self, now: float, session: Session, epoch: int) -> None:
        """All stages are open: the prompt may leave."""
        if session.epoch == epoch:
            self.swarm.send_prompt(now, session)

    def heard(self, now: float, session: Session) -> None:
        """A token reaches its client at `now`, which may be to come."""
        life = session.life
        gap_s = life.heard(now)
        if self._window_s[0] <= now < self._window_s[1]:
            self.heard_tokens += 1
            if gap_s is not None:
                self.gaps_s.append(gap_s)
        if life.done:
            self.agenda.at(now, self._finish, session)

    def replayed(self, now: float, session: Session) -> None:
        """The new stages of a mended route have caught up: the step that was under way goes
        round once more."""
        self.swarm.send_step(now, session)

    def _finish(self, now: float, session: Session) -> None:
        self.leave(now, session)
        self._over(now, session.life)
        self.try_waiting(now)

    def leave(self, now: float, session: Session) -> None:
        """The session gives back what it holds, everywhere."""
        self.swarm.sessions.pop(session.key, None)
        session.epoch += 1
        for visit in session.visits:
            if (stage := self.swarm.stages[visit.unit]) is not None:
                stage.close(session.key, now)
        self.policy.ended(now, session.request, session.visits)

    def _over(self, now: float, life: Life) -> None:
        assert life.ended_s != life.ended_s, "a request ends once"
        life.ended_s = now
        life.gave_up = not life.done
        self.ended += 1
