"""Phase alignment: when the head of a ring holds a batch so that sessions come to travel together.

Theory. A decode step reads all weights of a stage once, however many rows it has: on a CPU a batch
of 4 costs about 1.4 of a batch of 1. Sessions that arrive together share the read at this stage,
leave together, and so arrive together at the next one and, a ring later, here again: merging is
for good, while sessions half a ring apart stay apart for good. Queueing merges sessions by itself
only where they wait anyway. On shared machines they wait for the processor *inside* their steps
instead, and n sessions read the weights n times although the machine is full.

So the first stage of a ring, and only it (two stages that hold would chase each other), may keep a
ready decode batch back until others come round. When that pays is a matter of utilisation: a device
that is busy most of the time serves several groups per cycle and gains from merging them; one that
waits for links has little to gain, and a merged row makes everybody's step longer, hence on a WAN
ring with few sessions nobody is ever held. The rule stops by itself as groups merge.

*Whom to wait for.* Each session's absence (departure from here to next arrival) is averaged. A
group (sessions that left in one batch) is awaited if its predicted return falls within what the
ready ones can afford, at most half a cycle: of any two groups one is at most half a cycle behind
the other, so one direction always suffices, and waiting longer would be the wrong one. A session
that is overdue has ended or stalled and is not awaited until it shows up again.

*How many.* Rows are nearly free until their own cost rivals the read, so gathering stops at `rows`,
5 on a CPU (1.5 times the step of one): in simulation (tests/peer/ring.py; 3 stages, 2 cores, 8
sessions) that gave 5.0 times one session's tokens/s at 0.35 of its CPU per token, no gathering 4.2
at 0.47, and gathering all 4.1 at 0.25, since then one stage works at a time. Where sessions are
away for less than a quarter of their cycle (a peer that serves the whole model alone) no other
stage idles meanwhile, two groups would only take turns, and there is no such limit.

*What it may cost.* Each session has an allowance of time that it may be held: half a cycle at
first, spent by holding, regrown by `SHARE` of the time that passes, never above half a cycle.
Hence over any stretch T a session is held for at most cycle/2 + T x SHARE, whatever arrives or
fails to; a hold of half a cycle is followed by 16 cycles without. An allowance (instead of a
count of steps since the last hold) lets a group that was split by a few milliseconds of jitter
be mended at once for those few milliseconds.

What it does not know is whether stages share their processors. Where each has its own, 4 sessions
on 3 stages lose 18 % of their tokens/s by travelling together (2.8 instead of 3.4), and still spend
less than half of the CPU time; we take that for volunteers' machines.

Rejected: holding at every stage (sums up, and stages fight); fixed linger times (too short for a
ring of 100 ms, too long for one of 2); a number of rows derived from the fit of step times
(contention looks like a cost of rows, so the busiest machines stopped gathering); a global clock of
phases (needs agreement between peers).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hexswarm.peer.steps import SessionKey

BUSY = 0.45
"""Hold only if the device was busy for more than this fraction of the last few cycles.

Two groups on three stages keep each busy for 2/3 of the time, less what links take; a device is
asked when it was just idle, so the average it sees then is a little low.
"""

SHARE = 1 / 32
"""Fraction of a session's time that may be spent held, in the long run."""

_ALPHA = 0.3
"""Weight of the newest absence and cycle in their averages."""

_SLACK = 1 / 16
"""How much later than predicted, in cycles, a session may come and still be waited for."""

_MEMORY_CYCLES = 4.0
"""Time constant of the busy fraction, in cycles."""


@dataclass(slots=True)
class _Orbit:
    """What is known of one session's way round."""

    arrived_s: float = math.nan
    departed_s: float = math.nan
    away_s: float = math.nan
    cycle_s: float = math.nan
    allowance_s: float = 0.0
    here: bool = False

    @property
    def known(self) -> bool:
        return self.cycle_s == self.cycle_s

    def expected_s(self) -> float:
        """When it should be back."""
        return self.departed_s + self.away_s

    def latest_s(self) -> float:
        """Until when it may still be waited for."""
        return self.expected_s() + _SLACK * self.cycle_s


@dataclass(frozen=True, slots=True)
class _Hold:
    since_s: float
    until_s: float
    awaited: frozenset[SessionKey]


