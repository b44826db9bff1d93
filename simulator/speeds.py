"""What batches take, and what a peer would measure of itself.

All policies live with one cost: per layer, `prefill_layer_s` of the prompt tokens plus
`decode_layer_s` of the decode rows that pass this layer in this batch, each only if there are any,
as in Helix's simulator. With partial entry rows pass different layers of a unit; the sum goes
layer by layer, so a row pays for what it uses and no more. A batch that samples pays for the LM
head besides, if the profile tells it (those of cluster files do not, those of a census do).

`speed` is the figure that a peer announces: it measures (`hexswarm.peer.probe`) one row, what a
further row adds, and a prompt token in a piece of usual size. Real peers time the second row; a
table that was measured in steps of 2 rows and 0.1 ms says nothing of that, so the slope is taken
over a batch of `SLOPE_ROWS`, as `hexswarm.peer.pace` would learn it from work.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from hexswarm.peer.scheduler import Policy
from hexswarm.peer.steps import Row
from hexswarm.peer.steptime import CHUNK_TOKENS
from hexswarm.records import Span, Speed
from hexswarm.router.placement.cluster import Model, Profile

SLOPE_ROWS = 32
_SHORT_TOKENS, _LEAST_EFFICIENT, _MOST_EFFICIENT = 16, 16, 1024
"""As the probe: two pieces tell what is fixed and what a token costs."""


class BatchTime:
    """Seconds of a batch on one unit that holds `span`."""

    __slots__ = ("_decode", "_prefill", "_profile", "_span")

    def __init__(self, profile: Profile, span: Span) -> None:
        self._profile, self._span = profile, span
        self._decode: dict[int, float] = {0: 0.0}
        self._prefill: dict[int, float] = {0: 0.0}

    def __call__(self, rows: Sequence[Row]) -> float:
        """Rows without a span use all layers."""
        decodes = prompts = 0
        head_s = self._profile.head_s and self._head_s(rows)
        partial: list[tuple[Span, int, int]] = []
        for row in rows:
            decode, tokens = (1, 0) if row.decode else (0, row.count)
            if row.span is None:
                decodes += decode
                prompts += tokens
            else:
                partial.append((row.span, decode, tokens))
        if not partial:
            return len(self._span) * self.layer_s(decodes, prompts) + head_s
        return self._by_layer(decodes, prompts, partial) + head_s

    def _head_s(self, rows: Sequence[Row]) -> float:
        """The head is read once for all rows that end here."""
        end = self._span.end
        samples = any(row.sample and (row.span is None or row.span.end == end) for row in rows)
        return self._profile.head_s if samples else 0.0

    def layer_s(self, decodes: int, prompts: int) -> float:
        """Of one layer."""
        decode_s, prefill_s = self._decode.get(decodes), self._prefill.get(prompts)
        if decode_s is None:
            decode_s = self._decode[decodes] = self._profile.decode_layer_s(decodes)
        if prefill_s is None:
            prefill_s = self._prefill[prompts] = self._profile.prefill_layer_s(prompts)
        return decode_s + prefill_s

    def _by_layer(
        self, decodes: int, prompts: int, partial: Sequence[tuple[Span, int, int]]
    ) -> float:
        """The layers between two boundaries of spans have the same rows."""
        ends = {self._span.first, self._span.end}
        for span, _, _ in partial:
            ends |= {span.first, span.end}
        cuts = sorted(ends)
        total_s = 0.0
        for first, end in pairwise(cuts):
            inside = [item for item in partial if item[0].first <= first < item[0].end]
            rows = decodes + sum(decode for _, decode, _ in inside)
            tokens = prompts + sum(count for _, _, count in inside)
            total_s += (end - first) * self.layer_s(rows, tokens)
        return total_s


def speed(profile: Profile) -> Speed:
    """What a peer with this profile announces."""
    one_s = profile.decode_layer_s(1)
    return Speed(
        decode_layer_s=one_s,
        prefill_layer_s=profile.prefill_layer_s(CHUNK_TOKENS) / CHUNK_TOKENS,
        head_s=profile.head_s,
        row_layer_s=max(0.0, profile.decode_layer_s(SLOPE_ROWS) - one_s) / (SLOPE_ROWS - 1),
    )


def efficient_tokens(profile: Profile) -> int:
    """Tokens of a piece whose arithmetic takes as long as what every piece costs anyhow."""
    short_s = profile.prefill_layer_s(_SHORT_TOKENS)
    long_s = profile.prefill_layer_s(CHUNK_TOKENS)
    token_s = max((long_s - short_s) / (CHUNK_TOKENS - _SHORT_TOKENS), 1e-9)
    fixed_s = max(short_s - _SHORT_TOKENS * token_s, 0.0)
    return min(max(round(fixed_s / token_s), _LEAST_EFFICIENT), _MOST_EFFICIENT)


def scheduling(profile: Profile, model: Model, span: Span) -> Policy:
    """How a peer that holds `span` composes batches."""
    return Policy.of(
        int(model.activation_bytes),
        head=span.first == 0,
        efficient_tokens=efficient_tokens(profile),
        stages=-(-model.layers // len(span)),
        accelerator=True,
    )
