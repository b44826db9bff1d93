"""How the ranks of a tensor-parallel group add up what each has computed.

A cut layer needs two sums over the group, embedding one, and the LM head's columns laid side by
side. `Sums` is all that a shard knows of it: what carries the numbers (memory of one machine, NCCL,
streams between machines) is somebody else's matter. Sums are taken in float32 and in the order of
the ranks, so that every member has the same bits; else their hidden states would drift apart, and
with them what is greatest.

`ThreadSums` joins ranks that are threads of one process: for tests, and to try a cut out.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from hexswarm.errors import MemberLost


class Sums(Protocol):
    """One rank's door to its group; all ranks call the same methods in the same order."""

    capturable: bool
    """Whether a CUDA graph can hold the sums."""

    def total(self, x: Tensor) -> Tensor:
        """The sum of the ranks' `x`, of one shape, in float32; `x` may be changed."""

    def beside(self, x: Tensor, columns: range, width: int) -> Tensor:
        """All `width` columns `[rows, width]`, of which `x` in float32 is this rank's `columns`."""


def add_in_order(parts: Sequence[Tensor]) -> Tensor:
    """Their sum in float32, from the first to the last."""
    total = parts[0].to(torch.float32, copy=True)
    for part in parts[1:]:
        total += part
    return total


class _Table:
    """Where threads lay down what they bring."""

    def __init__(self, size: int, timeout_s: float) -> None:
        self.places: list[Tensor | None] = [None] * size
        self.rounds = [0] * size
        """How often each has come."""
        self.barrier = threading.Barrier(size, timeout=timeout_s)


class ThreadSums:
    """The sums of one rank among threads; see `thread_sums`."""

    capturable = False

    def __init__(self, table: _Table, rank: int) -> None:
        self._table, self._rank = table, rank

    def total(self, x: Tensor) -> Tensor:
        return add_in_order(self._swap(x))

    def beside(self, x: Tensor, columns: range, width: int) -> Tensor:
        return torch.cat(self._swap(x), 1)

    def leave(self) -> None:
        """Make the others' sums fail: this rank will not come to them."""
        self._table.barrier.abort()

    def _swap(self, x: Tensor) -> list[Tensor]:
        table = self._table
        table.places[self._rank] = x
        table.rounds[self._rank] += 1
        try:
            table.barrier.wait()
            parts = [part.clone() for part in table.places if part is not None]
            table.barrier.wait()  # nobody lays down the next before all have read
        except threading.BrokenBarrierError:
            late = table.rounds.index(min(table.rounds))
            raise MemberLost(late, "local", 0, "did not come to a sum") from None
        return parts


def thread_sums(size: int, timeout_s: float = 10.0) -> list[ThreadSums]:
    """The doors of `size` ranks, each for a thread of its own."""
    table = _Table(size, timeout_s)
    return [ThreadSums(table, rank) for rank in range(size)]
