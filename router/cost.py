"""What a route costs, in seconds and in price: predictions that anybody can recompute.

*Time per token* is the length of the ring, because one token needs the whole loop before the next
can start (no pipelining hides it at batch 1; `L` in docs/architecture.md):

    tpot = sum over stages (layers x (decode_layer_s + rows x row_layer_s) + queue_s)
         + head_s of the tail
         + sum over hops (one way + HOP_S + activation bytes / bandwidth)
         + closing hop tail -> head (one way + HOP_S: it carries one token id)

`rows` is the batch that the peer computes beside us, `queue_s` what its steps wait; both announced.

*Time to first token* sends the prompt through the same stages in m chunks, so that a stage computes
chunk i while its predecessor computes i + 1. The first chunk pays every stage and hop; each of the
others adds the slowest of them. Before that all stages are opened at once, and the slowest counts:

    ttft = max over stages (round trip of client and stage x (1, or 1 + DIAL_ROUND_TRIPS if cold)
                            + the same from there to the next stage, which it asks only once)
         + client -> head + first chunk through all stages and hops + (m - 1) x slowest element
         + head_s + tail -> client

*Percentiles.* Each element has a median and a 95th percentile; other percentiles lie on the line
through both that a normal distribution would give. The percentile of a sum is taken to be the sum
of the percentiles, as if all went wrong together. For independent elements that is too much, but
load makes them go wrong together, and a limit that was promised is worth more than one that was
narrowly missed. Route.ttft_s and tpot_s are medians.

*Price* is what a route takes from others, in layers of an idle peer: for each layer, and once more
for each stage (a place in its batch, two streams, one more peer that may fail), 1 / ((1 - busy) x
(1 - share of KV in use)). So busy peers are left to those whose limits need them. Of routes with
one price the faster is taken, by `TIE_PER_S`.

Petals' rule (a constant of 18 ms for each hop, half a round trip for unknown links, no queue, no
bytes, no closing link) was rejected: it prices a path that the tokens do not take. So was a charge
per node of its time for one layer (Parallax), which prefers one slow peer to two fast ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hexswarm.errors import UsageError
from hexswarm.records import Announcement, Link, PeerId, RouteRequest, Stage
from hexswarm.router.columns import Columns
from hexswarm.router.network import Snapshot
from hexswarm.router.search import Problem

HOP_S = 0.0002
"""Seconds of framing, encryption and wake-ups for one small message one way: half of the 0.40 ms
that an echo of 16 KB takes on loopback through our streams."""

PIECES = 8
"""A prompt is cut into at most so many chunks for overlap (peer/scheduler.py), unless they would be
larger than `chunk_tokens`."""

DIAL_ROUND_TRIPS = 6.0
"""Round trips before a new link carries its first message: 4.4-5.1 were measured for a stream of a
new libp2p connection over 80 ms; the second lane and our greeting add one."""

COMPUTE_SPREAD = 0.15
"""95th percentile of a step's computing over its median, less one, on machines that do other
things too (SmolLM2 on shared Xeon cores: 0.1-0.2)."""

QUEUE_P95 = math.log(20)
"""95th percentile over mean of an exponential wait (M/M/1), 3.0. As its median the mean counts."""

BUSIEST = 0.95
"""Shares of load and KV count as at most this: what is full is refused, not priced."""

NEVER_MEET = 1 / 3
"""What many stages may promise together beyond the limit; one stage nothing. With four stages and
without this a loaded swarm keeps all limits and lets in 0.57 of the requests, with it 0.8; at 1/2
one in ten of the tighter limits is broken (benchmarks/herd.py)."""

TIE_PER_S = 1e-6
"""Price of a predicted second of the whole answer: decides between routes of one price alone."""

_TO_P95 = NormalDist().inv_cdf(0.95)

Floats = NDArray[np.float64]


def lateness(percentile: float) -> float:
    """How far beyond the median towards the 95th percentile: 0 at 50, 1 at 95, 1.41 at 99."""
    if not 50 <= percentile <= 99.9:
        raise UsageError(
            f"percentile {percentile:g} is outside 50-99.9",
            remedy="50 is the median; 95 means that one request of twenty may be later",
        )
    return NormalDist().inv_cdf(percentile / 100) / _TO_P95


# --- elements: the same formulas for one peer or link and for arrays of them ----------------------


def _work(seconds: Any, late: float) -> Any:
    return seconds * (1 + COMPUTE_SPREAD * late)


def _wait(queue_s: Any, late: float) -> Any:
    return queue_s * (1 + (QUEUE_P95 - 1) * late)


def _way(rtt_s: Any, jitter_s: Any, late: float) -> Any:
    return rtt_s / 2 + HOP_S + jitter_s * late


def _chunk(decode_layer_s: Any, prefill_layer_s: Any, tokens: float) -> Any:
    """Of one layer: the arithmetic of the tokens, or reading the weights if that takes longer.

    On a CPU a chunk of 11 tokens takes nearly as long as one of 43 (peer/scheduler.py), on an
    accelerator as one of hundreds.
    """
    return np.maximum(decode_layer_s, tokens * prefill_layer_s)


def _opening(rtt_s: Any, jitter_s: Any, cold: Any, late: float) -> Any:
    return (rtt_s + 2 * jitter_s * late) * (1 + DIAL_ROUND_TRIPS * cold)


def price_per_layer(busy: Any, free_kv_tokens: Any, kv_tokens: Any) -> Any:
    """See the module's text; a pool of unknown size counts as empty."""
    pool = np.maximum(kv_tokens, 1)
    used = np.where(np.asarray(kv_tokens) > 0, 1 - np.minimum(free_kv_tokens, pool) / pool, 0.0)
    return 1 / ((1 - np.minimum(busy, BUSIEST)) * (1 - np.minimum(used, BUSIEST)))


