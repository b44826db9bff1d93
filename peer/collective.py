"""Collectives between the members of a tensor-parallel group, over direct streams.

    group = Collective(rank, {1: stream_to_1, 2: stream_to_2}, epoch=7)
    group.all_reduce(values)                 # float32, in place; equal bits on all members
    group.broadcast(step)                    # the leader, rank 0
    step = group.receive(patience_s=5)       # everybody else
    parts = group.gather(own, most_bytes)    # bytes of all ranks

Blocking, for the thread that owns the device: a token takes two sums a layer, and a hand-over to
the event loop and back costs more than the network of a LAN. The thread sleeps in `poll`; spinning
was rejected, since members share their cores with the kernel's network code and with each other.

What is right and who is late is decided in `hexswarm.peer.exchange`, what is summed in
`hexswarm.peer.reduction`; here are the sockets and the clock. Any failure ends the epoch: all
members raise MemberLost, now and at each later call, and whoever made the group closes it and forms
another one over new streams (a stream that broke off in mid-frame carries nothing any more).
"""

from __future__ import annotations

import select
import time
from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np

from hexswarm.errors import MemberLost, PeerLost, UsageError
from hexswarm.peer.exchange import Exchange
from hexswarm.peer.patience import LIMITS, Limits
from hexswarm.peer.reduction import (
    Floats,
    Format,
    Operation,
    Scatter,
    Swap,
)
from hexswarm.peer.spreading import MOST_CAST_BYTES, Gather, Hear, Say
from hexswarm.records import PeerId

SWAP_BYTES = 128 << 10
"""Vectors up to this many bytes on the wire are swapped, longer ones scattered; for two members
`Swap` never sends more than `Scatter`. Measured by `benchmarks/all_reduce.py`."""
LENGTHS = 8
"""So many lengths keep their buffers; a decode step uses one or two."""
FAREWELL_S = 0.05
SLICE_BYTES = 64 << 10
"""Sent to one member before the next one gets its turn."""


class Wire(Protocol):
    """What is needed of a stream; see `hexswarm.transports.direct.DirectStream`."""

    @property
    def remote(self) -> PeerId: ...

    @property
    def pending(self) -> bool: ...

    def fileno(self) -> int: ...

    def send(self, data: memoryview) -> int: ...

    def recv_into(self, buffer: memoryview) -> int | None: ...

    def abort(self) -> None: ...

    def close(self) -> None: ...


