"""Helix's MILP of a placement, with partial entry, for HiGHS: exact for a handful of units.

Variables: one binary for each unit and each span that it may hold (or none), one flow for each
pair of spans of two units that may hand on, and from and to the coordinator. A flow is at most
what its units pass, and nothing where a span is not chosen. With so few spans this needs no big-M
over positions, as Helix's has, and is plainly the definition.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import lil_array

from hexswarm.router.placement.rates import Rates


@dataclass(frozen=True, slots=True)
class Choice:
    """A unit with a span that it may hold."""

    unit: int
    first: int
    end: int
    passes: float


def best_flow(rates: Rates) -> float:
    """Tokens a second of the best placement."""
    layers, hub = rates.layers, rates.units
    choices = [
        Choice(unit, first, first + size, rates.passes(unit, first, first + size))
        for unit in range(rates.units)
        for size in range(1, int(rates.most[unit]) + 1)
        for first in range(layers - size + 1)
    ]
    begins = [at for at, choice in enumerate(choices) if choice.first == 0]
    stops = [at for at, choice in enumerate(choices) if choice.end == layers]
    hops = [
        (a, b)
        for a, one in enumerate(choices)
        for b, other in enumerate(choices)
        if one.unit != other.unit and other.first <= one.end < other.end
    ]
    edges = [*((-1, b) for b in begins), *((a, -1) for a in stops), *hops]
    count, width = len(choices), len(choices) + len(edges)
    capacity = np.array(
        [
            rates.link[choices[a].unit if a >= 0 else hub, choices[b].unit if b >= 0 else hub]
            for a, b in edges
        ]
    )
    most = rates.speed.max()
    rows = lil_array((rates.units + 3 * count + 1, width))
    low, high = np.full(rows.shape[0], -np.inf), np.zeros(rows.shape[0])
    for at, choice in enumerate(choices):
        rows[choice.unit, at] = 1.0
        sends, receives, keeps = (rates.units + kind * count + at for kind in range(3))
        rows[sends, at] = rows[receives, at] = -choice.passes
        low[keeps] = 0.0
    high[: rates.units] = 1.0
    for column, (a, b) in enumerate(edges, count):
        if a >= 0:
            rows[rates.units + a, column] = 1.0
            rows[rates.units + 2 * count + a, column] = -1.0
        else:
            rows[rows.shape[0] - 1, column] = 1.0
        if b >= 0:
            rows[rates.units + count + b, column] = 1.0
            rows[rates.units + 2 * count + b, column] = 1.0
    high[-1] = min(rates.limit, most * rates.units)
    cost = np.zeros(width)
    cost[count : count + len(begins)] = -1.0
    whole = np.concatenate([np.ones(count), np.zeros(len(edges))])
    top = np.concatenate([np.ones(count), np.minimum(capacity, most)])
    found = milp(
        cost,
        constraints=LinearConstraint(rows.tocsr(), low, high),
        integrality=whole,
        bounds=Bounds(0, top),
        options={"mip_rel_gap": 1e-9},
    )
    assert found.success, found.message
    return float(-found.fun)
