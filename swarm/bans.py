"""Whom a client avoids for a while, because it failed it; pure.

Every failure of a peer is a *strike*. After it the peer is banned: 5 s for the first, twice as long
for each further one, 10 min at most, spread by a random part so that clients which lost
the same peer do not all come back to it at once. After the ban the peer is on *probation*: it is
offered a share of new sessions only, the smaller the more strikes it has; from the third on
fewer than one in ten. Strikes fade with time, so every peer is forgiven in the end.

What another peer says of it is no strike: a neighbour that reports a loss may itself be cut off, or
lie. And nobody is banned for refusing: being full is no failure.

Nothing here forbids: where no route is left without the banned, the planner asks again without
probation, and then with all (`hexswarm.planning`): those just seen dead are not in the directory
anyway. The table is bounded; the longest unseen go first.

Rejected: telling other clients (slander is free); a ban on first sight of a failure without end
(Petals' released code, whose only replica then never comes back).
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from hexswarm.records import PeerId

FIRST_BAN_S = 5.0
LONGEST_BAN_S = 600.0
SPREAD = 0.25
"""A ban is longer by a random share of at most this."""
FORGIVE_S = 300.0
"""So long without a failure takes back one strike."""
SHARES = (1.0, 0.5, 0.2, 0.08)
"""Of new sessions, by strikes; the last for that many and more."""
PEERS = 1024


@dataclass(frozen=True, slots=True)
class _Record:
    strikes: float
    until_s: float


class Bans:
    """Failures of peers, by their own doing."""

    def __init__(self) -> None:
        self._records: dict[PeerId, _Record] = {}
        """In order of the last strike."""

    def __len__(self) -> int:
        return len(self._records)

    def strike(self, peer: PeerId, now: float, rng: random.Random) -> float:
        """The peer failed; until when it is banned."""
        record = self._records.get(peer)
        if record is not None and now < record.until_s:
            return record.until_s  # one loss, noticed by several sessions
        strikes = self.strikes(peer, now) + 1.0
        ban_s = min(LONGEST_BAN_S, FIRST_BAN_S * math.pow(2.0, strikes - 1.0))
        until_s = now + ban_s * (1.0 + SPREAD * rng.random())
        self._records.pop(peer, None)
        self._records[peer] = _Record(strikes, until_s)
        while len(self._records) > PEERS:
            del self._records[next(iter(self._records))]
        return until_s

    def strikes(self, peer: PeerId, now: float) -> float:
        """Those not yet forgiven; time in a ban forgives nothing."""
        record = self._records.get(peer)
        if record is None:
            return 0.0
        good_s = max(0.0, now - record.until_s)
        return max(0.0, record.strikes - good_s / FORGIVE_S)

    def share(self, peer: PeerId, now: float) -> float:
        """The part of new sessions that it is offered."""
        record = self._records.get(peer)
        if record is None:
            return 1.0
        if now < record.until_s:
            return 0.0
        # A strike counts until it is taken back wholly, up to rounding.
        strikes = int(-(-(self.strikes(peer, now) - 1e-9) // 1))
        return SHARES[max(0, min(strikes, len(SHARES) - 1))]

    def banned(self, now: float) -> frozenset[PeerId]:
        return frozenset(peer for peer, item in self._records.items() if now < item.until_s)

    def draw(self, now: float, rng: random.Random) -> frozenset[PeerId]:
        """Whom one new session does without: the banned, and by lot those on probation."""
        self._forgive(now)
        return frozenset(peer for peer in self._records if rng.random() >= self.share(peer, now))

    def _forgive(self, now: float) -> None:
        for peer in [p for p in self._records if self.strikes(p, now) == 0.0]:
            del self._records[peer]
