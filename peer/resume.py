"""What a stage sends to the next one: new outputs, what a newcomer lacks, and what was not heard.

Outputs enter the journal as they are sent on, and go out in three ways:

- *onward*, a row that was computed. After a repair the successor may have what this stage had to
  compute again (`send_from`): that is kept, but not sent, and a row that straddles is cut.
- *replay*, when the session goes on on a new route: what the successor lacks and the journal has.
  In large pieces, for a newcomer's prefill costs one read of the weights for each.
- *repeat*, when a step came twice: the same frames again, in the same cuts, since a stage compares
  what comes again with what came (`peer/order.py`). The tail says its token again to the client,
  and to nobody else: sent on, one frame too many would chase the session round the ring for ever.

What was sent before is sent again without computing anything, to a neighbour that the client names.
So that nobody can have a peer flood others, or choke the way between two that are honest,
`Allowance` bounds it for each session, client and neighbour and in all. Who goes beyond it is not
refused: the stage tells that it has no journal (`sendable`), and computes again what is to be sent.
"""

from __future__ import annotations

import math
from collections.abc import Hashable

from hexswarm.messages import Hidden, Resume
from hexswarm.peer.actions import BULK, STEP, Action, Send
from hexswarm.peer.journal import Journal, Piece
from hexswarm.peer.sessions import StageSession
from hexswarm.peer.steps import Activations, Row
from hexswarm.records import PeerId

REPLAY_BYTES = 256 << 10
"""Of one piece: a bulk lane that carries larger ones delays the prompts of others."""

REPEAT_BYTES = 4 << 20
"""So much of a turn is sent again on one route: a few bytes of ids, repeated by a client who means
ill, would else send megabytes of activations to an innocent neighbour, any number of times."""

AGAIN_S = 60.0
"""In this time one may have again sent so much of what was sent before:"""
REPLAYS = 4
"""times all that a session keeps,"""
CLIENT_BYTES = 256 << 20
"""of all sessions of one client,"""
NEIGHBOUR_BYTES = 192 << 20
"""to one neighbour: less than may wait for it before it counts as lost, with room for prompts,"""
ALL_BYTES = 384 << 20
"""and by this peer: less than may wait for all together."""
_FULL = 1 + 1e-9
"""A share, with room for rounding."""


class Allowance:
    """How much was sent again lately, as shares of what may be: buckets that leak.

    Of shares and not of bytes, since what a session keeps changes, and with it what it may have.
    """

    def __init__(self) -> None:
        self._used: dict[Hashable, tuple[float, float]] = {}
        """Share and time, the latest last."""

    def allows(self, session: StageSession, kept_bytes: int, size: int, now: float) -> bool:
        return max(self._after(session, kept_bytes, size, now).values()) <= _FULL

    def spend(self, session: StageSession, kept_bytes: int, size: int, now: float) -> bool:
        """Take `size` bytes of what is allowed; False, and nothing is taken, if it is too much."""
        after = self._after(session, kept_bytes, size, now)
        if max(after.values()) > _FULL:
            return False
        for name, used in after.items():
            self._used.pop(name, None)
            self._used[name] = used, now
        self._sweep(now)
        return True

    def lost(self, neighbour: PeerId) -> None:
        """Nothing waits for it any more."""
        self._used.pop(("to", neighbour), None)

    def __len__(self) -> int:
        return len(self._used)

    def _after(
        self, session: StageSession, kept_bytes: int, size: int, now: float
    ) -> dict[Hashable, float]:
        """The shares that would be used, by name."""
        most: dict[Hashable, int] = {
            ("session", session.key): REPLAYS * kept_bytes + REPEAT_BYTES,
            ("for", session.client): CLIENT_BYTES,
            ("to", session.successor): NEIGHBOUR_BYTES,
            "all": ALL_BYTES,
        }
        return {name: self._share(name, now) + size / limit for name, limit in most.items()}

    def _share(self, name: Hashable, now: float) -> float:
        used, at_s = self._used.get(name, (0.0, -math.inf))
        return max(0.0, used - (now - at_s) / AGAIN_S)

    def _sweep(self, now: float) -> None:
        """Forget what has leaked away; a share is at most one."""
        while self._used:
            name, (_, at_s) = next(iter(self._used.items()))
            if now - at_s <= AGAIN_S:
                return
            del self._used[name]


