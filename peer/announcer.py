"""When to announce, and what: pure functions of state and time.

A record is announced every `ANNOUNCE_S` with jitter (so that a thousand peers started by one script
do not store at one moment), at once when the state, the span or the group changes, and early when
the load has moved by more than the hysteresis: free KV by 10 % of the pool or to all of it (else a
request for the whole pool would be refused for half a minute), queue delay by 0.1 s, the busy share
by 0.15, rows by a quarter, speed by a tenth; bandwidth when it is first known or off by half. The
place in the network is told at once when it and the first neighbours are known, for until then
nobody can route well through us; later when it has moved by a fifth of a usual way, or a neighbour
came or is half as far again. A record that is announced too often costs every DHT node on its way.
"""

from __future__ import annotations

import math
import random
import statistics
from dataclasses import dataclass, replace

from hexswarm.directory import ANNOUNCE_S, EXPIRE_S
from hexswarm.records import Announcement, Coordinates, PeerId

LOAD_EVERY_S = 5.0
"""Load alone moves a record at most this often."""
KV_STEP = 0.1
QUEUE_STEP_S = 0.1
BUSY_STEP = 0.15
ROWS_STEP = 0.5
ROWS_SHARE = 0.25
SPEED_STEP = 0.1
BANDWIDTH_STEP = 0.5
PLACE_STEP = 0.2
"""Of the median round trip to our neighbours."""
PLACE_STEP_S = 0.001
"""And at least this: on one LAN nobody is far from anybody."""
ERROR_STEP = 0.2
WAY_STEP = 0.5


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
        if _route_facts(current) != _route_facts(said):
            return True
        return self._moved(current, said) and now - last.told_s >= LOAD_EVERY_S

    def _moved(self, current: Announcement, said: Announcement) -> bool:
        """Whether what may change all the time has changed enough."""
        free, before = current.free_kv_tokens, said.free_kv_tokens
        return (
            free >= self._kv_tokens > before
            or abs(free - before) > KV_STEP * self._kv_tokens
            or abs(current.queue_s - said.queue_s) > QUEUE_STEP_S
            or abs(current.busy - said.busy) > BUSY_STEP
            or abs(current.rows - said.rows) > max(ROWS_STEP, ROWS_SHARE * said.rows)
            or _off(current.speed.decode_layer_s, said.speed.decode_layer_s, SPEED_STEP)
            or _off(current.up_bytes_per_s, said.up_bytes_per_s, BANDWIDTH_STEP)
            or _off(current.down_bytes_per_s, said.down_bytes_per_s, BANDWIDTH_STEP)
            or _displaced(current, said)
            or _ways_moved(dict(current.neighbours), dict(said.neighbours))
        )

    def stamp(self, current: Announcement, now: float, wall: float) -> tuple[Announcement, float]:
        """The record to sign, with sequence and issue time, and its expiry (Unix seconds)."""
        sequence = int(wall * 1000)
        if self._last is not None:
            sequence = max(sequence, self._last.announcement.sequence + 1)
        stamped = replace(current, issued_s=wall, sequence=sequence)
        jitter = self._rng.uniform(0.8, 1.0)
        self._last = Announced(stamped, now, now + ANNOUNCE_S * jitter)
        return stamped, wall + EXPIRE_S


def _route_facts(item: Announcement) -> tuple[object, ...]:
    """What is told at once when it changes."""
    return (
        *(item.state, item.span, item.addresses, item.group, item.stands),
        *(item.coordinates is not None, bool(item.neighbours)),
    )


def _off(current: float | None, said: float | None, step: float) -> bool:
    """Whether a figure became known, or differs from what was said by more than `step` of it."""
    if current is None or said is None:
        return current is not None
    return abs(current - said) > step * said


def _displaced(current: Announcement, said: Announcement) -> bool:
    """Whether the place moved by what makes estimates wrong."""
    here, there = current.coordinates, said.coordinates
    if here is None or there is None or not current.neighbours:
        return False
    if abs(here.error - there.error) > ERROR_STEP:
        return True
    usual_s = statistics.median(rtt_s for _, rtt_s in current.neighbours)
    return _distance_s(here, there) > max(PLACE_STEP * usual_s, PLACE_STEP_S)


def _ways_moved(current: dict[PeerId, float], said: dict[PeerId, float]) -> bool:
    """Whether more neighbours are known, or the way to one is not at all what was said."""
    return len(current) > len(said) or any(
        abs(rtt_s - said[peer]) > max(WAY_STEP * said[peer], PLACE_STEP_S)
        for peer, rtt_s in current.items()
        if peer in said
    )


def _distance_s(a: Coordinates, b: Coordinates) -> float:
    return math.dist(a.position_s, b.position_s) + abs(a.height_s - b.height_s)
