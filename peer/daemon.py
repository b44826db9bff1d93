"""`hexswarm peer`: from a config to a peer that serves, and back out again without loss.

    resolve model ─ join ─ claim a span ─ load ─ probe ─ settle ─ announce ─ serve ─ drain ─ leave

A peer that was given no span may move while it lives: drain, load, announce, serve again. A peer
whose host is lost (a rank of its group died or froze, see `hosting`) fails its sessions at once,
tells that it is joining, and starts the host again with the same layers. Each part is somebody
else's (store, loading, engine, stage table, links; `moving` chooses layers, `telling` announces,
`surveying` measures); this file owns the order in which they start and end.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import random
from collections.abc import Callable, Coroutine
from typing import Any, Literal

from hexswarm.clock import RealClock
from hexswarm.config import PeerConfig
from hexswarm.directory import INDEX
from hexswarm.errors import HexswarmError, MemberLost
from hexswarm.identity import Identity
from hexswarm.membership import Membership
from hexswarm.peer.actions import STEP
from hexswarm.peer.advising import Advising
from hexswarm.peer.assembly import assemble
from hexswarm.peer.away import answers
from hexswarm.peer.fitting import MEMORY_SHARE, kept_bits, longest_runs
from hexswarm.peer.groups.actions import AUTO
from hexswarm.peer.groups.entry import enter
from hexswarm.peer.hosting import Machine
from hexswarm.peer.life import Life
from hexswarm.peer.loading import Served, check_span, choose_device, load
from hexswarm.peer.memory import free_bytes
from hexswarm.peer.moving import Mover
from hexswarm.peer.placement import Placement
from hexswarm.peer.server import PeerServer
from hexswarm.peer.steps import Result
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
LOST_STOP_S = 15.0
"""For a device thread to come back from a sum that was ended, on GPUs after seconds of polling."""
LOOK_S = 0.25
"""So often the host is asked whether it is lost."""

End = Literal["stopping", "moving", "lost"]
"""Why layers are served no longer."""


class Peer:
    """A peer of the swarm: `start`, then `serve` until told to stop, then `leave`."""

    def __init__(
        self,
        config: PeerConfig,
        progress: Progress,
        on_waiting: Callable[[Peer], None] = lambda peer: None,
    ) -> None:
        """`on_waiting` is called when others may ask us into their group."""
        self.config, self._on_waiting = config, on_waiting
        member = Membership(config, RealClock(), software=f"hexswarm/{__version__}")
        self._identity_path = config.identity or config.folder / "identity" / "peer.key"
        identity = Identity.claim(self._identity_path)
        self._life = Life(config, member, identity, random.Random(identity.public))
        self._life.hosting = Machine(config, self._life.clock)
        self._teller = Teller(self._life)
        self._mover = Mover(self._life, self._teller)
        self._surveyor = Surveyor(self._life)
        self._progress = progress
        self._stop = asyncio.Event()
        self._grouping: asyncio.Task[None] | None = None
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
        if config.span is None and config.group in ("off", AUTO):
            self._choose_freely(folder)
        await self._mover.claim()
        if config.group != "off":
            await self._offer()
        claiming = asyncio.create_task(self._teller.for_ever())
        try:  # a slow disk outlives an announcement
            await self._load_first()
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
            while (end := await self._serve_span(tasks)) != "stopping":
                again = self._move() if end == "moving" else self._recover()
                if not await self._unless_stopped(again, tasks):
                    break
            for task in running:
                task.cancel()

    async def leave(self) -> None:
        """Stop the device thread, its host and the network, however far `start` had come."""
        await self._scrapes.close()
        try:
            await self._leave_group()
        finally:
            await self._close_host()
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
        bits = kept_bits(config, folder, life.device, life.dtype)
        places, ranks = life.hosting.places(life.device), None
        budget = config.memory or int(free_bytes(life.device) * MEMORY_SHARE)
        if places is not None:
            places = places.share(MEMORY_SHARE, config.memory)
            budget, ranks = sum(places.rooms_bytes), (config.tensor_parallel, places)
        longest = longest_runs(folder, config.kv_tokens, life.dtype, budget, bits, ranks)
        hidden_bytes = folder.spec.hidden * DTYPES[life.dtype]
        life.placement = Placement(
            self.peer, digest, longest, hidden_bytes, life.rng, config.hole_s
        )
        if config.follow:
            life.advising = Advising(self.peer, digest, longest, hidden_bytes)
            life.member.follow_advice(digest)

    async def _offer(self) -> None:
        """Be to be had for groups, from now to the end."""
        life = self._life
        life.addresses = await life.member.transport.addresses()
        life.groups = groups = await enter(life, life.hosting, self._progress)
        life.hosting = groups
        self._grouping = asyncio.create_task(groups.run_for_ever())
        self._grouping.add_done_callback(lambda _: self._stop.set())
        if not groups.formation.single(groups.own()):
            self._on_waiting(self)

    async def _leave_group(self) -> None:
        """Tell the others; raises what kept us from being in groups."""
        if self._life.groups is not None and self._grouping is not None:
            self._grouping.cancel()
            await self._life.groups.close()
            with contextlib.suppress(asyncio.CancelledError):
                await self._grouping

    async def _load_first(self) -> None:
        """Others of a group may be lost again before it serves; our own devices are not."""
        life = self._life
        while True:
            await life.hosting.ready()
            try:
                await self._load()
                return
            except MemberLost as error:
                if life.groups is None:
                    raise
                life.hosting.lost(error)

    async def _load(self) -> None:
        """Load what is claimed; the host is ready to be started."""
        life, span, began_s = self._life, self._life.claimed, self._life.clock.monotonic()
        folder = await self._resolve(span=span)
        given = (folder, span, life.device, life.dtype, self._progress, life.hosting)
        life.served = await asyncio.to_thread(load, self.config, *given)
        life.engine, life.server = assemble(life, self._on_results)
        if life.advising is not None:
            life.advising.load_s = max(1.0, life.clock.monotonic() - began_s)

    def _on_frames(self, peer: PeerId, frames: list[Frame]) -> None:
        if self._life.groups is not None:
            frames = self._life.groups.on_frames(peer, frames)
        if self._life.server is not None:
            self._life.server.on_frames(peer, frames)
        elif said := answers(self.peer, frames):
            self._life.member.links.send(peer, [(message, b"") for message in said], STEP)

    def _on_lost(self, peer: PeerId, how: str) -> None:
        if self._life.groups is not None:
            self._life.groups.on_lost(peer)
        if self._life.server is not None:
            self._life.server.on_lost(peer, how)

    def _on_results(self, results: list[Result]) -> None:
        server = self._life.server
        if server is None:
            return  # late
        if self._lost is None:
            server.deliver(results)
        else:  # numbers of ranks that are not in step mean nothing
            self._fail(self._lost)

    async def _go_online(self) -> None:
        life = self._life
        life.state = "online"
        life.online_s = life.clock.monotonic()
        if life.placement is not None:
            life.placement.speed = self.served.measured.speed
            life.placement.settle(life.online_s)
        await self._teller.announce()

    async def _serve_span(self, tasks: asyncio.TaskGroup) -> End:
        """Serve these layers, and drain unless they are lost: why that ended."""
        life, server = self._life, self._life.server
        assert server is not None
        expiring = tasks.create_task(server.expire_for_ever())
        losing = tasks.create_task(self._watch())
        serving = tasks.create_task(self._serve_and_drain(server, tasks))
        await asyncio.wait({losing, serving}, return_when=asyncio.FIRST_COMPLETED)
        for task in (expiring, losing, serving):
            task.cancel()
        if life.server is None:
            return "stopping" if self._stop.is_set() else "lost"
        return "moving" if serving.result() and not self._stop.is_set() else "stopping"

    async def _serve_and_drain(self, server: PeerServer, tasks: asyncio.TaskGroup) -> bool:
        """True if we wish to move."""
        grouped = self._life.groups is not None and self._life.groups.leading
        wish = asyncio.Event().wait() if grouped else self._mover.wish()
        moving = await self._unless_stopped(wish, tasks)
        self._life.state = "draining"
        await server.drain(self.config.drain_s, self._teller.announce)
        return moving

    @property
    def _lost(self) -> MemberLost | None:
        """Why the host can compute no longer."""
        return self.served.host.lost

    async def _watch(self) -> None:
        """Return when the host is lost; its sessions are failed then."""
        while self._life.server is not None:
            if (lost := self._lost) is not None:
                self._fail(lost)
                return
            await asyncio.sleep(LOOK_S)

    def _fail(self, lost: MemberLost) -> None:
        """Hand all sessions back at once, and serve no longer."""
        life, server = self._life, self._life.server
        if server is None:
            return
        log.error("the host of layers %s is lost: %s", self.served.span, lost.cause)
        server.carry_out(server.table.end_all())
        life.server, life.state, life.claimed = None, "joining", self.served.span

    async def _unless_stopped(
        self, work: Coroutine[Any, Any, Any], tasks: asyncio.TaskGroup
    ) -> bool:
        """True when `work` is done, False if we were told to stop before that."""
        working, stopping = tasks.create_task(work), tasks.create_task(self._stop.wait())
        try:
            await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
            return working.done()
        finally:
            for task in (working, stopping):
                task.cancel()

    async def _move(self) -> None:
        """From drained to online with the claimed layers."""
        life = self._life
        log.warning("moving from layers %s to %s", self.served.span, life.claimed)
        life.server = None
        await self._close_host()
        life.state = "joining"
        await self._mover.claim_again()
        await life.hosting.ready()
        await self._load()
        await self._go_online()

    async def _recover(self) -> None:
        """From a lost host to online with the same layers; raises when the hosting gives up."""
        life, lost = self._life, self._lost
        assert lost is not None
        _forget_where(lost)
        await self._close_host()
        life.hosting.lost(lost)
        while True:
            await life.hosting.ready()
            try:
                await self._load()
                break
            except HexswarmError as error:
                log.error("the host does not start again: %s", error)
                _forget_where(error)
                life.hosting.lost(error)
        await self._go_online()

    async def _close_host(self) -> None:
        """End the device thread and its host, and let go of the weights before others come."""
        life, engine, self._life.engine = self._life, self._life.engine, None
        if engine is None:
            return
        served = life.served
        lost = served.host.lost
        stopped = await asyncio.to_thread(engine.stop, STOP_S if lost is None else LOST_STOP_S)
        await asyncio.to_thread(served.host.close)
        if lost is not None and not stopped and not self._stop.is_set():
            raise MemberLost(lost.rank, lost.peer, lost.epoch, f"{lost.how}; the device hangs")
        del life.served, served, engine
        gc.collect()


def _forget_where(error: BaseException) -> None:
    """Where it was raised: the frames hold the weights that have to go."""
    error.__traceback__ = error.__cause__ = error.__context__ = None


async def run_peer(
    config: PeerConfig,
    progress: Progress,
    on_ready: Callable[[Peer], None],
    stop_with: Callable[[Callable[[], None]], None],
    on_waiting: Callable[[Peer], None] = lambda peer: None,
) -> None:
    """Run a peer until it is told to stop; `stop_with` registers how to tell it."""
    peer = Peer(config, progress, on_waiting)
    stop_with(peer.request_stop)
    await peer.run(on_ready)
