"""Who serves what: signed announcements, their codec, and the view merged from them.

An announcement travels as `msgpack [body, signature]`, the signature (Ed25519) made over the body
by the key that the announcing peer's id consists of. The body carries everything that must not be
altered: peer, model, expiry, sequence. So a record can be checked wherever it comes from (the DHT,
a neighbour, a file), by anybody, without a look-up.

`check_record` is the rule of admission for every DHT node, at store and at read: only subkeyed
entries, subkey = the signer's peer id, the key that belongs to the body's model, a bounded size, a
bounded expiry, a strict schema. Replaying an old record gains nothing: storage and `Directory` keep
the higher sequence. (The validator is not shown what is held, so `hexswarm.shelf` has that rule.)
Records that have run out are *not* refused there: hivemind rejects a whole dictionary for one
refused entry, so an entry that expires on the way would hide all the others; `Directory` drops them
instead.

`Directory` merges announcements; merging is commutative, associative and idempotent (the higher
sequence wins, ties by bytes), so that order and repetition of arrival do not matter.

Sharding (DESIGN 6): one dictionary per model holds 1,000 records of 500 bytes with ease and breaks
at 4 MiB, so large swarms spread over 16 or 64 keys by hash of the peer id. Every record is also put
under the index key of all models, from which `hexswarm status` lists what exists.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import msgpack

from hexswarm.errors import RemoteProtocolError, UsageError
from hexswarm.flat import flag, integer, items, real, text, unpack
from hexswarm.identity import Identity, verify
from hexswarm.records import (
    SHARES_SUM,
    Announcement,
    Coordinates,
    GroupMembership,
    GroupOffer,
    PeerId,
    Span,
    Speed,
)

ANNOUNCE_S = 30.0
"""Period of announcements."""
EXPIRE_S = 90.0
"""A peer that fell silent is forgotten after this; death is told earlier, over streams."""
SKEW_S = 5.0
"""Tolerated difference of clocks; hivemind refuses to join beyond 3 s."""
MAX_RECORD_BYTES = 2048
MOST_ITEMS = 64
"""In a list of a record: a group's shares."""
INDEX = "*"
"""Stands for "any model" in a key."""
SHARDS = (1, 16, 64)

_CONTEXT = b"hexswarm/1 announcement\0"


def shard_count(peers: int) -> int:
    """How many keys a model's records are spread over when so many peers serve it."""
    return 1 if peers <= 500 else 16 if peers <= 5000 else 64


def shard_of(peer: PeerId, shards: int) -> int:
    return hashlib.sha256(peer.encode()).digest()[0] % shards


def directory_key(model: str, shard: int, shards: int) -> str:
    """DHT key of one shard of the peers of `model` (a digest, or INDEX)."""
    return f"hexswarm/1/{model}/{shard}of{shards}"


@dataclass(frozen=True, slots=True)
class SignedAnnouncement:
    """An announcement, when it runs out (Unix seconds), and the bytes that prove it."""

    announcement: Announcement
    expires_s: float
    data: bytes

    @property
    def peer(self) -> PeerId:
        return self.announcement.peer


def sign(announcement: Announcement, expires_s: float, identity: Identity) -> SignedAnnouncement:
    """Seal `announcement`, without the last neighbours and addresses if they do not fit.

    Raises UsageError if it is not the identity's own, or such that nobody would accept it.
    """
    if announcement.peer != identity.peer:
        raise UsageError("a peer announces only itself")
    while True:
        body = msgpack.packb(_to_body(announcement, expires_s))
        data = msgpack.packb([body, identity.sign(_CONTEXT + body)])
        if len(data) <= MAX_RECORD_BYTES:
            break
        if announcement.neighbours:
            announcement = replace(announcement, neighbours=announcement.neighbours[:-1])
        elif len(announcement.addresses) > 1:
            announcement = replace(announcement, addresses=announcement.addresses[:-1])
        else:
            raise UsageError(f"an announcement of {len(data)} bytes is over {MAX_RECORD_BYTES}")
    try:
        return open_record(data)
    except RemoteProtocolError as error:
        raise UsageError(f"nobody would accept this announcement: {error}") from error


@functools.lru_cache(maxsize=2048)
def open_record(data: bytes) -> SignedAnnouncement:
    """Decode and verify. Raises RemoteProtocolError for anything that is not in order.

    Remembered, since the same bytes come again at every read, and a signature takes 100 us.
    """
    if len(data) > MAX_RECORD_BYTES:
        raise RemoteProtocolError("a record is too large")
    try:
        body, signature = unpack(data, 2)
        announcement, expires_s = _from_body(unpack(body, most=MOST_ITEMS))
    except (ValueError, TypeError, KeyError, UsageError, RecursionError, OverflowError) as error:
        raise RemoteProtocolError(f"a malformed record: {error}") from error
    if not verify(announcement.peer, _CONTEXT + body, signature):
        raise RemoteProtocolError("a record with a bad signature")
    return SignedAnnouncement(announcement, expires_s, data)


