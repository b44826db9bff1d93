"""What a client learnt of peers, so that a lie costs the liar.

Announced speeds are claims. After some tokens of a route the client knows one number more: how long
the ring really took. `Experience` keeps for each peer a factor on its announced compute time and
lets each observation correct the factors of the peers that took part, by a Kalman filter in
logarithms: every factor has a variance (how unsure we are of it), the excess of a route over its
prediction is a weighted sum of the factors' logarithms (weights: their shares of the predicted
compute), and the blame falls on a peer in proportion to weight times variance. One route cannot
tell its three peers apart; the second that shares one of them can. Peers seen in many good routes
have little variance and get little blame.

Blame takes an excess beyond what the links' jitter explains (`slack_s`): a slow link is not a
slow device. What a peer tells of itself (`observe_stage`) is believed where it confesses; where
it claims to be faster than announced, only rings count. Memory fades: factors move back to 1 and
variances back to ignorance with a half-life, so a peer that was busy or has mended is forgiven.

Rejected: a running mean of excess for each peer (blames the neighbours of a liar for ever, who are
seen in routes with it); normalised least mean squares (blames all peers of a ring alike, however
well some of them are known); reputation shared between
clients (a second thing to lie about).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from hexswarm.records import Announcement, PeerId

LEAST, MOST = 0.5, 20.0
"""Bounds of a factor: twice as fast as announced is a modest announcer, and beyond 20 times slower
a peer is as good as gone."""

HALF_LIFE_S = 600.0
"""In this time half of what was learnt is forgotten."""

PEERS = 4096
"""So many peers are remembered, the longest unseen go first: about 1 MB."""

DOUBT = 0.25
"""Variance of the logarithm of an unknown peer's factor: two thirds of the peers are within a
factor of 1.65 of their word."""

LEAST_DOUBT = 0.01
"""No variance falls below this: however often a peer was seen, it may change at any time."""

NOISE = 0.15
"""Standard deviation of an observed ring beside its prediction, as a share of the predicted
compute: the batch beside ours and the clock of a device vary by so much. With 0.1 the factors of
honest peers wander a third farther; with 0.2 a liar of 3 is at 2.2 after 60 rings, not 2.3 (the
worst of 60 seeds)."""

MOST_SHORT = 0.9
"""Share of the predicted compute by which a ring can at most be faster: the rest of a larger
shortfall was predicted for the links."""

OWN_WORD = 0.2
"""Standard deviation, in logarithms, of what a peer tells of itself."""

LEAP = 0.7
"""Largest step of one factor by one observation, in logarithms (a factor of 2): a stall, a
collection of garbage, a laptop's lid must not condemn a peer at once."""


@dataclass(slots=True)
class _Belief:
    """The logarithm of a factor as a normal distribution, at the time when it was last seen."""

    mean: float
    variance: float
    seen_s: float


