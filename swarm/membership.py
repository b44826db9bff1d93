"""Being in a swarm: transport, DHT node and links of one process, and its view of the others.

The view (`Directory`) is refreshed in the background and on demand; peers met are remembered on
disk, so that a later start finds the swarm even if every bootstrap is gone. Used by the client,
the peer and (without links) the bootstrap.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Callable, Sequence
from pathlib import Path

from hexswarm.advice import SignedAdvice
from hexswarm.clock import Clock
from hexswarm.config import ListenConfig, NetworkConfig
from hexswarm.dht import SwarmDht, load_remembered, save_remembered
from hexswarm.directory import INDEX, Directory, SignedAnnouncement
from hexswarm.links import Links
from hexswarm.records import Announcement, Coordinates, PeerId, Remembered
from hexswarm.skew import SteadyClock
from hexswarm.transports.libp2p import Libp2pTransport
from hexswarm.wire import Frame

log = logging.getLogger(__name__)

REFRESH_S = 10.0
"""Period of reading the directory in the background."""
YOUNG_REFRESH_S = 2.0
"""The same for a node that others call and that is `YOUNG_S` old at most, or knows fewer than
`FEW_PEERS` others: two that start together must not wait for each other."""
YOUNG_S = 60.0
FEW_PEERS = 2
PLACE_PEERS = 8
"""So many round trips tell where a client is."""
PLACE_PINGS = 2
PLACE_S = 1.0
"""Limit for measuring them all; who answers later is heard, but does not count."""
PLACE_EVERY_S = 300.0
PLACE_RETRY_S = 5.0
"""The same while nobody with coordinates has answered."""

Fit = Callable[[Sequence[tuple[Coordinates, float]], random.Random], Coordinates | None]
"""Coordinates out of others' and the round trips to them: `hexswarm.router.vivaldi.fit`, which the
ground floor does not import."""


class Membership:
    """Call `join` once, `close` at the end."""

    def __init__(self, config: NetworkConfig, clock: Clock, *, software: str) -> None:
        self.config = config
        self.clock = SteadyClock(clock)
        """What this process goes by in the swarm, whatever becomes of the machine's clock."""
        self.directory = Directory()
        self.transport: Libp2pTransport
        self.dht: SwarmDht
        self.links: Links
        self._software = software
        self.advice: tuple[SignedAdvice, ...] = ()
        """For the model whose advice is followed, as it was read last."""
        self._models: set[str] = set()
        self._advised: str | None = None
        self._refreshed_s: dict[str, float] = {}
        self._refresher: asyncio.Task[None] | None = None
        self._joined_s = 0.0
        self._complained = False
        self._place: Coordinates | None = None
        self._place_again_s = 0.0

    async def join(
        self,
        on_frames: Callable[[PeerId, list[Frame]], None],
        on_lost: Callable[[PeerId, str], None],
        *,
        identity: Path | None = None,
        silence_s: float = 8.0,
        alone: bool = False,
    ) -> None:
        """Enter the swarm; a `ListenConfig` also listens. `alone`: nobody needs to answer.

        Raises AddressInUse, BootstrapUnreachable, ClockSkew, NetworkError or UsageError.
        """
        config = self.config
        listening = isinstance(config, ListenConfig)
        self.transport = await Libp2pTransport.create(
            identity=identity,
            host=config.host if isinstance(config, ListenConfig) else None,
            port=config.port if isinstance(config, ListenConfig) else 0,
            announce=config.announce if isinstance(config, ListenConfig) else (),
        )
        try:
            self.dht = await SwarmDht.join(
                self.transport,
                bootstrap=config.bootstrap,
                remembered=load_remembered(self._memory),
                client=not listening,
                alone=alone,
                clock=self.clock,
            )
        except BaseException:
            await self.transport.close()
            raise
        self.links = Links(
            self.transport,
            self.clock,
            on_frames,
            on_lost,
            software=self._software,
            silence_s=silence_s,
        )
        await self.links.start(listen=listening)
        self._joined_s = self.clock.monotonic()
        self._refresher = asyncio.create_task(self._refresh_for_ever())

    async def close(self) -> None:
        if self._refresher is None:
            return  # never joined
        self._refresher.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._refresher
        await self.links.close()
        await self.dht.close()
        await self.transport.close()
        self._refresher = None

    def follow(self, model: str) -> None:
        """Keep the view of this model (a digest, or INDEX for all) fresh."""
        self._models.add(model)

    def follow_advice(self, model: str) -> None:
        """Read the advice for this model (a digest) along with the announcements."""
        self._advised = model

    async def advise(self, record: SignedAdvice) -> bool:
        """Publish an advice; False if nobody took it."""
        return await self.dht.advise(record)

    def alive(self) -> tuple[Announcement, ...]:
        return self.directory.alive(self.clock.wall())

    async def refresh(self, model: str = INDEX, *, older_s: float = 0.0) -> None:
        """Read the announcements of `model` unless that was done within `older_s`."""
        now = self.clock.monotonic()
        if now - self._refreshed_s.get(model, -1e9) < older_s:
            return
        records = await self.dht.read(model)
        self._refreshed_s[model] = self.clock.monotonic()
        self.take(records)
        self._remember()
        await self.dht.meet(records)

    def take(self, records: list[SignedAnnouncement]) -> None:
        """Merge announcements, wherever they came from."""
        self.directory.merge(records, self.clock.wall())

    async def announce(self, record: SignedAnnouncement) -> bool:
        """Tell the swarm; False, and a warning that says why, if nobody took the word."""
        self.take([record])
        if await self.dht.announce(record):
            return True
        self.clock.judge(await self.dht.times(self.clock))
        trouble = self.clock.trouble()
        if trouble is None:
            log.warning("nobody took the announcement; does any other node run?")
        else:
            log.warning("nobody took the announcement: %s", trouble)
        return False

    def others(self) -> list[Announcement]:
        """Everybody alive but this process."""
        return [item for item in self.alive() if item.peer != self.transport.local]

    async def place(self, rng: random.Random, fit: Fit) -> Coordinates | None:
        """Where this process is, for one that announces nothing: a client.

        A few peers spread at random are measured, at most every `PLACE_EVERY_S`; what was measured
        is in `links.ways`. None as long as nobody with coordinates answers.
        """
        now = self.clock.monotonic()
        if now < self._place_again_s:
            return self._place
        self._place_again_s = now + PLACE_RETRY_S
        known = [item for item in self.others() if item.coordinates is not None]
        chosen = rng.sample(known, min(PLACE_PEERS, len(known)))
        ways = await self.links.measure_all(
            [(item.peer, item.addresses) for item in chosen], PLACE_PINGS, PLACE_S
        )
        samples = [
            (item.coordinates, ways[item.peer].rtt_s)
            for item in chosen
            if item.peer in ways and item.coordinates is not None
        ]
        found = fit(samples, rng) if samples else None
        if found is not None:
            self._place, self._place_again_s = found, now + PLACE_EVERY_S
        return self._place

    @property
    def _memory(self) -> Path:
        """Peers remembered; one file for each bootstrap set would separate swarms too eagerly."""
        return self.config.folder / "peers.json"

    async def _refresh_for_ever(self) -> None:
        while True:
            await asyncio.sleep(YOUNG_REFRESH_S if self._young() else REFRESH_S)
            for model in tuple(self._models):
                try:
                    await self.refresh(model)
                    if self._advised is not None:
                        self.advice = tuple(await self.dht.read_advice(self._advised))
                except Exception as error:  # hivemind raises many kinds; the view stays old
                    log.warning("reading the directory failed: %r", error)
            self.directory.expire(self.clock.wall())
            if self.clock.due:
                await self._check_time()

    async def _check_time(self) -> None:
        """Compare clocks with the swarm, and say it once if the machine's is wrong."""
        try:
            self.clock.judge(await self.dht.times(self.clock))
        except Exception as error:  # hivemind raises many kinds
            log.debug("asking for the time failed: %r", error)
            return
        trouble = self.clock.trouble()
        if trouble is not None and not self._complained:
            log.warning("%s; until then this process goes by its own time", trouble)
        self._complained = trouble is not None

    def _young(self) -> bool:
        if not isinstance(self.config, ListenConfig):
            return False
        age_s = self.clock.monotonic() - self._joined_s
        return age_s < YOUNG_S or len(self.others()) < FEW_PEERS

    def _remember(self) -> None:
        """Write down who is there, at once: a process may live for seconds or be killed."""
        now = self.clock.wall()
        known = {entry.peer: entry for entry in load_remembered(self._memory)}
        for announcement in self.alive():
            if announcement.peer != self.transport.local and announcement.addresses:
                entry = Remembered(announcement.peer, announcement.addresses, now)
                known[announcement.peer] = entry
        if known:
            save_remembered(self._memory, list(known.values()))
