"""Where the time of a session's steps goes at one stage.

The law of a ring is L = sum of what each stage takes + one-way links. A stage can say its own part
exactly, since all of it passes between two readings of one clock: from the arrival of a step to the
moment when its result was handed to the network. That *residence* is split in three:

    wait      until the batch began (the engine tells it with each result)
    compute   the whole batch, because that is what a row of it waits for (told likewise)
    handle    the rest: frames to steps, the way to the device thread and back, frames again

Wait and compute of the prompt are kept apart, since it is computed once and in pieces. What belongs
to it needs no mark on the wire: it is everything of a turn up to and including the first row that
asks for a token.

Sums, no samples: a handful of additions for each step, one record for a session, and a percentile
is of little use where the client wants to know which hop the milliseconds went to. A new turn
begins new sums, so that a trace taken after a turn describes that turn; so does a new route, which
must not be blamed for what was slow in the last one. The last few steps are kept one by one, for a
client that asks in mid-turn who is slow *now*.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from hexswarm.messages import Trace, Traced
from hexswarm.peer.steps import Result

LATELY = 16
"""Decode steps over which the time of one is told to a client that asks for progress."""

UNMEASURED_S = -1.0
"""In place of a round trip that nobody has measured."""


@dataclass(slots=True)
class Account:
    """The sums of one session's turn."""

    steps: int = 0
    """Decode steps."""
    rows: int = 0
    wait_s: float = 0.0
    compute_s: float = 0.0
    handle_s: float = 0.0
    prompt_wait_s: float = 0.0
    prompt_compute_s: float = 0.0
    arrived_s: float = 0.0
    """When the last step came; of decode steps one at a time is under way."""
    _lately_s: deque[float] = field(default_factory=lambda: deque(maxlen=LATELY))
    _prompted: bool = False
    """The whole prompt has been computed."""

    def finished(self, result: Result, now: float) -> bool:
        """Count what has been computed; True if it was a decode step."""
        if not self._prompted:
            self._prompted = result.row.sample
            self.prompt_wait_s += result.wait_s
            self.prompt_compute_s += result.compute_s
            return False
        self._lately_s.append(now - self.arrived_s)
        self.steps += 1
        self.rows += result.batch_rows
        self.wait_s += result.wait_s
        self.compute_s += result.compute_s
        self.handle_s += max(0.0, now - self.arrived_s - result.wait_s - result.compute_s)
        return True

    def lately_s(self) -> float:
        """Mean of the last decode steps, from arrival to sending on; 0 if there were none."""
        spent_s = self._lately_s
        return max(0.0, sum(spent_s) / len(spent_s)) if spent_s else 0.0

    def told(self, asked: Trace, successor_rtt_s: float) -> Traced:
        """The sums as they are sent."""
        return Traced(
            session=asked.session,
            epoch=asked.epoch,
            steps=self.steps,
            wait_s=self.wait_s,
            compute_s=self.compute_s,
            handle_s=self.handle_s,
            prompt_wait_s=self.prompt_wait_s,
            prompt_compute_s=self.prompt_compute_s,
            rows=self.rows / self.steps if self.steps else 0.0,
            successor_rtt_s=successor_rtt_s,
            nonce=asked.nonce,
        )
