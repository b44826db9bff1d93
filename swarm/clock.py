"""Time as an argument: the clock protocol, the machine's clock and a virtual one.

Cores never read a clock; they take `now`. Runtimes read one `Clock`, which in production is the
machine's (`RealClock`) and in simulations a `VirtualClock` that moves only when told.
Two scales are kept apart: `monotonic()` for durations and deadlines, and `wall()` (Unix time) for
what other machines read, i.e. issue and expiry of records.
"""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    def monotonic(self) -> float:
        """Seconds since an arbitrary moment; never goes back."""

    def wall(self) -> float:
        """Unix time in seconds."""


class RealClock:
    """The machine's clocks."""

    def monotonic(self) -> float:
        return time.monotonic()

    def wall(self) -> float:
        return time.time()


class VirtualClock:
    """A clock that stands still until `advance` is called."""

    def __init__(self, start_s: float = 0.0, epoch_s: float = 1.7e9) -> None:
        self._now_s = start_s
        self._epoch_s = epoch_s

    def monotonic(self) -> float:
        return self._now_s

    def wall(self) -> float:
        return self._epoch_s + self._now_s

    def advance(self, seconds: float) -> None:
        if seconds < 0:
            raise ValueError("time does not go back")
        self._now_s += seconds
