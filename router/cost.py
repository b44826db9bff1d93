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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hexswarm.errors import UsageError
from hexswarm.records import Announcement, Link, PeerId, RouteRequest, Stage
from hexswarm.router.columns import Columns
from hexswarm.router.network import Snapshot, Ways
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
Peers = tuple[int, ...]
"""By their place in a problem."""


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


@dataclass(frozen=True, slots=True)
class ClientWays:
    """The ways between the client and the chosen peers."""

    rtt_s: Floats
    jitter_s: Floats
    known: NDArray[np.bool_]


def client_ways(snapshot: Snapshot, request: RouteRequest, rows: NDArray[np.intp]) -> ClientWays:
    """A client without a place is everywhere at once."""
    if request.client is None:
        return ClientWays(np.zeros(len(rows)), np.zeros(len(rows)), np.ones(len(rows), np.bool_))
    return ClientWays(*snapshot.client_ways(request.client, request.model, rows))


def client_times(
    snapshot: Snapshot,
    request: RouteRequest,
    rows: NDArray[np.intp],
    late: float,
    ways: ClientWays | None = None,
) -> tuple[Floats, Floats]:
    """Seconds one way between client and peers, and to open a stage there."""
    ways = ways or client_ways(snapshot, request, rows)
    columns = snapshot.columns(request.model)
    cold = np.ones(len(columns.peers))
    cold[[columns.index[peer] for peer in request.warm if peer in columns.index]] = 0.0
    one_way = _way(ways.rtt_s, ways.jitter_s, late)
    return one_way, _opening(ways.rtt_s, ways.jitter_s, cold[rows], late)


