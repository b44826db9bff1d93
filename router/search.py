"""The cheapest ring under two limits: stages that cover all layers once, one stage a peer.

A `Problem` states it in arrays, in the order of its peers. A ring has five sizes: its *price*, the
*time per token* t, and three parts of the time to the first token, a sum a and two maxima (the
slowest opening of a stage; the slowest element of the pipeline of chunks):

    cost   = weight_price x price + weight_t x t + weight_a x a + weight_max x maxima
    within   t <= limit_t   and   a + maxima <= limit_a      (maxima = open + more_chunks x slowest)

Costs are additive over stages and hops, except that the ring is closed, that maxima are not sums,
and that no peer may be used twice. A stage may begin and end anywhere in the span of its peer.

*Tables.* For each *head* apart (the closing link depends on it), dynamic programming from the last
layer to the first gives the least rest of the ring from entering a peer at a layer, and from
leaving it after one: of the cost, of t, of a, and of the cost with multipliers on both limits (the
Lagrangian dual; multipliers by the secant of LARAC, Juettner et al., INFOCOM 2001). It forgets that
a peer is used once and that maxima grow, so each is a bound. A table in which closing links weigh
next to nothing, such as that of the price under a limit, is made once for all heads.

*Labels.* Best-first search over partial rings, each bounded by the larger of cost and dual table; a
label whose bound on t or a exceeds a limit is dropped, and so is one that is no better than another
at the same head, peer and layer whose peers leave the same choice for the rest (Pareto dominance,
Irnich and Desaulniers 2005). No better means: in t, and in a and in the cost at all four corners of
what the rest can do to the maxima (nothing, raise either or both above those of both labels).
The first complete ring whose cost no bound undercuts is the answer, and if none is found there is
none. A label is bounded at each layer where it may leave its peer; where that does not end it, all
that may follow are bounded at once, before one of them is made. Since the bounds are nearly always
exact, few labels are made: tens without limits, hundreds with tight ones. Heads wait in the same
queue under a bound that any head may close, and their tables are made when they come to the front.

*Boxes.* Tables of sums do not see maxima that are still to come, so a tight limit on the first
token would need 100,000 labels. When 300 labels did not settle it, the plane of the two maxima is
cut into boxes. A table of the rings in one box leaves out stages and hops beyond its top and adds
its bottom, with a multiplier of its own; the least over the boxes still alive is the bound. The box
of least bound is cut again and again, half-way between its bottom and the maxima of the ring that
its table stands for, up to 8 boxes and, if 1,000 labels more do not settle it either, 32. (A fixed
grid of 28 is wide where it matters: it left 13 of 40 tight limits unproven where this leaves 3.)

The work is done by `native.c` (0.3-1 ms at 200 peers and 80 layers, 3-30 where boxes are needed);
this file has the same algorithm in numpy and Python, without dual and boxes, for machines without a
compiler and as the reference of the tests.

Rejected: Dijkstra over (layer, peer) without the closing link, which is what Petals does (a line,
not a ring); a mixed-integer program (seconds); Lagrange alone (leaves a gap: of routes just within
a limit it finds the ones on the convex hull); stopping a search at the first k cheapest rings (a
feasible one may come later).
"""

from __future__ import annotations

import heapq
import itertools
import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hexswarm.router import native
from hexswarm.router.network import Ways

Floats = NDArray[np.float64]

SMALL = 32
"""Up to so many peers no search is ever cut short."""

EXACT, GOOD, QUICK = 20_000, 3_000, 300
"""Labels made in larger swarms before the best ring found has to do: in the search for the answer
(0.1 s; 3 of 40 requests with a tight limit on the first token in swarms of 200 peers, and 1 of 40
with both limits, needed more, none of the others), for one that is drawn at random anyway, and for
a spare."""

PYTHON_SHARE = 0.1
"""So much of that without the native search, where a label takes 20-50 us."""

UNLIMITED = 1 << 40


