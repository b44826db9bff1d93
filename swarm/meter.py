"""What was measured of the way to one neighbour, and what to believe of it.

Round trips. A single one says little: it holds whatever the two event loops and the line did at
that moment, and a ping meets an idle loop that has to be woken where a decode step meets a busy
one. The lower *quartile* of the last `SAMPLES` is told, for late pongs, half of all if need be,
then change nothing (a median was wrong by 5 ms on machines that were starting); of few samples the
least counts as much, for a way is never shorter than its shortest trip. Jitter is how much longer
than that the 95th percentile is, halved: it is told for one way. Rejected: the smoothed mean of
RFC 6298, which a single late pong of a busy process moves for minutes; the least sample alone,
which knows no line whose delay really changed.

Bandwidth. The receiver of a frame sees it come in and divides what came after the first read by the
time since then; a sender only sees its socket buffer take the bytes. The figure is what a burst of
that size gets, slow start included, which is what a piece of a prompt gets too. It errs upwards
when the receiver's loop was held up and finds the bytes waiting: so no burst counts as shorter than
`LEAST_S` (a gigabit is the most that is told, which for our pieces is as good as any), the median
of several arrivals is told, and a sender believes the receiver's word only up to `BELIEF` times
what it saw itself (the time to the answer less a round trip; that errs downwards, and no claim
moves it).

Samples older than `FADE_S` before the newest no longer count. A memory of 10 minutes for ways whose
link has ended is the owner's (`hexswarm.measuring`).
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence

from hexswarm.records import Link

SAMPLES = 16
FADE_S = 300.0
BANDWIDTH_FADE_S = 1200.0
"""Two rounds of probes."""
FEW = 5
"""With fewer samples the least one counts as much as the quartile."""
LEAST_BYTES = 64 << 10
"""Smaller frames say more of the loop than of the line."""
LEAST_S = 0.001
BELIEF = 4.0


class Meter:
    """Samples of one way; time never goes back."""

    def __init__(self) -> None:
        self._rtts: deque[tuple[float, float]] = deque(maxlen=SAMPLES)
        self._arrived: deque[tuple[float, float]] = deque(maxlen=SAMPLES // 2)
        self._sent: deque[tuple[float, float]] = deque(maxlen=SAMPLES // 2)
        self.heard_s = -math.inf
        """When the last round trip was measured."""
        self.told_s = -math.inf
        """When the neighbour last told how fast our bytes come in."""
        self._way: Link | None = None
        """What follows from the samples; None if one has come since. Asked for far oftener."""

    def rtt(self, sample_s: float, now: float) -> None:
        """A round trip took `sample_s`."""
        self._rtts.append((now, max(sample_s, 0.0)))
        self.heard_s, self._way = now, None

    def arrived(self, size: int, seconds: float, now: float) -> float:
        """`size` bytes came in within `seconds`: their bytes per second, 0 if it cannot be told."""
        if size <= 0:
            return 0.0
        bytes_per_s = size / max(seconds, LEAST_S)
        self._arrived.append((now, bytes_per_s))
        return bytes_per_s

    def sent(self, bytes_per_s: float, now: float) -> None:
        """The neighbour has told how fast our bytes came in, 0 if it could not tell."""
        self.told_s = now
        if bytes_per_s > 0 and math.isfinite(bytes_per_s):
            self._sent.append((now, bytes_per_s))
            self._way = None

    def way(self) -> Link | None:
        """The way to the neighbour, None if no round trip was measured."""
        if self._way is None:
            self._way = self._measured()
        return self._way

    def _measured(self) -> Link | None:
        rtts = sorted(_recent(self._rtts, self.heard_s - FADE_S))
        if not rtts:
            return None
        rtt_s = _quantile(rtts, 0.25)
        if len(rtts) < FEW:
            rtt_s = (rtt_s + rtts[0]) / 2
        jitter_s = max(0.0, (_quantile(rtts, 0.95) - rtt_s) / 2)
        sent = _recent(self._sent, self.heard_s - BANDWIDTH_FADE_S)
        return Link(rtt_s, max(sent, default=math.inf), jitter_s)

    def up_bytes_per_s(self, now: float) -> float | None:
        """Fastest that our bytes came in there; None if nobody told lately."""
        return max(_recent(self._sent, now - BANDWIDTH_FADE_S), default=None)

    def down_bytes_per_s(self, now: float) -> float | None:
        """How fast its bytes come in here; None if none came lately."""
        found = _recent(self._arrived, now - BANDWIDTH_FADE_S)
        return statistics.median(found) if found else None


def believed(told_bytes_per_s: float, size: int, elapsed_s: float, rtt_s: float) -> float:
    """A receiver's word on our burst of `size`, answered after `elapsed_s`, as far as we saw it."""
    own = size / max(elapsed_s - rtt_s, LEAST_S)
    return min(told_bytes_per_s, BELIEF * own)


class Inflow:
    """Times the frames of one incoming lane by its reads."""

    def __init__(self) -> None:
        self._since_s: float | None = None
        self._first = 0
        """Bytes of the first read."""
        self._rest = 0

    def read(self, size: int, largest: int | None, now: float) -> tuple[int, float] | None:
        """A read gave `size` bytes, which ended frames, the `largest` of that payload (None: none).

        Bytes and seconds after the first read of a long frame, None before its end.
        """
        if self._since_s is None:
            self._since_s, self._first, self._rest = now, size, 0
        else:
            self._rest += size
        if largest is None:
            return None
        elapsed_s, self._since_s = now - self._since_s, None
        if largest < LEAST_BYTES:
            return None
        if elapsed_s < LEAST_S:
            return self._first + self._rest, LEAST_S
        return self._rest, elapsed_s


def _recent(samples: Sequence[tuple[float, float]], since_s: float) -> list[float]:
    return [value for at_s, value in samples if at_s >= since_s]


def _quantile(ordered: Sequence[float], share: float) -> float:
    """Between the two samples next to the place, in proportion."""
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])
