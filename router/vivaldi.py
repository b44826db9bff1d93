"""Network coordinates: how far apart two peers are that never met (Vivaldi, SIGCOMM 2004).

Each peer keeps a point in a space of round-trip seconds and a *height*. The round trip between two
is about the distance of their points plus both heights: the points model the core of the internet,
where ways obey geometry, and the heights the access lines, which every way from a peer pays. With
each round trip that is measured, a peer moves along the line to the other as a spring would, by a
step that shrinks with its own relative error and grows with it compared to the other's: a newcomer
runs to its place among settled peers and does not push them about.

What others say of themselves is a claim. A liar may state a far point and perfect certainty, so
three things differ from the paper. The error of a peer is a running *median*: each sample moves it
up or down by a fixed ratio, so that one liar among eight neighbours cannot shake our certainty.
Where the estimate is too long, the residual counts for no more than `CREDIT` times that error, of
the round trip or of `SCALE_S`, whichever is longer. And nobody's error counts as less than
`LEAST_ERROR`. What a peer can delay are its own replies: that costs its own place.

Rejected: matrix factorisation (its estimates break the triangle rule on purpose, and the search
would use such short cuts that do not exist); landmarks (a few peers whose failure or lie
displaces everybody); two dimensions (a third costs 8 bytes and lets three continents that are
unequally far apart unfold while the peers converge).
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from hexswarm.records import Coordinates

Floats = NDArray[np.float64]

STEP = 0.35
"""Share of a residual that one sample of full weight corrects (the paper's c_c). With its 0.25 the
worst of six maps of 50 peers is twice as wrong after 100 rounds."""

RATIO = 0.05
"""By this share a sample of full weight raises or lowers the running median of the error."""

CREDIT = 2.0
"""A residual counts up to so many times the own error. Of 50 peers after 100 rounds (median of four
seeds): with 1 the map is a fifth more wrong than with 2, because it unfolds slowly; with 3 one liar
does twice the harm."""

SCALE_S = 0.1
"""Round trip, seconds, from which a residual is limited in proportion: a peer that starts on the
wrong side of the world must be able to move by more than the few ms to its neighbours."""

LEAST_ERROR = 0.02
"""Nobody counts as surer than this: round trips over the internet vary by more."""

NOTHING = 1.0
"""Relative error from which coordinates tell nothing: that of a newcomer."""

START_S = 0.001
"""A newcomer's distance from the origin: apart from others, and no claim."""

LOW_S = 0.0001
"""Two heights that add up to less share in moves as if they were this."""

LONGEST_S = 10.0
"""Longest round trip taken in, and farthest place from the origin, in seconds: twice around the
earth by satellite is under 2 s, so what is beyond is a stall."""

TAIL = 2.44
"""A normal error's 95th percentile lies so many median absolute errors above its median
(1.645 / 0.6745)."""

ROUNDS = 60
"""Passes over the samples in `fit`. With 8 samples 20 would do; with 3 the estimates of unseen
peers are within 3.2 % after 40, 1.9 % after 60, 1.6 % after 120. 8 samples take 8 ms."""


def step(
    mine: Coordinates | None, theirs: Coordinates | None, rtt_s: float, rng: random.Random
) -> Coordinates:
    """My coordinates after one measured round trip to a peer at `theirs`.

    Samples that are not a finite positive time, and peers without coordinates, teach nothing.
    """
    here = mine or _start(rng)
    if theirs is None or not (math.isfinite(rtt_s) and rtt_s > 0):
        return here
    rtt_s = min(rtt_s, LONGEST_S)
    ours = _error(here)
    weight = ours / (ours + _error(theirs))
    gap = tuple(a - b for a, b in zip(here.position_s, theirs.position_s, strict=True))
    core_s = math.hypot(*gap)
    heights_s = here.height_s + theirs.height_s
    residual_s = rtt_s - core_s - heights_s
    wrong = min(NOTHING, abs(residual_s) / rtt_s)
    ratio = 1 + RATIO * weight
    error = ours * ratio if wrong > ours else ours / ratio
    limit_s = CREDIT * ours * max(rtt_s, SCALE_S)
    move_s = STEP * weight * max(-limit_s, min(limit_s, residual_s))
    way = _direction(rng) if core_s < 1e-9 else tuple(part / core_s for part in gap)
    # Heights share in a move as they share in the way; from zero they could never grow.
    lift_s = move_s * _share(core_s, heights_s)
    moved = (at + (move_s - lift_s) * part for at, part in zip(here.position_s, way, strict=True))
    x, y, z = (max(-LONGEST_S, min(LONGEST_S, at)) for at in moved)
    height_s = max(0.0, min(LONGEST_S, here.height_s + lift_s))
    return Coordinates((x, y, z), height_s, min(NOTHING, error))


def rtt_s(a: Coordinates, b: Coordinates) -> float:
    """Estimated round trip, seconds, between two different peers."""
    (ax, ay, az), (bx, by, bz) = a.position_s, b.position_s
    x, y, z = ax - bx, ay - by, az - bz
    return math.sqrt(x * x + y * y + z * z) + (a.height_s + b.height_s)


def rtts_s(at: Floats, height_s: Floats, others: Floats, others_height_s: Floats) -> Floats:
    """`rtt_s` from each of n places (n, 3) to each of m, to the last bit the same."""
    x, y, z = (np.subtract.outer(at[:, axis], others[:, axis]) for axis in range(3))
    distance_s: Floats = np.sqrt(x * x + y * y + z * z)
    return distance_s + np.add.outer(height_s, others_height_s)


def relative_error(a: Coordinates, b: Coordinates) -> float:
    """Median relative error of `rtt_s(a, b)`: the root mean square of both ends', 1 at most."""
    ours, theirs = min(NOTHING, a.error), min(NOTHING, b.error)
    return math.sqrt((ours * ours + theirs * theirs) / 2)


def spread_s(a: Coordinates, b: Coordinates) -> float:
    """How much longer than estimated the way one way is at the 95th percentile, seconds."""
    return TAIL * relative_error(a, b) * rtt_s(a, b) / 2


def spreads_s(rtt_s: Floats, error: Floats, others: Floats) -> Floats:
    """`spread_s` for the round trips (n, m) between n and m places with these errors."""
    ours, theirs = np.minimum(NOTHING, error), np.minimum(NOTHING, others)
    relative = np.sqrt(np.add.outer(ours * ours, theirs * theirs) / 2)
    spread: Floats = TAIL * relative * rtt_s / 2
    return spread


def informed(place: Coordinates | None) -> bool:
    """Whether estimates can be made with these coordinates."""
    return place is not None and place.error < NOTHING


def fit(samples: Sequence[tuple[Coordinates, float]], rng: random.Random) -> Coordinates | None:
    """Coordinates of a newcomer from round trips to several peers at once; None without any.

    The stated error counts one sample of total ignorance beside the given ones: a few round trips
    are met exactly by many places, so their residuals alone would promise too much.
    """
    good = [
        (place, min(time_s, LONGEST_S))
        for place, time_s in samples
        if math.isfinite(time_s) and time_s > 0
    ]
    if not good:
        return None
    here: Coordinates | None = None
    order = list(good)
    for _ in range(ROUNDS):
        rng.shuffle(order)
        for place, time_s in order:
            here = step(here, place, time_s, rng)
    assert here is not None
    misses = [
        max(min(NOTHING, abs(rtt_s(here, place) - time_s) / time_s), _error(place))
        for place, time_s in good
    ]
    error = (NOTHING + len(good) * statistics.median(misses)) / (1 + len(good))
    return Coordinates(here.position_s, here.height_s, error)


def _error(place: Coordinates) -> float:
    return max(LEAST_ERROR, min(NOTHING, place.error))


def _start(rng: random.Random) -> Coordinates:
    x, y, z = (START_S * part for part in _direction(rng))
    return Coordinates((x, y, z), 0.0, NOTHING)


def _share(core_s: float, heights_s: float) -> float:
    """The part of a way that is height."""
    heights_s = max(heights_s, LOW_S)
    return heights_s / (core_s + heights_s)


def _direction(rng: random.Random) -> tuple[float, ...]:
    """A random unit vector: two peers at one point have to part somehow."""
    while True:
        parts = tuple(rng.gauss(0, 1) for _ in range(3))
        length = math.hypot(*parts)
        if length > 1e-6:
            return tuple(part / length for part in parts)
