"""Which token a draw means: the rule, in whole numbers, and its plain form in PyTorch.

A token of logit x weighs exp((x - largest) / temperature). The tokens in order of falling logit
(equal ones by id) are a ladder, and each filter cuts it somewhere: top-k behind the k-th (and all
equal to it), top-p behind the token with which the weights reach a share of what is left, min-p
where they fall below a share of the largest. The draw, uniform in [0, 1), is a place on the rest.

Two machines must find the same token for the same logits: a session goes on elsewhere when its tail
dies, and a peer may choose on its GPU today and on its CPU tomorrow. Sums of floats depend on their
order, and exp is another function on every device. So weights are whole numbers: 2^y by a
polynomial of single multiplications and additions in float32, which all round alike (no fused ones,
hence the flag in `hexswarm.kernels.sample`), shifted into 64 bits. Their sums are exact in any
order, and so is "the first token with which the sum reaches this". A weight is right to 1 part in
2^23; what is below 2^-44 of the largest weighs nothing.

`pick` looks at a shortlist of the best tokens first, and at all only if the answer could lie
beyond: a sort of 128,000 costs more than the rest, and the draw nearly always falls among the best.

Rejected: the exponential race (the largest weight over its own random number, one pass and no
order): it needs a random number for each token and position on every device, and it would draw
other tokens than peers of earlier versions do, so that answers changed where a session moves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SHORTLIST = 1024
SHIFT = 20
"""Weights are numbers of 24 bits, shifted up by so many."""
LARGEST = 1 << (23 + SHIFT)
"""Weight of the likeliest token; 2^18 of them fit 64 bits."""
POWERS = (
    *(0.6931470632553101, 0.2402293086051941, 0.055485282093286514),
    *(0.009675451554358006, 0.001246784464456141, 0.0002161292068194598),
)
"""2^f = 1 + f (first + f (second + ...)) for f in [0, 1), as float32; right to 9e-8."""
ONE = 0x3F000000
"""Taken off the bits of a float in [1, 2], leaves 2^23 times that float."""
LOG2_E = 1.4426950408889634
COLDEST = 1e-30
"""Below this temperature, as if it were this."""
NOT_FINITE = -1
"""Instead of a token, where some logit is no finite number."""


@dataclass(frozen=True, slots=True)
class Draw:
    """How one row's token is to be chosen."""

    temperature: float
    top_k: int
    """0: no limit."""
    top_p: float
    min_p: float
    place: float
    """In [0, 1)."""


GREEDY = Draw(1.0, 1, 1.0, 0.0, 0.0)
"""The largest logit, the lowest id among equals."""


def settings(draws: Sequence[Draw]) -> Tensor:
    """What `pick` wants to know: float64 `[rows, 5]`."""
    rates = torch.tensor([LOG2_E / max(draw.temperature, COLDEST) for draw in draws])  # float32
    rest = [(d.top_k, d.top_p, d.min_p, d.place) for d in draws]
    return torch.cat((rates.double()[:, None], torch.tensor(rest, dtype=torch.float64)), 1)


def weigh(logits: Tensor, peak: Tensor, rate: Tensor) -> Tensor:
    """Weights, int64, of float32 logits whose largest is `peak`; rate = log2(e) / temperature."""
    y = (logits - peak).mul_(rate).clamp_(min=-63.0)
    whole = y.floor()
    part = y.sub_(whole)
    power = torch.full_like(part, POWERS[-1])
    for factor in (*POWERS[-2::-1], 1.0):
        power.mul_(part).add_(factor)
    numbers = power.view(torch.int32).sub_(ONE)
    return (numbers.long() << SHIFT) >> whole.neg_().long()


def pick(logits: Tensor, settings: Tensor) -> Tensor:
    """Of float32 `[rows, vocabulary]`, a token for each row, int64; by `settings` of that name."""
    found = [_pick(line, row) for line, row in zip(logits, settings, strict=True)]
    return torch.tensor(found, dtype=torch.int64, device=logits.device)


def _pick(line: Tensor, row: Tensor) -> int:
    if not bool(line.isfinite().all()):
        return NOT_FINITE
    rate, (_, top_k, top_p, min_p, place) = row[0].to(line), row.tolist()
    weights = weigh(line, line.max(), rate)
    draw = Draw(0.0, int(top_k), top_p, min_p, place)
    token = _choose(line, weights, draw, SHORTLIST)
    if token is None:
        token = _choose(line, weights, draw, len(line))
    assert token is not None, "the whole vocabulary holds the answer"
    return token


def _choose(line: Tensor, weights: Tensor, draw: Draw, count: int) -> int | None:
    """The token, if it is among the best `count` (and their equals); else None."""
    count = min(count, len(line))
    ids = torch.nonzero(line >= line.topk(count).values[-1]).squeeze(1)
    best = line[ids]
    order = best.argsort(descending=True, stable=True)
    ids, best = ids[order], best[order]
    ladder = weights[ids]
    reached = ladder.cumsum(0)
    have, complete = int(reached[-1]), len(ids) == len(line)
    mass = int(weights.sum())
    if draw.top_k:
        if draw.top_k > len(ids) and not complete:
            return None
        last = best[min(draw.top_k, len(ids)) - 1]
        mass = int(ladder[best >= last].sum())
    rest = mass
    if draw.top_p < 1:
        goal = max(int(draw.top_p * mass), 1)
        if goal > have:
            return None
        rest = int(reached[torch.searchsorted(reached, goal)])
    if draw.min_p > 0:
        least = int(draw.min_p * LARGEST)
        if complete or int(ladder[-1]) < least:
            rest = min(rest, int(ladder[ladder >= least].sum()))
    goal = min(int(draw.place * rest), rest - 1) + 1
    if rest > have and (goal > have or draw.min_p > 0):
        return None
    return int(ids[torch.searchsorted(reached, goal)])
