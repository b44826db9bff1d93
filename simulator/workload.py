"""Requests: lengths from a trace, arrivals at a rate, places of clients.

*Lengths* are drawn with replacement from the pairs (input, output) of a trace, after Helix's filter
(`usable`): input at most 2048 tokens, output at most 1024, both at least 4.

*Arrivals* are Poisson, or bursts as they were seen: how many requests came in each `BIN_S` of the
trace's hour is drawn anew, independently for each bin (as Helix does), and scaled to the rate that
is wanted; a fraction of a request is one with that probability. Inside a bin moments are uniform.

*The rate* is offered tokens a second, prompt and answer together, as all figures of Helix are; the
mean request of the trace turns it into requests a second.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from statistics import fmean

from hexswarm.errors import UsageError
from hexswarm.router.placement.cluster import COORDINATOR
from hexswarm.simulator.policy import Request

BIN_S = 3.0
MOST_INPUT, MOST_OUTPUT, LEAST = 2048, 1024, 4

Length = tuple[int, int]


def read_lengths(lines: Iterable[str]) -> tuple[Length, ...]:
    """From the lines of a CSV file `input_tokens,output_tokens` with a heading."""
    try:
        rows = [tuple(map(int, line.split(",")[:2])) for line in list(lines)[1:] if line.strip()]
        return tuple((row[0], row[1]) for row in rows)
    except (ValueError, IndexError) as error:
        raise UsageError(
            f"this is not a trace of lengths: {error}",
            remedy="it is a heading and lines of input_tokens,output_tokens",
        ) from None


def read_bins(lines: Iterable[str]) -> tuple[int, ...]:
    """From the lines of a CSV file with one number of requests for each `BIN_S`, and a heading."""
    try:
        found = tuple(int(line) for line in list(lines)[1:] if line.strip())
    except ValueError as error:
        raise UsageError(
            f"this is not a list of arrivals: {error}",
            remedy=f"it is a heading and a line for each {BIN_S:g} s with a number of requests",
        ) from None
    if min(found, default=0) < 0 or not any(found):
        raise UsageError("the list of arrivals has no requests, or fewer than none")
    return found


def usable(lengths: Iterable[Length]) -> tuple[Length, ...]:
    """Those that pass Helix's filter."""
    found = tuple(
        (asked, told)
        for asked, told in lengths
        if LEAST <= asked <= MOST_INPUT and LEAST <= told <= MOST_OUTPUT
    )
    if not found:
        raise UsageError("no request of the trace has a usable length")
    return found


def poisson(
    lengths: Sequence[Length],
    tokens_per_s: float,
    until_s: float,
    rng: random.Random,
    clients: Sequence[str] = (COORDINATOR,),
) -> tuple[Request, ...]:
    """Arrivals without memory."""
    rate = _requests_per_s(lengths, tokens_per_s)
    times, now = [], rng.expovariate(rate)
    while now < until_s:
        times.append(now)
        now += rng.expovariate(rate)
    return _requests(lengths, times, rng, clients)


def binned(
    lengths: Sequence[Length],
    bins: Sequence[int],
    tokens_per_s: float,
    until_s: float,
    rng: random.Random,
    clients: Sequence[str] = (COORDINATOR,),
) -> tuple[Request, ...]:
    """Arrivals as bursty as the trace's."""
    if not bins or not fmean(bins):
        raise UsageError("the list of arrivals is empty")
    scale = _requests_per_s(lengths, tokens_per_s) * BIN_S / fmean(bins)
    times: list[float] = []
    for number in range(int(until_s / BIN_S) + 1):
        wanted = scale * rng.choice(bins)
        count = int(wanted) + (rng.random() < wanted % 1)
        times += [BIN_S * (number + rng.random()) for _ in range(count)]
    return _requests(lengths, sorted(t for t in times if t < until_s), rng, clients)


def at_once(
    lengths: Sequence[Length],
    count: int,
    rng: random.Random,
    clients: Sequence[str] = (COORDINATOR,),
) -> tuple[Request, ...]:
    """All at the beginning: the coordinator feeds them as KV allows (Helix's offline serving)."""
    return _requests(lengths, [0.0] * count, rng, clients)


def offered_tokens_per_s(requests: Sequence[Request], since_s: float, until_s: float) -> float:
    """What really came in that time."""
    tokens = sum(item.tokens for item in requests if since_s <= item.arrives_s < until_s)
    return tokens / (until_s - since_s)


def _requests_per_s(lengths: Sequence[Length], tokens_per_s: float) -> float:
    if tokens_per_s <= 0:
        raise UsageError("the rate is a positive number of tokens a second")
    return tokens_per_s / fmean(asked + told for asked, told in lengths)


def _requests(
    lengths: Sequence[Length], times: Sequence[float], rng: random.Random, clients: Sequence[str]
) -> tuple[Request, ...]:
    return tuple(
        Request(number, when, *rng.choice(lengths), rng.choice(clients))
        for number, when in enumerate(times)
    )
