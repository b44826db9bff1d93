"""Finds a placement: anytime, seeded, whatever the objective.

Rounds of annealing, each from a fresh greedy packing or from the best placement so far, at three
temperatures in turn, until the caller's time is up; the best placement is always at hand. Restarts
find more than one long walk: on Helix's geo24 a round of half a second ends at 1516 tokens/s half
of the time and above 1640 a quarter of the time, and walks three times as long do no better.

More than `MOST` units are first cut into parts by their links (`regions`).

An objective of one's own (say, the expected latency of placements whose flow suffices) is walked in
Python, some thousand steps a second, from the best placement by flow; it sees the flow as a number,
which costs microseconds, and should ask it first.

The rule for a deadline is the caller's: `expired` is asked some twenty times a second. Without it
running out, equal seeds give equal placements; how many rounds fit is up to the machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from random import Random

from hexswarm.records import Span
from hexswarm.router.placement.anneal import Objective, Phi, Walk, walk
from hexswarm.router.placement.bound import bound_of
from hexswarm.router.placement.cluster import Cluster, Model
from hexswarm.router.placement.compiled import CompiledFlow
from hexswarm.router.placement.flow import ScipyFlow, arrays, solver, spans_of
from hexswarm.router.placement.pack import pack
from hexswarm.router.placement.plan import Unit
from hexswarm.router.placement.rates import Rates, rates
from hexswarm.router.placement.regions import MOST, cut

ROUND = 500_000
"""Steps of a round of the compiled walk with 24 units: a second."""
PYTHON_ROUND = 10_000
COLD = 0.00005
"""Of the bound: a flow of 2000 tokens/s is then held to a tenth of a token."""
HEATS = (0.01, 0.005, 0.02)
"""Of the bound: where the rounds begin, with 24 units or more. With fewer, each of them carries
more of the flow, and the steps of the landscape are higher."""
REHEAT = 0.003
"""Where a round begins that goes on from the best: it shakes, and keeps most."""

Placed = tuple[list[int], list[int]]
"""[first] and [end] of the units; both 0: it idles."""


@dataclass(frozen=True, slots=True)
class Found:
    """The best placement so far."""

    spans: tuple[Span | None, ...]
    flow: float
    """Tokens a second."""
    worth: float
    """By the objective."""
    bound: float
    """Tokens a second that no placement passes."""
    rounds: int


class Hunt:
    """The search in one set of units: what is best, and rounds to make it better."""

    def __init__(
        self,
        rates: Rates,
        *,
        rng: Random,
        objective: Objective | None = None,
        compiled: bool | None = None,
    ) -> None:
        self.rates, self._rng = rates, rng
        self.bound = bound_of(
            [row[: most + 1] for row, most in zip(rates.speed, rates.most, strict=True)],
            rates.layers,
        )
        self._phi = Phi(rates, self.bound)
        self._objective = objective or self._phi
        self._solver: CompiledFlow | ScipyFlow = solver(rates, compiled=compiled)
        self.rounds = 0
        self.worth, self.flow = float("-inf"), 0.0
        self.placed: Placed = ([0] * rates.units, [0] * rates.units)
        self.offer(self.placed)

    @property
    def done(self) -> bool:
        """The flow was asked for, and there is no more."""
        return self._objective is self._phi and self.flow >= self.bound * (1 - 1e-9)

    def offer(self, placed: Placed) -> bool:
        """Look at one placement; whether it is the best so far."""
        self._solver.load(*placed)
        flow = self._solver.value()
        worth = self._objective(*placed, flow)
        if worth <= self.worth:
            return False
        self.placed, self.flow, self.worth = placed, flow, worth
        return True

    def round(self, steps: int | None = None, *, heat: float | None = None) -> Iterator[bool]:
        """One round, in pieces of some milliseconds; each tells whether there is a new best.

        From the best placement when `heat` is given, or in every third round.
        """
        self.rounds += 1
        go_on = heat is not None or (self.rounds % 3 == 0 and self.flow > 0)
        few = min(10.0, max(1.0, (24 / max(self.rates.units, 1)) ** 2))
        hot = heat or few * (REHEAT if go_on else HEATS[self.rounds % len(HEATS)])
        begun = self.placed if go_on else pack(self.rates, self.bound, rng=self._rng)
        yield self.offer(begun)
        yield from self._walk(begun, self._phi, hot, steps)
        if self._objective is not self._phi:
            yield from self._walk(self.placed, self._objective, hot, steps)

    def _walk(
        self, begun: Placed, objective: Objective, hot: float, steps: int | None
    ) -> Iterator[bool]:
        walked: Walk = walk(self._solver, self.rates, *begun, rng=self._rng, objective=objective)
        quick = isinstance(self._solver, CompiledFlow) and objective is self._phi
        steps = steps or (ROUND if quick else PYTHON_ROUND)
        piece = min(steps, max(50, (400_000 if quick else 5_000) // (8 + self.rates.units)))
        pieces = steps // piece
        cool = (COLD / hot) ** (1 / pieces)
        high = hot * max(self.bound, 1e-9)
        offered = float("-inf")
        for at in range(pieces):
            walked.advance(piece, high * cool**at, high * cool ** (at + 1))
            better = walked.worth > offered
            offered = walked.worth
            yield better and self.offer(walked.best)


def search(
    cluster: Cluster,
    model: Model,
    units: Sequence[Unit],
    *,
    rng: Random,
    expired: Callable[[], bool],
    objective: Objective | None = None,
    start: Sequence[Span | None] | None = None,
    told: Callable[[Found], None] | None = None,
) -> Found:
    """The best placement that was found until `expired`; `told` hears of each better one.

    `objective` of [first], [end] and the flow; more is better, in units like tokens a second (the
    temperatures are parts of the bound), and a number even where nothing flows. None: the flow,
    with a little for even cover (`anneal`).
    """
    hunt = Hunt(rates(cluster, model, units), rng=rng, objective=objective)

    def found() -> Found:
        return Found(spans_of(*hunt.placed), hunt.flow, hunt.worth, hunt.bound, hunt.rounds)

    if start is not None:
        hunt.offer(arrays(start))
    regions = {node.id: node.region for node in cluster.nodes}
    labels = [regions[unit.node] for unit in units]
    tries = _in_parts(hunt, labels, rng) if len(units) > MOST else _rounds(hunt, start is not None)
    for better in tries:
        if better and told:
            told(found())
        if expired() or hunt.done:
            break
    return found()


def _rounds(hunt: Hunt, started: bool) -> Iterator[bool]:
    if not len(hunt.rates.most):
        return
    if started:
        yield from hunt.round(heat=REHEAT)
    while True:
        yield from hunt.round()


def _in_parts(hunt: Hunt, labels: Sequence[str], rng: Random) -> Iterator[bool]:
    """Each part for itself, all together, and again; what is best of each part is kept."""
    parts = cut(hunt.rates, labels)
    hunts = [Hunt(hunt.rates.part(part), rng=rng) for part in parts]
    for part in hunts:
        part.offer(pack(part.rates, part.bound, rng=rng))
    yield hunt.offer(_together(hunt.rates.units, parts, hunts))
    steps = ROUND // 4
    while True:
        for part in hunts:
            if part.done:
                continue
            for _ in part.round(steps):
                yield False
            yield hunt.offer(_together(hunt.rates.units, parts, hunts))
        yield from hunt.round(steps // 4, heat=REHEAT / 10)
        steps = min(2 * steps, 4 * ROUND)


def _together(units: int, parts: Sequence[Sequence[int]], hunts: Sequence[Hunt]) -> Placed:
    first, end = [0] * units, [0] * units
    for chosen, part in zip(parts, hunts, strict=True):
        for unit, a, b in zip(chosen, *part.placed, strict=True):
            first[unit], end[unit] = a, b
    return first, end
