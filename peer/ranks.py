"""A tensor-parallel group inside one machine: this process is rank 0, the others are its children.

`LedShard` stands where a `Shard` does. What the runner asks of it, embed, forward or head, it tells
the children, which do the same with their parts (`hexswarm.peer.rank`), and does with its own part;
the sums inside keep all in step. So scheduler, leases, payloads and sampling know nothing of ranks.
Numbers go through the shared memory, and only what the children have not computed just as well:
between embed, forward and head of a decode step nothing is sent but the commands.

The children live as long as their group. If one dies, freezes or cannot compute, or if this process
fails in the midst of a command, the ranks are no longer in step: `MemberLost` now and at each later
call. Whoever owns the group closes it and makes another one, with KV that is empty.

Rejected: giving children the whole batch and a runner of their own (they would check payloads and
hold sampling state for nothing), threads (the interpreter's lock), fork (torch has threads).
POSIX only, on CPUs; a GPU for each rank needs NCCL for its sums.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from hexswarm.errors import MemberLost
from hexswarm.kernels.ragged import Ragged
from hexswarm.peer.commands import Plan, pack_extents, pack_plan, receive, send
from hexswarm.peer.cuts import Cut, Part
from hexswarm.peer.kv import KvPool
from hexswarm.peer.models.architecture import read_architecture
from hexswarm.peer.shard import Shard
from hexswarm.peer.shared_sums import (
    TIMEOUT_S,
    SharedSums,
    make_bells,
    make_memory,
    map_memory,
)
from hexswarm.peer.weights import load_span
from hexswarm.records import Span
from hexswarm.store import ModelFolder

LOADING_S = 600.0
"""Most that a child may take to read its weights."""
ENDING_S = 2.0
"""For a child to end by itself."""

Tell = Callable[[Sequence[Any]], None]


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
    """Rank 0's part and the children's, as the one shard that they are together."""

    def __init__(self, shard: Shard, sums: SharedSums, tell: Tell) -> None:
        self._shard, self._sums, self._tell = shard, sums, tell
        self.architecture, self.span = shard.architecture, shard.span
        self.total_layers, self.part = shard.total_layers, shard.part
        self.dtype, self.dtype_name = shard.dtype, shard.dtype_name
        self.device, self.backend = shard.device, shard.backend
        self._known: Tensor | None = None
        """Hidden states that all ranks have."""

    @property
    def threads(self) -> int:
        """Of this rank."""
        return self._shard.threads

    def make_pool(self, blocks: int, block_size: int = 16) -> KvPool:
        """A pool for this part; the children make theirs."""
        with self._in_step():
            self._tell(["pool", blocks, block_size])
            return LedPool(self._shard, self._tell_alone, blocks, block_size)

    def embed(self, ids: Tensor) -> Tensor:
        """As `Shard.embed`."""
        with self._in_step():
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
        """The rows of `x` if the children lack them."""
        return None if x is self._known else len(x)

    def _share(self, x: Tensor, rows: int | None) -> None:
        if rows is not None:
            self._sums.share(x.contiguous())

    def _tell_alone(self, command: Sequence[Any]) -> None:
        with self._in_step():
            self._tell(command)

    @contextmanager
    def _in_step(self) -> Iterator[None]:
        """What fails in here leaves the ranks at different places: the group is over."""
        if self._sums.lost is not None:
            raise self._sums.lost
        try:
            yield
        except BaseException as error:
            lost = MemberLost(0, "local", 0, "failed in the midst of a command")
            self._sums.leave(error if isinstance(error, MemberLost) else lost)
            raise


class Ranks:
    """A group from its start to its end; a context manager that ends the children."""

    def __init__(
        self,
        folder: ModelFolder,
        span: Span,
        cut: Cut,
        *,
        dtype: str = "float32",
        quant: str = "none",
        threads: int = 1,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        """Start the children; all ranks load at once. Raises MemberLost or what `load_span` does.

        `threads` are those of a child; this process keeps its own.
        """
        plan = Plan(
            *(str(folder.gguf or folder.path), str(folder.home), folder.spec.digest),
            *(span.first, span.end, dtype, threads, quant),
            timeout_s=timeout_s,
        )
        self.children: dict[int, subprocess.Popen[bytes]] = {}
        self.held_bytes: dict[int, int] = {}
        """Of weights, by rank."""
        self._doors: dict[int, socket.socket] = {}
        memory, bells = make_memory(len(cut)), make_bells(len(cut))
        self.sums = SharedSums(0, map_memory(memory, len(cut)), bells[0], timeout_s=timeout_s)
        try:
            for part in cut.parts[1:]:
                self._start(plan, part, memory, bells[part.rank])
            for ends in bells[1:]:
                for bell in ends.values():
                    bell.close()  # else nobody would see the end of a child
            self.shard = LedShard(
                self._load(folder, span, plan, cut.parts[0]), self.sums, self.tell
            )
            self._await_loaded(timeout_s)
        except BaseException:
            self.close()
            raise
        finally:
            os.close(memory)

    def __enter__(self) -> Ranks:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def lost(self) -> MemberLost | None:
        """Why the group is over, None while it is not."""
        for rank, child in self.children.items():
            if self.sums.lost is None and child.poll() is not None:
                self.sums.leave(_lost(rank, f"ended with status {child.returncode}"))
        return self.sums.lost

    def tell(self, command: Sequence[Any]) -> None:
        """Give all children a command."""
        for rank, door in self._doors.items():
            try:
                send(door, command)
            except OSError as error:
                raise _lost(rank, "is gone or takes no commands") from error

    def close(self) -> None:
        """End the children, those that do not listen by force."""
        self.sums.leave(_lost(0, "closed the group"))
        for door in self._doors.values():
            door.close()
        for child in self.children.values():
            with suppress(subprocess.TimeoutExpired):
                child.wait(ENDING_S)
            child.kill()
            child.wait()

    def _start(self, plan: Plan, part: Part, memory: int, bells: dict[int, socket.socket]) -> None:
        door, theirs = socket.socketpair()
        self._doors[part.rank] = door
        door.settimeout(plan.timeout_s)
        with theirs:
            ends = [f"{rank}:{bell.fileno()}" for rank, bell in bells.items()]
            numbers = [theirs.fileno(), memory, *(bell.fileno() for bell in bells.values())]
            command = [sys.executable, "-P", "-m", "hexswarm.peer.rank"]
            self.children[part.rank] = subprocess.Popen(
                [*command, str(theirs.fileno()), str(memory), *ends], pass_fds=numbers
            )
        send(door, pack_plan(plan, part))

    def _load(self, folder: ModelFolder, span: Span, plan: Plan, part: Part) -> Shard:
        tensors = load_span(folder, span, dtype=getattr(torch, plan.dtype), part=part)
        a = read_architecture(folder.config)
        shard = Shard(
            *(a, span, a.layers, tensors, plan.dtype), quant=plan.quant, part=part, sums=self.sums
        )
        self.held_bytes[0] = shard.weight_bytes
        return shard

    def _await_loaded(self, timeout_s: float) -> None:
        for rank, door in self._doors.items():
            door.settimeout(LOADING_S)
            try:
                answer = receive(door)
            except OSError as error:
                raise _lost(rank, "did not load its weights in time") from error
            if answer is None or answer[0] != "loaded":
                raise _lost(rank, "died" if answer is None else f"cannot load: {answer[1]}")
            self.held_bytes[rank] = answer[1]
            door.settimeout(timeout_s)


def _lost(rank: int, how: str) -> MemberLost:
    return MemberLost(rank, "local", 0, how)
