"""Where a peer that joins goes, and when one that serves should go elsewhere: the potential rule.

Nobody assigns layers. A peer reads the announcements, chooses [first, end) by itself and says so;
whoever looks next takes it into account. The rule, for every span that it could hold:

1. it takes in a layer that nobody holds, if there is one. A ring with a hole serves nobody;
2. then the largest gain of sum_l -1/(cover_l + eps), where cover_l is the tokens a second that
   pass layer l. It is concave, so thin layers count most, and it sets a span of many layers at a
   low rate against one of few at a high rate. The 24 machines of Helix' clusters, joining in random
   orders, end at 0.59 of the bound (one site) and 0.37 (three sites). The exponent 2 sees nothing
   but the thinnest layer and ends at 0.47 on one site; so does "the most layers that nobody holds
   first", which leaves boundaries where no other span fits.

What the joiner adds is its rate *as seen through links*: no more than the peers that end inside its
span can send it, and no more than those that go on from its end can take. Blind to that, peers of
one site end where those of another begin, and one thin way carries the swarm (0.31-0.35 on three
sites). Where no neighbour fits, a share of the rate counts all the same: one that fits may still
come, but a span inside another's, which nobody can enter, looks poor.

*Two that choose alike.* A joiner announces its span as a claim and looks again after a jitter.
Claims that it had seen when it chose, and those that are older than its own, go first; it yields to
these and they do not yield to it. Who yields has made a new claim, and looks again: every round
settles at least one of those that collide.

*Going elsewhere* costs loading and a drained peer, so it takes a gain by a factor (`GAIN`), and
never leaves a layer without a copy. If some layer has no holder, nobody is served and nothing is
lost by moving: then what counts is that fewer layers are without a holder afterwards.

All of this is O(peers + K L), the latter in arrays: 0.6 ms for 24 announcements and 80 layers, 2 ms
for 1,000, 50 ms for 10,000. It gets stuck where several peers would have to move at once; `advice`
is for that. Rejected: the true max-flow as the objective of single moves (0.37-0.66 of the bound:
most single moves change it by nothing).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hexswarm.errors import UsageError
from hexswarm.records import Span

EPS_SHARE = 0.1
"""`eps`, as a share of the joiner's rate when it holds as much as it can."""
UNLINKED = 0.1
"""Share of a rate that counts where no neighbour is seen that could use it."""
GAIN = 1.2
"""A peer moves if the potential of the new span is worth so much more than that of the old."""

Floats = NDArray[np.float64]
Claim = tuple[str, Span]
"""Who is about to hold what."""


@dataclass(frozen=True, slots=True)
class Holder:
    """Another peer, as its announcement tells."""

    peer: str
    span: Span
    tokens_per_s: float
    """Through its whole span."""
    claimed_s: float | None = None
    """When it said that it is about to hold the span; None: it holds it already."""
    leaving: bool = False
    to_me_per_s: float = math.inf
    """Tokens a second on the way from it to the one that chooses."""
    from_me_per_s: float = math.inf

    def __post_init__(self) -> None:
        if not (self.tokens_per_s > 0 and self.to_me_per_s >= 0 and self.from_me_per_s >= 0):
            raise UsageError("a peer's rate is positive, and that of a way is not negative")

    @property
    def claim(self) -> Claim:
        return self.peer, self.span


@dataclass(frozen=True, slots=True)
class Offer:
    """What the peer that chooses could hold."""

    peer: str
    layers: int
    """Of the model."""
    rates: tuple[float, ...]
    """Tokens a second through k layers, at index k; index 0 is 0."""
    longest: tuple[int, ...] = ()
    """Most layers that fit from each first layer on; empty: as many as there are rates."""

    def __post_init__(self) -> None:
        if len(self.rates) < 2 or min(self.rates[1:]) <= 0:
            raise UsageError("who offers nothing cannot join")
        if self.longest and (len(self.longest) != self.layers or max(self.longest) < 1):
            raise UsageError("an offer tells for each layer how many fit from there, some at least")


@dataclass(frozen=True, slots=True)
class Choice:
    """A span and what it is worth."""

    span: Span
    fills: int
    """Layers in it that nobody else holds."""
    gain: float
    """Of the potential."""


def choose(offer: Offer, holders: Collection[Holder], *, filling: bool = False) -> Choice:
    """The best span; of equal ones the longest, then the lowest. Claims count as if served.

    `filling`: the one with the most layers that nobody else holds.
    """
    others = [item for item in holders if item.peer != offer.peer and not item.leaving]
    field = _Field(offer, others)
    best: Choice | None = None
    for k in range(_most(offer), 0, -1):
        found = field.best_of(k, filling)
        if found is not None and (best is None or _better(found, best, filling)):
            best = found
    if best is None:
        raise UsageError("no layer fits")
    return best


def value_of(offer: Offer, span: Span, holders: Collection[Holder]) -> Choice:
    """What it is worth that this peer holds `span`."""
    others = [item for item in holders if item.peer != offer.peer and not item.leaving]
    fills, gains = _Field(offer, others).worth(len(span))
    return Choice(span, int(fills[span.first]), float(gains[span.first]))


def claims(holders: Collection[Holder]) -> frozenset[Claim]:
    """Those among what others say, to be remembered with one's own choice."""
    return frozenset(item.claim for item in holders if item.claimed_s is not None)


