"""What no placement can pass: a bound in closed form.

A flow of F tokens a second crosses every one of the L layers, and a unit that holds k layers does
at most k min(T(k), F) of that work a second. So F is at most the largest F with

    sum over units of max over k of k min(T(k), F)  >=  L F.

Helix's own bound lacks the min: it credits a fast machine with more than the flow that passes it.
Links are left out, as if all were wide; where they bind, the bound is generous.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hexswarm.router.placement.cluster import Cluster, Model
from hexswarm.router.placement.plan import Unit

_STEPS = 100
"""Of bisection: more than doubles have bits."""


def upper_bound(cluster: Cluster, model: Model, units: Sequence[Unit]) -> float:
    """Tokens a second; 0 where the units cannot hold the model once."""
    del cluster  # links would make it tighter
    return bound_of([unit.profile.throughput for unit in units], model.layers)


def bound_of(speeds: Sequence[Sequence[float]], layers: int) -> float:
    """The same from T(k) alone, at index k for each unit."""
    width = max((len(row) for row in speeds), default=0)
    speed = np.zeros((len(speeds), min(width, layers + 1)))
    for into, row in zip(speed, speeds, strict=True):
        into[: len(row)] = row[: len(into)]
    held = np.arange(speed.shape[1])

    def enough(flow: float) -> bool:
        return float((held * np.minimum(speed, flow)).max(axis=1).sum()) >= layers * flow * (
            1 - 1e-12
        )

    if not speed.size:
        return 0.0
    # Work over flow falls as the flow grows, so there is one crossing; above `high` there is none.
    low, high = 0.0, float((held * speed).max(axis=1).sum()) / layers
    if not enough(high * 1e-9):
        return 0.0
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if enough(middle) else (low, middle)
    return low
