"""One pipeline out of given GPUs, as HexGen builds it (arXiv 2311.11514): the inner optimisation.

A pipeline has a count of GPUs on each of some machines, and must hold all layers once. Which
tensor-parallel groups its stages are and how many layers each has is found by a dynamic programme
over (layers done, GPUs of the machine used): GPUs of a machine are alike, so only their number
counts. Stages follow the machines in an order in which each is nearest to the one before. The cost
of a stage is its seconds for each token of an answer, prompt included, at a given number of rows;
that is linear in its layers, so all choices of k layers are one sliding minimum over an array.

The paper's cost, the latency of one request (`rows` 1), makes the fastest groups take all the
layers they can hold, and a pipeline is then as slow as its fullest stage. HexGen mends that
outside, by a genetic bias of layers. Here a bound on the step of any stage, `slowest_s`, is part of
the programme: few values of it, found by bisection from the most balanced cut on, stand for the
bias. The paper's own programme is `rows=1` without a bound (`paper=True`).

Rejected: enumerating the multisets of degrees of all machines, as the released code does (the
product over machines, for every mutation); states with all machines' counts at once (the order is
given, so only the present machine's count matters).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hexswarm.errors import UsageError
from hexswarm.router.placement.attainment import Curve, Pipeline, Slo, curve, pipeline
from hexswarm.router.placement.cluster import Cluster, Model
from hexswarm.router.placement.groups import DEGREES, group
from hexswarm.router.placement.plan import Gpu, Unit
from hexswarm.router.placement.speeds import step_layer_s

Numbers = NDArray[np.float64]
Counts = tuple[int, ...]
"""GPUs of each machine of the cluster."""

_ROWS = 32
"""At which costs are weighed, if a server takes as many: where batches are under load."""

_LOOSER = (1.0, 1.1, 1.3)
"""Bounds on a stage's step, in multiples of the least that is possible."""


@dataclass(frozen=True, slots=True)
class Part:
    """One stage: so many GPUs of a machine as one group, and its layers."""

    machine: int
    degree: int
    layers: int


@dataclass(frozen=True, slots=True)
class Built:
    """The best pipeline that was found for some GPUs."""

    parts: tuple[Part, ...]
    pipeline: Pipeline
    curve: Curve
    rate: float
    """Requests a second that it serves within the deadline, in the mean."""


