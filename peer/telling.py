"""What others are told of this peer: its announcements, and the numbers for who watches it."""

from __future__ import annotations

import asyncio

from hexswarm.directory import sign
from hexswarm.metrics import Metric, gauge
from hexswarm.peer.announcer import Announcer
from hexswarm.peer.cache import BLOCK_TOKENS
from hexswarm.peer.gauges import metrics
from hexswarm.peer.life import Life
from hexswarm.peer.neighbours import to_announce
from hexswarm.peer.placement import USUAL
from hexswarm.records import Announcement, PeerId
from hexswarm.version import __version__

TICK_S = 0.5
SHARED_S = 600.0
"""Neighbours with which a session was shared so lately are announced first."""


class Teller:
    """`announce` at once where something changed, `for_ever` beside."""

    def __init__(self, life: Life) -> None:
        self._life = life
        self._announcer = Announcer(life.config.kv_tokens, life.rng)

    async def announce(self) -> None:
        """Announce if it is time to."""
        life, current = self._life, self._current()
        now, wall = life.clock.monotonic(), life.clock.wall()
        if not self._announcer.due(current, now):
            return
        life.addresses = await life.member.transport.addresses()
        current = self._current()
        stamped, expires_s = self._announcer.stamp(current, now, wall)
        await life.member.announce(sign(stamped, expires_s, life.identity))

    async def for_ever(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            member = self._life.member
            member.links.probe(item.peer for item in member.others())
            await self.announce()

    def metrics(self) -> tuple[Metric, ...]:
        """Counters begin anew when we move, as Prometheus expects of a restart."""
        life = self._life
        if life.engine is None:
            return (gauge("hexswarm_up", "Whether layers are served.", 0),)
        served = life.served
        labels = {
            "model": served.folder.spec.name,
            "span": str(served.span),
            "state": life.state,
            "numerics": served.numerics,
            "device": served.device,
            "version": __version__,
        }
        up = gauge("hexswarm_up", "Whether layers are served.", 1, **labels)
        return (up, *metrics(life.engine.gauges()))

    def _current(self) -> Announcement:
        life = self._life
        told = self._claim() if life.engine is None else self._served()
        return told if life.groups is None else life.groups.announced(told)

    def _served(self) -> Announcement:
        life = self._life
        served, spec = life.served, life.served.folder.spec
        engine, links = life.engine, life.member.links
        assert engine is not None
        load = engine.load_now()
        return Announcement(
            peer=life.peer,
            model=spec.digest,
            model_name=spec.name,
            layers=spec.layers,
            span=served.span,
            state=life.state,
            dtype=served.numerics,
            device=served.device,
            speed=engine.speed_now() or served.measured.speed,
            free_kv_tokens=load.free_kv_tokens,
            queue_s=load.queue_s,
            addresses=life.addresses[:8],
            neighbours=self._neighbours(),
            software=__version__,
            rows=load.rows,
            busy=load.busy,
            kv_tokens=served.blocks * BLOCK_TOKENS,
            coordinates=life.place,
            up_bytes_per_s=links.up_bytes_per_s,
            down_bytes_per_s=links.down_bytes_per_s,
            most_layers=self._most_layers,
        )

    def _claim(self) -> Announcement:
        """Before anything can be served."""
        life = self._life
        spec, rounded, placement = life.folder.spec, life.config.quant, life.placement
        speed = USUAL if placement is None else placement.claimed_speed(life.member.others())
        return Announcement(
            peer=life.peer,
            model=spec.digest,
            model_name=spec.name,
            layers=spec.layers,
            span=life.claimed,
            state="joining",
            dtype=life.dtype if rounded == "none" else f"{life.dtype}+{rounded}",
            device=life.device,
            speed=speed,
            free_kv_tokens=0,
            queue_s=0.0,
            addresses=life.addresses[:8],
            software=__version__,
            coordinates=life.place,
            most_layers=self._most_layers,
        )

    @property
    def _most_layers(self) -> int:
        advising = self._life.advising
        return 0 if advising is None else advising.most_layers

    def _neighbours(self) -> tuple[tuple[PeerId, float], ...]:
        """Measured ways to peers of the directory: nobody else's concern are those to clients."""
        life = self._life
        known = {item.peer for item in life.member.others()}
        links = life.member.links
        rtts = {peer: rtt_s for peer, rtt_s in links.rtts.items() if peer in known}
        return to_announce(rtts, links.used_within(SHARED_S))
