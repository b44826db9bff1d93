"""One session as a stage sees it: who takes part, which turn runs, how its tail chooses.

A record with the few rules that concern it alone; what a message means for it is decided in
`peer/stage.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hexswarm.messages import Open, neighbour
from hexswarm.peer.actions import BULK, STEP
from hexswarm.peer.steps import Row, SessionKey, Step, TailPolicy
from hexswarm.peer.tracing import Account
from hexswarm.records import PeerId, Span


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
    """Of the turn."""

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

    def begin(self, turn: int) -> None:
        """Go on to a newer turn."""
        self.turn = turn
        self.held.clear()
        self.account = Account()

    def enter(self, turn: int, *, lead: bool) -> bool:
        """Go on to `turn` if it is newer and the sender may begin one; False for late input."""
        if turn > self.turn and lead:
            self.begin(turn)
        return turn == self.turn and turn > self.cancelled

    def lane(self, row: Row) -> int:
        """Prompts go by the bulk lane to their very end, which must not overtake their pieces."""
        if row.count == 1 and row.sample and self.bulk_turn != row.turn:
            return STEP
        self.bulk_turn = -1 if row.sample else row.turn
        return BULK
