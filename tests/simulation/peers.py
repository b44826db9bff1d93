"""A simulated peer: everything of the product but the tensors, the thread and the DHT.

Real are `StageTable`, `PeerServer`, `Engine` (admission, leases, scheduler, load, cancelling),
`Announcer`, `Links`, `Membership`. Doubles, each for one reason:

- `VirtualEngine`: the engine without its thread. One batch at a time; it is computed when its time
  is over, so that whatever happens meanwhile (a session closes, a route is rewired) happens to a
  batch that runs. A stopped process computes nothing: its timers do not run.
- `Cells`: the runner is `tests.loopback.IntegerModel`, whose KV cells are poisoned when a block is
  erased; a gap in the KV raises. It also keeps the account of what was computed for the
  invariants.
- the DHT (`board.py`) and the network below the frames (`wires.py`).

`SimulatedPeer` mirrors the order in which `hexswarm.peer.daemon.Peer` starts, announces, measures
and drains; that file loads tensors and cannot be imported here.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from hexswarm.clock import Clock
from hexswarm.config import ClientConfig
from hexswarm.directory import INDEX, sign
from hexswarm.identity import Identity
from hexswarm.links import Links
from hexswarm.membership import Membership
from hexswarm.peer.admission import Hosted
from hexswarm.peer.announcer import Announcer
from hexswarm.peer.attempts import Job
from hexswarm.peer.cache import BLOCK_TOKENS, BlockTables
from hexswarm.peer.engine import Engine
from hexswarm.peer.journal import Journal
from hexswarm.peer.neighbours import to_announce, to_measure
from hexswarm.peer.pace import Pace
from hexswarm.peer.scheduler import Policy, Scheduler
from hexswarm.peer.server import PeerServer
from hexswarm.peer.stage import StageTable
from hexswarm.peer.steps import Batch, Result, SessionKey
from hexswarm.peer.steptime import StepTime
from hexswarm.records import Announcement, Coordinates, PeerId, Span, Speed, State
from hexswarm.router import vivaldi
from hexswarm.wire import Frame
from tests.loopback import MODEL, IntegerModel
from tests.simulation.board import Board, BoardDht
from tests.simulation.processes import Process, ProcessClock
from tests.simulation.wires import WiredTransport, Wires

TICK_S = 0.5
MEASURE_EVERY_S = 20.0
LEASE_S = 20.0
DRAIN_S = 12.0
POLICY = Policy(chunk_tokens=16, chunk_floor=16, efficient_tokens=16)
"""Pieces of 16 tokens, so that prompts of a few dozen are cut."""


@cache
def identity(number: int) -> Identity:
    """The same few keys in every world: to make one takes longer than to use it."""
    return Identity(number.to_bytes(32, "big"))


@cache
def name_of(number: int) -> PeerId:
    return identity(number).peer


@dataclass(frozen=True, slots=True)
class PeerSpec:
    """What was drawn for one peer."""

    number: int
    span: Span
    layers: int
    blocks: int
    layer_s: float
    """Seconds a layer of a batch of one."""
    journal_bytes: int = 1 << 20

    @property
    def peer(self) -> PeerId:
        return name_of(self.number)

    @property
    def speed(self) -> Speed:
        return Speed(self.layer_s, self.layer_s / 8, self.layer_s / 2, self.layer_s / 6)


class Member(Membership):
    """`Membership` over the simulated network and board: joining differs, nothing else."""

    dht: Any

    def enter(
        self,
        transport: WiredTransport,
        board: Board,
        on_frames: Callable[[PeerId, list[Frame]], None],
        on_lost: Callable[[PeerId, str], None],
        silence_s: float,
    ) -> None:
        self.transport = transport  # type: ignore[assignment]
        self.dht = BoardDht(board)
        self.links = Links(transport, self.clock, on_frames, on_lost, silence_s=silence_s)

    async def begin(self, *, listen: bool) -> None:
        await self.links.start(listen=listen)
        self._joined_s = self.clock.monotonic()
        self._refresher = asyncio.create_task(self._refresh_for_ever())

    def _remember(self) -> None:
        """Nothing is written to disk."""


class Cells:
    """The runner: exact integers, and an account of every position that was computed."""

    def __init__(self, spec: PeerSpec, clock: DeviceClock, on_row: OnRow) -> None:
        self.model = IntegerModel(spec.span, spec.layers, spec.blocks)
        self.computed: Counter[tuple[SessionKey, int, int, int]] = Counter()
        """(session, epoch, turn, position) -> how often."""
        self._clock = clock
        self._on_row = on_row

    def run(self, batch: Batch) -> Sequence[Result]:
        self._clock.ended()
        results = []
        for row in batch.rows:
            self._on_row(row)
            results.append(self.model.run(row))
        return results


OnRow = Callable[[Any], None]


class DeviceClock:
    """A process's clock, which shows the start of a batch until the runner is called."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._began_s: float | None = None

    def monotonic(self) -> float:
        return self._clock.monotonic() if self._began_s is None else self._began_s

    def wall(self) -> float:
        return self._clock.wall()

    def began(self, at_s: float) -> None:
        self._began_s = at_s

    def ended(self) -> None:
        self._began_s = None


