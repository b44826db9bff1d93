"""What a general plan may be for: the most flow, the most flow in time, or service at a load.

`regroup` varies how GPUs are grouped; an aim says what the units of one grouping are worth, and
places them. Three functions are enough: the cluster as the aim sees it, what no placement of some
units can be worth (most groupings are passed over by it, without a search), and a short search.

*Service as flow* (`Deadline`). Under a deadline, what a unit can carry is not T(k) at the batch
that its memory allows but at the largest batch whose steps keep to the deadline: each layer may
take (time per token - hops) / layers / `WAIT`, where a row on average waits for half a step of the
batch before its own. With T(k) so limited (`speeds.within`) every route of a flow meets the
deadline, whichever units it passes, and the largest flow is the highest rate: routes mix freely,
nothing is tied to one pipeline. Ways that alone take more than `FAR` of a token's time are closed,
others are paid for out of a fixed allowance for hops.

*Service by the estimate* (`Service`). `service.plan_for_service` begins; another grouping then gets
a walk of about a second by the same objective from where its GPUs held layers before. The estimate
costs a hundred times as much as a flow, so groupings are tried by the dozen instead of the hundred.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Protocol

from hexswarm.records import Span
from hexswarm.router.placement import service
from hexswarm.router.placement.anneal import walk
from hexswarm.router.placement.attainment import Slo
from hexswarm.router.placement.bound import upper_bound
from hexswarm.router.placement.cluster import COORDINATOR, Cluster, Model, Way
from hexswarm.router.placement.flow import arrays, solver, spans_of
from hexswarm.router.placement.latency import Latency
from hexswarm.router.placement.plan import Unit
from hexswarm.router.placement.rates import rates
from hexswarm.router.placement.regions import MOST
from hexswarm.router.placement.search import REHEAT, Hunt, search
from hexswarm.router.placement.speeds import within

WAIT = 1.5
"""A row's time at a stage, in steps."""

FAR = 0.1
"""One way of a link, in parts of a token's time."""

_CLOSED = 1e-3
"""Bytes a second of a way that is not to be used."""

_SHORT = 40_000
"""Steps of a round of annealing by flow: it must have cooled when a trial ends."""
_WALK = 6_000
"""Steps of a walk by service with 24 units."""
_PIECES = 60

Spans = Sequence[Span | None]


@dataclass(frozen=True, slots=True)
class Site:
    """Units to be placed."""

    cluster: Cluster
    model: Model
    units: Sequence[Unit]


@dataclass(frozen=True, slots=True)
class Sited:
    """A placement of some units."""

    spans: tuple[Span | None, ...]
    flow: float
    """Tokens a second."""
    worth: float
    """By the aim; more is better."""


class Aim(Protocol):
    """What a plan is for."""

    @property
    def trial_s(self) -> float:
        """Of search for one grouping."""

    def near(self, cluster: Cluster) -> Cluster:
        """The cluster as it may be used."""

    def most(self, site: Site) -> float:
        """No placement of these units is worth more."""

    def place(self, site: Site, start: Spans, rng: Random, expired: Callable[[], bool]) -> Sited:
        """The best placement that was found until `expired`, `start` or better."""


@dataclass(frozen=True, slots=True)
class Capacity:
    """The largest flow."""

    trial_s: float = 0.25

    def near(self, cluster: Cluster) -> Cluster:
        return cluster

    def most(self, site: Site) -> float:
        return upper_bound(site.cluster, site.model, site.units)

    def place(self, site: Site, start: Spans, rng: Random, expired: Callable[[], bool]) -> Sited:
        if len(site.units) > MOST:
            found = search(
                site.cluster, site.model, site.units, rng=rng, expired=expired, start=start
            )
            return Sited(found.spans, found.flow, found.flow)
        hunt = Hunt(rates(site.cluster, site.model, site.units), rng=rng)
        hunt.offer(arrays(start))
        while not (expired() or hunt.done):
            again = hunt.flow > 0 and hunt.rounds % 2 == 0
            for _ in hunt.round(_SHORT, heat=REHEAT if again else None):
                if expired():
                    break
        return Sited(spans_of(*hunt.placed), hunt.flow, hunt.flow)


