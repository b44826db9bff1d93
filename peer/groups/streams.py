"""The direct streams of one epoch of a group: who listens, who dials, who may come.

Every member has a listener for its whole life (`Door`), which lets in nobody until it is told whom
to expect: the peers of an invitation that was accepted, of higher rank than ours, each with the
topic of that group and epoch and its own rank. Higher ranks dial lower ones, so that of each pair
one end dials, and it dials again while the other end may still be making up its mind. What comes
too late, twice, or for another epoch is closed.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

from hexswarm.errors import MemberLost, PeerLost, WrongPeer
from hexswarm.identity import Identity
from hexswarm.peer.groups.invitation import Invitation
from hexswarm.records import PeerId
from hexswarm.transports.direct import DirectStream, Listener, dial

DIAL_S = 5.0
"""For one attempt to open a stream."""
AGAIN_S = 0.2
"""Between two of them."""
OPEN_S = 900.0
"""For the slowest member to load; who owns the epoch ends it earlier if there is reason to."""


@dataclass(frozen=True, slots=True)
class Place:
    """One epoch as one of its members sees it."""

    invitation: Invitation
    rank: int
    """Our own."""

    @property
    def higher(self) -> range:
        """Ranks that dial us."""
        return range(self.rank + 1, self.invitation.size)

    def peer(self, rank: int) -> PeerId:
        return self.invitation.seats[rank].peer

    def topic(self, rank: int) -> bytes:
        """What a stream is for, as its dialling end says: it comes from that rank."""
        return self.invitation.topic + b"/%d" % rank

    def lost(self, rank: int, how: str) -> MemberLost:
        return MemberLost(rank, self.peer(rank), self.invitation.epoch, how)


class Door:
    """Our listener; for any thread."""

    def __init__(self, identity: Identity, host: str, port: int) -> None:
        """Raises AddressInUse."""
        self._identity = identity
        self._place: Place | None = None
        self._came: dict[int, DirectStream] = {}
        self._changed = threading.Condition()
        self._listener = Listener(
            identity, host, port, allowed=self._allowed, deliver=self._deliver
        )
        self.port = self._listener.port

    def expect(self, place: Place | None) -> None:
        """Let in the members of this epoch alone, or nobody; whoever came before is let go.

        An `open` of another epoch that still waits fails.
        """
        with self._changed:
            if place == self._place:
                return
            self._place, old = place, self._came
            self._came = {}
            self._changed.notify_all()
        for stream in old.values():
            stream.close()

    def open(self, place: Place, within_s: float) -> dict[int, DirectStream]:
        """Streams to all other members of the epoch that is expected, by rank. Blocking.

        Raises MemberLost, with the rank that could not be had: our own if something else is
        expected now.
        """
        end_s = time.monotonic() + within_s
        streams: dict[int, DirectStream] = {}
        try:
            for rank in range(place.rank):
                streams[rank] = self._dial(place, rank, end_s)
            streams.update(self._await(place, end_s))
        except BaseException:
            for stream in streams.values():
                stream.close()
            raise
        return streams

    def close(self) -> None:
        """Let in nobody any more; streams that were handed out stay open."""
        self.expect(None)
        self._listener.close()

    # --- inside ----------------------------------------------------------------------------------

    def _dial(self, place: Place, rank: int, end_s: float) -> DirectStream:
        """Again and again until `end_s`: the other one may not have accepted yet."""
        seat = place.invitation.seats[rank]
        while True:
            left_s = max(end_s - time.monotonic(), AGAIN_S)
            try:
                return dial(
                    *(self._identity, seat.peer, seat.host, seat.port),
                    place.topic(place.rank),
                    timeout_s=min(left_s, DIAL_S),
                )
            except (PeerLost, WrongPeer) as error:
                self._pause(place)
                if time.monotonic() >= end_s:
                    how = error.how if isinstance(error, PeerLost) else f"is not there: {error.how}"
                    raise place.lost(rank, how) from error

    def _pause(self, place: Place) -> None:
        with self._changed:
            if self._place == place:
                self._changed.wait(AGAIN_S)
            self._check(place)

    def _await(self, place: Place, end_s: float) -> dict[int, DirectStream]:
        """Take the streams of all higher ranks."""
        with self._changed:
            while missing := [rank for rank in place.higher if rank not in self._came]:
                self._check(place)
                left_s = end_s - time.monotonic()
                if left_s <= 0:
                    raise place.lost(missing[0], "did not open its stream in time")
                self._changed.wait(left_s)
            self._check(place)
            came, self._came = self._came, {}
            return came

    def _check(self, place: Place) -> None:
        if self._place != place:
            raise place.lost(place.rank, "left the epoch")

    def _allowed(self, peer: PeerId) -> bool:
        place = self._place
        return place is not None and peer in map(place.peer, place.higher)

    def _deliver(self, stream: DirectStream) -> None:
        with self._changed:
            rank = None if self._place is None else _rank_of(self._place, stream)
            if rank is not None and rank not in self._came:
                self._came[rank] = stream
                self._changed.notify_all()
                return
        stream.close()


def _rank_of(place: Place, stream: DirectStream) -> int | None:
    """The rank from which a stream is, by peer and topic; None if it does not belong here."""
    for rank in place.higher:
        if place.peer(rank) == stream.remote and place.topic(rank) == stream.topic:
            return rank
    return None
