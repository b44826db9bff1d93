"""When to announce, and what: pure functions of state and time.

A record is announced every `ANNOUNCE_S` with jitter (so that a thousand peers started by one script
do not store at one moment), at once when the state or the span changes, and early when the load has
moved by more than the hysteresis: free KV by 10 % of the pool or to all of it (else a request for
the whole pool would be refused for half a minute), or queue delay by 0.1 s. A record that is
announced too often costs every DHT node on its way.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from hexswarm.directory import ANNOUNCE_S, EXPIRE_S
from hexswarm.records import Announcement

LOAD_EVERY_S = 5.0
"""Load alone moves a record at most this often."""
KV_STEP = 0.1
QUEUE_STEP_S = 0.1


@dataclass(frozen=True, slots=True)
class Announced:
    """The last record told, and when to tell the next one at the latest."""

    announcement: Announcement
    told_s: float
    next_s: float


class Announcer:
    """Decides when the directory must hear of us; `told` and `due` are its only doors."""

    def __init__(self, kv_tokens: int, rng: random.Random) -> None:
        self._kv_tokens = kv_tokens
        self._rng = rng
        self._last: Announced | None = None

    def due(self, current: Announcement, now: float) -> bool:
        """True if `current` should be announced at `now`."""
        last = self._last
        if last is None or now >= last.next_s:
            return True
        said = last.announcement
        if (current.state, current.span, current.addresses) != (
            said.state,
            said.span,
            said.addresses,
        ):
            return True
        idle = current.free_kv_tokens >= self._kv_tokens > said.free_kv_tokens
        moved = (
            idle
            or abs(current.free_kv_tokens - said.free_kv_tokens) > KV_STEP * self._kv_tokens
            or abs(current.queue_s - said.queue_s) > QUEUE_STEP_S
        )
        return moved and now - last.told_s >= LOAD_EVERY_S

    def stamp(self, current: Announcement, now: float, wall: float) -> tuple[Announcement, float]:
        """The record to sign, with sequence and issue time, and its expiry (Unix seconds)."""
        sequence = int(wall * 1000)
        if self._last is not None:
            sequence = max(sequence, self._last.announcement.sequence + 1)
        stamped = replace(current, issued_s=wall, sequence=sequence)
        jitter = self._rng.uniform(0.8, 1.0)
        self._last = Announced(stamped, now, now + ANNOUNCE_S * jitter)
        return stamped, wall + EXPIRE_S
