"""How far the peers are that offer themselves: round trips, at their shortest.

A group needs peers within two milliseconds, and what two event loops and two daemons add to a ping
on busy machines is easily more than that. A way is never shorter than its shortest trip, so of some
pings one after the other the shortest counts: what is asked is how far apart two machines are, not
how soon they answer today. Where pings say that a peer is not quite near, its door for direct
streams is knocked at as well: there the kernels alone answer, and that is where the group's sums
would go. Nobody is believed to be near. Who shows us somebody else's door gains nothing, since a
stream that is opened there later does not prove the right key; and we only knock at hosts with
which that peer's link goes anyway.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import socket
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from hexswarm.clock import Clock
from hexswarm.errors import HexswarmError
from hexswarm.links import Links
from hexswarm.peer.groups.invitation import LAN_RTT_S
from hexswarm.records import Announcement, PeerId

PINGS = 6
WITHIN_S = 2.0
"""For a dial and the pings."""
NOT_QUITE_S = 0.05
"""Pings that take longer are not worth a knock."""
KNOCKS, KNOCK_S = 4, 0.2
COUNTS_S = 60.0
"""So long a measurement counts."""
AGAIN_S = 30.0
"""Who is near is measured again after this."""
RETRY_S = 3.0
"""Who did not answer, or did as if it were far, was perhaps only busy."""
MOST = 64
"""Peers that are measured, as many as a group can have."""


@dataclass(slots=True)
class _Way:
    """To one peer."""

    tried_s: float = -math.inf
    rtts: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=32))
    """When, and the shortest of some pings."""
    under_way: asyncio.Lock = field(default_factory=asyncio.Lock)

    def best_s(self, now: float) -> float:
        return min((rtt_s for at_s, rtt_s in self.rtts if at_s >= now - COUNTS_S), default=math.inf)

    def due(self, now: float, *, linked: bool) -> bool:
        near = linked and self.best_s(now) <= LAN_RTT_S
        return now >= self.tried_s + (AGAIN_S if near else RETRY_S)


class Near:
    """Call `measure` with those of interest, now and then; `rtts` is what is known."""

    def __init__(self, links: Links, clock: Clock) -> None:
        self._links, self._clock = links, clock
        self._ways: dict[PeerId, _Way] = {}

    @property
    def rtts(self) -> dict[PeerId, float]:
        """Shortest round trips, in seconds, to those that are linked now."""
        now, linked = self._clock.monotonic(), self._links.connected
        return {peer: way.best_s(now) for peer, way in self._ways.items() if linked(peer)}

    async def measure(self, offers: Iterable[Announcement]) -> None:
        """Measure those that are new, or were measured long ago, or lost their link."""
        now, linked, there = self._clock.monotonic(), self._links.connected, list(offers)[:MOST]
        self._ways = {item.peer: self._ways.get(item.peer, _Way()) for item in there}
        due = [one for one in there if self._ways[one.peer].due(now, linked=linked(one.peer))]
        await asyncio.gather(*(self._one(item, self._ways[item.peer]) for item in due))

    def unknown(self, peer: PeerId) -> bool:
        """Whether it should be measured before anything is decided about it."""
        way, now = self._ways.get(peer), self._clock.monotonic()
        if way is None:
            return True
        may = way.under_way.locked() or way.due(now, linked=False)
        return may and way.best_s(now) == math.inf

    async def get_to_know(self, item: Announcement) -> None:
        """Measure it now, or wait for who does."""
        way = self._ways.setdefault(item.peer, _Way())
        async with way.under_way:
            pass
        if self.unknown(item.peer):
            await self._one(item, way)

    async def _one(self, item: Announcement, way: _Way) -> None:
        async with way.under_way:
            await self._measure(item, way)

    async def _measure(self, item: Announcement, way: _Way) -> None:
        links, found = self._links, list[float]()
        way.tried_s = self._clock.monotonic()
        with contextlib.suppress(TimeoutError, HexswarmError):
            async with asyncio.timeout(WITHIN_S):
                await links.connect(item.peer, item.addresses)
                for _ in range(PINGS):
                    began_s = self._clock.monotonic()
                    if await links.measure(item.peer, item.addresses, 1, WITHIN_S) is not None:
                        found.append(self._clock.monotonic() - began_s)
        if found and LAN_RTT_S < min(found) < NOT_QUITE_S and item.offer is not None:
            host, port = item.offer.host, item.offer.port
            if host in hosts_of(item.addresses):
                found.append(await asyncio.to_thread(knock_s, host, port))
        if found:
            way.rtts.append((self._clock.monotonic(), min(found)))


def hosts_of(addresses: Iterable[str]) -> set[str]:
    """Hosts of multiaddresses that are reached without a relay."""
    split = [address.split("/") for address in addresses if "p2p-circuit" not in address]
    return {parts[2] for parts in split if len(parts) > 2 and parts[1] in ("ip4", "ip6")}


def knock_s(host: str, port: int) -> float:
    """Seconds of the quickest of some connections, inf if there is none; blocking."""
    found = math.inf
    for _ in range(KNOCKS):
        began_s = time.perf_counter()
        try:
            with socket.create_connection((host, port), KNOCK_S):
                found = min(found, time.perf_counter() - began_s)
        except OSError:
            break
    return found
