"""What a placement is worth: the largest flow of tokens that it passes (Helix, ASPLOS'25).

A token enters at a unit that holds layer 0 and leaves at one that holds the last layer; each hop
ends at a later layer. Unit i, which holds [first_i, end_i), hands on to j if and only if
first_j <= end_i < end_j: j then runs its layers from end_i on (*partial entry*, which Helix has and
does not use: with it nearly every placement is connected, and local search moves freely). A unit
passes at most T_i(k) tokens a second for its k *held* layers, also for those that it enters late;
links and connections bound the rest (`rates`).

The value is the objective of Helix's MILP and equals its published figures to all digits. It is a
capacity: how soon tokens come is another matter (`latency`).

Rejected: networkx (5 ms for 24 units where the compiled form takes 3-7 us and scipy 2 ms; it stays
the oracle in tests); keeping the flow of the last placement and mending it after a move (much state
to keep right, to save microseconds).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import maximum_flow

from hexswarm.errors import UsageError
from hexswarm.records import Span
from hexswarm.router import native
from hexswarm.router.placement.cluster import Cluster, Model
from hexswarm.router.placement.compiled import CompiledFlow
from hexswarm.router.placement.plan import Unit
from hexswarm.router.placement.rates import Rates, rates

_MOST = 2.0**31 - 1


@dataclass(frozen=True, slots=True)
class Edge:
    """What one unit hands to another; None is the coordinator."""

    sender: int | None
    receiver: int | None
    tokens_per_s: float
    capacity: float
    """Tokens a second of the link and of the connections at its ends."""


class Flow:
    """Max-flows of placements of the same units."""

    def __init__(
        self, cluster: Cluster, model: Model, units: Sequence[Unit], *, compiled: bool | None = None
    ) -> None:
        self.rates = rates(cluster, model, units)
        self._solver = solver(self.rates, compiled=compiled)

    def value(self, spans: Sequence[Span | None]) -> float:
        """Tokens a second; one span for each unit, None: it idles."""
        return self.value_of(*arrays(spans))

    def value_of(self, first: Sequence[int], end: Sequence[int]) -> float:
        """The same of [first, end) apart; first == end: it idles. Lists are quicker than arrays."""
        self._solver.load(first, end)
        return self._solver.value()

    def edges(self, spans: Sequence[Span | None]) -> tuple[Edge, ...]:
        """The hops that carry something in one largest flow."""
        self._solver.load(*arrays(spans))
        found = zip(*(column.tolist() for column in self._solver.edges()), strict=True)
        count = self.rates.units

        def name(unit: int) -> int | None:
            return None if unit == count else unit

        return tuple(
            Edge(name(a), name(b), carried, float(self.rates.link[a, b])) for a, b, carried in found
        )


def arrays(spans: Sequence[Span | None]) -> tuple[list[int], list[int]]:
    """[first] and [end] of spans; both 0: it idles."""
    return [span.first if span else 0 for span in spans], [
        span.end if span else 0 for span in spans
    ]


def spans_of(first: Any, end: Any) -> tuple[Span | None, ...]:
    """The inverse of `arrays`."""
    pairs = zip(np.asarray(first).tolist(), np.asarray(end).tolist(), strict=True)
    return tuple(Span(a, b) if a < b else None for a, b in pairs)


def solver(rates: Rates, *, compiled: bool | None = None) -> CompiledFlow | ScipyFlow:
    """The compiled one where there is one; `compiled` chooses."""
    if native.available() if compiled is None else compiled:
        return CompiledFlow(rates)
    return ScipyFlow(rates)


class ScipyFlow:
    """The same by scipy: it takes whole numbers, so values are right to about a billionth."""

    def __init__(self, rates: Rates) -> None:
        self._rates = rates
        self.first, self.end = np.zeros((2, rates.units), np.int32)

    def load(self, first: Sequence[int], end: Sequence[int]) -> None:
        """A placement to value."""
        self.first[:], self.end[:] = first, end

    def value(self) -> float:
        """Of the loaded placement."""
        held = self.end - self.first
        wrong = (held < 0) | (held > self._rates.most) | (self.first < 0)
        if (wrong | (self.end > self._rates.layers)).any():
            raise UsageError("a unit holds more layers than fit, or layers that do not exist")
        return self._solve()[0]

    def edges(self) -> tuple[Any, Any, Any]:
        """As `CompiledFlow.edges`."""
        self.value()
        count = self._rates.units
        flow = self._solve()[1].tocoo()
        hop = (flow.data > 0) & ((flow.row // 2 != flow.col // 2) | (flow.row >= 2 * count))
        hop &= flow.row < 2 * count + 1
        return flow.row[hop] // 2, flow.col[hop] // 2, flow.data[hop]

    def _solve(self) -> tuple[float, Any]:
        """The flow and its matrix; vertices: in and out of each unit, source, sink, its limit."""
        used, count, r = self.end > self.first, self._rates.units, self._rates
        passes = np.zeros(count)
        for unit in np.flatnonzero(used).tolist():
            passes[unit] = r.passes(unit, int(self.first[unit]), int(self.end[unit]))
        capacity: dict[tuple[int, int], float] = {}
        source, sink = 2 * count, 2 * count + 1
        begins, finishes = used & (self.first == 0), used & (self.end == r.layers)
        for i in np.flatnonzero(used).tolist():
            capacity[2 * i, 2 * i + 1] = passes[i]
            if begins[i]:
                capacity[source, 2 * i] = min(passes[i], r.link[count, i])
            if finishes[i]:
                capacity[2 * i + 1, sink] = min(passes[i], r.link[i, count])
            enters = used & (self.first <= self.end[i]) & (self.end[i] < self.end)
            for j in np.flatnonzero(enters).tolist():
                capacity[2 * i + 1, 2 * j] = min(passes[i], r.link[i, j])
        limit = min(r.limit, float(passes[begins].sum()))
        if limit <= 0:
            return 0.0, coo_array((2 * count + 3,) * 2)
        capacity[2 * count + 2, source] = limit
        scale = _MOST / limit
        rows, columns = zip(*capacity, strict=True)
        whole = np.rint(np.minimum(list(capacity.values()), limit) * scale).astype(np.int32)
        graph = coo_array((whole, (rows, columns)), shape=(2 * count + 3,) * 2).tocsr()
        found = maximum_flow(graph, 2 * count + 2, sink)
        return found.flow_value / scale, found.flow / scale
