"""One member's side of a group's collectives: frames, order, deadlines and blame; pure.

Bytes in, bytes out, `now` as an argument. Whoever has the sockets (`hexswarm.peer.collective`), or
plays a whole group in memory as the tests do, asks `buffer` where the next bytes of a member
belong, says `filled`, sends what `outgoing` has, and calls `tick` when time has passed. Nothing is
copied on the way: payloads come straight into the blocks of the operation.

Order. All members run the same operations, numbered from 1 in each epoch, and each stream is in
order. So of a frame's number exactly one thing can be true: it is the current one (it is placed);
it is lower, or of a lower epoch (it is late and read away); it is higher. Then its sender is
through with an operation in which we still wait for others: the frame stays unread until we are
there, which is all the flow control there is. But if we still need something of that very sender
for the current one, it never comes: a gap, and an error.

Deadlines. A member is late when nothing has moved for five times the 99th percentile of what
operations took lately, at least `floor_s`; the whole operation ends after `most_s` in any case. Who
is late is asked (CALL) and has `grace_s` to answer (HERE): whoever waits in an operation answers at
once, so a member that only waits for the real culprit is not taken for it. Of those that are silent
the one is blamed that owes its *own* values, before one that owes a sum of others' values.

The end. A lost member ends the epoch for all: whoever notices tells all others (LOST, with the
rank), raises, and takes no part in anything any more. There is no way to go on: sums lack a part.
"""

from __future__ import annotations

import struct
from collections import deque
from dataclasses import dataclass

from hexswarm.peer.patience import LIMITS, Limits, Pace
from hexswarm.peer.reduction import HEADER_BYTES, Kind, Operation

VERSION = 1
_HEADER = struct.Struct("!BBHIQII")
_KINDS = {int(kind) for kind in Kind}
_SINK_BYTES = 64 << 10
_QUEUED = 1024
"""Who asks and asks and does not read gets no answers any more."""
assert _HEADER.size == HEADER_BYTES


@dataclass(frozen=True, slots=True)
class Loss:
    """The member whose fault it is that the epoch is over."""

    rank: int
    how: str


@dataclass(frozen=True, slots=True)
class _Head:
    kind: Kind
    about: int
    """The rank that is lost, if the frame says so."""
    epoch: int
    number: int
    offset: int
    length: int


class _Inlet:
    """What comes from one member: a header, then a payload, and again."""

    def __init__(self) -> None:
        self.header = memoryview(bytearray(HEADER_BYTES))
        self.head: _Head | None = None
        self.target = self.header
        self.got = 0
        self.sink_bytes = 0
        """So much of a late frame is still to be read away."""
        self.parked = False
        self.ended = ""

    def expect_header(self) -> None:
        self.head, self.target, self.got, self.parked = None, self.header, 0, False