@dataclass(frozen=True, slots=True)
class Problem:
    """See the module's text; n peers, arrays of length n or [from, to], all C-contiguous."""

    layers: int
    first: NDArray[np.int32]
    end: NDArray[np.int32]
    price_enter: Floats
    price_layer: Floats
    t_enter: Floats
    t_layer: Floats
    t_finish: Floats
    """For the tail."""
    a_enter: Floats
    a_layer: Floats
    """Also what a chunk takes in the pipeline, for each layer of the stage."""
    a_finish: Floats
    a_begin: Floats
    """For the head."""
    open_stage: Floats
    ways: Ways
    """Between all pairs; a hop costs rtt / 2 + hop_fixed + late x jitter + bytes x s_per_byte."""
    hop_fixed: float
    late: float
    t_bytes: float
    """Of one token, for t; the closing link carries none."""
    a_bytes: float
    """Of a chunk, for a; what they take on the line is an element of the pipeline."""
    dial: float
    """Opening a stage whose next one has no link to it takes so many round trips between them."""
    weight_price: float = 0.0
    weight_t: float = 0.0
    weight_a: float = 0.0
    weight_max: float = 0.0
    more_chunks: float = 0.0
    limit_t: float = math.inf
    limit_a: float = math.inf

    # Of all hops or, with an index, of one: native.c has the same formulas.

    def way(self, hop: Any = ...) -> Any:
        ways = self.ways
        return ways.rtt_s[hop] / 2 + self.hop_fixed + self.late * ways.jitter_s[hop]

    def t_hop(self, hop: Any = ...) -> Any:
        return self.way(hop) + self.t_bytes * self.ways.s_per_byte[hop]

    def a_hop(self, hop: Any = ...) -> Any:
        return self.way(hop) + self.transfer(hop)

    def transfer(self, hop: Any = ...) -> Any:
        return self.a_bytes * self.ways.s_per_byte[hop]

    def open_hop(self, hop: tuple[int, int]) -> Any:
        ask = self.ways.rtt_s[hop] + 2 * self.late * self.ways.jitter_s[hop]
        return self.open_stage[hop[0]] + (ask if self.ways.linked[hop] else ask * self.dial)


@dataclass(frozen=True, slots=True)
class Ring:
    """An answer: the peers by index, and the layer at which each stage ends."""

    peers: tuple[int, ...]
    ends: tuple[int, ...]
    price: float
    t: float
    a: float
    open: float
    slowest: float
    proven: bool
    """No cheaper ring exists; False if the search was cut short."""


@dataclass(frozen=True, slots=True)
class Nothing:
    """No ring is within the limits."""

    proven: bool


def cost_of(problem: Problem, ring: Ring) -> float:
    """What the search minimises."""
    return (
        problem.weight_price * ring.price
        + problem.weight_t * ring.t
        + problem.weight_a * ring.a
        + problem.weight_max * (ring.open + problem.more_chunks * ring.slowest)
    )


