"""What a run showed, in figures.

Everything is counted in the *window*, from the end of the warm-up to the end of the run:

- `ttft`: of requests whose first token came in it, from their arrival; `prompt` the same from the
  moment when a route took them, as Helix counts it (waiting for a route is not in it);
- `decode`: gaps between tokens that came in it, over tokens: a token's way around, as Helix counts;
- `tpot`: of requests that ended in it, the mean gap after the first token, over requests;
- `goodput`: of requests that arrived in it, the share whose first token came within `TTFT_S` of the
  arrival and whose mean gap is at most `TPOT_S`. Those under way at the end are judged by what they
  have; not judged are those without a token that are younger than `TTFT_S`;
- `attained`: the same for limits on the whole latency, in multiples of what a request takes alone
  somewhere (HexGen's SLO scale).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from hexswarm.records import Span
from hexswarm.simulator.policy import Request

TTFT_S, TPOT_S = 5.0, 1.0
"""Limits of the goodput."""


@dataclass(frozen=True, slots=True)
class Spread:
    """Of some seconds: how many, their mean, three percentiles; nan if there are none."""

    count: int
    mean_s: float
    p50_s: float
    p95_s: float
    p99_s: float

    @classmethod
    def of(cls, seconds: Iterable[float]) -> Spread:
        values = np.fromiter(seconds, dtype=np.float64)
        if not len(values):
            return cls(0, *[math.nan] * 4)
        p50, p95, p99 = (float(value) for value in np.percentile(values, (50, 95, 99)))
        return cls(len(values), float(values.mean()), p50, p95, p99)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one request; nan: that did not happen."""

    request: Request
    begun_s: float
    first_s: float
    last_s: float
    ended_s: float
    tokens: int
    refusals: int
    repairs: int
    stages: int
    gave_up: bool

    @property
    def done(self) -> bool:
        return self.tokens == self.request.output_tokens

    @property
    def ttft_s(self) -> float:
        return self.first_s - self.request.arrives_s

    @property
    def tpot_s(self) -> float:
        """Mean gap so far; nan before the second token."""
        return (self.last_s - self.first_s) / (self.tokens - 1) if self.tokens > 1 else math.nan

    @property
    def latency_s(self) -> float:
        """From arrival to the last token; nan if that never came."""
        return self.last_s - self.request.arrives_s if self.done else math.nan

    def good(self, now: float, ttft_s: float, tpot_s: float) -> bool | None:
        """Whether it is within the limits at `now`; None: it is too early to say."""
        if self.tokens == 0:
            late = self.gave_up or now - self.request.arrives_s > ttft_s
            return False if late else None
        return self.ttft_s <= ttft_s and not (self.tokens > 1 and self.tpot_s > tpot_s)


@dataclass(frozen=True, slots=True)
class Use:
    """One unit's share in the work."""

    unit: str
    node: str
    span: Span | None
    busy: float
    """Share of the window in which it computed."""
    rows: float
    """Mean decode rows of a batch, over the run."""
    kv_peak: float
    """Most of its KV that was ever leased, as a share."""


@dataclass(frozen=True, slots=True)
class Report:
    """One run."""

    policy: str
    cluster: str
    model: str
    seed: int
    window_s: tuple[float, float]
    arrived: int
    """In the window, as are the others."""
    finished: int
    waiting: int
    """Without a route at the end."""
    running: int
    """On a route at the end."""
    gave_up: int
    refusals: int
    repairs: int
    offered_tokens_per_s: float
    """Prompt and answer of what arrived."""
    prompt_tokens_per_s: float
    """Of prompts whose first token came."""
    decode_tokens_per_s: float
    """That reached their clients."""
    ttft: Spread
    prompt: Spread
    decode: Spread
    tpot: Spread
    latency: Spread
    goodput: float
    """nan if nothing could be judged."""
    stages: float
    """Mean of the routes."""
    uses: tuple[Use, ...]
    outcomes: tuple[Outcome, ...]
    """Of all requests of the run that arrived, the warm-up included."""

    def good_share(self, ttft_s: float = TTFT_S, tpot_s: float = TPOT_S) -> float:
        """`goodput` for other limits."""
        return goodput(self.counted(), self.window_s[1], ttft_s, tpot_s)

    def counted(self) -> list[Outcome]:
        """Requests that arrived in the window."""
        since_s, until_s = self.window_s
        return [one for one in self.outcomes if since_s <= one.request.arrives_s < until_s]

    def to_json(self) -> dict[str, Any]:
        """As plain values, without the single requests; what is not known is None."""
        told = {name: getattr(self, name) for name in self.__slots__ if name != "outcomes"}
        return {name: _plain(value) for name, value in told.items()}


def goodput(outcomes: Iterable[Outcome], now: float, ttft_s: float, tpot_s: float) -> float:
    """Share of the requests that are within both limits, of those that can be judged."""
    judged = [one.good(now, ttft_s, tpot_s) for one in outcomes]
    told = [good for good in judged if good is not None]
    return sum(told) / len(told) if told else math.nan


def attained(
    outcomes: Iterable[Outcome],
    now: float,
    alone_s: Callable[[Request], float],
    scales: Sequence[float],
) -> tuple[float, ...]:
    """For each scale the share of requests whose whole latency is within scale x `alone_s`.

    A request that runs counts as late once it is; before that it is not judged.
    """
    ratios = []
    for one in outcomes:
        took_s = one.latency_s if one.done else now - one.request.arrives_s
        ratios.append((took_s / alone_s(one.request), one.done))
    shares = []
    for scale in scales:
        kept = [ratio <= scale for ratio, done in ratios if done or ratio > scale]
        shares.append(sum(kept) / len(kept) if kept else math.nan)
    return tuple(shares)


def _plain(value: Any) -> Any:
    if isinstance(value, Spread):
        return {name: _plain(item) for name, item in asdict(value).items()}
    if isinstance(value, Use):
        span = [value.span.first, value.span.end] if value.span else None
        return {**{name: getattr(value, name) for name in value.__slots__}, "span": span}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else None
    return value
