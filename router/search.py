"""Shortest rings: stages that cover all layers once, one stage a peer, in order of their cost.

The layers are cut at every start and end of a span into *segments*. With the peers of a route
given, its cost is linear in each point where one stage hands over to the next, so moving that point
to the nearest cut never makes it worse; only these points are searched. (A stage that would become
empty on the way is left out, which is no loss where links obey the triangle inequality.)

A ring is closed, so its cost depends on head and tail together. For each *head* apart, dynamic
programming from the last segment to the first gives `start[k, p]`, the exact cost of the rest of
the ring when stage p begins at segment k. It forgets one rule: it may use a peer twice (with
A a b a, b being quicker than a but not holding the end). So the routes themselves are found by
best-first search over partial routes, in which the rule is easy, with `start` as the bound: it
never exceeds the true rest, so routes come out in order of cost, and as it is nearly always exact
the search walks straight to the answer. Heads wait in the same queue under a bound without the
closing link, and their table is computed when they come to the front: mostly a few of them.

Rejected: Dijkstra over (layer, peer) without the closing link, which is what Petals does (finds a
line, not a ring); a mixed-integer program (seconds); labels that carry visited sets (the same
answer, with work for every label instead of the few on the best routes).
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hexswarm.records import Announcement, Span, Stage

Floats = NDArray[np.float64]
Indices = NDArray[np.intp]

EXPANSIONS = 3000
"""Partial routes looked at before the search gives up (about 0.2 s); random swarms need 10-100."""


@dataclass(frozen=True, slots=True)
class Costs:
    """The additive costs of a ring, in seconds, for peers in the order of the graph."""

    enter: Floats
    """To begin a stage at a peer."""
    layer: Floats
    """For each layer that it computes."""
    hop: Floats
    """From one stage to the next; [from, to]."""
    onward: tuple[Floats, ...]
    """The same for the hops possible at each cut (`Graph.onward`), as contiguous blocks."""
    finish: Floats
    """At the end of the last layer, when the stage is the tail."""
    close: Floats
    """From tail to head; [tail, head]."""


@dataclass(frozen=True, slots=True)
class Graph:
    """Who can follow whom: peers by id, segments between cuts."""

    peers: tuple[Announcement, ...]
    cuts: tuple[int, ...]
    """Layers at which a stage may begin or end: 0, every start and end of a span, the last."""
    end: NDArray[np.intp]
    """For each peer the index of the cut at which its span ends."""
    holders: tuple[Indices, ...]
    """For each segment the peers that hold it."""

    def onward(self, hop: Floats) -> tuple[Floats, ...]:
        """For each segment the costs of `hop` from the holders before it to its own."""
        pairs = zip(self.holders, self.holders[1:], strict=False)
        return (np.empty((0, 0)), *(hop[np.ix_(before, here)] for before, here in pairs))

    def stages(self, chosen: Sequence[int], exits: Sequence[int]) -> tuple[Stage, ...]:
        """Peers and the cuts at which they hand over, as stages."""
        reached, found = 0, []
        for index, cut in zip(chosen, exits, strict=True):
            item, end = self.peers[index], self.cuts[cut]
            found.append(Stage(item.peer, Span(reached, end), item.addresses))
            reached = end
        return tuple(found)


def build_graph(peers: Sequence[Announcement], layers: int) -> Graph:
    """The graph of `peers`, whose spans together cover all layers."""
    ordered = tuple(sorted(peers, key=lambda item: item.peer))
    ends = {point for item in ordered for point in (item.span.first, item.span.end)}
    cuts = tuple(sorted(ends | {0, layers}))
    position = {cut: index for index, cut in enumerate(cuts)}
    begin = np.array([position[item.span.first] for item in ordered])
    end = np.array([position[item.span.end] for item in ordered])
    holders = tuple(
        np.flatnonzero((begin <= segment) & (segment < end)) for segment in range(len(cuts) - 1)
    )
    return Graph(ordered, cuts, end, holders)


@dataclass(frozen=True, slots=True)
class _Partial:
    """A route up to the entry into its last peer."""

    chosen: tuple[int, ...]
    exits: tuple[int, ...]
    """For each peer but the last the index of the cut at which it hands over."""
    spent: float
    """Seconds before the last peer is entered."""


_Children = Iterator[tuple[float, int, int, float]]
"""Ways on from a partial route, by bound: (bound, cut, peer or _RING, spent)."""
_RING = -1
"""In the place of a next peer: the ring closes."""


def rings(graph: Graph, costs: Costs, expansions: int = EXPANSIONS) -> Iterator[tuple[Stage, ...]]:
    """Routes in order of cost; ends when all are told or the effort is spent."""
    order = itertools.count()  # equal bounds: first come, first served, so the result is definite
    queue: list[tuple[float, int, int, _Partial, int, int, float, _Children]] = []

    def push(head: int, parent: _Partial, children: _Children) -> None:
        child = next(children, None)
        if child is not None:
            bound, cut, peer, spent = child
            heapq.heappush(queue, (bound, next(order), head, parent, cut, peer, spent, children))

    tables: dict[int, Floats] = {}
    nothing = _Partial((), (), 0.0)
    for head, bound in _heads(graph, costs):
        push(head, nothing, iter([(bound, 0, head, 0.0)]))
    for _ in range(expansions):
        if not queue:
            return
        _, _, head, parent, cut, peer, spent, siblings = heapq.heappop(queue)
        push(head, parent, siblings)
        if peer == _RING:
            yield graph.stages(parent.chosen, (*parent.exits, cut))
            continue
        if head not in tables:
            tables[head] = cost_to_go(graph, costs, costs.finish + costs.close[:, head], head)
        exits = (*parent.exits, cut) if parent.chosen else ()
        node = _Partial((*parent.chosen, peer), exits, spent)
        push(head, node, _children(graph, costs, tables[head], node))


def any_ring(graph: Graph) -> tuple[Stage, ...]:
    """Some route, without regard to cost: always on to the peer that reaches farthest."""
    chosen: list[int] = []
    exits: list[int] = []
    reached, last = 0, len(graph.cuts) - 1
    while reached < last:
        holders = graph.holders[reached]
        chosen.append(int(holders[np.argmax(graph.end[holders])]))
        reached = int(graph.end[chosen[-1]])
        exits.append(reached)
    return graph.stages(chosen, exits)


def cost_to_go(graph: Graph, costs: Costs, leave: Floats, head: int | None = None) -> Floats:
    """[segment, peer]: least seconds from entering the peer there to the end of the ring.

    `leave` is what a tail pays after its last layer. `head` is not entered again later; the other
    peers might be, which makes this a bound and not always the cost of a route.
    """
    lengths = np.diff(graph.cuts)
    start = np.full((len(lengths), len(graph.peers)), np.inf)
    run = np.full(len(graph.peers), np.inf)  # the peer goes on with the next segment
    for segment in range(len(lengths) - 1, -1, -1):
        here = graph.holders[segment]
        now = np.full_like(run, np.inf)
        now[here] = lengths[segment] * costs.layer[here] + np.minimum(run[here], leave[here])
        run = now
        start[segment] = run + costs.enter
        if segment:
            if head is not None:
                start[segment, head] = np.inf
            leave = np.full_like(run, np.inf)
            onward = costs.onward[segment] + start[segment, here]
            leave[graph.holders[segment - 1]] = onward.min(axis=1)
    return start


def _heads(graph: Graph, costs: Costs) -> list[tuple[int, float]]:
    """Peers that can begin a ring, each with a bound that needs no table of its own."""
    heads = graph.holders[0]
    close = costs.close[:, heads].copy()
    close[heads, np.arange(len(heads))] = np.inf  # a tail that is not the head itself
    bounds = cost_to_go(graph, costs, costs.finish + close.min(axis=1))[0, heads]
    whole = graph.end[heads] == len(graph.cuts) - 1
    alone = costs.enter + graph.cuts[-1] * costs.layer + costs.finish + np.diagonal(costs.close)
    bounds = np.where(whole, np.minimum(bounds, alone[heads]), bounds)
    return [(int(head), float(bound)) for head, bound in zip(heads, bounds, strict=True)]


def _children(graph: Graph, costs: Costs, start: Floats, node: _Partial) -> _Children:
    """All ways on from `node`, by bound."""
    peer, begin = node.chosen[-1], node.exits[-1] if node.exits else 0
    last, visited = len(graph.cuts) - 1, set(node.chosen)
    spent = node.spent + costs.enter[peer]
    bounds, cuts, peers, sums = [], [], [], []
    for cut in range(begin + 1, int(graph.end[peer]) + 1):
        done = spent + (graph.cuts[cut] - graph.cuts[begin]) * costs.layer[peer]
        if cut == last:
            total = done + costs.finish[peer] + costs.close[peer, node.chosen[0]]
            found, onward, before = np.array([_RING]), np.array([total]), np.array([total])
        else:
            found = graph.holders[cut]
            before = done + costs.hop[peer, found]
            onward = before + start[cut, found]
        bounds.append(onward)
        cuts.append(np.full(len(found), cut))
        peers.append(found)
        sums.append(before)
    bound, cut_, peer_, sum_ = map(np.concatenate, (bounds, cuts, peers, sums))
    for index in np.argsort(bound, kind="stable"):
        if not np.isfinite(bound[index]):
            return
        if int(peer_[index]) not in visited:
            yield float(bound[index]), int(cut_[index]), int(peer_[index]), float(sum_[index])
