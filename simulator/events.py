"""Virtual time: what happens next, in order.

A heap of (time, number, call). The number breaks ties by age, so that equal seeds give equal runs
whatever the calls are. Nothing is ever cancelled: an event that is no longer wanted finds that out
by itself (a dead unit, an older epoch of a session), which costs less than keeping handles.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from typing import Any

Call = Callable[..., None]


class Agenda:
    """Events to come; each call gets the moment and what it was scheduled with."""

    __slots__ = ("_heap", "_number", "now")

    def __init__(self) -> None:
        self.now = 0.0
        self._heap: list[tuple[float, int, Call, tuple[Any, ...]]] = []
        self._number = 0

    def __len__(self) -> int:
        return len(self._heap)

    def at(self, when: float, call: Call, *arguments: Any) -> None:
        """Do it at `when`, which is not past."""
        assert when >= self.now, "an event in the past"
        self._number += 1
        heapq.heappush(self._heap, (when, self._number, call, arguments))

    @property
    def next_s(self) -> float:
        """When the next one is; infinite if there is none."""
        return self._heap[0][0] if self._heap else math.inf

    def run(self, until_s: float) -> None:
        """Everything up to and including `until_s`, which is then now."""
        heap, pop = self._heap, heapq.heappop
        while heap and heap[0][0] <= until_s:
            self.now, _, call, arguments = pop(heap)
            call(self.now, *arguments)
        self.now = max(self.now, until_s)
