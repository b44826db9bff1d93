"""Simulated annealing of a placement, on its true flow.

The moves are those that keep most of a placement's hand-overs whole, since a flow needs all of its
route: a unit goes to a neighbour's boundary or over the layer that is covered least, a boundary
moves with all who share it, two units swap, one slides or changes its size, all behind a boundary
shift, one idles. A flow alone is a landscape of plateaus (many placements pass nothing), so the
worth of a placement adds a little for its least cover and for its mean cover up to the bound:

    Phi = flow + 0.05 min cover + 0.1 mean min(cover, goal)

with cover(l) the summed T_i(k_i) of those who hold layer l. The flow is at most the least cover.

This is the loop in Python, for any objective; `native_anneal.h` has the same moves for Phi alone,
at a quarter million steps a second. The two do not draw the same numbers.

Rejected: a MILP (HiGHS had 231 of 287 tokens/s after 150 s for ten machines); a genetic search over
groups as in HexGen (whole pipelines are its genes, and crossing them breaks both).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from random import Random
from typing import Protocol

from hexswarm.router.placement.compiled import CompiledFlow, CompiledWalk
from hexswarm.router.placement.flow import ScipyFlow
from hexswarm.router.placement.rates import Rates

FLOOR_WEIGHT, MEAN_WEIGHT = 0.05, 0.1

Objective = Callable[[Sequence[int], Sequence[int], float], float]
"""What a placement is worth: from [first] and [end] of the units and its flow; more is better."""


class Walk(Protocol):
    """Annealing from one placement on, in as many pieces as the caller has time for."""

    def advance(self, steps: int, hot: float, cold: float) -> None:
        """So many steps, while the temperature falls from `hot` to `cold`."""

    @property
    def best(self) -> tuple[list[int], list[int]]: ...
    @property
    def worth(self) -> float: ...
    @property
    def flow(self) -> float: ...


@dataclass(frozen=True, slots=True)
class Phi:
    """The objective of the module's docstring."""

    rates: Rates
    goal: float
    """Tokens a second up to which cover counts: the bound."""

    def __call__(self, first: Sequence[int], end: Sequence[int], flow: float) -> float:
        covers = cover(self.rates, first, end)
        mean = sum(min(rate, self.goal) for rate in covers) / len(covers)
        return flow + FLOOR_WEIGHT * min(covers) + MEAN_WEIGHT * mean

    @property
    def weights(self) -> tuple[float, float, float, float]:
        return 1.0, FLOOR_WEIGHT, MEAN_WEIGHT, self.goal


def cover(rates: Rates, first: Sequence[int], end: Sequence[int]) -> list[float]:
    """Of each layer: tokens a second of all who hold it."""
    change = [0.0] * (rates.layers + 1)
    for unit, (a, b) in enumerate(zip(first, end, strict=True)):
        if a < b:
            passes = rates.passes(unit, a, b)
            change[a] += passes
            change[b] -= passes
    return list(accumulate(change[:-1]))


def walk(
    solver: CompiledFlow | ScipyFlow,
    rates: Rates,
    first: Sequence[int],
    end: Sequence[int],
    *,
    rng: Random,
    objective: Objective,
) -> Walk:
    """The quickest form for that objective."""
    if isinstance(solver, CompiledFlow) and isinstance(objective, Phi):
        random = rng.getrandbits(64)
        return CompiledWalk(solver, first, end, weights=objective.weights, random=random)
    return PythonWalk(solver, rates, first, end, rng=rng, objective=objective)


class PythonWalk:
    """Metropolis' rule over the moves below."""

    def __init__(
        self,
        solver: CompiledFlow | ScipyFlow,
        rates: Rates,
        first: Sequence[int],
        end: Sequence[int],
        *,
        rng: Random,
        objective: Objective,
    ) -> None:
        self._solver, self._rng, self._objective = solver, rng, objective
        self._board = Board(rates, list(first), list(end))
        self._held, self._held_flow = self._judge()
        self._keep()

    def advance(self, steps: int, hot: float, cold: float) -> None:
        """So many steps, while the temperature falls from `hot` to `cold`."""
        cool = (cold / hot) ** (1.0 / steps) if steps else 1.0
        board, heat = self._board, hot
        for _ in range(steps):
            before = list(board.first), list(board.end)
            move(board, self._rng)
            heat *= cool
            if (board.first, board.end) == before:
                continue
            worth, flow = self._judge()
            if worth < self._held + heat * math.log(1.0 - self._rng.random()):
                board.first, board.end = before
                continue
            self._held, self._held_flow = worth, flow
            if worth > self.worth + 1e-9:
                self._keep()

    def _judge(self) -> tuple[float, float]:
        self._solver.load(self._board.first, self._board.end)
        flow = self._solver.value()
        return self._objective(self._board.first, self._board.end, flow), flow

    def _keep(self) -> None:
        self.best = list(self._board.first), list(self._board.end)
        self.worth, self.flow = self._held, self._held_flow


