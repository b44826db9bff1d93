"""Where the ranks of a group link their GPUs' memory, also for the second time.

PyTorch's symmetric memory exchanges handles through the group's store, under keys that hold a
number: how many exchanges this *process* has made. When a rank was lost, rank 0 counts on from
where it was, and the ranks that were started anew begin at 0, so that each waits for keys that the
other never writes. So a new rank first links memory with itself, as often as rank 0 has linked it
before (`catch_up`): however many exchanges that takes, it is as many for both, as long as multicast
is off, which takes more of them among several.

Rejected: rank 0 in a process of its own that is also started anew (the daemon would hand every
payload to another process); CUDA's older handles (each process gets a context, half a gigabyte, on
every GPU); a store of our own that renumbers keys (it depends on names inside PyTorch, and on which
store it asks).
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, distributed

_ASIDE = 1 << 20
"""Groups of one have names far from those of others: memory is linked by the group's name."""

_links: list[Any] = []
"""All that this process has linked, in vain or not."""


def links() -> int:
    """How often this process has linked memory."""
    return len(_links)


def link(own: Tensor, group: Any) -> Any:
    """PyTorch's handle of memory made by `symmetric.empty`, linked by all ranks of `group`.

    Raises RuntimeError if the ranks cannot read each other's memory.
    """
    from torch.distributed import _symmetric_memory as symmetric  # NVIDIA and AMD alone have it

    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
    _links.append(None)
    return symmetric.rendezvous(own, group.group_name)


def catch_up(count: int, device: torch.device) -> None:
    """Link memory with nobody until this process has done so `count` times.

    Uses the default process group, which must not be there yet, and ends it.
    """
    if links() >= count:
        return
    from torch.distributed import _symmetric_memory as symmetric

    distributed.distributed_c10d._world.group_count = _ASIDE
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        while links() < count:
            own = symmetric.empty(16, dtype=torch.uint8, device=device)
            link(own, distributed.group.WORLD)
    finally:
        distributed.destroy_process_group()