class Gather:
    """Remembers the decoding sessions of one head and says whether to hold a ready batch."""

    def __init__(
        self, *, rows: int = 5, most_rows: int = 64, busy: float = BUSY, share: float = SHARE
    ) -> None:
        self._rows = rows
        self._most_rows = most_rows
        self._orbits: dict[SessionKey, _Orbit] = {}
        self._hold: _Hold | None = None
        self._threshold = busy
        self._share = share
        self._busy = 0.0
        self._busy_at_s = -math.inf
        self._cycle_s = math.nan
        self.holds = 0
        self.held_s = 0.0
        """Session-seconds held so far."""

    @property
    def sessions(self) -> int:
        """Sessions remembered."""
        return len(self._orbits)

    def arrived(self, session: SessionKey, now: float) -> None:
        """A decode step of the session arrived."""
        orbit = self._orbits.setdefault(session, _Orbit())
        if orbit.here:
            return
        if orbit.departed_s == orbit.departed_s:
            orbit.away_s = _blend(orbit.away_s, now - orbit.departed_s)
        if orbit.arrived_s == orbit.arrived_s:
            passed_s, first = now - orbit.arrived_s, not orbit.known
            orbit.cycle_s = _blend(orbit.cycle_s, passed_s)
            self._cycle_s = _blend(self._cycle_s, passed_s)
            grown_s = orbit.cycle_s / 2 if first else orbit.allowance_s + self._share * passed_s
            orbit.allowance_s = min(grown_s, orbit.cycle_s / 2)
        orbit.arrived_s, orbit.here = now, True

    def departed(self, session: SessionKey, now: float) -> None:
        """The session's token left this stage, so its next one will come round."""
        orbit = self._orbits.setdefault(session, _Orbit())
        orbit.departed_s, orbit.here = now, False

    def forget(self, session: SessionKey) -> None:
        self._orbits.pop(session, None)

    def worked(self, now: float, elapsed_s: float) -> None:
        """The device was busy for `elapsed_s` until `now`."""
        before = self.busy(now - elapsed_s)
        self._busy = 1 - (1 - before) * self._fading(elapsed_s)
        self._busy_at_s = now

    def busy(self, now: float) -> float:
        """Fraction of the last few cycles for which the device was busy."""
        return self._busy * self._fading(now - self._busy_at_s)

    def until(self, ready: Sequence[SessionKey], now: float) -> float | None:
        """Hold the ready sessions until then, or (None) run them now.

        Ask whenever the device is free and only decode steps are ready. None ends a hold, and the
        caller must then run the batch: the time was charged.
        """
        hold = self._hold or self._consider(ready, now)
        if hold is None:
            return None
        affordable_s = min(self._entry_s(key, hold) + self._affords(key) for key in ready)
        until_s = min(hold.until_s, affordable_s)
        missing = (hold.awaited & self._orbits.keys()) - set(ready)
        if now < until_s and missing:
            if self._hold is None:
                self._hold, self.holds = hold, self.holds + 1
            return until_s
        self.charge(ready, now)
        return None

    def charge(self, ready: Sequence[SessionKey], now: float) -> None:
        """End a hold, if there is one: those who were held pay for it."""
        hold, self._hold = self._hold, None
        if hold is None:
            return
        for session in ready:
            orbit = self._orbits[session]
            held_s = max(0.0, now - self._entry_s(session, hold))
            orbit.allowance_s -= held_s
            self.held_s += held_s

    def _consider(self, ready: Sequence[SessionKey], now: float) -> _Hold | None:
        if len(ready) >= len(self._orbits) or self.busy(now) <= self._threshold:
            return None
        limit_s = now + min(self._affords(key) for key in ready)
        awaited: list[SessionKey] = []
        until_s = now
        for expected_s, latest_s, group in self._coming(now):
            rows = len(ready) + len(awaited) + len(group)
            if expected_s > limit_s or rows > self._limit(group[0]):
                break
            awaited += group
            until_s = max(until_s, latest_s)
        return _Hold(now, until_s, frozenset(awaited)) if awaited else None

    def _coming(self, now: float) -> list[tuple[float, float, list[SessionKey]]]:
        """The groups under way, by arrival: expected and latest moment, sessions.

        Sessions that left in one batch are a group.
        """
        groups: dict[float, list[SessionKey]] = {}
        for key, orbit in self._orbits.items():
            if not orbit.here and orbit.known and orbit.latest_s() > now:
                groups.setdefault(orbit.departed_s, []).append(key)
        coming = []
        for keys in groups.values():
            expected_s = max(self._orbits[key].expected_s() for key in keys)
            latest_s = max(self._orbits[key].latest_s() for key in keys)
            coming.append((expected_s, latest_s, keys))
        return sorted(coming)

    def _limit(self, session: SessionKey) -> int:
        """Rows worth gathering with this session: all, where it is mostly here anyway."""
        orbit = self._orbits[session]
        return self._rows if orbit.away_s > orbit.cycle_s / 4 else self._most_rows

    def _entry_s(self, session: SessionKey, hold: _Hold) -> float:
        """Since when the hold has cost this session time."""
        return max(hold.since_s, self._orbits[session].arrived_s)

    def _affords(self, session: SessionKey) -> float:
        return self._orbits[session].allowance_s

    def _fading(self, passed_s: float) -> float:
        """What remains of the busy fraction after some idle time (all while no cycle is known)."""
        if not self._cycle_s > 0:
            return 1.0
        return math.exp(-max(0.0, passed_s) / (_MEMORY_CYCLES * self._cycle_s))


def _blend(average: float, sample: float) -> float:
    return sample if average != average else average + _ALPHA * (sample - average)
