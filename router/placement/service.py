"""Plans that serve well: enough flow for a load, then the lowest expected latency.

Max-flow alone is capacity: the plan of the largest flow uses every slow machine and sends every
request across all of them, and below its capacity it is slower than a plan of half the flow. So
the objective has two levels:

1. flow >= `margin` x load (T(k) and with it the flow stand for a machine at the batch that is
   expected in its cluster; a fifth more covers bursts). Below that, more flow is better;
2. the lowest cost tpot / limit + ttft of a long prompt / limit, by `latency`'s estimate at that
   load. What comes near the end of a unit's time, a link's bandwidth or KV room costs extra,
   steeply: there the estimate ends and queues begin.

The frontier over loads shows what capacity costs in latency: one plan for each load.

Rejected: a weighted sum of flow and latency (any weight is wrong at some load); the latency of
the fastest route at no load (blind to sharing, so it stacks all requests on the fast machines).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import count
from random import Random

from hexswarm.errors import UsageError
from hexswarm.records import Span
from hexswarm.router.placement.anneal import walk
from hexswarm.router.placement.cluster import Cluster, Model
from hexswarm.router.placement.expected import NOWHERE, Estimate, Load
from hexswarm.router.placement.flow import arrays, solver, spans_of
from hexswarm.router.placement.latency import QUICK, Latency
from hexswarm.router.placement.plan import Unit
from hexswarm.router.placement.rates import rates
from hexswarm.router.placement.search import Found, Placed, search

MARGIN = 1.2
"""Flow over load."""

TTFT_S, TPOT_S = 5.0, 1.0
"""The limits where none are asked for: what a reader of a chat puts up with."""

BUSY, CROWDED = 0.4, 0.7
"""Utilisation by prompts, and share of KV, from which on a plan pays for them: load comes in bursts
(the trace's arrivals vary by a third from one 3 s to the next)."""

BUSIEST, FULLEST = 0.35, 0.8
"""And up to which it serves. In the simulator 19 of 20 first tokens come within 5 s up to a mean of
0.3 where slow links are what is busy (geo24), and of 0.5 where machines are (single24); bursts fill
KV to 1.2 times its mean and more."""

_STEEP = 10.0

WALK = 8_000
"""Steps of one walk with 24 units: about a second."""
HEATS = (0.02, 0.008, 0.003)
"""Where walks begin, in units of the objective; all end at `COLD`."""
COLD = 0.0002
PATIENCE = 30
"""Pieces of a search by flow alone (a second or two), after which a walk begins anyhow."""


@dataclass(frozen=True, slots=True)
class Target:
    """What a plan shall serve, and how soon."""

    load: Load
    ttft_s: float = TTFT_S
    tpot_s: float = TPOT_S
    margin: float = MARGIN

    def __post_init__(self) -> None:
        if min(self.ttft_s, self.tpot_s, self.margin) <= 0:
            raise UsageError("limits and margin of a plan are positive")

    def cost(self, told: Estimate) -> float:
        """Of an estimate, in limits: 2 is both just kept."""
        slow = told.tpot_s / self.tpot_s + told.long_ttft_s / self.ttft_s
        crowd = max(told.busiest - BUSY, 0.0) + max(told.kv - CROWDED, 0.0)
        return slow + _STEEP * crowd

    def kept(self, told: Estimate) -> bool:
        """Whether a plan with this estimate keeps the limits."""
        fits = told.busiest <= BUSIEST and told.kv <= FULLEST
        return fits and told.tpot_s <= self.tpot_s and told.long_ttft_s <= self.ttft_s

    def at(self, tokens_per_s: float) -> Target:
        """The same for another load."""
        return replace(self, load=replace(self.load, tokens_per_s=tokens_per_s))


class Objective:
    """Scores placements of the same units; more is better.

    Below 0: too little flow, by its missing share. From 0 to 1: 1 / (1 + cost).
    """

    def __init__(self, latency: Latency, target: Target) -> None:
        self._latency, self._target = latency, target
        self.needed = target.margin * target.load.tokens_per_s

    def __call__(self, first: Sequence[int], end: Sequence[int], flow: float) -> float:
        """Of [first, end) of each unit, whose flow is known."""
        if flow < self.needed:
            return flow / self.needed - 1
        told = self._latency.estimate_of(first, end, self._target.load, QUICK)
        return 1 / (1 + self._target.cost(told))


@dataclass(frozen=True, slots=True)
class Served:
    """The best plan so far."""

    spans: tuple[Span | None, ...]
    flow: float
    """Tokens a second; less than `margin` x load if no plan was found that passes so much."""
    told: Estimate
    """At the target's load."""
    worth: float
    walks: int


def plan_for_service(
    cluster: Cluster,
    model: Model,
    units: Sequence[Unit],
    target: Target,
    *,
    rng: Random,
    expired: Callable[[], bool],
    start: Sequence[Span | None] | None = None,
    told: Callable[[Served], None] | None = None,
) -> Served:
    """The best placement that was found until `expired`, which is asked some twenty times a second.

    `told` hears of each better one.
    """
    hunt = _Hunt(cluster, model, units, target, rng, told)
    if start is not None:
        hunt.offer(*arrays(start))
    while units and not expired():
        hunt.walk(hunt.begin(expired), expired)
    return hunt.served()


class _Hunt:
    """Walks by service: from placements of enough flow, and on from the best."""

    def __init__(
        self,
        cluster: Cluster,
        model: Model,
        units: Sequence[Unit],
        target: Target,
        rng: Random,
        told: Callable[[Served], None] | None,
    ) -> None:
        self._place, self._target, self._rng, self._told = (
            (cluster, model, units),
            target,
            rng,
            told,
        )
        self._rates = rates(cluster, model, units)
        self._solver = solver(self._rates)
        self._latency = Latency(cluster, model, units)
        self._objective = Objective(self._latency, target)
        self._walks = 0
        self._best: Placed = ([0] * len(units), [0] * len(units))
        self._flow, self._worth = 0.0, -1.0

    def served(self) -> Served:
        """The best so far, estimated with care."""
        told = self._latency.estimate_of(*self._best, self._target.load)
        return Served(spans_of(*self._best), self._flow, told, self._worth, self._walks)

    def offer(self, first: Sequence[int], end: Sequence[int]) -> None:
        """Look at one placement: perhaps it is the best so far."""
        self._solver.load(first, end)
        flow = self._solver.value()
        worth = self._objective(first, end, flow)
        if worth <= self._worth:
            return
        self._best, self._flow, self._worth = (list(first), list(end)), flow, worth
        if self._told:
            self._told(self.served())

    def begin(self, expired: Callable[[], bool]) -> Placed:
        """Where the next walk begins: every third one anew, from a placement of enough flow or of
        up to twice as much, so that not all begin alike; the others from the best."""
        if self._walks % 3 and self._worth > 0:
            return self._best
        goal = self._objective.needed * self._rng.uniform(1.0, 2.0)
        asked = count()
        most = 0.0

        def heard(found: Found) -> None:
            nonlocal most
            most = found.flow
            self.offer(*arrays(found.spans))

        found = search(
            *self._place,
            rng=self._rng,
            expired=lambda: most >= goal or next(asked) > PATIENCE or expired(),
            told=heard,
        )
        return arrays(found.spans)

    def walk(self, begun: Placed, expired: Callable[[], bool]) -> None:
        """One walk, while it cools."""
        heat = HEATS[self._walks % len(HEATS)]
        self._walks += 1
        walked = walk(self._solver, self._rates, *begun, rng=self._rng, objective=self._objective)
        piece = max(20, 4_000 // (8 + self._rates.units))
        pieces = max(1, WALK // piece)
        cool = (COLD / heat) ** (1 / pieces)
        for at in range(pieces):
            walked.advance(piece, heat * cool**at, heat * cool ** (at + 1))
            self.offer(*walked.best)
            if expired():
                return


def frontier(
    cluster: Cluster,
    model: Model,
    units: Sequence[Unit],
    target: Target,
    loads: Sequence[float],
    *,
    rng: Random,
    expired: Callable[[], Callable[[], bool]],
) -> tuple[Served, ...]:
    """What capacity costs in latency: a plan for each load, in tokens a second.

    `expired` begins a deadline for one of them. Each search also begins from the plan before it.
    """
    found: list[Served] = []
    for tokens_per_s in loads:
        start = found[-1].spans if found else None
        at = target.at(tokens_per_s)
        found.append(
            plan_for_service(cluster, model, units, at, rng=rng, expired=expired(), start=start)
        )
    return tuple(found)


def most_load(latency: Latency, spans: Sequence[Span | None], target: Target) -> float:
    """Tokens a second up to which the estimate keeps the limits; bisection, 2 % exact."""
    low, high = 0.0, target.load.tokens_per_s

    if latency.estimate(spans, target.load) is NOWHERE:
        return 0.0

    def keeps(tokens_per_s: float) -> bool:
        at = target.at(tokens_per_s)
        return at.kept(latency.estimate(spans, at.load))

    while keeps(high):
        low, high = high, 2 * high
        if high > 1e9:
            return math.inf
    while high - low > 0.02 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if keeps(middle) else (low, middle)
    return low
