"""Where things go in a picture: places in a plane, regions, lanes, labels that do not collide.

Pure geometry over numpy arrays; what is drawn there is `hexswarm.map`'s business.

*The plane.* Network coordinates have three dimensions, paper two. `plane` looks at the swarm from
the side from which it is widest (its principal plane): of all flat pictures that one keeps most
of the distances. Turned over, it would be as good, so its orientation is fixed by a rule.
Coordinates are claims of strangers. Peers farther from the middle than anything on Earth is, and
than most others are, do not count for the scale, and are put at the edge (`far`).

*Regions* are balls of `REGION_S`: one peer founds a region, those near join it, and a few rounds
of moving centres to the middle make it independent of who came first. Rejected: single linkage,
which joins Paris to Moscow through a row of home connections; k-means, which has to be told k.

*Lanes*: spans are intervals, and first fit in order of their start needs as few lanes as spans
overlap anywhere.

*Labels*: each has a few places to choose from and takes the one that hides least of what stands.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from hexswarm.records import Span

Array = NDArray[np.float64]
Point = tuple[float, float]

EARTH_S = 0.4
"""Round trip, seconds: more than between any two places on Earth by fibre (half the globe and
detours are 0.3 s); who is farther from the middle is not taken at his word."""

REGION_S = 0.012
"""Radius of a region, seconds of round trip: a metropolitan area and its neighbours, 600 km."""

REGIONS = 200
"""Most regions told apart: a swarm of liars all over the place must not cost minutes."""

GOLDEN = math.pi * (3 - math.sqrt(5))
"""Successive multiples of this angle never line up."""


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle."""

    x: float
    y: float
    w: float
    h: float

    @property
    def right(self) -> float:
        return self.x + self.w

    @property
    def bottom(self) -> float:
        return self.y + self.h

    def shrunk(self, by: float) -> Box:
        return Box(self.x + by, self.y + by, self.w - 2 * by, self.h - 2 * by)

    def shared(self, other: Box) -> float:
        """The area that both cover."""
        w = min(self.right, other.right) - max(self.x, other.x)
        h = min(self.bottom, other.bottom) - max(self.y, other.y)
        return w * h if w > 0 and h > 0 else 0.0


@dataclass(frozen=True, slots=True)
class View:
    """How seconds become pixels: a plane in the delay space and a scale."""

    middle: Array
    axes: Array
    """Two rows, the directions right and down."""
    pixels_per_s: float
    shift: Point
    box: Box
    limit_s: float
    """Who is farther from the middle stands at the edge."""

    def pixels(self, positions: Array) -> tuple[Array, NDArray[np.bool_]]:
        """Places for positions (n, 3), and which of them are beyond the edge."""
        offset = positions - self.middle
        flat = offset @ self.axes.T * self.pixels_per_s + np.array(self.shift)
        low = np.array([self.box.x, self.box.y])
        high = np.array([self.box.right, self.box.bottom])
        inside = np.clip(flat, low, high)
        beyond = np.linalg.norm(offset, axis=1) > self.limit_s
        return inside, beyond | (np.abs(inside - flat) > 1.0).any(axis=1)


def plane(positions: Array) -> tuple[Array, Array, float]:
    """The middle, the two principal axes (2, 3) and the distance up to which positions count."""
    if not len(positions):
        return np.zeros(3), np.eye(3)[:2], EARTH_S
    middle = np.median(positions, axis=0)
    far = np.linalg.norm(positions - middle, axis=1)
    limit = max(EARTH_S, 3 * float(np.quantile(far, 0.9)))
    near = positions[far <= limit] - middle
    near = near - near.mean(axis=0)
    # einsum and not @: its sums do not depend on how many threads a BLAS uses.
    _, strength, axes = np.linalg.svd(np.einsum("ni,nj->ij", near, near))
    if strength[0] <= 0:
        axes = np.eye(3)
    chosen = axes[:2]
    flip = np.sign(chosen[np.arange(2), np.argmax(np.abs(chosen).round(6), axis=1)])
    return middle, chosen * flip[:, None], limit