class VirtualEngine(Engine):
    """See the module."""

    def __init__(
        self,
        spec: PeerSpec,
        clock: Clock,
        deliver: Any,
        on_row: OnRow,
        *,
        cells: Any = None,
        device: DeviceClock | None = None,
    ) -> None:
        """`cells` compute instead of our own, and know the clock of the `device`."""
        self._device = device or DeviceClock(clock)
        self.tables = BlockTables(spec.blocks, lease_s=LEASE_S)
        self.cells = cells or Cells(spec, self._device, on_row)
        self._spec = spec
        self.slow = 1.0
        """Times as long as announced."""
        self._computing: Batch | None = None
        self._timer: asyncio.TimerHandle | None = None
        self.on_pick: OnRow = lambda row: None
        policy = replace(POLICY, head=spec.span.first == 0)
        times = StepTime.probed(spec.speed, len(spec.span))
        scheduler = Scheduler(policy, self.tables.blocks, times=times)
        pace = Pace(spec.speed, spec.span, spec.layers)
        runner, tables = self.cells, self.tables
        super().__init__(
            runner,
            scheduler,
            tables,
            clock=self._device,
            deliver=deliver,
            pace=pace,
            forget=runner.model.poison,
        )

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()

    def stop(self, timeout_s: float = 10.0) -> bool:
        self._stopping = True
        if self._timer is not None:
            self._timer.cancel()
        return True

    @property
    def alive(self) -> bool:
        return not self._stopping

    def submit(self, steps: Any) -> None:
        super().submit(steps)
        self._go_on()

    def _go_on(self) -> None:
        """Begin with the next batch if nothing is computed now."""
        if self._computing is not None or self._stopping:
            return
        assert self._loop is not None
        if self._ended:  # as the device does between two batches
            self._erase()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        now = self._device.monotonic()
        picked = self._scheduler.pick(now)
        if picked is None:
            return
        if not isinstance(picked, Batch):
            self._timer = self._loop.call_at(picked.until, self._go_on)
            return
        for row in picked.rows:
            self.on_pick(row)
        self._computing = picked
        self._compute(picked, now)

    def _compute(self, picked: Batch, now: float) -> None:
        """Call `_over` when it is computed."""
        assert self._loop is not None
        self._timer = self._loop.call_later(self._seconds(picked), self._over, now)

    def _seconds(self, batch: Batch) -> float:
        speed, layers = self._spec.speed, len(self._spec.span)
        decodes = sum(row.decode for row in batch.rows)
        tokens = batch.tokens - decodes
        rows_s = speed.decode_layer_s + decodes * speed.row_layer_s
        return self.slow * layers * (rows_s + tokens * speed.prefill_layer_s)

    def _over(self, began_s: float) -> None:
        batch, self._computing, self._timer = self._computing, None, None
        assert batch is not None
        self._device.began(began_s)
        try:
            self._begin(Job(batch, []))
        finally:
            self._device.ended()
        self._go_on()

    def _post(self, results: list[Result]) -> None:
        assert self._loop is not None
        self._loop.call_soon(self._deliver, results)


