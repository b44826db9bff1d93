"""Direct streams between the members of a group: the double of TLS, of the door and of `poll`.

`DirectStream` has the surface of `hexswarm.transports.direct.DirectStream`, over the second network
of `wires.py` (`Wires.lan`), whose ends are authenticated by nature. Bytes may vanish, be torn or
late, as on any way; TLS lets nobody repeat, move or leave out any, so nobody does here: what is
written behind a hole is never read.

`VirtualDoor` mirrors `hexswarm.peer.groups.streams.Door`, which is a listening socket, threads and
a condition: who is expected, who is let in, that higher ranks dial lower ones and dial again. What
a stream is for is said by its dialling end, and answered by a byte, since a TLS handshake is not
done either before the other process runs.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from typing import Any

from hexswarm.errors import PeerLost
from hexswarm.peer.groups.streams import AGAIN_S, DIAL_S, Place
from hexswarm.records import PeerId
from hexswarm.transports.memory import MemoryStream
from tests.simulation.processes import NOBODY, Process
from tests.simulation.wires import Wires

_WELCOME = b"\1"
_HANDLES = itertools.count(1 << 20)


class DirectStream:
    """One end; nothing here waits but `said`."""

    def __init__(self, wires: Wires, local: PeerId, inner: MemoryStream) -> None:
        self.remote, self.topic = inner.remote, b""
        self.closed = asyncio.Event()
        self._wires, self._pair, self._inner = wires, (local, inner.remote), inner
        self._handle = next(_HANDLES)
        self._torn = False
        """Bytes were lost, and the cut that follows has still to come."""

    def fileno(self) -> int:
        """A number that no file has."""
        return self._handle

    @property
    def pending(self) -> bool:
        """Bytes, or the end, can be read now."""
        pipe = self._inner._incoming
        return bool(pipe._unread) or pipe._ended

    def notify(self, future: asyncio.Future[None]) -> Callable[[], None]:
        """Set it when something comes; what is returned undoes that."""
        waiters = self._inner._incoming._waiters
        waiters.add(future)
        return lambda: waiters.discard(future)

    def send(self, data: memoryview) -> int:
        if self._inner._outgoing._ended:
            raise PeerLost(self.remote, None, "was cut off without a word")
        self.write(bytes(data))
        return len(data)

    def write(self, data: bytes) -> None:
        wires, now = self._wires, asyncio.get_running_loop().time()
        wires.trace.raw(now, self._pair, data)
        if self._torn:
            return
        harm = wires.harms.get(self._pair)
        if harm is not None and harm.vanish:
            harm.torn = True
            return
        if harm is not None and harm.tear:
            harm.tear, self._torn = False, True
            data = data[: len(data) // 2]
            NOBODY.run(wires.tear, self._pair)
        NOBODY.run(self._inner.write, [data])

    def recv_into(self, buffer: memoryview) -> int | None:
        pipe = self._inner._incoming
        if not pipe._unread:
            return 0 if pipe._ended else None
        count = min(len(buffer), len(pipe._unread))
        buffer[:count] = pipe._unread[:count]
        del pipe._unread[:count]
        NOBODY.run(pipe._wire.offer, pipe)
        return count

    async def said(self, most: int) -> bytes:
        """What comes next, before the stream is used; nothing at its end."""
        return await self._inner.read(most)

    def abort(self) -> None:
        self.close()

    def close(self) -> None:
        NOBODY.run(self._inner.close)
        self.closed.set()


class VirtualDoor:
    """One process's listener."""

    def __init__(self, wires: Wires, process: Process, peer: PeerId) -> None:
        self._wires, self._process = wires, process
        self._transport = wires.lan.transport(peer)
        self._place: Place | None = None
        self._came: dict[int, DirectStream] = {}
        self._changed = asyncio.Event()

    async def listen(self) -> None:
        async def serve(stream: Any) -> None:
            self._process.adopt()
            await self._serve(DirectStream(self._wires, self._transport.local, stream))

        await self._transport.listen(serve)

    def expect(self, place: Place | None) -> None:
        if place == self._place:
            return
        self._place, old, self._came = place, self._came, {}
        self._notify()
        for stream in old.values():
            stream.close()

    async def open(self, place: Place, within_s: float) -> dict[int, DirectStream]:
        """Raises MemberLost."""
        end_s = asyncio.get_running_loop().time() + within_s
        streams: dict[int, DirectStream] = {}
        try:
            for rank in range(place.rank):
                streams[rank] = await self._dial(place, rank, end_s)
            streams.update(await self._await(place, end_s))
        except BaseException:
            for stream in streams.values():
                stream.close()
            raise
        return streams

    def close(self) -> None:
        """Let in nobody any more."""
        self.expect(None)
        self._transport._handler = None

    async def leave(self) -> None:
        """The process ends: whatever is open, too."""
        self.close()
        await self._transport.close()

    # --- inside ----------------------------------------------------------------------------------

    async def _dial(self, place: Place, rank: int, end_s: float) -> DirectStream:
        while True:
            try:
                async with asyncio.timeout(DIAL_S):
                    return await self._knock(place, rank)
            except (TimeoutError, PeerLost) as error:
                await self._pause(place)
                if asyncio.get_running_loop().time() >= end_s:
                    raise place.lost(rank, "cannot be reached") from error

    async def _knock(self, place: Place, rank: int) -> DirectStream:
        """One attempt. A dial under way belongs to the network, as in `wires.py`."""
        work = self._transport.dial(place.peer(rank))
        inner = await asyncio.get_running_loop().create_task(work, context=NOBODY.copy())
        stream = DirectStream(self._wires, self._transport.local, inner)
        try:
            stream.write(place.topic(place.rank))
            if await stream.said(1) != _WELCOME:
                raise PeerLost(stream.remote, None, "hung up")
        except BaseException:
            stream.close()
            raise
        return stream

    async def _pause(self, place: Place) -> None:
        if self._place == place:
            await self._wait(AGAIN_S)
        self._check(place)

    async def _await(self, place: Place, end_s: float) -> dict[int, DirectStream]:
        while missing := [rank for rank in place.higher if rank not in self._came]:
            self._check(place)
            left_s = end_s - asyncio.get_running_loop().time()
            if left_s <= 0:
                raise place.lost(missing[0], "did not open its stream in time")
            await self._wait(left_s)
        self._check(place)
        came, self._came = self._came, {}
        return came

    def _check(self, place: Place) -> None:
        if self._place != place:
            raise place.lost(place.rank, "left the epoch")

    async def _wait(self, within_s: float) -> None:
        """Until something changes."""
        try:
            async with asyncio.timeout(within_s):
                await self._changed.wait()
        except TimeoutError:
            return

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _serve(self, stream: DirectStream) -> None:
        """Somebody dials: it is let in, and kept for whoever opens; or it is shut out."""
        try:
            async with asyncio.timeout(DIAL_S):
                stream.topic = await stream.said(200)
        except TimeoutError:
            stream.close()
            return
        place = self._place
        rank = None if place is None else _rank_of(place, stream)
        if rank is None or rank in self._came:
            stream.close()
            return
        self._came[rank] = stream
        stream.write(_WELCOME)
        self._notify()
        await stream.closed.wait()


def _rank_of(place: Place, stream: DirectStream) -> int | None:
    for rank in place.higher:
        if place.peer(rank) == stream.remote and place.topic(rank) == stream.topic:
            return rank
    return None
