"""The arithmetic of `chaos.py`: stalls, slopes and shares, apart from processes and clocks."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that `share` of all do not exceed; 0 of nothing."""
    ordered = sorted(values)
    if not ordered:
        return 0.0
    return ordered[max(0, -(-len(ordered) * round(share * 100) // 100) - 1)]


def stall_s(times_s: Sequence[float], normal_first_s: float, normal_gap_s: float) -> float:
    """By how much the longest silence of an answer was longer than it would have been.

    `times_s` are when its tokens came (or the error that ended it), at least one of them, since it
    was asked for. The silence before the first token
    counts from the time the first token of an unbroken answer takes; it is never negative.
    """
    gaps = [b - a for a, b in itertools.pairwise(times_s)]
    longest = max(gaps, default=0.0) - normal_gap_s
    return max(0.0, times_s[0] - normal_first_s, longest)


def slope_share(samples: Sequence[tuple[float, float]], warm_s: float, over_s: float) -> float:
    """Growth per `over_s` seconds relative to the mean: least squares over all after `warm_s`.

    `samples` are (seconds, value). 0 if fewer than three samples are left.
    """
    kept = [(at, value) for at, value in samples if at >= warm_s]
    if len(kept) < 3:
        return 0.0
    fit = statistics.linear_regression([at for at, _ in kept], [value for _, value in kept])
    return fit.slope * over_s / statistics.fmean(value for _, value in kept)


def rounded(value: object) -> object:
    """The same with floats cut to four digits, for the JSON line, which knows no infinity."""
    if isinstance(value, float):
        return round(value, 4) if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: rounded(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return value
