"""What a stage sends to the next one: new outputs, what a newcomer lacks, and what was not heard.

Outputs enter the journal as they are sent on, and go out in three ways:

- *onward*, a row that was computed. After a repair the successor may have what this stage had to
  compute again (`send_from`): that is kept, but not sent, and a row that straddles is cut.
- *replay*, when the session goes on on a new route: what the successor lacks and the journal has.
  In large pieces, for a newcomer's prefill costs one read of the weights for each.
- *repeat*, when a step came twice: the same frames again, in the same cuts, since a stage compares
  what comes again with what came (`peer/order.py`). The tail says its token again to the client,
  and to nobody else: sent on, one frame too many would chase the session round the ring for ever.
"""

from __future__ import annotations

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


def repeat(journal: Journal, session: StageSession, position: int, count: int) -> list[Action]:
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
            session.repeated_bytes += len(piece.data)
            if piece.count == tokens and session.repeated_bytes <= REPEAT_BYTES:
                actions.append(_again(session, successor, piece, last, lane))
    return actions


def _again(session: StageSession, successor: PeerId, piece: Piece, last: bool, lane: int) -> Action:
    here = (session.key, session.epoch, session.turn)
    message = Hidden(*here, piece.position, piece.count, last, piece.dtype)
    return Send(successor, message, piece.data, lane)
