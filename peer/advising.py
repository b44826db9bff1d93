"""What a peer does with advice: whether it publishes, whom it believes, when it is its turn; pure.

Announcements and signed proposals become the records of `hexswarm.router.placement.advice`, which
has the theory. Here are the rules around it:

- *Publishing.* Once a minute one peer is drawn out of those that serve. It searches if nothing is
  under way, and not again for `SAME_S` where a search of the same placement found nothing.
- *Believing.* Only peers that serve the model are heard, only those among the first `DRAWN` of
  their minute (views differ a little), and only while their word is young. What an advice is worth
  is reckoned anew from what *we* know of the swarm; its own promise counts for nothing.
- *Following.* A peer drops its layers before it loads others, so every layer that it serves must be
  served by others at that moment. After a move, or instead of one, the rule of `joining` must not
  undo what was gained: `harmful` asks the same max-flow.

Speeds and lines are those of `placement`: right against each other, not in themselves. What nobody
measured is no bound. A peer that announces no `most_layers` stays where it is.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from hexswarm.advice import MAX_MOVES, Proposal, SignedAdvice, tail_of
from hexswarm.directory import SKEW_S
from hexswarm.peer.placement import token_layer_s
from hexswarm.records import Announcement, PeerId, Span
from hexswarm.router import native
from hexswarm.router.placement import advice
from hexswarm.router.placement.advice import Advice, Census, Follower, Move
from hexswarm.router.placement.rates import Rates

DRAWN = 3
YOUNG_S = 60.0
SAME_S = 1800.0
LOAD_S = 60.0
"""Until the own loading was timed."""
BUSY = 0.01
"""Share of a peer's time: if any has more to do, sessions would be disturbed."""
MOST_PEERS = 300
"""A search among more takes longer than a serving peer has: there the rule is alone."""
WORK = 480
"""Tries times peers of one search: some seconds."""
WIDE = 1e9
"""Tokens a second of what bounds nothing."""

Placed = tuple[tuple[str, ...], tuple[Span | None, ...]]


