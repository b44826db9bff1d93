"""What a rank that is not the first does: with its part, what the leader says, command by command.

A command is `[kind, field, ...]`. Ranks that are processes of one machine get them over a socket
(`hexswarm.peer.rank`), members of a LAN group over their streams. What goes wrong ends the group,
so nothing here is answered but what takes long: a pool and a warm-up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hexswarm.errors import OutOfMemory, RemoteProtocolError
from hexswarm.kernels.ragged import ragged
from hexswarm.peer.commands import unpack_extents
from hexswarm.peer.kv import KvPool
from hexswarm.peer.led import LedSums
from hexswarm.peer.shard import Shard
from hexswarm.records import Span

KINDS = ("pool", "warm", "clear", "embed", "ids", "forward", "head")

Say = Callable[[Sequence[Any]], None]


class Follower:
    """Does with one part what rank 0 says; on one thread, which owns the device."""

    def __init__(self, shard: Shard, sums: LedSums, say: Say) -> None:
        """`say` answers the leader: `["done"]`, or `["failed", kind, why]` before it is raised."""
        self._shard, self._sums, self._say = shard, sums, say
        self._pool: KvPool | None = None
        self._x = torch.empty(0)

    def obey(self, command: Sequence[Any]) -> None:
        """Do one command; raises RemoteProtocolError for what is none."""
        if not command or command[0] not in KINDS:
            raise RemoteProtocolError(f"rank 0 says {str(command[:1])[:40]}, which is no command")
        kind, *given = command
        with torch.inference_mode():
            getattr(self, f"on_{kind}")(*given)

    def on_pool(self, blocks: int, block_size: int) -> None:
        self._pool = None  # the old one goes first
        try:
            self._pool = self._shard.make_pool(blocks, block_size)
        except OutOfMemory as error:
            self._say(["failed", type(error).__name__, error.cause])
            raise
        self._say(["done"])

    def on_warm(self, buckets: list[int]) -> None:
        self._shard.warm(self._held(), buckets)
        self._say(["done"])

    def on_clear(self, blocks: list[int]) -> None:
        self._held().clear(blocks)

    def on_embed(self, ids: list[int]) -> None:
        self._x = self._shard.embed(torch.tensor(ids, device=self._shard.device))

    def on_ids(self, count: int) -> None:
        """As `on_embed`, of ids that only the leader's device knows so far."""
        ids = torch.empty(count, dtype=torch.int64, device=self._shard.device)
        self._x = self._shard.embed(self._sums.share(ids))

    def on_forward(self, extents: list[Any], first: int, end: int, rows: int | None) -> None:
        """With `rows`, hidden states are shared first; without, they are what is here already."""
        batch = ragged(unpack_extents(extents), self._shard.device)
        self._x = self._shard.forward(self._take(rows), batch, self._held(), Span(first, end))

    def on_head(self, rows: int | None) -> None:
        self._shard.head(self._take(rows))

    def _held(self) -> KvPool:
        if self._pool is None:
            raise RemoteProtocolError("rank 0 uses a pool that it did not ask for")
        return self._pool

    def _take(self, rows: int | None) -> Tensor:
        if rows is None:
            return self._x
        shard = self._shard
        shape = (rows, shard.architecture.hidden)
        return self._sums.share(torch.empty(shape, dtype=shard.dtype, device=shard.device))
