"""The sums of ranks that have a GPU each, by PyTorch's process groups: NCCL on one machine.

Terms are widened to float32 before they are added, so that they are rounded once. The order is
NCCL's own, the same for each element at all ranks: what one place computes is handed to all, hence
members agree bit for bit; with two ranks it is the order of ranks, since a sum of two has no other.
Nothing here waits on the host, so a CUDA graph can hold the sums: capture once all ranks have run
the layers as they are (`hexswarm.kernels.gpu` does), since NCCL connects at its first sum.

Start NCCL with NCCL_NVLS_ENABLE=0: multicast over NVLink needs rights that containers often lack.
Process groups of gloo do too, for tests; between processes on CPUs `hexswarm.peer.shared_sums` is
faster.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class DeviceSums:
    """One rank's door to its group, see `hexswarm.peer.sums.Sums`."""

    def __init__(self, group: Any, *, capturable: bool) -> None:
        """`group` is a `torch.distributed.ProcessGroup`; `capturable` if it is NCCL's."""
        self._group, self.capturable = group, capturable

    def total(self, x: Tensor) -> Tensor:
        out = x.float()
        self._group.allreduce([out]).wait()
        return out

    def beside(self, x: Tensor, columns: range, width: int) -> Tensor:
        """Adds zeros to everybody's columns: exact, and no ranges need to be known."""
        out = torch.zeros(len(x), width, dtype=torch.float32, device=x.device)
        out[:, columns.start : columns.stop] = x
        return self.total(out)
