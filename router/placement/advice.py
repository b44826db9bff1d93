"""Advisory plans: any peer may say who should hold what, all can check it, nobody has to obey.

Peers that choose for themselves (`joining`) end where no single move makes things better, at 0.37
to 0.59 of what the swarm could pass: to go on, many would have to move, each a little. So now and
then one peer searches a whole placement and publishes it, as *moves in an order*:

- It is made from a *census*, who offers what and holds what, and seeded by the hash of it and the
  minute, so that whoever has the same census computes the same advice (`advise`).
- Others need not compute it again: one max-flow with their own view of the swarm tells what it is
  worth (`judge`). They follow if it gains `GAIN` on average over `HORIZON_S`, loading included:
  while it is carried out the swarm passes less than before, or more.
- In between, every placement covers every layer: a move that would take away the last copy of a
  layer comes after the one that brings another copy. For half of the targets on Helix' clusters
  such an order was among 30 random greedy ones; without one no advice is given. Peers that drop
  their layers before they load others (`beside` is False: one memory does not hold both) have to be
  spared meanwhile, too.
- Nobody moves for `READ_S`: who values an advice while its first movers are already away sees less
  to gain, refuses, and stops all those behind it (0.37 of the bound on one site instead of 0.74).
- Peers move in turn: as many at a time as `width` says, each when those before it have arrived, as
  announcements tell. So the rate adapts to how long loading takes. If nobody moves for
  `PATIENCE_S`, because one has left or will not follow, or for `LOADING_S` while one is loading,
  the advice is dropped; the next one starts from what is.
- Some will not move at all (`staying`): the search does not know, and their moves are struck out of
  what it found before that is valued.

How many: of peers that serve sessions `BUSY_SHARE` a minute, for each sends its clients elsewhere;
of a swarm at rest `REST_SHARE` at a time, since that disturbs nobody and only last copies matter.

Rejected: a plan as a target without an order (24 peers got stuck after 10 to 20 moves, with less
flow than before); plans of at most 3 to 10 moves (nothing gained on one site, 0.53-0.59 of the
bound on three, where the ordered whole ends at 0.72 on both);
electing a planner (whoever the lottery of the minute draws may publish, and if it is gone the next
minute draws another).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from random import Random

import numpy as np
from numpy.typing import NDArray

from hexswarm.errors import UsageError
from hexswarm.records import Span
from hexswarm.router.placement.compiled import CompiledFlow
from hexswarm.router.placement.flow import ScipyFlow, arrays, solver, spans_of
from hexswarm.router.placement.rates import Rates
from hexswarm.router.placement.search import Hunt

GAIN = 1.1
HORIZON_S = 1800.0
BUSY_SHARE = 0.04
REST_SHARE = 0.125
PATIENCE_S = 90.0
LOADING_S = 900.0
READ_S = 15.0
"""Until everybody has read an advice: nobody moves before, so that all value the same swarm."""
TRIES = 20
STEPS = 20_000
"""Of each try: all take about two seconds for 24 peers."""
HEATS = (0.003, 0.02, 0.001, 0.01)
ORDERS = 40
KEEP = 0.995
"""A move without which this much of the flow remains is not worth a load."""

Spans = tuple[Span | None, ...]


@dataclass(frozen=True, slots=True)
class Census:
    """Who offers what, and holds what, at one moment."""

    peers: tuple[str, ...]
    rates: Rates
    """One unit for each peer."""
    spans: Spans
    staying: frozenset[str] = frozenset()
    """Peers that do not move."""
    beside: bool = True
    """Who moves goes on serving until it has loaded; False: it drops its layers first."""

    def __post_init__(self) -> None:
        if not len(self.peers) == len(self.spans) == self.rates.units:
            raise UsageError("a census has a span and rates for each peer")

    def seed(self, minute: int) -> int:
        """The same for the same census and minute, wherever it is taken."""
        told = hashlib.sha256(repr((minute, self.peers, self.spans)).encode())
        for table in (self.rates.speed, self.rates.link):
            told.update(np.round(table, 3).tobytes())
        return int.from_bytes(told.digest()[:8])


@dataclass(frozen=True, slots=True)
class Move:
    peer: str
    to: Span | None


@dataclass(frozen=True, slots=True)
class Advice:
    """Moves, in the order in which they are safe."""

    seed: int
    """Of the census and the minute that it was made from."""
    moves: tuple[Move, ...]
    tokens_per_s: float
    """What the swarm passes after the last one."""
    made_s: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """What an advice is worth in somebody's own view."""

    before: float
    after: float
    gain: float
    """Mean flow over the horizon, over the flow of now."""