def check_record(
    key_hash: bytes, subkey: bytes, value: bytes, expires_s: float, now: float
) -> SignedAnnouncement:
    """The announcement of a DHT entry, or RemoteProtocolError: see the module's text.

    `key_hash` is SHA-1 of the key (hivemind's DHT id), `subkey` and `value` are msgpack.
    """
    check_outside(subkey, value, expires_s, now)
    record = open_value(value)
    check_owner(subkey, record.peer, expires_s, record.expires_s)
    if key_hash not in _key_hashes(record.announcement.model, record.peer):
        raise RemoteProtocolError("a record under the wrong key")
    return record


def check_outside(subkey: bytes, value: bytes, expires_s: float, now: float) -> None:
    """What can be refused of an entry before it is opened."""
    if not math.isfinite(expires_s) or expires_s > now + EXPIRE_S + SKEW_S:
        raise RemoteProtocolError("a record that would live too long")
    if len(value) > MAX_RECORD_BYTES + 8 or not subkey:
        raise RemoteProtocolError("a record that is too large or has no owner")


def check_owner(subkey: bytes, signer: PeerId, told_s: float, signed_s: float) -> None:
    """The entry's owner and expiry are those that were signed."""
    if subkey != msgpack.packb(signer):
        raise RemoteProtocolError("a record under somebody else's name")
    if abs(signed_s - told_s) > 0.001:
        raise RemoteProtocolError("a record with an altered expiry")


def open_value(value: bytes) -> SignedAnnouncement:
    """The announcement in a stored value."""
    return open_record(unwrap(value))


def unwrap(value: bytes) -> bytes:
    """The bytes of a record in a stored value: msgpack around them."""
    try:
        data = msgpack.unpackb(
            value, max_bin_len=MAX_RECORD_BYTES, max_array_len=0, max_map_len=0, max_ext_len=0
        )
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        raise RemoteProtocolError("a malformed record") from error
    if not isinstance(data, bytes):
        raise RemoteProtocolError("a foreign record")
    return data


def _key_hashes(model: str, peer: PeerId) -> set[bytes]:
    return {
        hashlib.sha1(_packed_key(name, peer, shards)).digest()
        for name in (model, INDEX)
        for shards in SHARDS
    }


def _packed_key(model: str, peer: PeerId, shards: int) -> bytes:
    packed: bytes = msgpack.packb(directory_key(model, shard_of(peer, shards), shards))
    return packed


class Directory:
    """The announcements known at the moment; a pure fold over what arrives.

    `version` counts what changed, so that whoever derives something from the directory (a snapshot
    of 10,000 records) can keep it as long as nothing did, and mend it where little did.
    """

    def __init__(self) -> None:
        self.version = 0
        self._records: dict[PeerId, SignedAnnouncement] = {}
        self._changed: dict[PeerId, int] = {}
        """The version that each record came with, the latest at the end."""

    def merge(self, records: Iterable[SignedAnnouncement], received_s: float = math.inf) -> None:
        """Take what is newer; nothing lives for longer than EXPIRE_S (and the skew) from receipt.

        `received_s` is now, on the same clock as in `alive`: a clock that goes steadily, or else a
        record would outlive its peer by what the clock was put back.
        """
        latest_s = received_s + EXPIRE_S + SKEW_S
        for record in records:
            if record.expires_s > latest_s:
                record = replace(record, expires_s=latest_s)
            held = self._records.get(record.peer)
            if held is None or _rank(record) > _rank(held):
                self._put(record)

    def forget(self, peer: PeerId) -> None:
        """Drop a peer that was seen dead; a newer announcement brings it back."""
        held = self._records.get(peer)
        if held is not None and held.expires_s > -math.inf:
            self._put(SignedAnnouncement(held.announcement, -math.inf, held.data))

    def _put(self, record: SignedAnnouncement) -> None:
        self.version += 1
        self._records[record.peer] = record
        self._changed.pop(record.peer, None)
        self._changed[record.peer] = self.version

    def changed(self, since: int) -> list[PeerId]:
        """The peers whose record came, changed or was forgotten after that version."""
        news = itertools.takewhile(
            lambda peer: self._changed[peer] > since, reversed(self._changed)
        )
        return list(news)

    def record(self, peer: PeerId, now: float) -> SignedAnnouncement | None:
        """What the peer says, unless it ran out."""
        held = self._records.get(peer)
        return held if held is not None and held.expires_s > now else None

    def next_expiry(self, now: float) -> float:
        """When the first of those alive runs out if it is not renewed."""
        times = (record.expires_s for record in self._records.values())
        return min((time for time in times if time > now), default=math.inf)

    def alive(self, now: float) -> tuple[Announcement, ...]:
        """Announcements that have not run out, ordered by peer id."""
        return tuple(
            record.announcement
            for peer, record in sorted(self._records.items())
            if record.expires_s > now
        )

    def expire(self, now: float) -> None:
        """Give back the memory of those that ran out long ago."""
        self._records = {
            peer: record
            for peer, record in self._records.items()
            if record.expires_s > now - EXPIRE_S
            or (record.expires_s == -math.inf and record.announcement.issued_s > now - EXPIRE_S)
        }
        for peer in self._changed.keys() - self._records.keys():
            del self._changed[peer]