def chunks(request: RouteRequest) -> tuple[int, float]:
    """In how many chunks the prompt travels, and the mean number of tokens in one.

    The rule of peer/scheduler.py for a device that wants 128 tokens at once: as many chunks as
    `PIECES`, each of 64 KiB of activations at least and 2 MiB or 128 tokens at most.
    """
    least = max(16, (64 << 10) // request.hidden_bytes)
    most = max(16, (256 << 10) // request.hidden_bytes, min(128, (2 << 20) // request.hidden_bytes))
    size = min(max(request.prompt_tokens / PIECES, least), most)
    count = math.ceil(request.prompt_tokens / size)
    return count, request.prompt_tokens / count


# --- a problem for the search ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PeerTimes:
    """Seconds at each of the chosen peers, at one percentile."""

    queue: Floats
    decode: Floats
    """For each layer and token."""
    prefill: Floats
    """For each layer and chunk."""
    head: Floats


def peer_times(
    columns: Columns, request: RouteRequest, rows: NDArray[np.intp], late: float
) -> PeerTimes:
    """What stages at these rows take."""
    _, tokens = chunks(request)
    decode = columns.decode_layer_s[rows] + columns.rows[rows] * columns.row_layer_s[rows]
    return PeerTimes(
        queue=_wait(columns.queue_s[rows], late),
        decode=_work(decode, late),
        prefill=_work(
            _chunk(columns.decode_layer_s[rows], columns.prefill_layer_s[rows], tokens), late
        ),
        head=_work(columns.head_s[rows], late),
    )


def client_times(
    snapshot: Snapshot, request: RouteRequest, rows: NDArray[np.intp], late: float
) -> tuple[Floats, Floats]:
    """Seconds one way between client and peers, and to open a stage there.

    A client without a place is everywhere at once.
    """
    rtt_s = jitter_s = np.zeros(len(rows))
    if request.client is not None:
        rtt_s, jitter_s, _ = snapshot.client_ways(request.client, request.model, rows)
    columns = snapshot.columns(request.model)
    cold = np.ones(len(columns.peers))
    cold[[columns.index[peer] for peer in request.warm if peer in columns.index]] = 0.0
    return _way(rtt_s, jitter_s, late), _opening(rtt_s, jitter_s, cold[rows], late)


def build_problem(
    snapshot: Snapshot, request: RouteRequest, rows: NDArray[np.intp], barred: Any = False
) -> Problem:
    """The search for the best route over the chosen rows of the model's columns.

    Those that are `barred` take part without a span: so the ways between all rows of a small swarm
    can be kept with its snapshot. The limits get a relative 1e-9 of room for the order in which
    floats are added.
    """
    late = lateness(request.percentile)
    columns = snapshot.columns(request.model)
    ways = snapshot.ways(request.model, rows)
    count, tokens = chunks(request)
    time = peer_times(columns, request, rows, late)
    to_client, opening = client_times(snapshot, request, rows, late)
    price = price_per_layer(
        columns.busy[rows], columns.free_kv_tokens[rows], columns.kv_tokens[rows]
    )
    return Problem(
        layers=request.layers,
        first=columns.first[rows],
        end=np.where(barred, columns.first[rows], columns.end[rows]),
        price_enter=price,
        price_layer=price,
        t_enter=time.queue,
        t_layer=time.decode,
        t_finish=time.head,
        a_enter=time.queue,
        a_layer=time.prefill,
        a_finish=time.head + to_client,
        a_begin=to_client,
        open_stage=opening,
        ways=ways,
        hop_fixed=HOP_S,
        late=late,
        t_bytes=request.hidden_bytes,
        a_bytes=tokens * request.hidden_bytes,
        dial=1 + DIAL_ROUND_TRIPS,
        more_chunks=count - 1.0,
        **_objective(request),
    )


def _objective(request: RouteRequest) -> dict[str, float]:
    """Price under a limit, else the time of the whole answer."""
    later = max(request.new_tokens - 1, 0)
    if request.ttft_s is None and request.tpot_s is None:
        return {"weight_t": later, "weight_a": 1.0, "weight_max": 1.0}
    return {
        "weight_price": 1.0,
        "weight_t": TIE_PER_S * later,
        "weight_a": TIE_PER_S,
        "weight_max": TIE_PER_S,
        "limit_t": math.inf if request.tpot_s is None else request.tpot_s * (1 + 1e-9),
        "limit_a": math.inf if request.ttft_s is None else request.ttft_s * (1 + 1e-9),
    }


# --- one route ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Times:
    """Predicted seconds of one route at one percentile."""

    ttft_s: float
    tpot_s: float
    open_s: float
    """The part of `ttft_s` that opens the stages."""


@dataclass(frozen=True, slots=True)
class Element:
    """One stage and the way to the next (of the tail: back to the head), per token."""

    compute_s: float
    queue_s: float
    link_s: float
    serialise_s: float
    """Framing, and putting the activations on the line."""


@dataclass(frozen=True, slots=True)
class Known:
    """What a snapshot knows of one route, looked up once."""

    items: tuple[Announcement, ...]
    ways: tuple[Link, ...]
    """From each stage to the next, from the tail to the head; none in a ring of one stage."""
    linked: tuple[bool, ...]
    """Whether the two ends of each of these ways keep a link."""
    clients: tuple[Link, ...]
    """Between the client and each stage."""
    unmeasured: tuple[tuple[PeerId, PeerId], ...]


def look_up(snapshot: Snapshot, request: RouteRequest, stages: Sequence[Stage]) -> Known:
    """Raises UsageError for a peer that announces nothing."""
    peers = [stage.peer for stage in stages]
    pairs = list(zip(peers, [*peers[1:], peers[0]], strict=True)) if len(peers) > 1 else []
    asked = [] if request.client is None else [(request.client, peer) for peer in peers]
    ways = [snapshot.known_link(*pair) for pair in pairs]
    clients = [snapshot.known_link(*pair) for pair in asked]
    return Known(
        tuple(snapshot.announcement(request.model, peer) for peer in peers),
        tuple(link for link, _ in ways),
        tuple(snapshot.linked(*pair) for pair in pairs),
        tuple(link for link, _ in clients) or (Link(0.0),) * len(peers),
        tuple(
            pair
            for pair, (_, origin) in zip((*pairs, *asked), (*ways, *clients), strict=True)
            if origin == "unmeasured"
        ),
    )


def elements(
    snapshot: Snapshot, request: RouteRequest, stages: Sequence[Stage], late: float = 0.0
) -> list[Element]:
    """Where the time of one token goes; all fields of all elements add up to the time per token."""
    return _elements(look_up(snapshot, request, stages), request, stages, late)


def _elements(
    known: Known, request: RouteRequest, stages: Sequence[Stage], late: float
) -> list[Element]:
    found = []
    for index, (stage, item) in enumerate(zip(stages, known.items, strict=True)):
        tail = index + 1 == len(stages)
        decode = item.speed.decode_layer_s + item.rows * item.speed.row_layer_s
        compute = len(stage.span) * decode + (item.speed.head_s if tail else 0.0)
        link_s = serialise_s = 0.0
        if known.ways:
            link = known.ways[index]
            link_s = link.one_way_s + link.jitter_s * late
            serialise_s = HOP_S + (0.0 if tail else request.hidden_bytes / link.bytes_per_s)
        queue_s = _wait(item.queue_s, late)
        found.append(Element(_work(compute, late), queue_s, link_s, serialise_s))
    return found


def predict(
    snapshot: Snapshot, request: RouteRequest, stages: Sequence[Stage], percentile: float = 50.0
) -> Times:
    """The times of a route at a percentile. Raises UsageError for a peer that announces nothing."""
    return times(look_up(snapshot, request, stages), request, stages, lateness(percentile))


def times(known: Known, request: RouteRequest, stages: Sequence[Stage], late: float) -> Times:
    """`predict` from what is known already."""
    count, tokens = chunks(request)
    size = tokens * request.hidden_bytes
    per_token = _elements(known, request, stages, late)
    tpot_s = sum(e.compute_s + e.queue_s + e.link_s + e.serialise_s for e in per_token)
    opening = first = slowest = 0.0
    for index, (stage, item) in enumerate(zip(stages, known.items, strict=True)):
        client = known.clients[index]
        cold = stage.peer not in request.warm
        asked = _opening(client.rtt_s, client.jitter_s, cold, late)
        opening = max(opening, asked)
        speed = item.speed
        chunk = float(_chunk(speed.decode_layer_s, speed.prefill_layer_s, tokens))
        compute = _work(len(stage.span) * chunk, late)
        first += _wait(item.queue_s, late) + compute
        slowest = max(slowest, compute)
        if index + 1 < len(stages):
            link = known.ways[index]
            first += _way(link.rtt_s, link.jitter_s, late) + size / link.bytes_per_s
            slowest = max(slowest, size / link.bytes_per_s)
            onward = _opening(link.rtt_s, link.jitter_s, not known.linked[index], late)
            opening = max(opening, asked + onward)
    first += _work(known.items[-1].speed.head_s, late)
    for client in (known.clients[0], known.clients[-1]):
        first += _way(client.rtt_s, client.jitter_s, late)
    return Times(opening + first + (count - 1) * slowest, tpot_s, opening)


def budgets(
    snapshot: Snapshot, request: RouteRequest, stages: Sequence[Stage]
) -> tuple[float, ...]:
    """For each stage the seconds that a step may take there, so that all keep the limit together.

    What the limit leaves after the ways is shared out in proportion to what is predicted, which is
    the least that a stage is given. A limit is on the mean of an answer, while a promise is broken
    by the worst moment of a stage, and the worst moments of several stages do not meet: so they may
    add up to more, see `NEVER_MEET`. Zeros without a limit on the time per token.
    """
    if request.tpot_s is None:
        return (0.0,) * len(stages)
    parts = elements(snapshot, request, stages, lateness(request.percentile))
    stays = [part.compute_s + part.queue_s for part in parts]
    left = request.tpot_s - sum(part.link_s + part.serialise_s for part in parts)
    total = sum(stays)
    if total <= 0:  # nobody tells what a step takes: equal shares
        return (max(left, 0.0) / len(stages),) * len(stages)
    room = 1 + NEVER_MEET * (1 - 1 / len(stages))
    return tuple(stay * max(1.0, room * left / total) for stay in stays)


def price(stages: Sequence[Stage], items: Sequence[Announcement]) -> float:
    """Of a route over these peers, in layers of an idle peer."""
    pairs = zip(stages, items, strict=True)
    return sum((len(stage.span) + 1) * peer_price(item) for stage, item in pairs)


def peer_price(item: Announcement) -> float:
    """Price of one layer at a peer: `price_per_layer` without arrays."""
    used = 1 - min(item.free_kv_tokens / item.kv_tokens, 1.0) if item.kv_tokens else 0.0
    return 1 / ((1 - min(item.busy, BUSIEST)) * (1 - min(used, BUSIEST)))
