"""What a DHT node keeps for others, bounded: whose record stays when there is no room for all.

Identities cost nothing, so somebody with a thousand keys can sign a thousand records, each of them
in order, and put them under one key until the answer to a reader passes libp2p's 4 MiB and nobody
reads anything (measured with hivemind's own storage: 10,000 records of 900 bytes in 12.9 s). So a
key holds at most `MAX_ENTRIES` records, below 4 MiB even if all of them are as large as permitted,
and a node `MAX_TOTAL` in all.

When a key is full, room is made at the cost of the most crowded *address block* (`hexswarm.quota`)
that records claim, addresses without a block counting as one, and there of whoever came last; if no
block is more crowded than the newcomer's own, the newcomer is refused. So those who are there stay
as long as they renew, a crowd from one block gives way to others, and a crowd of many blocks can
keep newcomers out of a full key but throws nobody out. Rejected: dropping the oldest (the honest
renew every half minute, a flood every second: the oldest is always honest) and the earliest to
expire (the same). The block is a claim: lying about it costs nothing but being unreachable.

Of one peer the record with the higher sequence counts, whatever its expiry: hivemind alone goes by
the later expiry, so a peer whose clock was put back could not renew its word. Equal sequences are
repetitions and keep the record that is held.

Pure: no clock, no storage. `Shelf` says what to do; `hexswarm.guard` does it in hivemind's storage.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass

from hexswarm.records import PeerId

MAX_ENTRIES = 1500
"""Records under one key: 1,500 of 2 kB are 3.2 MB, below the 4 MiB of one answer."""
MAX_TOTAL = 20_000
"""Records that one node keeps: 43 MB at their largest, 10 MB as they usually are."""
MAX_KEYS = 14
"""Keys under which one identity has records: its model and the index, at three numbers of shards
each, and an advice; the same of the model that it served before."""
SWEEP_S = 5.0
"""What ran out is looked for at most this often."""

Key = Hashable


@dataclass(frozen=True, slots=True)
class Kept:
    """What is known of a record that is held."""

    block: str
    sequence: int
    expires_s: float


class _Crowd:
    """Entries by address block, each block in the order in which they came."""

    def __init__(self) -> None:
        self.count = 0
        self._blocks: dict[str, dict[tuple[Key, PeerId], None]] = {}

    def add(self, entry: tuple[Key, PeerId], block: str) -> None:
        self._blocks.setdefault(block, {})[entry] = None
        self.count += 1

    def remove(self, entry: tuple[Key, PeerId], block: str) -> None:
        members = self._blocks[block]
        del members[entry]
        self.count -= 1
        if not members:
            del self._blocks[block]

    def yields(self, block: str) -> tuple[Key, PeerId] | None:
        """The entry that gives way to a newcomer of `block`; None if none should."""
        fullest = max(self._blocks, key=lambda name: len(self._blocks[name]), default="")
        size = len(self._blocks.get(fullest, ()))
        if size < len(self._blocks.get(block, ())) + 2:
            return None
        return next(reversed(self._blocks[fullest]))


class Shelf:
    """The books of what is held; `put` before a record is stored, and do what it says."""

    def __init__(self, per_key: int = MAX_ENTRIES, total: int = MAX_TOTAL) -> None:
        self._per_key, self._total = per_key, total
        self._kept: dict[tuple[Key, PeerId], Kept] = {}
        self._all = _Crowd()
        self._keys: dict[Key, _Crowd] = {}
        self._of: dict[PeerId, set[Key]] = {}
        self._swept_s = -math.inf

    def __len__(self) -> int:
        return len(self._kept)

    def count(self, key: Key) -> int:
        return self._keys[key].count if key in self._keys else 0

    def put(
        self, key: Key, peer: PeerId, told: Kept, now: float
    ) -> list[tuple[Key, PeerId]] | None:
        """The entries to drop before this one is stored, itself if it is held; None: refuse it."""
        entry = (key, peer)
        held = self._kept.get(entry)
        if held is not None and held.expires_s > now:
            if told.sequence <= held.sequence:
                return None
            self._kept[entry] = Kept(held.block, told.sequence, told.expires_s)
            return [entry]
        if held is not None:
            self._remove(entry)
        if len(self._of.get(peer, ())) >= MAX_KEYS:
            self._sweep(now)
        dropped = self._make_room(key, told.block, now)
        if dropped is None or len(self._of.get(peer, ())) >= MAX_KEYS:
            return None
        for other in dropped:
            self._remove(other)
        self._add(entry, told)
        return [entry, *dropped] if held is not None else dropped

    def _make_room(self, key: Key, block: str, now: float) -> list[tuple[Key, PeerId]] | None:
        if self.count(key) >= self._per_key or len(self) >= self._total:
            self._sweep(now)
        if self.count(key) >= self._per_key:
            other = self._keys[key].yields(block)
        elif len(self) >= self._total:
            other = self._all.yields(block)
        else:
            return []
        return None if other is None else [other]

    def _sweep(self, now: float) -> None:
        """Forget what ran out: the storage has done so by itself."""
        if now - self._swept_s < SWEEP_S:
            return
        self._swept_s = now
        for entry in [entry for entry, held in self._kept.items() if held.expires_s <= now]:
            self._remove(entry)

    def _add(self, entry: tuple[Key, PeerId], told: Kept) -> None:
        self._kept[entry] = told
        self._all.add(entry, told.block)
        self._keys.setdefault(entry[0], _Crowd()).add(entry, told.block)
        self._of.setdefault(entry[1], set()).add(entry[0])

    def _remove(self, entry: tuple[Key, PeerId]) -> None:
        held = self._kept.pop(entry)
        self._all.remove(entry, held.block)
        crowd = self._keys[entry[0]]
        crowd.remove(entry, held.block)
        if not crowd.count:
            del self._keys[entry[0]]
        keys = self._of[entry[1]]
        keys.discard(entry[0])
        if not keys:
            del self._of[entry[1]]