class Experience:
    """Corrections of announced compute times, by peer; 1 is as announced."""

    def __init__(self) -> None:
        self._beliefs: dict[PeerId, _Belief] = {}
        """In order of last use."""

    def __len__(self) -> int:
        return len(self._beliefs)

    def factor(self, peer: PeerId, now: float) -> float:
        """By how much the peer's compute takes longer than it announces."""
        belief = self._beliefs.get(peer)
        return 1.0 if belief is None else _bounded(_faded(belief, now).mean)

    def apply(self, item: Announcement, now: float) -> Announcement:
        """The announcement as experience corrects it."""
        factor = self.factor(item.peer, now)
        if factor == 1.0:
            return item
        speed = item.speed
        scaled = replace(
            speed,
            decode_layer_s=_scaled(speed.decode_layer_s, factor),
            prefill_layer_s=_scaled(speed.prefill_layer_s, factor),
            head_s=_scaled(speed.head_s, factor),
            row_layer_s=_scaled(speed.row_layer_s, factor),
        )
        return replace(item, speed=scaled)

    def observe(
        self,
        shares: Mapping[PeerId, float],
        predicted_s: float,
        observed_s: float,
        now: float,
        slack_s: float = 0.0,
        factors: Mapping[PeerId, float] | None = None,
    ) -> None:
        """A ring took `observed_s` per token where `predicted_s` was predicted.

        `shares` are the seconds of each peer's compute within `predicted_s`, the rest being links.
        Both contain the corrections (`factors`) that held when they were predicted; without
        `factors` those of now. A shortfall or excess up to `slack_s` is laid to the links.
        """
        peers = {peer: share for peer, share in shares.items() if share > 0}
        if not (peers and _sound(predicted_s) and _sound(observed_s)):
            return
        beliefs = {peer: self._take(peer, now) for peer in peers}
        if factors is not None:
            # What was learnt since the prediction must not be learnt again from an older session.
            then = {peer: factors.get(peer, 1.0) for peer in peers}
            fresh = {p: share / then[p] * math.exp(beliefs[p].mean) for p, share in peers.items()}
            predicted_s += math.fsum(fresh.values()) - math.fsum(peers.values())
            peers = fresh
        compute_s = math.fsum(peers.values())
        excess = max(-MOST_SHORT, _beyond(observed_s - predicted_s, slack_s) / compute_s)
        _blame(beliefs, {p: share / compute_s for p, share in peers.items()}, excess, NOISE)
        self._forget()

    def observe_stage(
        self,
        peer: PeerId,
        predicted_s: float,
        observed_s: float,
        now: float,
        factor: float | None = None,
    ) -> None:
        """The peer's own trace says `observed_s` of compute where `predicted_s` was predicted with
        `factor` (that of now if not given): a claim, believed where it makes the peer slower."""
        if not (_sound(predicted_s) and predicted_s > 0 and _sound(observed_s)):
            return
        then = self.factor(peer, now) if factor is None else factor
        told = math.log(max(LEAST, observed_s / predicted_s * then))
        if told <= max(0.0, math.log(self.factor(peer, now))):
            return
        belief = self._take(peer, now)
        _blame({peer: belief}, {peer: 1.0}, told - belief.mean, OWN_WORD)
        self._forget()

    def _take(self, peer: PeerId, now: float) -> _Belief:
        """The belief as it has faded by now, moved to the end of the order."""
        held = self._beliefs.pop(peer, None)
        belief = _Belief(0.0, DOUBT, now) if held is None else _faded(held, now)
        self._beliefs[peer] = belief
        return belief

    def _forget(self) -> None:
        while len(self._beliefs) > PEERS:
            del self._beliefs[next(iter(self._beliefs))]


def _blame(
    beliefs: Mapping[PeerId, _Belief], weights: Mapping[PeerId, float], excess: float, noise: float
) -> None:
    """Lay an excess, as a share of the compute, at the peers' doors: the step of a Kalman filter
    with independent factors."""
    spread = math.fsum(w * w * beliefs[peer].variance for peer, w in weights.items())
    for peer, weight in weights.items():
        belief = beliefs[peer]
        gain = weight * belief.variance / (spread + noise * noise)
        change = max(-LEAP, min(LEAP, gain * excess))
        belief.mean = max(math.log(LEAST), min(math.log(MOST), belief.mean + change))
        belief.variance = max(LEAST_DOUBT, belief.variance * (1 - gain * weight))


def _faded(belief: _Belief, now: float) -> _Belief:
    """What is left of a belief: the mean on its way to 0, the variance on its way to `DOUBT`."""
    left = 0.5 ** (max(0.0, now - belief.seen_s) / HALF_LIFE_S)
    variance = DOUBT + (belief.variance - DOUBT) * left
    return _Belief(belief.mean * left, variance, max(now, belief.seen_s))


def _beyond(excess_s: float, slack_s: float) -> float:
    """The part of an excess or shortfall that the slack does not explain."""
    return math.copysign(max(0.0, abs(excess_s) - max(0.0, slack_s)), excess_s)


def _bounded(mean: float) -> float:
    return max(LEAST, min(MOST, math.exp(mean)))


def _scaled(seconds: float, factor: float) -> float:
    # A record refuses what is beyond any real device; a slandered speed stays below that.
    return min(seconds * factor, 9e3)


def _sound(seconds: float) -> bool:
    return math.isfinite(seconds) and seconds >= 0