@dataclass(frozen=True, slots=True)
class Deadline:
    """The largest flow of answers in time: what an answer may take, as the planner uses it."""

    token_s: float
    """For each token, prompt included."""
    hops_s: float
    """What of it is left to the network."""
    max_rows: int = 64
    trial_s: float = 0.25

    @classmethod
    def of(cls, slo: Slo, hops: float = 0.1, max_rows: int = 64) -> Deadline:
        """With a share of the time for hops."""
        return cls(slo.token_s, hops * slo.token_s, max_rows)

    def layer_s(self, model: Model) -> float:
        """One layer's time for a batch."""
        return (self.token_s - self.hops_s) / model.layers / WAIT

    def limited(self, model: Model, units: Sequence[Unit]) -> list[Unit]:
        """The units with what they carry within it; one that is too slow carries nothing."""
        found = []
        for unit in units:
            profile = within(unit.profile, model, self.layer_s(model), self.max_rows)
            if profile is None:
                profile = replace(unit.profile, throughput=(0.0,) * len(unit.profile.throughput))
            found.append(replace(unit, profile=profile))
        return found

    def near(self, cluster: Cluster) -> Cluster:
        """The cluster without the ways that are too long; to the coordinator all remain."""
        longest = FAR * self.token_s
        regions = {
            pair: way if way.one_way_s <= longest else Way(_CLOSED, way.one_way_s)
            for pair, way in cluster.regions.items()
        }
        home = cluster.coordinator.region
        for (a, b), way in cluster.regions.items():
            regions |= {(COORDINATOR, b): way} if a == home else {}
            regions |= {(a, COORDINATOR): way} if b == home else {}
        coordinator = replace(cluster.coordinator, region=COORDINATOR)
        return replace(cluster, regions=regions, coordinator=coordinator)

    def most(self, site: Site) -> float:
        return upper_bound(site.cluster, site.model, self.limited(site.model, site.units))

    def place(self, site: Site, start: Spans, rng: Random, expired: Callable[[], bool]) -> Sited:
        limited = self.limited(site.model, site.units)
        found = search(site.cluster, site.model, limited, rng=rng, expired=expired, start=start)
        return Sited(found.spans, found.flow, found.flow)


@dataclass(frozen=True, slots=True)
class Service:
    """Enough flow for a load, then the soonest tokens; worth as `service.Objective` has it."""

    target: service.Target
    trial_s: float = 1.0

    @property
    def needed(self) -> float:
        """Tokens a second."""
        return self.target.margin * self.target.load.tokens_per_s

    def near(self, cluster: Cluster) -> Cluster:
        return cluster

    def most(self, site: Site) -> float:
        bound = upper_bound(site.cluster, site.model, site.units)
        return bound / self.needed - 1 if bound < self.needed else 1.0

    def place(self, site: Site, start: Spans, rng: Random, expired: Callable[[], bool]) -> Sited:
        if not any(start):
            found = service.plan_for_service(
                site.cluster, site.model, site.units, self.target, rng=rng, expired=expired
            )
            return Sited(found.spans, found.flow, found.worth)
        return self._mended(site, start, rng, expired)

    def _mended(self, site: Site, start: Spans, rng: Random, expired: Callable[[], bool]) -> Sited:
        """A walk from where units already are; by flow alone until that is enough."""
        table = rates(site.cluster, site.model, site.units)
        solved = solver(table)
        objective = service.Objective(Latency(site.cluster, site.model, site.units), self.target)
        solved.load(*arrays(start))
        begun = tuple(start)
        if solved.value() < self.needed:
            begun = self._enough(site, start, rng, expired)
        walked = walk(solved, table, *arrays(begun), rng=rng, objective=objective)
        steps = max(_PIECES, _WALK * 24 // max(24, len(site.units)))
        hot = service.HEATS[-1]
        cool = (service.COLD / hot) ** (1 / _PIECES)
        for at in range(_PIECES):
            if expired():
                break
            walked.advance(steps // _PIECES, hot * cool**at, hot * cool ** (at + 1))
        return Sited(spans_of(*walked.best), walked.flow, walked.worth)

    def _enough(
        self, site: Site, start: Spans, rng: Random, expired: Callable[[], bool]
    ) -> tuple[Span | None, ...]:
        """A placement of enough flow near `start`, or the best one so far."""
        flows = [0.0]
        asked = itertools.count()
        return search(
            site.cluster,
            site.model,
            site.units,
            rng=rng,
            expired=lambda: flows[-1] >= self.needed or next(asked) > 10 or expired(),
            start=start,
            told=lambda found: flows.append(found.flow),
        ).spans
