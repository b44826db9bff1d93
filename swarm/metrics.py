"""What a process knows of itself, as numbers with names, and the text that Prometheus reads.

Cores hold plain values and know nothing of this; a door turns them into `Metric`s when somebody
asks, so a number that nobody reads costs nothing. The text is the exposition format 0.0.4: one HELP
and one TYPE line for each metric, then one line for each sample.

Rejected: Prometheus' client library (a registry of globals, and a dependency for a hundred lines)
and pushing (a volunteer's peer tells nobody anything unasked).
"""

from __future__ import annotations

import bisect
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from hexswarm.errors import UsageError

Kind = Literal["counter", "gauge", "histogram"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_NAME = re.compile(r"[a-z][a-z0-9_]*")


@dataclass(frozen=True, slots=True)
class Sample:
    """One number of a metric."""

    value: float
    labels: Mapping[str, str] = field(default_factory=dict)
    suffix: str = ""
    """Of the metric's name: "_bucket", "_sum" or "_count" of a histogram."""


@dataclass(frozen=True, slots=True)
class Metric:
    """A number, or several that differ in their labels."""

    name: str
    kind: Kind
    help: str
    samples: tuple[Sample, ...]

    def __post_init__(self) -> None:
        labels = {label for sample in self.samples for label in sample.labels}
        if not all(map(_NAME.fullmatch, (self.name, *labels))):
            raise UsageError(f"a metric or its label has a name that cannot be: {self.name[:40]!r}")
        if (self.kind == "counter") != self.name.endswith("_total"):
            raise UsageError(f"names of counters, and no others, end in _total: {self.name}")


def gauge(name: str, help: str, value: float, /, **labels: str) -> Metric:
    """A number that goes up and down."""
    return Metric(name, "gauge", help, (Sample(value, labels),))


def counter(name: str, help: str, value: float, /, **labels: str) -> Metric:
    """A number that only grows; `name` ends in `_total`."""
    return Metric(name, "counter", help, (Sample(value, labels),))


@dataclass(frozen=True, slots=True)
class Histogram:
    """How often a quantity was at most each of `bounds`; the last count is of what lay above all.

    Bounds are fixed, so that histograms of several peers may be added, and quantiles are read off
    them afterwards. That is exact to the width of a bucket, and needs no window and no samples.
    """

    bounds: tuple[float, ...]
    counts: tuple[int, ...] = ()
    total: float = 0.0

    def __post_init__(self) -> None:
        if list(self.bounds) != sorted(set(self.bounds)) or not self.bounds:
            raise UsageError("the bounds of a histogram ascend")
        if not self.counts:
            object.__setattr__(self, "counts", (0,) * (len(self.bounds) + 1))
        if len(self.counts) != len(self.bounds) + 1:
            raise UsageError("a histogram has one count more than bounds")

    @property
    def count(self) -> int:
        return sum(self.counts)

    def with_value(self, value: float) -> Histogram:
        """This and one value more."""
        at = bisect.bisect_left(self.bounds, value)
        counts = (*self.counts[:at], self.counts[at] + 1, *self.counts[at + 1 :])
        return Histogram(self.bounds, counts, self.total + value)

    def quantile(self, share: float) -> float | None:
        """The least bound that `share` of the values do not exceed; inf above all, None of none."""
        wanted, seen = share * self.count, 0
        if not self.count:
            return None
        for bound, count in zip((*self.bounds, math.inf), self.counts, strict=True):
            seen += count
            if seen >= wanted and seen:
                return bound
        return math.inf

    def metric(self, name: str, help: str) -> Metric:
        """Cumulative, as Prometheus wants it."""
        seen, samples = 0, []
        for bound, count in zip((*self.bounds, math.inf), self.counts, strict=True):
            seen += count
            samples.append(Sample(seen, {"le": _number(bound)}, "_bucket"))
        ends = (Sample(self.total, suffix="_sum"), Sample(seen, suffix="_count"))
        return Metric(name, "histogram", help, (*samples, *ends))


def doubling(first: float, count: int) -> tuple[float, ...]:
    """Bounds that each are twice the one before."""
    return tuple(first * 2**n for n in range(count))


def exposition(metrics: Iterable[Metric]) -> str:
    """The text of all `metrics`; UsageError if two have one name."""
    lines: list[str] = []
    seen: set[str] = set()
    for metric in metrics:
        if metric.name in seen:
            raise UsageError(f"two metrics are called {metric.name}")
        seen.add(metric.name)
        lines.append(f"# HELP {metric.name} {_escaped(metric.help)}")
        lines.append(f"# TYPE {metric.name} {metric.kind}")
        lines += [_line(metric.name, sample) for sample in metric.samples]
    return "".join(f"{line}\n" for line in lines)


def _line(name: str, sample: Sample) -> str:
    pairs = [f'{key}="{_escaped(value, quote=True)}"' for key, value in sample.labels.items()]
    labels = f"{{{','.join(pairs)}}}" if pairs else ""
    return f"{name}{sample.suffix}{labels} {_number(sample.value)}"


def _number(value: float) -> str:
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    if math.isnan(value):
        return "NaN"
    return str(int(value)) if value == int(value) and abs(value) < 1 << 53 else repr(float(value))


def _escaped(text: str, *, quote: bool = False) -> str:
    text = text.replace("\\", "\\\\").replace("\n", "\\n")
    return text.replace('"', '\\"') if quote else text
