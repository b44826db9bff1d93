"""What a peer's engine tells about itself: plain values, and the metrics made of them.

The engine keeps what cannot be had later (how long steps took, how large batches were) in
histograms with fixed bounds, and reads the rest when asked: what waits, who is in, how full the KV
pool is. A step time is that of a batch that was computed, from the runner's start to its end.
"""

from __future__ import annotations

from dataclasses import dataclass

from hexswarm.metrics import Histogram, Metric, counter, doubling, gauge
from hexswarm.peer.cache import PrefixCounts

STEP_S = doubling(0.0005, 15)
"""Half a millisecond to eight seconds."""
BATCH_ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 128)


@dataclass(frozen=True, slots=True)
class Counters:
    """What the device did since the engine started; differences of two give rates."""

    batches: int = 0
    rows: int = 0
    tokens: int = 0
    crashes: int = 0
    busy_s: float = 0.0


@dataclass(frozen=True, slots=True)
class BatchGauges:
    """The batches that were computed so far."""

    decode_s: Histogram = Histogram(STEP_S)
    """Of batches of decode steps alone."""
    prompt_s: Histogram = Histogram(STEP_S)
    """Of those that had a piece of a prompt."""
    rows: Histogram = Histogram(BATCH_ROWS)

    def computed(self, rows: int, prompts: int, elapsed_s: float) -> BatchGauges:
        """This and one batch more, of which `prompts` rows are pieces of prompts."""
        return BatchGauges(
            self.decode_s if prompts else self.decode_s.with_value(elapsed_s),
            self.prompt_s.with_value(elapsed_s) if prompts else self.prompt_s,
            self.rows.with_value(rows),
        )


@dataclass(frozen=True, slots=True)
class EngineGauges:
    """An engine at one moment."""

    batches: BatchGauges
    computed_rows: int
    computed_tokens: int
    crashes: int
    busy_s: float
    waiting_steps: int
    sessions: int
    kv_tokens: int
    """Room in the pool."""
    kv_leased_tokens: int
    kv_cached_tokens: int
    """Of those leased: written, or about to be."""
    kv_kept_tokens: int
    """Of those free: what ended sessions left for the next ones."""
    prefixes: PrefixCounts
    queue_s: float
    busy_share: float


def metrics(now: EngineGauges) -> tuple[Metric, ...]:
    """All of it with names; seconds and tokens, never milliseconds or blocks."""
    steps, known, kv = now.batches, now.prefixes, "hexswarm_kv"
    return (
        steps.decode_s.metric(
            "hexswarm_decode_batch_seconds", "Time of batches of decode steps alone."
        ),
        steps.prompt_s.metric(
            "hexswarm_prompt_batch_seconds", "Time of batches with a piece of a prompt."
        ),
        steps.rows.metric("hexswarm_batch_rows", "Sessions in a batch."),
        counter("hexswarm_rows_total", "Rows computed.", now.computed_rows),
        counter("hexswarm_tokens_total", "Tokens computed.", now.computed_tokens),
        counter("hexswarm_batch_crashes_total", "Batches that failed as a whole.", now.crashes),
        counter("hexswarm_busy_seconds_total", "Time in which a batch was computed.", now.busy_s),
        gauge("hexswarm_waiting_steps", "Steps that wait for a batch.", now.waiting_steps),
        gauge("hexswarm_sessions", "Sessions with a lease.", now.sessions),
        gauge(f"{kv}_tokens", "Tokens for which there is KV memory.", now.kv_tokens),
        gauge(f"{kv}_leased_tokens", "Tokens of it that sessions leased.", now.kv_leased_tokens),
        gauge(f"{kv}_cached_tokens", "Tokens whose KV is written.", now.kv_cached_tokens),
        gauge(f"{kv}_kept_tokens", "Free tokens that keep what was said.", now.kv_kept_tokens),
        counter("hexswarm_prefix_asked_total", "Sessions that named a prompt.", known.asked),
        counter("hexswarm_prefix_found_total", "Those that began with some of it.", known.found),
        counter("hexswarm_prefix_tokens_total", "Tokens not computed again.", known.tokens),
        gauge("hexswarm_queue_seconds", "What a step waits, as announced.", now.queue_s),
        gauge("hexswarm_busy_share", "Share of time that sessions cost, as announced.",
              now.busy_share),
    )  # fmt: skip