class SimulatedPeer:
    """One process that serves; a restart makes a new one."""

    def __init__(
        self, spec: PeerSpec, wires: Wires, board: Board, rng: random.Random, on_row: Any
    ) -> None:
        self.spec, self.peer = spec, spec.peer
        self.process = Process(f"peer{spec.number}")
        self.transport = wires.transport(self.process, self.peer)
        self.member = Member(ClientConfig(), ProcessClock(self.process), software="simulated")
        clock = self.clock = self.member.clock
        self.engine = VirtualEngine(spec, clock, self._deliver, lambda row: on_row(self, row))
        hosted = Hosted(self.peer, MODEL, spec.span, spec.layers, 1)
        self.table = StageTable(hosted, self.engine, Journal(spec.journal_bytes))
        self.member.enter(self.transport, board, self._on_frames, self._on_lost, 8.0)
        self.server = PeerServer(self.table, self.engine, self.member.links, clock)
        self.lie: Callable[[Announcement], Announcement] = lambda said: said
        self.state: State = "online"
        self.gone = False
        """Left of its own will, or was killed."""
        self.said: Announcement | None = None
        """Its last word."""
        self.main: asyncio.Task[None]
        """What `serve` runs in."""
        self._rng = rng
        self._announcer = Announcer(spec.blocks * BLOCK_TOKENS, rng)
        self._place: Coordinates | None = None
        self._addresses: tuple[str, ...] = ()

    # --- life -----------------------------------------------------------------------------------

    async def serve(self) -> None:
        """As the daemon does, until cancelled."""
        self.engine.start()
        await self.member.begin(listen=True)
        self.member.follow(INDEX)
        self._addresses = await self.transport.addresses()
        await self._announce()
        async with asyncio.TaskGroup() as group:
            group.create_task(self._announce_for_ever())
            group.create_task(self._measure_for_ever())
            group.create_task(self.server.expire_for_ever())

    async def drain(self) -> None:
        """SIGTERM."""
        self.state = "draining"
        await self.server.drain(DRAIN_S, self._announce)

    async def leave(self) -> None:
        """Close everything, as a process that ends well."""
        self.gone = True
        self.engine.stop()
        await self.member.close()

    def halt(self) -> None:
        """It was killed."""
        self.engine.stop()

    def set_slow(self, times: float) -> None:
        self.engine.slow = times

    @property
    def fellows(self) -> set[PeerId]:
        """Those on whom it depends whether there are sessions or not: nobody."""
        return set()

    # --- inside ---------------------------------------------------------------------------------

    def _on_frames(self, peer: PeerId, frames: list[Frame]) -> None:
        self.server.on_frames(peer, frames)

    def _on_lost(self, peer: PeerId, how: str) -> None:
        self.server.on_lost(peer, how)

    def _deliver(self, results: list[Result]) -> None:
        self.server.deliver(results)

    def _current(self) -> Announcement:
        spec, load, links = self.spec, self.engine.load_now(), self.member.links
        known = {item.peer for item in self.member.others()}
        rtts = {peer: rtt_s for peer, rtt_s in links.rtts.items() if peer in known}
        return self.lie(
            Announcement(
                peer=self.peer,
                model=MODEL,
                model_name="Integers",
                layers=spec.layers,
                span=spec.span,
                state=self.state,
                dtype="float32",
                device="cpu",
                speed=self.engine.speed_now() or spec.speed,
                free_kv_tokens=load.free_kv_tokens,
                queue_s=load.queue_s,
                addresses=self._addresses,
                neighbours=to_announce(rtts, links.used_within(600.0)),
                software="simulated",
                rows=load.rows,
                busy=load.busy,
                kv_tokens=spec.blocks * BLOCK_TOKENS,
                coordinates=self._place,
            )
        )

    async def _announce(self) -> None:
        current = self._current()
        now, wall = self.clock.monotonic(), self.clock.wall()
        if not self._announcer.due(current, now):
            return
        stamped, expires_s = self._announcer.stamp(current, now, wall)
        self.said = stamped
        await self.member.announce(sign(stamped, expires_s, identity(self.spec.number)))

    async def _announce_for_ever(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            await self._announce()

    async def _measure_for_ever(self) -> None:
        while True:
            await self._measure()
            await asyncio.sleep(MEASURE_EVERY_S)

    async def _measure(self) -> None:
        others = self.member.others()
        chosen = to_measure(others, self._place, self._rng)
        targets = [(item.peer, item.addresses) for item in chosen]
        ways = await self.member.links.measure_all(targets, 1, 3.0)
        samples = [
            (item.coordinates, ways[item.peer].rtt_s) for item in chosen if item.peer in ways
        ]
        for at, rtt_s in samples:
            self._place = vivaldi.step(self._place, at, rtt_s, self._rng)