class Solver:
    """Searches of one problem and of its variants in price, weights and limits."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self._small = len(problem.first) <= SMALL
        self._native = native.Prepared(problem) if native.available() else None

    def solve(
        self,
        variant: Problem | None = None,
        effort: int = EXACT,
        barred: NDArray[np.bool_] | None = None,
    ) -> Ring | Nothing:
        """The cheapest ring within the limits without the `barred` peers, by the native search if
        it was compiled."""
        problem = variant or self.problem
        if self._native is None:
            most = UNLIMITED if self._small else int(effort * PYTHON_SHARE)
            if barred is not None:
                problem = replace(problem, end=np.where(barred, problem.first, problem.end))
            return solve_python(problem, most)
        steps = 2 if effort == QUICK else 6
        found = self._native.search(
            problem, UNLIMITED if self._small else effort, steps=steps, barred=barred
        )
        if found is None:
            return Nothing(proven=True)
        peers, ends, (price, t, a, opening, slowest), proven = found
        if not peers:
            return Nothing(proven=False)
        return Ring(peers, ends, price, t, a, opening, slowest, proven)


def solve(problem: Problem) -> Ring | Nothing:
    """One search."""
    return Solver(problem).solve()


def ttft(problem: Problem, ring: Ring) -> float:
    """The time to the first token: what `limit_a` is compared with."""
    return ring.a + ring.open + problem.more_chunks * ring.slowest


def within(problem: Problem, ring: Ring) -> bool:
    """Does the ring keep the limits?"""
    return ring.t <= problem.limit_t and ttft(problem, ring) <= problem.limit_a


def evaluate(problem: Problem, peers: tuple[int, ...], ends: tuple[int, ...]) -> Ring:
    """The ring of these stages with its sizes."""
    p = problem
    price, t, a, opening, slowest = 0.0, 0.0, p.a_begin[peers[0]], 0.0, 0.0
    for at, (peer, (first, end)) in enumerate(
        zip(peers, itertools.pairwise((0, *ends)), strict=True)
    ):
        price += p.price_enter[peer] + (end - first) * p.price_layer[peer]
        t += p.t_enter[peer] + (end - first) * p.t_layer[peer]
        a += p.a_enter[peer] + (end - first) * p.a_layer[peer]
        opening = max(opening, p.open_stage[peer])
        slowest = max(slowest, (end - first) * p.a_layer[peer])
        if at + 1 < len(peers):
            hop = peer, peers[at + 1]
            t, a = t + p.t_hop(hop), a + p.a_hop(hop)
            opening, slowest = max(opening, p.open_hop(hop)), max(slowest, p.transfer(hop))
    tail = peers[-1]
    t += p.t_finish[tail] + (p.way((tail, peers[0])) if len(peers) > 1 else 0.0)
    a += p.a_finish[tail]
    return Ring(
        peers, ends, float(price), float(t), float(a), float(opening), float(slowest), proven=True
    )


# --- the same in Python ---------------------------------------------------------------------------


@dataclass(slots=True)
class _Label:
    """A partial ring up to the entry into `peer` at `layer`."""

    head: int
    peer: int
    layer: int
    parent: _Label | None
    price: float
    t: float
    a: float
    open: float
    slowest: float
    used: frozenset[int]
    """Peers before this one."""
    dead: bool = False


class _Search:
    def __init__(self, problem: Problem) -> None:
        self.p = problem
        layers = np.arange(problem.layers)[:, None]
        held = (problem.first <= layers) & (layers < problem.end)
        self.holders = [np.flatnonzero(row) for row in held]
        self.covered = all(len(row) > 0 for row in self.holders)
        self.free = self.tables(-1) if self.covered else {}
        self.of_head: dict[int, dict[str, Floats]] = {}
        self.buckets: dict[tuple[int, int, int], list[_Label]] = {}

    def cost_to_go(self, wp: float, wt: float, wa: float, head: int) -> Floats:
        """[layer, peer]: least rest from entering the peer there; head -1: of any head."""
        p, n = self.p, len(self.p.first)
        table = np.full((p.layers, n), np.inf)
        edges = wt * p.t_hop() + wa * p.a_hop()
        enter = wp * p.price_enter + wt * p.t_enter + wa * p.a_enter
        each = wp * p.price_layer + wt * p.t_layer + wa * p.a_layer
        close = p.way()
        np.fill_diagonal(close, 0.0)
        closing = close[:, self.holders[0]].min(axis=1) if head < 0 else close[:, head]
        leave = wt * (p.t_finish + closing) + wa * p.a_finish
        run = np.full(n, np.inf)
        for layer in range(p.layers - 1, -1, -1):
            here = self.holders[layer]
            now = np.full(n, np.inf)
            now[here] = each[here] + np.minimum(run[here], leave[here])
            run = now
            table[layer] = run + enter
            if layer:
                entered = table[layer].copy()
                if head >= 0:
                    entered[head] = np.inf
                before = self.holders[layer - 1]
                leave = np.full(n, np.inf)
                leave[before] = (edges[np.ix_(before, here)] + entered[here]).min(axis=1)
        return table

    def tables(self, head: int) -> dict[str, Floats]:
        p = self.p
        made = {"cost": self.cost_to_go(p.weight_price, p.weight_t, p.weight_a, head)}
        if p.limit_t < math.inf:
            made["t"] = self.cost_to_go(0, 1, 0, head)
        if p.limit_a < math.inf:
            made["a"] = self.cost_to_go(0, 0, 1, head)
        return made

    def bound(self, x: _Label, tables: dict[str, Floats]) -> float:
        """Least cost of a ring that begins so; inf if none is within the limits."""
        p, at = self.p, (x.layer, x.peer)
        maxima = x.open + p.more_chunks * x.slowest
        if p.limit_t < math.inf and x.t + tables["t"][at] > p.limit_t:
            return math.inf
        if p.limit_a < math.inf and x.a + tables["a"][at] + maxima > p.limit_a:
            return math.inf
        return self.sum(x) + p.weight_max * maxima + float(tables["cost"][at])

    def sum(self, x: _Label) -> float:
        p = self.p
        return p.weight_price * x.price + p.weight_t * x.t + p.weight_a * x.a

    def no_worse(self, x: _Label, y: _Label) -> bool:
        p = self.p
        limited = p.limit_a < math.inf
        return (
            self.sum(x) <= self.sum(y)
            and (p.limit_t == math.inf or x.t <= y.t)
            and (not limited or x.a <= y.a)
            and (not (limited or p.weight_max > 0) or (x.open <= y.open and x.slowest <= y.slowest))
            and all(p.end[peer] <= x.layer or peer in y.used for peer in x.used)
        )

    def dominated(self, x: _Label) -> bool:
        bucket = self.buckets.setdefault((x.head, x.peer, x.layer), [])
        if any(self.no_worse(held, x) for held in bucket):
            return True
        for held in bucket:
            held.dead = held.dead or self.no_worse(x, held)
        bucket[:] = [held for held in bucket if not held.dead]
        bucket.append(x)
        return False


def _corners(total: float, opening: float, slow: float, weight: float) -> bool:
    """No worse in total + weight x maxima, to whatever height the rest raises the maxima."""
    return all(total + weight * more <= 0 for more in (0.0, opening, slow, opening + slow))


def solve_python(problem: Problem, most_labels: int = UNLIMITED) -> Ring | Nothing:
    """`solve` without the native search."""
    p, search = problem, _Search(problem)
    order = itertools.count()
    queue: list[tuple[float, int, _Label]] = []
    best: Ring | None = None
    best_cost = math.inf

    def push(x: _Label, tables: dict[str, Floats]) -> None:
        bound = search.bound(x, tables)
        if bound < best_cost and bound < math.inf:
            heapq.heappush(queue, (bound, next(order), x))

    if not search.covered:
        return Nothing(proven=True)
    for head in map(int, search.holders[0]):
        begin, opened = float(p.a_begin[head]), float(p.open_stage[head])
        x = _Label(head, head, 0, None, 0.0, 0.0, begin, opened, 0.0, frozenset())
        push(x, search.free)
    proven = True
    while queue:
        bound, count, x = heapq.heappop(queue)
        if bound >= best_cost:
            break
        if x.dead:
            continue
        if x.head not in search.of_head:
            search.of_head[x.head] = search.tables(x.head)
            push(x, search.of_head[x.head])
            continue
        if count > most_labels:
            proven = False
            break
        for y, end in _ways_on(search, x):
            if y.layer < p.layers:
                if not search.dominated(y):
                    push(y, search.of_head[x.head])
                continue
            ring = _complete(y, end)
            cost = cost_of(p, ring)
            if cost < best_cost and within(p, ring):
                best, best_cost = ring, cost
    return Nothing(proven) if best is None else replace(best, proven=proven)


def _ways_on(search: _Search, x: _Label) -> list[tuple[_Label, int]]:
    """All labels behind `x`, and the ends of its stage; a complete ring has layer = layers."""
    p, peer, made = search.p, x.peer, []
    price, t, a = x.price + p.price_enter[peer], x.t + p.t_enter[peer], x.a + p.a_enter[peer]
    used = x.used | {peer}
    for end in range(x.layer + 1, int(p.end[peer]) + 1):
        count = end - x.layer
        done_price = float(price + count * p.price_layer[peer])
        done_t = float(t + count * p.t_layer[peer])
        done_a = float(a + count * p.a_layer[peer])
        slow = max(x.slowest, float(count * p.a_layer[peer]))
        if end == p.layers:
            done_t += float(p.t_finish[peer])
            if peer != x.head:
                done_t += float(p.way((peer, x.head)))
            done_a += float(p.a_finish[peer])
            sizes = (done_price, done_t, done_a, x.open, slow)
            made.append((_Label(x.head, peer, end, x, *sizes, used), end))
            continue
        for to in map(int, search.holders[end]):
            if to in used:
                continue
            sizes = (
                done_price,
                done_t + float(p.t_hop((peer, to))),
                done_a + float(p.a_hop((peer, to))),
                max(x.open, float(p.open_stage[to]), float(p.open_hop((peer, to)))),
                max(slow, float(p.transfer((peer, to)))),
            )
            made.append((_Label(x.head, to, end, x, *sizes, used), end))
    return made


def _complete(x: _Label, end: int) -> Ring:
    sizes = (x.price, x.t, x.a, x.open, x.slowest)
    peers, ends = [], []
    last: _Label | None = x.parent
    while last is not None:
        peers.append(last.peer)
        ends.append(end)
        end, last = last.layer, last.parent
    return Ring(tuple(peers[::-1]), tuple(ends[::-1]), *sizes, proven=True)
