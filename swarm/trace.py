"""Where the time of one answer went, hop by hop, beside what the router had predicted.

The ring obeys L = sum of compute + one-way links (DESIGN 4). A trace holds both sides of it for
each stage: the prediction (`hexswarm.router.explain.Budget`) and what the stage itself counted
(`Traced`): waiting, computing, handling (decoding, threads, encoding), and half of its round trip
to the next stage. The time per token was measured here, by the client; what the stages' words leave
of it is the *rest*: nobody accounts for it, so either a way is longer than its pings or a stage
tells less than it took.

Traces are kept as one JSON file each in the state folder, the newest `KEEP`. They hold peers and
times, neither prompt nor answer.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from hexswarm.errors import UsageError
from hexswarm.messages import Traced
from hexswarm.records import PeerId, Span

KEEP = 100
"""Traces on disk; about 3 kB each."""
LAST = "last"
"""Names the newest trace."""
VERSION = 1


@dataclass(frozen=True, slots=True)
class Shares:
    """Parts of one stage's time per token, seconds; None if nobody measured it."""

    compute_s: float
    queue_s: float
    link_s: float | None
    """One way to the next stage; of the last stage, back to the head."""
    serialise_s: float
    """Predicted: bytes on the line. Measured: decoding, threads, encoding at the stage."""

    @property
    def total_s(self) -> float:
        return self.compute_s + self.queue_s + (self.link_s or 0.0) + self.serialise_s


@dataclass(frozen=True, slots=True)
class HopTrace:
    """One stage of the ring."""

    peer: PeerId
    span: Span
    origin: str
    """Where the predicted link was known from."""
    predicted: Shares
    measured: Shares | None = None
    """None if the stage did not answer, or took no decode step."""
    rows: float = 0.0
    """Mean sessions in its batches."""


@dataclass(frozen=True, slots=True)
class Repair:
    """Stages of a running answer that were replaced."""

    lost: tuple[Place, ...]
    by: tuple[Place, ...]
    """Who took over, layer for layer; in all as many layers, not always as many peers."""
    position: int
    """So many token ids were known when it happened."""
    stall_s: float
    """From the last token before to the first one after."""
    why: str
    """What the first of the lost ones did: "vanished", "was silent for 1.6 s"."""


@dataclass(frozen=True, slots=True)
class Place:
    """A peer and the layers that it serves in a route."""

    peer: PeerId
    span: Span


@dataclass(frozen=True, slots=True)
class SessionTrace:
    """One turn of one session."""

    session: str
    model: str
    """Its name."""
    when_s: float
    """Unix time of the end of the answer."""
    prompt_tokens: int
    new_tokens: int
    predicted_ttft_s: float
    predicted_tpot_s: float
    predicted_tpot_p95_s: float
    ttft_s: float
    tpot_s: float | None
    """Median seconds per token; None if it could not be told (`Meter`)."""
    hops: tuple[HopTrace, ...]
    """Of the route on which the answer ended."""
    repairs: tuple[Repair, ...] = ()

    @property
    def complete(self) -> bool:
        """All stages answered."""
        return all(hop.measured is not None for hop in self.hops)

    @property
    def rest_s(self) -> float | None:
        """Time per token that no stage accounts for; None if not all is known."""
        if self.tpot_s is None or not self.complete:
            return None
        return self.tpot_s - sum(hop.measured.total_s for hop in self.hops if hop.measured)

    def with_measured(self, told: Mapping[PeerId, Traced]) -> SessionTrace:
        """The same with what the stages told."""
        return replace(self, hops=tuple(_measured(hop, told.get(hop.peer)) for hop in self.hops))

    def to_json(self) -> dict[str, Any]:
        """Plain values, ready for `json.dumps`."""
        document = asdict(self)
        for hop, item in zip(document["hops"], self.hops, strict=True):
            hop["span"] = [item.span.first, item.span.end]
        document["repairs"] = [repair_json(item) for item in self.repairs]
        return {"version": VERSION, **document, "rest_s": self.rest_s}