class Exchange:
    """The protocol of one member for one epoch."""

    def __init__(self, rank: int, size: int, epoch: int, limits: Limits = LIMITS) -> None:
        self.rank, self.size, self.epoch = rank, size, epoch
        self.others = tuple(other for other in range(size) if other != rank)
        self.loss: Loss | None = None
        self._limits = limits
        self._pace = Pace(limits)
        self._number = 0
        self._operation: Operation | None = None
        self._inlets = {other: _Inlet() for other in self.others}
        self._queues: dict[int, deque[memoryview]] = {other: deque() for other in self.others}
        self._sink = memoryview(bytearray(_SINK_BYTES))
        self._began_s = self._due_s = self._end_s = 0.0
        self._idle = False
        self._verdict_s: float | None = None
        self._alive: set[int] = set()

    # --- operations ------------------------------------------------------------------------------

    def start(self, operation: Operation, now: float, *, idle_s: float | None = None) -> None:
        """Begin the next collective; with `idle_s` its first byte has that long to come."""
        self._number += 1
        self._operation = operation
        self._began_s, self._verdict_s = now, None
        self._idle = idle_s is not None
        """Nobody owes anything yet: what others send meanwhile does not start the clock."""
        self._due_s = now + (self._pace.patience_s if idle_s is None else idle_s)
        self._end_s = now + (self._limits.most_s - self._limits.grace_s) + (idle_s or 0.0)
        for outgoing in operation.begin():
            self._send(outgoing.ranks, outgoing.kind, outgoing.offset, outgoing.framed)
        for rank, inlet in self._inlets.items():
            if inlet.parked:
                inlet.parked = False
                self._on_header(rank, inlet, now)
        for rank, inlet in self._inlets.items():
            if inlet.ended:
                self._lose(rank, inlet.ended)

    @property
    def done(self) -> bool:
        """The operation is through and everything was sent, or a member is lost."""
        if self.loss is not None or self._operation is None:
            return True
        if any(self._queues.values()):
            return False
        return not any(map(self._operation.lacks, self.others))

    def finish(self, now: float) -> None:
        """The operation is done: remember how long it took."""
        self._operation = None
        if not self._idle:
            self._pace.add(now - self._began_s)

    # --- bytes -----------------------------------------------------------------------------------

    def outgoing(self, rank: int) -> memoryview | None:
        """The next bytes for a member; the same ones until they were `sent`."""
        queue = self._queues[rank]
        return queue[0] if queue else None

    def sent(self, rank: int, count: int, now: float) -> None:
        queue = self._queues[rank]
        if count == len(queue[0]):
            queue.popleft()
        else:
            queue[0] = queue[0][count:]
        self._moved(now)

    def unsendable(self, rank: int) -> None:
        """Nothing goes to that member any more; why, its stream will tell."""
        self._queues[rank].clear()

    def buffer(self, rank: int) -> memoryview | None:
        """Where the next bytes of a member belong; None while they are to be left unread."""
        inlet = self._inlets[rank]
        if inlet.parked or inlet.ended or self.loss is not None:
            return None
        if inlet.sink_bytes:
            return self._sink[: inlet.sink_bytes]
        return inlet.target[inlet.got :]

    def between(self, rank: int) -> bool:
        """The last frame of that member is complete, and no other one has begun."""
        inlet = self._inlets[rank]
        return inlet.head is None and not inlet.got and not inlet.sink_bytes

    def filled(self, rank: int, count: int, now: float) -> None:
        """`count` bytes of that buffer have come."""
        inlet = self._inlets[rank]
        self._alive.add(rank)
        if inlet.sink_bytes:
            inlet.sink_bytes -= count
            return
        inlet.got += count
        if inlet.got < len(inlet.target):
            self._moved(now)
        elif inlet.head is None:
            self._on_header(rank, inlet, now)
        else:
            self._on_frame(rank, inlet, now)

    def ended(self, rank: int, how: str) -> None:
        """The stream of a member is at its end. A member that owes nothing now may go: the next
        operation fails."""
        self._inlets[rank].ended = how
        self._queues[rank].clear()
        if self._operation is not None and self._operation.lacks(rank):
            self._lose(rank, how)

    # --- time ------------------------------------------------------------------------------------

    @property
    def wake_s(self) -> float:
        """When `tick` is to be called next."""
        return min(self._due_s, self._end_s) if self._verdict_s is None else self._verdict_s

    def tick(self, now: float) -> None:
        """Ask those who are late; later blame one of those who did not answer."""
        if self.done or now < self.wake_s:
            return
        if self._verdict_s is None:
            self._verdict_s = now + self._limits.grace_s
            self._alive.clear()
            self._send(self.others, Kind.CALL)
            return
        owing = {rank: self._owes(rank) for rank in self.others}
        suspects = [rank for rank, owes in owing.items() if owes and rank not in self._alive]
        if not suspects and now < self._end_s:
            self._verdict_s = None
            self._due_s = now + self._pace.patience_s
            return
        suspects = suspects or [rank for rank, owes in owing.items() if owes]
        late = max(suspects, key=lambda rank: (owing[rank], -rank))
        self._lose(late, f"has not answered for {now - self._began_s:.1f} s")

    def _owes(self, rank: int) -> int:
        assert self._operation is not None
        return self._operation.lacks(rank) or int(bool(self._queues[rank]))

    def _moved(self, now: float) -> None:
        if self._verdict_s is None and not self._idle:
            self._due_s = now + self._pace.patience_s

    # --- frames ----------------------------------------------------------------------------------

    def _on_header(self, rank: int, inlet: _Inlet, now: float) -> None:
        head = inlet.head or self._parse(rank, inlet)
        if head is None:
            return
        inlet.head = head
        if head.epoch > self.epoch:
            self._lose(rank, f"is in epoch {head.epoch} already")
        elif head.epoch < self.epoch or (head.kind < Kind.CALL and head.number < self._number):
            inlet.sink_bytes = head.length
            inlet.expect_header()
        elif head.kind >= Kind.CALL:
            inlet.expect_header()
            self._on_word(rank, head)
        elif head.number == self._number and self._operation is not None:
            self._place(rank, inlet, head, now)
        elif self._operation is not None and self._operation.lacks(rank):
            self._lose(rank, f"left out a frame of operation {self._number}")
        else:
            inlet.parked = True

    def _parse(self, rank: int, inlet: _Inlet) -> _Head | None:
        version, kind, about, epoch, number, offset, length = _HEADER.unpack(inlet.header)
        wordy = kind >= Kind.CALL and length
        if version != VERSION or kind not in _KINDS or wordy or about >= self.size:
            self._lose(rank, "speaks another protocol")
            return None
        return _Head(Kind(kind), about, epoch, number, offset, length)

    def _place(self, rank: int, inlet: _Inlet, head: _Head, now: float) -> None:
        assert self._operation is not None
        target = self._operation.place(rank, head.kind, head.offset, head.length)
        if target is None:
            self._lose(rank, f"sent a {head.kind.name} that does not belong there")
            return
        inlet.target, inlet.got = target, 0
        if self._idle:
            self._idle, self._began_s = False, now
            self._end_s = now + self._limits.most_s - self._limits.grace_s
        self._moved(now)
        if not len(target):
            self._on_frame(rank, inlet, now)

    def _on_frame(self, rank: int, inlet: _Inlet, now: float) -> None:
        assert self._operation is not None
        assert inlet.head is not None
        head = inlet.head
        inlet.expect_header()
        self._moved(now)
        for outgoing in self._operation.arrived(rank, head.kind, head.offset):
            self._send(outgoing.ranks, outgoing.kind, outgoing.offset, outgoing.framed)

    def _on_word(self, rank: int, head: _Head) -> None:
        if head.kind is Kind.CALL and len(self._queues[rank]) < _QUEUED:
            self._send((rank,), Kind.HERE)
        elif head.kind is Kind.LOST and self.loss is None:
            how = "was given up by the others" if head.about == self.rank else "is lost"
            self.loss = Loss(head.about, f"{how}, says rank {rank}")

    def _send(
        self,
        ranks: tuple[int, ...],
        kind: Kind,
        offset: int = 0,
        framed: memoryview | None = None,
        about: int = 0,
    ) -> None:
        if framed is None:
            framed = memoryview(bytearray(HEADER_BYTES))
        length = len(framed) - HEADER_BYTES
        _HEADER.pack_into(framed, 0, VERSION, kind, about, self.epoch, self._number, offset, length)
        for rank in ranks:
            self._queues[rank].append(framed)

    def _lose(self, rank: int, how: str) -> None:
        """The epoch is over; the others hear of it after what is on the way to them."""
        if self.loss is None:
            self.loss = Loss(rank, how)
            self._send(self.others, Kind.LOST, about=rank)  # it may thaw
