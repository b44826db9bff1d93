"""The sessions of one peer as a state machine: frames and results in, actions out.

No I/O, no torch, no clock: `peer/server.py` carries the actions out, the simulator runs the same
class. For each session the peer is one *stage*: it takes input from exactly the predecessor that
the client named at open, computes, and sends on to the successor. The head embeds token ids, the
tail chooses a token, tells the client and feeds the head: the ring (DESIGN 4.5), in which the
client only listens.

Who may say what (everything else is dropped, and unknown and foreign sessions answer alike):

    Open, Generate, Cancel, Close     the client that opened the session
    Resume, AskProgress, Trace        likewise
    Tokens                            the client; the tail (at the head, same turn)
    Hidden                            the predecessor

A step, or a result, of an older turn or epoch is late and dropped; which step of this one is next
is decided in `peer/order.py`. The tail holds the last step of a prompt back until it has been told
how to sample that turn, since client and ring race; to other stages the same word tells only that
the session began. Whether a session may open, and how long it lives unused, is decided in
`peer/admission.py`; where its time goes is summed in `peer/tracing.py`.

When a stage is lost, its neighbours say so and wait for the client, as long as their leases last.
An `Open` of a higher epoch *rewires* the session: KV and journal stay, what is not done is
forgotten, and the session stands still; input that comes early is held back. `Resume` then says
where it goes on, and what the journal has to send first (`peer/resume.py`).

A client may name what its prompt begins with, and when it closes, what the talk was
(`hexswarm.prefix`). A stage says in `Opened.cached` how much of it is here from earlier sessions;
the prompt then begins at what *all* stages have, and the position of its first step tells each of
them where that is: it crops what it has beyond. There is nothing else to agree on.
"""

from __future__ import annotations

import contextlib
import math
import zlib
from collections.abc import Iterable
from dataclasses import replace