@dataclass(frozen=True, slots=True)
class Task:
    """A search to be done, which takes seconds and is done elsewhere."""

    census: Census
    load_s: float
    now: float
    busy: bool

    def run(self) -> Advice | None:
        """The advice, if there is any worth giving."""
        tries = min(advice.TRIES, max(1, WORK // len(self.census.peers)))
        return advice.advise(
            self.census, self.load_s, self.now, busy=self.busy, tries=tries, most=MAX_MOVES
        )


class Advising:
    """`task` and `proposal` to publish, `hear` and `turn` to follow. Times are Unix seconds."""

    def __init__(
        self, peer: PeerId, model: str, longest: tuple[int, ...], hidden_bytes: int
    ) -> None:
        self._peer, self._model = peer, model
        self._longest = longest
        """Most layers that fit from each one on."""
        self._hidden_bytes = hidden_bytes
        self._follower = Follower(peer, beside=False)
        self._minute = -1
        """The last one in which we searched."""
        self._fruitless: tuple[Placed, float] | None = None
        self.load_s = LOAD_S

    @property
    def most_layers(self) -> int:
        """Most layers that fit wherever they begin; a run that reaches the end tells nothing."""
        layers = len(self._longest)
        inner = [most for first, most in enumerate(self._longest) if first + most < layers]
        return min(inner, default=layers)

    @property
    def following(self) -> bool:
        return self._follower.advice is not None

    def task(self, view: Sequence[Announcement], now: float) -> Task | None:
        """What to search, if it is upon us to publish."""
        minute, census = int(now // 60), self._census(view)
        ours = self._of_model(view)
        if (
            minute <= self._minute
            or self.following
            or not 2 <= len(census.peers) <= MOST_PEERS
            or len(census.peers) < len(ours)
            or advice.drawn(census.peers, minute) != self._peer
            or not native.available()
        ):
            return None
        placed = census.peers, census.spans
        if self._fruitless is not None:
            same, since_s = self._fruitless
            if same == placed and now - since_s < SAME_S:
                return None
        self._minute, self._fruitless = minute, (placed, now)
        return Task(census, self.load_s, now, _busy(ours))

    def proposal(self, found: Advice) -> Proposal:
        """What to publish of an advice."""
        moves = {tail_of(move.peer): move.to for move in found.moves if move.to is not None}
        return Proposal(
            *(self._peer, self._model, len(self._longest), tuple(moves.items())),
            *(found.tokens_per_s, found.seed, found.made_s),
        )

    def hear(
        self, told: Collection[SignedAdvice], view: Sequence[Announcement], now: float
    ) -> bool:
        """Look at what was published, latest first; True if some of it is followed from now on."""
        if not told:
            return False
        census, ours = self._census(view), self._of_model(view)
        busy = _busy(ours)
        latest = sorted(told, key=lambda item: (item.proposal.issued_s, item.data), reverse=True)
        return any(
            self._believed(item.proposal, census, now)
            and self._follower.hear(_advice(item.proposal, ours), census, self.load_s, busy=busy)
            for item in latest
        )

    def turn(self, view: Sequence[Announcement], span: Span, now: float) -> Span | None:
        """Where to go from `span`, now that it is our turn; None: it is not."""
        ours = self._of_model(view)
        served: dict[str, Span | None] = {
            item.peer: item.span if item.serving else None for item in ours
        }
        moving: dict[str, Span] = {item.peer: item.span for item in ours if not item.serving}
        layers = len(self._longest)
        to = self._follower.turn(
            {**served, self._peer: span}, moving, layers, now, busy=_busy(ours)
        )
        return to if to is not None and self._fits(to) else None

    def harmful(self, view: Sequence[Announcement], to: Span) -> bool:
        """True if the swarm would pass less with us at `to`."""
        census = self._census(view)
        verdict = advice.judge(Advice(0, (Move(self._peer, to),), 0.0, 0.0), census, 0.0)
        return verdict.after < advice.KEEP * verdict.before

    def _fits(self, span: Span) -> bool:
        return len(span) <= self._longest[span.first]

    def _believed(self, told: Proposal, census: Census, now: float) -> bool:
        minute = int(told.issued_s // 60)
        return (
            told.model == self._model
            and told.layers == len(self._longest)
            and -SKEW_S <= now - told.issued_s < YOUNG_S
            and told.author
            in heapq.nsmallest(DRAWN, census.peers, key=lambda peer: advice.lot(peer, minute))
        )

    def _of_model(self, view: Sequence[Announcement]) -> list[Announcement]:
        return [
            item
            for item in view
            if item.model == self._model and item.layers == len(self._longest) and item.stands
        ]

    def _census(self, view: Sequence[Announcement]) -> Census:
        """Those who serve, as their announcements tell."""
        serving = [item for item in self._of_model(view) if item.serving]
        return Census(
            tuple(item.peer for item in serving),
            _rates(serving, len(self._longest), self._hidden_bytes),
            tuple(item.span for item in serving),
            staying=frozenset(item.peer for item in serving if not _moves(item)),
            beside=False,
        )


def _busy(ours: Collection[Announcement]) -> bool:
    return any(item.busy > BUSY for item in ours)


def _moves(item: Announcement) -> bool:
    """Whether it can be elsewhere: a group holds its span or nothing."""
    return item.most_layers > 0 and item.group is None


def _advice(told: Proposal, ours: Collection[Announcement]) -> Advice:
    """A proposal with whole peer ids; who is unknown, has a double or stays has no move."""
    known: dict[str, list[Announcement]] = {}
    for item in ours:
        known.setdefault(tail_of(item.peer), []).append(item)
    moves = []
    for tail, to in told.moves:
        named = known.get(tail, [])
        if len(named) == 1 and _moves(named[0]):
            moves.append(Move(named[0].peer, to))
    return Advice(told.seed, tuple(moves), told.tokens_per_s, told.issued_s)


def _rates(serving: Sequence[Announcement], layers: int, hidden_bytes: int) -> Rates:
    count = len(serving)
    most = [max(item.most_layers * _moves(item), len(item.span)) for item in serving]
    speed = np.zeros((count, max(most, default=0) + 1))
    for row, item, held in zip(speed, serving, most, strict=True):
        row[1 : held + 1] = 1.0 / (np.arange(1, held + 1) * token_layer_s(item.speed))
    up = np.array([item.up_bytes_per_s or math.inf for item in serving]) / hidden_bytes
    down = np.array([item.down_bytes_per_s or math.inf for item in serving]) / hidden_bytes
    link = np.full((count + 1, count + 1), WIDE)
    link[:count, :count] = np.minimum(WIDE, np.minimum(up[:, None], down[None, :]))
    np.fill_diagonal(link, 0.0)
    return Rates(
        layers=layers,
        most=np.array(most, np.int32),
        speed=speed,
        link=link,
        nic_in=np.minimum(WIDE, down),
        nic_out=np.minimum(WIDE, up),
        limit=WIDE,
    )