def from_json(document: Any) -> SessionTrace:
    """The inverse of `to_json`. Raises ValueError, TypeError or KeyError for anything else."""
    if document["version"] != VERSION:
        raise ValueError(f"trace version {document['version']!r}")
    values = {key: value for key, value in document.items() if key not in ("version", "rest_s")}
    values["hops"] = tuple(_hop(item) for item in values["hops"])
    values["repairs"] = tuple(_repair(item) for item in values.get("repairs", ()))
    return SessionTrace(**values)


def _hop(item: dict[str, Any]) -> HopTrace:
    measured = item["measured"]
    return HopTrace(
        peer=PeerId(item["peer"]),
        span=Span(*item["span"]),
        origin=item["origin"],
        predicted=Shares(**item["predicted"]),
        measured=None if measured is None else Shares(**measured),
        rows=item["rows"],
    )


def repair_json(repair: Repair) -> dict[str, Any]:
    """Plain values, ready for `json.dumps`."""

    def plain(places: tuple[Place, ...]) -> list[dict[str, Any]]:
        return [{"peer": p.peer, "span": [p.span.first, p.span.end]} for p in places]

    return {**asdict(repair), "lost": plain(repair.lost), "by": plain(repair.by)}


def _repair(item: dict[str, Any]) -> Repair:
    def places(items: list[dict[str, Any]]) -> tuple[Place, ...]:
        return tuple(Place(PeerId(entry["peer"]), Span(*entry["span"])) for entry in items)

    return Repair(**{**item, "lost": places(item["lost"]), "by": places(item["by"])})


def _measured(hop: HopTrace, told: Traced | None) -> HopTrace:
    if told is None or told.steps == 0:
        return hop
    shares = Shares(
        compute_s=told.compute_s / told.steps,
        queue_s=told.wait_s / told.steps,
        link_s=told.successor_rtt_s / 2 if told.successor_rtt_s >= 0 else None,
        serialise_s=told.handle_s / told.steps,
    )
    return replace(hop, measured=shares, rows=told.rows)


# --- on disk --------------------------------------------------------------------------------


def save(folder: Path, trace: SessionTrace) -> Path:
    """Write the trace as `<folder>/<session>.json`, for its owner alone; old ones go.

    Raises OSError.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = folder / f"{trace.session}.json"
    draft = folder / f".{trace.session}.{os.getpid()}"
    with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        json.dump(trace.to_json(), file)
    draft.replace(path)  # a reader sees the old trace or the new one, never half of it
    for old in _newest_first(folder)[KEEP:]:
        old.unlink(missing_ok=True)
    return path


def load(folder: Path, name: str) -> SessionTrace:
    """The trace of a session, named in full, by its first letters, or as `last`.

    Raises UsageError if there is none, several fit, or the file is damaged.
    """
    paths = _newest_first(folder)
    if name == LAST:
        fitting = paths[:1]
    elif re.fullmatch("[0-9a-f]+", name):
        fitting = [path for path in paths if path.stem.startswith(name)]
    else:
        raise UsageError(f"{name!r} names no session", remedy=f"use its hex digits, or {LAST}")
    if not fitting:
        raise UsageError(
            f"there is no trace of session {name} in {folder}",
            remedy="a session's name stands at the end of `hexswarm generate`",
        )
    if len(fitting) > 1:
        some = ", ".join(path.stem for path in fitting[:4])
        raise UsageError(f"{len(fitting)} sessions begin with {name}: {some}")
    try:
        return from_json(json.loads(fitting[0].read_bytes()))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UsageError(
            f"the trace {fitting[0]} cannot be read: {error!r}", remedy="delete it"
        ) from error


def _newest_first(folder: Path) -> list[Path]:
    timed = []
    for path in folder.glob("*.json"):
        with contextlib.suppress(OSError):  # another client removed it
            timed.append((path.stat().st_mtime_ns, path))
    return [path for _, path in sorted(timed, reverse=True)]
