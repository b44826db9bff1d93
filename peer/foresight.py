"""Rows that the device computes before anybody asked for them: a ring of one does not wait.

Where head and tail are one, a session's next step follows from its last token alone. The device has
that token before the host has: if the step began only when the token had been to the event loop,
told to the client and come back, the device would stand still meanwhile, 2 ms of every 10 with 64
sessions. So the engine puts the next row of such a session into the next batch by itself, with the
token where it lies. When the step comes, as always, it is recognised: it *claims* that row, and
what was computed, or is being computed, is its result.

    foreseen ── the batch before told its token ── claimed by its step ── the result goes out
        │                                              │ (or it waits here until it is claimed)
        └── void: another step came, the session ended, was cancelled, or its last token is wrong

A session that ends with that token has computed one row for nothing; it lay above the session's
cached length, in its own lease, where a later step writes again before it reads. Nothing else
depends on a row that nobody claimed, and only a claimed one has a successor. Whoever waits goes
first: rows are foreseen only for the room that those leave. On a CPU nothing is ever foreseen: what
is computed there has been read, too.

Rejected: letting the device run on for many tokens (a client that goes away pays for them, and new
sessions wait), and a second kind of step for rings of one (the stage would have to know of it).

Pure; the engine guards it with its lock.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hexswarm.errors import SessionClosed
from hexswarm.peer.cache import BlockTables
from hexswarm.peer.steps import Batch, Result, Row, SessionKey, Step


@dataclass(slots=True, eq=False)
class Ahead:
    """A foreseen row."""

    row: Row
    token: int | None = None
    """With which its step must come."""
    claimed: bool = False
    result: Result | None = None
    """Computed before it was claimed."""


class Foresight:
    """The foreseen rows that no step has claimed; one of a session at the most."""

    def __init__(self, cache: BlockTables) -> None:
        self._cache = cache
        self._ahead: dict[SessionKey, Ahead] = {}

    def __len__(self) -> int:
        return len(self._ahead)

    def foresee(self, batch: Batch, chosen: Mapping[int, Any], most: int) -> list[Ahead]:
        """What follows on `batch`, whose rows have `chosen` these inputs for their successors."""
        found: list[Ahead] = []
        for index, payload in chosen.items():
            if len(found) >= most:
                break
            if row := self._after(batch.rows[index], payload):
                found.append(Ahead(row))
                self._ahead[row.session] = found[-1]
        return found

    def _after(self, row: Row, payload: Any) -> Row | None:
        """The row after this, if all before it is wanted and its lease goes on."""
        session, position = row.session, row.position + row.count
        if session in self._ahead:
            return None
        try:
            lease, length = self._cache.lease_of(session), self._cache.length(session)
        except SessionClosed:
            return None
        if length != position or position >= lease.tokens:
            return None
        return Row(
            session=session,
            position=position,
            count=1,
            payload=payload,
            sample=True,
            blocks=lease.blocks,
            turn=row.turn,
            span=row.span,
            policy=row.policy,
            ready_s=math.inf,  # so far, nobody waits for it
            epoch=row.epoch,
        )

    def told(self, result: Result) -> None:
        """The row before it gave that: its step will come with the token, or not at all."""
        ahead = self._ahead.get(result.row.session)
        if ahead is None or ahead.row.position != result.row.position + result.row.count:
            return
        if result.token is None:
            self.forget(result.row.session)
        else:
            ahead.token = result.token

    def claim(self, step: Step) -> Ahead | None:
        """The row that computes this step already; else none will that was foreseen."""
        ahead = self._ahead.pop(step.session, None)
        if ahead is None or not _same(ahead, step):
            return None
        ahead.claimed = True
        return ahead

    def computed(self, ahead: Ahead, result: Result) -> bool:
        """It has been: True if somebody wants the result, now; else it may be wanted yet."""
        if not ahead.claimed and self._ahead.get(result.row.session) is ahead:
            ahead.result = result
            if result.error is not None:
                self.forget(result.row.session)
        return ahead.claimed

    def forget(self, session: SessionKey) -> None:
        """It will not be claimed."""
        self._ahead.pop(session, None)


def _same(ahead: Ahead, step: Step) -> bool:
    row = ahead.row
    return (
        ahead.token is not None
        and step.decode
        and list(step.payload) == [ahead.token]
        and (step.position, step.turn, step.epoch) == (row.position, row.turn, row.epoch)
        and step.span == row.span
        and step.policy is row.policy
    )
