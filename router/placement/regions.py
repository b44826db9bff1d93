"""Large swarms, cut into parts that are planned for themselves.

A flow's value costs with the square of the units, and a walk needs more steps the more there are; a
part of forty units that holds the model some times over is found in seconds. Parts are whole
regions where those are small and pieces of one region where they are large, so that a part's routes
stay on short links; a region that cannot hold the model joins the one to which its links are
widest. The parts' placements together are one placement of all, whose flow is at least their sum,
and which a last walk over all units improves.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

from hexswarm.router.placement.rates import Rates

MOST = 40
"""Units of a part."""
COPIES = 1.5
"""Of the model, that a part has room for at least."""


def cut(rates: Rates, labels: Sequence[str]) -> list[list[int]]:
    """Parts of the units, each in order; `labels` are their regions."""
    regions = _joined(rates, labels)
    parts: list[list[int]] = []
    for units in regions:
        pieces = ceil(len(units) / MOST)
        room = sum(int(rates.most[unit]) for unit in units) / (COPIES * rates.layers)
        pieces = max(1, min(pieces, int(room)))
        # Dealt by size, so that every piece has of all kinds.
        dealt = sorted(units, key=lambda unit: (-int(rates.most[unit]), unit))
        parts.extend(sorted(dealt[piece::pieces]) for piece in range(pieces))
    return parts


def _joined(rates: Rates, labels: Sequence[str]) -> list[list[int]]:
    """Regions that have room for the model, small ones with their nearest."""
    regions = [
        [unit for unit, label in enumerate(labels) if label == name] for name in sorted(set(labels))
    ]

    def room(units: list[int]) -> int:
        return sum(int(rates.most[unit]) for unit in units)

    while len(regions) > 1:
        least = min(regions, key=lambda units: (room(units), units))
        if room(least) >= COPIES * rates.layers:
            break
        regions.remove(least)
        near = max(regions, key=lambda units: (_width(rates, least, units), -units[0]))
        near.extend(least)
    return regions


def _width(rates: Rates, some: Sequence[int], others: Sequence[int]) -> float:
    """Tokens a second of the mean link from some units to others."""
    return float(rates.link[list(some)][:, list(others)].mean())
