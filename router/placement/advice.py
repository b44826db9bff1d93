"""Advisory plans: any peer may say who should hold what, all can check it, nobody has to obey.

Peers that choose for themselves (`joining`) end where every single move makes things worse, at 0.4
to 0.6 of what the swarm could pass: to go on, many would have to move, each a little. So now and
then one peer searches a whole placement and publishes it, as *moves in an order*:

- It is made from a *census*, who offers what and holds what, and seeded by the hash of it and the
  minute, so that whoever has the same census computes the same advice (`advise`).
- Others need not compute it again: one max-flow with their own view of the swarm tells what it is
  worth (`judge`). They follow if it gains `GAIN` on average over `HORIZON_S`, loading included:
  while it is carried out the swarm passes less than before, or more.
- In between, every placement covers every layer: a move that would take away the last copy of a
  layer comes after the one that brings another copy. A tenth of random greedy orders ends well
  where the swarm has 1.2 copies, nearly all where it has 1.9; advice without an order is not given.
- Peers move in turn: as many at a time as `width` says, each when those before it have arrived, as
  announcements tell. So the rate adapts to how long loading takes. If nobody moves for
  `PATIENCE_S`, because one has left or will not follow, the advice is dropped; the next one starts
  from what is.

How many: of peers that serve sessions `BUSY_SHARE` a minute, for each sends its clients elsewhere;
of a swarm at rest `REST_SHARE` at a time, since that disturbs nobody and only last copies matter.

Rejected: a plan as a target without an order (24 peers got stuck after 10 to 20 moves, with less
flow than before); following only single moves that gain by themselves (0.37-0.66 of the bound);
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
    return min(peers, key=lambda peer: hashlib.sha256(f"{minute} {peer}".encode()).digest())


def width(peers: int, *, busy: bool) -> int:
    """How many may move at a time, or in a minute if they have sessions."""
    return max(1, int(peers * (BUSY_SHARE if busy else REST_SHARE)))


def advise(
    census: Census, load_s: float, now: float, *, busy: bool = False, tries: int = TRIES
) -> Advice | None:
    """The best of `tries` searches from here that has a safe order and is worth it, if any."""
    solve, seed = solver(census.rates), census.seed(int(now // 60))
    rng, best, best_gain = Random(seed), None, GAIN
    for number in range(tries):
        hunt = Hunt(census.rates, rng=rng)
        here = arrays(census.spans)
        hunt.offer(here)
        for _ in hunt.round(STEPS, heat=HEATS[number % len(HEATS)]):
            continue
        target = _without_idle_moves(solve, census.spans, spans_of(*hunt.placed), hunt.flow)
        moves = _ordered(census, target, rng)
        if not moves:
            continue
        advice = Advice(seed, moves, hunt.flow, now)
        gain = judge(advice, census, load_s, busy=busy).gain
        if gain > best_gain:
            best, best_gain = advice, gain
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
        tokens, spent_s = tokens + passed * step_s, spent_s + step_s
        if move.to is not None and len(move.to) > int(census.rates.most[row]):
            return Verdict(before, 0.0, 0.0)
        spans[row] = move.to
        passed = flow()
    mean = (tokens + passed * max(HORIZON_S - spent_s, 0.0)) / max(HORIZON_S, spent_s)
    gain = mean / before if before > 0 else (math.inf if mean > 0 else 0.0)
    return Verdict(before, passed, gain)


class Follower:
    """One peer's part: `hear` what others publish, and ask `turn` for the own move."""

    def __init__(self, peer: str) -> None:
        self.peer = peer
        self.advice: Advice | None = None
        self._promised = 0.0
        """Tokens a second of what we follow, in our own view: no matter what it says itself."""
        self._left: tuple[Move, ...] = ()
        self._since_s = 0.0
        """Since when the same moves are left."""

    def hear(self, advice: Advice, census: Census, load_s: float, *, busy: bool = False) -> bool:
        """An advice was published: follow it from now on if it is worth it."""
        held = self.advice
        if held is not None and advice.made_s <= held.made_s:
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

        A peer that moves goes on serving until it has loaded.
        """
        advice = self.advice
        if advice is None:
            return None
        left = tuple(
            move for move in advice.moves if move.peer in served and served[move.peer] != move.to
        )
        if left != self._left:
            self._left, self._since_s = left, now
        if not left or now - self._since_s > PATIENCE_S:
            self.advice = None
            return None
        many = width(len(served), busy=busy)
        if busy:  # so many a minute since it was made
            done = len(advice.moves) - len(left)
            if now < advice.made_s + 60.0 * (done // many):
                return None
        mine = next((move for move in left[:many] if move.peer == self.peer), None)
        if mine is None or mine.to is None or self.peer in moving:
            return None
        after = {**served, **moving, self.peer: mine.to}
        return mine.to if _counts(after.values(), layers).min() > 0 else None


def _without_idle_moves(
    solve: CompiledFlow | ScipyFlow, here: Spans, target: Spans, flow: float
) -> Spans:
    """`target` without the moves that add next to nothing."""
    kept = list(target)
    for row, (old, new) in enumerate(zip(here, target, strict=True)):
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
    change = np.array([_counts([target[r]], layers) - _counts([here[r]], layers) for r in moving])
    for attempt in range(ORDERS if moving else 0):
        counts, left, order = before, list(range(len(moving))), list[int]()
        while left:
            after = counts + change[left]
            worth = -(1.0 / (after + 0.1) ** 2).sum(axis=1)
            if attempt:
                worth += [rng.random() for _ in left]
            worth[after.min(axis=1) < least] = -math.inf
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
