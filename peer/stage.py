"""The sessions of one peer as a state machine: frames and results in, actions out.

No I/O, no torch, no clock: `peer/server.py` carries the actions out, the simulator runs the same
class. For each session the peer is one *stage*: it takes input from exactly the predecessor that
the client named at open, computes, and sends on to the successor. The head embeds token ids, the
tail chooses a token, tells the client and feeds the head: the ring (DESIGN 4.5), in which the
client only listens.

Who may say what (everything else is dropped, and unknown and foreign sessions answer alike):

    Open, Generate, Cancel, Close, Trace    the client that opened the session
    Tokens                                  the client; the tail (at the head, same turn)
    Hidden                                  the predecessor

A step of an older turn or epoch is late and dropped. The tail holds the last step of a prompt
back until it has been told how to sample that turn, since client and ring race; to other stages
the same word tells only that the session began. Whether a session may open, and how long it lives
unused, is decided in `peer/admission.py`; where its time goes is summed in `peer/tracing.py`.
"""

from __future__ import annotations

import array
import sys
from collections.abc import Iterable
from dataclasses import replace

from hexswarm.errors import UsageError
from hexswarm.messages import (
    Cancel,
    Close,
    Failed,
    Generate,
    GoAway,
    Hidden,
    Logits,
    Open,
    Token,
    Tokens,
    Trace,
)
from hexswarm.peer.actions import (
    Action,
    Dial,
    Drop,
    Report,
    Send,
    Submit,
    Watch,
    number_siblings,
)
from hexswarm.peer.admission import RESERVE_S, Admission, Hosted, Ledger
from hexswarm.peer.sessions import StageSession
from hexswarm.peer.steps import Activations, Result, SessionKey, Step, TailPolicy
from hexswarm.peer.tracing import UNMEASURED_S, Account
from hexswarm.records import DTYPES, PeerId, Sampling
from hexswarm.wire import Frame

_LOGITS = TailPolicy(Sampling(), logits=True)


