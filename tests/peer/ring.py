"""A ring of stages on one clock, as a test double: real schedulers, integer work, no threads.

`Ring` is a discrete-event simulation. Every stage has one device and a real `Scheduler`; a batch of
b rows and p prompt tokens is `step_s x (1 + row_share x (b + p - 1))` seconds of work for one core
(the default share is SmolLM2's on a CPU). All stages share `cores` cores fairly: with more busy
stages than cores each runs at cores/busy of full speed (processor sharing), which is what loopback
peers on one machine see. `cores=None` gives every stage its own machine.

A batch's outputs leave together and reach the next stage `link_s` later, in one delivery, or (with
`spread_s`) one by one with the sibling counts that a server would write. The tail's sampled rows go
to the head as decode steps. Sessions join at a chosen moment, with or without a prompt, and leave
after a number of tokens; `vanish` drops one without a word, as a dead client does.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from hexswarm.peer.scheduler import Policy, Scheduler, Wait
from hexswarm.peer.steps import Batch, Row, SessionKey, Step


@dataclass
class Life:
    """One session as the simulation sees it."""

    tokens: int
    joined_s: float
    token_s: list[float] = field(default_factory=list)
    """When each token left the tail."""
    gone: bool = False

    def per_token_s(self, skip: int = 0) -> float:
        times = self.token_s[skip:]
        return (times[-1] - times[0]) / (len(times) - 1)


@dataclass
class _Stage:
    scheduler: Scheduler
    batch: Batch | None = None
    started_s: float = 0.0
    left_s: float = 0.0
    """Core seconds that the running batch still needs."""
    wake: int = 0


@dataclass(frozen=True)
class Visit:
    """A batch that some stage computed."""

    stage: int
    started_s: float
    ended_s: float
    rows: int
    tokens: int


class Ring:
    """See the module; `run` moves time, everything else looks or adds."""

    def __init__(
        self,
        stages: int = 3,
        cores: float | None = 2,
        *,
        step_s: float = 0.01,
        row_share: float = 0.13,
        link_s: float = 0.0003,
        spread_s: float = 0.0,
        gather_rows: int = 5,
        seed: int = 0,
        noise: float = 0.0,
    ) -> None:
        self.now = 0.0
        self.cores = cores or float(stages)
        self.step_s, self.row_share = step_s, row_share
        self.link_s, self.spread_s, self.noise = link_s, spread_s, noise
        self.rng = random.Random(seed)
        self.stages = [
            _Stage(Scheduler(Policy(head=i == 0, gather_rows=gather_rows))) for i in range(stages)
        ]
        self.lives: dict[SessionKey, Life] = {}
        self.visits: list[Visit] = []
        self.core_s = 0.0
        self.waits: list[tuple[SessionKey, float, float]] = []
        """(session, moment, seconds) that each decode step waited at the head."""
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._ids = itertools.count()

    @property
    def head(self) -> Scheduler:
        return self.stages[0].scheduler

    def join(self, tokens: int, at_s: float = 0.0, prompt: int = 0) -> SessionKey:
        """A session that arrives at `at_s`, and leaves after `tokens` tokens."""
        session = next(self._ids).to_bytes(16, "big")
        self.lives[session] = Life(tokens, at_s)
        first = 0 if prompt else 1
        step = Step(session, first, prompt or 1, None, last=True, arrived_s=at_s)
        self.at(at_s, lambda: self._arrive(0, [step]))
        return session

    def vanish(self, session: SessionKey) -> None:
        """The session ends everywhere, whatever is under way for it."""
        self.lives[session].gone = True
        for stage in self.stages:
            stage.scheduler.drop(session)

    def at(self, moment_s: float, call: Callable[[], None]) -> None:
        heapq.heappush(self._events, (moment_s, next(self._ids), call))

    def run(self, until_s: float) -> None:
        """Move time to `until_s`, or to the moment when nothing is left to do."""
        while self.now < until_s:
            busy = [stage for stage in self.stages if stage.batch]
            rate = min(1.0, self.cores / len(busy)) if busy else 1.0
            ends = [self.now + stage.left_s / rate for stage in busy]
            moments = [*ends, *([self._events[0][0]] if self._events else [])]
            if not moments:
                return
            moment = min(*moments, until_s)
            for stage in busy:
                stage.left_s -= (moment - self.now) * rate
            self.core_s += (moment - self.now) * rate * len(busy)
            self.now = moment
            for stage in busy:
                if stage.left_s < 1e-12:
                    self._finish(self.stages.index(stage))
            while self._events and self._events[0][0] <= self.now:
                heapq.heappop(self._events)[2]()

    def tokens(self, since_s: float = 0.0) -> int:
        """Tokens that left the tail since then."""
        return sum(t > since_s for life in self.lives.values() for t in life.token_s)

    def mean_rows(self, since_s: float) -> float:
        """Mean rows of the batches at the head."""
        rows = [v.rows for v in self.visits if v.stage == 0 and v.started_s >= since_s]
        return sum(rows) / len(rows)

    def _arrive(self, index: int, steps: list[Step]) -> None:
        for step in steps:
            if not self.lives[step.session].gone:
                self.stages[index].scheduler.submit(step, self.now)
        self._poke(index)

    def _poke(self, index: int) -> None:
        """Let an idle stage look for work."""
        stage = self.stages[index]
        if stage.batch:
            return
        picked = stage.scheduler.pick(self.now)
        stage.wake += 1
        if isinstance(picked, Wait):
            wake = stage.wake
            assert picked.until > self.now, "a wait lies in the future"
            self.at(picked.until, lambda: self._poke(index) if stage.wake == wake else None)
        elif picked is not None:
            stage.batch, stage.started_s = picked, self.now
            cost = self.step_s * (1 + self.row_share * (picked.tokens - 1))
            stage.left_s = cost * (1 + self.noise * self.rng.random())
            if index == 0:
                self._note_waits(picked)

    def _note_waits(self, batch: Batch) -> None:
        for row in batch.rows:
            since_s = row.payload
            if since_s is not None:
                self.waits.append((row.session, self.now, self.now - since_s))

    def _finish(self, index: int) -> None:
        stage = self.stages[index]
        batch = stage.batch
        assert batch is not None
        stage.batch = None
        elapsed_s = self.now - stage.started_s
        self.visits.append(Visit(index, stage.started_s, self.now, len(batch.rows), batch.tokens))
        stage.scheduler.finished(batch, self.now, elapsed_s)
        rows = [row for row in batch.rows if not self.lives[row.session].gone]
        if index == len(self.stages) - 1:
            rows = [row for row in rows if row.sample and self._token(row.session)]
        self._send((index + 1) % len(self.stages), rows)
        self._poke(index)

    def _token(self, session: SessionKey) -> bool:
        """A token leaves the tail; False if it was the session's last."""
        life = self.lives[session]
        life.token_s.append(self.now)
        if len(life.token_s) < life.tokens:
            return True
        self.vanish(session)
        return False

    def _send(self, index: int, rows: list[Row]) -> None:
        if not rows:
            return
        arrival_s = self.now + self.link_s
        if not self.spread_s:
            steps = [self._step(index, row, arrival_s, 0) for row in rows]
            self.at(arrival_s, lambda: self._arrive(index, steps))
            return
        for i, row in enumerate(rows):
            late_s = arrival_s + i * self.spread_s
            step = self._step(index, row, late_s, len(rows) - 1 - i)
            self.at(late_s, lambda step=step: self._arrive(index, [step]))  # type: ignore[misc]

    def _step(self, index: int, row: Row, arrived_s: float, siblings: int) -> Step:
        if index:
            return Step(
                row.session, row.position, row.count, None, row.sample, arrived_s, 0, siblings
            )
        position = row.position + row.count
        return Step(row.session, position, 1, arrived_s, True, arrived_s, 0, siblings)
