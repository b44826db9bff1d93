"""Who gets a session at this stage, and how long a grant lasts that nobody uses.

A client opens all stages of a route at once, each on its own and in parallel. That is a commit in
one phase with a *reservation* in place of the second: what a stage grants is held for `RESERVE_S`
and is committed by the first sign that the session began (a step, or the client's `Generate`),
which every stage gets anyway or at the cost of one small frame. If any stage refuses, the client
closes the others in the same breath; if the client is lost, or its `Close` is, the reservations
end by themselves. A committed session then lives by its lease, which every step renews
(`peer/cache.py`). Rejected: a second round (prepare, then commit), which costs every request one
round trip to the farthest stage before its prompt may go; and the lease's own time for both, since
300 s of KV for nothing is what a crowd of clients that try several routes would fill a swarm with.

Asking again (a longer lease, another route) does not prolong a reservation: a client that only
ever asks holds nothing for longer than the rest of us would wait. Nor is it judged anew, as long as
it asks for the same: when another stage of its route was lost, the session lives on here with what
it was promised, and a peer that is busier by now must not make the loss larger.

One client may lease the whole pool as long as nobody else wants any of it: KV that lies idle helps
nobody, and most peers serve few. Once another was refused for want of KV, it *waits*, for as long
as it was told to and a little more, and meanwhile whoever holds more than `SHARE` of the pool gets
no more of it, and loses the sessions in which nothing happened for `IDLE_S`. So a pool in which
somebody squats is shared within half a minute, or is paid for in steps. Nothing that runs is taken
away. Identities are free: this is fairness between users, and against a botnet no defence.
Rejected: a fixed share (a lone user's long session would be refused by an idle peer), and taking
running sessions away (their work is lost, and is done again elsewhere).

Nothing is allocated for what was only asked: the pool is counted before anything else happens, and
`kv_tokens` of any size is a comparison.

What a client names of a prompt (`hexswarm.prefix`) is looked up for that client alone, for these
layers alone, and behind the same part of a route alone. A session that comes in on a new route in
mid-answer may find KV, but files none: what it is fed may come from a peer that is gone, out of a
journal, and so not from where its mark says.

Every answer tells the stage's load, with the sessions that it does not show yet
(`peer/promises.py`), so that a client which was refused knows more than before.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from hexswarm.errors import RemoteProtocolError, SessionClosed, UsageError
from hexswarm.messages import Open, Opened, Refuse
from hexswarm.peer.blocks import Name
from hexswarm.peer.cache import BLOCK_TOKENS
from hexswarm.peer.leases import KvFull, Lease, blocks_of
from hexswarm.peer.load import WINDOW_S
from hexswarm.peer.promises import Promises
from hexswarm.peer.sessions import StageSession
from hexswarm.peer.steps import SessionKey
from hexswarm.prefix import NOTHING, Offer
from hexswarm.records import Load, PeerId, Span, Speed

MAX_SESSIONS_PER_CLIENT = 256

RESERVE_S = 10.0
"""As long as a link may take to come about (`links.HELLO_S`): by then a client has heard from the
slowest of the stages that it opened together, whether that granted or not."""

SHARE = 0.5
"""Of the pool, for one client, while another waits for KV."""
IDLE_S = 30.0
"""So long may a session beyond the share rest while another waits."""
MAX_WAITING = 1024

AGAIN_S = WINDOW_S
"""When to ask again after a promise was refused: the load is another then."""
UNREACHABLE_S = 2.0
"""The same after a neighbour could not be dialled, which may have been a moment's trouble."""
LEAVING_S = 5.0
"""And of a peer that drains: by then somebody else may serve its layers, or it is back."""


class Ledger(Protocol):
    """KV leases and how busy the device is; `peer/engine.py` is one."""

    def open(
        self,
        session: SessionKey,
        tokens: int,
        names: Sequence[Name] = (),
        *,
        publish: bool = True,
    ) -> Lease: ...
    def extend(self, session: SessionKey, tokens: int) -> object: ...
    def close(self, session: SessionKey, names: Sequence[Name] = ()) -> bool: ...
    def expire(self) -> list[SessionKey]: ...
    def load_now(self, *, prompts: bool = True) -> Load: ...
    def speed_now(self) -> Speed | None: ...


@dataclass(frozen=True, slots=True)
class Hosted:
    """What this peer serves."""

    peer: PeerId
    digest: str
    span: Span
    layers: int
    hidden: int


@dataclass(slots=True)
class _Held:
    """What a session leases, and when it was last opened or stepped."""

    client: PeerId
    blocks: int
    used_s: float
    known: int = 0
    """Tokens whose KV was here when it came."""


Refusal = tuple[str, str, float]
"""Code, reason, seconds until it is worth asking again (0: never)."""


