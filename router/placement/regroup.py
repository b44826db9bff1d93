"""The general plan for machines of several GPUs: groupings and placement searched together.

`search` places a fixed list of units. Around it goes this loop: one machine's GPUs are grouped anew
(a group is split, two are merged, or any partition is drawn), the new groups begin where their GPUs
held layers before, a short search mends the placement, and what is better stays. A grouping whose
bound is below the flow already found is passed over at once; that is most of them.

*Service as flow.* Under a deadline, what a unit can carry is not T(k) at the batch that its memory
allows but at the largest batch whose steps keep to the deadline: each layer may take
(time per token - hops) / layers / `WAIT`, where a row on average waits for half a step of the batch
before its own. With T(k) so limited (`speeds.within`) every route of a flow meets the deadline,
whichever units it passes, and the largest flow is the highest rate: routes mix freely, nothing is
tied to one pipeline. Ways that alone take more than `FAR` of a token's time are closed, others are
paid for out of a fixed allowance for hops.

Rejected: units' groupings as further annealing moves inside the compiled walk (a grouping changes
the number of units, and with it all tables); a latency model in the inner loop (it is a hundred
times slower than the flow and, with deadlines met by construction, says the same).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from hexswarm.errors import UsageError
from hexswarm.records import Span
from hexswarm.router.placement.attainment import Slo
from hexswarm.router.placement.bound import upper_bound
from hexswarm.router.placement.cluster import COORDINATOR, Cluster, Model, Node, Way
from hexswarm.router.placement.groups import DEGREES, grouping, partitions
from hexswarm.router.placement.plan import Gpu, Plan, Unit, whole_units
from hexswarm.router.placement.search import search
from hexswarm.router.placement.speeds import within

WAIT = 1.5
"""A row's time at a stage, in steps."""

FAR = 0.1
"""One way of a link, in parts of a token's time."""

_CLOSED = 1e-3
"""Bytes a second of a way that is not to be used."""

_TRIAL_S = 0.25
"""Of search for one grouping."""


@dataclass(frozen=True, slots=True)
class Deadline:
    """What an answer may take, as the planner uses it."""

    token_s: float
    """For each token, prompt included."""
    hops_s: float
    """What of it is left to the network."""
    max_rows: int = 64

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


@dataclass(frozen=True, slots=True)
class General:
    """A plan whose units may all hand to each other."""

    plan: Plan
    flow: float
    """Tokens a second within the deadline."""
    groupings: int
    """That were searched."""


def general(
    cluster: Cluster,
    model: Model,
    deadline: Deadline,
    *,
    rng: random.Random,
    clock: Callable[[], float],
    until: float,
    start: Plan | None = None,
    told: Callable[[float], None] = lambda flow: None,
) -> General:
    """The best plan until `clock` says `until`; from `start`, or from all machines in halves.

    `clock` is asked for slices of time alone: what is found depends on how many fit.
    """
    near = deadline.near(cluster)
    best = start or _halves(cluster, model)
    best, flow = _placed(near, model, deadline, best, rng, clock, min(until, clock() + _TRIAL_S))
    count = 1
    while clock() < until:
        tried = regrouped(cluster, best, rng)
        while rng.random() < 0.3:
            tried = regrouped(cluster, tried, rng)
        if upper_bound(near, model, deadline.limited(model, tried.units)) <= flow:
            continue
        slice_end = min(until, clock() + _TRIAL_S)
        placed, found = _placed(near, model, deadline, tried, rng, clock, slice_end)
        count += 1
        if found >= flow:
            if found > flow:
                told(found)
            best, flow = placed, found
    return General(best, flow, count)


