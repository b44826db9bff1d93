"""A batch that was given to the device, and its results once it has landed.

A GPU is told what to do and does it later. `Runner.launch` only tells it: numbers go up out of
pinned memory, the layers follow, and what the host wants comes down into pinned memory; an event
stands behind all that. So the host can prepare the next batch, and hand over the results of the
last one, while this one is computed; `results` waits for the event, which is the only time in a
step that anybody waits for the device. On a CPU launching computes, and nothing is pending.

Copies go on the stream of the layers. Rejected: a stream of their own for copies. 64 rows of 8 KB
go up or down in 20 us, beside a step of 10 ms, and would need a second set of the graphs' buffers.
Rejected, too: a ring of pinned slots kept by hand. PyTorch keeps pinned memory that was freed, and
gives it out again only when the copies that used it are done, which is what such a ring is for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hexswarm.peer.steps import Result

Land = Callable[[], Sequence[Result]]
"""Makes results of what has come down."""


@dataclass(frozen=True, slots=True, eq=False)
class Chosen:
    """In place of token ids: one that the tail chose a moment ago, which the host has not seen."""

    tokens: Tensor
    """Of the flight that chose it, on the device."""
    index: int


class Flight:
    """A batch under way; made by the thread that owns the device, like all that it is told."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self.chosen: dict[int, Chosen] = {}
        """By row: what a step that goes on with its token may give as ids. Only where head and tail
        are one, and the choice depends on nothing that the host has still to find out."""
        self._device = device
        self._results: list[Result | None] = [None] * rows
        self._parts: list[tuple[Sequence[int], Land]] = []
        self._landing: Any = None

    def put(self, index: int, result: Result) -> None:
        """The result of a row that needs no computing."""
        self._results[index] = result

    def add(self, indices: Sequence[int], land: Land) -> None:
        """Rows whose results `land` makes when the batch has landed."""
        self._parts.append((indices, land))

    def depart(self) -> Flight:
        """All is told: mark where the batch ends."""
        if self._device.type == "cuda" and self._parts:
            # Whoever waits sleeps: a volunteer's machine is shared.
            self._landing = torch.cuda.Event(blocking=True)
            self._landing.record()
        return self

    @property
    def pending(self) -> bool:
        """Whether `results` may have to wait."""
        return self._landing is not None

    def results(self) -> list[Result]:
        """One per row, in order; waits for the device."""
        if self._landing is not None:
            self._landing.synchronize()
        with torch.inference_mode():
            for indices, land in self._parts:
                for index, result in zip(indices, land(), strict=True):
                    self._results[index] = result
        self._parts.clear()
        return [result for result in self._results if result is not None]


def up(values: np.ndarray[Any, Any], device: torch.device) -> Tensor:
    """`values` on the device, without waiting for it; on a CPU they are not copied."""
    x = torch.from_numpy(values)
    if device.type == "cpu":
        return x
    pinned = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    pinned.copy_(x)
    return pinned.to(device, non_blocking=True)


def down(x: Tensor) -> Tensor:
    """`x` on the host, there when its flight has landed; on a CPU it is not copied."""
    if x.device.type == "cpu":
        return x
    pinned = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    pinned.copy_(x, non_blocking=True)
    return pinned
