"""The sums of ranks that are peers of one LAN: `hexswarm.peer.sums.Sums` over a collective.

Tensors of the CPU in float32 are summed where they lie; others take a way over a buffer in float32.
Whatever the collective has on the wire, columns beside each other (logits) go as float32: they are
chosen from, and a rounded logit may tie with its neighbour.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hexswarm.peer.collective import Collective


class StreamSums:
    """One rank's door to its group; owned by the thread that owns the device."""

    capturable = False

    def __init__(self, collective: Collective) -> None:
        self._collective = collective

    def total(self, x: Tensor) -> Tensor:
        """Raises MemberLost."""
        here = x.to("cpu", torch.float32).contiguous()
        self._collective.all_reduce(here.detach().numpy().reshape(-1))
        return here.to(x.device)

    def beside(self, x: Tensor, columns: range, width: int) -> Tensor:
        """Raises MemberLost, also if the columns of the ranks do not make up `width`."""
        rows = x.shape[0]
        if not rows:
            return torch.empty(0, width, device=x.device)
        own = x.detach().to("cpu", torch.float32).contiguous()
        data = own.numpy().reshape(-1).data.cast("B")
        parts = self._collective.gather(data, rows * width * 4)
        for rank, part in enumerate(parts):
            if not part or len(part) % (4 * rows):
                raise self._collective.lost(rank, "sent columns of another shape")
        tables = [torch.frombuffer(part, dtype=torch.float32).reshape(rows, -1) for part in parts]
        joined = torch.cat(tables, 1)
        if joined.shape[1] != width or tables[self._collective.rank].shape[1] != len(columns):
            late = min({*range(len(parts))} - {self._collective.rank})
            how = f"and the others have {joined.shape[1]} columns together, not {width}"
            raise self._collective.lost(late, how)
        return joined.to(x.device)