def build_problem(
    snapshot: Snapshot,
    request: RouteRequest,
    rows: NDArray[np.intp],
    barred: Any = False,
    clients: ClientWays | None = None,
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
    to_client, opening = client_times(snapshot, request, rows, late, clients)
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
    rtt_s: Sequence[float]
    """From each stage to the next, from the tail to the head; none in a ring of one stage."""
    jitter_s: Sequence[float]
    s_per_byte: Sequence[float]
    linked: Sequence[bool]
    """Whether the two ends of each of these ways keep a link."""
    client_rtt_s: Sequence[float]
    """Between the client and each stage."""
    client_jitter_s: Sequence[float]
    unmeasured: tuple[tuple[PeerId, PeerId], ...]


def look_up(snapshot: Snapshot, request: RouteRequest, stages: Sequence[Stage]) -> Known:
    """Raises UsageError for a peer that announces nothing."""
    peers = [stage.peer for stage in stages]
    pairs = _around(peers)
    asked = [] if request.client is None else [(request.client, peer) for peer in peers]
    ways = [snapshot.known_link(*pair) for pair in pairs]
    clients = [snapshot.known_link(*pair) for pair in asked]
    to_client = [link for link, _ in clients] or [Link(0.0)] * len(peers)
    return Known(
        items=tuple(snapshot.announcement(request.model, peer) for peer in peers),
        rtt_s=[link.rtt_s for link, _ in ways],
        jitter_s=[link.jitter_s for link, _ in ways],
        s_per_byte=[1 / link.bytes_per_s for link, _ in ways],
        linked=[snapshot.linked(*pair) for pair in pairs],
        client_rtt_s=[link.rtt_s for link in to_client],
        client_jitter_s=[link.jitter_s for link in to_client],
        unmeasured=tuple(
            pair
            for pair, (_, origin) in zip((*pairs, *asked), (*ways, *clients), strict=True)
            if origin == "unmeasured"
        ),
    )


def look_up_in(
    ways: Ways, clients: ClientWays, request: RouteRequest, items: Sequence[Announcement], at: Peers
) -> Known:
    """`look_up` for the announcements `items` of the peers `at`, in the order of matrices that were
    made for a search: a fifth of the time."""
    peers = [item.peer for item in items]
    pairs = _around(peers)
    chosen = np.array(at)
    hops = chosen * len(ways.rtt_s) + np.array([*at[1:], at[0]]) if pairs else chosen[:0]
    told = zip(pairs, ways.known.take(hops).tolist(), strict=True)
    unmeasured = [pair for pair, known in told if not known]
    if request.client is not None:
        known = clients.known.take(chosen).tolist()
        ends = zip(peers, known, strict=True)
        unmeasured += [(request.client, peer) for peer, known in ends if not known]
    return Known(
        items=tuple(items),
        rtt_s=ways.rtt_s.take(hops).tolist(),
        jitter_s=ways.jitter_s.take(hops).tolist(),
        s_per_byte=ways.s_per_byte.take(hops).tolist(),
        linked=ways.linked.take(hops).tolist(),
        client_rtt_s=clients.rtt_s.take(chosen).tolist(),
        client_jitter_s=clients.jitter_s.take(chosen).tolist(),
        unmeasured=tuple(unmeasured),
    )


def _around(peers: Sequence[PeerId]) -> list[tuple[PeerId, PeerId]]:
    """The ways of the ring."""
    return list(zip(peers, [*peers[1:], peers[0]], strict=True)) if len(peers) > 1 else []


def elements(
    snapshot: Snapshot, request: RouteRequest, stages: Sequence[Stage], late: float = 0.0
) -> list[Element]:
    """Where the time of one token goes; all fields of all elements add up to the time per token."""
    return _elements(look_up(snapshot, request, stages), request, stages, late)


def _elements(
    known: Known, request: RouteRequest, stages: Sequence[Stage], late: float
) -> list[Element]:
    return [
        Element(_work(compute, late), _wait(queue, late), rtt_s / 2 + jitter_s * late, serialise)
        for compute, queue, rtt_s, jitter_s, serialise in _per_token(known, request, stages)
    ]


def _per_token(
    known: Known, request: RouteRequest, stages: Sequence[Stage]
) -> Iterator[tuple[float, float, float, float, float]]:
    """Of each stage and the way behind it the medians that a token takes: computing, queue, round
    trip, jitter, serialising."""
    last = len(stages) - 1
    for index, (stage, item) in enumerate(zip(stages, known.items, strict=True)):
        speed = item.speed
        compute = len(stage.span) * (speed.decode_layer_s + item.rows * speed.row_layer_s)
        if index == last:
            compute += speed.head_s
        rtt_s = jitter_s = serialise_s = 0.0
        if known.rtt_s:
            rtt_s, jitter_s = known.rtt_s[index], known.jitter_s[index]
            size = 0.0 if index == last else request.hidden_bytes * known.s_per_byte[index]
            serialise_s = HOP_S + size
        yield compute, item.queue_s, rtt_s, jitter_s, serialise_s


def predict(
    snapshot: Snapshot, request: RouteRequest, stages: Sequence[Stage], percentile: float = 50.0
) -> Times:
    """The times of a route at a percentile. Raises UsageError for a peer that announces nothing."""
    return times(look_up(snapshot, request, stages), request, stages, lateness(percentile))[0]


def times(
    known: Known, request: RouteRequest, stages: Sequence[Stage], *lates: float
) -> list[Times]:
    """`predict` from what is known already, for each lateness: sums are linear in it, so all have
    one pass over the stages."""
    token = [sum(parts) for parts in zip(*_per_token(known, request, stages), strict=True)]
    count, tokens = chunks(request)
    size = tokens * request.hidden_bytes
    last = len(stages) - 1
    head_s = known.items[-1].speed.head_s
    compute = carried = most_compute = most_carried = 0.0
    to_client = known.client_rtt_s[0] + known.client_rtt_s[-1]
    to_client_jitter = known.client_jitter_s[0] + known.client_jitter_s[-1]
    opened: list[tuple[float, float]] = []
    """When a stage is open: the median, and how much later it may be."""
    for index, (stage, item) in enumerate(zip(stages, known.items, strict=True)):
        speed = item.speed
        chunk = len(stage.span) * max(speed.decode_layer_s, tokens * speed.prefill_layer_s)
        compute += chunk
        most_compute = max(most_compute, chunk)
        dial = _opening(1.0, 0.0, stage.peer not in request.warm, 0.0)
        open_s = dial * known.client_rtt_s[index]
        later_s = dial * known.client_jitter_s[index]
        if index < last:
            carry = size * known.s_per_byte[index]
            carried += carry
            most_carried = max(most_carried, carry)
            dial = _opening(1.0, 0.0, not known.linked[index], 0.0)
            open_s += dial * known.rtt_s[index]
            later_s += dial * known.jitter_s[index]
        opened.append((open_s, 2 * later_s))
    rtt_s = to_client + sum(known.rtt_s[:last])
    jitter_s = to_client_jitter + sum(known.jitter_s[:last])
    found = []
    for late in lates:
        opening = max(open_s + later_s * late for open_s, later_s in opened)
        first = _work(compute + head_s, late) + _wait(token[1], late) + carried
        first += rtt_s / 2 + (last + 2) * HOP_S + jitter_s * late
        slowest = max(_work(most_compute, late), most_carried)
        tpot_s = _work(token[0], late) + _wait(token[1], late)
        tpot_s += token[2] / 2 + token[3] * late + token[4]
        found.append(Times(opening + first + (count - 1) * slowest, tpot_s, opening))
    return found


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
