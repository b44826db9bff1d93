"""The sums of ranks that are peers of one LAN: `hexswarm.peer.sums.Sums` over a collective.

Tensors of the CPU in float32 are summed where they lie; others take a way over a buffer in float32.
Whatever the collective has on the wire, columns beside each other (logits) go as float32: they are
chosen from, and a rounded logit may tie with its neighbour.

A shard is built with its sums, long before there are streams to the other members: so sums are
`bind`-ed to a collective later. They end once, for all: `lost` then says why, and `on_end` has been
called.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hexswarm.errors import MemberLost
from hexswarm.peer.collective import Collective

SHARED_S = 5.0
"""For the leader to send what it just said that it would."""
SHARED_BYTES = 32 << 20
"""Of hidden states in one broadcast."""


def _nothing(why: MemberLost) -> None:
    """Nobody wants to know."""


class StreamSums:
    """One rank's door to its group; owned by the thread that owns the device, but for `leave`."""

    capturable = False

    def __init__(
        self,
        collective: Collective | None = None,
        *,
        on_end: Callable[[MemberLost], None] = _nothing,
    ) -> None:
        """`on_end` is called once, by whichever thread notices the end."""
        self._collective = collective
        self._on_end = on_end
        self.lost: MemberLost | None = None
        """Why the group is at its end."""

    def bind(self, collective: Collective) -> None:
        """From now on there are others. Raises MemberLost if the epoch ended before it began."""
        self._collective = collective
        if self.lost is not None:
            collective.abort()
            raise self.lost

    @property
    def collective(self) -> Collective:
        """Raises MemberLost if the epoch is over."""
        if self.lost is not None:
            raise self.lost
        assert self._collective is not None, "sums before the streams are open"
        return self._collective

    def total(self, x: Tensor) -> Tensor:
        """Raises MemberLost."""
        here = x.to("cpu", torch.float32).contiguous()
        self.collective.all_reduce(here.detach().numpy().reshape(-1))
        return here.to(x.device)

    def beside(self, x: Tensor, columns: range, width: int) -> Tensor:
        """Raises MemberLost, also if the columns of the ranks do not make up `width`."""
        rows, group = x.shape[0], self.collective
        if not rows:
            return torch.empty(0, width, device=x.device)
        own = x.detach().to("cpu", torch.float32).contiguous()
        data = own.numpy().reshape(-1).data.cast("B")
        parts = group.gather(data, rows * width * 4)
        for rank, part in enumerate(parts):
            if not part or len(part) % (4 * rows):
                raise group.lost(rank, "sent columns of another shape")
        tables = [torch.frombuffer(part, dtype=torch.float32).reshape(rows, -1) for part in parts]
        joined = torch.cat(tables, 1)
        if joined.shape[1] != width or tables[group.rank].shape[1] != len(columns):
            late = min({*range(len(parts))} - {group.rank})
            how = f"and the others have {joined.shape[1]} columns together, not {width}"
            raise group.lost(late, how)
        return joined.to(x.device)

    def share(self, x: Tensor) -> Tensor:
        """The leader's `x` of any dtype, at all ranks; filled in where it is. Raises MemberLost."""
        group, here = self.collective, x.detach().to("cpu").contiguous()
        raw = here.view(-1).view(torch.uint8).numpy().data
        for first in range(0, len(raw), SHARED_BYTES):
            piece = raw[first : first + SHARED_BYTES]
            if group.rank == 0:
                group.broadcast(piece)
                continue
            came = group.receive(SHARED_S)
            if len(came) != len(piece):
                raise group.lost(0, "shared hidden states of another size")
            piece[:] = came
        return here.to(x.device)

    def leave(self, why: MemberLost) -> None:
        """End the group for all, from any thread: their sums fail, and so do ours, saying `why`."""
        if self.lost is not None:
            return
        self.lost = why
        if self._collective is not None:
            self._collective.abort()
        self._on_end(why)
