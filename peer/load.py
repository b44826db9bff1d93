"""How busy this peer is: what `records.Load` says, out of the batches of the last ten seconds.

A *window* of `WINDOW_S`, in buckets, was preferred to exponential smoothing: an idle peer is idle
again after ten seconds, exactly, without a new batch telling so, and each figure is a plain mean
that a test can recompute. What is told:

- `queue_s`: the mean wait of the decode steps that were computed in the window, at least the work
  of the prompts that wait at this moment (a burst of prompts is known before it is felt);
- `rows`: decode rows in the device's hands, averaged over time, idle time included: what a step
  that comes at any moment finds there;
- `busy`: the share of time that went into what rows and tokens *add* to a batch. The read of the
  weights is not counted: a session alone in a fast ring keeps a device awake half of the time, and
  yet a second one beside it costs next to nothing.

A batch is spread over the buckets in which it ran, so a long one (a prompt on a slow machine) is
not forgotten earlier than a row of short ones.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from hexswarm.records import Load

WINDOW_S = 10.0
BUCKETS = 20
_BUCKET_S = WINDOW_S / BUCKETS


@dataclass(slots=True)
class _Bucket:
    """Sums over one piece of time."""

    number: int
    row_seconds: float = 0.0
    marginal_s: float = 0.0
    wait_s: float = 0.0
    steps: int = 0


class LoadMeter:
    """`computed` after each batch, `load` whenever somebody asks; time never goes back."""

    def __init__(self, now: float) -> None:
        self._since_s = now
        self._buckets: deque[_Bucket] = deque(maxlen=BUCKETS)

    def computed(
        self, started_s: float, ended_s: float, waits_s: Sequence[float], marginal_s: float
    ) -> None:
        """A batch ran; its decode rows had waited for `waits_s`, its marginal work is given."""
        elapsed_s = ended_s - started_s
        last = _number(ended_s)
        # A marginal part above the whole is an error of the fit.
        share = min(marginal_s / elapsed_s, 1.0) if elapsed_s > 0 else 0.0
        for number in range(max(_number(started_s), last - BUCKETS + 1), last + 1):
            begin_s = max(started_s, number * _BUCKET_S)
            inside_s = max(0.0, min(ended_s, (number + 1) * _BUCKET_S) - begin_s)
            bucket = self._bucket(number)
            bucket.row_seconds += inside_s * len(waits_s)
            bucket.marginal_s += inside_s * share
        bucket = self._bucket(last)
        bucket.wait_s += sum(waits_s)
        bucket.steps += len(waits_s)

    def load(self, now: float, prompts_s: float, free_kv_tokens: int) -> Load:
        """The load at `now`, with prompts of `prompts_s` seconds waiting."""
        oldest = _number(now) - BUCKETS + 1
        recent = [bucket for bucket in self._buckets if bucket.number >= oldest]
        covered_s = max(now - max(self._since_s, oldest * _BUCKET_S), _BUCKET_S)
        steps = sum(bucket.steps for bucket in recent)
        waited_s = sum(bucket.wait_s for bucket in recent) / steps if steps else 0.0
        return Load(
            queue_s=max(waited_s, prompts_s),
            rows=sum(bucket.row_seconds for bucket in recent) / covered_s,
            busy=min(1.0, sum(bucket.marginal_s for bucket in recent) / covered_s),
            free_kv_tokens=free_kv_tokens,
        )

    def _bucket(self, number: int) -> _Bucket:
        """The bucket of that number, which is new or among the last."""
        for bucket in reversed(self._buckets):
            if bucket.number == number:
                return bucket
            if bucket.number < number:
                break
        made = _Bucket(number)
        self._buckets.append(made)
        return made


def _number(now: float) -> int:
    return math.floor(now / _BUCKET_S)