def view(positions: Array, box: Box, *, least_s: float = 0.004) -> View:
    """The view in which all positions that count fill the box; `least_s` is its least extent."""
    middle, axes, limit = plane(positions)
    offset = positions - middle
    flat = (offset @ axes.T)[np.linalg.norm(offset, axis=1) <= limit]
    low, high = (flat.min(axis=0), flat.max(axis=0)) if len(flat) else (np.zeros(2), np.zeros(2))
    extent = np.maximum(high - low, least_s)
    scale = min(box.w / float(extent[0]), box.h / float(extent[1]))
    centre = (low + high) / 2 * scale
    shift = (box.x + box.w / 2 - float(centre[0]), box.y + box.h / 2 - float(centre[1]))
    return View(middle, axes, scale, shift, box, limit)


def regions(positions: Array, radius_s: float = REGION_S, rounds: int = 4) -> list[list[int]]:
    """Positions in groups of near ones, the largest group first, each in order of index."""
    if not len(positions):
        return []
    centres = positions[_founding(positions, radius_s)]
    for _ in range(rounds):
        owner = _nearest(positions, centres)
        kept = np.unique(owner)
        sums = np.stack([np.bincount(owner, column) for column in positions.T], axis=1)
        counts = np.bincount(owner)
        centres = sums[kept] / counts[kept, None]
        centres = centres[_founding(centres, radius_s)]
    owner = _nearest(positions, centres)
    found: dict[int, list[int]] = {}
    for index, centre in enumerate(owner.tolist()):
        found.setdefault(centre, []).append(index)
    return sorted(found.values(), key=lambda members: (-len(members), members[0]))


def _founding(positions: Array, radius_s: float) -> list[int]:
    """Those who have no earlier founder within the radius, at most `REGIONS`."""
    founders: list[int] = []
    centres = np.empty_like(positions[:REGIONS])
    for index, place in enumerate(positions):
        if len(founders) == REGIONS:
            break
        known = centres[: len(founders)]
        if not len(known) or np.min(((known - place) ** 2).sum(axis=1)) > radius_s**2:
            centres[len(founders)] = place
            founders.append(index)
    return founders


def _nearest(positions: Array, centres: Array) -> NDArray[np.int64]:
    owner = np.zeros(len(positions), dtype=np.int64)
    for first in range(0, len(positions), 256):
        apart = positions[first : first + 256, None, :] - centres[None, :, :]
        owner[first : first + 256] = (apart**2).sum(axis=2).argmin(axis=1)
    return owner


def apart(places: Array, radii: Array, box: Box, gap: float = 3.0, rounds: int = 120) -> Array:
    """The places moved as little as makes discs of these radii lie side by side in the box."""
    count = len(places)
    turn = np.arange(count) * GOLDEN
    # Equal places must differ in direction before they can be pushed apart.
    moved = places + 0.02 * np.stack([np.cos(turn), np.sin(turn)], axis=1)
    need = radii[:, None] + radii[None, :] + gap
    low = np.array([box.x, box.y]) + radii[:, None]
    high = np.maximum(np.array([box.right, box.bottom]) - radii[:, None], low)
    for _ in range(rounds):
        away = moved[:, None, :] - moved[None, :, :]
        distance = np.sqrt((away**2).sum(axis=2))
        push = np.maximum(need - distance, 0)
        np.fill_diagonal(push, 0)
        if not push.any():
            break
        step = (away * (push / np.maximum(distance, 1e-6))[..., None]).sum(axis=1) * 0.35
        length = np.sqrt((step**2).sum(axis=1, keepdims=True))
        step *= np.minimum(1, 12 / np.maximum(length, 1e-9))
        moved = np.clip(moved + step, low, high)
    return moved


def bounds(points: Sequence[Point]) -> Box:
    """The smallest box that holds all points."""
    left, top = min(x for x, _ in points), min(y for _, y in points)
    return Box(left, top, max(x for x, _ in points) - left, max(y for _, y in points) - top)


def hull(points: Sequence[Point]) -> list[Point]:
    """The corners of the convex hull, in order (Andrew 1979)."""
    ordered = sorted(set(points))
    if len(ordered) < 3:
        return ordered
    return _half(ordered)[:-1] + _half(ordered[::-1])[:-1]