def look_again(
    offer: Offer,
    claimed: Span,
    claimed_s: float,
    seen: Collection[Claim],
    holders: Collection[Holder],
) -> Span:
    """The span to load after all, once the claims of others have had time to arrive.

    `seen` are those that were known when `claimed` was chosen: they go first, also if they have
    been announced anew since, as those of slow loaders are.
    """
    ours = (claimed_s, offer.peer)
    first = [
        item
        for item in holders
        if item.claimed_s is None or item.claim in seen or (item.claimed_s, item.peer) < ours
    ]
    now, kept = choose(offer, first), value_of(offer, claimed, first)
    fills = now.fills > 0 and not kept.fills
    return now.span if fills or now.gain > GAIN * kept.gain else claimed


def reconsider(offer: Offer, current: Span, holders: Collection[Holder]) -> Span | None:
    """Where a serving peer should rather be, None: where it is.

    To be asked rarely, and at different moments by different peers.
    """
    kept = value_of(offer, current, holders)
    if holes(holders, offer.layers, current):
        best = choose(offer, holders, filling=True)
        return best.span if best.fills > kept.fills else None
    if not spared(offer.peer, current, holders):
        return None
    best = choose(offer, holders)
    return best.span if best.gain > GAIN * kept.gain else None


def spared(peer: str, span: Span, holders: Collection[Holder]) -> bool:
    """True if every layer of `span` is served by others too: `peer` may leave it."""
    counts = np.zeros(span.end + 1, np.int64)
    for item in holders:
        if item.peer != peer and item.claimed_s is None and not item.leaving:
            counts[min(item.span.first, span.end)] += 1
            counts[min(item.span.end, span.end)] -= 1
    return bool((np.cumsum(counts)[span.first : span.end] > 0).all())


def holes(holders: Collection[Holder], layers: int, own: Span | None = None) -> int:
    """How many layers nobody holds or claims; `own` is one's own span."""
    held = np.zeros(layers, bool)
    for item in holders:
        if not item.leaving:
            held[item.span.first : item.span.end] = True
    if own is not None:
        held[own.first : own.end] = True
    return int(layers - held.sum())


class _Field:
    """The swarm without the one that chooses, as sums along the layer axis."""

    def __init__(self, offer: Offer, others: Sequence[Holder]) -> None:
        self._offer, layers = offer, offer.layers
        ends = np.zeros(layers + 1)
        """Tokens a second that peers that end here can send to us."""
        takes, cover = np.zeros(layers + 1), np.zeros(layers + 1)
        for item in others:
            first, end = item.span.first, min(item.span.end, layers)
            cover[first] += item.tokens_per_s
            cover[end] -= item.tokens_per_s
            ends[end] += min(item.tokens_per_s, item.to_me_per_s)
            taken = min(item.tokens_per_s, item.from_me_per_s)
            takes[first] += taken
            takes[end] -= taken
        self._cover = np.maximum(np.cumsum(cover)[:layers], 0.0)
        # Rates that cancel leave dust, which is no copy of a layer.
        self._cover[self._cover < 1e-9 * (1.0 + float(np.abs(cover).max()))] = 0.0
        ends[0] = takes[layers] = math.inf  # clients are no bottleneck: a token id is a few bytes
        self._arrives = np.concatenate(([0.0], np.cumsum(ends[1:])))
        self._takes = np.cumsum(takes)
        self._eps = EPS_SHARE * offer.rates[_most(offer)]

    def best_of(self, k: int, filling: bool) -> Choice | None:
        """The best span of k layers, None if such do not fit anywhere."""
        fills, gains = self.worth(k)
        if self._offer.longest:
            fits = np.array(self._offer.longest[: len(fills)]) >= k
            if not fits.any():
                return None
            fills, gains = np.where(fits, fills, 0), np.where(fits, gains, 0.0)
        first_of_all = fills if filling else fills > 0
        tied = np.flatnonzero(first_of_all == first_of_all.max())
        first = int(tied[np.argmax(np.round(gains[tied] / gains.max(), 9))])
        return Choice(Span(first, first + k), int(fills[first]), float(gains[first]))

    def worth(self, k: int) -> tuple[NDArray[np.int64], Floats]:
        """For spans of k layers by their first: layers filled, and gain of the potential."""
        firsts = np.arange(self._offer.layers - k + 1)
        useful = self._useful(firsts, k)[:, None]
        windows = np.lib.stride_tricks.sliding_window_view(self._cover, k)
        gains = (self._potential(windows + useful) - self._potential(windows)).sum(axis=1)
        return (windows == 0).sum(axis=1), gains

    def _useful(self, firsts: NDArray[np.int64], k: int) -> Floats:
        """The rate of k layers as it is seen through links."""
        rate = self._offer.rates[k]
        arriving = self._arrives[firsts + k - 1] - self._arrives[np.maximum(firsts - 1, 0)]
        arriving = np.where(firsts == 0, math.inf, arriving)
        leaving = self._takes[firsts + k]
        least = UNLINKED * rate
        linked: Floats = np.minimum(np.maximum(arriving, least), np.maximum(leaving, least))
        return np.minimum(rate, linked)

    def _potential(self, cover: Floats) -> Floats:
        worth: Floats = -1.0 / (cover + self._eps)
        return worth


def _most(offer: Offer) -> int:
    most = max(offer.longest) if offer.longest else offer.layers
    return min(len(offer.rates) - 1, most, offer.layers)


def _better(a: Choice, b: Choice, filling: bool) -> bool:
    """By more than the dust of sums: equal spans must compare equal on every machine."""
    first, second = (a.fills, b.fills) if filling else (a.fills > 0, b.fills > 0)
    if first != second:
        return first > second
    return a.gain > b.gain * (1 + 1e-9)