class StageTable:
    """All sessions in which this peer is a stage."""

    def __init__(self, hosted: Hosted, ledger: Ledger) -> None:
        self._hosted = hosted
        self._ledger = ledger
        self._admission = Admission(hosted, ledger)
        self._sessions: dict[SessionKey, StageSession] = {}
        self._leaving: list[Account] = []
        """Of the decode steps in the batch that is being sent on."""
        self._finished_s = 0.0

    def __len__(self) -> int:
        return len(self._sessions)

    @property
    def draining(self) -> bool:
        return self._admission.draining

    @property
    def expires_s(self) -> float:
        """When `expire` should be called again, at the latest, for the sake of reservations."""
        return self._admission.due_s

    # --- frames -----------------------------------------------------------------------------

    def on_frames(self, peer: PeerId, frames: Iterable[Frame], now: float) -> list[Action]:
        actions: list[Action] = []
        for frame in frames:
            actions += self.on_frame(peer, frame, now)
        return actions

    def on_frame(self, peer: PeerId, frame: Frame, now: float) -> list[Action]:
        match frame.message:
            case Open() as message:
                return self._open(peer, message, now)
            case Tokens() as message:
                return self._tokens(peer, message, frame.payload, now)
            case Hidden() as message:
                return self._hidden(peer, message, frame.payload, now)
            case Generate() as message:
                return self._generate(peer, message, frame.payload, now)
            case Cancel() as message:
                return self._cancel(peer, message)
            case Close(session=key):
                session = self._owned(peer, key)
                return self._end(session) if session else []
            case Trace() as message:
                return self._trace(peer, message)
            case Failed(code="unknown") as message:
                return self._abandoned(peer, message)
        return []

    def _open(self, client: PeerId, message: Open, now: float) -> list[Action]:
        session = self._sessions.get(message.session)
        mine = sum(session.client == client for session in self._sessions.values())
        refuse = self._admission.admit(client, message, session, mine, now)
        if refuse is not None:
            return [Send(client, refuse)]
        return self._wire(client, message, session, now)

    def _wire(
        self, client: PeerId, message: Open, held: StageSession | None, now: float
    ) -> list[Action]:
        me, actions = self._hosted.peer, list[Action]()
        session = StageSession(
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
            session.account = held.account
            if message.epoch == held.epoch:
                session.held = held.held
        self._sessions[message.session] = session
        actions += [Watch(peer) for peer in session.watched(me)]
        successor = session.successor
        if successor in (None, me):
            return [*actions, Send(client, self._admission.grant(message, now))]
        assert successor is not None
        dial = Dial(message.session, message.epoch, successor, message.successor_addresses)
        return [*actions, dial]

    def dialled(self, key: SessionKey, epoch: int, ok: bool, now: float) -> list[Action]:
        """The way to the successor is open, or cannot be opened."""
        session = self._sessions.get(key)
        if session is None or session.epoch != epoch:
            return []
        if ok:
            return [Send(session.client, self._admission.grant(session.opened, now))]
        reason = f"cannot reach the next peer {session.opened.successor[-8:]}"
        ended = self._end(session)
        refuse = self._admission.refuse(session.opened, ("unreachable", reason, 0.0), now)
        return [Send(session.client, refuse), *ended]

    # --- input --------------------------------------------------------------------------------

    def _tokens(self, peer: PeerId, message: Tokens, payload: bytes, now: float) -> list[Action]:
        session = self._fed(peer, message)
        if session is None:
            return self._unknown(peer, message.session, message.epoch)
        if not session.head or message.epoch != session.epoch:
            return []
        if not session.enter(message.turn, lead=peer == session.client):
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
        if not session.enter(message.turn, lead=True):
            return []
        size = message.count * self._hosted.hidden * DTYPES[message.dtype]
        if len(payload) != size:
            text = f"{message.count} activations have {size} bytes, not {len(payload)}"
            return self._fail(session, "input", text)
        activations = Activations(payload, message.dtype)
        return self._step(session, message, message.count, activations, now)

    def _fed(self, peer: PeerId, message: Tokens | Hidden) -> StageSession | None:
        """The session, if `peer` takes part in it before us."""
        session = self._sessions.get(message.session)
        if session is None or peer not in (session.client, session.predecessor):
            return None
        return session

    def _step(
        self,
        session: StageSession,
        message: Tokens | Hidden,
        count: int,
        payload: object,
        now: float,
    ) -> list[Action]:
        self._admission.commit(session.key, now)
        session.account.arrived_s = now
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
        if session.tail and step.last and not session.told:
            if session.held:
                return self._fail(session, "input", "a turn has one last step")
            session.held.append(step)
            return []
        return [Submit(step)]

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

    def _owned(self, peer: PeerId, key: SessionKey) -> StageSession | None:
        session = self._sessions.get(key)
        return session if session is not None and session.client == peer else None

    def _generate(
        self, peer: PeerId, message: Generate, payload: bytes, now: float
    ) -> list[Action]:
        session = self._owned(peer, message.session)
        if session is None:
            return self._unknown(peer, message.session, message.epoch)
        if message.epoch != session.epoch:
            return []
        self._admission.commit(session.key, now)
        if not session.tail:
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
            session.begin(message.turn)
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

    def _trace(self, peer: PeerId, message: Trace) -> list[Action]:
        session = self._owned(peer, message.session)
        if session is None or message.epoch != session.epoch:
            return []
        self._admission.rest(session.key)
        successor = session.successor
        known_s = 0.0 if successor == self._hosted.peer else UNMEASURED_S
        told = session.account.told(message, known_s)
        if successor in (None, self._hosted.peer):
            return [Send(peer, told)]
        assert successor is not None
        return [Report(peer, told, successor)]

    # --- results ------------------------------------------------------------------------------

    def on_results(self, results: Iterable[Result], now: float) -> list[Action]:
        """What to do with a finished batch; frames for one neighbour stay together."""
        actions: list[Action] = []
        self._leaving.clear()
        self._finished_s = now
        me = self._hosted.peer
        for result in results:
            session = self._sessions.get(result.row.session)
            if session is None:
                continue
            if result.error is not None:
                actions += self._fail(session, "engine", result.error[:200])
            elif result.row.turn == session.turn and result.row.turn > session.cancelled:
                if session.account.finished(result, now) and session.successor != me:
                    self._leaving.append(session.account)
                actions += self._forward(session, result, now)
        return number_siblings(actions)

    def sent(self, now: float) -> None:
        """The actions of `on_results` have been carried out: that, too, was time of their steps.

        Not of a ring of one, whose next step began when the last was computed.
        """
        for account in self._leaving:
            account.handle_s += now - self._finished_s
        self._leaving.clear()

    def _forward(self, session: StageSession, result: Result, now: float) -> list[Action]:
        row = result.row
        here = (session.key, session.epoch, row.turn)
        if result.activations is not None and session.successor is not None:
            message = Hidden(*here, row.position, row.count, row.sample, result.activations.dtype)
            lane = session.lane(row)
            return [Send(session.successor, message, result.activations.data, lane)]
        position = row.position + row.count
        if result.logits is not None:
            return [Send(session.client, Logits(*here, position), result.logits)]
        if result.token is not None:
            return self._chosen(session, here, position, result.token, now)
        return []

    def _chosen(
        self,
        session: StageSession,
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

    def expire(self, now: float) -> list[Action]:
        """End the leases that no step renewed, and the reservations that nothing followed."""
        actions: list[Action] = []
        for key in self._ledger.expire():
            actions += self._expired(key, "the lease ended without a step")
        for key in self._admission.overdue(now):
            actions += self._expired(key, f"nothing came within {RESERVE_S:.0f} s of its opening")
        return actions

    def _expired(self, key: SessionKey, reason: str) -> list[Action]:
        session = self._sessions.get(key)
        if session is None:
            return []
        return [*self._fail(session, "expired", reason), *self._end(session)]

    def drain(self, exit_s: float) -> list[Action]:
        """Refuse new sessions and ask the clients of the open ones to go elsewhere."""
        self._admission.draining = True
        clients = sorted({session.client for session in self._sessions.values()})
        return [Send(client, GoAway(exit_s)) for client in clients]

    def end_all(self) -> list[Action]:
        """Hand back what is still open."""
        actions: list[Action] = []
        for session in list(self._sessions.values()):
            actions += self._fail(session, "draining", "the peer leaves the swarm")
            actions += self._end(session)
        return actions

    def _fail(self, session: StageSession, code: str, reason: str) -> list[Action]:
        failed = Failed(session.key, session.epoch, code, reason, self._hosted.peer)
        return [Send(session.client, failed)]

    def _end(self, session: StageSession) -> list[Action]:
        self._sessions.pop(session.key, None)
        self._admission.end(session.key)
        watched = sorted(session.watched(self._hosted.peer))
        return [Watch(peer, on=False) for peer in watched]


def _ids(payload: bytes) -> list[int]:
    """Little-endian uint32 token ids."""
    ids = array.array("I", payload)
    if sys.byteorder == "big":
        ids.byteswap()
    return ids.tolist()
