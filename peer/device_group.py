"""The group behind `hexswarm.peer.device_sums` for ranks of one machine: joined late, left by all.

A shard is built with its sums, before it is known that the other ranks could load theirs. So these
sums join their process group when all are there, by a file that only this user's processes see.
They meet through gloo, and ranks whose GPUs can read each other's memory link it at once; only
others need NCCL.

A rank that dies leaves the others waiting. Kernels over linked memory end by themselves, with
numbers that mean nothing: whoever takes results asks `lost` first. A kernel of NCCL never ends, nor
does a thread that waits for it, so `leave` aborts the communicator. That can take a minute, and is
the reason why NCCL is the second choice. PyTorch's own watchdog would end the process.

With gloo alone the same code runs on CPUs, for tests.
"""

from __future__ import annotations

import os
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed

from hexswarm.errors import MemberLost
from hexswarm.peer import rendezvous
from hexswarm.peer.commands import Plan
from hexswarm.peer.device_sums import DeviceSums
from hexswarm.peer.shard import Shard

if TYPE_CHECKING:
    from hexswarm.kernels.linked import Linked

JOIN_S = 60.0
WARMING = 16
"""So many times as long a rank is waited for while kernels are compiled: not all are as quick."""


class DeviceGroup(DeviceSums):
    """Sums of one rank with a GPU of its own; a process has one at a time."""

    def __init__(self, backend: str, *, even: bool = True) -> None:
        """`backend` is nccl or gloo; not `even`: not all ranks could hold their step in a graph."""
        super().__init__(None, capturable=backend == "nccl" and even)
        self._backend = backend
        self._nccl: Any = None
        """The group of NCCL, where memory cannot be linked."""
        self._why: MemberLost | None = None

    @property
    def lost(self) -> MemberLost | None:
        """Why the group is over: told so, or found so by a kernel that waited in vain."""
        if self._why is None and any(linked.lost for linked in self._links):
            return MemberLost(0, "local", 0, "waited in vain for another rank's GPU")
        return self._why

    def join_all(self, plan: Plan, shard: Shard) -> None:
        """Meet the other ranks of `shard`; all call it. Raises MemberLost if they do not come."""
        part, device = shard.part, shard.device
        if device.type == "cuda":
            torch.cuda.set_device(device)
            self._catch_up(plan, device)
        self._join(plan, part.rank, part.size)
        if device.type == "cuda":
            if self.link(shard.architecture.hidden, shard.dtype, device):
                self._wait_for(WARMING)
            else:
                self._group = self._nccl = distributed.new_group(backend="nccl")

    def guard(self) -> None:
        """All is compiled: from now on who is late is lost."""
        self._wait_for(1)

    @property
    def _links(self) -> list[Linked]:
        found = [self.linked, self.totals.linked if self.totals is not None else None]
        return [linked for linked in found if linked is not None]

    def _wait_for(self, times: int) -> None:
        for linked in self._links:
            linked.most = times * linked.usual

    def _catch_up(self, plan: Plan, device: torch.device) -> None:
        with suppress(RuntimeError, ImportError):  # then memory is not linked, as `link` will find
            rendezvous.catch_up(plan.links, device)

    def _join(self, plan: Plan, rank: int, size: int) -> None:
        os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # needs rights that containers lack
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")  # we notice ourselves
        os.environ.setdefault("TORCH_NCCL_ENABLE_MONITORING", "0")
        wait_s = plan.timeout_s if self._backend == "gloo" else JOIN_S  # on CPUs gloo adds, too
        # Memory is linked by the group's name, for the life of a process; PyTorch counts them anew
        # after each one.
        distributed.distributed_c10d._world.group_count = plan.generation
        try:
            distributed.init_process_group(
                "gloo",
                init_method=f"file://{plan.meeting}",
                rank=rank,
                world_size=size,
                timeout=timedelta(seconds=wait_s),
            )
        except (RuntimeError, ValueError) as error:
            raise MemberLost(rank, "local", 0, f"could not join the others: {error}") from error
        self._group = distributed.group.WORLD

    def share(self, x: Tensor) -> Tensor:
        """Rank 0's `x` at all ranks, in its place; contiguous, of any dtype."""
        with self._told():
            if self.totals is not None:
                return self.totals.share(x)
            self._group.broadcast(x.view(-1).view(torch.uint8), 0).wait()
        return x

    def total(self, x: Tensor) -> Tensor:
        """Raises MemberLost."""
        with self._told():
            return super().total(x)

    def leave(self, why: MemberLost) -> None:
        """End the group, from any thread; what waits for the others returns, or raises."""
        if self._why is not None:
            return
        self._why = why
        if self._nccl is not None:
            with suppress(RuntimeError, ValueError):
                distributed.distributed_c10d._abort_process_group(self._nccl)

    def close(self) -> None:
        """Forget the process group, once nobody waits in it."""
        if self._group is not None and distributed.is_initialized():
            with suppress(RuntimeError, ValueError):
                distributed.destroy_process_group()
        self._group = self._nccl = None

    def _told(self) -> _Told:
        if self.lost is not None:
            raise self.lost
        return _Told(self)


class _Told:
    """What the process group raises is the loss of a member."""

    def __init__(self, sums: DeviceGroup) -> None:
        self._sums = sums

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError):
            lost = self._sums.lost or MemberLost(0, "local", 0, f"lost another rank: {error}")
            self._sums.leave(lost)
            raise lost from error
