"""The directory of a simulated swarm: what nodes of the DHT would hold, and how late it is read.

`Board` stands for all storing nodes together. It admits a record by the product's own rule
(`hexswarm.directory.check_record`, at the true time), keeps the latest of each peer, as
`hexswarm.shelf` has the store do, and shows it after a while: early, late or never, and to a reader
now and then the one before. `BoardDht` has the surface of `hexswarm.dht.SwarmDht`, so that the
real `Membership` reads and announces through it.

Not modelled: routing inside the DHT, and the traffic that it costs.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass

import msgpack

from hexswarm.clock import Clock
from hexswarm.directory import (
    SignedAnnouncement,
    check_record,
    directory_key,
    open_record,
    shard_of,
)
from hexswarm.errors import NetworkError, RemoteProtocolError
from hexswarm.records import PeerId
from hexswarm.skew import Sample
from tests.simulation.processes import EPOCH_S

QUICK_S = (0.02, 0.25)
LATE_S = (2.0, 9.0)
LATE = 0.05
"""Share of the records that are shown late."""
LOST = 0.02
"""Share that was stored where nobody looks."""
STALE = 0.05
"""Share of the readings that meet a node which missed the last record."""


@dataclass(frozen=True, slots=True)
class Shown:
    """A record, and from when on readers meet it."""

    record: SignedAnnouncement
    accepted_s: float
    visible_s: float


class Board:
    """All records of the swarm; times are those of the loop, which is the true time."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.down = False
        """Nobody answers."""
        self.refused = 0
        self._shown: dict[PeerId, list[Shown]] = {}

    def store(self, key: str, subkey: str, data: bytes, expires_s: float, *, sure: bool) -> bool:
        """Whether the nodes took the record; `sure`: at once and everywhere."""
        now = asyncio.get_running_loop().time()
        key_hash = hashlib.sha1(msgpack.packb(key)).digest()
        names, value = msgpack.packb(subkey), msgpack.packb(data)
        try:
            record = check_record(key_hash, names, value, expires_s, EPOCH_S + now)
        except RemoteProtocolError:
            self.refused += 1
            return False
        held = self._shown.setdefault(record.peer, [])
        if held and held[-1].record.announcement.sequence >= record.announcement.sequence:
            return False
        if not sure and self.rng.random() < LOST:
            return True
        late = not sure and self.rng.random() < LATE
        delay_s = 0.0 if sure else self.rng.uniform(*(LATE_S if late else QUICK_S))
        held.append(Shown(record, now, now + delay_s))
        del held[:-3]
        return True

    def read(self, model: str) -> list[SignedAnnouncement]:
        """What a reader meets now: of each peer the last record that is shown, or the one before.

        The bytes are opened again, as they are off the wire.
        """
        now, found = asyncio.get_running_loop().time(), list[SignedAnnouncement]()
        stale = self.rng.random() < STALE
        for _, held in sorted(self._shown.items()):
            shown = [item for item in held if item.visible_s <= now]
            if stale:
                shown = shown[:-1] or shown
            if shown and shown[-1].record.expires_s > EPOCH_S + now:
                found.append(open_record(shown[-1].record.data))
        return found

    def last(self, peer: PeerId) -> Shown | None:
        """The newest record of `peer`, shown or not."""
        return (self._shown.get(peer) or [None])[-1]


class BoardDht:
    """One process's node: `SwarmDht` as `Membership` uses it."""

    def __init__(self, board: Board) -> None:
        self._board = board

    async def announce(self, record: SignedAnnouncement, shards: int = 1) -> bool:
        await asyncio.sleep(self._board.rng.uniform(*QUICK_S))
        if self._board.down:
            return False
        key = directory_key(record.announcement.model, shard_of(record.peer, shards), shards)
        return self._board.store(key, record.peer, record.data, record.expires_s, sure=False)

    async def read(self, model: str = "*", shards: int = 1) -> list[SignedAnnouncement]:
        await asyncio.sleep(self._board.rng.uniform(*QUICK_S))
        if self._board.down:
            raise NetworkError("no node of the directory answers", remedy="try again")
        return self._board.read(model)

    async def meet(self, records: Sequence[SignedAnnouncement]) -> None:
        """Addresses need no introduction here."""

    async def times(self, clock: Clock) -> list[Sample]:
        """What three other nodes say of our time: they are right."""
        await asyncio.sleep(self._board.rng.uniform(*QUICK_S))
        if self._board.down:
            return []
        ahead_s = clock.wall() - EPOCH_S - asyncio.get_running_loop().time()
        return [Sample(ahead_s, 0.05)] * 3

    async def close(self) -> None:
        """Nothing is held."""
