"""One session's life on the client's side, as a state machine: events in, instructions out.

    opening ──all stages say Opened──▶ idle ──generate──▶ running ──last token──▶ idle ─▶ closed
       └── Refuse, lost peer ───────────┴──────▶ failed    │   ▲
                                               ▲        Broken Mended
                                               │           ▼   │
                                               └─give_up─ broken ──reroute──▶ rewiring

A session is a route plus KV at each of its stages. A *turn* sends token ids to the head, tells the
tail how to choose, and then only listens: the ring feeds itself. Several turns reuse the KV; a
turn that starts below the cached length crops it, so the only state kept between turns is the list
of token ids whose KV the stages hold.

All stages are asked at once, and what each grants is at first a reservation of some seconds
(`hexswarm.peer.admission`): whoever does not begin soon blocks nobody. The first turn therefore
speaks to every stage: the head gets ids and the others `Generate`, because a stage in the middle
would hear of a long prompt only when those before it have computed some of it. The first refusal
ends the session: waiting for what the others say would cost time and no route would come of it.
Refusals that cross it on the way are remembered in `refusing`, so that the next route avoids all.

*What the stages have already* of the prompt, from earlier sessions of this client, is not sent: the
session is opened with the prompt's names (`hexswarm.prefix`), and `cached` is then what the stages
all have, before any turn. When it ends they are told the names of the whole talk, for the next one.

*A loss in a running turn* does not end it. The machine says `Broken` and stands still until its
owner gives it another route (`reroute`) or gives up. With the route the epoch rises: every stage
gets a new `Open`. Those that stay are rewired and keep their KV and journal, newcomers lease KV,
and whoever left gets a `Close`. Each says how far it is, `hexswarm.resume` plans from that where
each goes on, and the head gets the ids that it lacks. More losses meanwhile (the replacement dies,
too) only say `Broken` again. Stages that are well may be replaced in the same way (`reroute` with
nobody broken): one that drains, one that is slow; also a peer that shall serve another span of the
new route, which then begins anew.

No token is told twice or left out, for each is taken only at the position that comes next. A tail
that stays may have sent some before it heard of the new epoch: they precede its `Opened` on the
same lane and count; what an abandoned tail sends does not. A tail may also repeat an answer, if the
network repeated the question: it is passed over. If the turn ends during a repair (its last token
was under way, or the caller cancels), the session ends with it, as a loss between turns ends it:
there is nothing to continue, and the next turn opens a new one.

What may be our own fault (an engine that fails on our input) breaks the stage once; if it meets
another peer at the same position it fails the session.

Nothing here reads a clock, opens a stream or knows asyncio: `swarm/runtime.py` carries the
instructions out, the simulator runs the same class on virtual time.
"""

from __future__ import annotations

from collections.abc import Sequence

from hexswarm import blame, orders
from hexswarm.errors import (
    HexswarmError,
    LocalProtocolError,
    PeerLost,
    Refused,
    RemoteProtocolError,
    SessionClosed,
)
from hexswarm.instructions import Broken as Broken
from hexswarm.instructions import Connect as Connect
from hexswarm.instructions import Draining as Draining
from hexswarm.instructions import Emit as Emit
from hexswarm.instructions import EmitLogits as EmitLogits
from hexswarm.instructions import EmitProgress as EmitProgress
from hexswarm.instructions import EmitTraces as EmitTraces
from hexswarm.instructions import Fail as Fail
from hexswarm.instructions import Instruction as Instruction
from hexswarm.instructions import Mend as Mend
from hexswarm.instructions import Mended as Mended
from hexswarm.instructions import Ready as Ready
from hexswarm.instructions import Send as Send
from hexswarm.instructions import Turn as Turn
from hexswarm.messages import (
    AskProgress,
    Cancel,
    Close,
    Failed,
    GoAway,
    Logits,
    Open,
    Opened,
    Progress,
    Refuse,
    Resume,
    Token,
    Trace,
    Traced,
)
from hexswarm.orders import ids_to_bytes as ids_to_bytes
from hexswarm.prefix import BLOCK_TOKENS, Namer
from hexswarm.records import PeerId, Route, Stage
from hexswarm.resume import Held, Known
from hexswarm.wire import Frame

_DOUBTFUL = ("engine", "input")
"""Failures that may come from what we sent."""


