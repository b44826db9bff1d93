"""What the rivals have in common: who may hand to whom, and walking a route hop by hop.

Helix, Swarm and a random choice decide at every sender for itself which unit comes next. A `Rival`
knows the hops of its plan and which units a request may use now, and walks: at each place the
policy chooses among the units from which the last layer can still be reached.

*Exact or partial.* Helix's published runs hand on at exact boundaries only. Placements like Petals'
overlap, and then its authors too let a unit run but the rest of its layers. So hops are exact
unless that costs flow.

None of these papers says what happens when a machine dies. Here a unit that was noticed dead is
avoided for `BARRED_S`, and its requests begin anew: the world's rule for policies that do not
repair.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

from hexswarm.errors import UsageError
from hexswarm.records import Span
from hexswarm.router.placement.cluster import Cluster, Model
from hexswarm.router.placement.plan import Plan
from hexswarm.router.placement.rates import Rates, rates
from hexswarm.simulator.policy import Execution, Plain, View, Visit, Visits

BARRED_S = 90.0
"""As long as an announcement of a dead peer lives in a directory."""

WORKER = Execution(chunked=False, ring=False, lanes=False, opens=False, central=True)
"""A coordinator, workers that run whole prompts, and one stream of messages between two of them."""

SLIGHT = 1e-3
"""Share of the flow that exact boundaries may cost."""

Choose = Callable[[int | None, Sequence[int]], int | None]
"""(sender, candidates) -> the next unit; None: none of them."""

Flows = Mapping[tuple[int | None, int | None], float]
"""Tokens a second by (sender, receiver); None is the coordinator."""


class Rival(Plain):
    """A policy on a plan that does not change."""

    execution = WORKER

    def __init__(self, cluster: Cluster, model: Model, plan: Plan, *, exact: bool = False) -> None:
        if missing := plan.missing(model.layers):
            raise UsageError(f"the plan leaves layers {missing[0]} to nobody")
        self.cluster, self.model, self.plan = cluster, model, plan
        self.exact = exact
        self._held = {at: span for at, span in enumerate(plan.spans) if span}
        self._barred: dict[int, float] = {}
        self._after: dict[tuple[frozenset[int], int], tuple[int, ...]] = {}

    def usable(self, now: float, view: View) -> frozenset[int]:
        """The units that this request may use now."""
        barred = {unit for unit, until_s in self._barred.items() if until_s > now}
        return frozenset(self._held) - barred - view.refused

    def candidates(self, usable: frozenset[int], layer: int) -> tuple[int, ...]:
        """Who of them runs on from `layer`, with a way from there to the last layer."""
        found = self._after.get((usable, layer))
        if found is None:
            found = tuple(
                at
                for at in sorted(usable)
                if self._enters(self._held[at], layer) and self._finishes(usable, at)
            )
            self._after[usable, layer] = found
        return found

    def walk(self, usable: frozenset[int], choose: Choose) -> Visits | None:
        """Hop by hop; None where there is no candidate."""
        visits: list[Visit] = []
        layer, sender = 0, None
        while layer < self.model.layers:
            among = self.candidates(usable, layer)
            unit = choose(sender, among) if among else None
            if unit is None:
                return None
            span = Span(layer, self._held[unit].end)
            visits.append(Visit(unit, span))
            layer, sender = span.end, unit
        return tuple(visits)

    def lost(self, now: float, unit: int) -> None:
        self._barred[unit] = now + BARRED_S
        self._after.clear()

    def _enters(self, span: Span, layer: int) -> bool:
        return span.first == layer or (not self.exact and layer in span)

    def _finishes(self, usable: frozenset[int], unit: int) -> bool:
        end = self._held[unit].end
        return end == self.model.layers or bool(self.candidates(usable, end))


def flows(cluster: Cluster, model: Model, plan: Plan) -> tuple[Flows, bool]:
    """A largest flow of the plan, and whether it hands on at exact boundaries only."""
    bounds = rates(cluster, model, plan.units)
    everywhere, value = largest(bounds, plan.spans, exact=False)
    at_boundaries, exact_value = largest(bounds, plan.spans, exact=True)
    if exact_value >= value * (1 - SLIGHT):
        return at_boundaries, True
    return everywhere, False


def largest(
    bounds: Rates, spans: Sequence[Span | None], *, exact: bool
) -> tuple[dict[tuple[int | None, int | None], float], float]:
    """One largest flow and its value, by the solver that Helix uses: of several largest flows each
    solver finds another one, and they are the weights of Helix's routing."""
    import networkx  # for one graph of a run

    graph = networkx.DiGraph()
    graph.add_edge("source", "from", capacity=bounds.limit)
    graph.add_edge("to", "sink", capacity=bounds.limit)
    held = {at: span for at, span in enumerate(spans) if span}
    for at, span in held.items():
        graph.add_edge((at, 0), (at, 1), capacity=bounds.passes(at, span.first, span.end))
    for (sender, receiver), rate in _links(bounds, held, exact=exact).items():
        begin = "from" if sender is None else (sender, 1)
        graph.add_edge(begin, "to" if receiver is None else (receiver, 0), capacity=rate)
    if not held:
        return {}, 0.0
    value, carried = networkx.maximum_flow(graph, "source", "sink")
    return _by_unit(carried), float(value)


def _links(
    bounds: Rates, held: Mapping[int, Span], *, exact: bool
) -> dict[tuple[int | None, int | None], float]:
    """What each hop that the placement allows can carry."""
    hub = bounds.units
    found: dict[tuple[int | None, int | None], float] = {}
    for i, span in held.items():
        if span.first == 0:
            found[None, i] = float(bounds.link[hub, i])
        if span.end == bounds.layers:
            found[i, None] = float(bounds.link[i, hub])
        for j, other in held.items():
            if other.first == span.end or (not exact and span.end in other):
                found[i, j] = float(bounds.link[i, j])
    return found


def _by_unit(
    carried: Mapping[object, Mapping[object, float]],
) -> dict[tuple[int | None, int | None], float]:
    """The flows on hops alone, by units."""
    found: dict[tuple[int | None, int | None], float] = {}
    for begin, ends in carried.items():
        for end, rate in ends.items():
            hop = _unit(begin), _unit(end)
            if rate > 0 and begin != "source" and end != "sink" and hop[0] != hop[1]:
                found[hop] = float(rate)
    return found


def _unit(vertex: object) -> int | None:
    """Of a vertex of the graph: (unit, 0) where it takes, (unit, 1) where it hands on."""
    return vertex[0] if isinstance(vertex, tuple) else None


def shares(weights: Mapping[int, float], among: Collection[int]) -> list[tuple[int, float]]:
    """Those of them that have weight, in order."""
    return [(at, weights[at]) for at in sorted(among) if weights.get(at, 0.0) > 0]
