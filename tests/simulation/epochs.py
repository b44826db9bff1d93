"""One epoch of a group in a simulated process, and the device of its leader.

`VirtualEpoch` mirrors `hexswarm.peer.groups.epoch.Epoch` with a task in place of its thread: wait
for the epoch before, load (which takes a while and cannot be interrupted), open the streams, then
lead or obey; it tells the same owner, the real `Grouped`. `VirtualLed` mirrors
`hexswarm.peer.groups.leading.Led`. `GroupEngine` is the engine whose device takes part in sums:
whatever it does, a batch or a beat, is done by one task, one after the other, as the thread would.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from hexswarm.clock import Clock
from hexswarm.errors import MemberLost
from hexswarm.peer.groups import words
from hexswarm.peer.groups.streams import OPEN_S, Place
from hexswarm.peer.steps import Batch, Result, SessionKey
from tests.simulation.collective import Account, VirtualCollective, VirtualSums
from tests.simulation.direct import VirtualDoor
from tests.simulation.parts import Obeyer, Part, Teller
from tests.simulation.peers import DeviceClock, OnRow, PeerSpec, VirtualEngine


class VirtualLed:
    """A group that serves, as its leader sees it."""

    shard = None

    def __init__(self, teller: Teller, clock: Clock) -> None:
        self.teller, self._sums, self._group = teller, teller.sums, teller.sums.collective
        self._clock, self._told_s = clock, clock.monotonic()
        self.invitation = teller.part.place.invitation
        self.title = f"LAN group of {self.invitation.size}"

    @property
    def lost(self) -> MemberLost | None:
        return self._sums.lost

    async def run(self, batch: Batch) -> list[Result]:
        """Raises MemberLost, or what failed; in either case the group is over."""
        try:
            found = await self.teller.run(batch)
        except BaseException as error:
            how = f"failed in the midst of a command ({type(error).__name__})"
            lost = MemberLost(0, "local", 0, how)
            self._sums.leave(error if isinstance(error, MemberLost) else lost)
            raise
        self._told_s = self._clock.monotonic()
        return found

    async def beat(self) -> None:
        if self.lost is not None or self._clock.monotonic() - self._told_s < words.BEAT_S:
            return
        try:
            await self._group.say(b"")
            await self._group.lay(b"", 0)
            self._told_s = self._clock.monotonic()
        except MemberLost as error:
            self._sums.leave(error)

    def guard(self) -> None:
        """As there."""

    def leave(self, how: str) -> None:
        self._sums.leave(self._group.lost(0, how))

    def close(self) -> None:
        self.leave("closed the group")
        self._group.close()


class VirtualEpoch:
    """See the module; `owner` is the real `Grouped`."""

    def __init__(
        self,
        place: Place,
        owner: Any,
        before: VirtualEpoch | None,
        *,
        door: VirtualDoor,
        part: Callable[[Place], Part],
        load_s: float,
        account: Account,
        clock: Clock,
        layers: int,
        on_wrong: Callable[[BaseException], None],
    ) -> None:
        self.place, self._owner, self._before, self._door = place, owner, before, door
        self._part, self._load_s, self._account, self._clock = part, load_s, account, clock
        self._layers, self._on_wrong = layers, on_wrong
        self.sums = VirtualSums(lambda lost: self._tell(owner.over, lost))
        self.task: asyncio.Task[None] | None = None

    @property
    def group(self) -> VirtualCollective | None:
        """While it goes on."""
        return None if self.sums.lost is not None else self.sums.bound

    def start(self) -> None:
        self._door.expect(self.place)
        self.task = asyncio.get_running_loop().create_task(self._live())

    def end(self, how: str) -> None:
        self.sums.leave(self.place.lost(self.place.rank, how))

    def wait(self, within_s: float | None = None) -> None:
        """There are no threads to wait for; whoever leaves awaits `task`."""

    async def _live(self) -> None:
        if self._before is not None and self._before.task is not None:
            await asyncio.wait({self._before.task})
        self._before = None
        try:
            await self._take_part()
        except MemberLost as error:
            own = error.rank == self.place.rank
            blamed = None if own else self.place.peer(error.rank)
            self._tell(self._owner.failed, error.how, blamed)

    async def _take_part(self) -> None:
        place, sums = self.place, self.sums
        part = self._part(place)
        await asyncio.sleep(self._load_s)
        if sums.lost is not None:
            raise sums.lost
        group = await self._join(await self._door.open(place, OPEN_S))
        self._account.enters(part.process, place.invitation)
        if place.rank == 0:
            teller = Teller(part, sums, self._account, self._layers)
            self._tell(self._owner.joined, VirtualLed(teller, self._clock))
            return
        self._tell(self._owner.joined, None)
        try:
            kv_tokens = place.invitation.kv_tokens
            _, wrong = await Obeyer(part, sums, self._account, kv_tokens).run()
            if wrong is not None:
                self._on_wrong(wrong)
        finally:
            group.close()

    async def _join(self, streams: dict[int, Any]) -> VirtualCollective:
        """As `joined`: nobody speaks before all listen. Raises MemberLost."""
        place = self.place
        group = VirtualCollective(place.rank, streams, place.invitation.epoch, self._clock)
        try:
            self.sums.bind(group)
            await group.lay(b"", 0)
        except BaseException:
            group.close()
            raise
        return group

    def _tell(self, event: Callable[..., None], *given: Any) -> None:
        asyncio.get_running_loop().call_soon(event, self, *given)


class LedCells:
    """The leader's runner: what the group has computed is here when the engine asks."""

    def __init__(self, led: VirtualLed, clock: DeviceClock, on_row: OnRow) -> None:
        self.model = self
        self.computed: Counter[tuple[SessionKey, int, int, int]] = Counter()
        self.outcome: list[Result] | BaseException = []
        self._led, self._clock, self._on_row = led, clock, on_row

    def poison(self, blocks: Sequence[int]) -> None:
        self._led.teller.erase(blocks)

    def run(self, batch: Batch) -> Sequence[Result]:
        self._clock.ended()
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        for row in batch.rows:
            self._on_row(row)
        return self.outcome


