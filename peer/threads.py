"""How many threads a decode step should have: measured at the start, on the real shard.

A decode step reads every weight once, so threads help until they have filled the way to memory, and
each further one only makes the others wait at the end of each matrix: on one socket that is a few
of its cores, and on two cores that others use, too, it may be one. No table knows that, so a few
counts are tried in turns, a step each, and the least time of each is kept: what is asked is what
the machine can do, not how busy it is now. Of counts whose times are within `ENOUGH` of the best
the fewest wins: a volunteer's machine is shared. Prompts multiply instead of reading; they keep
what PyTorch chose. `--threads` sets both and measures nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable

ENOUGH = 1.05
ROUNDS = 5
BUDGET_S = 2.0
"""Of measuring; a round that has begun is finished."""


def counts(most: int) -> tuple[int, ...]:
    """The numbers of threads worth trying: powers of two, and all that there are."""
    powers = [1 << n for n in range(most.bit_length()) if 1 << n <= most]
    return tuple(sorted({*powers, most}))


def fewest_threads(
    timed: Callable[[int], float],
    most: int,
    clock: Callable[[], float] = time.perf_counter,
) -> int:
    """The least number up to `most` with nearly the best time; `timed(n)` takes one step with n."""
    tried = counts(most)
    if len(tried) == 1:
        return tried[0]
    ends_s, best = clock() + BUDGET_S, dict.fromkeys(tried, float("inf"))
    for _ in range(1 + ROUNDS):  # the first one wakes threads and fills caches
        for count in tried:
            best[count] = min(best[count], timed(count))
        if clock() > ends_s:
            break
    limit = ENOUGH * min(best.values())
    return min(count for count in tried if best[count] <= limit)