def regrouped(cluster: Cluster, plan: Plan, rng: random.Random) -> Plan:
    """The plan with one machine's GPUs grouped anew; the same plan where nothing can be."""
    model = cluster.model(plan.model)
    nodes = [node for node in cluster.nodes if _own(cluster, plan, node)]
    if not nodes:
        return plan
    node = rng.choice(nodes)
    mine = _own(cluster, plan, node)
    degrees = [len(_members(cluster, unit)) for unit, _ in mine]
    made = grouping(cluster, model, node, _changed(degrees, rng))
    if made is None:
        return plan
    held = [(_members(cluster, unit), span) for unit, span in mine]
    others = [
        (unit, span)
        for unit, span in zip(plan.units, plan.spans, strict=True)
        if all(unit is not old for old, _ in mine)
    ]
    new = [(unit, _inherited(unit, held)) for unit in made]
    units, spans = zip(*others, *new, strict=True)
    return Plan(plan.model, plan.cluster, units, spans)


def _placed(
    near: Cluster,
    model: Model,
    deadline: Deadline,
    plan: Plan,
    rng: random.Random,
    clock: Callable[[], float],
    until: float,
) -> tuple[Plan, float]:
    """The plan's units placed anew, from where they are."""
    limited = deadline.limited(model, plan.units)
    found = search(
        near, model, limited, rng=rng, expired=lambda: clock() >= until, start=plan.spans
    )
    return replace(plan, spans=found.spans), found.flow


def _halves(cluster: Cluster, model: Model) -> Plan:
    """Every machine in two groups, or in one where it has a single GPU; all idle."""
    units: list[Unit] = []
    whole = {unit.id: unit for unit in whole_units(cluster, model.name)}
    for node in cluster.nodes:
        count = cluster.types[node.type].gpus
        if cluster.types[node.type].spec is None:
            units += [whole[node.id]] if node.id in whole else []
            continue
        sizes = [size for size in (count - count // 2, count // 2) if size]
        made = grouping(cluster, model, node, sizes) or grouping(cluster, model, node, [count])
        units += made or ()
    if not units:
        raise UsageError(f"no machine of {cluster.name} can hold one layer of {model.name}")
    return Plan(model.name, cluster.name, tuple(units), (None,) * len(units))


def _own(cluster: Cluster, plan: Plan, node: Node) -> list[tuple[Unit, Span | None]]:
    """A machine's units, if its GPUs can be regrouped: two or more, and in no group of a LAN."""
    if cluster.types[node.type].gpus < 2 or cluster.types[node.type].spec is None:
        return []
    mine = []
    for unit, span in zip(plan.units, plan.spans, strict=True):
        machines = {name for name, _ in _members(cluster, unit)}
        if node.id in machines:
            if len(machines) > 1:
                return []
            mine.append((unit, span))
    return mine


def _members(cluster: Cluster, unit: Unit) -> tuple[Gpu, ...]:
    if unit.members:
        return unit.members
    count = cluster.types[cluster.node(unit.node).type].gpus
    return tuple((unit.node, gpu) for gpu in range(count))


def _changed(degrees: Sequence[int], rng: random.Random) -> tuple[int, ...]:
    """Another partition of as many GPUs."""
    sizes = list(degrees)
    move = rng.random()
    if move < 0.4 and max(sizes) > 1:
        whole = rng.choice([size for size in sizes if size > 1])
        sizes.remove(whole)
        part = rng.randint(1, whole // 2)
        sizes += [whole - part, part]
    elif move < 0.8 and len(sizes) > 1:
        first, second = rng.sample(sizes, 2)
        sizes.remove(first)
        sizes.remove(second)
        sizes.append(first + second)
    else:
        return rng.choice(list(partitions(sum(sizes))))
    if not set(sizes) <= set(DEGREES):
        return tuple(degrees)
    return tuple(sorted(sizes, reverse=True))


def _inherited(unit: Unit, held: Sequence[tuple[Sequence[Gpu], Span | None]]) -> Span | None:
    """Where a new group's GPUs held layers: as much of each old span as it has of that group."""
    low, high = float("inf"), 0.0
    for members, span in held:
        shared = [row for row, gpu in enumerate(members) if gpu in unit.members]
        if span is None or not shared:
            continue
        layer = len(span) / len(members)
        low = min(low, span.first + shared[0] * layer)
        high = max(high, span.first + (shared[-1] + 1) * layer)
    if high == 0.0:
        return None
    first = int(low)
    return Span(first, min(max(round(high), first + 1), first + unit.profile.max_layers))
