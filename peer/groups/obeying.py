"""What a member does with its part: what the leader says, until the epoch ends.

One thread listens to the collective for the whole epoch and owns the device, but for what takes
long (`hexswarm.peer.groups.words`): that is done beside, and waited for before anything else is
computed. An epoch ends because a member is lost or left, because the leader said what nobody
accepted (`hexswarm.peer.groups.checks`), or because a command failed here (a shape that does not
fit). In each case the streams are cut at once, so that the others learn of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from hexswarm.errors import MemberLost, RemoteProtocolError
from hexswarm.peer.collective import Collective
from hexswarm.peer.following import Follower
from hexswarm.peer.groups.checks import Checks
from hexswarm.peer.groups.words import (
    LONG,
    SILENT_S,
    STATUS,
    answer_beat,
    answer_status,
    unpack,
)
from hexswarm.peer.shard import Shard
from hexswarm.peer.stream_sums import StreamSums

MOST_WHY = 200
"""Characters of the reason why a command failed."""


class Obeying:
    """One member in one epoch."""

    def __init__(self, shard: Shard, sums: StreamSums, checks: Checks) -> None:
        """`sums` are bound to the collective of the epoch."""
        self._sums, self._checks = sums, checks
        self._follower = Follower(shard, sums, self._say)
        self._said: Sequence[Any] = ()
        """The answer to what was done beside."""
        self._job: Future[None] | None = None

    def run(self) -> MemberLost:
        """Follow the leader to the end of the epoch; why it ended."""
        group = self._sums.collective
        with ThreadPoolExecutor(1, "hexswarm-long") as beside:
            lost = _until_lost(lambda: self._next(group, beside), group)
            self._sums.leave(lost)
        return lost

    def _next(self, group: Collective, beside: ThreadPoolExecutor) -> None:
        """One word of the leader."""
        said = group.receive(SILENT_S)
        if not len(said):
            answer_beat(group)
            return
        command = unpack(said)
        if command == STATUS:
            done = self._job is None or self._job.done()
            answer_status(group, self._said if done else ())
            return
        self._checks.check(command)
        self._finish()
        if command[0] in LONG:
            self._said = ()
            self._job = beside.submit(self._follower.obey, command)
        else:
            self._follower.obey(command)

    def _finish(self) -> None:
        """Nothing else is computed before what was begun is done."""
        job, self._job = self._job, None
        if job is not None:
            job.result()

    def _say(self, answer: Sequence[Any]) -> None:
        self._said = [str(word)[:MOST_WHY] for word in answer]


def _until_lost(step: Callable[[], None], group: Collective) -> MemberLost:
    """Repeat `step` until it fails; whose fault that is."""
    while True:
        try:
            step()
        except MemberLost as error:
            return error
        except RemoteProtocolError as error:
            return group.lost(0, f"said what was not agreed ({error.cause})")
        except Exception as error:
            return group.lost(group.rank, f"failed in a command ({error!r})")