class GroupEngine(VirtualEngine):
    """See the module."""

    def __init__(
        self, spec: PeerSpec, clock: Clock, deliver: Any, on_row: OnRow, led: VirtualLed
    ) -> None:
        device = DeviceClock(clock)
        self.led, self.rows = led, LedCells(led, device, on_row)
        super().__init__(spec, clock, deliver, on_row, cells=self.rows, device=device)
        self.task: asyncio.Task[None] | None = None

    def between(self, call: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        if self._stopping:
            future.cancel()
            return future
        self._calls.append((call, future))
        self._go_on()
        return future

    def stop(self, timeout_s: float = 10.0) -> bool:
        for _, future in self._calls:
            future.cancel()
        self._calls.clear()
        return super().stop(timeout_s)

    async def halted(self, within_s: float) -> bool:
        """Whether the device is at rest in time."""
        if self.task is not None and not self.task.done():
            await asyncio.wait({self.task}, timeout=within_s)
        return self.task is None or self.task.done()

    # --- inside ----------------------------------------------------------------------------------

    def _go_on(self) -> None:
        if self._calls and self._computing is None and not self._stopping:
            self._computing = Batch(())
            self._run(self._call(*self._calls.popleft()))
            return
        super()._go_on()

    def _compute(self, picked: Batch, now: float) -> None:
        self._run(self._together(picked, now))

    def _run(self, work: Any) -> None:
        self.task = asyncio.get_running_loop().create_task(work)

    async def _call(self, call: Callable[[], Any], future: Future[Any]) -> None:
        await call()
        future.set_result(None)
        self._computing = None
        self._go_on()

    async def _together(self, batch: Batch, now: float) -> None:
        try:
            self.rows.outcome = await self.led.run(batch)
        except Exception as error:
            self.rows.outcome = error
        self._over(now)
