"""One session's life on the client's side, as a state machine: events in, instructions out.

    opening ──all stages say Opened──▶ idle ──generate──▶ running ──last token──▶ idle ─▶ closed
       └── Refuse, lost peer ─────────────────────────────────┴──────────▶ failed

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

Nothing here reads a clock, opens a stream or knows asyncio: `swarm/runtime.py` carries the
instructions out, the simulator runs the same class on virtual time.
"""

from __future__ import annotations

import array
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hexswarm.errors import (
    HexswarmError,
    LocalProtocolError,
    PeerLost,
    Refused,
    RemoteProtocolError,
    SessionClosed,
)
from hexswarm.messages import (
    Cancel,
    Close,
    Failed,
    Generate,
    GoAway,
    Logits,
    Message,
    Open,
    Opened,
    Refuse,
    Token,
    Tokens,
    Trace,
    Traced,
)
from hexswarm.records import PeerId, Route, Sampling, Stage
from hexswarm.wire import Frame

PROMPT_FRAME_TOKENS = 1 << 16
"""Ids in one frame of a long prompt: 256 KiB."""


# --- instructions -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Connect:
    """Have a link to the stage's peer, watch it, then send `message` (its Open)."""

    stage: Stage
    message: Open


@dataclass(frozen=True, slots=True)
class Send:
    peer: PeerId
    message: Message
    payload: bytes = b""
    bulk: bool = False


@dataclass(frozen=True, slots=True)
class Ready:
    """All stages hold their lease."""


@dataclass(frozen=True, slots=True)
class Emit:
    """A token of the running turn; `finish` is "", "stop", "length" or "cancelled"."""

    token: int | None
    position: int
    finish: str
    arrived_s: float = 0.0
    """When it came (monotonic time), however late it is taken; set by whoever has a clock."""


@dataclass(frozen=True, slots=True)
class EmitLogits:
    """Float32 logits for `position`, little-endian."""

    data: bytes
    position: int


@dataclass(frozen=True, slots=True)
class EmitTraces:
    """Every stage has answered `trace`: see `Session.traced`."""


@dataclass(frozen=True, slots=True)
class Fail:
    """The session is over; `error` says why."""

    error: HexswarmError


Instruction = Connect | Send | Ready | Emit | EmitLogits | EmitTraces | Fail


