"""How often what computes is started again after it was lost, and how long to wait before: pure.

A pause that doubles, and an end: a card that falls off its bus again and again does not come back,
and a peer that joins for a few seconds each minute costs every client a repair. Who served calmly
for `CALM_S` starts afresh.
"""

from __future__ import annotations

TRIES = 5
"""Starts in a row that may fail, or be lost soon after."""
FIRST_S = 0.5
CALM_S = 120.0


class Restarts:
    """Counts failures; told of what `started` and what `failed`."""

    def __init__(self, tries: int = TRIES, first_s: float = FIRST_S, calm_s: float = CALM_S):
        self._tries, self._first_s, self._calm_s = tries, first_s, calm_s
        self._started_s: float | None = None
        self.failures = 0
        """In a row."""

    def started(self, now: float) -> None:
        self._started_s = now

    def failed(self, now: float) -> float | None:
        """Seconds after which to try again; None: it is enough."""
        if self._started_s is not None and now - self._started_s >= self._calm_s:
            self.failures = 0
        self._started_s = None
        self.failures += 1
        if self.failures > self._tries:
            return None
        return self._first_s * 2.0 ** (self.failures - 1)
