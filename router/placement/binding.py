"""What keeps a plan's flow from being larger: its narrowest cuts.

A flow is largest when some cut between prompts and tokens is full, so whoever wants more must widen
that cut: everything in it, and nothing else helps. There may be many cuts of the same width, one
behind the other (a chain whose stages all pass the same). `binding` names the first of them, seen
from where prompts enter, and all units and links that are in any: those to mark on a picture.

A full arc is in a narrowest cut if and only if the residual graph has no way around it from its
tail to its head (Picard and Queyranne 1980); a cut's first one is where the search from the source
ends. Plans have some hundred arcs, so this is plain Python.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hexswarm.records import Span
from hexswarm.router.placement.flow import Edge
from hexswarm.router.placement.rates import Rates

FULL = 1 - 1e-6
"""From this share of its capacity on something is full: flows are doubles."""

Link = tuple[int | None, int | None]
Vertex = tuple[int, int]
"""(unit, 0 where tokens enter it, 1 where they leave); _SOURCE and _SINK."""

_SOURCE, _SINK = (-1, 1), (-1, 0)


@dataclass(frozen=True, slots=True)
class Binding:
    """What binds a flow."""

    units: tuple[int, ...]
    """In the first narrowest cut."""
    links: tuple[Link, ...]
    all_units: frozenset[int]
    """In any."""
    all_links: frozenset[Link]


@dataclass(frozen=True, slots=True)
class Use:
    """What a unit passes."""

    carried: float
    """Tokens a second."""
    capacity: float


def uses(rates: Rates, spans: Sequence[Span | None], edges: Iterable[Edge]) -> tuple[Use, ...]:
    """Of each unit."""
    carried = [0.0] * len(spans)
    for edge in edges:
        if edge.receiver is not None:
            carried[edge.receiver] += edge.tokens_per_s
    return tuple(
        Use(flow, rates.passes(unit, span.first, span.end) if span else 0.0)
        for unit, (flow, span) in enumerate(zip(carried, spans, strict=True))
    )


def binding(rates: Rates, spans: Sequence[Span | None], edges: Sequence[Edge]) -> Binding:
    """Of a largest flow with these edges; empty where nothing flows."""
    if not edges:
        return Binding((), (), frozenset(), frozenset())
    flowing = {(edge.sender, edge.receiver): edge.tokens_per_s for edge in edges}
    onward: dict[Vertex, set[Vertex]] = {}
    full: dict[tuple[Vertex, Vertex], int | Link] = {}

    def arc(a: Vertex, b: Vertex, carried: float, capacity: float, what: int | Link) -> None:
        if carried < capacity * FULL:
            onward.setdefault(a, set()).add(b)
        else:
            full[a, b] = what
        if carried > 0:
            onward.setdefault(b, set()).add(a)

    for unit, use in enumerate(uses(rates, spans, edges)):
        if spans[unit]:
            arc((unit, 0), (unit, 1), use.carried, use.capacity, unit)
    count = rates.units
    for a, b in _hops(spans, rates.layers):
        capacity = float(rates.link[count if a is None else a, count if b is None else b])
        tail = _SOURCE if a is None else (a, 1)
        head = _SINK if b is None else (b, 0)
        arc(tail, head, flowing.get((a, b), 0.0), capacity, (a, b))
    reached = _reached(onward, _SOURCE)
    first = [what for (a, b), what in full.items() if a in reached and b not in reached]
    every = [what for (a, b), what in full.items() if b not in _reached(onward, a)]
    return Binding(
        tuple(what for what in first if isinstance(what, int)),
        tuple(what for what in first if not isinstance(what, int)),
        frozenset(what for what in every if isinstance(what, int)),
        frozenset(what for what in every if not isinstance(what, int)),
    )


def _hops(spans: Sequence[Span | None], layers: int) -> Iterable[Link]:
    """Who may hand to whom."""
    for i, span in enumerate(spans):
        if span is None:
            continue
        if span.first == 0:
            yield None, i
        if span.end == layers:
            yield i, None
        for j, other in enumerate(spans):
            if other is not None and other.first <= span.end < other.end:
                yield i, j


def _reached(onward: dict[Vertex, set[Vertex]], start: Vertex) -> set[Vertex]:
    seen, todo = {start}, [start]
    while todo:
        for other in onward.get(todo.pop(), set()) - seen:
            seen.add(other)
            todo.append(other)
    return seen