@dataclass(frozen=True, slots=True)
class Turn:
    """What one turn asks for: ids to add from `position` on, and how to answer."""

    position: int
    ids: tuple[int, ...]
    max_new: int
    sampling: Sampling
    stop_ids: tuple[int, ...]
    history: tuple[int, ...] = ()
    """All ids so far; sent to the tail only if a repetition penalty needs them."""


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
    ) -> None:
        """`budgets` are the seconds that each stage is asked to promise (none: no promises)."""
        self.key = key
        self.route = route
        self.kv_tokens = kv_tokens
        self.cached: list[int] = []
        """Ids whose KV every stage is known to hold, once no turn runs."""
        self.epoch = 0
        self.turn = -1
        self.running = False
        self.leaving = False
        """A stage drains: the session ends when no turn runs."""
        self.failed: HexswarmError | None = None
        self.refusing: set[PeerId] = set()
        """Peers that refused the session or could not be reached for it, also after it failed."""
        self.too_slow: set[PeerId] = set()
        """Those of them that cannot promise what was asked, and would for a looser limit."""
        self.traced: dict[PeerId, Traced] = {}
        """What the stages have answered to the last `trace`."""
        self._digest = digest
        self._client_loop = client_loop
        self._budgets = tuple(budgets) or (0.0,) * len(route.stages)
        self._traces = 0
        self._granted: set[PeerId] = set()
        self._was_open = False
        self._expected_position = 0
        self._sure = 0
        """So many of `cached` are computed everywhere: the tail has answered them."""

    @property
    def name(self) -> str:
        """What people call the session: too short to speak for it, long enough to find it."""
        return self.key[:4].hex()

    @property
    def open(self) -> bool:
        return self.failed is None and len(self._granted) == len(self.route.stages)

    @property
    def silent(self) -> list[Stage]:
        """Stages that have neither granted nor refused yet, from the head on."""
        return [stage for stage in self.route.stages if stage.peer not in self._granted]

    # --- the caller's wishes ---------------------------------------------------------------------

    def start(self) -> list[Instruction]:
        """Open all stages at once."""
        self._granted.clear()
        return [Connect(stage, self._opening(index)) for index, stage in self._stages()]

    def extend(self, kv_tokens: int) -> list[Instruction]:
        """Ask all stages for a longer lease; `Ready` tells when they have granted it."""
        self._check_idle()
        self.kv_tokens = kv_tokens
        self._granted.clear()
        return [Send(stage.peer, self._opening(index)) for index, stage in self._stages()]

    def generate(self, turn: Turn) -> list[Instruction]:
        """Begin a turn. The caller made sure that the lease is long enough."""
        self._check_idle()
        if not turn.ids or turn.position > len(self.cached):
            raise LocalProtocolError("a turn adds tokens, right behind or inside what is cached")
        self.turn += 1
        self.running = True
        del self.cached[turn.position :]
        self._sure = turn.position
        self._expected_position = turn.position + len(turn.ids)
        instructions: list[Instruction] = []
        if not self._client_loop:
            instructions.append(self._policy(turn))
        if self.turn == 0:
            instructions += self._commit(turn)
        instructions += self._feed(turn.position, turn.ids)
        self.cached += turn.ids
        return instructions

    def feed(self, token: int) -> list[Instruction]:
        """Client loop: the chosen token; its logits come back."""
        if self.failed is not None:
            return []  # the listener learns from its next event
        position = len(self.cached)
        self._expected_position = position + 1
        instructions = self._feed(position, (token,))
        self.cached.append(token)
        return instructions

    def cancel(self) -> list[Instruction]:
        """End the running turn and keep the KV of what is known to be computed."""
        if not self.running or self.failed is not None:
            return []
        self.running = False
        del self.cached[self._sure :]
        cancel = Cancel(self.key, self.epoch, self.turn)
        return [
            *(Send(stage.peer, cancel) for stage in self.route.stages),
            Emit(None, len(self.cached), "cancelled"),
        ]

    def trace(self) -> list[Instruction]:
        """Ask all stages where the time of the last turn went."""
        self.traced = {}
        self._traces += 1  # so that a late answer is not taken for one to this question
        if self.failed is not None:
            return []
        question = Trace(self.key, self.epoch, self._traces)
        return [Send(stage.peer, question) for stage in self.route.stages]

    def close(self) -> list[Instruction]:
        """Free everything at the stages."""
        self.failed = self.failed or SessionClosed("the session was closed")
        self.running = False
        return [Send(stage.peer, Close(self.key)) for stage in self.route.stages]

    # --- what happens ----------------------------------------------------------------------------

    def on_frames(self, peer: PeerId, frames: Iterable[Frame]) -> list[Instruction]:
        return [made for frame in frames for made in self.on_frame(peer, frame)]

    def on_frame(self, peer: PeerId, frame: Frame) -> list[Instruction]:
        if peer not in self._peers():
            return []
        if isinstance(frame.message, Refuse) and frame.message.epoch == self.epoch:
            self.refusing.add(self._blocking(peer, frame.message).peer)
            if frame.message.code == "slow":
                self.too_slow.add(peer)
        if self.failed is not None:
            return []
        match frame.message:
            case Opened() as message if message.epoch == self.epoch:
                return self._on_opened(peer, message)
            case Refuse() as message if message.epoch == self.epoch:
                return self._fail(self._refused(peer, message))
            case Token() as message if self._current(message) and peer == self.route.tail.peer:
                return self._on_token(message)
            case Logits() as message if self._current(message) and peer == self.route.tail.peer:
                return self._on_logits(message, frame.payload)
            case Failed() as message if message.epoch == self.epoch:
                return self._fail(self._blame(peer, message))
            case Traced() as message if (message.epoch, message.nonce) == self._asked:
                self.traced[peer] = message
                return [EmitTraces()] if len(self.traced) == len(self.route.stages) else []
            case GoAway():
                self.leaving = True
                return self._leave() if self.open and not self.running else []
        return []

    def on_lost(self, peer: PeerId, how: str) -> list[Instruction]:
        """The link to a peer ended, or could not be made."""
        if peer not in self._peers():
            return []
        if not self._was_open:
            self.refusing.add(peer)
        if self.failed is not None:
            return []
        return self._fail(PeerLost(peer, self._layers(peer), how))

    # --- inside --------------------------------------------------------------------------------

    def _stages(self) -> list[tuple[int, Stage]]:
        return list(enumerate(self.route.stages))

    @property
    def _asked(self) -> tuple[int, int]:
        """Epoch and number of the last `trace`."""
        return self.epoch, self._traces

    def _peers(self) -> set[PeerId]:
        return {stage.peer for stage in self.route.stages}

    def _index(self, peer: PeerId) -> int:
        return [stage.peer for stage in self.route.stages].index(peer)

    def _layers(self, peer: PeerId) -> tuple[int, int]:
        span = self.route.stages[self._index(peer)].span
        return span.first, span.end

    def _opening(self, index: int) -> Open:
        stages = self.route.stages
        stage, before = stages[index], stages[index - 1]
        after = stages[(index + 1) % len(stages)]
        ring_end = self._client_loop and index == len(stages) - 1
        return Open(
            session=self.key,
            epoch=self.epoch,
            digest=self._digest,
            first=stage.span.first,
            end=stage.span.end,
            predecessor="" if self._client_loop and index == 0 else before.peer,
            successor="" if ring_end else after.peer,
            successor_addresses=() if ring_end else after.addresses,
            kv_tokens=self.kv_tokens,
            step_s=self._budgets[index],
        )

    def _policy(self, turn: Turn) -> Send:
        wanted = turn.history if turn.sampling.repetition_penalty != 1.0 else ()
        return Send(self.route.tail.peer, self._generate(turn), ids_to_bytes(wanted))

    def _commit(self, turn: Turn) -> list[Instruction]:
        """Tell the stages that neither ids nor policy reach that their reservation is used."""
        told = {self.route.head.peer} | (set() if self._client_loop else {self.route.tail.peer})
        message = self._generate(turn)
        return [Send(s.peer, message) for s in self.route.stages if s.peer not in told]

    def _generate(self, turn: Turn) -> Generate:
        s = turn.sampling
        return Generate(
            session=self.key,
            epoch=self.epoch,
            turn=self.turn,
            max_new=turn.max_new,
            stop_ids=turn.stop_ids,
            temperature=s.temperature,
            top_p=s.top_p,
            top_k=s.top_k,
            min_p=s.min_p,
            repetition_penalty=s.repetition_penalty,
            seed=s.seed,
        )

    def _feed(self, position: int, ids: Sequence[int]) -> list[Instruction]:
        frames: list[Instruction] = []
        for start in range(0, len(ids), PROMPT_FRAME_TOKENS):
            piece = ids[start : start + PROMPT_FRAME_TOKENS]
            last = start + len(piece) == len(ids)
            message = Tokens(self.key, self.epoch, max(self.turn, 0), position + start, last)
            bulk = len(ids) > PROMPT_FRAME_TOKENS
            frames.append(Send(self.route.head.peer, message, ids_to_bytes(piece), bulk))
        return frames

    def _check_idle(self) -> None:
        if self.failed is not None:
            raise SessionClosed("the session has ended", remedy="open a new one") from self.failed
        if self.running:
            raise SessionClosed("the session is busy with a turn", remedy="wait for its end")

    def _current(self, message: Token | Logits) -> bool:
        return self.running and message.epoch == self.epoch and message.turn == self.turn

    def _on_opened(self, peer: PeerId, message: Opened) -> list[Instruction]:
        if message.kv_tokens < self.kv_tokens:
            return []  # the answer to an earlier, shorter lease
        if self.open:
            return []
        self._granted.add(peer)
        self._was_open = self._was_open or self.open
        return [Ready()] if self.open else []

    def _on_token(self, message: Token) -> list[Instruction]:
        if message.position != self._expected_position:
            return self._fail(
                RemoteProtocolError(
                    f"the tail sent position {message.position}, "
                    f"{self._expected_position} was expected"
                )
            )
        self._expected_position += 1
        self._sure = len(self.cached)
        emit = Emit(message.token, message.position, message.finish)
        if not message.finish:
            self.cached.append(message.token)  # on its way around the ring, not yet sure
            return [emit]
        self.running = False
        return [emit, *self._leave()] if self.leaving else [emit]

    def _on_logits(self, message: Logits, payload: bytes) -> list[Instruction]:
        if message.position != self._expected_position or not payload or len(payload) % 4:
            return self._fail(RemoteProtocolError("the tail sent logits that were not asked for"))
        self._sure = len(self.cached)
        return [EmitLogits(payload, message.position)]

    def _refused(self, peer: PeerId, message: Refuse) -> HexswarmError:
        """A stage that cannot reach the next one is seldom the one to do without."""
        stage = self._blocking(peer, message)
        if stage.peer != peer:
            how = f"cannot be reached by its neighbour {peer[-8:]}"
            return PeerLost(stage.peer, self._layers(stage.peer), how)
        return Refused(peer, message.code, message.reason, message.retry_s)

    def _blocking(self, peer: PeerId, message: Refuse) -> Stage:
        """The stage without which the next route should do."""
        stages, index = self.route.stages, self._index(peer)
        return stages[index + 1 - len(stages)] if message.code == "unreachable" else stages[index]

    def _blame(self, peer: PeerId, message: Failed) -> HexswarmError:
        if message.code == "lost" and message.peer in self._peers():
            lost = PeerId(message.peer)
            return PeerLost(lost, self._layers(lost), f"was lost by its neighbour {peer[-8:]}")
        if message.code == "draining":
            return PeerLost(peer, self._layers(peer), "has left the swarm")
        if message.code == "expired" and not self._was_open:
            return self._too_slow(peer)
        if message.code in ("expired", "unknown"):
            return SessionClosed(f"peer {peer[-8:]}: {message.reason}")
        return Refused(peer, message.code, message.reason)

    def _too_slow(self, peer: PeerId) -> PeerLost:
        """A reservation ended while others were awaited: blame whom its stage waited for, or,
        if that stage had answered, the last silent one (others are silent because they wait)."""
        stages, silent = self.route.stages, self.silent
        waited = peer not in self._granted
        slow = stages[self._index(peer) + 1 - len(stages)] if waited else silent[-1]
        how = "did not open before the reservations of the others ended"
        return PeerLost(slow.peer, (slow.span.first, slow.span.end), how)

    def _leave(self) -> list[Instruction]:
        """Let a stage that drains go at once instead of when its patience ends."""
        return self._fail(SessionClosed("a peer of the route leaves the swarm"))

    def _fail(self, error: HexswarmError) -> list[Instruction]:
        if isinstance(error, PeerLost | Refused) and not self._was_open:
            self.refusing.add(PeerId(error.peer))
        self.failed = error
        self.running = False
        closing = [Send(stage.peer, Close(self.key)) for stage in self.route.stages]
        return [*closing, Fail(error)]


def ids_to_bytes(ids: Sequence[int]) -> bytes:
    """Token ids as little-endian uint32."""
    packed = array.array("I", ids)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()
