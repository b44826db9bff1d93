"""Where each stage goes on after a loss: what is computed again, and what a journal can send.

When a stage is lost, the others keep their KV, and each keeps in a *journal* what it has sent on.
Once all stages of the new route have said how far they are (`Opened.cached`, `Opened.journal`), the
plan is made from the tail to the head, because only the later stage knows what it lacks:

    need(i)   the first position whose input stage i needs: where it starts
    stage p = i - 1 sends [need(i), end):
        from its journal, if that reaches back to need(i), and then it starts where it stands;
        else it must compute these rows again, so that its own start, and need, is there

and what the head needs, the client sends: it knows all ids. A lost stage in the middle thus costs
one replay of the journal before it and one prefill at the newcomer; a journal that was dropped
costs one stage more. No stage starts above the last known id; the tail not above the row before
it, since the token that this row gives is what the session waits for. (If the tail chose one and
died before it told, stages before it may be one position ahead. They crop: the new tail may choose
differently if its device rounds differently.)

What is *sure*, that is computed everywhere, follows from the tokens: each comes through all stages.
Two things blur that, and `Known` keeps account of both. The first token after a repair may come out
of a journal while a newcomer before it still computes. And a stage that has not heard of a turn yet
may hold, above its start, what an earlier turn left there: that is nobody's to go on with.

What a session found at its stages when it opened (`hexswarm.prefix`) is in nobody's journal: none
of them sent it on. A newcomer that has not got it, too, makes the stages before it compute it, and
the client send its ids from the start: the same plan, no case of its own. Where a stage goes back
into blocks that others may read it goes back to the beginning of a block.

Rejected: to replay the whole session from the client after each loss (Petals): it costs a prefill
at every stage, and the client's upstream is the narrowest of all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from hexswarm.prefix import BLOCK_TOKENS


@dataclass(frozen=True, slots=True)
class Held:
    """What a stage has, in positions; the words of strangers, so nothing is assumed of them."""

    cached: int = 0
    """[0, cached) is computed there."""
    journal: int = 0
    """Outputs of [journal, cached) can be sent again."""

    def crop(self, position: int) -> Held:
        """The same without what lies above `position`."""
        return Held(min(self.cached, position), min(self.journal, position))


@dataclass(frozen=True, slots=True)
class Part:
    """How one stage goes on: see `Resume`."""

    start: int
    send_from: int


def plan_resume(held: Sequence[Held], end: int, named: int = 0) -> list[Part]:
    """How the stages of a route, from the head on, go on when `end` ids are known.

    The blocks of the first `named` may be shared with other sessions.
    """
    start = send_from = min(held[-1].cached, end - 1)
    parts = [Part(start, send_from)]
    for stage in reversed(held[:-1]):
        send_from = start
        start = min(stage.cached, end)
        if stage.journal > send_from:
            start = min(start, whole(send_from, named))
        parts.append(Part(start, send_from))
    return parts[::-1]


def whole(position: int, named: int) -> int:
    """Where a step may start that would start at `position`, if `named` ids lie in whole blocks."""
    return position - position % BLOCK_TOKENS if position < named else position


@dataclass(slots=True)
class Known:
    """The token ids of a session, and how far its stages are sure to have computed them."""

    ids: list[int] = field(default_factory=list)
    _sure: int = 0
    """So many of them are computed everywhere."""
    _start: int = 0
    """Of the turn that runs, or ran last."""
    _resumed: int = 0
    """Tokens above this position come through every stage; up to it, journals help out."""
    _cancelled: bool = False
    """The last turn did not end by itself: stages may hold more than `ids`."""
    _stale: bool = False
    """Until all have heard of the turn, what they hold above its start is of another."""

    def find(self, ids: Sequence[int]) -> None:
        """All stages have these from earlier sessions; nothing was asked yet."""
        self.ids[:] = ids
        self._sure = len(ids)

    def begin(self, position: int, ids: Sequence[int]) -> None:
        """A turn adds `ids` from `position` on; what was behind it is dropped."""
        self._stale = self._cancelled or position < len(self.ids)
        self._cancelled = False
        self._start = self._sure = position
        self._resumed = 0
        self.ids[position:] = ids

    def came_through(self, position: int) -> None:
        """The tail has answered everything below `position`."""
        if position > self._resumed:
            self._sure, self._stale = position, False

    def cancel(self) -> None:
        """Keep what is sure."""
        self._cancelled = True
        del self.ids[self._sure :]

    def resume(self, held: Sequence[Held], named: int = 0) -> list[Part]:
        """How the stages go on after a loss in the running turn; from then on all know of it."""
        end = len(self.ids)
        most = self._start if self._stale else end
        parts = plan_resume([stage.crop(most) for stage in held], end, named)
        self._stale, self._resumed = False, end
        self._sure = min(self._sure, *(part.start for part in parts))
        return parts
