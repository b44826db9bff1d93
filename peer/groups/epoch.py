"""One epoch of a group in this process: load the part, open the streams, then obey or lead.

A thread of its own does all of it, for a load takes minutes and a collective blocks. It tells the
owner what happened, in its event loop: `joined` when the part is loaded and all members are
there (with what leads them, at rank 0), `failed` if it does not come to that, `over` once when the
epoch is at its end, whoever noticed. The owner says `end` when it knows of an end first: the
streams are cut, and whatever waits for them wakes up. A load cannot be interrupted; the next epoch
waits for it, so that two parts never take memory at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import threading
from collections.abc import Callable
from typing import Any, Protocol

from hexswarm.errors import HexswarmError, MemberLost
from hexswarm.peer.collective import Collective
from hexswarm.peer.groups.checks import Checks
from hexswarm.peer.groups.leading import Led, joined
from hexswarm.peer.groups.obeying import Obeying
from hexswarm.peer.groups.streams import OPEN_S, Door, Place
from hexswarm.peer.patience import LIMITS, Limits
from hexswarm.peer.shard import Shard
from hexswarm.peer.stream_sums import StreamSums
from hexswarm.records import PeerId

log = logging.getLogger(__name__)

LoadPart = Callable[[Place, StreamSums], Shard]


class Owner(Protocol):
    """Who is told, in its event loop."""

    def joined(self, epoch: Epoch, led: Led | None) -> None: ...

    def failed(self, epoch: Epoch, how: str, blamed: PeerId | None) -> None: ...

    def over(self, epoch: Epoch, lost: MemberLost) -> None: ...


class Epoch:
    """Made for each epoch that begins to load; `start` it, and `end` it."""

    def __init__(
        self,
        place: Place,
        door: Door,
        load: LoadPart,
        owner: Owner,
        before: Epoch | None,
        limits: Limits = LIMITS,
    ) -> None:
        """`before` is the last one in this process; `limits` say when a member is late."""
        self._limits = limits
        self.place = place
        self._door, self._load, self._owner, self._before = door, load, owner, before
        self._loop = asyncio.get_running_loop()
        self._sums = StreamSums(on_end=lambda lost: self._tell(owner.over, lost))
        self._thread = threading.Thread(target=self._live, name="hexswarm-epoch", daemon=True)

    def start(self) -> None:
        """Begin to load, and let in the others."""
        self._door.expect(self.place)
        self._thread.start()

    def end(self, how: str) -> None:
        """It is over, from any thread; what is loaded goes when nobody computes with it."""
        self._sums.leave(self.place.lost(self.place.rank, how))

    def wait(self, within_s: float | None = None) -> None:
        """Until its thread is through, at most so long."""
        if self._thread.ident is not None:
            self._thread.join(within_s)

    # --- the thread ------------------------------------------------------------------------------

    def _live(self) -> None:
        if self._before is not None:
            self._before.wait()
            self._before = None
            gc.collect()
        try:
            self._take_part()
        except MemberLost as error:
            own = error.rank == self.place.rank
            blamed = None if own else self.place.peer(error.rank)
            self._tell(self._owner.failed, error.how, blamed)
        except HexswarmError as error:
            self._tell(self._owner.failed, str(error), None)
        except Exception as error:  # a mistake of ours, or of a library
            log.exception("a part of a group could not be loaded")
            self._tell(self._owner.failed, f"cannot load its part ({error!r})", None)

    def _take_part(self) -> None:
        place = self.place
        shard = self._load(place, self._sums)
        if self._sums.lost is not None:
            raise self._sums.lost
        streams = self._door.open(place, OPEN_S)
        group = joined(streams, place.rank, place.invitation.epoch, self._sums, self._limits)
        if place.rank == 0:
            self._tell(self._owner.joined, Led(shard, self._sums, place.invitation))
            return
        self._tell(self._owner.joined, None)
        self._obey(shard, group)

    def _obey(self, shard: Shard, group: Collective) -> None:
        asked, words = self.place.invitation, shard.architecture.vocabulary
        try:
            Obeying(shard, self._sums, Checks(asked.span, words, asked.kv_tokens)).run()
        finally:
            group.close()

    def _tell(self, event: Callable[..., None], *given: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody wants to know
            self._loop.call_soon_threadsafe(event, self, *given)