class Session:
    """The stages of one route, opened for one client."""

    def __init__(
        self,
        key: bytes,
        route: Route,
        digest: str,
        kv_tokens: int,
        *,
        client_loop: bool = False,
        budgets: Sequence[float] = (),
        namer: Namer | None = None,
        prompt: Sequence[int] = (),
    ) -> None:
        """`budgets` are the seconds that each stage is asked to promise (none: no promises).

        `prompt` is what the first turn will say; with a `namer` the stages are asked for its KV.
        """
        self.key = key
        self.route = route
        self.kv_tokens = kv_tokens
        self.epoch = 0
        self.turn = -1
        self.running = False
        self.failed: HexswarmError | None = None
        self.refusing: set[PeerId] = set()
        """Peers that refused the session or could not be reached for it, also after it failed."""
        self.too_slow: set[PeerId] = set()
        """Those of them that cannot promise what was asked, and would for a looser limit."""
        self.traced: dict[PeerId, Traced] = {}
        """What the stages have answered to the last `trace`."""
        self.progress: dict[PeerId, Progress] = {}
        """What the stages have answered to the last `ask_progress`."""
        self.broken: dict[PeerId, HexswarmError] = {}
        """Stages of the running turn without which it must go on, and why."""
        self.mending = False
        """Since a loss, or a `reroute` without one, until the stages have been told to go on."""
        self.mends: tuple[Mend, ...] = ()
        self._digest = digest
        self._client_loop = client_loop
        self._budgets = tuple(budgets) or (0.0,) * len(route.stages)
        self._namer, self._prompt = namer, tuple(prompt)
        self.named = 0
        """Stages may share the blocks of so many ids: a turn that goes back there goes back to the
        beginning of a block."""
        self._traces = self._questions = 0
        self._granted: dict[PeerId, Held] = {}
        self._was_open = False
        self._draining: set[PeerId] = set()
        self._turn: Turn
        """The one that runs, or ran last."""
        self.awaited = False
        """Client loop: the logits behind `cached` have not come yet."""
        self._known = Known()
        self._lost: list[PeerId] = []
        """Whom the repair in progress replaces."""
        self._tail_since = 0
        """The epoch in which the tail joined."""
        self._doubt: tuple[int, PeerId, int] | None = None
        """Position, peer and epoch of the last failure that may have come from what we sent."""

    @property
    def name(self) -> str:
        """What people call the session: too short to speak for it, long enough to find it."""
        return self.key[:4].hex()

    @property
    def cached(self) -> list[int]:
        """Ids whose KV every stage is known to hold, once no turn runs."""
        return self._known.ids

    @property
    def open(self) -> bool:
        return self.failed is None and len(self._granted) == len(self.route.stages)

    @property
    def leaving(self) -> bool:
        """A stage drains: the session ends when no turn runs."""
        return bool(self._draining)

    @property
    def silent(self) -> list[Stage]:
        """Stages that have neither granted nor refused yet, from the head on."""
        return [stage for stage in self.route.stages if stage.peer not in self._granted]

    # --- the caller's wishes ---------------------------------------------------------------------

    def start(self) -> list[Instruction]:
        """Open all stages at once."""
        self._granted.clear()
        offers = self._offers(self._prompt[:-1])  # the last one is computed in any case
        return [Connect(*opening, offers[opening[0].peer]) for opening in self._openings()]

    def extend(self, kv_tokens: int) -> list[Instruction]:
        """Ask all stages for a longer lease; `Ready` tells when they have granted it."""
        self._check_idle()
        self.kv_tokens = kv_tokens
        self._granted.clear()
        return [Send(stage.peer, message) for stage, message in self._openings()]

    def generate(self, turn: Turn) -> list[Instruction]:
        """Begin a turn. The caller made sure that the lease is long enough."""
        self._check_idle()
        if not turn.ids or turn.position > len(self.cached):
            raise LocalProtocolError("a turn adds tokens, right behind or inside what is cached")
        if self.turn < 0 and self.named and turn.ids != self._prompt[turn.position :]:
            raise LocalProtocolError("the first turn says what the session was opened for")
        self.turn += 1
        self.running = self.awaited = True
        self._turn = turn
        self._known.begin(turn.position, turn.ids)
        instructions: list[Instruction] = []
        if not self._client_loop:
            instructions.append(self._policy(turn.max_new, turn.history))
        if self.turn == 0:
            instructions += self._commit()
        return [*instructions, *self._feed(turn.position, turn.ids)]

    def feed(self, token: int) -> list[Instruction]:
        """Client loop: the chosen token; its logits come back."""
        if self.failed is not None:
            return []  # the listener learns from its next event
        position = len(self.cached)
        self.cached.append(token)
        self.awaited = True
        if self.mending:
            return []  # the head gets it when the stages go on
        return [*self._feed(position, (token,))]

    def cancel(self) -> list[Instruction]:
        """End the running turn and keep the KV of what is known to be computed."""
        if not self.running or self.failed is not None:
            return []
        self.running = False
        self._known.cancel()
        told = Emit(None, len(self.cached), "cancelled")
        if self.mending:
            return [told, *self._leave()]
        cancel = Cancel(self.key, self.epoch, self.turn)
        return [*(Send(stage.peer, cancel) for stage in self.route.stages), told]

    def trace(self) -> list[Instruction]:
        """Ask all stages where the time of the last turn went."""
        self.traced = {}
        self._traces += 1  # so that a late answer is not taken for one to this question
        if self.failed is not None:
            return []
        question = Trace(self.key, self.epoch, self._traces)
        return [Send(stage.peer, question) for stage in self.route.stages]

    def ask_progress(self) -> list[Instruction]:
        """Ask the stages that are not broken how far they are."""
        self.progress = {}
        self._questions += 1
        if self.failed is not None:
            return []
        question = AskProgress(self.key, self.epoch, self._questions)
        return [Send(peer, question) for peer in self._well()]

    def close(self, *, keep: bool = True) -> list[Instruction]:
        """Free everything at the stages; if `keep`, the next session may find what was said."""
        well = self.failed is None and not self.running and self.epoch == 0
        offers = self._offers(self.cached if keep and well else ())
        self.failed = self.failed or SessionClosed("the session was closed")
        self.running = self.mending = False
        return [Send(peer, Close(self.key), offers[peer]) for peer in self._peers()]

    # --- the wishes of whoever plans routes ------------------------------------------------------

    def suspect(self, peer: PeerId, error: HexswarmError) -> list[Instruction]:
        """A stage of the running turn is to be done without, as if its link were lost."""
        if not self.running or peer not in self._peers():
            return []
        return self._break(peer, error)

    def reroute(self, route: Route, budgets: Sequence[float] = ()) -> list[Instruction]:
        """Let the running turn go on along `route`.

        Stages that stay (same peer, same span, not broken) keep what they have. A broken peer may
        be in `route` again: it is asked what it still has. Raises LocalProtocolError if no turn
        runs or `route` is not for this model.
        """
        if self.failed is not None:
            return []  # the listener learns from its next event
        self._check_reroute(route, budgets)
        before = {stage.peer: stage.span for stage in self.route.stages}
        same = {stage.peer for stage in route.stages if before.get(stage.peer) == stage.span}
        kept = same - set(self.broken)
        self._lost += [peer for peer in before if peer not in kept and peer not in self._lost]
        self.epoch += 1
        if route.tail.peer not in kept:
            self._tail_since = self.epoch
        self.route, self.mending = route, True
        self._budgets = tuple(budgets) or (0.0,) * len(route.stages)
        self._draining &= kept
        self._granted.clear()
        self.broken.clear()
        made: list[Instruction] = [Send(p, Close(self.key)) for p in before if p not in same]
        offers = self._offers(self.cached[:-1])
        for stage, message in self._openings():
            # A link to one that stays exists; if not, that is a loss and no reason to dial.
            known = stage.peer in kept
            dial = Connect(stage, message, offers[stage.peer])
            made.append(Send(stage.peer, message) if known else dial)
        return made

    def give_up(self, error: HexswarmError) -> list[Instruction]:
        """End the session because no other route can be had."""
        return [] if self.failed is not None else self._fail(error)

    # --- what happens ----------------------------------------------------------------------------

    def on_frame(self, peer: PeerId, frame: Frame) -> list[Instruction]:
        if peer not in self._peers():
            return []
        if isinstance(frame.message, Refuse) and frame.message.epoch == self.epoch:
            self.refusing.add(blame.blocking(self.route, peer, frame.message).peer)
            if frame.message.code == "slow":
                self.too_slow.add(peer)
        if self.failed is not None or peer in self.broken:
            return []
        match frame.message:
            case Token() as message if self._current(peer, message):
                return self._on_token(peer, message)
            case Logits() as message if self._current(peer, message):
                return self._on_logits(peer, message, frame.payload)
            case GoAway(exit_s=exit_s):
                return self._on_leaving(peer, exit_s)
            case Opened() | Refuse() | Failed() | Traced() | Progress() as message:
                if message.epoch == self.epoch:
                    return self._on_answer(peer, message)
        return []

    def on_lost(self, peer: PeerId, how: str) -> list[Instruction]:
        """The link to a peer ended, or could not be made."""
        if peer not in self._peers():
            return []
        if not self._was_open:
            self.refusing.add(peer)
        if self.failed is not None:
            return []
        return self._lose(peer, blame.lost(self.route, peer, how))

    # --- inside: what is sent --------------------------------------------------------------------

    def _peers(self) -> list[PeerId]:
        return [stage.peer for stage in self.route.stages]

    def _well(self) -> list[PeerId]:
        return [peer for peer in self._peers() if peer not in self.broken]

    def _openings(self) -> list[tuple[Stage, Open]]:
        made = orders.openings(
            *(self.key, self.epoch, self._digest, self.route, self.kv_tokens, self._budgets),
            client_loop=self._client_loop,
        )
        return list(zip(self.route.stages, made, strict=True))

    def _offers(self, ids: Sequence[int]) -> dict[PeerId, bytes]:
        """How `ids` are named towards each stage."""
        if self._namer is not None:
            self.named = max(self.named, len(ids) - len(ids) % BLOCK_TOKENS)
        return orders.offers(self._namer, self.route, ids)

    def _policy(self, max_new: int, history: Sequence[int]) -> Send:
        message = orders.policy(self.key, self.epoch, self.turn, self._turn, max_new)
        wanted = history if self._turn.sampling.repetition_penalty != 1.0 else ()
        return Send(self.route.tail.peer, message, ids_to_bytes(wanted))

    def _commit(self) -> list[Instruction]:
        """Tell the stages that neither ids nor policy reach that their reservation is used."""
        told = {self.route.head.peer} | (set() if self._client_loop else {self.route.tail.peer})
        turn = self._turn
        message = orders.policy(self.key, self.epoch, self.turn, turn, turn.max_new)
        return [Send(peer, message) for peer in self._peers() if peer not in told]

    def _feed(self, position: int, ids: Sequence[int]) -> list[Send]:
        here = (self.key, self.epoch, max(self.turn, 0))
        return orders.feeding(self.route.head.peer, here, position, ids)

    def _resume(self) -> list[Instruction]:
        """All stages of the new route have said what they hold: tell them how to go on."""
        end = len(self.cached)
        held = [self._granted[peer] for peer in self._peers()]
        parts = self._known.resume(held, self.named)
        made: list[Instruction] = []
        if not self._client_loop:
            left = self._turn.max_new - (end - self._turn.end)
            made.append(self._policy(max(0, left), self.cached))
        for peer, part in zip(self._peers(), parts, strict=True):
            where = (self.turn, part.start, part.send_from, end)
            made.append(Send(peer, Resume(self.key, self.epoch, *where)))
        made += self._feed(parts[0].start, self.cached[parts[0].start :])
        self.mends += (Mend(tuple(self._lost), end, self.epoch),)
        self._lost.clear()
        self.mending = False
        return [*made, Mended(self.epoch)]

    # --- inside: what is heard -------------------------------------------------------------------

    def _check_idle(self) -> None:
        if self.failed is not None:
            raise SessionClosed("the session has ended", remedy="open a new one") from self.failed
        if self.running:
            raise SessionClosed("the session is busy with a turn", remedy="wait for its end")

    def _check_reroute(self, route: Route, budgets: Sequence[float]) -> None:
        if not self.running:
            raise LocalProtocolError("only a running turn is rerouted")
        if route.tail.span.end != self.route.tail.span.end:
            raise LocalProtocolError("the new route has another number of layers")
        if budgets and len(budgets) != len(route.stages):
            raise LocalProtocolError("each stage of the new route needs its budget")

    def _current(self, peer: PeerId, message: Token | Logits) -> bool:
        """It is of the running turn and of this tail, who may not yet know the newest epoch."""
        if not self.running or message.turn != self.turn or peer != self.route.tail.peer:
            return False
        late = self._tail_since <= message.epoch < self.epoch and peer not in self._granted
        return message.epoch == self.epoch or late

    def _on_answer(
        self, peer: PeerId, message: Opened | Refuse | Failed | Traced | Progress
    ) -> list[Instruction]:
        """A stage's word in this epoch."""
        match message:
            case Opened():
                return self._on_opened(peer, message)
            case Refuse():
                blamed = blame.blocking(self.route, peer, message).peer
                return self._lose(blamed, blame.refused(self.route, peer, message))
            case Failed():
                return self._on_failed(peer, message)
            case Traced() if message.nonce == self._traces:
                self.traced[peer] = message
                return [EmitTraces()] if len(self.traced) == len(self.route.stages) else []
            case Progress() if message.nonce == self._questions:
                self.progress[peer] = message
                return [EmitProgress()] if set(self._well()) <= set(self.progress) else []
        return []

    def _on_opened(self, peer: PeerId, message: Opened) -> list[Instruction]:
        if message.kv_tokens < self.kv_tokens:
            return []  # the answer to an earlier, shorter lease
        if self.open:
            return []
        self._granted[peer] = Held(message.cached, message.journal)
        if self.open and not self._was_open:
            self._was_open = True
            known = min(self.named, *(held.cached for held in self._granted.values()))
            self._known.find(self._prompt[: known - known % BLOCK_TOKENS])
        if self.broken or not self.open:
            return []
        return self._resume() if self.mending else [Ready()]

    def _on_token(self, peer: PeerId, message: Token) -> list[Instruction]:
        expected = len(self.cached)
        if message.position < expected and self.cached[message.position] == message.token:
            return []  # an answer repeated
        if message.position != expected:
            how = f"the tail sent position {message.position}, {expected} was expected"
            return self._doubted(peer, RemoteProtocolError(how))
        self._known.came_through(message.position)
        emit = Emit(message.token, message.position, message.finish)
        if not message.finish:
            self.cached.append(message.token)  # on its way around the ring, not yet sure
            return [emit]
        self.running = False
        return [emit, *self._leave()] if self.leaving or self.mending else [emit]

    def _on_logits(self, peer: PeerId, message: Logits, payload: bytes) -> list[Instruction]:
        if message.position > len(self.cached) or not payload or len(payload) % 4:
            how = "the tail sent logits that were not asked for"
            return self._doubted(peer, RemoteProtocolError(how))
        if message.position < len(self.cached) or not self.awaited:
            return []  # an answer repeated
        self.awaited = False
        self._known.came_through(message.position)
        return [EmitLogits(payload, message.position)]

    def _on_failed(self, peer: PeerId, message: Failed) -> list[Instruction]:
        asking = self.running or not self._was_open
        if message.code == "expired" and self.silent and asking:
            error = blame.overdue(self.route, peer, set(self._granted))
            return self._lose(PeerId(error.peer), error)
        why = blame.failure(self.route, peer, message)
        if message.code in _DOUBTFUL:
            return self._doubted(peer, why)
        return self._lose(blame.failing(self.route, peer, message), why)

    def _on_leaving(self, peer: PeerId, exit_s: float) -> list[Instruction]:
        self._draining.add(peer)
        if self.running:
            return [Draining(peer, exit_s)]
        if self.open and self.turn < 0:  # as if it had refused: its owner takes another route
            return self._fail(blame.lost(self.route, peer, "leaves the swarm"))
        return self._leave() if self.open else []

    # --- inside: losses --------------------------------------------------------------------------

    def _lose(self, peer: PeerId, error: HexswarmError) -> list[Instruction]:
        return self._break(peer, error) if self.running else self._fail(error)

    def _doubted(self, peer: PeerId, error: HexswarmError) -> list[Instruction]:
        """It is the peer's fault, unless another peer said the same at this position."""
        place, doubt = len(self.cached), self._doubt
        self._doubt = (place, peer, self.epoch)
        if doubt and doubt[0] == place and doubt[1] != peer and doubt[2] < self.epoch:
            return self._fail(error)
        return self._lose(peer, error)

    def _break(self, peer: PeerId, error: HexswarmError) -> list[Instruction]:
        if peer in self.broken or self.failed is not None:
            return []
        self.broken[peer] = error
        self.mending = True
        return [Broken(frozenset(self.broken))]

    def _leave(self) -> list[Instruction]:
        """Let a stage that drains go at once instead of when its patience ends."""
        why = "leaves the swarm" if self.leaving else "was lost as the turn ended"
        return self._fail(SessionClosed(f"a peer of the route {why}"))

    def _fail(self, error: HexswarmError) -> list[Instruction]:
        if isinstance(error, PeerLost | Refused) and not self._was_open:
            self.refusing.add(PeerId(error.peer))
        self.failed = error
        self.running = self.mending = False
        closing = [Send(stage.peer, Close(self.key)) for stage in self.route.stages]
        return [*closing, Fail(error)]
