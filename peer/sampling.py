"""How the tail chooses a token: Hugging Face's filters in its order, and one reproducible draw.

Order: repetition penalty, temperature, top-k, top-p, min-p. The draw is a uniform number computed
from (seed, position) alone by a hash, used on the inverse distribution function over tokens in
order of falling probability (equal ones by id). So a choice depends on logits, sampling record,
history and position, never on batch mates, on the device's generator, or on which peer computed
the step: after a failure the new tail draws what the old one would have drawn.

What a number means is said, in whole numbers, by `hexswarm.kernels.choice`; a GPU does the same for
all rows at a time (`hexswarm.kernels.sample`), and finds the same tokens. `distribution` says it in
floats, for people and tests.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from hashlib import blake2b

import torch
from torch import Tensor

from hexswarm.errors import UsageError
from hexswarm.kernels.choice import GREEDY, Draw, pick, settings
from hexswarm.kernels.dispatch import picker
from hexswarm.records import Sampling


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
    drawn = settings([draw_of(sampling, position)])
    return int(pick(logits.cpu().float()[None], drawn))


def draw_of(sampling: Sampling, position: int) -> Draw:
    """How the token for `position` is chosen, penalties apart."""
    if sampling.greedy:
        return GREEDY
    place = uniform(sampling.seed, position)
    return Draw(sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p, place)


def choose_all(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """A token for each row of `[rows, vocabulary]`, where they lie; a GPU is not waited for.

    Where a row has a logit that is no finite number, whatever it gives is a token, but no answer.
    """
    tokens = logits.argmax(-1)
    drawn = [at for at, draw in enumerate(draws) if draw != GREEDY]
    if not drawn:
        return tokens
    if logits.device.type != "cpu":
        made = settings(draws).pin_memory().to(logits.device, non_blocking=True)
        return picker(logits.device)(logits, made).clamp_(min=0)
    tokens[drawn] = pick(logits[drawn].float(), settings([draws[at] for at in drawn]))
    return tokens.clamp_(min=0)


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
