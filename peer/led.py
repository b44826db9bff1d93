"""A group's shard as its leader sees it: tells the other ranks what it does, and does it.

`LedShard` stands where a `Shard` does. What the runner asks of it, embed, forward or head, it tells
the followers, which do the same with their parts (`hexswarm.peer.following`), and does with its own
part; the sums inside keep all in step. So scheduler, leases, payloads and sampling know nothing of
ranks. Numbers are shared through the sums' door, and only what the followers have not computed just
as well: between embed, forward and head of a decode step nothing is sent but the commands.

What fails in the midst of a command leaves the ranks at different places: the group is over, here
and at the others. Whoever owns it closes it and makes another one, with KV that is empty.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor

from hexswarm.errors import MemberLost
from hexswarm.kernels.ragged import Ragged
from hexswarm.peer.commands import pack_extents
from hexswarm.peer.device_group import DeviceGroup
from hexswarm.peer.kv import KvPool
from hexswarm.peer.shard import COMMON, Shard
from hexswarm.peer.sums import Sums
from hexswarm.records import Span

Tell = Callable[[Sequence[Any]], None]
Done = Callable[[], None]


class LedSums(Sums, Protocol):
    """Sums that end for all ranks at once, and hand numbers to all."""

    @property
    def lost(self) -> MemberLost | None:
        """Why the group is over."""

    def share(self, x: Tensor) -> Tensor:
        """The leader's `x` at all ranks."""

    def leave(self, why: MemberLost) -> None:
        """End the group."""


class LedPool(KvPool):
    """Rank 0's KV pool; what is cleared here is cleared at all ranks."""

    def __init__(self, shard: Shard, tell: Tell, blocks: int, block_size: int) -> None:
        super().__init__(
            *(len(shard.span), blocks),
            kv_heads=len(shard.part.kv_heads),
            head_dim=shard.architecture.head_dim,
            dtype=shard.dtype,
            device=shard.device,
            block_size=block_size,
        )
        self._tell = tell

    def clear(self, blocks: Sequence[int]) -> None:
        self._tell(["clear", list(blocks)])
        super().clear(blocks)


class LedShard:
    """Rank 0's part and the followers', as the one shard that they are together."""

    def __init__(self, shard: Shard, sums: LedSums, tell: Tell, done: Done) -> None:
        """`tell` gives all followers a command; `done` waits until all say that it is done.

        Both raise MemberLost, `done` also what kept a follower from it.
        """
        self._shard, self._sums, self._tell, self._done = shard, sums, tell, done
        self.architecture, self.span = shard.architecture, shard.span
        self.total_layers, self.part = shard.total_layers, shard.part
        self.dtype, self.dtype_name = shard.dtype, shard.dtype_name
        self.device, self.backend = shard.device, shard.backend
        self._aside = isinstance(sums, DeviceGroup)
        """Ids may not have been computed yet: nobody here waits for them."""
        self._known: Tensor | None = None
        """Hidden states that all ranks have."""

    @property
    def threads(self) -> int:
        """Of this rank."""
        return self._shard.threads

    @threads.setter
    def threads(self, count: int) -> None:
        self._shard.threads = count

    @property
    def weight_bytes(self) -> int:
        """Of this rank."""
        return self._shard.weight_bytes

    def make_pool(self, blocks: int, block_size: int = 16) -> KvPool:
        """A pool for this part; the followers make theirs meanwhile. Raises OutOfMemory."""
        with self._in_step():
            self._tell(["pool", blocks, block_size])
            pool = LedPool(self._shard, self._tell_alone, blocks, block_size)
            self._done()
            return pool

    def warm(self, pool: KvPool, buckets: Iterable[int] = COMMON) -> None:
        """As `Shard.warm`, at all ranks."""
        few = list(buckets)
        with self._in_step():
            self._tell(["warm", few])
            self._shard.warm(pool, few)
            self._done()

    def embed(self, ids: Tensor) -> Tensor:
        """As `Shard.embed`."""
        with self._in_step():
            if self._aside:
                self._tell(["ids", len(ids)])
                self._sums.share(ids.contiguous())
            else:
                self._tell(["embed", ids.tolist()])
            self._known = self._shard.embed(ids)
            return self._known

    def forward(self, x: Tensor, batch: Ragged, pool: KvPool, span: Span | None = None) -> Tensor:
        """As `Shard.forward`."""
        span = span or self.span
        with self._in_step():
            rows = self._unknown(x)
            self._tell(["forward", pack_extents(batch.extents), span.first, span.end, rows])
            self._share(x, rows)
            self._known = self._shard.forward(x, batch, pool, span)
            return self._known

    def head(self, x: Tensor) -> Tensor:
        """As `Shard.head`."""
        with self._in_step():
            rows = self._unknown(x)
            self._tell(["head", rows])
            self._share(x, rows)
            return self._shard.head(x)

    def _unknown(self, x: Tensor) -> int | None:
        """The rows of `x` if the followers lack them."""
        return None if x is self._known else len(x)

    def _share(self, x: Tensor, rows: int | None) -> None:
        if rows is not None:
            self._sums.share(x.contiguous())

    def _tell_alone(self, command: Sequence[Any]) -> None:
        with self._in_step():
            self._tell(command)

    @contextmanager
    def _in_step(self) -> Iterator[None]:
        """What fails in here leaves the ranks at different places."""
        if self._sums.lost is not None:
            raise self._sums.lost
        try:
            yield
        except BaseException as error:
            how = f"failed in the midst of a command ({type(error).__name__})"
            lost = MemberLost(0, "local", 0, how)
            self._sums.leave(error if isinstance(error, MemberLost) else lost)
            raise
