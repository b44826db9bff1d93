"""Dealing things out in proportion: whole ones, each member a least, none above its limit.

Fractions throughout: equal shares give equal counts whatever the machine, and a sum of shares is
one and not almost. `apportion` is the rule of the largest remainder (Hamilton's), with seats for
all; a divisor rule would favour the large members, who are the ones that fill up first. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate, pairwise

from hexswarm.errors import OutOfMemory, UsageError


def within(wanted: Sequence[Fraction], limits: Sequence[Fraction | None]) -> list[Fraction]:
    """Shares in proportion to `wanted` that sum to one, none above its limit."""
    full: dict[int, Fraction] = {}
    while True:
        free = [rank for rank in range(len(wanted)) if rank not in full]
        left = 1 - sum(full.values(), Fraction())
        if not free and left > 0:
            raise OutOfMemory(
                f"the weights do not fit the memory of {len(wanted)} members together",
                remedy="take more members, or a shorter span",
            )
        total = sum((wanted[rank] for rank in free), Fraction())
        shares = {rank: left * wanted[rank] / total for rank in free}
        over = {r: limit for r in free if (limit := limits[r]) is not None and shares[r] > limit}
        if not over:
            return [full.get(rank, shares.get(rank, Fraction())) for rank in range(len(wanted))]
        full |= over


def apportion(count: int, shares: Sequence[Fraction], grain: int = 1, least: int = 1) -> list[int]:
    """`count` things in whole grains, by the largest remainders, at least `least` for each.

    The last grain may be smaller than the others; equal remainders go to the lower rank.
    """
    grains = -(-count // grain)
    if grains < least * len(shares):
        raise UsageError(
            f"{count} heads, columns or words are too few for {len(shares)} ranks",
            remedy="take fewer ranks",
        )
    counts = _grains(grains, shares, least)
    ends = [min(end * grain, count) for end in accumulate(counts, initial=0)]
    return [end - first for first, end in pairwise(ends)]


def _grains(grains: int, shares: Sequence[Fraction], least: int) -> list[int]:
    ranks = range(len(shares))
    poor: set[int] = set()
    while True:  # who would get less than the least gets that, and the others share what is left
        left, free = grains - least * len(poor), [rank for rank in ranks if rank not in poor]
        total = sum((shares[rank] for rank in free), Fraction())
        ideal = {r: left * (shares[r] / total if total else Fraction(1, len(free))) for r in free}
        more = {rank for rank in free if ideal[rank] < least}
        if not more:
            break
        poor |= more
    counts = [least if rank in poor else int(ideal[rank]) for rank in ranks]
    waiting = sorted(ideal, key=lambda rank: (counts[rank] - ideal[rank], rank))
    for rank in waiting[: grains - sum(counts)]:
        counts[rank] += 1
    return counts


def in_order(counts: Sequence[int]) -> list[range]:
    """Runs of these lengths, one after another from 0."""
    return [range(first, end) for first, end in pairwise(accumulate(counts, initial=0))]
