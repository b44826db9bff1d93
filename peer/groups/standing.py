"""Who failed lately, and for how long such a peer is left out: pure.

Each failure doubles the time, from `FIRST_S` to `MOST_S`, so that a member that comes and goes ends
a group's epoch ever more rarely; half an hour without one clears it. A little chance is added, so
that two leaders that got into each other's way do not meet again. It is what this peer saw itself:
nobody is left out by hearsay.
"""

from __future__ import annotations

import random

from hexswarm.records import PeerId

FIRST_S = 5.0
MOST_S = 600.0
CLEAR_S = 1800.0
JITTER = 0.25
MOST_PEERS = 1024


class Standing:
    """The failures that one peer has seen."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._seen: dict[PeerId, tuple[int, float, float]] = {}
        """Failures, until when it is left out, when it failed last; the latest at the end."""

    def strike(self, peer: PeerId, now: float, *, first_free: bool = False) -> float:
        """Until when `peer` is left out now. `first_free`: not at all if it never failed."""
        count, _, last_s = self._seen.pop(peer, (0, 0.0, now))
        count = 1 if now - last_s > CLEAR_S else count + 1
        steps = count - first_free
        pause_s = min(FIRST_S * 2.0 ** min(steps - 1, 16), MOST_S) if steps else 0.0
        until_s = now + pause_s * (1 + JITTER * self._rng.random())
        self._seen[peer] = (count, until_s, now)
        if len(self._seen) > MOST_PEERS:
            del self._seen[next(iter(self._seen))]
        return until_s

    def out(self, peer: PeerId, now: float) -> bool:
        """Whether `peer` is left out."""
        held = self._seen.get(peer)
        return held is not None and now < held[1]
