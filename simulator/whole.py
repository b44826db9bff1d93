"""Batches of whole prompts: how vLLM composed them when Helix was built on it.

All decode rows that wait, and beside them prompts in order of arrival, each in one piece. How many
prompts a machine takes at once its profile tells (`Profile.most_prompts`). A prompt makes every
decode row of its batch wait until it is through, and they leave in the order in which they came:
those behind the prompt meet it again at the next stage (convoys). It has the events of
`hexswarm.peer.scheduler.Scheduler`, which cuts prompts instead, so that a stage runs either.
"""

from __future__ import annotations

from collections import deque
from itertools import count, islice
from operator import itemgetter

from hexswarm.peer.steps import Batch, Row, SessionKey, Step
from hexswarm.peer.steptime import StepTime

MOST_PROMPTS = 3
"""In one batch, where the profile tells nothing."""

_Waiting = tuple[int, Row]
"""By order of arrival."""

_first = itemgetter(0)


class WholePrompts:
    """The steps that wait at one stage."""

    def __init__(self, times: StepTime, *, most_prompts: int = 0, most_rows: int = 0) -> None:
        """`most_rows` of decoding in one batch; 0: any number."""
        self.times = times
        self._most_prompts = most_prompts or MOST_PROMPTS
        self._most_rows = most_rows or None
        self._order = count()
        self._decodes: deque[_Waiting] = deque()
        self._prompts: deque[_Waiting] = deque()

    def __len__(self) -> int:
        return len(self._decodes) + len(self._prompts)

    def submit(self, step: Step, now: float) -> None:
        """A step arrived."""
        row = Row(
            session=step.session,
            position=step.position,
            count=step.count,
            payload=None,
            sample=step.last,
            blocks=(),
            span=step.span,
            ready_s=now,
            epoch=step.epoch,
        )
        (self._decodes if step.decode else self._prompts).append((next(self._order), row))

    def pick(self, now: float) -> Batch | None:
        """The next batch; None if nothing waits."""
        found = _taken(self._decodes, self._most_rows) + _taken(self._prompts, self._most_prompts)
        return Batch(tuple(row for _, row in sorted(found, key=_first))) if found else None

    def finished(self, batch: Batch, now: float, elapsed_s: float | None) -> None:
        """Learn what batches take, for the load that is told."""
        if elapsed_s is not None:
            decodes = sum(row.decode for row in batch.rows)
            self.times.observe(decodes, batch.tokens - decodes, elapsed_s)

    def drop(self, session: SessionKey) -> int | None:
        """What the session has waiting vanishes; its first position, if any waited."""
        mine = [row for _, row in (*self._decodes, *self._prompts) if row.session == session]
        self._decodes = deque(one for one in self._decodes if one[1].session != session)
        self._prompts = deque(one for one in self._prompts if one[1].session != session)
        return min((row.position for row in mine), default=None)

    def prompts_s(self) -> float:
        """Expected seconds of the prompts that wait."""
        return self.times.predict(0, sum(row.count for _, row in self._prompts))


def _taken(waiting: deque[_Waiting], most: int | None) -> list[_Waiting]:
    """The first ones, which are then gone."""
    found = list(islice(waiting, most))
    for _ in found:
        waiting.popleft()
    return found
