"""What service a plan gives at a load, without simulating it: expected times of its tokens.

A max-flow is capacity, not service: a chain over all machines may pass most tokens a second and yet
keep each of them waiting longest. So a search that shall serve well needs the latency of a plan,
ten thousand times a second. `mean_field` has the model in numpy and tells the theory;
`router/native_latency.h` is the same compiled (40 us for 24 units in three rounds, where numpy
takes 1 ms; 4 ms and more for 256). The simulator is the judge: on Helix's clusters, at
Helix's own loads, plans that were searched with this estimate take 12 to 15 % longer per token
than it says (a search finds where it errs), other plans within 7 %; first tokens are within 25 %
(benchmarks/service.py prints both). The highest load that a plan serves is told worse: 20 to 90 %
too high or too low.

Rejected: the max-flow's own shares (it is indifferent between a fast and a slow route below
capacity); Wardrop equilibria by Frank-Wolfe (tens of iterations, and real clients do not reach
them); the one fastest route at no load (blind to convoys behind the only copy of a stage).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hexswarm.records import Span
from hexswarm.router import native
from hexswarm.router.placement.cluster import Cluster, Model
from hexswarm.router.placement.compiled_latency import CompiledLatency
from hexswarm.router.placement.expected import NOWHERE, Estimate, Load, tables
from hexswarm.router.placement.flow import arrays
from hexswarm.router.placement.mean_field import CONVOY, FULL, SPREAD, MeanField
from hexswarm.router.placement.plan import Unit

ROUNDS = 6
"""Iterations of choice and times; a search does with `QUICK`."""
QUICK = 3


class Latency:
    """Estimates for placements of the same units; as `Flow`, but how long instead of how much."""

    def __init__(
        self, cluster: Cluster, model: Model, units: Sequence[Unit], *, compiled: bool | None = None
    ) -> None:
        self._tables = tables(cluster, model, units)
        self._compiled = native.available() if compiled is None else compiled
        self._solvers: dict[tuple[Load, int], CompiledLatency] = {}

    def estimate(self, spans: Sequence[Span | None], load: Load, rounds: int = ROUNDS) -> Estimate:
        """One span for each unit, None: it idles."""
        first, end = arrays(spans)
        return self.estimate_of(first, end, load, rounds)

    def estimate_of(
        self, first: Sequence[int], end: Sequence[int], load: Load, rounds: int = ROUNDS
    ) -> Estimate:
        """The same of [first, end) as numbers that a `Flow` took; first == end: it idles."""
        if not self._compiled:
            return MeanField(self._tables, np.array(first), np.array(end), load).settled(rounds)
        found = self._solver(load, rounds).expect(first, end)
        if found is None:
            return NOWHERE
        (ttft_s, long_ttft_s, tpot_s, stages, busiest, kv), shares = found
        return Estimate(ttft_s, long_ttft_s, tpot_s, stages, busiest, kv, shares)

    def _solver(self, load: Load, rounds: int) -> CompiledLatency:
        held = self._solvers.get((load, rounds))
        if held is None:
            if len(self._solvers) > 64:  # one for each load: a sweep needs no more
                self._solvers.clear()
            held = self._solvers[load, rounds] = self._solve_for(load, rounds)
        return held

    def _solve_for(self, load: Load, rounds: int) -> CompiledLatency:
        known = self._tables
        given: dict[str, Any] = {
            "chunk": known.chunk(load.chunk_tokens),
            **{name: getattr(known, name) for name in ("one_way", "token_s", "id_s")},
            **{name: getattr(known, name) for name in ("decode", "room")},
        }
        numbers = {
            "requests_per_s": load.requests_per_s,
            "output_tokens": load.output_tokens,
            "chunk_tokens": load.chunk_tokens,
            "chunks": load.input_tokens / load.chunk_tokens,
            "long_chunks": load.long_input_tokens / load.chunk_tokens,
            "context": load.input_tokens + load.output_tokens,
            "variance": load.variance,
            "spread": SPREAD,
            "full": FULL,
            "convoy": CONVOY,
        }
        return CompiledLatency(known.layers, given, numbers, rounds)
