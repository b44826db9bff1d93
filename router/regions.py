"""Regions: a dozen places that stand for thousands of peers.

They let a search look at hundreds of peers through a dozen places: a round trip is about
`region_rtt_s` of the two regions plus `access_s` of the two peers. The first is the mean distance
of their members (for a region and itself too), the second the height plus how much farther than
its region's typical member a peer is from all centres. Region 0 is the unknown place, with no
distance to anything: peers whose coordinates tell nothing look near until somebody measures.

Centres are the fullest cells of a grid, moved to the median of their members. Not the farthest
points (a liar with an invented position would get a region of his own, fifteen would get all),
and not means (which far points drag about). They stay as they are while rows change, until a tenth
of the rows has come or gone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]

REGIONS = 16
"""Regions at most, the unknown place included."""

CELL_S = 0.01
"""Edge of a cell, seconds of round trip: about 1,000 km of fibre, a country."""

SETTLING = 3
"""Moves of the centres to the medians of their members."""

SAMPLE = 32
"""Members of a region, evenly drawn, that stand for all in the distances between regions."""

DRIFT = 0.1
"""Share of rows that may come or go before the centres are found again."""


@dataclass(frozen=True, slots=True)
class Regions:
    """Where the centres are, and for how many rows they were found."""

    centres: Floats
    """(R - 1, 3): that of region r is in row r - 1."""
    rtt_s: Floats
    """(R, R)."""
    typical_s: Floats
    """(R - 1, R - 1): mean distance from the members of one region to the centre of another."""
    rows: int
    """How many rows there were."""
    placed: int
    """How many of them had coordinates."""

    def stale(self, rows: int, placed: int) -> bool:
        return (
            abs(rows - self.rows) > DRIFT * self.rows
            or abs(placed - self.placed) > DRIFT * self.placed
        )

    def assign(
        self, position: Floats, height: Floats, placed: Flags
    ) -> tuple[NDArray[np.int16], Floats]:
        """Region and access of each row."""
        region = np.zeros(len(position), dtype=np.int16)
        access_s = np.zeros(len(position))
        if len(self.centres) and placed.any():
            away_s = _distances(position[placed], self.centres)
            nearest = away_s.argmin(axis=1)
            region[placed] = nearest + 1
            farther_s = (away_s - self.typical_s[nearest]).mean(axis=1)
            access_s[placed] = np.maximum(0.0, height[placed] + farther_s)
        return region, access_s


def find_regions(position: Floats, placed: Flags) -> Regions:
    """Centres for the rows that have a place, and the distances between them."""
    points = position[placed]
    centres = _fullest_cells(points)
    for _ in range(SETTLING):
        for region, members in enumerate(_members(points, centres)):
            if len(members):
                centres[region] = np.median(members, axis=0)
    count = len(centres)
    typical_s, rtt_s = np.zeros((count, count)), np.zeros((count + 1, count + 1))
    # An empty region (its members left for others as centres moved) is its centre alone.
    drawn = [
        _drawn(members) if len(members) else centres[region : region + 1]
        for region, members in enumerate(_members(points, centres))
    ]
    for a, members in enumerate(drawn):
        typical_s[a] = _distances(members, centres).mean(axis=0)
        for b in range(a + 1):
            away_s = _distances(members, drawn[b])
            pairs = away_s.size - (len(members) if a == b else 0)
            rtt_s[a + 1, b + 1] = rtt_s[b + 1, a + 1] = away_s.sum() / max(1, pairs)
    return Regions(centres, rtt_s, typical_s, len(position), len(points))


def _members(points: Floats, centres: Floats) -> list[Floats]:
    """The points nearest to each centre."""
    if not len(centres):
        return []
    nearest = _distances(points, centres).argmin(axis=1)
    return [points[nearest == region] for region in range(len(centres))]


def _fullest_cells(points: Floats) -> Floats:
    """Middles of the cells with most points, none within two edges of a fuller one."""
    if not len(points):
        return np.empty((0, 3))
    bound = 1 << 20
    cells = np.clip(np.floor(points / CELL_S), -bound, bound - 1).astype(np.int64) + bound
    keys = (cells[:, 0] << 42) | (cells[:, 1] << 21) | cells[:, 2]
    found, counts = np.unique(keys, return_counts=True)
    found = found[np.argsort(-counts, kind="stable")]
    mask = (1 << 21) - 1
    cells = np.stack([found >> 42, (found >> 21) & mask, found & mask], axis=1) - bound
    middles: Floats = np.asarray((cells + 0.5) * CELL_S, dtype=np.float64)
    chosen: list[Floats] = []
    while len(middles) and len(chosen) < REGIONS - 1:
        chosen.append(middles[0])
        middles = middles[_distances(middles, middles[:1])[:, 0] > 2 * CELL_S]
    return np.array(chosen)


def _drawn(points: Floats) -> Floats:
    if len(points) <= SAMPLE:
        return points
    return points[np.linspace(0, len(points) - 1, SAMPLE).astype(np.intp)]


def _distances(points: Floats, others: Floats) -> Floats:
    gap = points[:, None, :] - others[None, :, :]
    away: Floats = np.sqrt(np.einsum("ijk,ijk->ij", gap, gap))
    return away
