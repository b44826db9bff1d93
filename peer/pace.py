"""The speed to announce: the probe's, until real steps contradict it for long.

The probe measures a quiet machine at start. Then its owner starts a game, the room gets hot, or the
sessions' contexts grow long; a peer that goes on announcing the old figure is chosen for routes
that cannot be kept. So the decode batches are compared with what the probe's figures say of just
such a batch (layers, rows, head), and their ratio is averaged by time over `SMOOTH_S`. When it is
off what is announced by more than `STEP` for `SUSTAINED_S` without a break, all the figures are
announced times that ratio; the way back is the same. A factor and not new figures, for a slow
device is slow in all it does, and the mix of batches seldom tells its parts apart.

A peer that announced a slow figure may get no steps any more that could show that it is well again,
and a probe may have met a machine that was busy starting. So a peer at rest times a step now and
then (`hexswarm.peer.probe.again`), which counts at once; after `FORGET_S` without steps or such a
test the probe's figure counts.

Prompt batches are not looked at: their cost per token falls with their length, which the two
figures of the probe cannot say.
"""

from __future__ import annotations

import math
from dataclasses import replace

from hexswarm.peer.steps import Batch
from hexswarm.records import Span, Speed

STEP = 0.2
REST_STEP = 0.05
"""A test at rest that is nearer than this confirms the probe."""
SMOOTH_S = 10.0
SUSTAINED_S = 30.0
BREAK_S = 10.0
"""Longer without a step, and what was sustained before is void."""
FORGET_S = 300.0
_CLIP = 4.0
"""One batch counts as at most so many times slower or faster than the last ones."""


class Pace:
    """`observe` each batch, `speed` to announce; time never goes back."""

    def __init__(self, probed: Speed, span: Span, layers: int) -> None:
        self._probed = probed
        self._span = span
        self._layers = layers
        """Of the model."""
        self._ratio = 1.0
        self._told = 1.0
        self._last_s = -math.inf
        self._off_since_s: float | None = None

    def observe(self, batch: Batch, elapsed_s: float, now: float) -> None:
        """A batch took `elapsed_s`, ending now."""
        if not all(row.decode for row in batch.rows):
            return
        expected_s = self._expected_s(batch)
        if expected_s <= 0 or elapsed_s <= 0:
            return
        if now - self._last_s > BREAK_S:
            self._off_since_s = None
        self._last_s = now
        ratio = min(max(elapsed_s / expected_s, self._ratio / _CLIP), self._ratio * _CLIP)
        self._ratio += (1 - math.exp(-elapsed_s / SMOOTH_S)) * (ratio - self._ratio)
        self._judge(now)

    def rested(self, elapsed_s: float, now: float) -> None:
        """A decode step of the whole span, without the head, took so long on a device at rest."""
        expected_s = len(self._span) * self._probed.decode_layer_s
        if expected_s > 0 and elapsed_s > 0:
            ratio = elapsed_s / expected_s
            self._ratio = self._told = 1.0 if abs(ratio - 1) <= REST_STEP else ratio
            self._last_s, self._off_since_s = now, None

    def speed(self, now: float) -> Speed:
        """The figures to announce."""
        if now - self._last_s > FORGET_S:
            self._ratio = self._told = 1.0
        if self._told == 1.0:
            return self._probed
        probed, ratio = self._probed, self._told
        return replace(
            probed,
            decode_layer_s=probed.decode_layer_s * ratio,
            prefill_layer_s=probed.prefill_layer_s * ratio,
            head_s=probed.head_s * ratio,
            row_layer_s=probed.row_layer_s * ratio,
        )

    def _expected_s(self, batch: Batch) -> float:
        """Seconds of a decode batch by the probe; rows of unlike spans are computed apart."""
        probed, seconds = self._probed, 0.0
        spans = [row.span or self._span for row in batch.rows]
        for span in set(spans):
            more = spans.count(span) - 1
            seconds += len(span) * (probed.decode_layer_s + more * probed.row_layer_s)
            seconds += probed.head_s if span.end == self._layers else 0.0
        return seconds

    def _judge(self, now: float) -> None:
        if abs(self._ratio / self._told - 1) <= STEP:
            self._off_since_s = None
        elif self._off_since_s is None:
            self._off_since_s = now
        elif now - self._off_since_s >= SUSTAINED_S:
            # Within a step of the probe's own figure that one is told: it was measured in quiet.
            self._told = 1.0 if abs(self._ratio - 1) <= STEP else self._ratio
            self._off_since_s = None
