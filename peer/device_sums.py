"""The sums of ranks that have a GPU each, by PyTorch's process groups: NCCL on one machine.

Terms are widened to float32 before they are added, so that they are rounded once. The order is
NCCL's own, the same for each element at all ranks: what one place computes is handed to all, hence
members agree bit for bit; with two ranks it is the order of ranks, since a sum of two has no other.
Nothing here waits on the host, so a CUDA graph can hold the sums: capture once all ranks have run
the layers as they are (`hexswarm.kernels.gpu` does), since NCCL connects at its first sum.

Start NCCL with NCCL_NVLS_ENABLE=0: multicast over NVLink needs rights that containers often lack.
Where the GPUs can read each other's memory (`link`), all goes through that instead
(`hexswarm.kernels.linked`), sums of decode steps in one launch, and NCCL has nothing to do.

Process groups of gloo do too, for tests; between processes on CPUs `hexswarm.peer.shared_sums` is
faster.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed

from hexswarm.peer import rendezvous

if TYPE_CHECKING:
    from hexswarm.kernels.linked import Linked, Totals

log = logging.getLogger(__name__)

LINKED_ROWS = 64
"""Most rows of a decode step whose terms have room in linked memory."""
PIECE_WORDS = 1 << 20
"""Numbers of a piece of a larger sum: 4 MB, two of them."""


class DeviceSums:
    """One rank's door to its group, see `hexswarm.peer.sums.Sums`."""

    def __init__(self, group: Any, *, capturable: bool) -> None:
        """`group` is a `torch.distributed.ProcessGroup`; `capturable` if it is NCCL's."""
        self._group, self.capturable = group, capturable
        self.linked: Linked | None = None
        """For decode steps, after `link`."""
        self.totals: Totals | None = None
        """For all else, after `link`."""

    def link(self, width: int, dtype: torch.dtype, device: torch.device) -> bool:
        """Link the ranks' memory, for terms of `width` columns; all ranks call it, first of all.

        False where GPUs cannot read each other's memory: sums go through NCCL then.
        """
        linked, totals = None, None
        try:
            from hexswarm.kernels.linked import Totals

            linked = _link(self._group, LINKED_ROWS, width, dtype, device)
            pieces = _link(self._group, 1, PIECE_WORDS, torch.float32, device)
            totals = Totals(pieces, PIECE_WORDS)
        except (RuntimeError, ImportError) as error:
            log.info("the GPUs' memory cannot be linked: %s", error)
        where = "cpu" if distributed.get_backend(self._group) == "gloo" else device
        agreed = torch.tensor([totals is not None], dtype=torch.float32, device=where)
        if int(self.total(agreed).item()) == self._group.size():
            self.linked, self.totals = linked, totals
        return self.linked is not None

    def total(self, x: Tensor) -> Tensor:
        if self.totals is not None:
            return self.totals.total(x)
        out = x.float()
        self._group.allreduce([out]).wait()
        return out

    def beside(self, x: Tensor, columns: range, width: int) -> Tensor:
        """Adds zeros to everybody's columns: exact, and no ranges need to be known."""
        out = torch.zeros(len(x), width, dtype=torch.float32, device=x.device)
        out[:, columns.start : columns.stop] = x
        return self.total(out)


def _link(group: Any, rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Linked:
    """Raises RuntimeError if the ranks cannot read each other's memory."""
    from torch.distributed import _symmetric_memory as symmetric  # NVIDIA and AMD alone have it

    from hexswarm.kernels.linked import ALONE, TURNS, Linked

    size, rank = group.size(), group.rank()
    terms, flags = TURNS * rows * width, TURNS * ALONE * size
    flag_bytes = 4 * flags
    own = symmetric.empty(flag_bytes + terms * dtype.itemsize, dtype=torch.uint8, device=device)
    own.zero_()
    torch.cuda.synchronize(device)
    handle = rendezvous.link(own, group)
    shape, skip = (TURNS, rows, width), flag_bytes // dtype.itemsize
    lost = torch.zeros(1, dtype=torch.int32, pin_memory=True)
    linked = Linked(
        [handle.get_buffer(one, shape, dtype, skip) for one in range(size)],
        [handle.get_buffer(one, (TURNS, ALONE, size), torch.int32) for one in range(size)],
        *(rank, lost),
    )
    linked.owner = (own, handle)
    return linked
