"""The figures of `reality.py`: what a round showed, what a case came to, and the table of all."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Case:
    """Requests that are made at the same moment."""

    client: str
    at_once: int
    ring: tuple[str, ...] = ()
    """Hosts that alone may serve; empty: the router's choice."""

    def __str__(self) -> str:
        return f"{self.client} {'-'.join(self.ring) or 'chosen'} x {self.at_once}"


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of one round, measured or predicted."""

    mean_s: float
    """Per token after the first, the mean of the answers."""
    p50_s: float
    """Median gap between two tokens."""
    ttft_s: float


@dataclass(slots=True)
class Course:
    """One case, round after round."""

    case: Case
    measured: list[Times] = field(default_factory=list)
    predicted: list[Times] = field(default_factory=list)
    replayed: list[Times] = field(default_factory=list)
    """As predicted would be with the speeds that the stages had in that round."""
    parts: list[Mapping[str, float]] = field(default_factory=list)
    """Of a token's measured time, sums over the ring as the stages told them."""
    load: list[float] = field(default_factory=list)

    def row(self) -> dict[str, Any]:
        """The figures of all rounds."""
        measured, predicted = averaged(self.measured), averaged(self.predicted)
        replayed_s = averaged(self.replayed).mean_s
        return {
            "case": str(self.case),
            "measured_s": measured.mean_s,
            "predicted_s": predicted.mean_s,
            "error": error(predicted.mean_s, measured.mean_s),
            "replayed_s": replayed_s,
            "replay_error": error(replayed_s, measured.mean_s),
            "spread": [min(t.mean_s for t in self.measured), max(t.mean_s for t in self.measured)],
            "measured_p50_s": measured.p50_s,
            "predicted_p50_s": predicted.p50_s,
            "p50_error": error(predicted.p50_s, measured.p50_s),
            "measured_ttft_s": measured.ttft_s,
            "predicted_ttft_s": predicted.ttft_s,
            "load": statistics.mean(self.load),
            **{part: statistics.mean(one[part] for one in self.parts) for part in self.parts[0]},
        }


def averaged(times: Sequence[Times]) -> Times:
    """Each figure's mean over the rounds."""
    names = ("mean_s", "p50_s", "ttft_s")
    return Times(*(statistics.mean(getattr(one, name) for one in times) for name in names))


def error(predicted_s: float, measured_s: float) -> float:
    """Signed, relative to what was measured."""
    return predicted_s / measured_s - 1


# --- one round


def measured(answers: Sequence[Mapping[str, Any]]) -> Times:
    """Of requests made at once."""
    return Times(
        statistics.mean(answer["mean_s"] for answer in answers),
        statistics.mean(answer["tpot_s"] or answer["mean_s"] for answer in answers),
        statistics.mean(answer["ttft_s"] for answer in answers),
    )


def told(answer: Mapping[str, Any]) -> list[dict[str, float]]:
    """What the stages counted of an answer; those that did not tell in time are left out."""
    return [hop["measured"] for hop in answer["trace"]["hops"] if hop["measured"] is not None]


def parts(answers: Sequence[Mapping[str, Any]], handle_s: float) -> dict[str, float]:
    """Sums over the ring, means over the answers; the handling of a hop that was predicted with;
    and how many sessions were in a batch."""
    names = ("compute_s", "queue_s", "serialise_s", "link_s")
    count = len(answers)
    found = {
        name: sum(hop[name] or 0.0 for answer in answers for hop in told(answer)) / count
        for name in names
    }
    rows = [hop["rows"] for answer in answers for hop in answer["trace"]["hops"] if hop["measured"]]
    return {**found, "assumed_handle_s": handle_s, "rows": statistics.mean(rows)}


def routes(answers: Sequence[Mapping[str, Any]]) -> str:
    """The rings that were taken."""
    taken = {" ".join(f"{a}:{b}" for _, a, b in answer["stages"]) for answer in answers}
    return " | ".join(sorted(taken))


# --- all of them


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over the cases, errors without sign."""

    def mean(name: str, those: Sequence[Mapping[str, Any]] = rows) -> float:
        return statistics.mean(abs(row[name]) for row in those)

    alone = [row for row in rows if row["case"].endswith(" x 1")]
    several = [row for row in rows if not row["case"].endswith(" x 1")]
    return {
        "measured_s": mean("measured_s"),
        "predicted_s": mean("predicted_s"),
        "error": mean("error"),
        "error_one": mean("error", alone),
        "error_several": mean("error", several),
        "error_worst": max(abs(row["error"]) for row in rows),
        "p50_error": mean("p50_error"),
        "replay_error": mean("replay_error"),
        "replay_error_worst": max(abs(row["replay_error"]) for row in rows),
        "load": mean("load"),
        "cases": rows,
    }


def table(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield "case: predicted, measured ms a token (range); replayed; medians; first token; load"
    for row in rows:
        low, high = row["spread"]
        yield (
            f"{row['case']:24} {row['predicted_s'] * 1e3:7.1f} {row['measured_s'] * 1e3:7.1f} "
            f"({low * 1e3:.1f}-{high * 1e3:.1f}) {row['error']:+6.1%};  "
            f"{row['replayed_s'] * 1e3:.1f} {row['replay_error']:+.1%};  "
            f"{row['predicted_p50_s'] * 1e3:.1f} {row['measured_p50_s'] * 1e3:.1f} "
            f"{row['p50_error']:+.1%};  {row['predicted_ttft_s'] * 1e3:.0f} "
            f"{row['measured_ttft_s'] * 1e3:.0f};  {row['load']:.1f}"
        )