class Builder:
    """Pipelines for one cluster, model and deadline; what was built is remembered."""

    def __init__(
        self, cluster: Cluster, model: Model, slo: Slo, *, max_rows: int = 64, paper: bool = False
    ) -> None:
        if max_rows < 1:
            raise UsageError("a batch has at least one row")
        self.cluster, self.model, self.slo = cluster, model, slo
        self.max_rows, self.paper = max_rows, paper
        self.gpus = tuple(cluster.types[node.type].gpus for node in cluster.nodes)
        self.units = [_by_degree(cluster, model, row) for row in range(len(cluster.nodes))]
        self._near = _one_ways(cluster)
        self._alike = _alike(cluster)
        self._cost: dict[tuple[int, int, int], float] = {}
        self._built: dict[Counts, Built | None] = {}

    def build(self, counts: Counts) -> Built | None:
        """The best pipeline of these GPUs; None: they cannot hold the model.

        Machines that are alike change places before it is looked up, and change back after.
        """
        places = list(range(len(counts)))
        for rows in self._alike:
            by_count = sorted(rows, key=lambda row: (-counts[row], row))
            for row, stands_in in zip(rows, by_count, strict=True):
                places[row] = stands_in
        usual = tuple(counts[place] for place in places)
        if usual not in self._built:
            self._built[usual] = self._best(usual)
        built = self._built[usual]
        if built is None or usual == counts:
            return built
        parts = (replace(part, machine=places[part.machine]) for part in built.parts)
        return replace(built, parts=tuple(parts))

    def rate(self, made: Curve) -> float:
        """Requests a second within the deadline: a token's part of it, prompt included."""
        mean_s = self.slo.token_s * self.model.output_tokens
        extra_s = made.prompt_s[1] - made.token_s[1]
        return made.rate((mean_s - extra_s) / self.model.output_tokens) / self.model.output_tokens

    def _best(self, counts: Counts) -> Built | None:
        order = self._order(counts)
        best: Built | None = None
        for parts in self._candidates(order, counts):
            units = [self.units[part.machine][part.degree] for part in parts]
            made = pipeline(self.cluster, self.model, units, [part.layers for part in parts])
            speed = curve(self.model, made, self.max_rows)
            found = Built(parts, made, speed, self.rate(speed))
            if best is None or found.rate > best.rate:
                best = found
        return best

    def _candidates(self, order: Sequence[int], counts: Counts) -> Iterator[tuple[Part, ...]]:
        if not order:
            return
        seen: set[tuple[Part, ...]] = set()
        rows = 1 if self.paper else min(_ROWS, self.max_rows)
        bounds = [float("inf")] if self.paper else self._bounds(order, counts, rows)
        for bound in bounds:
            parts = self.cheapest(order, counts, rows, bound)
            if parts and parts not in seen:
                seen.add(parts)
                yield parts

    def _bounds(self, order: Sequence[int], counts: Counts, rows: int) -> list[float]:
        """The least bound on a stage's step that can be kept, and looser ones."""
        if self.cheapest(order, counts, rows, float("inf")) is None:
            return []
        low, high = (
            0.0,
            self.model.layers
            * max(self._layer_s(row, degree, rows) for row in order for degree in self.units[row]),
        )
        for _ in range(9):
            middle = (low + high) / 2
            kept = self.cheapest(order, counts, rows, middle) is not None
            low, high = (low, middle) if kept else (middle, high)
        return [*(high * looser for looser in _LOOSER), float("inf")]

    def cheapest(
        self, order: Sequence[int], counts: Counts, rows: int, slowest_s: float
    ) -> tuple[Part, ...] | None:
        """The stages of least cost whose steps keep to a bound; None: there are none."""
        layers = self.model.layers
        reached = np.full(layers + 1, np.inf)
        reached[0] = 0.0
        trail: list[_Machine] = []
        for row in order:
            machine = _Machine(row, reached)
            for used, degree in itertools.product(range(counts[row]), self.units[row]):
                if used + degree <= counts[row]:
                    cost = self._layer_s(row, degree, rows)
                    fits = min(self.units[row][degree].profile.max_layers, layers)
                    most = min(fits, int(min(slowest_s / cost, layers)))
                    machine.extend(used, degree, cost, most)
            reached = machine.close()
            trail.append(machine)
        if not np.isfinite(reached[layers]):
            return None
        parts: list[Part] = []
        done = layers
        for machine in reversed(trail):
            done = machine.trace(done, parts)
        return tuple(reversed(parts))

    def _layer_s(self, row: int, degree: int, rows: int) -> float:
        key = row, degree, rows
        if key not in self._cost:
            unit = self.units[row][degree]
            self._cost[key] = step_layer_s(unit.profile, self.model, rows)
        return self._cost[key]

    def _order(self, counts: Counts) -> list[int]:
        """The machines that take part, each the nearest to the one before; the best start."""
        taking = [row for row, count in enumerate(counts) if count]
        best: tuple[float, list[int]] = (float("inf"), [])
        for start in taking:
            order, left = [start], [row for row in taking if row != start]
            while left:
                order.append(min(left, key=lambda row: (self._near[order[-1], row], row)))
                left.remove(order[-1])
            ring = sum(self._near[a, b] for a, b in zip(order, order[1:] + order[:1], strict=True))
            best = min(best, (float(ring), order))
        return best[1]


