"""The collectives of a group on a virtual clock: the product's own but for the thread that waits.

`VirtualCollective` is `hexswarm.peer.collective.Collective` with its real `Exchange` (frames,
order, deadlines, blame) and its real operations; only where that one sleeps in `poll` this awaits.
`VirtualSums` mirrors `hexswarm.peer.stream_sums.StreamSums`, which imports PyTorch, and `Account`
writes down who gave what to which sum, so that the rules can be checked beside the answers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from hexswarm.clock import Clock
from hexswarm.errors import MemberLost
from hexswarm.peer.collective import Collective
from hexswarm.peer.groups.invitation import Invitation
from hexswarm.peer.patience import LIMITS
from hexswarm.peer.reduction import Operation
from hexswarm.peer.spreading import Gather, Hear, Say
from tests.simulation.direct import DirectStream

Epoch = tuple[str, int]
"""Group and epoch."""
FORGET = 50
"""Sums that are so far back are done at all ranks."""
LATE_S = 1e-3
"""`poll` counts in milliseconds and wakes late rather than early."""


class Account:
    """Of all groups of a world: who has a part in which sum, and what came of it."""

    def __init__(self, blame: Callable[[str, str], None]) -> None:
        self._blame = blame
        self._given: dict[Invitation, dict[int, dict[int, bytes]]] = {}
        """Epochs begin at 1 again where all of a group were killed and nobody is left who knows."""
        self._present: dict[Any, Epoch] = {}
        self._past: set[tuple[Any, Epoch]] = set()
        self._entered: set[tuple[Any, Epoch]] = set()
        self.sums = 0
        """That were used."""

    def enters(self, process: Any, asked: Invitation) -> None:
        """A process has streams to all others of an epoch."""
        epoch = (asked.group, asked.epoch)
        if (process, epoch) in self._entered:
            self._blame("I14", f"{process.name} enters {epoch} a second time")
        self._entered.add((process, epoch))

    def gave(self, process: Any, asked: Invitation, rank: int, number: int, part: bytes) -> None:
        """A process adds its part to a sum."""
        epoch = (asked.group, asked.epoch)
        parts = self._given.setdefault(asked, {}).setdefault(number, {})
        if rank in parts:
            self._blame("I10", f"rank {rank} of {epoch} gave to sum {number} twice")
        parts[rank] = part
        if self._present.get(process) == epoch:
            return
        if (process, epoch) in self._past:
            self._blame("I14", f"{process.name} computes for {epoch} again, after another epoch")
        if process in self._present:
            self._past.add((process, self._present[process]))
        self._present[process] = epoch

    def used(self, asked: Invitation, rank: int, number: int, total: bytes) -> None:
        """A rank goes on with a sum: every rank is in it once, as it was given."""
        epoch = (asked.group, asked.epoch)
        parts = self._given.get(asked, {}).get(number, {})
        self.sums += not rank
        if sorted(parts) != list(range(asked.size)):
            self._blame("I10", f"sum {number} of {epoch} was used with ranks {sorted(parts)}")
            return
        true = sum(np.frombuffer(parts[one], np.float32) for one in sorted(parts))
        if np.asarray(true, np.float32).tobytes() != total:
            self._blame("I10", f"sum {number} of {epoch} is not that of its parts at rank {rank}")
        self._given[asked].pop(number - FORGET, None)


class VirtualCollective(Collective):
    """See the module."""

    def __init__(
        self, rank: int, streams: Mapping[int, DirectStream], epoch: int, clock: Clock
    ) -> None:
        super().__init__(rank, streams, epoch=epoch, limits=LIMITS, clock=clock.monotonic)
        self.direct = streams
        self.busy_s: float | None = None
        """Since when an operation has been under way that somebody has begun."""

    @property
    def number(self) -> int:
        """Of the last operation."""
        return self._exchange._number

    async def total(self, values: Any) -> None:
        operation = self._operation(len(values))
        operation.load(values)
        await self._play(operation)

    async def say(self, data: bytes) -> None:
        await self._play(Say(self.size, data))

    async def hear(self, patience_s: float) -> memoryview:
        heard = Hear()
        await self._play(heard, idle_s=patience_s)
        assert heard.data is not None
        return heard.data

    async def lay(self, own: bytes, most_bytes: int) -> list[memoryview]:
        gathering = Gather(self.rank, self.size, memoryview(own), most_bytes)
        await self._play(gathering)
        return gathering.parts

    # --- inside ----------------------------------------------------------------------------------

    async def _play(self, operation: Operation, *, idle_s: float | None = None) -> None:
        """As `Collective._run`."""
        exchange = self._exchange
        if exchange.loss is not None:
            raise self._lost()
        exchange.start(operation, self._clock(), idle_s=idle_s)
        ready = [rank for rank in exchange.others if self.direct[rank].pending]
        try:
            while True:
                self._read(ready)
                self._write()
                if exchange.done:
                    break
                self.busy_s = None if exchange._idle else exchange._began_s
                ready = await self._awhile()
                exchange.tick(self._clock())
        finally:
            self.busy_s = None
        if exchange.loss is not None:
            self._write()  # the farewell: nothing is full here
            raise self._lost()
        exchange.finish(self._clock())

    async def _awhile(self) -> list[int]:
        """As `Collective._wait`."""
        exchange, loop = self._exchange, asyncio.get_running_loop()
        wanted = [rank for rank in exchange.others if exchange.buffer(rank) is not None]
        if not any(self.direct[rank].pending for rank in wanted):
            came: asyncio.Future[None] = loop.create_future()
            undo = [self.direct[rank].notify(came) for rank in wanted]
            due_s = max(exchange.wake_s, loop.time()) + LATE_S
            timer = loop.call_at(due_s, lambda: came.done() or came.set_result(None))
            try:
                await came
            finally:
                timer.cancel()
                for forget in undo:
                    forget()
        return [rank for rank in wanted if self.direct[rank].pending]


class VirtualSums:
    """When the sums of an epoch end, and that they end once."""

    def __init__(self, on_end: Callable[[MemberLost], None]) -> None:
        self.lost: MemberLost | None = None
        self.bound: VirtualCollective | None = None
        self._on_end = on_end

    def bind(self, collective: VirtualCollective) -> None:
        """Raises MemberLost."""
        self.bound = collective
        if self.lost is not None:
            collective.abort()
            raise self.lost

    @property
    def collective(self) -> VirtualCollective:
        """Raises MemberLost."""
        if self.lost is not None:
            raise self.lost
        assert self.bound is not None
        return self.bound

    def leave(self, why: MemberLost) -> None:
        if self.lost is not None:
            return
        self.lost = why
        if self.bound is not None:
            self.bound.abort()
        self._on_end(why)
