"""`hexswarm peer`: from a config to a peer that serves, and back out again without loss.

    resolve model ─ join ─ choose span ─ load ─ probe ─ settle ─ announce ─ serve ─ drain ─ leave

Each part is somebody else's (store, loading, engine, stage table, links); this file owns the order
in which they start and end. To *settle* is to measure a few neighbours before the first word, so
that it tells where in the network this peer is; nobody waits for it longer than `SETTLE_S`.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from typing import Any

from hexswarm.clock import RealClock
from hexswarm.config import PeerConfig
from hexswarm.directory import INDEX, sign
from hexswarm.identity import Identity
from hexswarm.membership import FEW_PEERS, Membership
from hexswarm.peer.admission import Hosted
from hexswarm.peer.announcer import Announcer
from hexswarm.peer.cache import BLOCK_TOKENS, BlockTables
from hexswarm.peer.engine import Engine
from hexswarm.peer.journal import DEFAULT_BYTES, FREE_SHARE, Journal
from hexswarm.peer.loading import (
    MEMORY_SHARE,
    Served,
    check_span,
    choose_device,
    kept_bits,
    load,
    span_for_memory,
)
from hexswarm.peer.memory import free_bytes
from hexswarm.peer.neighbours import to_announce, to_measure
from hexswarm.peer.pace import Pace
from hexswarm.peer.probe import again
from hexswarm.peer.scheduler import Policy, Scheduler
from hexswarm.peer.server import PeerServer
from hexswarm.peer.stage import StageTable
from hexswarm.peer.steps import Result
from hexswarm.peer.steptime import StepTime
from hexswarm.progress import Progress
from hexswarm.records import DTYPES, Announcement, Coordinates, PeerId, Span, State
from hexswarm.router import vivaldi
from hexswarm.router.network import snapshot
from hexswarm.store import ModelFolder, resolve
from hexswarm.version import __version__
from hexswarm.wire import Frame

log = logging.getLogger(__name__)

TICK_S = 0.5
SETTLE_S = 3.0
SETTLE_PINGS = 3
MEASURE_EVERY_S = 20.0
"""A round of pings to a few neighbours."""
YOUNG_S = 60.0
"""A peer that is so young, or knows fewer than two others, measures them more often:"""
YOUNG_EVERY_S = 2.0
STOP_S = 3.0
"""A device that hangs for longer than this is left behind."""
SHARED_S = 600.0
"""Neighbours with which a session was shared so lately are announced first."""


class Peer:
    """A peer of the swarm: `start`, then `serve` until told to stop, then `leave`."""

    def __init__(self, config: PeerConfig, progress: Progress) -> None:
        self.config = config
        self.member = Membership(config, RealClock(), software=f"hexswarm/{__version__}")
        self.clock = self.member.clock
        self.served: Served
        self.engine: Engine | None = None
        self.server: PeerServer | None = None
        self._identity_path = config.identity or config.folder / "identity" / "peer.key"
        self._identity = Identity.claim(self._identity_path)
        self._progress = progress
        self._rng = random.Random(self._identity.public)
        self._announcer = Announcer(config.kv_tokens, self._rng)
        self._state: State = "joining"
        self._stop = asyncio.Event()
        self._addresses: tuple[str, ...] = ()
        self._place: Coordinates | None = None
        self._online_s = 0.0

    @property
    def peer(self) -> PeerId:
        return self._identity.peer

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where others reach us, without the /p2p suffix."""
        return self._addresses

    def request_stop(self) -> None:
        """Begin to drain; safe from a signal handler."""
        self._stop.set()

    async def start(self) -> None:
        """Join, load and announce; afterwards others can use us."""
        config = self.config
        folder = await self._resolve(weights=False)
        if config.span is not None:
            check_span(config.span, folder.spec.layers)
        device, dtype = choose_device(config)
        await self.member.join(self._on_frames, self._on_lost, identity=self._identity_path)
        self.member.follow(INDEX)
        await self.member.refresh()
        span = config.span or self._free_span(folder, device, dtype)
        folder = await self._resolve(span=span)
        self.served = await asyncio.to_thread(
            load, config, folder, span, device, dtype, self._progress
        )
        self._assemble()
        await self._settle()
        self._state = "online"
        self._online_s = self.clock.monotonic()
        await self._announce()

    async def serve(self) -> None:
        """Serve until `request_stop`, then drain."""
        assert self.server is not None
        async with asyncio.TaskGroup() as tasks:
            running = [
                tasks.create_task(self._announce_for_ever()),
                tasks.create_task(self._measure_for_ever()),
                tasks.create_task(self.server.expire_for_ever()),
                tasks.create_task(self.member.transport.died()),
            ]
            await self._stop.wait()
            await self._drain(self.server)
            for task in running:
                task.cancel()

    async def leave(self) -> None:
        """Stop the device thread and the network, however far `start` had come."""
        if self.engine is not None:
            await asyncio.to_thread(self.engine.stop, STOP_S)
        await self.member.close()

    # --- inside -------------------------------------------------------------------------------

    async def _resolve(self, **wanted: Any) -> ModelFolder:
        return await asyncio.to_thread(
            resolve, self.config.model, home=self.config.cache, progress=self._progress, **wanted
        )

    def _assemble(self) -> None:
        served, spec = self.served, self.served.folder.spec
        hosted = Hosted(self.peer, spec.digest, served.span, spec.layers, spec.hidden)
        policy = Policy.of(
            spec.hidden * DTYPES[served.dtype],
            head=served.span.first == 0,
            efficient_tokens=served.measured.efficient_tokens,
            stages=-(-spec.layers // len(served.span)),
            accelerator=served.device != "cpu",
        )
        tables = BlockTables(served.blocks, lease_s=self.config.lease_s)
        speed = served.measured.speed
        times = StepTime.probed(speed, len(served.span))
        engine = Engine(
            served.runner,
            Scheduler(policy, tables.blocks, times=times),
            tables,
            clock=self.clock,
            deliver=self._on_results,
            pace=Pace(speed, served.span, spec.layers),
            forget=served.runner.forget,
        )
        table = StageTable(hosted, engine, Journal(self._journal_bytes()))
        server = PeerServer(table, engine, self.member.links, self.clock)
        engine.start()
        self.engine, self.server = engine, server

    def _journal_bytes(self) -> int:
        if self.config.journal is not None:
            return self.config.journal
        return min(DEFAULT_BYTES, free_bytes("cpu") // FREE_SHARE)

    def _on_frames(self, peer: PeerId, frames: list[Frame]) -> None:
        if self.server is not None:
            self.server.on_frames(peer, frames)

    def _on_lost(self, peer: PeerId, how: str) -> None:
        if self.server is not None:
            self.server.on_lost(peer, how)

    def _on_results(self, results: list[Result]) -> None:
        if self.server is not None:
            self.server.deliver(results)

    def _free_span(self, folder: ModelFolder, device: str, dtype: str) -> Span:
        """The span that memory allows, where the swarm is thinnest."""
        view = snapshot(self.member.alive(), {}, self.clock.wall())
        coverage = view.coverage(folder.spec.digest) or [0] * folder.spec.layers
        budget = int(free_bytes(device) * MEMORY_SHARE)
        bits = kept_bits(self.config, folder, device, dtype)
        return span_for_memory(folder, self.config.kv_tokens, dtype, budget, coverage, bits)

    def _current(self) -> Announcement:
        served, spec = self.served, self.served.folder.spec
        engine, links = self.engine, self.member.links
        assert engine is not None
        load = engine.load_now()
        return Announcement(
            peer=self.peer,
            model=spec.digest,
            model_name=spec.name,
            layers=spec.layers,
            span=served.span,
            state=self._state,
            dtype=served.numerics,
            device=served.device,
            speed=engine.speed_now() or served.measured.speed,
            free_kv_tokens=load.free_kv_tokens,
            queue_s=load.queue_s,
            addresses=self._addresses[:8],
            neighbours=self._neighbours(),
            software=__version__,
            rows=load.rows,
            busy=load.busy,
            kv_tokens=served.blocks * BLOCK_TOKENS,
            coordinates=self._place,
            up_bytes_per_s=links.up_bytes_per_s,
            down_bytes_per_s=links.down_bytes_per_s,
        )

    def _neighbours(self) -> tuple[tuple[PeerId, float], ...]:
        """Measured ways to peers of the directory: nobody else's concern are those to clients."""
        known = {item.peer for item in self.member.others()}
        links = self.member.links
        rtts = {peer: rtt_s for peer, rtt_s in links.rtts.items() if peer in known}
        return to_announce(rtts, links.used_within(SHARED_S))

    async def _announce(self) -> None:
        """Announce if it is time to."""
        current = self._current()
        now, wall = self.clock.monotonic(), self.clock.wall()
        if not self._announcer.due(current, now):
            return
        self._addresses = await self.member.transport.addresses()
        current = self._current()
        stamped, expires_s = self._announcer.stamp(current, now, wall)
        record = sign(stamped, expires_s, self._identity)
        await self.member.announce(record)

    async def _announce_for_ever(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self.member.links.probe(item.peer for item in self.member.others())
            await self._announce()

    async def _settle(self) -> None:
        """Find out where we are before we say that we are there."""
        await self._measure(SETTLE_PINGS, SETTLE_S)

    async def _measure_for_ever(self) -> None:
        """Keep links to a few peers, measure the ways to them, and move with what is found."""
        while True:
            young = self.clock.monotonic() - self._online_s < YOUNG_S
            few = len(self.member.others()) < FEW_PEERS
            await asyncio.sleep(YOUNG_EVERY_S if young or few else MEASURE_EVERY_S)
            await self._measure(1, SETTLE_S)
            await self._time_at_rest()

    async def _time_at_rest(self) -> None:
        """If nobody uses us, a step of our own tells whether the announced speed is still ours."""
        served, engine = self.served, self.engine
        assert engine is not None
        spec, span = served.folder.spec, served.span
        timed = engine.at_rest(lambda run: again(run, span, spec.layers, spec.hidden, served.dtype))
        if timed is not None:
            await asyncio.wrap_future(timed)

    async def _measure(self, pings: int, within_s: float) -> None:
        """One round: measure some neighbours at the same time, and correct our coordinates."""
        others = self.member.others()
        chosen = to_measure(others, self._place, self._rng)
        targets = [(item.peer, item.addresses) for item in chosen]
        ways = await self.member.links.measure_all(targets, pings, within_s)
        samples = [
            (item.coordinates, ways[item.peer].rtt_s) for item in chosen if item.peer in ways
        ]
        if self._place is None:
            placed = [(at, rtt_s) for at, rtt_s in samples if at is not None]
            self._place = vivaldi.fit(placed, self._rng)
        # Among newcomers alone nobody has a place yet: the first to measure takes one.
        for at, rtt_s in samples:
            self._place = vivaldi.step(self._place, at, rtt_s, self._rng)

    async def _drain(self, server: PeerServer) -> None:
        self._state = "draining"
        await server.drain(self.config.drain_s, self._announce)


async def run_peer(
    config: PeerConfig,
    progress: Progress,
    on_ready: Callable[[Peer], None],
    stop_with: Callable[[Callable[[], None]], None],
) -> None:
    """Run a peer until it is told to stop; `stop_with` registers how to tell it."""
    peer = Peer(config, progress)
    stop_with(peer.request_stop)
    try:
        starting = asyncio.create_task(peer.start())
        stopping = asyncio.create_task(peer._stop.wait())
        await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if not starting.done():
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
            return
        await starting
        on_ready(peer)
        await peer.serve()
    finally:
        await peer.leave()
