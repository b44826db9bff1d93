"""Which layers a peer without `--span` holds: what it reads, waits for, and decides; pure.

The rule itself is `hexswarm.router.placement.joining`; here announcements become its records, and a
peer's life its questions:

    choose ─ claim ─ look again after a jitter ─ load ─ serve ─ wish ─ drain ─ claim ─ load

A peer that serves looks every `LOOK_S`. It acts on a hole, layers that nobody holds or claims, when
the same look has found one for `HOLE_S` (`--hole-s`): a peer that restarts is back by then, and
nobody is served meanwhile. With the ring whole it thinks about moving once in `SETTLED_S`, for a
move costs a load and the sessions that have to go elsewhere. Both at times of its own, and both
asked again after the jitter, so that of many who saw the same gap one acts and the others see that.

Rates: what an announced `Speed` says of a batch of `ROWS` rows, three prompt tokens to each new one
(the conversations of the Azure trace). They need to be right only against each other. A peer that
has not measured itself yet takes itself for a usual one.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from hexswarm.records import Announcement, PeerId, Span, Speed
from hexswarm.router.placement import joining
from hexswarm.router.placement.joining import Claim, Holder, Offer

AGAIN_S = (2.5, 4.5)
"""Until a joiner looks again: claims take a second to be stored, and clocks differ by some."""
LOOKS = 5
"""A joiner that still collides after so many looks loads what it claims: it may move later."""
LOOK_S = (8.0, 12.0)
HOLE_S = 15.0
SETTLED_S = (300.0, 600.0)
ROWS = 8
PROMPT_SHARE = 0.75
USUAL = Speed(1e-3, 1e-4, 0.0)
"""Where there is nobody to compare with, any figure will do."""


class Placement:
    """Asked in this order: `choose`, `again`, and `wish` as long as the peer serves."""

    def __init__(
        self,
        peer: PeerId,
        model: str,
        longest: tuple[int, ...],
        hidden_bytes: int,
        rng: random.Random,
        hole_s: float = HOLE_S,
    ) -> None:
        self._peer = peer
        self._model = model
        """Digest."""
        self._longest = longest
        """Most layers that fit from each one on."""
        self._hidden_bytes = hidden_bytes
        """Of one token's activations."""
        self._rng = rng
        self._hole_s = hole_s
        self._seen: frozenset[Claim] = frozenset()
        self._hole_since_s = math.inf
        self._settled_until_s = 0.0
        self.speed: Speed | None = None
        """Our own, once it was measured."""
        self.up_bytes_per_s: float | None = None
        self.down_bytes_per_s: float | None = None

    def choose(self, view: Sequence[Announcement]) -> Span:
        """The span to claim."""
        holders = self._holders(view)
        self._seen = joining.claims(holders)
        return joining.choose(self._offer(view), holders).span

    def again(self, view: Sequence[Announcement], claimed: Span) -> Span:
        """The span to load, now that others who chose at the same time have said so.

        If it is another one, that is a new claim: to be announced, and looked at again.
        """
        said_s = next((item.issued_s for item in view if item.peer == self._peer), math.inf)
        holders = self._holders(view)
        span = joining.look_again(self._offer(view), claimed, said_s, self._seen, holders)
        if span != claimed:
            self._seen = joining.claims(holders)
        return span

    def wish(self, view: Sequence[Announcement], span: Span, now: float) -> Span | None:
        """Where to go from `span`, None: nowhere, for now. To be asked again before it is done."""
        holders = self._holders(view)
        if not joining.holes(holders, len(self._longest), span):
            self._hole_since_s = math.inf
            if now < self._settled_until_s:
                return None
        else:
            self._hole_since_s = min(self._hole_since_s, now)
            if now - self._hole_since_s < self._hole_s:
                return None
        self._seen = joining.claims(holders)
        return joining.reconsider(self._offer(view), span, holders)

    def settle(self, now: float) -> None:
        """We stay, or have just arrived: as long as the ring is whole, do not ask again soon."""
        self._settled_until_s = now + self._rng.uniform(*SETTLED_S)

    def jitter_s(self) -> float:
        return self._rng.uniform(*AGAIN_S)

    def look_s(self) -> float:
        return self._rng.uniform(*LOOK_S) * min(1.0, self._hole_s / HOLE_S)

    def claimed_speed(self, view: Sequence[Announcement]) -> Speed:
        """What to announce before anything was measured: the speed of a usual peer."""
        known = [item.speed for item in view if item.model == self._model and item.serving]
        known.sort(key=token_layer_s)
        return self.speed or (known[len(known) // 2] if known else USUAL)

    def _offer(self, view: Sequence[Announcement]) -> Offer:
        layer_s = token_layer_s(self.claimed_speed(view))
        rates = (0.0, *(1.0 / (k * layer_s) for k in range(1, max(self._longest) + 1)))
        return Offer(self._peer, len(self._longest), rates, self._longest)

    def _holders(self, view: Sequence[Announcement]) -> list[Holder]:
        return [
            self._holder(item)
            for item in view
            if item.model == self._model
            and item.peer != self._peer
            and item.stands
            and item.layers == len(self._longest)
        ]

    def _holder(self, item: Announcement) -> Holder:
        return Holder(
            item.peer,
            item.span,
            1.0 / (len(item.span) * token_layer_s(item.speed)),
            claimed_s=item.issued_s if item.state == "joining" else None,
            leaving=item.state == "draining",
            to_me_per_s=self._tokens_per_s(item.up_bytes_per_s, self.down_bytes_per_s),
            from_me_per_s=self._tokens_per_s(self.up_bytes_per_s, item.down_bytes_per_s),
        )

    def _tokens_per_s(self, *bytes_per_s: float | None) -> float:
        known = [figure for figure in bytes_per_s if figure is not None]
        return min(known, default=math.inf) / self._hidden_bytes


def token_layer_s(speed: Speed) -> float:
    """Seconds of one layer for a token of a usual mix, in a batch of `ROWS`."""
    row_s = (speed.decode_layer_s + (ROWS - 1) * speed.row_layer_s) / ROWS
    mixed_s = PROMPT_SHARE * speed.prefill_layer_s + (1 - PROMPT_SHARE) * row_s
    return max(mixed_s, 1e-9)
