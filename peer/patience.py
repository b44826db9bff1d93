"""How long the members of a group wait for each other: pure.

Five times the 99th percentile of what collectives took lately, and never less than a floor: a sum
of a few bytes takes a millisecond, but a member may be a whole layer of a prompt behind.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

_KEPT = 256
_RECOUNT = 32


@dataclass(frozen=True, slots=True)
class Limits:
    """How long a collective may take."""

    floor_s: float = 1.0
    most_s: float = 10.0
    grace_s: float = 0.25


LIMITS = Limits()


class Pace:
    """Durations of the last operations, and the time after which one of them is too long."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._took_s: deque[float] = deque(maxlen=_KEPT)
        self._count = 0
        self.patience_s = limits.floor_s

    def add(self, seconds: float) -> None:
        self._took_s.append(seconds)
        self._count += 1
        if self._count % _RECOUNT == 0:  # a sort: not for each of some hundred sums a token
            ordered = sorted(self._took_s)
            p99_s = ordered[(99 * len(ordered) - 1) // 100]
            longest_s = self._limits.most_s - self._limits.grace_s
            self.patience_s = min(max(self._limits.floor_s, 5 * p99_s), longest_s)