def _half(ordered: Sequence[Point]) -> list[Point]:
    corners: list[Point] = []
    for x, y in ordered:
        while len(corners) > 1:
            (ax, ay), (bx, by) = corners[-2:]
            if (bx - ax) * (y - ay) - (by - ay) * (x - ax) > 0:
                break
            corners.pop()
        corners.append((x, y))
    return corners


def lanes(spans: Sequence[Span]) -> list[int]:
    """A lane for each span (they are in order of `first`), so that none overlap in one."""
    ends: list[int] = []
    chosen = []
    for span in spans:
        lane = next((index for index, end in enumerate(ends) if end <= span.first), len(ends))
        if lane == len(ends):
            ends.append(0)
        ends[lane] = span.end
        chosen.append(lane)
    return chosen


def nice(value: float) -> float:
    """The largest of 1, 2, 5, 10, 20, ... that is at most `value`."""
    power = 10.0 ** math.floor(math.log10(value))
    return max(factor * power for factor in (1, 2, 5) if factor * power <= value * (1 + 1e-9))


@dataclass(slots=True)
class Labels:
    """What stands already, and places for what comes."""

    room: Box
    taken: list[tuple[Box, float]] = field(default_factory=list)
    """With the harm of covering one square pixel."""

    def block(self, box: Box, harm: float = 1.0) -> None:
        self.taken.append((box, harm))

    def place(self, choices: Iterable[Box], most: float = math.inf) -> Box | None:
        """The least harmful of the choices (the first of equals), now taken; None above `most`."""
        best, least = None, math.inf
        for box in choices:
            harm = self._harm(box)
            if harm < least:
                best, least = box, harm
            if harm == 0:
                break
        if best is None or least > most:
            return None
        self.block(best, 2.0)
        return best

    def _harm(self, box: Box) -> float:
        outside = box.w * box.h - box.shared(self.room)
        return 9 * max(0.0, outside - 1e-6) + sum(
            harm * box.shared(other) for other, harm in self.taken
        )


def turning(points: Sequence[Point]) -> float:
    """1 if a closed walk through the points turns clockwise on paper (y down), else -1."""
    following = [*points[1:], *points[:1]]
    area = sum(ax * by - bx * ay for (ax, ay), (bx, by) in zip(points, following, strict=True))
    return 1.0 if area >= 0 else -1.0


@dataclass(frozen=True, slots=True)
class Curve:
    """A quadratic Bezier curve from one disc to another, that ends at their rims."""

    start: Point
    control: Point
    end: Point

    @classmethod
    def between(cls, a: Point, b: Point, rim_a: float, rim_b: float, side: float = 1.0) -> Curve:
        """Bent to the left (`side` 1) or right (-1), so that the ways there and back differ."""
        (ax, ay), (bx, by) = a, b
        length = math.hypot(bx - ax, by - ay) or 1.0
        bend = side * max(0.17 * length, min(26.0, length))
        control = (
            (ax + bx) / 2 + (by - ay) / length * bend,
            (ay + by) / 2 - (bx - ax) / length * bend,
        )
        return cls(_towards(a, control, rim_a), control, _towards(b, control, rim_b))

    def at(self, t: float) -> Point:
        (ax, ay), (cx, cy), (bx, by) = self.start, self.control, self.end
        p, q, r = (1 - t) ** 2, 2 * t * (1 - t), t * t
        return p * ax + q * cx + r * bx, p * ay + q * cy + r * by

    def points(self, step: float) -> list[Point]:
        """Points along the curve, about `step` apart."""
        count = max(2, int(math.dist(self.start, self.end) * 1.1 / step))
        return [self.at(index / count) for index in range(count + 1)]

    def normal(self, t: float) -> Point:
        """A unit vector to the left of the curve."""
        (ax, ay), (cx, cy), (bx, by) = self.start, self.control, self.end
        dx = (1 - t) * (cx - ax) + t * (bx - cx)
        dy = (1 - t) * (cy - ay) + t * (by - cy)
        length = math.hypot(dx, dy) or 1.0
        return dy / length, -dx / length


def _towards(a: Point, b: Point, by: float) -> Point:
    length = math.hypot(b[0] - a[0], b[1] - a[1]) or 1.0
    by = min(by, 0.45 * length)
    return a[0] + (b[0] - a[0]) / length * by, a[1] + (b[1] - a[1]) / length * by
