"""`hexswarm peer`: from a config to a peer that serves, and back out again without loss.

    resolve model ─ join ─ claim a span ─ load ─ probe ─ settle ─ announce ─ serve ─ drain ─ leave

A peer that was given no span may move while it lives: drain, load, announce, serve again. Each part
is somebody else's (store, loading, engine, stage table, links; `moving` chooses layers, `telling`
announces, `surveying` measures); this file owns the order in which they start and end.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import random
from collections.abc import Callable, Coroutine
from typing import Any

from hexswarm.clock import RealClock
from hexswarm.config import PeerConfig
from hexswarm.directory import INDEX
from hexswarm.identity import Identity
from hexswarm.membership import Membership
from hexswarm.peer.admission import Hosted
from hexswarm.peer.advising import Advising
from hexswarm.peer.cache import BlockTables
from hexswarm.peer.engine import Engine
from hexswarm.peer.journal import DEFAULT_BYTES, FREE_SHARE, Journal
from hexswarm.peer.life import Life
from hexswarm.peer.loading import (
    MEMORY_SHARE,
    Served,
    check_span,
    choose_device,
    kept_bits,
    load,
    longest_runs,
)
from hexswarm.peer.memory import free_bytes
from hexswarm.peer.moving import Mover
from hexswarm.peer.pace import Pace
from hexswarm.peer.placement import Placement
from hexswarm.peer.scheduler import Policy, Scheduler
from hexswarm.peer.server import PeerServer
from hexswarm.peer.stage import StageTable
from hexswarm.peer.steps import Result
from hexswarm.peer.steptime import StepTime
from hexswarm.peer.surveying import Surveyor
from hexswarm.peer.telling import Teller
from hexswarm.progress import Progress
from hexswarm.records import DTYPES, PeerId
from hexswarm.scrape import Scrapes
from hexswarm.store import ModelFolder, resolve
from hexswarm.version import __version__
from hexswarm.wire import Frame

log = logging.getLogger(__name__)

STOP_S = 3.0
"""A device that hangs for longer than this is left behind."""


class Peer:
    """A peer of the swarm: `start`, then `serve` until told to stop, then `leave`."""

    def __init__(self, config: PeerConfig, progress: Progress) -> None:
        self.config = config
        member = Membership(config, RealClock(), software=f"hexswarm/{__version__}")
        self._identity_path = config.identity or config.folder / "identity" / "peer.key"
        identity = Identity.claim(self._identity_path)
        self._life = Life(config, member, identity, random.Random(identity.public))
        self._teller = Teller(self._life)
        self._mover = Mover(self._life, self._teller)
        self._surveyor = Surveyor(self._life)
        self._progress = progress
        self._stop = asyncio.Event()
        self._scrapes = Scrapes(self._teller.metrics)
        self.metrics_port: int | None = None
        """Of the loopback, where whoever watches this machine reads our numbers."""

    @property
    def peer(self) -> PeerId:
        return self._life.peer

    @property
    def served(self) -> Served:
        return self._life.served

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where others reach us, without the /p2p suffix."""
        return self._life.addresses

    def request_stop(self) -> None:
        """Begin to drain; safe from a signal handler."""
        self._stop.set()

    async def start(self) -> None:
        """Join, load and announce; afterwards others can use us."""
        config, life = self.config, self._life
        if config.metrics_port is not None:
            self.metrics_port = await self._scrapes.start("127.0.0.1", config.metrics_port)
        folder = await self._resolve(weights=False)
        if config.span is not None:
            check_span(config.span, folder.spec.layers)
        life.device, life.dtype = choose_device(config)
        life.folder = folder
        await life.member.join(self._on_frames, self._on_lost, identity=self._identity_path)
        life.member.follow(INDEX)
        await life.member.refresh()
        if config.span is None:
            self._choose_freely(folder)
        await self._mover.claim()
        claiming = asyncio.create_task(self._teller.for_ever())
        try:  # a slow disk outlives an announcement
            await self._load()
        finally:
            claiming.cancel()
            await asyncio.gather(claiming, return_exceptions=True)
        await self._surveyor.settle()
        await self._go_online()

    async def serve(self) -> None:
        """Serve until `request_stop`, then drain; move in between where that is wished."""
        async with asyncio.TaskGroup() as tasks:
            running = [
                tasks.create_task(self._teller.for_ever()),
                tasks.create_task(self._surveyor.for_ever()),
                tasks.create_task(self._mover.advise_for_ever()),
                tasks.create_task(self._life.member.transport.died()),
            ]
            while await self._serve_span(tasks) and await self._unless_stopped(self._move(), tasks):
                pass
            for task in running:
                task.cancel()

    async def leave(self) -> None:
        """Stop the device thread and the network, however far `start` had come."""
        await self._scrapes.close()
        if self._life.engine is not None:
            await asyncio.to_thread(self._life.engine.stop, STOP_S)
        await self._life.member.close()

    async def run(self, on_ready: Callable[[Peer], None]) -> None:
        """The whole life, from `start` to `leave`; a stop is obeyed at any moment of it."""
        try:
            starting = asyncio.create_task(self.start())
            stopping = asyncio.create_task(self._stop.wait())
            await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
            stopping.cancel()
            if not starting.done():
                starting.cancel()
                await asyncio.gather(starting, return_exceptions=True)
                return
            await starting
            on_ready(self)
            await self.serve()
        finally:
            await self.leave()

    # --- inside -------------------------------------------------------------------------------

    async def _resolve(self, **wanted: Any) -> ModelFolder:
        return await asyncio.to_thread(
            resolve, self.config.model, home=self.config.cache, progress=self._progress, **wanted
        )

    def _choose_freely(self, folder: ModelFolder) -> None:
        """Nobody gave us layers: we choose, and follow advice unless that is not wished."""
        life, config, digest = self._life, self.config, folder.spec.digest
        budget = config.memory or int(free_bytes(life.device) * MEMORY_SHARE)
        bits = kept_bits(config, folder, life.device, life.dtype)
        longest = longest_runs(folder, config.kv_tokens, life.dtype, budget, bits)
        hidden_bytes = folder.spec.hidden * DTYPES[life.dtype]
        life.placement = Placement(
            self.peer, digest, longest, hidden_bytes, life.rng, config.hole_s
        )
        if config.follow:
            life.advising = Advising(self.peer, digest, longest, hidden_bytes)
            life.member.follow_advice(digest)

    async def _load(self) -> None:
        """Load what is claimed."""
        life, span, began_s = self._life, self._life.claimed, self._life.clock.monotonic()
        folder = await self._resolve(span=span)
        life.served = await asyncio.to_thread(
            load, self.config, folder, span, life.device, life.dtype, self._progress
        )
        self._assemble()
        if life.advising is not None:
            life.advising.load_s = max(1.0, life.clock.monotonic() - began_s)

    def _assemble(self) -> None:
        life, served, spec = self._life, self.served, self.served.folder.spec
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
            clock=life.clock,
            deliver=self._on_results,
            pace=Pace(speed, served.span, spec.layers),
            forget=served.runner.forget,
        )
        table = StageTable(hosted, engine, Journal(self._journal_bytes()))
        server = PeerServer(table, engine, life.member.links, life.clock)
        engine.start()
        life.engine, life.server = engine, server

    def _journal_bytes(self) -> int:
        if self.config.journal is not None:
            return self.config.journal
        return min(DEFAULT_BYTES, free_bytes("cpu") // FREE_SHARE)

    def _on_frames(self, peer: PeerId, frames: list[Frame]) -> None:
        if self._life.server is not None:
            self._life.server.on_frames(peer, frames)

    def _on_lost(self, peer: PeerId, how: str) -> None:
        if self._life.server is not None:
            self._life.server.on_lost(peer, how)

    def _on_results(self, results: list[Result]) -> None:
        if self._life.server is not None:
            self._life.server.deliver(results)

    async def _go_online(self) -> None:
        life = self._life
        life.state = "online"
        life.online_s = life.clock.monotonic()
        if life.placement is not None:
            life.placement.speed = self.served.measured.speed
            life.placement.settle(life.online_s)
        await self._teller.announce()

    async def _serve_span(self, tasks: asyncio.TaskGroup) -> bool:
        """Serve these layers and drain; True: to serve others, False: because we shall stop."""
        server = self._life.server
        assert server is not None
        expiring = tasks.create_task(server.expire_for_ever())
        moving = await self._unless_stopped(self._mover.wish(), tasks)
        self._life.state = "draining"
        await server.drain(self.config.drain_s, self._teller.announce)
        expiring.cancel()
        return moving and not self._stop.is_set()

    async def _unless_stopped(
        self, work: Coroutine[Any, Any, None], tasks: asyncio.TaskGroup
    ) -> bool:
        """True when `work` is done, False if we were told to stop before that."""
        working, stopping = tasks.create_task(work), tasks.create_task(self._stop.wait())
        await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
        done = working.done()
        for task in (working, stopping):
            task.cancel()
        return done

    async def _move(self) -> None:
        """From drained to online with the claimed layers."""
        life = self._life
        log.warning("moving from layers %s to %s", self.served.span, life.claimed)
        engine, life.engine, life.server = life.engine, None, None
        assert engine is not None
        await asyncio.to_thread(engine.stop, STOP_S)
        life.state = "joining"
        del life.served, engine
        gc.collect()  # the old weights go before the new ones come
        await self._mover.claim_again()
        await self._load()
        await self._go_online()


async def run_peer(
    config: PeerConfig,
    progress: Progress,
    on_ready: Callable[[Peer], None],
    stop_with: Callable[[Callable[[], None]], None],
) -> None:
    """Run a peer until it is told to stop; `stop_with` registers how to tell it."""
    peer = Peer(config, progress)
    stop_with(peer.request_stop)
    await peer.run(on_ready)
