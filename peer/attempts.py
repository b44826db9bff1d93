"""Giving batches to the runner, and what happens when it raises.

Nothing is tried a third time. If the runner raises (out of memory included), one line is logged,
with the way to where it was raised once per kind; an exception's own words may quote what somebody
wrote, and are for those who debug. Then the rows of that batch are tried once more, each by itself,
so that what one session brought takes no other along, and those that raise again fail.

A runner that computes at once has `run` alone; one that tells a device what to do has `launch`, and
its flights may be *pending*. All this is for the device thread.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from hexswarm.errors import MemberLost
from hexswarm.peer.foresight import Ahead
from hexswarm.peer.steps import Batch, Result

log = logging.getLogger(__name__)


class Runner(Protocol):
    """What computes batches; called by the device thread only."""

    def run(self, batch: Batch) -> Sequence[Result]:
        """One result per row, in the order of the rows."""


class Flying(Protocol):
    """A batch that a runner was given."""

    @property
    def pending(self) -> bool:
        """Whether `results` may have to wait."""

    @property
    def chosen(self) -> Mapping[int, Any]:
        """By row: what the next row of its session may have as payload already."""

    def results(self) -> Sequence[Result]:
        """One per row, in the order of the rows."""


@dataclass(frozen=True, slots=True)
class _Landed:
    """Of a runner that computes at once."""

    computed: Sequence[Result]
    pending: bool = False
    chosen: Mapping[int, Any] = field(default_factory=dict)

    def results(self) -> Sequence[Result]:
        return self.computed


@dataclass(slots=True, eq=False)
class Job:
    """A batch from the moment when it was picked."""

    batch: Batch
    ahead: list[Ahead]
    """Of its first rows: nobody had asked for them then."""
    flight: Flying | None = None
    started_s: float = 0.0
    """When the device began with it."""
    due_s: float = 0.0
    """When the next one should be picked, so that the device does not wait for it."""


class Attempts:
    """What is tried with one runner."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._launch: Callable[[Batch], Flying] | None = getattr(runner, "launch", None)
        self._crash_kinds: set[type[Exception]] = set()
        self._failure = ""

    def launch(self, batch: Batch) -> Flying | None:
        """Begin with a batch; None if the runner raised."""
        try:
            if self._launch is not None:
                return self._launch(batch)
            return _Landed(self._runner.run(batch))
        except Exception as error:
            self._failed(error, batch)
            return None

    def land(self, batch: Batch, flight: Flying) -> list[Result] | None:
        """The results of a batch; None if the runner raised."""
        try:
            results = list(flight.results())
            if len(results) != len(batch.rows):
                raise RuntimeError(f"{len(results)} results for {len(batch.rows)} rows")
        except Exception as error:
            self._failed(error, batch)
            return None
        return results

    def one_by_one(self, batch: Batch) -> list[Result]:
        """Every row by itself, if it was not: one of them may have made the batch fail."""
        results: list[Result] = []
        for row in batch.rows:
            alone = self._alone(Batch((row,))) if len(batch.rows) > 1 else None
            results += alone or [Result(row, error=self._failure)]
        return results

    def _alone(self, batch: Batch) -> list[Result] | None:
        flight = self.launch(batch)
        return None if flight is None else self.land(batch, flight)

    def _failed(self, error: Exception, batch: Batch) -> None:
        self._failure = f"the stage failed to compute ({type(error).__name__})"
        new = type(error) not in self._crash_kinds and not isinstance(error, MemberLost)
        self._crash_kinds.add(type(error))
        log.error(
            "a batch of %d rows (%d tokens) failed: %s%s",
            len(batch.rows),
            batch.tokens,
            type(error).__name__,
            _raised_at(error) if new else "",
        )
        log.debug("it said: %r", error)


def _raised_at(error: BaseException) -> str:
    """The way to where it was raised, in lines of code: no values, no message."""
    lines = traceback.format_tb(error.__traceback__)
    return "\nTraceback (most recent call last):\n" + "".join(lines).rstrip()
