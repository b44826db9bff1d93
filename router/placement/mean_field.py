"""The estimate of `latency` in numpy: a mean field of requests over the rings of a placement.

*Who goes where.* Clients take the route that has the whole answer soonest, on views that are stale
and draws that are perturbed (`hexswarm.router.routing`). That is a logit choice over all rings: a
ring of cost c is taken with a probability in proportion to exp(-c / T), T a few percent of the
usual cost. Over an acyclic graph all sums over rings are matrix algebra: with A[i, j] = exp(-cost
of going on from i to j / T), M = 1 / (1 - A) sums over all paths from i to j, the closing hop
C[tail, head] ends the ring, and the share of the edge i -> j is A[i, j] (M C M)[j, i] over the
trace of C M. Exact, with the way from tail to head in it.

*What a stage takes.* A unit that computes k layers alternates between steps of decode rows, k D(b)
seconds at b rows, and steps that carry a chunk of a prompt too, k (D(b) + P). Rows that arrive
during a step leave with the next one, so b is the fixed point rows/s x step, and a row waits for
what is left of the current step, E[S^2] / 2 E[S] (inspection paradox), if the unit is busy, which
it is but for the idle time exp(-rows/s x S) / (rows/s) between batches. Load makes steps longer,
and longer steps repel clients: choice and times are iterated a few times with averaging.

*First token.* The chunks of a prompt pass the stages as in a pipeline: the first pays every stage
and hop, the others the slowest of them; there, too, the queue of other prompts is waited for
(M/G/1, lengths with the trace's variance). The slowest is a p-norm, which is smooth.

*Convoys.* In a ring rows do not come at random: a stage sends on what it computed as one convoy,
and a next stage that is not slower and hears of nobody else has computed it before the next one
comes. So `alike`, the sum of squared shares of a unit's senders, each times how slow it is, spares
most of the waiting (`CONVOY`). Chains of equal steps wait least, and a search finds them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from hexswarm.router.placement.expected import MOST_ROWS, NOWHERE, Estimate, Load, Tables
from hexswarm.router.placement.rates import Numbers

SPREAD = 0.03
"""Temperature of the choice, relative to the mean cost of a ring: what remains of a tenth of
perturbation on each stage when ten of them are added."""

FULL = 0.95
"""Utilisation from which on waiting is no longer predicted but punished."""

CONVOY = 0.85
"""How much of the waiting is spared where all rows come in one convoy: fitted to the simulator."""

_NORM = 16.0


@dataclass(frozen=True, slots=True)
class Times:
    """Of the used units: seconds at the current load."""

    wait: Numbers
    """Until the step begins that takes a row along."""
    step: Numbers
    """Mean, of a whole step."""
    token: Numbers
    """For each layer, of a token in a step, chunks beside it included."""
    chunk: Numbers
    """For each layer, of a chunk and the rows beside it."""
    queue: Numbers
    """Of a prompt behind others."""
    prompts: Numbers
    """Utilisation by prompts."""


class MeanField:
    """The iteration for one placement."""

    def __init__(self, of: Tables, first: Any, end: Any, load: Load) -> None:
        self.of, self.load = of, load
        self.at = at = np.flatnonzero(end > first)
        first, end = first[at], end[at]
        self.held = (end - first).astype(np.float64)
        self.enters = (first[None, :] <= end[:, None]) & (end[:, None] < end[None, :])
        self.run = np.maximum(end[None, :] - end[:, None], 0).astype(np.float64)
        self.heads, self.tails = first == 0, end == of.layers
        self.whole = end.astype(np.float64)
        count = len(of.profiles)
        pairs = np.ix_(at, at)
        self.one_way, token = of.one_way[pairs], of.token_s[pairs]
        self.hop, self.carry = self.one_way + token, load.chunk_tokens * token
        self.closing = self.one_way + of.id_s[pairs]
        self.entry, self.exit = of.one_way[count, at], of.one_way[at, count]
        self.prefill = of.chunk(load.chunk_tokens)[at]
        self.chunks = load.input_tokens / load.chunk_tokens
        self.rows = np.full(len(at), 1.0)

    def decode(self, rows: Numbers) -> Numbers:
        """Seconds of a layer for so many rows at each unit, by interpolation."""
        low = np.minimum(rows, MOST_ROWS).astype(np.intp)
        base = self.of.decode[self.at, low]
        return np.asarray(base + (self.of.decode[self.at, low + 1] - base) * (rows - low))

    def settled(self, rounds: int) -> Estimate:
        """Choice and times, iterated."""
        if not len(self.at) or not self.heads.any() or not self.tails.any():
            return NOWHERE
        into = np.full(len(self.at), self.held.sum() / self.of.layers)
        share, length, edges = 1 / into, self.held, np.zeros_like(self.run)
        alike: Any = np.zeros(len(self.at))
        heads, ring = np.zeros(len(self.at)), np.zeros_like(self.run)
        for round in range(rounds):
            times = self.times(share, length, alike)
            found = self.choose(times, edges)
            if found is None:
                return NOWHERE
            new_edges, new_heads, new_ring = found
            keep = round / (round + 1.0)
            edges = keep * edges + (1 - keep) * new_edges
            heads = keep * heads + (1 - keep) * new_heads
            ring = keep * ring + (1 - keep) * new_ring
            share = edges.sum(0) + heads
            alike = self.alike(edges + ring, share, times)
            work = (edges * self.run).sum(0) + heads * self.whole
            squares = (edges * self.run**2).sum(0) + heads * self.whole**2
            length = np.where(work > 0, squares / np.maximum(work, 1e-12), self.held)
        return self.told(times, edges, heads, ring)

    def alike(self, edges: Numbers, share: Numbers, times: Times) -> Numbers:
        """How much each unit's rows come in one convoy that is not faster than itself."""
        part = edges / np.maximum(share, 1e-12)[None, :]
        slower = np.minimum(times.step[:, None] / times.step[None, :], 1.0)
        return np.asarray(CONVOY * (part**2 * slower).sum(0))

    def times(self, share: Numbers, length: Numbers, alike: Numbers) -> Times:
        """Of all units, when each is visited by its share of the requests."""
        load = self.load
        visits = load.requests_per_s * share
        rate, chunks = visits * load.output_tokens, visits * self.chunks
        part = np.minimum(chunks * length * self.prefill, FULL)
        for _ in range(2):
            rows = self.decode(self.rows)
            step = length * rows / (1 - part)
            self.rows = np.maximum(np.minimum(0.5 * (self.rows + rate * step), 1e4), 1.0)
        beside = np.minimum(chunks * step, 1.0)
        short, long = length * rows, length * (rows + self.prefill)
        mean = short + beside * (long - short)
        left = ((1 - beside) * short**2 + beside * long**2) / (2 * mean)
        flowing = rate * mean
        busy = flowing / (flowing + np.exp(-np.minimum(flowing, 50.0))) * (1 - alike)
        chunk = rows * busy + self.prefill
        prompts = chunks * length * chunk
        queue = _queue(prompts, self.chunks * length * chunk, load.variance)
        return Times(busy * left, mean, rows + beside * self.prefill, chunk, queue, prompts)

    def choose(self, times: Times, edges: Numbers) -> tuple[Numbers, Numbers, Numbers] | None:
        """Shares of edges, heads and closing hops (tail, head) in the logit choice."""
        load = self.load
        onward = self.onward(times, edges)
        first = self.first(times, edges)
        fixed = times.wait * (load.output_tokens + 1)
        begin = fixed + self.whole * (times.token * load.output_tokens + times.chunk) + self.entry
        cost = load.output_tokens * onward + first
        close = load.output_tokens * self.closing + self.exit[:, None]
        per_layer = float((self.held * times.token).sum() / self.held.sum())
        heat = SPREAD * load.output_tokens * self.of.layers * per_layer
        for _ in range(4):
            along = np.where(self.enters, np.exp(-cost / heat), 0.0)
            paths = np.linalg.inv(np.eye(len(along)) - along)
            ends = np.exp(-(close + begin[None, :]) / heat)
            ends *= self.tails[:, None] & self.heads[None, :]
            total = float((ends * paths.T).sum())
            if total > 1e-250:
                break
            heat *= 2
        else:
            return None
        through = paths @ ends @ paths
        ring = ends * paths.T / total
        return along * through.T / total, ring.sum(0), ring

    def onward(self, times: Times, edges: Numbers) -> Numbers:
        """Seconds of a token from leaving i to leaving j."""
        return np.asarray(times.wait[None, :] + self.run * times.token[None, :] + self.hop)

    def first(self, times: Times, edges: Numbers) -> Numbers:
        """The same of the first chunk of a prompt."""
        stage = times.wait[None, :] + self.run * times.chunk[None, :]
        return np.asarray(stage + self.one_way + self.carry * (1 + self.line(edges)[1]))

    def line(self, edges: Numbers) -> tuple[Numbers, Numbers]:
        """Of links: utilisation by prompts, and what a chunk waits there, in chunks."""
        used = self.load.requests_per_s * edges * self.chunks * self.carry
        return used, _queue(used, self.chunks, self.load.variance)

    def told(self, times: Times, edges: Numbers, heads: Numbers, ring: Numbers) -> Estimate:
        """Expectations over the choice."""
        load, share = self.load, edges.sum(0) + heads
        start = times.wait + self.whole * times.token
        tpot = float((edges * self.onward(times, edges)).sum() + (heads * start).sum())
        tpot += float((ring * self.closing).sum())
        begin = self.entry + times.wait + self.whole * times.chunk
        first = float((edges * self.first(times, edges)).sum() + (heads * begin).sum())
        first += float((ring.sum(1) * self.exit).sum())
        used, waits = self.line(edges)
        ttft = [
            first + self.slowest(times, edges, heads, waits, tokens / load.chunk_tokens)
            for tokens in (load.input_tokens, load.long_input_tokens)
        ]
        alive = load.requests_per_s * (ttft[0] + load.output_tokens * tpot)
        room = self.of.room[self.at, self.held.astype(np.intp)]
        kv = alive * share * (load.input_tokens + load.output_tokens) / room
        shares = np.zeros(len(self.of.profiles))
        shares[self.at] = share
        busiest = max(float((times.prompts * (share > 1e-6)).max()), float(used.max(initial=0.0)))
        stages = float(share.sum())
        return Estimate(ttft[0], ttft[1], tpot, stages, busiest, float(kv.max()), tuple(shares))

    def slowest(
        self, times: Times, edges: Numbers, heads: Numbers, waits: Numbers, chunks: float
    ) -> float:
        """What the chunks behind the first, and the prompts before this one, add."""
        later = max(chunks - 1, 0.0)
        stage = later * self.run * times.chunk[None, :] + times.queue[None, :]
        link = self.carry * (later + waits)
        begin = later * self.whole * times.chunk + times.queue
        total = (edges * (stage**_NORM + link**_NORM)).sum() + (heads * begin**_NORM).sum()
        return float(total ** (1 / _NORM))


def _queue(used: Any, work: Any, variance: float) -> Numbers:
    """M/G/1: the wait behind prompts of this mean work; linear beyond `FULL`, so that a search sees
    which of two overloads is less."""
    below = np.minimum(used, FULL)
    wait = below / (1 - below) * (1 + 20 * np.maximum(used - FULL, 0.0))
    return np.asarray(wait * work * (1 + variance) / 2)
