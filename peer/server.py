"""The effects of a peer's sessions: frames to the stage table, steps to the engine, results back.

Everything decided lives in `stage.py` (sessions), `admission.py` (who gets one), `scheduler.py`
(batches) and `cache.py` (KV); this file only moves things between them and the links, on the event
loop.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import replace

from hexswarm.clock import Clock
from hexswarm.errors import HexswarmError
from hexswarm.links import Links, Outgoing
from hexswarm.peer.actions import STEP, Action, Dial, Drop, Report, Send, Submit, Watch
from hexswarm.peer.engine import Engine
from hexswarm.peer.stage import StageTable
from hexswarm.peer.steps import Result, Step
from hexswarm.peer.tracing import UNMEASURED_S
from hexswarm.records import PeerId
from hexswarm.wire import Frame

EXPIRE_EVERY_S = 1.0
"""How exactly leases end. Reservations end to the moment: this is shorter than they last, so that
each is seen before its end."""

ANNOUNCE_S = 2.0
"""Time to tell the directory that we leave."""


class PeerServer:
    """Connects one stage table with one engine and the links."""

    def __init__(self, table: StageTable, engine: Engine, links: Links, clock: Clock) -> None:
        self.table = table
        self.engine = engine
        self.links = links
        self._clock = clock
        self._dials: set[asyncio.Task[None]] = set()
        self._quiet = asyncio.Event()

    def on_frames(self, peer: PeerId, frames: list[Frame]) -> None:
        self.carry_out(self.table.on_frames(peer, frames, self._clock.monotonic()))

    def on_lost(self, peer: PeerId, how: str) -> None:
        self.carry_out(self.table.on_lost(peer))

    def deliver(self, results: list[Result]) -> None:
        """What the device thread finished; called on the event loop."""
        self.carry_out(self.table.on_results(results, self._clock.monotonic()))
        self.table.sent(self._clock.monotonic())

    async def expire_for_ever(self) -> None:
        while True:
            due_s = self.table.expires_s - self._clock.monotonic()
            await asyncio.sleep(min(EXPIRE_EVERY_S, max(0.0, due_s)))
            self.carry_out(self.table.expire(self._clock.monotonic()))

    async def drain(self, within_s: float, announce: Callable[[], Awaitable[None]]) -> None:
        """Tell that we leave, let sessions end or move on, hand back the rest.

        The clients of open sessions are told first and at once; the directory in the time that a
        lookup may take, since a swarm of which half is gone must not hold us up.
        """
        deadline_s = self._clock.monotonic() + within_s
        self.carry_out(self.table.drain(within_s, self._clock.monotonic()))
        with contextlib.suppress(TimeoutError, HexswarmError):
            await asyncio.wait_for(announce(), min(ANNOUNCE_S, within_s))
        while len(self.table) and self._clock.monotonic() < deadline_s:
            await self.quiet(deadline_s - self._clock.monotonic())
        self.carry_out(self.table.end_all())

    async def quiet(self, timeout_s: float) -> None:
        """Wait until no session is open, at most `timeout_s`."""
        self._quiet.clear()
        if len(self.table):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._quiet.wait(), timeout_s)

    def carry_out(self, actions: Iterable[Action]) -> None:
        steps: list[Step] = []
        sends: dict[tuple[PeerId, int], list[Outgoing]] = {}
        for action in actions:
            match action:
                case Submit(step=step):
                    steps.append(step)
                case Send(peer=peer, message=message, payload=payload, lane=lane):
                    sends.setdefault((peer, lane), []).append((message, payload))
                case Report(peer=peer, message=message, successor=successor):
                    rtt_s = self.links.rtts.get(successor, UNMEASURED_S)
                    told = replace(message, successor_rtt_s=rtt_s)
                    sends.setdefault((peer, STEP), []).append((told, b""))
                case Watch(peer=peer, on=on):
                    (self.links.watch if on else self.links.unwatch)(peer)
                case Drop(session=session, position=position):
                    steps = [step for step in steps if step.session != session]
                    self.engine.cancel(session, position)
                case Dial():
                    task = asyncio.create_task(self._dial(action))
                    self._dials.add(task)
                    task.add_done_callback(self._dials.discard)
        if steps:
            self.engine.submit(steps)
        for (peer, lane), outgoing in sends.items():
            self.links.send(peer, outgoing, lane)  # a lost neighbour is told by on_lost
        if not len(self.table):
            self._quiet.set()

    async def _dial(self, dial: Dial) -> None:
        ok = False
        with contextlib.suppress(HexswarmError):
            await self.links.connect(dial.peer, dial.addresses)
            self.links.ping(dial.peer)  # a trace will tell how long this way is
            ok = True
        self.carry_out(self.table.dialled(dial.session, dial.epoch, ok, self._clock.monotonic()))
