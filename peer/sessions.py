"""One session as a stage sees it: who takes part, which turn runs, how far it is, how it ends.

A record with the few rules that concern it alone; what a message means for it is decided in
`peer/stage.py`.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from hexswarm.messages import Generate, Hidden, Open, Token, Tokens, neighbour
from hexswarm.peer.actions import BULK, STEP
from hexswarm.peer.order import REMEMBERED, Order
from hexswarm.peer.steps import SessionKey, Step, TailPolicy
from hexswarm.peer.tracing import Account
from hexswarm.records import PeerId, Span

Early = tuple[PeerId, Tokens | Hidden, bytes]
"""Who sent what."""


@dataclass(slots=True)
class StageSession:
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
    account: Account = field(default_factory=Account)
    """Of the turn, on this route."""
    order: Order = field(default_factory=Order)
    standing: bool = False
    """The route is new: nothing happens until the client says where to go on (`Resume`)."""
    early: dict[tuple[int, int, int], Early] = field(default_factory=dict)
    """Input that came too soon, by turn, position and length."""
    early_tokens: int = 0
    send_from: int = 0
    """The successor has everything below."""
    end: int = 0
    """Of what the client knew when the session went on; the row before it is a last one."""
    told_at: tuple[int, int] = (-1, -1)
    """Epoch and turn of the last `Generate`."""
    answers: dict[int, Token] = field(default_factory=dict)
    """The last tokens that the tail chose on this route in this turn, by position."""
    sent: deque[tuple[int, int, bool]] = field(default_factory=lambda: deque(maxlen=REMEMBERED))
    """Position, count and last flag of what was sent on lately."""
    repeated_bytes: int = 0
    """Of it, sent again."""

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

    @property
    def told(self) -> bool:
        """It is known how the tail ends a step of this turn."""
        return self.successor is None or self.policy_turn == self.turn

    def watched(self, me: PeerId) -> set[PeerId]:
        peers = {self.client, self.predecessor, self.successor} - {None, me}
        return {peer for peer in peers if peer is not None}

    def rewire(self, message: Open, layers: int) -> None:
        """Take part in another route, or the same one for longer."""
        if message.span != self.span:
            self.order = Order()  # these layers have seen nothing yet
        newer = message.epoch > self.epoch
        self.opened = message
        self.head, self.tail = message.first == 0, message.end == layers
        if newer:
            self.standing, self.policy_turn = True, -1
            self.release()
            self._forget()
            self.order.begin()

    def begin(self, turn: int) -> None:
        """Go on to a newer turn."""
        self.turn = turn
        self.send_from = self.end = 0
        self._forget()
        self.order.begin()

    def resume(self, start: int, send_from: int, end: int) -> None:
        """Go on where the client says."""
        self.standing = False
        self.send_from, self.end = send_from, end
        self.order.resume(start)

    def ahead(self, turn: int, position: int) -> bool:
        """Is that the step behind what the client knew, while some of this has still to come?

        A ring may be faster than a replay: from what other stages kept a tail can choose the next
        token before a newcomer has the input before it. More than one such step there cannot be.
        """
        return turn == self.turn and self.order.received < self.end == position

    def hold(self, peer: PeerId, message: Tokens | Hidden, payload: bytes, count: int) -> bool:
        """Keep input for which it is too soon: the client's word, or what comes before, is missing.

        False if that is more than the session can have; what came before is kept once.
        """
        what = (message.turn, message.position, count)
        if what in self.early:
            return True
        if self.early_tokens + count > self.opened.kv_tokens or (self.early and not self.standing):
            return False
        self.early_tokens += count
        self.early[what] = (peer, message, payload)
        return True

    def release(self) -> list[Early]:
        """What was held, in order of arrival."""
        early, self.early, self.early_tokens = list(self.early.values()), {}, 0
        return early

    def stop(self) -> None:
        """The turn is cancelled."""
        self.held.clear()
        self.order.begin()

    def admits(self, turn: int, *, lead: bool) -> bool:
        """Whether input of `turn` counts: this one, or a newer if the sender may begin it."""
        return (turn == self.turn or (lead and turn > self.turn)) and turn > self.cancelled

    def lane(self, turn: int, count: int, last: bool) -> int:
        """Prompts go by the bulk lane to their very end, which must not overtake their pieces."""
        if count == 1 and last and self.bulk_turn != turn:
            return STEP
        self.bulk_turn = -1 if last else turn
        return BULK

    def tell(self, message: Generate, policy: TailPolicy) -> None:
        """The client says how this turn's tokens are chosen, and how many."""
        self.policy, self.policy_turn = policy, message.turn
        self.told_at = (self.epoch, message.turn)
        self.produced, self.max_new = 0, message.max_new
        self.stop_ids = frozenset(message.stop_ids)

    def choose(self, position: int, token: int) -> Token:
        """The tail has a token: is it the last? It is remembered, should the step come again."""
        self.produced += 1
        finish = "stop" if token in self.stop_ids else ""
        if not finish and (self.produced >= self.max_new or position >= self.opened.kv_tokens):
            finish = "length"
        if finish:
            self.policy_turn = -1
        elif self.policy is not None:
            self.policy.history.append(token)
        chosen = Token(self.key, self.epoch, self.turn, position, token, finish)
        self.answers[position] = chosen
        if len(self.answers) > REMEMBERED:
            del self.answers[next(iter(self.answers))]
        return chosen

    def _forget(self) -> None:
        """What belongs to one turn on one route."""
        self.held.clear()
        self.answers.clear()
        self.sent.clear()
        self.repeated_bytes = 0
        self.bulk_turn = -1
        self.account = Account()
