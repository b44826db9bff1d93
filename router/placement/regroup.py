"""The general plan for machines of several GPUs: groupings and placement searched together.

`search` places a fixed list of units. Around it goes this loop: one machine's GPUs are grouped anew
(a group is split, two are merged, or any partition is drawn), the new groups begin where their GPUs
held layers before, a short search mends the placement, and what is better stays. A grouping that
cannot be worth more than what was found is passed over at once; that is most of them. What a plan
is for is the `aims`' matter: flow, flow within a deadline, or service at a load.

It begins with all machines as wholes and with all in halves, and goes on from the better one.

Rejected: units' groupings as further annealing moves inside the compiled walk (a grouping changes
the number of units, and with it all tables); a latency model in the inner loop for deadlines (it is
a hundred times slower than the flow and, with deadlines met by construction, says the same).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from hexswarm.errors import UsageError
from hexswarm.records import Span
from hexswarm.router.placement.aims import Aim, Site, Sited
from hexswarm.router.placement.cluster import Cluster, Model, Node
from hexswarm.router.placement.groups import DEGREES, MOST_GPUS, grouping, partitions
from hexswarm.router.placement.plan import Gpu, Plan, Unit, whole_units
from hexswarm.router.placement.speeds import estimate_of

_BEGIN = 0.15
"""Of the time, for each of the two plans to begin from."""

_AGAIN = 0.15
"""Of the trials go to the best grouping itself."""


@dataclass(frozen=True, slots=True)
class General:
    """A plan whose units may all hand to each other."""

    plan: Plan
    flow: float
    """Tokens a second, by the aim: within a deadline, if there is one."""
    groupings: int
    """That were searched."""


def general(
    cluster: Cluster,
    model: Model,
    aim: Aim,
    *,
    rng: random.Random,
    clock: Callable[[], float],
    until: float,
    start: Plan | None = None,
    told: Callable[[Plan, Sited], None] = lambda plan, sited: None,
) -> General:
    """The best plan until `clock` says `until`; `told` hears of each better one.

    `clock` is asked for slices of time alone: what is found depends on how many fit.
    """
    hunt = _Hunt(cluster, model, aim, rng, clock, until, told)
    if start is not None:
        hunt.attempt(replace(start, pipelines=()), aim.trial_s)
    else:
        hunt.attempt(_whole(cluster, model), aim.trial_s)  # soon something to tell
        slice_s = _BEGIN * (until - clock()) - aim.trial_s
        for begun in (hunt.plan, _halves(cluster, model)):
            hunt.attempt(begun, max(aim.trial_s, slice_s))
    while clock() < until:
        tried = hunt.plan
        if rng.random() > _AGAIN:
            tried = regrouped(cluster, tried, rng)
            while rng.random() < 0.3:
                tried = regrouped(cluster, tried, rng)
        hunt.attempt(tried, aim.trial_s)
    return General(settled(cluster, hunt.plan), hunt.best.flow, hunt.count)


class _Hunt:
    """The best plan so far."""

    def __init__(
        self,
        cluster: Cluster,
        model: Model,
        aim: Aim,
        rng: random.Random,
        clock: Callable[[], float],
        until: float,
        told: Callable[[Plan, Sited], None],
    ) -> None:
        self._near, self._model, self._aim = aim.near(cluster), model, aim
        self._rng, self._clock, self._until, self._told = rng, clock, until, told
        self.plan = _whole(cluster, model)
        self.best = Sited(self.plan.spans, 0.0, float("-inf"))
        self.count = 0

    def attempt(self, plan: Plan, seconds: float) -> None:
        """Place a plan's units anew, from where they are; it is kept if it is not worse."""
        site = Site(self._near, self._model, plan.units)
        known = plan is self.plan
        if not known and self._aim.most(site) <= self.best.worth:
            return
        end = min(self._until, self._clock() + seconds)
        placed = self._aim.place(site, plan.spans, self._rng, lambda: self._clock() >= end)
        self.count += not known
        if placed.worth < self.best.worth:
            return
        better = placed.worth > self.best.worth
        self.plan, self.best = replace(plan, spans=placed.spans), placed
        if better:
            self._told(self.plan, placed)


def regroupable(cluster: Cluster, node: Node) -> bool:
    """Whether a machine's GPUs can be grouped in several ways whose speeds can be told."""
    return 2 <= cluster.types[node.type].gpus <= MOST_GPUS and _estimated(cluster, node)


def _estimated(cluster: Cluster, node: Node) -> bool:
    """Whether speeds of groups can be told that nobody measured."""
    if cluster.types[node.type].spec is None:
        return False
    try:
        estimate_of(cluster)
    except UsageError:
        return False
    return True


def settled(cluster: Cluster, plan: Plan) -> Plan:
    """The plan with groups of all GPUs of a machine called by the machine's name."""
    whole = {unit.id: unit for unit in whole_units(cluster, plan.model)}
    units = []
    for unit in plan.units:
        same = whole.get(unit.node)
        every = same is not None and set(_members(cluster, same)) == set(unit.members)
        units.append(same if same and every and same.profile == unit.profile else unit)
    return replace(plan, units=tuple(units))


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


def _whole(cluster: Cluster, model: Model) -> Plan:
    """Every machine as one unit; all idle."""
    units = whole_units(cluster, model.name)
    return Plan(model.name, cluster.name, units, (None,) * len(units))


def _halves(cluster: Cluster, model: Model) -> Plan:
    """Every machine in two groups, where that is possible; all idle."""
    units: list[Unit] = []
    whole = {unit.id: unit for unit in whole_units(cluster, model.name)}
    for node in cluster.nodes:
        count = cluster.types[node.type].gpus
        made = None
        if regroupable(cluster, node):
            made = grouping(cluster, model, node, (count - count // 2, count // 2))
        if made is None and node.id in whole:
            made = (whole[node.id],)
        if made is None and _estimated(cluster, node):
            made = grouping(cluster, model, node, (count,))
        units += made or ()
    return Plan(model.name, cluster.name, tuple(units), (None,) * len(units))


def _own(cluster: Cluster, plan: Plan, node: Node) -> list[tuple[Unit, Span | None]]:
    """A machine's units, if its GPUs can be regrouped: two or more, and in no group of a LAN."""
    if not regroupable(cluster, node):
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
