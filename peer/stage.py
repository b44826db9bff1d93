"""The sessions of one peer as a state machine: frames and results in, actions out.

No I/O, no torch, no clock: `peer/server.py` carries the actions out, the simulator runs the same
class. For each session the peer is one *stage*: it takes input from exactly the predecessor that
the client named at open, computes, and sends on to the successor. The head embeds token ids, the
tail chooses a token, tells the client and feeds the head: the ring (DESIGN 4.5), in which the
client only listens.

Who may say what (everything else is dropped, and unknown and foreign sessions answer alike):

    Open, Generate, Cancel, Close     the client that opened the session
    Tokens                            the client; the tail (at the head, same turn)
    Hidden                            the predecessor

A step of an older turn or epoch is late and dropped. The tail holds the last step of a prompt
back until it has been told how to sample that turn, since client and ring race.
"""

from __future__ import annotations

import array
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Protocol

from hexswarm.errors import RemoteProtocolError, SessionClosed, UsageError
from hexswarm.messages import (
    Cancel,
    Close,
    Failed,
    Generate,
    GoAway,
    Hidden,
    Logits,
    Message,
    Open,
    Opened,
    Refuse,
    Token,
    Tokens,
    neighbour,
)
from hexswarm.peer.cache import KvFull
from hexswarm.peer.steps import Activations, Result, Row, SessionKey, Step, TailPolicy
from hexswarm.records import DTYPES, PeerId, Sampling, Span
from hexswarm.wire import Frame

STEP, BULK = 0, 1
MAX_SESSIONS_PER_CLIENT = 256


class Ledger(Protocol):
    """KV leases; `peer/engine.py` is one."""

    def open(self, session: SessionKey, tokens: int) -> object: ...
    def extend(self, session: SessionKey, tokens: int) -> object: ...
    def close(self, session: SessionKey) -> bool: ...
    def expire(self) -> list[SessionKey]: ...


@dataclass(frozen=True, slots=True)
class Hosted:
    """What this peer serves."""

    peer: PeerId
    digest: str
    span: Span
    layers: int
    hidden: int


# --- actions ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Dial:
    """Have a link to `peer`, then report `dialled(session, epoch, ok)`."""

    session: SessionKey
    epoch: int
    peer: PeerId
    addresses: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Send:
    peer: PeerId
    message: Message
    payload: bytes | memoryview = b""
    lane: int = STEP


@dataclass(frozen=True, slots=True)
class Submit:
    """Give a step to the engine."""

    step: Step


@dataclass(frozen=True, slots=True)
class Drop:
    """Forget the steps of a session that have not been computed."""

    session: SessionKey


@dataclass(frozen=True, slots=True)
class Watch:
    """Begin (or with `on` false end) to depend on the life of `peer`."""

    peer: PeerId
    on: bool = True


Action = Dial | Send | Submit | Drop | Watch


_LOGITS = TailPolicy(Sampling(), logits=True)


@dataclass(slots=True)
class _Session:
    opened: Open
    client: PeerId
    head: bool
    tail: bool
    turn: int = 0
    cancelled: int = -1
    policy: TailPolicy | None = None
    policy_turn: int = -1
    produced: int = 0
    max_new: int = 0
    stop_ids: frozenset[int] = frozenset()
    held: list[Step] = field(default_factory=list)
    bulk_turn: int = -1
    """Pieces of this turn's prompt went by the bulk lane, and its end did not yet."""

    @property
    def key(self) -> SessionKey:
        return self.opened.session

    @property
    def epoch(self) -> int:
        return self.opened.epoch

    @property
    def span(self) -> Span:
        return self.opened.span

    @property
    def predecessor(self) -> PeerId | None:
        return neighbour(self.opened.predecessor)

    @property
    def successor(self) -> PeerId | None:
        return neighbour(self.opened.successor)

    def watched(self, me: PeerId) -> set[PeerId]:
        peers = {self.client, self.predecessor, self.successor} - {None, me}
        return {peer for peer in peers if peer is not None}