def drawn(peers: Sequence[str], minute: int) -> str:
    """Who may publish in this minute: everybody draws the same."""
    return min(peers, key=lambda peer: lot(peer, minute))


def lot(peer: str, minute: int) -> bytes:
    """What a peer draws; the least may publish."""
    return hashlib.sha256(f"{minute} {peer}".encode()).digest()


def width(peers: int, *, busy: bool) -> int:
    """How many may move at a time, or in a minute if they have sessions."""
    return max(1, int(peers * (BUSY_SHARE if busy else REST_SHARE)))


def advise(
    census: Census,
    load_s: float,
    now: float,
    *,
    busy: bool = False,
    tries: int = TRIES,
    most: int | None = None,
) -> Advice | None:
    """The best of `tries` searches from here that has a safe order and is worth it, if any.

    `most` moves at most: the first ones of the order have to be worth it by themselves.
    """
    solve, seed = solver(census.rates), census.seed(int(now // 60))
    rng, best, best_gain = Random(seed), None, GAIN
    for number in range(tries):
        hunt = Hunt(census.rates, rng=rng)
        here = arrays(census.spans)
        hunt.offer(here)
        for _ in hunt.round(STEPS, heat=HEATS[number % len(HEATS)]):
            continue
        target = _without_idle_moves(solve, census, spans_of(*hunt.placed))
        moves = _ordered(census, target, rng)[:most]
        if not moves:
            continue
        verdict = judge(Advice(seed, moves, hunt.flow, now), census, load_s, busy=busy)
        if verdict.gain > best_gain:
            best, best_gain = Advice(seed, moves, verdict.after, now), verdict.gain
    return best


def judge(advice: Advice, census: Census, load_s: float, *, busy: bool = False) -> Verdict:
    """What `advice` is worth, from what `census` says; `load_s`: of one move."""
    solve, spans = solver(census.rates), list(census.spans)
    at = {peer: row for row, peer in enumerate(census.peers)}

    def flow() -> float:
        solve.load(*arrays(spans))
        return solve.value()

    before = passed = flow()
    pace = width(len(census.peers), busy=busy)
    step_s = max(load_s, 60.0 if busy else 0.0) / pace
    tokens, spent_s = 0.0, 0.0
    for move in advice.moves:
        row = at.get(move.peer)
        if row is None or spans[row] == move.to:
            continue
        if move.to is not None and len(move.to) > int(census.rates.most[row]):
            return Verdict(before, 0.0, 0.0)
        if not census.beside:
            spans[row] = None
            passed = flow()
        tokens, spent_s = tokens + passed * step_s, spent_s + step_s
        spans[row] = move.to
        passed = flow()
    mean = (tokens + passed * max(HORIZON_S - spent_s, 0.0)) / max(HORIZON_S, spent_s)
    gain = mean / before if before > 0 else (math.inf if mean > 0 else 0.0)
    return Verdict(before, passed, gain)


class Follower:
    """One peer's part: `hear` what others publish, and ask `turn` for the own move."""

    def __init__(self, peer: str, *, beside: bool = True) -> None:
        self.peer = peer
        self.advice: Advice | None = None
        self._beside = beside
        """As in `Census`."""
        self._done_s = -math.inf
        """When the last one that we are through with was made."""
        self._promised = 0.0
        """Tokens a second of what we follow, in our own view: no matter what it says itself."""
        self._left: tuple[Move, ...] = ()
        self._since_s = 0.0
        """Since when the same moves are left."""

    def hear(self, advice: Advice, census: Census, load_s: float, *, busy: bool = False) -> bool:
        """An advice was published: follow it from now on if it is worth it."""
        held = self.advice
        if advice.made_s <= (self._done_s if held is None else held.made_s):
            return False
        verdict = judge(advice, census, load_s, busy=busy)
        if verdict.gain < GAIN or (held is not None and verdict.after < GAIN * self._promised):
            return False
        self.advice, self._left, self._since_s = advice, advice.moves, advice.made_s
        self._promised = verdict.after
        return True

    def turn(
        self,
        served: Mapping[str, Span | None],
        moving: Mapping[str, Span],
        layers: int,
        now: float,
        *,
        busy: bool = False,
    ) -> Span | None:
        """Where to move now, None: nowhere. `served`: by all alive; `moving`: who is loading what.

        Who serves nothing now (None in `served`) has not arrived, and is waited for.
        """
        advice = self.advice
        if advice is None or now < advice.made_s + READ_S:
            return None
        left = tuple(
            move for move in advice.moves if move.peer in served and served[move.peer] != move.to
        )
        if left != self._left:
            self._left, self._since_s = left, now
        loading = any(move.peer in moving for move in left)
        if not left or now - self._since_s > (LOADING_S if loading else PATIENCE_S):
            self.advice, self._done_s = None, advice.made_s
            return None
        many = width(len(served), busy=busy)
        if busy:  # so many a minute since it was read
            done = len(advice.moves) - len(left)
            if now < advice.made_s + READ_S + 60.0 * (done // many):
                return None
        mine = next((move for move in left[:many] if move.peer == self.peer), None)
        if mine is None or mine.to is None or self.peer in moving:
            return None
        during = {**served, **moving, self.peer: mine.to}
        if not self._beside:
            during = {**served, self.peer: None}
        return mine.to if _counts(during.values(), layers).min() > 0 else None


def _without_idle_moves(solve: CompiledFlow | ScipyFlow, census: Census, target: Spans) -> Spans:
    """`target` without the moves of those who stay, and those that add next to nothing."""
    kept = [
        old if new is None or peer in census.staying else new
        for peer, old, new in zip(census.peers, census.spans, target, strict=True)
    ]
    solve.load(*arrays(kept))
    flow = solve.value()
    for row, old in enumerate(census.spans):
        new = kept[row]
        if old == new:
            continue
        kept[row] = old
        solve.load(*arrays(kept))
        if solve.value() < KEEP * flow:
            kept[row] = new
    return tuple(kept)


def _ordered(census: Census, target: Spans, rng: Random) -> tuple[Move, ...]:
    """The moves to `target`, in an order in which each leaves every layer a copy; () if none found.

    Greedy: next the move that leaves thin layers the most copies, with some chance.
    """
    here, layers = census.spans, census.rates.layers
    moving = [row for row, old in enumerate(here) if old != target[row]]
    before = _counts(here, layers)
    least = 1 if before.min() > 0 else 0
    gone = np.array([_counts([here[row]], layers) for row in moving])
    change = np.array([_counts([target[row]], layers) for row in moving]) - gone
    for attempt in range(ORDERS if moving else 0):
        counts, left, order = before, list(range(len(moving))), list[int]()
        while left:
            after = counts + change[left]
            worth = -(1.0 / (after + 0.1) ** 2).sum(axis=1)
            if attempt:
                worth += [rng.random() for _ in left]
            during = after if census.beside else counts - gone[left]
            worth[np.minimum(after, during).min(axis=1) < least] = -math.inf
            best = int(worth.argmax())
            if worth[best] == -math.inf:
                break
            counts = after[best]
            order.append(left.pop(best))
        if not left:
            return tuple(Move(census.peers[moving[at]], target[moving[at]]) for at in order)
    return ()


def _counts(spans: Iterable[Span | None], layers: int) -> NDArray[np.int64]:
    """How many of the spans hold each layer."""
    counts = np.zeros(layers + 1, np.int64)
    for span in spans:
        if span is not None:
            counts[span.first] += 1
            counts[span.end] -= 1
    return np.cumsum(counts)[:layers]
