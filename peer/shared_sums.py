"""The sums of ranks that are processes of one machine, through memory that they share.

Each rank has a place in the shared memory, twice, used by turns. A sum is: lay down your term, ring
everybody's bell, hear everybody ring, add up the terms. A rank that has heard all rings of a round
knows that all have read the round before, so the other half is free to be written.

The bells are sockets, one pair for two ranks, a byte a ring. They order memory (a counter in the
shared memory would need a fence on ARM, which Python has not), wake a rank that sleeps, and end
with the process at the other side: a dead rank is known at once, a frozen one at the deadline. A
rank listens for a few ten microseconds before it sleeps, since most terms come within that.

The memory has no name: it is a file that was deleted, or never had a place, and its descriptor goes
to the children. Rejected: `multiprocessing.shared_memory` (its tracker unlinks the memory as soon
as one of several unrelated processes ends), gloo (8 KB between two processes: 0.15 to 0.19 ms where
this takes 0.06, `benchmarks/tensor_parallel.py`), a manager process.

POSIX only.
"""

from __future__ import annotations

import mmap
import os
import select
import socket
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress

import torch
from torch import Tensor

from hexswarm.errors import MemberLost

TERM = 1 << 18
"""Float32 numbers of a rank's term; longer ones go in pieces that stay in the cache."""
LISTENS = 60
"""Times that a rank looks for a ring before it sleeps, half a microsecond or more each."""
TIMEOUT_S = 8.0
"""Between a rank's ring and another's: half a layer of the longest batch, and no hang."""

_HALVES, _RING = 2, b"!"


class SharedSums:
    """One rank's door to its group, see `hexswarm.peer.sums.Sums`; owned by one thread."""

    capturable = False

    def __init__(
        self,
        rank: int,
        memory: mmap.mmap,
        bells: Mapping[int, socket.socket],
        *,
        term: int = TERM,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        """`bells` of the other ranks; `memory` has room for `memory_bytes` of all."""
        self.rank, self._bells, self._timeout_s = rank, dict(sorted(bells.items())), timeout_s
        size = len(bells) + 1
        self._memory = torch.frombuffer(memory, dtype=torch.float32).view(_HALVES, size, term)
        self._half = 0
        self.lost: MemberLost | None = None
        """Why the group is at its end."""
        for bell in self._bells.values():
            bell.setblocking(False)

    def total(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1)
        out = torch.empty(flat.shape, dtype=torch.float32)
        term = self._memory.shape[2]
        for first in range(0, len(flat), term):
            mine, result = flat[first : first + term], out[first : first + term]
            terms = self._memory[self._half, :, : len(mine)]
            terms[self.rank].copy_(mine)
            self._meet()
            torch.add(terms[0], terms[1], out=result)
            for other in terms[2:]:
                result += other
        return out.view(x.shape)

    def beside(self, x: Tensor, columns: range, width: int) -> Tensor:
        out = torch.empty(len(x), width)
        most = self._memory[0].numel() // width
        for first in range(0, len(x), most):
            mine = x[first : first + most]
            page = self._memory[self._half].view(-1)[: len(mine) * width].view(-1, width)
            page[:, columns.start : columns.stop] = mine
            self._meet()
            out[first : first + most] = page
        return out

    def share(self, x: Tensor) -> Tensor:
        """The leader's `x`, filled in at all other ranks; of any dtype."""
        raw = x.view(-1).view(torch.uint8)
        room = self._memory.shape[2] * 4
        for first in range(0, len(raw), room):
            piece = raw[first : first + room]
            page = self._memory[self._half, 0].view(torch.uint8)[: len(piece)]
            if self.rank == 0:
                page.copy_(piece)
            self._meet()
            if self.rank:
                piece.copy_(page)
        return x

    def leave(self, why: MemberLost) -> None:
        """End the group for all, from any thread: their sums fail, and so do ours, saying `why`."""
        self.lost = self.lost or why
        for bell in self._bells.values():
            with suppress(OSError):  # it was shut before
                bell.shutdown(socket.SHUT_RDWR)  # closed, it would not wake who sleeps over it

    def close(self) -> None:
        """Free the bells, once nobody adds up any more."""
        for bell in self._bells.values():
            bell.close()

    def _meet(self) -> None:
        """Return when all ranks are here. Raises MemberLost, from then on each time."""
        if self.lost is not None:
            raise self.lost
        try:
            for rank, bell in self._bells.items():
                _ring(rank, bell)
            deadline_s = time.monotonic() + self._timeout_s
            for rank, bell in self._bells.items():
                _hear(rank, bell, deadline_s)
        except MemberLost as error:
            self.leave(error)  # so that those who wait for us learn of it, too
            if error is self.lost:
                raise
            raise self.lost from error  # somebody else noticed first, and knows better
        self._half ^= 1


def _ring(rank: int, bell: socket.socket) -> None:
    try:
        bell.send(_RING)
    except OSError as error:
        raise _lost(rank, "is gone") from error


def _hear(rank: int, bell: socket.socket, deadline_s: float) -> None:
    """Wait for one ring."""
    listens = 0
    while True:
        try:
            if bell.recv(1):
                return
            raise _lost(rank, "is gone")
        except BlockingIOError:
            listens += 1
        except OSError as error:
            raise _lost(rank, "is gone") from error
        if listens < LISTENS:
            os.sched_yield()
            continue
        left_s = deadline_s - time.monotonic()
        if left_s <= 0 or not _readable(bell, left_s):
            raise _lost(rank, "did not come to a sum in time")


def _readable(bell: socket.socket, timeout_s: float) -> bool:
    """Sleep until there is something to read; `select` would not take high descriptors."""
    poll = select.poll()
    poll.register(bell, select.POLLIN)
    return bool(poll.poll(timeout_s * 1e3))


def _lost(rank: int, how: str) -> MemberLost:
    return MemberLost(rank, "local", 0, how)


def memory_bytes(size: int, term: int = TERM) -> int:
    """Of the memory that `size` ranks share."""
    return _HALVES * size * term * 4


def make_memory(size: int, term: int = TERM) -> int:
    """A descriptor of such memory without a name; it is freed with the last process that has it."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("hexswarm-sums")
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.truncate(descriptor, memory_bytes(size, term))
    return descriptor


def map_memory(descriptor: int, size: int, term: int = TERM) -> mmap.mmap:
    """The memory behind a descriptor, which may be closed then."""
    return mmap.mmap(descriptor, memory_bytes(size, term))


def make_bells(size: int) -> list[dict[int, socket.socket]]:
    """Of each rank, its ends of the pairs with all others."""
    bells: list[dict[int, socket.socket]] = [{} for _ in range(size)]
    for low in range(size):
        for high in range(low + 1, size):
            bells[low][high], bells[high][low] = socket.socketpair()
    return bells
