"""Time that all of a swarm agree on, though a machine's clock may be wrong, or be set while we run.

Records live by Unix time, so a node whose clock is off sees nobody (all has run out), or is seen by
nobody (its words come from the past, or from too far in the future). hivemind's DHT compares clocks
when a node joins, with an error of 3 s, and never again.

A process therefore goes by a `SteadyClock`: the machine's Unix time as it was at the start, carried
on by the monotonic clock. Whoever sets the machine's clock later does not disturb it: records keep
their lives, announcements stay in order, sessions never notice. Nodes tell their time for the
asking (`Sample`), which is precise to half a round trip; the median of a few is compared with ours:

- when joining: more than `LIMIT_S` off is `ClockSkew`, with the offset and the remedy;
- once a minute, and at once when the machine's clock moved against ours. If the swarm then agrees
  with the machine (it slept, which a monotonic clock does not count, or a wrong clock was mended),
  ours is set anew; else ours stays, and the offset of the machine's clock is what a warning names.

A majority of liars among the nodes asked can make us complain, or make us believe our own machine;
they cannot give us any other time. Rejected: the issue times of records, which are old by an
unknown part of 30 s; following the swarm's median, which would hand our clock to whoever has most
identities; and refusing to go on, since a running peer does no harm with a clock that is steady.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from hexswarm.clock import Clock
from hexswarm.errors import ClockSkew

LIMIT_S = 3.0
"""As in hivemind; records tolerate 5 s."""
CHECK_EVERY_S = 60.0
ASKED = 5
"""Nodes asked for their time at once."""

REMEDY = "set this machine's clock (e.g. with NTP) and start again"


@dataclass(frozen=True, slots=True)
class Sample:
    """One node's time against ours."""

    ahead_s: float
    """Ours minus theirs, as if their answer had taken as long as our question."""
    error_s: float
    """Half the round trip: they may be off by so much more or less."""


def offset(samples: Sequence[Sample]) -> float:
    """Seconds by which we are ahead for certain, negative if behind; 0 if within the error."""
    if not samples:
        return 0.0
    lowest = statistics.median(sample.ahead_s - sample.error_s for sample in samples)
    highest = statistics.median(sample.ahead_s + sample.error_s for sample in samples)
    return max(lowest, 0.0) + min(highest, 0.0)


def skew(ahead_s: float, nodes: int) -> ClockSkew:
    """The error that names an offset; `nodes` 0: the clock moved, and nobody else was asked."""
    way = "ahead of" if ahead_s > 0 else "behind"
    whom = f"the swarm's (as {nodes} node{'s' * (nodes != 1)} told)" if nodes else "its own past"
    return ClockSkew(f"this machine's clock is {abs(ahead_s):,.1f} s {way} {whom}", remedy=REMEDY)


class SteadyClock:
    """A `Clock` that nobody can set: see the module."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._base_s = clock.wall() - clock.monotonic()
        self._ahead_s = 0.0
        self._nodes = 0
        self._checked_s = clock.monotonic()
        self._judged_at_s = 0.0
        """How far the machine's clock had moved when the swarm was last asked."""

    def monotonic(self) -> float:
        return self._clock.monotonic()

    def wall(self) -> float:
        return self._base_s + self._clock.monotonic()

    @property
    def moved_s(self) -> float:
        """By how much the machine's clock is ahead of this one."""
        return self._clock.wall() - self.wall()

    @property
    def due(self) -> bool:
        """Whether others should be asked for their time now."""
        if self._clock.monotonic() - self._checked_s >= CHECK_EVERY_S:
            return True
        return abs(self.moved_s - self._judged_at_s) > LIMIT_S

    def judge(self, samples: Sequence[Sample]) -> None:
        """Hear what others say (about this clock); set it to the machine's if that is right."""
        self._checked_s, self._judged_at_s = self._clock.monotonic(), self.moved_s
        if not samples:
            return
        self._ahead_s, self._nodes = offset(samples), len(samples)
        if abs(self._ahead_s) > LIMIT_S >= abs(self._ahead_s + self.moved_s):
            self._base_s += self.moved_s
            self._ahead_s = self._judged_at_s = 0.0

    def trouble(self) -> ClockSkew | None:
        """What is wrong with the machine's clock, as far as is known."""
        ahead_s = self._ahead_s + self.moved_s
        return skew(ahead_s, self._nodes) if abs(ahead_s) > LIMIT_S else None