from hexswarm.errors import HexswarmError, UsageError
from hexswarm.messages import (
    AskProgress,
    Cancel,
    Close,
    Failed,
    Generate,
    GoAway,
    Hidden,
    Logits,
    Open,
    Progress,
    Resume,
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
from hexswarm.peer.admission import UNREACHABLE_S, Admission, Hosted, Ledger
from hexswarm.peer.journal import Journal
from hexswarm.peer.resume import Allowance, afford, onward, repeat, replay, sendable, why_not
from hexswarm.peer.sessions import StageSession
from hexswarm.peer.steps import Activations, Result, SessionKey, Step, TailPolicy, ids_of
from hexswarm.peer.tracing import UNMEASURED_S, Account
from hexswarm.prefix import NOTHING, Offer, unpack
from hexswarm.records import DTYPES, PeerId, Sampling
from hexswarm.wire import Frame

_LOGITS = TailPolicy(Sampling(), logits=True)


class StageTable:
    """All sessions in which this peer is a stage."""

    def __init__(self, hosted: Hosted, ledger: Ledger, journal: Journal | None = None) -> None:
        self.journal = Journal() if journal is None else journal
        self._hosted = hosted
        self._ledger = ledger
        self._admission = Admission(hosted, ledger)
        self._allowance = Allowance()
        self._sessions: dict[SessionKey, StageSession] = {}
        self._leaving: list[Account] = []
        """Of the decode steps in the batch that is being sent on."""
        self._finished_s = 0.0
        self._computed = 0

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
                return self._open(peer, message, frame.payload, now)
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
                return self._end(session, unpack(frame.payload)) if session else []
            case Resume() as message:
                return self._resume(peer, message, now)
            case AskProgress() as message:
                return self._progress(peer, message)
            case Trace() as message:
                return self._trace(peer, message)
            case Failed(code="unknown") as message:
                return self._abandoned(peer, message)
        return []

    def _open(self, client: PeerId, message: Open, payload: bytes, now: float) -> list[Action]:
        session = self._sessions.get(message.session)
        mine = sum(session.client == client for session in self._sessions.values())
        refuse = self._admission.admit(client, message, session, mine, now, unpack(payload))
        if refuse is not None:
            return [Send(client, refuse)]
        return self._wire(client, message, session, now)

    def _wire(
        self, client: PeerId, message: Open, held: StageSession | None, now: float
    ) -> list[Action]:
        me, layers, actions = self._hosted.peer, self._hosted.layers, list[Action]()
        session = held
        if session is None:
            head, tail = message.first == 0, message.end == layers
            session = StageSession(message, client, head, tail, standing=message.epoch > 0)
            session.order.know(self._admission.known(message.session))
            self._sessions[message.session] = session
        else:
            actions += [Watch(peer, on=False) for peer in session.watched(me)]
            if message.span != session.span:
                self.journal.drop(session.key)
            rewired = message.epoch > session.epoch
            session.rewire(message, layers)
            if rewired:
                actions.append(Drop(session.key, session.order.done))
        actions += [Watch(peer) for peer in session.watched(me)]
        successor = session.successor
        if successor in (None, me):
            return [*actions, self._opened(session, now)]
        assert successor is not None
        dial = Dial(message.session, message.epoch, successor, message.successor_addresses)
        return [*actions, dial]

    def _opened(self, session: StageSession, now: float) -> Send:
        """Grant, and say what is kept of the session: nothing, if it is new."""
        granted = self._admission.grant(session.opened, now)
        journal = sendable(self.journal, self._allowance, session, now)
        return Send(session.client, replace(granted, cached=session.order.done, journal=journal))

    def dialled(self, key: SessionKey, epoch: int, ok: bool, now: float) -> list[Action]:
        """The way to the successor is open, or cannot be opened."""
        session = self._sessions.get(key)
        if session is None or session.epoch != epoch:
            return []
        if ok:
            return [self._opened(session, now)]
        reason = f"cannot reach the next peer {session.opened.successor[-8:]}"
        # What was computed here outlives a replacement that cannot be reached.
        ended = [] if session.order.done else self._end(session)
        refuse = self._admission.refuse(session.opened, ("unreachable", reason, UNREACHABLE_S), now)
        return [Send(session.client, refuse), *ended]

    # --- input --------------------------------------------------------------------------------

    def _tokens(self, peer: PeerId, message: Tokens, payload: bytes, now: float) -> list[Action]:
        session = self._fed(peer, message)
        if session is None:
            return self._unknown(peer, message.session, message.epoch)
        if not session.head or message.epoch != session.epoch:
            return []
        if not session.admits(message.turn, lead=peer == session.client):
            return []
        if not payload or len(payload) % 4:
            return self._fail(session, "input", "a prompt of whole uint32 ids was expected")
        return self._take(session, peer, message, len(payload) // 4, payload, now)

    def _hidden(self, peer: PeerId, message: Hidden, payload: bytes, now: float) -> list[Action]:
        session = self._fed(peer, message)
        if session is None:
            return self._unknown(peer, message.session, message.epoch)
        if session.head or message.epoch != session.epoch or peer != session.predecessor:
            return []
        if not session.admits(message.turn, lead=True):
            return []
        size = message.count * self._hosted.hidden * DTYPES[message.dtype]
        if len(payload) != size:
            text = f"{message.count} activations have {size} bytes, not {len(payload)}"
            return self._fail(session, "input", text)
        return self._take(session, peer, message, message.count, payload, now)

    def _fed(self, peer: PeerId, message: Tokens | Hidden) -> StageSession | None:
        """The session, if `peer` takes part in it before us."""
        session = self._sessions.get(message.session)
        if session is None or peer not in (session.client, session.predecessor):
            return None
        return session

    def _take(
        self,
        session: StageSession,
        peer: PeerId,
        message: Tokens | Hidden,
        count: int,
        payload: bytes,
        now: float,
    ) -> list[Action]:
        """A step came in: begin with it if it is next."""
        order, position, last = session.order, message.position, message.last
        if session.standing or session.ahead(message.turn, position):
            if session.hold(peer, message, payload, count):
                return []
            return self._fail(session, "input", "more came than the session can have")
        digest, begins = zlib.crc32(payload), message.turn > session.turn
        verdict = order.judge(position, count, last, len(payload), digest, begins=begins)
        if verdict == "again":
            return repeat(self.journal, self._allowance, session, position, count, now)
        if verdict != "next":
            reason = order.complaint(verdict, position, count)
            return self._fail(session, verdict, reason) if reason else []
        if session.held and not begins:  # what waits of an older turn is forgotten with it
            return self._fail(session, "input", "a turn has one last step")
        actions = self._begin(session, message.turn) if begins else []
        if order.fresh:
            self.journal.crop(session.key, position)
        order.take(position, count, last, len(payload), digest)
        content = (
            ids_of(payload) if isinstance(message, Tokens) else Activations(payload, message.dtype)
        )
        actions += self._step(session, message, count, content, now)
        whole = session.early and order.received >= session.end
        return [*actions, *self._release(session, now)] if whole else actions

    def _release(self, session: StageSession, now: float) -> list[Action]:
        """Take what came too soon."""
        actions: list[Action] = []
        for sender, step, payload in session.release():
            actions += self.on_frame(sender, Frame(step, payload), now)
        return actions

    def _begin(self, session: StageSession, turn: int) -> list[Action]:
        """Go on to a newer turn; steps of the last one that wait are of no use any more."""
        waits = session.order.received > session.order.done
        session.begin(turn)
        return [Drop(session.key, session.order.done)] if waits else []

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
            epoch=session.epoch,
        )
        if session.tail and step.last and not session.told:
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
        if session.told_at == (session.epoch, message.turn):
            return []  # it comes again: what was chosen since then must count on
        try:
            sampling = message.sampling
        except UsageError as error:
            return self._fail(session, "input", error.cause)
        if len(payload) % 4:
            return self._fail(session, "input", "a history of whole uint32 ids was expected")
        session.tell(message, TailPolicy(sampling, history=ids_of(payload)))
        actions = self._begin(session, message.turn) if session.turn != message.turn else []
        held, session.held = session.held, []
        return [*actions, *(Submit(replace(step, policy=session.policy)) for step in held)]

    def _resume(self, peer: PeerId, message: Resume, now: float) -> list[Action]:
        """All stages of the new route are there: crop, send what the successor lacks, go on."""
        session = self._owned(peer, message.session)
        if session is None:
            return self._unknown(peer, message.session, message.epoch)
        if message.epoch != session.epoch or not session.standing:
            return []
        if not session.admits(message.turn, lead=True):
            return []
        refusal = why_not(self.journal, session, message)
        if refusal:
            return self._fail(session, "gap", refusal)
        if not afford(self.journal, self._allowance, session, message, now):
            return self._fail(session, "full", "too much was sent again lately")
        self._admission.commit(session.key, now)
        self._renew(session)
        if message.turn > session.turn:
            session.begin(message.turn)
        session.resume(message.start, message.send_from, message.end)
        self.journal.crop(session.key, message.start)
        again = replay(self.journal, session)
        return [Drop(session.key, message.start), *again, *self._release(session, now)]

    def _progress(self, peer: PeerId, message: AskProgress) -> list[Action]:
        session = self._owned(peer, message.session)
        if session is None:
            return self._unknown(peer, message.session, message.epoch)
        if message.epoch != session.epoch:
            return []
        self._renew(session)
        here, order = (session.key, session.epoch, message.nonce), session.order
        far = order.received, order.done, session.account.lately_s()
        return [Send(peer, Progress(*here, *far, self._computed))]

    def _renew(self, session: StageSession) -> None:
        """Its owner cares for it while it has to wait for others; the ledger bounds that."""
        with contextlib.suppress(HexswarmError):
            self._ledger.extend(session.key, session.opened.kv_tokens)

    def _cancel(self, peer: PeerId, message: Cancel) -> list[Action]:
        session = self._owned(peer, message.session)
        if session is None or message.epoch != session.epoch:
            return []
        session.cancelled = max(session.cancelled, message.turn)
        if message.turn < session.turn:
            return []  # late: the next turn's input was faster, and stays
        session.stop()
        return [Drop(session.key, session.order.done)]

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
            self._computed += result.error is None
            row = result.row
            session = self._sessions.get(row.session)
            if session is None or row.epoch != session.epoch:
                continue
            if row.turn != session.turn or row.turn <= session.cancelled:
                continue
            if result.error is not None:
                session.order.rewind(row.position)
                actions += self._fail(session, "engine", result.error[:200])
                continue
            if session.account.finished(result, now) and session.successor != me:
                self._leaving.append(session.account)
            session.order.done = row.position + row.count
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
        if result.activations is not None and session.successor is not None:
            return onward(self.journal, session, session.successor, row, result.activations)
        position = row.position + row.count
        if result.logits is not None:
            here = (session.key, session.epoch, row.turn)
            return [Send(session.client, Logits(*here, position), result.logits)]
        if result.token is not None:
            return self._chosen(session, position, result.token, now)
        return []

    def _chosen(self, session: StageSession, position: int, token: int, now: float) -> list[Action]:
        """The tail has a token: tell the client and close the ring."""
        message = session.choose(position, token)
        actions: list[Action] = [Send(session.client, message)]
        if message.finish or session.successor is None:
            return actions
        feed = Tokens(session.key, session.epoch, session.turn, position, True)
        if session.successor != self._hosted.peer:
            return [*actions, Send(session.successor, feed, token.to_bytes(4, "little"))]
        session.order.take(position, 1, True, 4, 0)
        return [*actions, *self._step(session, feed, 1, [token], now)]

    # --- ends ---------------------------------------------------------------------------------

    def on_lost(self, peer: PeerId) -> list[Action]:
        """A neighbour or client is gone: free what was the client's, report the rest to clients."""
        actions: list[Action] = []
        self._allowance.lost(peer)
        for session in list(self._sessions.values()):
            if session.client == peer:
                actions += self._end(session)
            elif peer in (session.successor, session.predecessor):
                reason = f"lost the neighbour {peer[-8:]}"
                failed = Failed(session.key, session.epoch, "lost", reason, peer)
                actions.append(Send(session.client, failed))
        return actions

    def expire(self, now: float) -> list[Action]:
        """End the leases that no step renewed, and what admission grants no longer."""
        actions: list[Action] = []
        for key in self._ledger.expire():
            actions += self._expired(key, "the lease ended without a step")
        for key, reason in self._admission.overdue(now):
            actions += self._expired(key, reason)
        return actions

    def _expired(self, key: SessionKey, reason: str) -> list[Action]:
        session = self._sessions.get(key)
        if session is None:
            return []
        return [*self._fail(session, "expired", reason), *self._end(session)]

    def drain(self, exit_s: float, now: float | None = None) -> list[Action]:
        """Refuse new sessions and ask the clients of the open ones to go elsewhere.

        With `now`, who is refused learns how soon the peer will be gone.
        """
        self._admission.drain(math.inf if now is None else now + exit_s)
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

    def _end(self, session: StageSession, offer: Offer = NOTHING) -> list[Action]:
        self._sessions.pop(session.key, None)
        self.journal.drop(session.key)
        self._admission.end(session, offer)
        watched = sorted(session.watched(self._hosted.peer))
        return [Watch(peer, on=False) for peer in watched]
