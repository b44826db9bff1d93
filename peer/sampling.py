"""How the tail chooses a token: Hugging Face's filters in its order, and one reproducible draw.

Order: repetition penalty, temperature, top-k, top-p, min-p. The draw is a uniform number computed
from (seed, position) alone by a hash, used on the inverse distribution function over tokens in
order of falling probability (equal ones by id). So a choice depends on logits, sampling record,
history and position, never on batch mates, on the device's generator, or on which peer computed
the step: after a failure the new tail draws what the old one would have drawn.

A full sort of a large vocabulary costs more than everything else here, and the draw nearly always
falls among the likeliest tokens. So the filters first look at a shortlist of the best tokens
and at the whole vocabulary only if the answer could lie beyond it; both give the same token.
"""

from __future__ import annotations

from collections.abc import Collection
from hashlib import blake2b

import torch
from torch import Tensor

from hexswarm.errors import UsageError
from hexswarm.records import Sampling

SHORTLIST = 1024


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) of 53 random bits, the same on every machine."""
    message = seed.to_bytes(8, "little") + position.to_bytes(8, "little")
    digest = blake2b(message, digest_size=8, person=b"hexswarm draw").digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def choose(logits: Tensor, sampling: Sampling, history: Collection[int], position: int) -> int:
    """Choose the token for `position` from one row of float logits `[vocabulary]`."""
    if sampling.repetition_penalty != 1:
        logits = penalise(logits, history, sampling.repetition_penalty)
    if sampling.greedy:
        return int(logits.argmax())
    weights = _weights(logits, sampling.temperature)
    draw = uniform(sampling.seed, position)
    token = None if sampling.top_k else _draw(weights, sampling, draw, SHORTLIST)
    if token is None:
        token = _draw(weights, sampling, draw, sampling.top_k or len(weights))
    assert token is not None, "a complete ranking always holds the answer"
    return token


def choose_greedy(logits: Tensor) -> list[int]:
    """The likeliest token of each row, the lowest id among equals."""
    return list(map(int, logits.argmax(-1).tolist()))


def distribution(
    logits: Tensor, sampling: Sampling, history: Collection[int] = ()
) -> tuple[Tensor, Tensor]:
    """The tokens that pass the filters, likeliest first, and their probabilities (float64)."""
    if sampling.repetition_penalty != 1:
        logits = penalise(logits, history, sampling.repetition_penalty)
    weights = _weights(logits, sampling.temperature)
    ids, ranked = _rank(weights, sampling.top_k or len(weights))
    kept = _kept(ranked, ranked.cumsum(0), _total(weights, ranked, sampling), sampling)
    return ids[:kept], ranked[:kept] / ranked[:kept].sum()


def penalise(logits: Tensor, history: Collection[int], penalty: float) -> Tensor:
    """Divide positive and multiply negative logits of the tokens seen so far; a new tensor."""
    if not history:
        return logits
    if min(history) < 0 or max(history) >= logits.shape[-1]:
        raise UsageError("a token of the history is outside the vocabulary")
    seen = torch.tensor(sorted(set(history)), device=logits.device)
    scores = logits[seen]
    return logits.index_copy(0, seen, torch.where(scores < 0, scores * penalty, scores / penalty))


def _weights(logits: Tensor, temperature: float) -> Tensor:
    """Unnormalised probabilities in float64, the largest 1."""
    scores = logits.cpu().double()
    return scores.sub_(scores.max()).div_(temperature).exp_()


def _rank(weights: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` likeliest tokens in order, ties by id; more if others tie with the last."""
    least = weights.topk(count).values[-1] if count < len(weights) else weights.min()
    ids = torch.nonzero(weights >= least).squeeze(1)
    candidates = weights[ids]
    order = candidates.argsort(descending=True, stable=True)
    return ids[order], candidates[order]


def _total(weights: Tensor, ranked: Tensor, sampling: Sampling) -> Tensor:
    """Weight of all tokens that pass top-k."""
    return ranked.sum() if sampling.top_k else weights.sum()


def _kept(ranked: Tensor, reached: Tensor, total: Tensor, sampling: Sampling) -> int:
    """How many of the ranked tokens pass top-p and min-p; at least one does."""
    kept = len(ranked)
    if sampling.top_p < 1:
        kept = min(kept, 1 + int(torch.searchsorted(reached, sampling.top_p * total)))
    if sampling.min_p > 0:
        kept = min(kept, int((ranked >= sampling.min_p * ranked[0]).sum()))
    return max(1, kept)


def _draw(weights: Tensor, sampling: Sampling, draw: float, count: int) -> int | None:
    """Invert the distribution at `draw`; None if the answer may lie beyond the ranked tokens."""
    ids, ranked = _rank(weights, count)
    reached, total = ranked.cumsum(0), _total(weights, ranked, sampling)
    complete = bool(sampling.top_k) or len(ranked) == len(weights)
    kept = _kept(ranked, reached, total, sampling)
    cut = sampling.top_p < 1 or sampling.min_p > 0
    if cut and kept == len(ranked) and not complete:
        return None
    mass = reached[kept - 1] if cut else total
    place = int(torch.searchsorted(reached[:kept], draw * mass, right=True))
    if place == kept and not complete and not cut:
        return None
    return int(ids[min(place, kept - 1)])
