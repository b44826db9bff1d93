"""A group of exchanges in one place: the double for `test_exchange.py`.

One byte pipe for each ordered pair of members, a clock that moves only when nothing else can,
members that are killed (their pipes end) or frozen (they do nothing any more, and nobody is told).
Which pipe moves next, and how many bytes, is drawn from `rng`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random

from hexswarm.peer.exchange import Exchange
from hexswarm.peer.patience import Limits
from hexswarm.peer.reduction import Operation

LIMITS = Limits(floor_s=1.0, most_s=10.0, grace_s=0.25)
LATEST_S = LIMITS.floor_s + LIMITS.grace_s + 0.02
"""When a member must have noticed a loss that the streams do not tell, at this floor."""


class Group:
    """All members of one epoch and the pipes between them."""

    def __init__(self, size: int, rng: Random, *, epoch: int = 5, room: int = 1 << 30) -> None:
        self.size, self.rng, self.room, self.now = size, rng, room, 0.0
        self.members = [Exchange(rank, size, epoch, LIMITS) for rank in range(size)]
        self.pipes = {(a, b): bytearray() for a in range(size) for b in range(size) if a != b}
        self.killed: set[int] = set()
        self.frozen: set[int] = set()
        self.program: list[Iterator[Callable[[], Operation]]] = []
        self.finished = [0] * size
        self.lost_s: dict[int, float] = {}
        self.running = [False] * size

    def run(self, *programs: list[Callable[[], Operation]], events: int = 1 << 20) -> None:
        """Let each member go through its operations, until nothing more can happen or they are
        through; time moves only when nothing else does."""
        self.program = [iter(program) for program in programs]
        for rank in range(self.size):
            self._next(rank)
        self.go(events)

    def go(self, events: int = 1 << 20) -> None:
        """On, for so many movements of bytes."""
        self.events = events
        while self.events > 0 and any(self.running):
            if not self._step():
                self._sleep()

    def able(self, rank: int) -> bool:
        return rank not in self.killed and rank not in self.frozen

    def kill(self, rank: int) -> None:
        self.killed.add(rank)
        self.running[rank] = False

    def freeze(self, rank: int) -> None:
        self.frozen.add(rank)
        self.running[rank] = False

    def _next(self, rank: int) -> None:
        make = next(self.program[rank], None)
        self.running[rank] = make is not None and self.able(rank)
        if make is not None:
            self.members[rank].start(make(), self.now)
            self._settle(rank)

    def _settle(self, rank: int) -> None:
        """The member may be through with its operation, or with all."""
        member = self.members[rank]
        if not self.running[rank] or not member.done:
            return
        if member.loss is not None:
            self.running[rank] = False
            self.lost_s[rank] = self.now
        else:
            member.finish(self.now)
            self.finished[rank] += 1
            self._next(rank)

    def _step(self) -> bool:
        """Move some bytes somewhere; False if none can move."""
        ways = [way for way in self.pipes if self._can_send(*way) or self._can_take(*way)]
        if not ways:
            return False
        a, b = self.rng.choice(ways)
        if self._can_send(a, b) and (not self._can_take(a, b) or self.rng.random() < 0.5):
            self._send(a, b)
        else:
            self._take(a, b)
        self.events -= 1
        return True

    def _can_send(self, a: int, b: int) -> bool:
        farewell = self.members[a].loss is not None
        active = (self.running[a] or farewell) and self.able(a)
        full = len(self.pipes[a, b]) >= self.room
        return active and not full and self.members[a].outgoing(b) is not None

    def _can_take(self, a: int, b: int) -> bool:
        if not self.running[b] or not self.able(b) or self.members[b].buffer(a) is None:
            return False
        return bool(self.pipes[a, b]) or a in self.killed

    def _send(self, a: int, b: int) -> None:
        data = self.members[a].outgoing(b)
        assert data is not None
        if b in self.killed:
            self.members[a].unsendable(b)
        else:
            count = min(self._amount(len(data)), self.room - len(self.pipes[a, b]))
            self.pipes[a, b] += data[:count]
            self.members[a].sent(b, count, self.now)
        self._settle(a)

    def _take(self, a: int, b: int) -> None:
        pipe, member = self.pipes[a, b], self.members[b]
        if not pipe:
            member.ended(a, "closed its stream")
        else:
            buffer = member.buffer(a)
            assert buffer is not None
            count = self._amount(min(len(pipe), len(buffer)))
            buffer[:count] = pipe[:count]
            del pipe[:count]
            member.filled(a, count, self.now)
        self._settle(b)

    def _amount(self, most: int) -> int:
        return most if self.rng.random() < 0.5 else self.rng.randint(1, most)

    def _sleep(self) -> None:
        awake = [rank for rank in range(self.size) if self.running[rank] and self.able(rank)]
        if not awake:
            self.events = 0
            return
        self.now = max(self.now, min(self.members[rank].wake_s for rank in awake)) + 1e-3
        for rank in awake:
            self.members[rank].tick(self.now)
            self._settle(rank)