def quickest(cluster: Cluster, model: Model) -> Pipeline:
    """The pipeline with the lowest latency for one request of mean lengths, for deadlines to be
    multiples of: of one machine, of one region's machines, or of all."""
    builder = Builder(cluster, model, Slo(1.0, Pipeline((), 1.0, 0.0)), paper=True)
    keys = [(node.id, node.region, "") for node in cluster.nodes]
    tried = {
        tuple(
            gpus if mine[way] == key else 0 for mine, gpus in zip(keys, builder.gpus, strict=True)
        )
        for way in range(3)
        for key in dict.fromkeys(mine[way] for mine in keys)
    }
    made = [built.pipeline for counts in sorted(tried) if (built := builder.build(counts))]
    if not made:
        raise UsageError(f"{cluster.name} cannot hold {model.name} in one pipeline")
    lengths = round(model.input_tokens), round(model.output_tokens)
    return min(made, key=lambda pipeline: pipeline.alone_s(*lengths))


class _Machine:
    """The programme's states at one machine: costs by (GPUs used, layers done)."""

    def __init__(self, row: int, reached: Numbers) -> None:
        self.row = row
        self.cost = {0: reached}
        self.step: dict[int, tuple[Any, Any]] = {}
        self.used: Any = None

    def extend(self, used: int, degree: int, cost: float, most: int) -> None:
        """One more stage of so many GPUs, for every count of layers up to `most`."""
        if used not in self.cost or most < 1:
            return
        before = self.cost[used]
        size = len(before)
        at, window = _windows(size, most)
        padded = np.full(size + most, np.inf)
        padded[most:] = before - cost * at
        windows = padded[window]
        pick = windows.argmin(axis=1)
        found = windows[at, pick] + cost * at
        held = most - pick
        total = used + degree
        now = self.cost.setdefault(total, np.full(size, np.inf))
        degrees, layers = self.step.setdefault(total, (np.zeros(size, int), np.zeros(size, int)))
        better = found < now - 1e-15
        now[better], degrees[better], layers[better] = found[better], degree, held[better]

    def close(self) -> Numbers:
        """The least cost of each count of layers, however many GPUs are used."""
        counts = sorted(self.cost)
        table = np.stack([self.cost[used] for used in counts])
        self.used = np.array(counts)[table.argmin(axis=0)]
        return np.asarray(table.min(axis=0))

    def trace(self, done: int, parts: list[Part]) -> int:
        """Append this machine's stages, last first; the layers done before it."""
        used = int(self.used[done])
        while used:
            degrees, layers = self.step[used]
            degree, held = int(degrees[done]), int(layers[done])
            parts.append(Part(self.row, degree, held))
            used, done = used - degree, done - held
        return done


@lru_cache(maxsize=256)
def _windows(size: int, most: int) -> tuple[Any, Any]:
    """0, 1, ... size - 1, and for each of them the `most` places before it, shifted by `most`."""
    at = np.arange(size)
    return at, at[:, None] + np.arange(most)[None, :]


def _by_degree(cluster: Cluster, model: Model, row: int) -> Mapping[int, Unit]:
    """A machine's possible groups; where its GPUs are unknown, itself as a whole."""
    node = cluster.nodes[row]
    if cluster.types[node.type].spec is None:
        profile = cluster.profile(node, model.name)
        count = cluster.types[node.type].gpus
        return {count: Unit(node.id, node.id, profile)} if profile else {}
    gpus: list[Gpu] = [(node.id, gpu) for gpu in range(cluster.types[node.type].gpus)]
    made = {size: group(cluster, model, gpus[:size]) for size in DEGREES if size <= len(gpus)}
    return {size: unit for size, unit in made.items() if unit is not None}


def _alike(cluster: Cluster) -> list[list[int]]:
    """Machines that may change places: of one type and region, with equal connections."""
    found: dict[object, list[int]] = {}
    for row, node in enumerate(cluster.nodes):
        key = node.id if cluster.ways else replace(node, id="")
        found.setdefault(key, []).append(row)
    return list(found.values())


def _one_ways(cluster: Cluster) -> Numbers:
    names = [node.id for node in cluster.nodes]
    return np.array([[cluster.way(a, b).one_way_s for b in names] for a in names])
