"""A simulated peer that offers itself for a group of its LAN (`hexswarm peer --group NAME`).

Real are, beside what `peers.py` lists: `Grouped` and all that it decides with (`Formation`, `Talk`
with signed invitations over links, `Near`, policy and division), and the epochs' `Exchange`, words
and checks. Doubles, each for one reason:

- epochs, streams and the device: threads, sockets and tensors (`epochs.py`, `direct.py`,
  `collective.py`, `parts.py`);
- `GroupPeer` mirrors the order in which `hexswarm.peer.daemon.Peer` waits for a group, serves,
  fails its sessions when the host is lost, and starts again; to `Grouped` it is the `Life`.

Peers of one LAN are 0.4 ms apart. Those of a named group wait for it and hold nothing meanwhile;
those of `auto` serve by themselves until policy says that they are faster together.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hexswarm.config import PeerConfig
from hexswarm.directory import INDEX
from hexswarm.errors import HexswarmError, MemberLost
from hexswarm.peer.actions import STEP
from hexswarm.peer.admission import Hosted
from hexswarm.peer.announcer import Announcer
from hexswarm.peer.away import answers
from hexswarm.peer.cache import BLOCK_TOKENS
from hexswarm.peer.cuts import Sizes
from hexswarm.peer.groups.actions import Facts, Own
from hexswarm.peer.groups.formation import Formation
from hexswarm.peer.groups.grouped import Grouped
from hexswarm.peer.groups.single import Single
from hexswarm.peer.groups.streams import Place
from hexswarm.peer.journal import Journal
from hexswarm.peer.server import PeerServer
from hexswarm.peer.stage import StageTable
from hexswarm.peer.steps import Result
from hexswarm.records import SHARES_SUM, Announcement, Coordinates, PeerId, Span
from hexswarm.wire import Frame
from tests.loopback import MODEL
from tests.simulation.direct import VirtualDoor
from tests.simulation.epochs import GroupEngine, VirtualEpoch, VirtualLed
from tests.simulation.parts import Part
from tests.simulation.peers import (
    DRAIN_S,
    Member,
    PeerSpec,
    SimulatedPeer,
    VirtualEngine,
    identity,
)
from tests.simulation.processes import Process, ProcessClock

if TYPE_CHECKING:
    from tests.simulation.world import World

LAN_DELAY_S = 2e-4
"""One way."""
STOP_S = 3.0
LOST_STOP_S = 15.0
LOOK_S = 0.25
"""As in `hexswarm.peer.daemon`."""
ROOM_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class GroupSpec(PeerSpec):
    """What was drawn for one peer of a LAN."""

    name: str = "lan"
    """Of the group that it waits for."""
    size: int = 2
    leads: bool = False
    load_s: float = 1.0


class Alone:
    """A host of one device, as `hexswarm.peer.hosting.Alone`: never lost."""

    shard, title, lost = None, "", None

    def guard(self) -> None:
        """As there."""

    def close(self) -> None:
        """As there."""


class VirtualMachine:
    """What hosts the layers of a peer by itself, as `hexswarm.peer.hosting.Machine`."""

    async def ready(self) -> None:
        """At once: it never failed."""

    def start(self, *given: Any) -> Alone:
        return Alone()

    def lost(self, error: HexswarmError) -> None:
        """Of a device that cannot be lost."""


class GroupPeer(SimulatedPeer):
    """One process; a restart makes a new one."""

    engine: Any
    table: Any
    server: Any

    def __init__(self, spec: GroupSpec, world: World, rng: random.Random) -> None:
        self.spec, self.peer, self.world = spec, spec.peer, world
        self.process = Process(f"peer{spec.number}")
        self.transport = world.wires.transport(self.process, self.peer)
        self.config = PeerConfig(group=spec.name, group_size=spec.size, drain_s=DRAIN_S)
        self.member = Member(self.config, ProcessClock(self.process), software="simulated")
        self.clock, self.identity = self.member.clock, identity(spec.number)
        self.member.enter(self.transport, world.board, self._on_frames, self._on_lost, 8.0)
        self.engine = self.table = self.server = None
        self.claimed, self.state, self.gone = spec.span, "joining", False
        self.lie = lambda said: said
        self.slow = 1.0
        self.host: VirtualLed | Single | None = None
        self.epochs: list[VirtualEpoch] = []
        """All that it was ever in."""
        self.said: Announcement | None = None
        self._rng, self._announcer = rng, Announcer(spec.blocks * BLOCK_TOKENS, rng)
        self._place: Coordinates | None = None
        self._addresses: tuple[str, ...] = ()
        self.door = VirtualDoor(world.wires, self.process, self.peer)
        self.groups = self.process.call(self._make_groups)

    def _make_groups(self) -> Grouped:
        spec, machine = self.spec, VirtualMachine()
        facts = Facts(
            *(self.peer, spec.name, spec.size, MODEL, spec.layers, "float32"),
            *("10.0.0.1", 1 + spec.number, spec.leads, spec.blocks * BLOCK_TOKENS, 4, sizes_of),
        )
        own, formation = Own(spec.span, ROOM_BYTES, spec.layer_s), Formation(facts, self._rng)
        given: Any = (self, machine, formation, self.door, self._begin, own)
        return Grouped(*given)

    # --- life -----------------------------------------------------------------------------------

    async def serve(self) -> None:
        """As the daemon does, until cancelled."""
        await self.member.begin(listen=True)
        self.member.follow(INDEX)
        with contextlib.suppress(HexswarmError):
            await self.member.refresh()
        self._addresses = await self.transport.addresses()
        await self.door.listen()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.groups.run_for_ever())
            tasks.create_task(self._announce_for_ever())
            tasks.create_task(self._measure_for_ever())
            await self._start()
            while True:
                await self._serve_span(tasks)
                await self._recover()

    async def drain(self) -> None:
        self.state = "draining"
        if self.server is not None:
            await self.server.drain(DRAIN_S, self._announce)

    async def leave(self) -> None:
        self.gone = True
        await self.groups.close()
        await self._close_host()
        for epoch in self.epochs:
            if epoch.task is not None and not epoch.task.done():
                epoch.task.cancel()
                await asyncio.wait({epoch.task})
        await self.door.leave()
        await self.member.close()

    def halt(self) -> None:
        if self.engine is not None:
            self.engine.stop()

    def set_slow(self, times: float) -> None:
        self.slow = times
        if self.engine is not None:
            self.engine.slow = times

    @property
    def present(self) -> VirtualEpoch | None:
        """The epoch that it takes part in."""
        live = [epoch for epoch in self.epochs if epoch.group is not None]
        return live[-1] if live else None

    @property
    def fellows(self) -> set[PeerId]:
        """Those on whom it depends, session or not."""
        begun = self.groups._begun
        return set() if begun is None else {seat.peer for seat in begun.place.invitation.seats}

    # --- inside ---------------------------------------------------------------------------------

    async def _start(self) -> None:
        """As `_load_first` and `_go_online`."""
        while True:
            await self.groups.ready()
            try:
                await self._load()
                break
            except MemberLost as error:
                self.groups.lost(error)
        await self._go_online()

    async def _load(self) -> None:
        host: Any = self.groups.start(None, self.spec.span, "cpu", "float32", None)  # type: ignore[arg-type]
        spec, world = self.spec, self.world
        given = (spec, self.clock, self._deliver, self._on_row)
        if isinstance(host, Single):
            await asyncio.sleep(spec.load_s)
            engine = VirtualEngine(*given)
            engine.slow = self.slow
        else:
            try:
                await host.teller.make_pool(spec.blocks)
            except BaseException:
                host.close()
                raise
            engine = GroupEngine(*given, host)
        self.host, self.engine = host, engine
        self.engine.on_pick = lambda row: world.on_pick(self, row)
        hosted = Hosted(self.peer, MODEL, spec.span, spec.layers, 1)
        self.table = StageTable(hosted, self.engine, Journal(spec.journal_bytes))
        self.server = PeerServer(self.table, self.engine, self.member.links, self.clock)
        self.engine.start()

    async def _go_online(self) -> None:
        self.state = "online"
        if self.groups.leading:
            self.world.watch.served(self)
        await self._announce()

    async def _serve_span(self, tasks: asyncio.TaskGroup) -> None:
        expiring = tasks.create_task(self.server.expire_for_ever())
        while self.server is not None:
            if self.host is not None and self.host.lost is not None:
                self._fail()
                break
            await asyncio.sleep(LOOK_S)
        expiring.cancel()

    def _fail(self) -> None:
        """Hand all sessions back at once."""
        server, self.server, self.state = self.server, None, "joining"
        server.carry_out(server.table.end_all())

    async def _recover(self) -> None:
        assert self.host is not None
        lost = self.host.lost
        assert lost is not None
        await self._close_host()
        self.groups.lost(lost)
        await self._start()

    async def _close_host(self) -> None:
        engine, host = self.engine, self.host
        if engine is None or host is None:
            return
        self.engine, lost = None, host.lost
        engine.stop()
        if isinstance(engine, GroupEngine):
            halted = await engine.halted(STOP_S if lost is None else LOST_STOP_S)
            if lost is not None and not halted:
                self.world.judge.blame("I12", f"{self.process.name}: the device hangs")
        host.close()
        self.host = self.server = self.table = None

    def _begin(self, place: Place, owner: Any, before: VirtualEpoch | None) -> VirtualEpoch:
        world = self.world
        epoch = VirtualEpoch(
            *(place, owner, before),
            door=self.door,
            part=self._part,
            load_s=self.spec.load_s,
            account=world.watch.account,
            clock=self.clock,
            layers=self.spec.layers,
            on_wrong=lambda wrong: world.judge.blame("I10", f"{self.process.name}: {wrong!r}"),
        )
        self.epochs.append(epoch)
        return epoch

    def _part(self, place: Place) -> Part:
        asked = place.invitation
        share = asked.shares[place.rank] / SHARES_SUM

        async def waits(tokens: int) -> None:
            speed, layers = self.spec.speed, len(asked.span)
            rest_s = (tokens - 1) * speed.prefill_layer_s
            await asyncio.sleep(self.slow * share * layers * (speed.decode_layer_s + rest_s))

        part = Part(place, asked.span, waits)
        part.process = self.process
        return part

    def _on_row(self, row: Any) -> None:
        if self.engine is not None:
            self.world.on_row(self, row)

    def _on_frames(self, peer: PeerId, frames: list[Frame]) -> None:
        frames = self.groups.on_frames(peer, frames)
        if self.server is not None:
            self.server.on_frames(peer, frames)
        elif said := answers(self.peer, frames):
            self.member.links.send(peer, [(message, b"") for message in said], STEP)

    def _on_lost(self, peer: PeerId, how: str) -> None:
        self.groups.on_lost(peer)
        if self.server is not None:
            self.server.on_lost(peer, how)

    def _deliver(self, results: list[Result]) -> None:
        if self.server is None:
            return
        if self.host is None or self.host.lost is None:
            self.server.deliver(results)
        else:
            self._fail()

    def _current(self) -> Announcement:
        if self.engine is not None:
            return self.groups.announced(super()._current())
        spec = self.spec
        claim = Announcement(
            peer=self.peer,
            model=MODEL,
            model_name="Integers",
            layers=spec.layers,
            span=self.claimed,
            state="joining",
            dtype="float32",
            device="cpu",
            speed=spec.speed,
            free_kv_tokens=0,
            queue_s=0.0,
            addresses=self._addresses,
            software="simulated",
            coordinates=self._place,
        )
        return self.groups.announced(claim)


def sizes_of(span: Span) -> Sizes:
    """Of no model in particular, with four heads to deal out."""
    return Sizes(64, 8, 4, 16, 128, 256, len(span), word_matrices=1)