class Admission:
    """Grants, reserves and refuses; the KV itself is the ledger's."""

    def __init__(self, hosted: Hosted, ledger: Ledger) -> None:
        self.draining = False
        self._gone_s = math.inf
        """When the peer will have left, if it knows."""
        self._hosted = hosted
        self._ledger = ledger
        self._reserved: dict[SessionKey, float] = {}
        """When each reservation ends; in that order, since all last equally long."""
        self._promises = Promises(hosted.layers)
        self._held: dict[SessionKey, _Held] = {}
        self._blocks: Counter[PeerId] = Counter()
        """Of all sessions of a client."""
        self._waiting: dict[PeerId, float] = {}
        """Clients that were refused for want of KV, and until when they are waited for."""

    @property
    def due_s(self) -> float:
        """When the next reservation ends; never, if there is none."""
        return next(iter(self._reserved.values()), math.inf)

    def drain(self, gone_s: float = math.inf) -> None:
        """Let nobody in any more; the peer will be gone at `gone_s`."""
        self.draining, self._gone_s = True, gone_s

    def admit(
        self,
        client: PeerId,
        message: Open,
        held: StageSession | None,
        sessions: int,
        now: float,
        offer: Offer = NOTHING,
    ) -> Refuse | None:
        """Lease what is asked for; a refusal leaves everything as it was.

        `held` is the session if it is open already, `sessions` how many the client has here;
        `offer` names what a new one begins with.
        """
        promised = held is not None and _same(held, message)
        refusal = self._why_not(client, message, held, sessions, now)
        refusal = refusal or self._beyond_share(client, message, now)
        if refusal is None and not promised:
            refusal = self._breach(message, now)
        refusal = refusal or self._lease(client, message, held, now, offer)
        if refusal is not None:
            return self.refuse(message, refusal, now)
        if promised:  # it keeps that
            self._promises.wake(message.session, now)
        else:
            self._promises.hold(*self._asked(message), now)
        if held is None:
            self._reserved[message.session] = now + RESERVE_S
        return None

    def commit(self, session: SessionKey, now: float) -> None:
        """The session began, or goes on: from now on it lives as long as its lease."""
        self._reserved.pop(session, None)
        self._promises.wake(session, now)
        if (held := self._held.get(session)) is not None:
            held.used_s = now

    def rest(self, session: SessionKey) -> None:
        """A turn is over: what was promised waits for the next one."""
        self._promises.rest(session)

    def known(self, session: SessionKey) -> int:
        """Tokens of the session whose KV was here when it came."""
        return self._held[session].known if session in self._held else 0

    def end(self, session: StageSession, offer: Offer = NOTHING) -> None:
        """Free what the session holds; `offer` names what may be found by others of its client."""
        key, first = session.key, session.epoch == 0
        names = _names(session.client, session.opened, offer) if first else ()
        self._reserved.pop(key, None)
        self._promises.release(key)
        if (held := self._held.pop(key, None)) is not None:
            self._blocks[held.client] -= held.blocks
            if not self._blocks[held.client]:
                del self._blocks[held.client]
        self._ledger.close(key, names)

    def overdue(self, now: float) -> list[tuple[SessionKey, str]]:
        """Sessions not begun in time, or at rest on what others wait for, and the reason; `end`
        frees them."""
        late = []
        for session, due_s in self._reserved.items():
            if due_s > now:
                break
            late.append(session)
        waited = f"nothing came within {RESERVE_S:.0f} s of its opening"
        rested = f"it rested for {IDLE_S:.0f} s while others wait for KV"
        squatting = self._squatting(late, now)
        return [*((key, waited) for key in late), *((key, rested) for key in squatting)]

    def grant(self, message: Open, now: float) -> Opened:
        load = self._load(message, now)
        return Opened(message.session, message.epoch, message.kv_tokens, *_fields(load))

    def refuse(self, message: Open, refusal: Refusal, now: float) -> Refuse:
        code, reason, retry_s = refusal
        load = self._load(message, now)
        return Refuse(message.session, message.epoch, code, reason, retry_s, *_fields(load))

    def _load(self, message: Open, now: float) -> Load:
        """What there is beside the session, as far as is known."""
        layers = message.end - message.first
        load, speed = self._ledger.load_now(), self._ledger.speed_now()
        if speed is None:
            return load
        return self._promises.foreseen(speed, load, layers, now, without=message.session)

    def _why_not(
        self, client: PeerId, message: Open, held: StageSession | None, sessions: int, now: float
    ) -> Refusal | None:
        hosted = self._hosted
        if held is not None and (held.client != client or message.epoch < held.epoch):
            return "invalid", "the session is not open to you", 0.0
        if self.draining and held is None:
            retry_s = max(1.0, min(LEAVING_S, self._gone_s - now))
            return "draining", "the peer is about to leave", retry_s
        if message.digest != hosted.digest:
            return "model", "another model is served here", 0.0
        if message.first >= message.end or not hosted.span.covers(message.span):
            return "span", f"layers {hosted.span} are served here", 0.0
        if not message.successor and message.end < hosted.layers:
            return "invalid", "only the last stage may go without a successor", 0.0
        if held is None and sessions >= MAX_SESSIONS_PER_CLIENT:
            return "full", f"{MAX_SESSIONS_PER_CLIENT} sessions are open for you", 5.0
        return None

    def _asked(self, message: Open) -> tuple[SessionKey, int, bool, float]:
        """What is to be promised: to whom, for how many layers, with the head, and the seconds."""
        tail = message.end == self._hosted.layers
        return message.session, message.end - message.first, tail, message.step_s

    def _breach(self, message: Open, now: float) -> Refusal | None:
        """A peer that does not know its own speed promises nothing, and judges nobody."""
        speed = self._ledger.speed_now()
        if speed is None:
            return ("slow", "nothing can be promised here", 0.0) if message.step_s else None
        load = self._ledger.load_now(prompts=False)
        breach = self._promises.judge(*self._asked(message), speed, load, now)
        return None if breach is None else (breach.code, breach.reason, AGAIN_S)

    def _beyond_share(self, client: PeerId, message: Open, now: float) -> Refusal | None:
        """Who holds its share gets no more while others wait."""
        held = self._held.get(message.session)
        more = blocks_of(message.kv_tokens) - (0 if held is None else held.blocks)
        if more <= 0 or not self._others_wait(client, now):
            return None
        if self._blocks[client] + more <= SHARE * self._pool():
            return None
        return "full", f"others wait for KV, and {SHARE:.0%} of it is one client's share", AGAIN_S

    def _squatting(self, late: list[SessionKey], now: float) -> list[SessionKey]:
        """Of those who hold more than their share while others wait: what rests, longest first.

        So much that the share is left; what ends anyway (`late`) counts.
        """
        if not self._waiting:
            return []
        surplus = {client: blocks - SHARE * self._pool() for client, blocks in self._blocks.items()}
        for session in late:
            surplus[self._held[session].client] -= self._held[session].blocks
        found = []
        for session, held in sorted(self._held.items(), key=lambda item: item[1].used_s):
            if now - held.used_s < IDLE_S:
                break
            beyond = surplus[held.client] > 0 and session not in late
            if beyond and self._others_wait(held.client, now):
                surplus[held.client] -= held.blocks
                found.append(session)
        return found

    def _others_wait(self, client: PeerId, now: float) -> bool:
        for other, until_s in list(self._waiting.items()):
            if until_s < now:
                del self._waiting[other]
        return any(other != client for other in self._waiting)

    def _pool(self) -> int:
        """Blocks in all."""
        free = self._ledger.load_now(prompts=False).free_kv_tokens // BLOCK_TOKENS
        return free + self._blocks.total()

    def _wait(self, client: PeerId, retry_s: float, now: float) -> None:
        self._waiting.pop(client, None)
        if retry_s:
            self._waiting[client] = now + retry_s + AGAIN_S
        if len(self._waiting) > MAX_WAITING:
            del self._waiting[next(iter(self._waiting))]

    def _lease(
        self,
        client: PeerId,
        message: Open,
        held: StageSession | None,
        now: float,
        offer: Offer,
    ) -> Refusal | None:
        asked, known = (message.session, message.kv_tokens), 0
        try:
            if held is None:
                names, first = _names(client, message, offer), message.epoch == 0
                known = self._ledger.open(*asked, names, publish=first).known
            else:
                self._ledger.extend(*asked)
        except KvFull as error:
            self._wait(client, error.retry_s, now)
            return "full", f"KV is full: {error.cause}", error.retry_s
        except (UsageError, RemoteProtocolError, SessionClosed) as error:
            return "invalid", error.cause, 0.0
        self._waiting.pop(client, None)
        self._count(client, message, now, known)
        return None

    def _count(self, client: PeerId, message: Open, now: float, known: int) -> None:
        """A block that several sessions read counts for each: so nobody gets more by it."""
        blocks = blocks_of(message.kv_tokens)
        held = self._held.setdefault(message.session, _Held(client, 0, now, known))
        self._blocks[client] += max(0, blocks - held.blocks)
        held.blocks = max(held.blocks, blocks)


def _same(held: StageSession, message: Open) -> bool:
    """It asks for a longer lease, or for another route with the same part here."""
    if held.epoch == message.epoch:
        return True
    # By its numbers: nobody has looked yet whether they are a span.
    part = (held.opened.first, held.opened.end, held.opened.step_s)
    return part == (message.first, message.end, message.step_s)


def _names(client: PeerId, message: Open, offer: Offer) -> tuple[Name, ...]:
    """What the blocks are called here: nobody else, and no other part of the model, has these."""
    whose = client, message.first, message.end, offer.mark
    return tuple((whose, name) for name in offer.hashes)


def _fields(load: Load) -> tuple[float, float, float, int]:
    return load.queue_s, load.rows, load.busy, load.free_kv_tokens
