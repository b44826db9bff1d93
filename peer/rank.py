"""A rank of a tensor-parallel group that is not its first: a child of the peer's process.

    python -m hexswarm.peer.rank DOOR MEMORY RANK:BELL...

with the descriptors of its socket to rank 0, of the shared memory and of its bells. It loads its
part, then does what rank 0 does, command by command, until that closes the socket or dies. What
goes wrong here ends the process, and by that the group.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hexswarm.errors import CorruptWeights, HexswarmError, MemberLost
from hexswarm.kernels.ragged import ragged
from hexswarm.peer.commands import Plan, receive, send, unpack_extents, unpack_plan
from hexswarm.peer.cuts import Part
from hexswarm.peer.kv import KvPool
from hexswarm.peer.models.architecture import read_architecture
from hexswarm.peer.shard import Shard
from hexswarm.peer.shared_sums import SharedSums, map_memory
from hexswarm.peer.weights import load_span
from hexswarm.records import Span
from hexswarm.store import resolve

log = logging.getLogger(__name__)


class Follower:
    """Does with one part what rank 0 says."""

    def __init__(self, shard: Shard, sums: SharedSums) -> None:
        self._shard, self._sums = shard, sums
        self._pool: KvPool | None = None
        self._x = torch.empty(0)

    def obey(self, command: Sequence[Any]) -> None:
        """`command` is `[kind, field, ...]`; each kind is a method below."""
        kind, *given = command
        getattr(self, f"on_{kind}")(*given)

    def on_pool(self, blocks: int, block_size: int) -> None:
        self._pool = self._shard.make_pool(blocks, block_size)

    def on_clear(self, blocks: list[int]) -> None:
        assert self._pool is not None
        self._pool.clear(blocks)

    def on_embed(self, ids: list[int]) -> None:
        self._x = self._shard.embed(torch.tensor(ids))

    def on_forward(self, extents: list[Any], first: int, end: int, rows: int | None) -> None:
        """With `rows`, hidden states are shared first; without, they are what is here already."""
        assert self._pool is not None
        batch = ragged(unpack_extents(extents), self._shard.device)
        self._x = self._shard.forward(self._take(rows), batch, self._pool, Span(first, end))

    def on_head(self, rows: int | None) -> None:
        self._shard.head(self._take(rows))

    def _take(self, rows: int | None) -> Tensor:
        if rows is None:
            return self._x
        hidden = self._shard.architecture.hidden
        return self._sums.share(torch.empty(rows, hidden, dtype=self._shard.dtype))


def load(plan: Plan, part: Part, sums: SharedSums) -> Shard:
    """The shard of `part`. Raises a ModelError or OutOfMemory."""
    folder = resolve(plan.model, home=Path(plan.home))
    if folder.spec.digest != plan.digest:
        raise CorruptWeights(f"{plan.model} is not the model that rank 0 has")
    span, dtype = Span(plan.first, plan.end), getattr(torch, plan.dtype)
    tensors = load_span(folder, span, dtype=dtype, part=part)
    a = read_architecture(folder.config)
    return Shard(a, span, a.layers, tensors, dtype, quant=plan.quant, part=part, sums=sums)


def follow(door: socket.socket, memory: int, bells: dict[int, socket.socket]) -> None:
    """The life of a rank."""
    first = receive(door)
    if first is None:
        return
    plan, part = unpack_plan(first)
    torch.set_num_threads(plan.threads)
    mapped = map_memory(memory, part.size, plan.term)
    sums = SharedSums(part.rank, mapped, bells, term=plan.term, timeout_s=plan.timeout_s)
    try:
        follower = Follower(load(plan, part, sums), sums)
    except HexswarmError as error:
        send(door, ["failed", str(error)])
        return
    send(door, ["loaded", follower._shard.weight_bytes])
    with torch.inference_mode():
        while (command := receive(door)) is not None:
            follower.obey(command)


def main(arguments: Sequence[str]) -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 decides when the group ends
    door, memory, *others = arguments
    pairs = (one.split(":") for one in others)
    bells = {int(rank): socket.socket(fileno=int(bell)) for rank, bell in pairs}
    try:
        with socket.socket(fileno=int(door)) as opened:
            follow(opened, int(memory), bells)
    except (MemberLost, ConnectionError) as error:
        log.warning("the group ends: %s", error)
        return 1
    finally:
        os.close(int(memory))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
