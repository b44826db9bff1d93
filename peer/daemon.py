"""`hexswarm peer`: from a config to a peer that serves, and back out again without loss.

    resolve model ─ join ─ choose span ─ load ─ probe ─ announce ─ serve ─ drain ─ leave

Each part is somebody else's (store, loading, engine, stage table, links); this file owns the order
in which they start and end.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Callable
from typing import Any

from hexswarm.clock import RealClock
from hexswarm.config import PeerConfig
from hexswarm.directory import INDEX, sign
from hexswarm.errors import PeerLost
from hexswarm.identity import Identity
from hexswarm.membership import Membership
from hexswarm.peer.announcer import Announcer
from hexswarm.peer.cache import BlockTables
from hexswarm.peer.engine import Engine
from hexswarm.peer.loading import (
    MEMORY_SHARE,
    Served,
    check_span,
    choose_device,
    load,
    span_for_memory,
)
from hexswarm.peer.memory import free_bytes
from hexswarm.peer.scheduler import Policy, Scheduler
from hexswarm.peer.server import PeerServer
from hexswarm.peer.stage import Hosted, StageTable
from hexswarm.peer.steps import Result
from hexswarm.progress import Progress
from hexswarm.records import DTYPES, Announcement, PeerId, Span, State
from hexswarm.router.network import snapshot
from hexswarm.store import ModelFolder, resolve
from hexswarm.version import __version__
from hexswarm.wire import Frame

log = logging.getLogger(__name__)

TICK_S = 0.5
NEIGHBOURS = 8
MEASURE_EVERY_S = 20.0


class Peer:
    """A peer of the swarm: `start`, then `serve` until told to stop, then `leave`."""

    def __init__(self, config: PeerConfig, progress: Progress) -> None:
        self.config = config
        self.clock = RealClock()
        self.member = Membership(config, self.clock, software=f"hexswarm/{__version__}")
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
        self._state = "online"
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
            await asyncio.to_thread(self.engine.stop)
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
        scheduler = Scheduler(policy, tables.blocks)
        engine = Engine(
            served.runner, scheduler, tables, clock=self.clock, deliver=self._on_results
        )
        server = PeerServer(StageTable(hosted, engine), engine, self.member.links, self.clock)
        engine.start()
        self.engine, self.server = engine, server

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
        return span_for_memory(folder, self.config.kv_tokens, dtype, budget, coverage)

    def _current(self) -> Announcement:
        served, spec = self.served, self.served.folder.spec
        engine = self.engine
        assert engine is not None
        return Announcement(
            peer=self.peer,
            model=spec.digest,
            model_name=spec.name,
            layers=spec.layers,
            span=served.span,
            state=self._state,
            dtype=served.dtype,
            device=served.device,
            speed=served.measured.speed,
            free_kv_tokens=engine.free_tokens,
            queue_s=engine.queue_s(),
            addresses=self._addresses[:8],
            neighbours=tuple(sorted(self.member.links.rtts.items())[:NEIGHBOURS]),
            software=__version__,
        )

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
        self.member.take([record])
        if not await self.member.dht.announce(record):
            log.warning(
                "the announcement was taken by nobody; is this machine's clock right, and does "
                "any other node run?"
            )

    async def _announce_for_ever(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            await self._announce()

    async def _measure_for_ever(self) -> None:
        """Keep links to a few peers of the same model and measure the way to them."""
        while True:
            digest = self.served.folder.spec.digest
            others = [a for a in self.member.alive() if a.model == digest and a.peer != self.peer]
            chosen = self._rng.sample(others, min(NEIGHBOURS, len(others)))
            for other in chosen:
                with contextlib.suppress(PeerLost):
                    await self.member.links.connect(other.peer, other.addresses)
                    self.member.links.ping(other.peer)
            await asyncio.sleep(MEASURE_EVERY_S if others else TICK_S)

    async def _drain(self, server: PeerServer) -> None:
        """Say that we leave, let sessions end, hand back the rest."""
        self._state = "draining"
        server.carry_out(server.table.drain(self.config.drain_s))
        await self._announce()
        deadline_s = self.clock.monotonic() + self.config.drain_s
        while len(server.table) and self.clock.monotonic() < deadline_s:
            await server.quiet(deadline_s - self.clock.monotonic())
        server.carry_out(server.table.end_all())


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
