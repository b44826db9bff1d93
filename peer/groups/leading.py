"""A group that serves, as its leader's engine sees it: one shard, which may be lost.

`Led` stands where `Ranks` does (`hexswarm.peer.hosting`): a `LedShard` whose commands are
broadcasts, and a word on whether the group is still there. Everything but `lost` and `close` is for
the thread that owns the device. While nothing is computed, `beat` once a second tells both ends
that the other lives.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from hexswarm.errors import MemberLost
from hexswarm.peer.collective import Collective
from hexswarm.peer.groups import words
from hexswarm.peer.groups.invitation import Invitation
from hexswarm.peer.led import LedShard
from hexswarm.peer.patience import LIMITS, Limits
from hexswarm.peer.shard import Shard
from hexswarm.peer.stream_sums import StreamSums


class Led:
    """One epoch, from the leader's end."""

    def __init__(self, shard: Shard, sums: StreamSums, invitation: Invitation) -> None:
        """`sums` are bound to the collective of the epoch."""
        self._sums, self._group = sums, sums.collective
        self._told_s = time.monotonic()
        self.invitation = invitation
        self.shard = LedShard(shard, sums, self.tell, self._await_all)
        self.title = title(invitation)

    @property
    def lost(self) -> MemberLost | None:
        """Why the group is over; from any thread."""
        return self._sums.lost

    def tell(self, command: Sequence[Any]) -> None:
        """Give all members a command. Raises MemberLost."""
        self._group.broadcast(words.pack(command))
        self._told_s = time.monotonic()

    def beat(self) -> None:
        """If nothing was said lately: is everybody there? Afterwards `lost` tells."""
        if self.lost is not None or time.monotonic() - self._told_s < words.BEAT_S:
            return
        try:
            words.beat(self._group)
            self._told_s = time.monotonic()
        except MemberLost as error:
            self._sums.leave(error)

    def guard(self) -> None:
        """Members are watched from the first word on."""

    def leave(self, how: str) -> None:
        """End the epoch for all, from any thread."""
        self._sums.leave(self._group.lost(0, how))

    def close(self) -> None:
        """The engine has stopped: end the epoch if it goes on, and close the streams."""
        self.leave("closed the group")
        self._group.close()

    def _await_all(self) -> None:
        words.await_all(self._group)
        self._told_s = time.monotonic()


def title(invitation: Invitation) -> str:
    """For people, and the name under which the group's speed is remembered.

    The cut is not in it: the next epoch has another one, and should not measure for half a minute
    before it serves. What the speed really is, the steps tell soon (`hexswarm.peer.pace`).
    """
    return f"LAN group of {invitation.size}"


def joined(
    streams: dict[int, Any], rank: int, epoch: int, sums: StreamSums, limits: Limits = LIMITS
) -> Collective:
    """The collective of an epoch whose streams are open, once all members are in it.

    Raises MemberLost.
    """
    group = Collective(rank, streams, epoch=epoch, limits=limits)
    try:
        sums.bind(group)
        words.answer_beat(group)  # nobody speaks before all listen
    except MemberLost:
        group.close()
        raise
    return group
