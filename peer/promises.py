"""What this peer has promised: a step of a session is through here within so many seconds.

A client chooses a route on views that are seconds old, so a limit on the time per token that was
only predicted is broken as soon as others choose alike. The peer knows its own state: it refuses a
session whose promise it could not keep (*slow*), and any session, with a promise or without, that
would break what others were promised (*busy*). No coordination is needed: each promise concerns one
peer, and a client whose stages all promised has its limit, up to the ways between them.

*Expected* is what the router predicts of a stage (`router/cost.py`: `queue_s` plus the layers at
`rows` beside us, plus the head at the tail), with the rows that are about to come:

    compute = layers x (decode_layer_s + (rows + others) x row_layer_s) + head_s of the tail
    wait    = queue_s + others x layers / 2 x (row_layer_s + idle x decode_layer_s)

A row to come lengthens the batch beside us, and a step that arrives while it is computed waits for
half of it: that is its part alone in a batch that runs anyway, and a whole read of the weights on a
device that else were `idle`, for at least 1 - rows of the time.

*Rows to come.* The measured load is a mean over `WINDOW_S`, so a session that was opened t seconds
ago shows t / WINDOW_S of itself there, and the rest is added here: else a burst of opens would all
see an idle peer. A session counts as layers / layers of the model rows, the share of its ring that
it spends here if peers are alike and ways cost nothing; counting a whole row each was rejected, as
a peer with a tenth of the model would be full after a few sessions.

A session *rests* from the end of a turn (its client asks where the time went) to the next sign of
life, and its promise with it: else whoever thinks for long would keep a peer for himself, and a
client would stand in its own way that asks again at once. On waking it is not judged anew.

Promises are compared with a *mean*, while a client asks for a percentile and shares its slack out
over the stages: what is between the two is the room for chance, and for a few sessions more.
A promise that is broken already, because the owner of the machine started a game, lets nobody in
until its session ends. One who asks for just what an idle peer can do has it alone for as long as
the lease lasts: that is what the limit means, and why a route under a limit has its price.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Literal

from hexswarm.peer.load import WINDOW_S
from hexswarm.records import Load, Speed

ROOM = 1e-6
"""Relative room for floats that were added in another order, and for rounding on the wire."""

Code = Literal["slow", "busy"]


def expected_step_s(
    speed: Speed, load: Load, layers: int, *, tail: bool, more_rows: float = 1.0
) -> float:
    """Mean seconds of a decode step, wait and compute, with `more_rows` more than the load says.

    The session's own row is one of them: with 1 this is what the router predicts.
    """
    others = more_rows - 1
    compute_s = layers * (speed.decode_layer_s + (load.rows + others) * speed.row_layer_s)
    wait_s = load.queue_s + others * _wait_s(speed, load, layers)
    return wait_s + compute_s + (speed.head_s if tail else 0.0)


def _wait_s(speed: Speed, load: Load, layers: int) -> float:
    """What one row to come adds to the wait of the others."""
    idle = max(1 - load.rows, 0.0)
    return layers / 2 * (speed.row_layer_s + idle * speed.decode_layer_s)


@dataclass(frozen=True, slots=True)
class Breach:
    """Why a session is not admitted."""

    code: Code
    """slow: its own promise cannot be kept; busy: that of another."""
    reason: str

    def __str__(self) -> str:
        return self.reason


@dataclass(frozen=True, slots=True)
class _Held:
    """A session that was admitted."""

    layers: int
    tail: bool
    step_s: float
    """0: nothing was promised."""
    rows: float
    """How much of a row it is."""
    since_s: float

    def unseen(self, now: float) -> float:
        """Rows of it that the measured load does not contain yet."""
        return self.rows * max(0.0, 1 - max(0.0, now - self.since_s) / WINDOW_S)

    def expected_s(self, speed: Speed, load: Load, to_come: float, now: float) -> float:
        """A step of it, with the rows to come of all sessions, this one among them."""
        # Its own row is in the load, as far as it is seen, and does not stand beside itself.
        unseen = self.unseen(now)
        beside = replace(load, rows=max(load.rows - (self.rows - unseen), 0.0))
        more_rows = 1 + to_come - unseen
        return expected_step_s(speed, beside, self.layers, tail=self.tail, more_rows=more_rows)


class Promises:
    """The sessions open here with what they were promised; time never goes back."""

    def __init__(self, model_layers: int) -> None:
        self._model_layers = model_layers
        self._held: dict[Hashable, _Held] = {}
        self._resting: dict[Hashable, _Held] = {}

    def __len__(self) -> int:
        return len(self._held) + len(self._resting)

    def admit(
        self,
        session: Hashable,
        layers: int,
        tail: bool,
        step_s: float,
        speed: Speed,
        load: Load,
        now: float,
    ) -> Breach | None:
        """`judge`, and `hold` what may be promised; a breach leaves everything as it was."""
        breach = self.judge(session, layers, tail, step_s, speed, load, now)
        if breach is None:
            self.hold(session, layers, tail, step_s, now)
        return breach

    def hold(self, session: Hashable, layers: int, tail: bool, step_s: float, now: float) -> None:
        """Promise steps within `step_s` (0: no promise, yet a row), from now on."""
        self._held[session] = self._made(session, layers, tail, step_s, now)
        self._resting.pop(session, None)

    def rest(self, session: Hashable) -> None:
        """Until it wakes the session neither counts nor is it protected."""
        one = self._held.pop(session, None)
        if one is not None:
            self._resting[session] = one

    def wake(self, session: Hashable, now: float) -> None:
        """The session goes on, if it rested; the load has forgotten it."""
        one = self._resting.pop(session, None)
        if one is not None:
            self._held[session] = replace(one, since_s=now)

    def judge(
        self,
        session: Hashable,
        layers: int,
        tail: bool,
        step_s: float,
        speed: Speed,
        load: Load,
        now: float,
    ) -> Breach | None:
        """Why that cannot be promised; None if it can.

        A session that is held already is judged without what it holds.
        """
        made = self._made(session, layers, tail, step_s, now)
        others = [one for key, one in self._held.items() if key != session]
        to_come = made.unseen(now) + sum(one.unseen(now) for one in others)
        breach = _slow(made, made.expected_s(speed, load, to_come, now))
        return breach or _busy(others, speed, load, to_come, now)

    def release(self, session: Hashable) -> None:
        """The session ended, or never began."""
        self._held.pop(session, None)
        self._resting.pop(session, None)

    def foreseen(
        self, speed: Speed, load: Load, layers: int, now: float, *, without: Hashable = None
    ) -> Load:
        """The load with the rows to come, as a session of so many layers would find it.

        For a client to predict from what is expected here; `without` is its own session.
        """
        held = self._held.items()
        to_come = sum(one.unseen(now) for session, one in held if session != without)
        if not to_come:
            return load
        wait_s = to_come * _wait_s(speed, load, layers)
        return replace(load, queue_s=load.queue_s + wait_s, rows=load.rows + to_come)

    def _made(self, session: Hashable, layers: int, tail: bool, step_s: float, now: float) -> _Held:
        before = self._held.get(session)
        since_s = before.since_s if before is not None else now
        return _Held(layers, tail, step_s, layers / self._model_layers, since_s)


def _slow(made: _Held, expected_s: float) -> Breach | None:
    if not made.step_s or expected_s <= made.step_s * (1 + ROOM):
        return None
    asked, told = 1e3 * made.step_s, 1e3 * expected_s
    return Breach("slow", f"a step here takes {told:.1f} ms, not {asked:.1f}")


def _busy(
    others: list[_Held], speed: Speed, load: Load, to_come: float, now: float
) -> Breach | None:
    for one in others:
        if not one.step_s:
            continue
        expected_s = one.expected_s(speed, load, to_come, now)
        if expected_s > one.step_s * (1 + ROOM):
            promised, told = 1e3 * one.step_s, 1e3 * expected_s
            reason = f"another session was promised {promised:.1f} ms a step"
            return Breach("busy", f"{reason}, with one more it would be {told:.1f}")
    return None