def kept_bytes(journal: Journal, session: StageSession) -> int:
    """How much could be sent again, if all rows are like the last."""
    first, end = journal.start(session.key), journal.end(session.key)
    return 0 if first is None else (end - first) * _row_bytes(journal, session)


def _row_bytes(journal: Journal, session: StageSession) -> int:
    end = journal.end(session.key)
    return sum(len(piece.data) for piece in journal.pieces(session.key, end - 1, end, 1 << 40))


def sendable(journal: Journal, allowance: Allowance, session: StageSession, now: float) -> int:
    """The first position from which the stage can send again; what is done, if it cannot."""
    done, first = session.order.done, journal.start(session.key)
    size = kept_bytes(journal, session)
    if first is None or not size or not allowance.allows(session, size, size, now):
        return done
    return min(first, done)


def afford(
    journal: Journal, allowance: Allowance, session: StageSession, message: Resume, now: float
) -> bool:
    """Take the replay that `message` wants from what is allowed, if it is."""
    rows = min(message.start, session.order.done) - message.send_from
    if session.tail or session.successor is None or rows <= 0:
        return True
    size = rows * _row_bytes(journal, session)
    return allowance.spend(session, kept_bytes(journal, session), size, now)


def onward(
    journal: Journal, session: StageSession, successor: PeerId, row: Row, outputs: Activations
) -> list[Action]:
    """Keep what was computed, and send on what the successor does not have."""
    key, turn, position, count = row.session, row.turn, row.position, row.count
    data, dtype = outputs.data, outputs.dtype
    journal.keep(key, position, count, data, dtype)
    if position < session.send_from:
        known = min(session.send_from - position, count)
        if known == count:
            return []
        data = memoryview(data)[known * (len(data) // count) :]
        position, count = position + known, count - known
    session.sent.append((position, count, row.sample))
    message = Hidden(key, session.epoch, turn, position, count, row.sample, dtype)
    return [Send(successor, message, data, session.lane(turn, count, row.sample))]


def why_not(journal: Journal, session: StageSession, message: Resume) -> str:
    """What a client takes for granted and is not so; empty if the session can go on like this."""
    done, kept = session.order.done, journal.start(session.key)
    if message.start > done:
        return f"a start at position {message.start} leaves a gap: {done} are cached"
    if message.start > message.end or message.end > session.opened.kv_tokens:
        return f"nothing goes on at position {message.start} of {message.end}"
    wanted = message.send_from < message.start and not session.tail
    if wanted and (kept is None or kept > message.send_from):
        return f"positions from {message.send_from} on are not in the journal"
    return ""


def replay(journal: Journal, session: StageSession) -> list[Action]:
    """Send the successor what it lacks of what was computed before the repair."""
    first, end = session.send_from, session.order.done
    successor = session.successor
    if successor is None or session.tail or first >= end:
        return []
    actions: list[Action] = []
    for piece in journal.pieces(session.key, first, end, REPLAY_BYTES):
        last = piece.position + piece.count == session.end
        session.sent.append((piece.position, piece.count, last))
        lane = session.lane(session.turn, piece.count, last)
        actions.append(_again(session, successor, piece, last, lane))
    return actions


def repeat(
    journal: Journal,
    allowance: Allowance,
    session: StageSession,
    position: int,
    count: int,
    now: float,
) -> list[Action]:
    """Answer a step that came again; nothing, while it is being computed."""
    if session.tail:
        token = session.answers.get(position + count)
        return [] if token is None else [Send(session.client, token)]
    actions: list[Action] = []
    successor = session.successor
    for first, tokens, last in session.sent:
        if successor is None or not position <= first < position + count:
            continue
        lane = STEP if tokens == 1 and last else BULK
        for piece in journal.pieces(session.key, first, first + tokens, 1 << 40):
            size = len(piece.data)
            session.repeated_bytes += size
            if piece.count != tokens or session.repeated_bytes > REPEAT_BYTES:
                continue
            if allowance.spend(session, kept_bytes(journal, session), size, now):
                actions.append(_again(session, successor, piece, last, lane))
    return actions


def _again(session: StageSession, successor: PeerId, piece: Piece, last: bool, lane: int) -> Action:
    here = (session.key, session.epoch, session.turn)
    message = Hidden(*here, piece.position, piece.count, last, piece.dtype)
    return Send(successor, message, piece.data, lane)
