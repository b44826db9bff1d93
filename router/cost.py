"""What a route costs, in seconds: predictions that anybody can recompute from a snapshot.

*Time per token* is the length of the ring, because one token needs the whole loop before the next
can start (no pipelining hides it at batch 1):

    tpot = sum over stages (layers x decode_layer_s + queue_s) + head_s of the tail
         + sum over hops (one way + HOP_S + activation bytes / bandwidth)
         + closing hop tail -> head (one way + HOP_S: it carries one token id)

*Time to first token* sends the prompt through the same stages in m chunks, so that a stage computes
chunk i while its predecessor computes i + 1. The first chunk pays every stage and hop; each of the
others adds the slowest of them:

    ttft = client -> head + first chunk through all stages and hops + (m - 1) x slowest element
         + head_s + tail -> client

Known to be left out: jitter, the batch that a busy peer computes beside ours (its announced queue
stands for it), KV length, and the opening of cold connections. Petals' rule (a constant of 18 ms
for each hop, half a round trip for unknown links, no queue, no bytes, no closing link) was
rejected: it prices a path that the tokens do not take.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from hexswarm.records import Announcement, Link, RouteRequest, Stage
from hexswarm.router.network import UNKNOWN_RTT_S, Snapshot

HOP_S = 0.0002
"""Seconds of framing, encryption and wake-ups for one small message one way: half of the 0.40 ms
that an echo of 16 KB takes on loopback through our streams."""

CHUNK_BYTES = 128 * 1024
"""Bytes of activations in one chunk of a prompt: the middle of the 64-256 KiB that keep a stage's
matrix products efficient while the pipeline fills."""


def queue_s(item: Announcement) -> float:
    """Seconds that a step waits at this peer before it is computed."""
    return item.queue_s


def decode_s(item: Announcement, layers: int, *, tail: bool) -> float:
    """Seconds in which a stage of `layers` layers handles one token."""
    head_s = item.speed.head_s if tail else 0.0
    return layers * item.speed.decode_layer_s + queue_s(item) + head_s


def hop_s(link: Link, size: float) -> float:
    """Seconds until a message of `size` bytes has arrived."""
    return link.one_way_s + HOP_S + size / link.bytes_per_s


def chunks(request: RouteRequest) -> tuple[int, float]:
    """In how many chunks the prompt travels, and the mean number of tokens in one."""
    most = max(1, CHUNK_BYTES // request.hidden_bytes)
    count = math.ceil(request.prompt_tokens / most)
    return count, request.prompt_tokens / count


def time_per_token(snapshot: Snapshot, request: RouteRequest, stages: Sequence[Stage]) -> float:
    """Predicted seconds per token of the ring (`Route.tpot_s`)."""
    total = 0.0
    for stage, following in zip(stages, (*stages[1:], None), strict=True):
        item = snapshot.announcement(request.model, stage.peer)
        total += decode_s(item, len(stage.span), tail=following is None)
        if following is not None:
            total += hop_s(snapshot.link(stage.peer, following.peer), request.hidden_bytes)
    if len(stages) > 1:
        total += hop_s(snapshot.link(stages[-1].peer, stages[0].peer), 0)
    return total


def time_to_first_token(
    snapshot: Snapshot, request: RouteRequest, stages: Sequence[Stage]
) -> float:
    """Predicted seconds from sending the prompt to the first token (`Route.ttft_s`)."""
    count, tokens = chunks(request)
    first = slowest = 0.0
    for index, stage in enumerate(stages):
        item = snapshot.announcement(request.model, stage.peer)
        compute = tokens * len(stage.span) * item.speed.prefill_layer_s
        first += queue_s(item) + compute
        slowest = max(slowest, compute)
        if index:
            link = snapshot.link(stages[index - 1].peer, stage.peer)
            size = tokens * request.hidden_bytes
            first += hop_s(link, size)
            slowest = max(slowest, size / link.bytes_per_s)
    tail = snapshot.announcement(request.model, stages[-1].peer)
    first += client_s(snapshot, request, stages[0]) + client_s(snapshot, request, stages[-1])
    return first + (count - 1) * slowest + tail.speed.head_s


def client_s(snapshot: Snapshot, request: RouteRequest, stage: Stage) -> float:
    """Seconds one way between client and stage; an unnamed client is equally far from all."""
    if request.client is None:
        return hop_s(Link(UNKNOWN_RTT_S), 0)
    return hop_s(snapshot.link(request.client, stage.peer), 0)
