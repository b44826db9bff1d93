"""The speed to announce: the probe's figures, times what steps really take.

The probe runs steps back to back on a machine that may be busy starting, or whose caches a tight
loop keeps warm. A step of a ring comes once in a while, to caches that others have used, beside a
game of the owner's or with a long context. What such steps take in units of the probe's figures
(for just such a batch: layers, rows, head) is the *ratio*, and all the figures are announced times
it: a slow device is slow in all it does, and the mix of batches seldom tells its parts apart.

The ratio is the median of the last `SAMPLES` decode batches of the last `FORGET_S`, if there are at
least `FEW`: a median, so that a page fault or a garbage collection says nothing, and short, because
a route is chosen on it now. Where no session gives steps, the peer times a single step of its own
now and then (`hexswarm.peer.probe.again`), which meets the same caches as a ring's step; the median
of the last `REST_SAMPLES` of those counts until there are real ones again. So a peer that announced
a slow figure, and gets no steps any more for it, finds out that it is well again.

Prompt batches are not looked at: their cost per token falls with their length, which the two
figures of the probe cannot say. Rejected: an average over minutes (a figure that is right when the
request that asked for it has gone), and a test of several steps in a row (warm caches: 40 % too
fast on a machine with several peers).
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import replace

from hexswarm.peer.steps import Batch
from hexswarm.records import Span, Speed

SAMPLES = 64
FEW = 8
REST_SAMPLES, REST_FEW = 5, 3
FORGET_S = 300.0
STEP = 0.03
"""A ratio nearer to 1 than this confirms the probe."""

_LEAST, _MOST = 0.01, 100.0


class Pace:
    """`observe` each batch, or `rested` without any; `speed` to announce. Time never goes back."""

    def __init__(self, probed: Speed, span: Span, layers: int) -> None:
        self._probed = probed
        self._span = span
        self._layers = layers
        """Of the model."""
        self._steps: deque[tuple[float, float]] = deque(maxlen=SAMPLES)
        """When, and ratio."""
        self._rests: deque[tuple[float, float]] = deque(maxlen=REST_SAMPLES)

    def observe(self, batch: Batch, elapsed_s: float, now: float) -> None:
        """A batch took `elapsed_s`, ending now."""
        if all(row.decode for row in batch.rows):
            self._note(self._steps, elapsed_s, self._expected_s(batch), now)

    def rested(self, elapsed_s: float, now: float) -> None:
        """A decode step of the whole span, without the head, took so long on a device at rest."""
        self._note(self._rests, elapsed_s, len(self._span) * self._probed.decode_layer_s, now)

    def speed(self, now: float) -> Speed:
        """The figures to announce."""
        ratio = self._ratio(now)
        if abs(ratio - 1) <= STEP:
            return self._probed
        probed = self._probed
        return replace(
            probed,
            decode_layer_s=probed.decode_layer_s * ratio,
            prefill_layer_s=probed.prefill_layer_s * ratio,
            head_s=probed.head_s * ratio,
            row_layer_s=probed.row_layer_s * ratio,
        )

    def _ratio(self, now: float) -> float:
        for samples, few in ((self._steps, FEW), (self._rests, REST_FEW)):
            recent = _since(samples, now - FORGET_S)
            if len(recent) >= few:
                return statistics.median(recent)
        return 1.0

    def _note(
        self,
        samples: deque[tuple[float, float]],
        elapsed_s: float,
        expected_s: float,
        now: float,
    ) -> None:
        if expected_s > 0 and elapsed_s > 0:
            samples.append((now, min(max(elapsed_s / expected_s, _LEAST), _MOST)))

    def _expected_s(self, batch: Batch) -> float:
        """Seconds of a decode batch by the probe; rows of unlike spans are computed apart."""
        probed, seconds = self._probed, 0.0
        spans = [row.span or self._span for row in batch.rows]
        for span in set(spans):
            more = spans.count(span) - 1
            seconds += len(span) * (probed.decode_layer_s + more * probed.row_layer_s)
            seconds += probed.head_s if span.end == self._layers else 0.0
        return seconds


def _since(samples: Sequence[tuple[float, float]], since_s: float) -> list[float]:
    return [ratio for at_s, ratio in samples if at_s >= since_s]
