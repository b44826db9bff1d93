"""What a plan passes, what binds it, and what service to expect of it.

Units hand on wherever layers fit, and then a plan is one max-flow. A plan with *pipelines* is a
sum: each is valued alone, as if the others did not exist, and a load is shared out by their flows,
as a dispatcher that looks at who is least loaded does. Only the coordinator's own connection is
common to all.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from hexswarm.records import Span
from hexswarm.router.placement.binding import Binding, Use, binding, uses
from hexswarm.router.placement.cluster import Cluster, Model
from hexswarm.router.placement.expected import NOWHERE, Estimate, Load
from hexswarm.router.placement.flow import Edge, arrays, solver
from hexswarm.router.placement.latency import Latency
from hexswarm.router.placement.plan import Plan
from hexswarm.router.placement.rates import Rates, rates


@dataclass(frozen=True, slots=True)
class Worth:
    """A plan's capacity."""

    flow: float
    """Tokens a second."""
    edges: tuple[Edge, ...]
    uses: tuple[Use, ...]
    """Of each unit."""
    binding: Binding


def worth(cluster: Cluster, model: Model, plan: Plan) -> Worth:
    """The largest flow of a plan, with what carries it and what binds it."""
    whole = rates(cluster, model, plan.units)
    flow = 0.0
    edges: list[Edge] = []
    bound: list[Binding] = []
    for line in lines(plan):
        spans = [plan.spans[at] for at in line]
        part = whole.part(line)
        carried, hops = _flow(part, spans)
        flow += carried
        edges += [_renamed(hop, line) for hop in hops]
        bound.append(_named(binding(part, spans, hops), line))
    if flow > whole.limit:
        share = whole.limit / flow
        edges = [replace(edge, tokens_per_s=share * edge.tokens_per_s) for edge in edges]
        flow, bound = whole.limit, []
    return Worth(flow, tuple(edges), uses(whole, plan.spans, edges), _together(bound))


def expected(cluster: Cluster, model: Model, plan: Plan, found: Worth, load: Load) -> Estimate:
    """Times at a load; pipelines share it in proportion to their flows."""
    heads = {at: edge.tokens_per_s for edge in found.edges if (at := _head(edge)) is not None}
    total = sum(heads.values())
    told, share = [], [0.0] * len(plan.units)
    for line in lines(plan):
        part = sum(heads.get(at, 0.0) for at in line) / total if total else 0.0
        if part <= 0:
            continue
        latency = Latency(cluster, model, [plan.units[at] for at in line])
        mine = replace(load, tokens_per_s=part * load.tokens_per_s)
        one = latency.estimate([plan.spans[at] for at in line], mine)
        if one is NOWHERE:
            return NOWHERE
        told.append((part, one))
        for at, visits in zip(line, one.share, strict=True):
            share[at] = part * visits
    if not told:
        return NOWHERE
    return Estimate(
        ttft_s=sum(part * one.ttft_s for part, one in told),
        long_ttft_s=sum(part * one.long_ttft_s for part, one in told),
        tpot_s=sum(part * one.tpot_s for part, one in told),
        stages=sum(part * one.stages for part, one in told),
        busiest=max(one.busiest for _, one in told),
        kv=max(one.kv for _, one in told),
        share=tuple(share),
    )


def lines(plan: Plan) -> Sequence[Sequence[int]]:
    """Units that may hand to each other: the pipelines, or all."""
    return plan.pipelines or (range(len(plan.units)),)


def _flow(part: Rates, spans: Sequence[Span | None]) -> tuple[float, tuple[Edge, ...]]:
    """As `Flow` tells it, None for the coordinator."""
    solved = solver(part)
    solved.load(*arrays(spans))
    value = solved.value()
    columns = zip(*(column.tolist() for column in solved.edges()), strict=True)
    names: list[int | None] = [*range(part.units), None]
    return value, tuple(
        Edge(names[a], names[b], carried, float(part.link[a, b])) for a, b, carried in columns
    )


def _head(edge: Edge) -> int | None:
    return edge.receiver if edge.sender is None else None


def _renamed(edge: Edge, line: Sequence[int]) -> Edge:
    sender = None if edge.sender is None else line[edge.sender]
    receiver = None if edge.receiver is None else line[edge.receiver]
    return replace(edge, sender=sender, receiver=receiver)


def _named(found: Binding, line: Sequence[int]) -> Binding:
    """With the places that units have in the plan."""

    def link(a: int | None, b: int | None) -> tuple[int | None, int | None]:
        return None if a is None else line[a], None if b is None else line[b]

    return Binding(
        tuple(line[unit] for unit in found.units),
        tuple(link(a, b) for a, b in found.links),
        frozenset(line[unit] for unit in found.all_units),
        frozenset(link(a, b) for a, b in found.all_links),
    )


def _together(found: Iterable[Binding]) -> Binding:
    """A cut through pipelines that share nothing is a cut through each."""
    every = tuple(found)
    return Binding(
        tuple(unit for one in every for unit in one.units),
        tuple(link for one in every for link in one.links),
        frozenset(unit for one in every for unit in one.all_units),
        frozenset(link for one in every for link in one.all_links),
    )
