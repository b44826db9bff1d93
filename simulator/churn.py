"""Machines that die and return.

Every unit that serves lives for an exponential time and is away for another; each has a stream of
chance of its own, so that one more unit changes nothing for the others. Deaths are sudden.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from hexswarm.errors import UsageError
from hexswarm.router.placement.plan import Plan


@dataclass(frozen=True, slots=True, order=True)
class Outage:
    """A unit is gone for a while."""

    dies_s: float
    back_s: float
    """Infinite: for good."""
    unit: int

    def __post_init__(self) -> None:
        if not 0 <= self.dies_s < self.back_s:
            raise UsageError("a machine comes back after it died")


@dataclass(frozen=True, slots=True)
class Churn:
    """A law of lives."""

    life_s: float = 3600.0
    """Mean."""
    away_s: float = 120.0
    """Mean, loading of the weights included."""
    since_s: float = 0.0
    """Nobody dies earlier."""

    def __post_init__(self) -> None:
        if min(self.life_s, self.away_s) <= 0:
            raise UsageError("lives and absences take a positive time")


def outages(plan: Plan, law: Churn, until_s: float, seed: int) -> tuple[Outage, ...]:
    """By time: who dies before `until_s`, and when it is back."""
    found = []
    for unit, span in enumerate(plan.spans):
        if span is None:
            continue
        rng = random.Random(f"{seed} {unit}")
        now = law.since_s + rng.expovariate(1 / law.life_s)
        while now < until_s:
            back_s = now + rng.expovariate(1 / law.away_s)
            found.append(Outage(now, math.nextafter(back_s, math.inf), unit))
            now = back_s + rng.expovariate(1 / law.life_s)
    return tuple(sorted(found))
