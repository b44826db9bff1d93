"""Which few hundred of ten thousand peers the exact search should look at.

Distances between regions stand for distances between peers (`Columns.region_rtt_s`, `access_s`), so
that labels at (layer, region) suffice: O(held layers + layers x regions^2) instead of O(holders^2)
a layer. Forward and backward over the layers give for each peer the least cost of a ring *through*
it, for heads in each region apart, since a ring is closed. The peers of the best ring all have its
cost as their score, those of the second best come next, and so on: the best by score are the
candidates. A request with limits has several objectives (price, each limited time, mixtures), and
each of them names its share.

What is lost: rings whose peers are nearer to each other than their regions tell. Against the exact
search over all of 1,000 random peers the route costs 0-1 % more (benchmarks/routing.py).

Rejected: sampling (loses the few good ones), the nearest peers first (loses the fast ones), one
label a (layer, peer) with neighbours only (a swarm whose neighbour lists are stale has no route).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from hexswarm.records import RouteRequest
from hexswarm.router import cost, native
from hexswarm.router.network import Snapshot

EXACT_PEERS = 256
"""Up to so many usable peers the search looks at all of them."""

CANDIDATES = 160
"""So many are left of more."""

MIXTURES = (0.5, 2.0)
"""Weights of a limited time against price, both in units of their least values."""

HOMES = 4
"""Regions in which heads are looked for, if closing a ring costs: those whose peers lie on the best
rings that need no closing."""

Floats = NDArray[np.float64]
Rows = NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class Census:
    """Costs of one objective, additive over the stages and hops of a ring.

    A hop from i to j costs out[i] + between[region i, region j] + in_[j], the closing link
    likewise.
    """

    layers: int
    first: NDArray[np.int32]
    end: NDArray[np.int32]
    region: NDArray[np.int32]
    enter: Floats
    layer: Floats
    finish: Floats
    begin: Floats
    out: Floats
    in_: Floats
    close_out: Floats
    close_in: Floats
    between: Floats
    close_between: Floats
    homes: NDArray[np.bool_]
    """Regions in which a head may be."""
    anywhere: bool = False
    """The head is where it is, and closing the ring costs nothing."""


def select(snapshot: Snapshot, request: RouteRequest, rows: Rows) -> Rows:
    """The most promising of `rows`, in order; at most `CANDIDATES`."""
    of = _Parts(snapshot, request, rows)
    if request.ttft_s is None and request.tpot_s is None:
        later = max(request.new_tokens - 1, 0)
        return _best(rows, [_rings(of.census(0.0, later, 1.0))])
    price = _rings(of.census(1.0, 0.0, 0.0))
    scores, low = [price], _least(price)
    for weights in _limited(request):
        time = _rings(of.census(0.0, *weights))
        scores.append(time)
        for mixture in MIXTURES:
            share = mixture * low / max(_least(time), 1e-9)
            scores.append(_rings(of.census(1.0, weights[0] * share, weights[1] * share)))
    return _best(rows, scores)


def _rings(census: Census) -> Floats:
    """Least cost of a ring through each peer, with heads in the `HOMES` that promise most."""
    lines = through(replace(census, anywhere=True))
    if census.anywhere:
        return lines
    heads = np.flatnonzero(census.first == 0)
    best = np.full(len(census.between), np.inf)
    np.minimum.at(best, census.region[heads], lines[heads])
    homes = np.zeros(len(best), dtype=np.bool_)
    homes[np.argsort(best, kind="stable")[:HOMES]] = True
    return through(replace(census, homes=homes))


def _limited(request: RouteRequest) -> list[tuple[float, float]]:
    """Weights of (time per token, time to the first token) for each limit."""
    found = []
    if request.tpot_s is not None:
        found.append((1.0, 0.0))
    if request.ttft_s is not None:
        found.append((0.0, 1.0))
    return found


def _least(score: Floats) -> float:
    return float(score.min(initial=np.inf))


def _best(rows: Rows, scores: list[Floats]) -> Rows:
    """The best by each score, an equal share of each."""
    share = -(-CANDIDATES // len(scores))
    chosen: set[int] = set()
    for score in scores:
        order = np.argpartition(score, share)[:share] if share < len(score) else range(len(score))
        chosen.update(int(at) for at in order if np.isfinite(score[at]))
    return rows[sorted(chosen)]


class _Parts:
    """The parts of which the objectives of one request are made."""

    def __init__(self, snapshot: Snapshot, request: RouteRequest, rows: Rows) -> None:
        self.request = request
        late = cost.lateness(request.percentile)
        columns = snapshot.columns(request.model)
        self.late = late
        self.columns, self.rows = columns, rows
        self.region = columns.region[rows].astype(np.int32)
        self.one_way = columns.region_rtt_s / 2 + cost.HOP_S
        self.access = columns.access_s[rows] / 2
        self.per_token = cost.peer_times(columns, request, rows, late)
        self.price = cost.price_per_layer(
            columns.busy[rows], columns.free_kv_tokens[rows], columns.kv_tokens[rows]
        )
        to_client, opening = cost.client_times(snapshot, request, rows, late)
        self.to_client = to_client
        self.opening = opening
        self.up = columns.up_s_per_byte[rows]
        self.down = columns.down_s_per_byte[rows]

    def census(self, wp: float, wt: float, wa: float) -> Census:
        """Of price x wp + time per token x wt + time to the first token x wa."""
        request, time, columns, rows = self.request, self.per_token, self.columns, self.rows
        _, tokens = cost.chunks(request)
        # Half at either end: the slower of the two is what counts, and their mean is near it.
        size = request.hidden_bytes * (wt + wa * tokens) / 2
        stage = wp * self.price + (wt + wa) * time.queue
        return Census(
            layers=request.layers,
            first=columns.first[rows],
            end=columns.end[rows],
            region=self.region,
            enter=stage,
            layer=wp * self.price + wt * time.decode + wa * time.prefill,
            finish=(wt + wa) * time.head + wa * self.to_client,
            begin=wa * (self.to_client + self.opening),
            out=(wt + wa) * self.access + size * self.up,
            in_=(wt + wa) * self.access + size * self.down,
            close_out=wt * self.access,
            close_in=wt * self.access,
            between=(wt + wa) * self.one_way,
            close_between=wt * self.one_way,
            homes=np.ones(len(self.one_way), dtype=np.bool_),
            anywhere=wt == 0,
        )


def through(census: Census) -> Floats:
    """For each peer the least cost of a ring through it; inf if there is none."""
    return native.select(census) if native.available() else through_python(census)


def through_python(c: Census) -> Floats:
    """`through` without the native part."""
    layers = np.arange(c.layers)[:, None]
    held = (c.first <= layers) & (layers < c.end)
    holders = [np.flatnonzero(row) for row in held]
    score = np.full(len(c.first), np.inf)
    whole = (c.first == 0) & (c.end == c.layers)
    alone = c.begin + c.enter + c.layers * c.layer + c.finish
    score[whole] = alone[whole]
    homes = [-1] if c.anywhere else np.unique(c.region[holders[0]]).tolist()
    for home in homes:
        if home >= 0 and not c.homes[home]:
            continue
        forward = _forward(c, holders, home)
        rest = np.full(len(c.first), np.inf)
        for layer in range(c.layers - 1, -1, -1):
            rest = _backward(c, holders, home, layer, rest)
            here = holders[layer]
            score[here] = np.minimum(score[here], rest[here] + forward[layer][here])
    return score


def _backward(
    c: Census, holders: list[NDArray[np.intp]], home: int, layer: int, rest: Floats
) -> Floats:
    """For each peer the least rest of a ring once it has computed `layer`."""
    here, now = holders[layer], np.full(len(c.first), np.inf)
    if layer == c.layers - 1:
        closing = 0.0 if home < 0 else c.close_between[c.region[here], home]
        now[here] = c.finish[here] + c.close_out[here] + closing
        return now
    after = holders[layer + 1]
    best = np.full(len(c.between), np.inf)
    entered = c.in_[after] + c.enter[after] + c.layer[after] + rest[after]
    np.minimum.at(best, c.region[after], entered)
    gate = (c.between + best[None, :]).min(axis=1)
    stay = np.where(c.end[here] > layer + 1, c.layer[here] + rest[here], np.inf)
    now[here] = np.minimum(gate[c.region[here]] + c.out[here], stay)
    return now


def _forward(c: Census, holders: list[NDArray[np.intp]], home: int) -> list[Floats]:
    """For each layer and peer the least cost of having computed it there."""
    found: list[Floats] = []
    for layer, here in enumerate(holders):
        now = np.full(len(c.first), np.inf)
        if layer == 0:
            mine = here if home < 0 else here[c.region[here] == home]
            now[mine] = c.begin[mine] + c.close_in[mine] + c.enter[mine]
        else:
            before = holders[layer - 1]
            best = np.full(len(c.between), np.inf)
            np.minimum.at(best, c.region[before], found[-1][before] + c.out[before])
            gate = (best[:, None] + c.between).min(axis=0)
            entered = gate[c.region[here]] + c.in_[here] + c.enter[here]
            now[here] = np.minimum(entered, found[-1][here])
        now[here] += c.layer[here]
        found.append(now)
    return found