class Collective:
    """One member of one epoch of a group; for one thread, except `abort`."""

    def __init__(
        self,
        rank: int,
        streams: Mapping[int, Wire],
        *,
        epoch: int,
        wire: Format = Format.FLOAT32,
        limits: Limits = LIMITS,
        swap_bytes: int = SWAP_BYTES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`streams` has one stream for each other rank."""
        self.rank, self.size, self.epoch, self.wire = rank, len(streams) + 1, epoch, wire
        if sorted([rank, *streams]) != list(range(self.size)):
            raise UsageError(f"rank {rank} has streams to ranks {sorted(streams)}")
        self._streams = dict(streams)
        self._exchange = Exchange(rank, self.size, epoch, limits)
        self._swap_bytes, self._clock = swap_bytes, clock
        self._operations: dict[int, Swap | Scatter] = {}
        """By the count of values; last used last."""
        self._poll = select.poll()
        self._ranks = {stream.fileno(): other for other, stream in streams.items()}
        self._events = dict.fromkeys(self._ranks, select.POLLIN)
        for handle in self._ranks:
            self._poll.register(handle, select.POLLIN)

    def all_reduce(self, values: Floats) -> None:
        """Replace `values` by the sum over all members, in the order of ranks. Raises MemberLost.

        With bfloat16 on the wire each part is rounded to it first, and so is the sum.
        """
        if values.dtype != np.float32 or values.ndim != 1 or not values.flags.c_contiguous:
            raise UsageError("all_reduce takes one contiguous vector of float32")
        if self.size > 1:
            operation = self._operation(len(values))
            operation.load(values)
            self._run(operation)

    def broadcast(self, data: bytes | memoryview) -> None:
        """Send to all others; from rank 0. Raises MemberLost.

        An empty message is the way to say that the leader is alive.
        """
        if self.rank or len(data) > MOST_CAST_BYTES:
            raise UsageError(f"rank {self.rank} cannot broadcast {len(data)} bytes")
        if self.size > 1:
            self._run(Say(self.size, data))

    def receive(self, patience_s: float = 10.0) -> memoryview:
        """What rank 0 broadcasts next; it may stay silent for `patience_s`. Raises MemberLost."""
        if not self.rank:
            raise UsageError("rank 0 receives nothing")
        heard = Hear()
        self._run(heard, idle_s=patience_s)
        assert heard.data is not None
        return heard.data

    def gather(self, own: memoryview, most_bytes: int) -> list[memoryview]:
        """The bytes of all ranks, none longer than `most_bytes`. Raises MemberLost."""
        gathering = Gather(self.rank, self.size, own, most_bytes)
        if self.size > 1:
            self._run(gathering)
        return gathering.parts

    def abort(self) -> None:
        """Make the running collective fail, from another thread."""
        for stream in self._streams.values():
            stream.abort()

    def lost(self, rank: int, how: str) -> MemberLost:
        """What to raise if what came from `rank` makes no sense."""
        peer = "self" if rank == self.rank else self._streams[rank].remote
        return MemberLost(rank, peer, self.epoch, how)

    def close(self) -> None:
        """The epoch is over."""
        for stream in self._streams.values():
            stream.close()

    # --- inside ----------------------------------------------------------------------------------

    def _operation(self, count: int) -> Swap | Scatter:
        made = self._operations.pop(count, None)
        if made is None:
            swap = count * self.wire.value_bytes <= self._swap_bytes or self.size == 2
            kind = Swap if swap else Scatter
            made = kind(self.rank, self.size, count, self.wire)
            if len(self._operations) >= LENGTHS:
                del self._operations[next(iter(self._operations))]
        self._operations[count] = made
        return made

    def _run(self, operation: Operation, *, idle_s: float | None = None) -> None:
        exchange = self._exchange
        if exchange.loss is not None:
            raise self._lost()
        exchange.start(operation, self._clock(), idle_s=idle_s)
        ready = [rank for rank in exchange.others if self._streams[rank].pending]
        while True:
            self._read(ready)
            self._write()
            if exchange.done:
                break
            ready = self._wait()
            exchange.tick(self._clock())
        if exchange.loss is not None:
            self._say_farewell()
            raise self._lost()
        exchange.finish(self._clock())

    def _write(self) -> None:
        """Offer every member what is for it, by turns, until nobody takes any more."""
        going = [rank for rank in self._exchange.others if self._exchange.outgoing(rank)]
        while going:
            going = [rank for rank in going if self._push(rank)]

    def _push(self, rank: int) -> bool:
        """Send a slice; True if there is more and room for it."""
        data = self._exchange.outgoing(rank)
        if data is None:
            return False
        try:
            count = self._streams[rank].send(data[:SLICE_BYTES])
        except PeerLost:
            # Reading tells why: perhaps it left a last word about somebody else.
            self._exchange.unsendable(rank)
            return False
        if count:
            self._exchange.sent(rank, count, self._clock())
        return count > 0

    def _read(self, ranks: list[int]) -> None:
        """Take what has come. Ends are told last: the other members' words explain them."""
        ends: dict[int, str] = {}
        for rank in ranks:
            stream = self._streams[rank]
            while (buffer := self._exchange.buffer(rank)) is not None:
                try:
                    count = stream.recv_into(buffer)
                except PeerLost as error:
                    ends[rank] = error.how
                    break
                if count is None:
                    break
                if count == 0:
                    ends[rank] = "closed its stream"
                    break
                self._exchange.filled(rank, count, self._clock())
                if not stream.pending and self._exchange.between(rank):
                    break  # as a rule there is no more: `poll` tells if there is
        for rank, how in ends.items():
            self._exchange.ended(rank, how)

    def _wait(self) -> list[int]:
        """Sleep until a stream can be read or written, or the exchange wants to be woken."""
        exchange = self._exchange
        for handle, rank in self._ranks.items():
            events = select.POLLIN if exchange.buffer(rank) is not None else 0
            if exchange.outgoing(rank) is not None:
                events |= select.POLLOUT
            if events != self._events[handle]:
                self._watch(handle, events)
        left_s = max(exchange.wake_s - self._clock(), 0.0)
        return [
            self._ranks[handle]
            for handle, event in self._poll.poll(left_s * 1e3 + 1)
            if event & ~select.POLLOUT
        ]

    def _watch(self, handle: int, events: int) -> None:
        """Not at all, if for nothing: a stream at its end would wake us again and again."""
        if events:
            self._poll.register(handle, events)
        else:
            self._poll.unregister(handle)
        self._events[handle] = events

    def _say_farewell(self) -> None:
        """Tell the others who is lost, as far as their streams take it at once."""
        assert self._exchange.loss is not None
        end_s = self._clock() + FAREWELL_S
        others = [other for other in self._exchange.others if other != self._exchange.loss.rank]
        self._write()
        while self._clock() < end_s and any(map(self._exchange.outgoing, others)):
            self._poll.poll(1)
            self._write()

    def _lost(self) -> MemberLost:
        loss = self._exchange.loss
        assert loss is not None
        return self.lost(loss.rank, loss.how)
