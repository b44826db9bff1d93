"""A placement to begin from, packed greedily along the line of layers.

For a flow F that is hoped for, the leftmost layer that is not yet covered F-fold gets a unit with k
layers from there on: the one that wastes least, by the work that it adds (its speed, over the
layers that still lack it) in parts of the most work that it could do anywhere. A little noise
makes every try another one. F is found by bisection. Links are not looked at: annealing does.
"""

from __future__ import annotations

from random import Random

import numpy as np

from hexswarm.router.placement.rates import Rates

NOISE = 0.3
_HALVINGS = 5


def pack(rates: Rates, goal: float, *, rng: Random, tries: int = 2) -> tuple[list[int], list[int]]:
    """[first] and [end] of each unit; those that were not needed idle."""
    best = _filled(rates, goal, rng)[1]
    low, high = 0.0, goal
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        found = (_filled(rates, middle, rng) for _ in range(tries))
        whole = next((spans for complete, spans in found if complete), None)
        if whole is None:
            high = middle
        else:
            low, best = middle, whole
    return best


def _filled(rates: Rates, flow: float, rng: Random) -> tuple[bool, tuple[list[int], list[int]]]:
    """One packing for that flow, and whether it covers every layer so often."""
    layers, width = rates.layers, rates.speed.shape[1]
    lack = np.zeros(layers + width)
    lack[:layers] = flow
    free = rates.most > 0
    first, end = [0] * rates.units, [0] * rates.units
    useful = np.minimum(rates.speed, flow)
    potential = np.maximum((useful * np.arange(width)).max(axis=1), 1e-12)
    noise = np.random.default_rng(rng.getrandbits(64))
    at = 0
    while free.any():
        while at < layers and lack[at] <= flow * 1e-9:
            at += 1
        if at == layers:
            return True, (first, end)
        units = np.flatnonzero(free)
        ahead = np.minimum(useful[units][:, :, None], lack[at : at + width - 1]).cumsum(axis=2)
        sizes = np.arange(1, width)
        added = ahead[:, sizes, sizes - 1]
        fits = (sizes <= rates.most[units][:, None]) & (at + sizes <= layers)
        score = added / potential[units][:, None]
        score *= 1.0 + NOISE * noise.random(score.shape)
        row, column = divmod(int(np.where(fits, score, -1.0).argmax()), width - 1)
        unit, size = int(units[row]), column + 1
        free[unit] = False
        first[unit], end[unit] = at, at + size
        lack[at : at + size] = np.maximum(lack[at : at + size] - useful[unit, size], 0.0)
    return bool((lack[:layers] <= flow * 1e-9).all()), (first, end)