class StageTable:
    """All sessions in which this peer is a stage."""

    def __init__(self, hosted: Hosted, ledger: Ledger) -> None:
        self._hosted = hosted
        self._ledger = ledger
        self._sessions: dict[SessionKey, _Session] = {}
        self._draining = False

    def __len__(self) -> int:
        return len(self._sessions)

    @property
    def draining(self) -> bool:
        return self._draining

    # --- frames -----------------------------------------------------------------------------

    def on_frames(self, peer: PeerId, frames: Iterable[Frame], now: float) -> list[Action]:
        actions: list[Action] = []
        for frame in frames:
            actions += self.on_frame(peer, frame, now)
        return actions

    def on_frame(self, peer: PeerId, frame: Frame, now: float) -> list[Action]:
        match frame.message:
            case Open() as message:
                return self._open(peer, message)
            case Tokens() as message:
                return self._tokens(peer, message, frame.payload, now)
            case Hidden() as message:
                return self._hidden(peer, message, frame.payload, now)
            case Generate() as message:
                return self._generate(peer, message, frame.payload)
            case Cancel() as message:
                return self._cancel(peer, message)
            case Close(session=key):
                session = self._owned(peer, key)
                return self._end(session) if session else []
            case Failed(code="unknown") as message:
                return self._abandoned(peer, message)
        return []

    def _open(self, client: PeerId, message: Open) -> list[Action]:
        refusal = self._why_not(client, message)
        if refusal is None:
            held = self._sessions.get(message.session)
            try:
                if held is None:
                    self._ledger.open(message.session, message.kv_tokens)
                else:
                    self._ledger.extend(message.session, message.kv_tokens)
            except KvFull as error:
                refusal = ("full", f"KV is full: {error.cause}", error.retry_s)
            except (UsageError, RemoteProtocolError, SessionClosed) as error:
                refusal = ("invalid", error.cause, 0.0)
        if refusal is not None:
            refuse = Refuse(message.session, message.epoch, *refusal)
            return [Send(client, refuse)]
        return self._wire(client, message, held)

    def _why_not(self, client: PeerId, message: Open) -> tuple[str, str, float] | None:
        hosted = self._hosted
        held = self._sessions.get(message.session)
        if held is not None and (held.client != client or message.epoch < held.epoch):
            return "invalid", "the session is not open to you", 0.0
        if self._draining and held is None:
            return "draining", "the peer is about to leave", 0.0
        if message.digest != hosted.digest:
            return "model", "another model is served here", 0.0
        if message.first >= message.end or not hosted.span.covers(message.span):
            return "span", f"layers {hosted.span} are served here", 0.0
        if not message.successor and message.end < hosted.layers:
            return "invalid", "only the last stage may go without a successor", 0.0
        mine = sum(session.client == client for session in self._sessions.values())
        if held is None and mine >= MAX_SESSIONS_PER_CLIENT:
            return "full", f"{MAX_SESSIONS_PER_CLIENT} sessions are open for you", 5.0
        return None

    def _wire(self, client: PeerId, message: Open, held: _Session | None) -> list[Action]:
        me, actions = self._hosted.peer, list[Action]()
        session = _Session(
            opened=message,
            client=client,
            head=message.first == 0,
            tail=message.end == self._hosted.layers,
        )
        if held is not None:
            actions += [Watch(peer, on=False) for peer in held.watched(me)]
            session.turn, session.cancelled = held.turn, held.cancelled
            session.policy, session.policy_turn = held.policy, held.policy_turn
            session.produced, session.max_new = held.produced, held.max_new
            session.stop_ids, session.bulk_turn = held.stop_ids, held.bulk_turn
            if message.epoch == held.epoch:
                session.held = held.held
        self._sessions[message.session] = session
        actions += [Watch(peer) for peer in session.watched(me)]
        successor = session.successor
        if successor in (None, me):
            return [*actions, Send(client, self._granted(session))]
        assert successor is not None
        dial = Dial(message.session, message.epoch, successor, message.successor_addresses)
        return [*actions, dial]

    def dialled(self, key: SessionKey, epoch: int, ok: bool) -> list[Action]:
        """The way to the successor is open, or cannot be opened."""
        session = self._sessions.get(key)
        if session is None or session.epoch != epoch:
            return []
        if ok:
            return [Send(session.client, self._granted(session))]
        reason = f"cannot reach the next peer {session.opened.successor[-8:]}"
        refuse = Refuse(key, epoch, "unreachable", reason, 0.0)
        return [Send(session.client, refuse), *self._end(session)]

    def _granted(self, session: _Session) -> Opened:
        return Opened(session.key, session.epoch, session.opened.kv_tokens)

    # --- input --------------------------------------------------------------------------------

    def _tokens(self, peer: PeerId, message: Tokens, payload: bytes, now: float) -> list[Action]:
        session = self._fed(peer, message)
        if session is None:
            return self._unknown(peer, message.session, message.epoch)
        if not session.head or message.epoch != session.epoch:
            return []
        if not self._enter(session, message.turn, lead=peer == session.client):
            return []
        if not payload or len(payload) % 4:
            return self._fail(session, "input", "a prompt of whole uint32 ids was expected")
        return self._step(session, message, len(payload) // 4, _ids(payload), now)

    def _hidden(self, peer: PeerId, message: Hidden, payload: bytes, now: float) -> list[Action]:
        session = self._fed(peer, message)
        if session is None:
            return self._unknown(peer, message.session, message.epoch)
        if session.head or message.epoch != session.epoch or peer != session.predecessor:
            return []
        if not self._enter(session, message.turn, lead=True):
            return []
        size = message.count * self._hosted.hidden * DTYPES[message.dtype]
        if len(payload) != size:
            text = f"{message.count} activations have {size} bytes, not {len(payload)}"
            return self._fail(session, "input", text)
        activations = Activations(payload, message.dtype)
        return self._step(session, message, message.count, activations, now)

    def _fed(self, peer: PeerId, message: Tokens | Hidden) -> _Session | None:
        """The session, if `peer` takes part in it before us."""
        session = self._sessions.get(message.session)
        if session is None or peer not in (session.client, session.predecessor):
            return None
        return session

    def _enter(self, session: _Session, turn: int, *, lead: bool) -> bool:
        """Go on to `turn` if it is newer and the sender may begin one; False for late input."""
        if turn > session.turn and lead:
            session.turn = turn
            session.held.clear()
        return turn == session.turn and turn > session.cancelled

    def _step(
        self, session: _Session, message: Tokens | Hidden, count: int, payload: object, now: float
    ) -> list[Action]:
        step = Step(
            session=session.key,
            position=message.position,
            count=count,
            payload=payload,
            last=message.last,
            arrived_s=now,
            turn=message.turn,
            siblings=message.siblings,
            span=session.span,
            policy=session.policy if session.successor is not None else _LOGITS,
        )
        if session.tail and step.last and not self._told(session):
            if session.held:
                return self._fail(session, "input", "a turn has one last step")
            session.held.append(step)
            return []
        return [Submit(step)]

    def _told(self, session: _Session) -> bool:
        return session.successor is None or session.policy_turn == session.turn

    def _unknown(self, peer: PeerId, key: SessionKey, epoch: int) -> list[Action]:
        """Tell a sender of work that nobody does it."""
        reason = "no such session here (its lease may have ended)"
        return [Send(peer, Failed(key, epoch, "unknown", reason, self._hosted.peer))]

    def _abandoned(self, peer: PeerId, message: Failed) -> list[Action]:
        """The neighbour does not know the session any more; its client may not have heard."""
        session = self._sessions.get(message.session)
        if session is None or message.epoch != session.epoch or peer != session.successor:
            return []
        reason = f"{peer[-8:]} does not know the session any more"
        failed = Failed(session.key, session.epoch, "unknown", reason, peer)
        return [Send(session.client, failed)]

    # --- control ------------------------------------------------------------------------------

    def _owned(self, peer: PeerId, key: SessionKey) -> _Session | None:
        session = self._sessions.get(key)
        return session if session is not None and session.client == peer else None

    def _generate(self, peer: PeerId, message: Generate, payload: bytes) -> list[Action]:
        session = self._owned(peer, message.session)
        if session is None:
            return self._unknown(peer, message.session, message.epoch)
        if not session.tail or message.epoch != session.epoch:
            return []
        if message.turn < session.turn or message.turn <= session.cancelled:
            return []
        try:
            sampling = message.sampling
        except UsageError as error:
            return self._fail(session, "input", error.cause)
        if len(payload) % 4:
            return self._fail(session, "input", "a history of whole uint32 ids was expected")
        session.policy = TailPolicy(sampling, history=_ids(payload))
        session.policy_turn = message.turn
        session.produced, session.max_new = 0, message.max_new
        session.stop_ids = frozenset(message.stop_ids)
        if session.turn != message.turn:
            session.turn = message.turn
            session.held.clear()
        held, session.held = session.held, []
        return [Submit(replace(step, policy=session.policy)) for step in held]

    def _cancel(self, peer: PeerId, message: Cancel) -> list[Action]:
        session = self._owned(peer, message.session)
        if session is None or message.epoch != session.epoch:
            return []
        session.cancelled = max(session.cancelled, message.turn)
        if message.turn < session.turn:
            return []  # late: the next turn's input was faster, and stays
        session.held.clear()
        return [Drop(session.key)]

    # --- results ------------------------------------------------------------------------------

    def on_results(self, results: Iterable[Result], now: float) -> list[Action]:
        """What to do with a finished batch; frames for one neighbour stay together."""
        actions: list[Action] = []
        for result in results:
            session = self._sessions.get(result.row.session)
            if session is None:
                continue
            if result.error is not None:
                actions += self._fail(session, "engine", result.error[:200])
            elif result.row.turn == session.turn and result.row.turn > session.cancelled:
                actions += self._forward(session, result, now)
        return _number_siblings(actions)

    def _forward(self, session: _Session, result: Result, now: float) -> list[Action]:
        row = result.row
        here = (session.key, session.epoch, row.turn)
        if result.activations is not None and session.successor is not None:
            message = Hidden(*here, row.position, row.count, row.sample, result.activations.dtype)
            lane = self._lane(session, row)
            return [Send(session.successor, message, result.activations.data, lane)]
        position = row.position + row.count
        if result.logits is not None:
            return [Send(session.client, Logits(*here, position), result.logits)]
        if result.token is not None:
            return self._chosen(session, here, position, result.token, now)
        return []

    def _lane(self, session: _Session, row: Row) -> int:
        """Prompts go by the bulk lane to their very end, which must not overtake their pieces."""
        if row.count == 1 and row.sample and session.bulk_turn != row.turn:
            return STEP
        session.bulk_turn = -1 if row.sample else row.turn
        return BULK

    def _chosen(
        self,
        session: _Session,
        here: tuple[SessionKey, int, int],
        position: int,
        token: int,
        now: float,
    ) -> list[Action]:
        """The tail has a token: tell the client and close the ring."""
        session.produced += 1
        full = position >= session.opened.kv_tokens
        finish = "stop" if token in session.stop_ids else ""
        if not finish and (session.produced >= session.max_new or full):
            finish = "length"
        actions: list[Action] = [Send(session.client, Token(*here, position, token, finish))]
        if finish or session.successor is None:
            session.policy_turn = -1
            return actions
        if session.policy is not None:
            session.policy.history.append(token)
        feed = Tokens(*here, position, True)
        if session.successor != self._hosted.peer:
            return [*actions, Send(session.successor, feed, token.to_bytes(4, "little"))]
        return [*actions, *self._step(session, feed, 1, [token], now)]

    # --- ends ---------------------------------------------------------------------------------

    def on_lost(self, peer: PeerId) -> list[Action]:
        """A neighbour or client is gone: free what was the client's, report the rest to clients."""
        actions: list[Action] = []
        for session in list(self._sessions.values()):
            if session.client == peer:
                actions += self._end(session)
            elif peer in (session.successor, session.predecessor):
                reason = f"lost the neighbour {peer[-8:]}"
                failed = Failed(session.key, session.epoch, "lost", reason, peer)
                actions.append(Send(session.client, failed))
        return actions

    def expire(self) -> list[Action]:
        """End the leases that no step renewed."""
        actions: list[Action] = []
        for key in self._ledger.expire():
            session = self._sessions.get(key)
            if session is not None:
                actions += self._fail(session, "expired", "the lease ended without a step")
                actions += self._end(session)
        return actions

    def drain(self, exit_s: float) -> list[Action]:
        """Refuse new sessions and ask the clients of the open ones to go elsewhere."""
        self._draining = True
        clients = sorted({session.client for session in self._sessions.values()})
        return [Send(client, GoAway(exit_s)) for client in clients]

    def end_all(self) -> list[Action]:
        """Hand back what is still open."""
        actions: list[Action] = []
        for session in list(self._sessions.values()):
            actions += self._fail(session, "draining", "the peer leaves the swarm")
            actions += self._end(session)
        return actions

    def _fail(self, session: _Session, code: str, reason: str) -> list[Action]:
        failed = Failed(session.key, session.epoch, code, reason, self._hosted.peer)
        return [Send(session.client, failed)]

    def _end(self, session: _Session) -> list[Action]:
        self._sessions.pop(session.key, None)
        self._ledger.close(session.key)
        watched = sorted(session.watched(self._hosted.peer))
        return [Watch(peer, on=False) for peer in watched]


def _ids(payload: bytes) -> list[int]:
    """Little-endian uint32 token ids."""
    ids = array.array("I", payload)
    if sys.byteorder == "big":
        ids.byteswap()
    return ids.tolist()


def _number_siblings(actions: list[Action]) -> list[Action]:
    """Say in each step how many of the same batch follow to the same neighbour."""
    left: dict[PeerId, int] = {}
    numbered: list[Action] = []
    for action in reversed(actions):
        if isinstance(action, Send) and action.lane == STEP:
            action = _numbered(action, left)
        numbered.append(action)
    numbered.reverse()
    return numbered


def _numbered(send: Send, left: dict[PeerId, int]) -> Send:
    if not isinstance(send.message, Tokens | Hidden):
        return send
    follow = left.get(send.peer, 0)
    left[send.peer] = follow + 1
    return replace(send, message=replace(send.message, siblings=follow)) if follow else send