@dataclass(slots=True)
class Board:
    """A placement that moves change in place; [first, end) of each unit, both 0: it idles."""

    rates: Rates
    first: list[int]
    end: list[int]

    def put(self, unit: int, first: int, end: int, *, keep_end: bool = False) -> None:
        """These layers as far as they exist and fit; `keep_end`: cut in front."""
        first, end = max(first, 0), min(end, self.rates.layers)
        most = int(self.rates.most[unit])
        if end - first > most:
            first, end = (end - most, end) if keep_end else (first, first + most)
        self.first[unit], self.end[unit] = (first, end) if first < end else (0, 0)

    def size(self, unit: int, rng: Random) -> int:
        """As many layers as now, as many as fit, or any number."""
        now, most = self.end[unit] - self.first[unit], int(self.rates.most[unit])
        any_ = rng.randint(1, max(most, 1))
        return rng.choice((now or any_, most, any_, any_))


def move(board: Board, rng: Random) -> None:
    """One move, drawn by how often it helped on Helix's clusters."""
    rng.choices(_MOVES, _SHARES)[0](board, rng)


def _beside(board: Board, rng: Random) -> None:
    """To a neighbour's boundary."""
    unit, other = (rng.randrange(board.rates.units) for _ in range(2))
    size, first, end = board.size(unit, rng), board.first[other], board.end[other]
    way = rng.randrange(5)
    if way == 0 and end < board.rates.layers:
        board.put(unit, end, end + size)
    elif way == 1 and first > 0:
        board.put(unit, first - size, first, keep_end=True)
    elif way == 2:
        board.put(unit, end - size, end, keep_end=True)
    elif way == 3:
        board.put(unit, first, end)
    else:
        board.put(unit, first, first + size)


def _to_floor(board: Board, rng: Random) -> None:
    """Over a layer that is covered least."""
    covers = cover(board.rates, board.first, board.end)
    least = min(covers) + 1e-9
    layer = rng.choice([at for at, rate in enumerate(covers) if rate <= least])
    unit = rng.randrange(board.rates.units)
    size = board.size(unit, rng)
    first = max(layer - rng.randrange(size), 0)
    board.put(unit, first, first + size)


def _some_boundary(board: Board, rng: Random) -> int:
    return rng.choice(rng.choice((board.first, board.end)))


def _far(rng: Random) -> int:
    return rng.choice((-1, 1)) * (2 if rng.random() < 0.25 else 1)


def _boundary(board: Board, rng: Random) -> None:
    """A boundary, with all who end or begin there."""
    at, far = _some_boundary(board, rng), _far(rng)
    if not 0 < at < board.rates.layers:
        return
    for unit, (first, end) in enumerate(zip(tuple(board.first), tuple(board.end), strict=True)):
        if end == at:
            board.put(unit, first, at + far, keep_end=True)
        elif first == at:
            board.put(unit, at + far, end)


def _suffix(board: Board, rng: Random) -> None:
    """All boundaries from one on, but the model's end."""
    at, far, layers = _some_boundary(board, rng), _far(rng), board.rates.layers
    if not 0 < at < layers:
        return
    for unit, (first, end) in enumerate(zip(tuple(board.first), tuple(board.end), strict=True)):
        if end >= at:
            last = end == layers
            begin = first + far if first >= at else first
            board.put(unit, begin, end if last else end + far, keep_end=last)


def _swap(board: Board, rng: Random) -> None:
    a, b = (rng.randrange(board.rates.units) for _ in range(2))
    held, late = (board.first[a], board.end[a]), rng.random() < 0.5
    board.put(a, board.first[b], board.end[b], keep_end=late)
    board.put(b, *held, keep_end=late)


def _slide(board: Board, rng: Random) -> None:
    """Slide, or move one side."""
    unit, far, way = rng.randrange(board.rates.units), _far(rng), rng.randrange(3)
    first, end = board.first[unit], board.end[unit]
    if first < end:
        begin, stop = first + (far if way != 1 else 0), end + (far if way != 0 else 0)
        board.put(unit, begin, stop, keep_end=way == 1)


def _idle(board: Board, rng: Random) -> None:
    unit = rng.randrange(board.rates.units)
    board.first[unit] = board.end[unit] = 0


_MOVES = (_beside, _to_floor, _boundary, _swap, _slide, _suffix, _idle)
_SHARES = (20, 8, 8, 10, 12, 4, 2)