def _rank(record: SignedAnnouncement) -> tuple[int, float, bytes]:
    return record.announcement.sequence, record.announcement.issued_s, record.data


# --- body codec: a flat list, in this order -------------------------------------------------

_FIELDS = (25, 26, 27)
"""The last two came later: `most_layers` is there if it is not 0 or an offer follows, the offer if
there is one. A group's cut came later, too: its list has a fifth entry if the cut is told."""


def _to_body(a: Announcement, expires_s: float) -> list[Any]:
    later: list[Any] = [a.most_layers] if a.most_layers or a.offer else []
    if a.offer is not None:
        offer = a.offer
        later.append(
            [offer.name, offer.free_bytes, offer.host, offer.port, offer.leads, offer.waiting]
        )
    place = a.coordinates and [
        *a.coordinates.position_s,
        a.coordinates.height_s,
        a.coordinates.error,
    ]
    return [
        2,
        *(a.peer, a.model, a.model_name[:96], a.layers),
        *([a.span.first, a.span.end], a.state, a.dtype),
        a.device,
        [a.speed.decode_layer_s, a.speed.prefill_layer_s, a.speed.head_s, a.speed.row_layer_s],
        *(a.free_kv_tokens, a.queue_s, list(a.addresses), [list(pair) for pair in a.neighbours]),
        *(_group_body(a.group), a.software, a.issued_s, a.sequence, expires_s),
        *(a.rows, a.busy, a.kv_tokens, place, a.up_bytes_per_s, a.down_bytes_per_s),
        *later,
    ]


def _group_body(group: GroupMembership | None) -> list[Any] | None:
    if group is None:
        return None
    cut = [list(group.shares)] if group.shares else []
    return [group.group, group.rank, group.size, group.epoch, *cut]


def _from_body(body: list[Any]) -> tuple[Announcement, float]:
    if len(body) not in _FIELDS:
        raise ValueError("a record of another length")
    version, peer, model, name, layers, span, state, dtype, device, speed, *rest = body
    free, queue_s, addresses, neighbours, group, software, issued_s, sequence, *rest = rest
    expires_s, rows, busy, kv_tokens, place, up, down, *rest = rest
    if version != 2:
        raise ValueError(f"record version {version!r}")
    announcement = Announcement(
        peer=PeerId(text(peer, 64)),
        model=text(model, 64),
        model_name=text(name, 96),
        layers=integer(layers, 1 << 12),
        span=Span(*(integer(edge, 1 << 12) for edge in items(span, 2))),
        state=text(state, 16),  # type: ignore[arg-type]  # checked by the record
        dtype=text(dtype, 16),
        device=text(device, 64),
        speed=Speed(*(real(value) for value in items(speed, 4))),
        free_kv_tokens=integer(free, 1 << 40),
        queue_s=real(queue_s),
        addresses=tuple(text(address, 256) for address in items(addresses)),
        neighbours=tuple(
            (PeerId(text(other, 64)), real(rtt))
            for other, rtt in (items(pair, 2) for pair in items(neighbours))
        ),
        group=None if group is None else _group(items(group)),
        software=text(software, 32),
        issued_s=real(issued_s),
        sequence=integer(sequence, 1 << 62),
        rows=real(rows),
        busy=real(busy),
        kv_tokens=integer(kv_tokens, 1 << 40),
        coordinates=None if place is None else _place(items(place, 5)),
        up_bytes_per_s=None if up is None else real(up),
        down_bytes_per_s=None if down is None else real(down),
        most_layers=integer(rest[0], layers, least=2 - len(rest)) if rest else 0,
        offer=_offer(items(rest[1], 6)) if len(rest) == 2 else None,
    )
    return announcement, real(expires_s)


def _group(parts: list[Any]) -> GroupMembership:
    name, rank, size, epoch, *cut = parts
    if len(cut) > 1 or cut == [[]]:
        raise ValueError("a group of another length")
    return GroupMembership(
        *(text(name, 64), integer(rank, 64), integer(size, 64), integer(epoch, 1 << 62)),
        tuple(integer(share, SHARES_SUM) for part in cut for share in items(part)),
    )


def _offer(parts: list[Any]) -> GroupOffer:
    name, free_bytes, host, port, leads, waiting = parts
    return GroupOffer(
        *(text(name, 32), integer(free_bytes, 1 << 60), text(host, 64), integer(port, 1 << 16)),
        *(flag(leads), flag(waiting)),
    )


def _place(parts: list[Any]) -> Coordinates:
    x, y, z, height_s, error = map(real, parts)
    return Coordinates((x, y, z), height_s, error)
