"""An invitation to one epoch of a group: who is to hold which part of which layers; signed.

The leader asks peers of its LAN to hold a span together. What it sends says everything that a
member must know, and nothing that a member has to believe: the parts follow from the shares and
from the model's config, which the member has itself (`hexswarm.peer.groups.division`), and the
group's id is a hash of model, span and leader. So a leader can waste a member's time, as long as
the member lets it, and cannot make it hold more than it has, nor speak for somebody else's group.

It travels as `msgpack [body, signature]` like an announcement, over an authenticated stream. The
signature is there so that a member can show to whom it owes its place, and so that no leader's word
can be altered or made up by who relays it. It runs out: a member that was away does not follow an
old one. Epochs count up in each group, and a member takes none twice.

What a member makes of it is in `hexswarm.peer.groups.member`. Pure.
"""

from __future__ import annotations

import functools
import hashlib
import math
from dataclasses import dataclass
from typing import Any, Literal

import msgpack

from hexswarm.errors import RemoteProtocolError, UsageError
from hexswarm.flat import integer, items, real, text, unpack
from hexswarm.identity import Identity, verify
from hexswarm.records import NUMERICS, GroupMembership, PeerId, Span, check_shares

MOST_MEMBERS = 64
LAN_RTT_S = 2e-3
"""Two sums a layer at more than this cost more than any cut gains."""
VALID_S = 60.0
"""From an invitation's issue to its end."""
SKEW_S = 5.0
"""Tolerated difference of clocks, as for announcements."""
MAX_INVITATION_BYTES = 12288
"""64 members with the longest of addresses."""
MAX_EPOCH = 1 << 62

_CONTEXT = b"hexswarm/1 invitation\0"
_VERSION = 1

Code = Literal[
    "off",
    "unnamed",
    "model",
    "numerics",
    "far",
    "busy",
    "taken",
    "stale",
    "expired",
    "needed",
    "memory",
    "cut",
]
"""Why a member declines: it is not to be had under that name; it is not named; it has another
model; it computes with other numbers; the leader is not in its LAN; it has sessions; it is in
another epoch that lives; it has seen that epoch or a later one; the time is over; nobody else
holds its layers; its part does not fit; no such cut can be made."""

CODES: tuple[Code, ...] = Code.__args__  # type: ignore[attr-defined]


@dataclass(frozen=True, slots=True)
class Refusal:
    """A member's no."""

    code: Code
    reason: str = ""
    """For people."""
    epoch: int = 0
    """Of `stale`: the latest epoch of the group that the member knows of."""


@dataclass(frozen=True, slots=True)
class Seat:
    """One rank's place: who it is, and where its direct streams come in."""

    peer: PeerId
    host: str
    port: int


@dataclass(frozen=True, slots=True)
class Invitation:
    """One epoch of a group, before it exists."""

    name: str
    """Under which its members offer themselves, `auto` or another."""
    epoch: int
    model: str
    """Digest."""
    layers: int
    """Of the model."""
    span: Span
    numerics: str
    shares: tuple[int, ...]
    """Parts of a thousand, by rank."""
    seats: tuple[Seat, ...]
    """By rank; the first is the leader's."""
    kv_tokens: int
    """Tokens of the KV pool, the same for all ranks."""
    expires_s: float
    """Unix time."""

    def __post_init__(self) -> None:
        peers = {seat.peer for seat in self.seats}
        if not 2 <= len(self.seats) <= MOST_MEMBERS or len(peers) != len(self.seats):
            raise UsageError(f"a group has 2 to {MOST_MEMBERS} members, each once")
        check_shares(self.shares, len(self.seats))
        if self.span.end > self.layers or self.numerics not in NUMERICS:
            raise UsageError("a group holds layers that its model has, in numbers that there are")
        if not 0 < self.epoch <= MAX_EPOCH or self.kv_tokens < 1:
            raise UsageError("epochs are counted from 1, and a group has KV for some token")
        if not math.isfinite(self.expires_s):
            raise UsageError("an invitation ends at some time")

    @property
    def leader(self) -> PeerId:
        return self.seats[0].peer

    @property
    def group(self) -> str:
        """Id of the group."""
        return group_id(self.model, self.span, self.leader)

    @property
    def size(self) -> int:
        return len(self.seats)

    @property
    def topic(self) -> bytes:
        """Of the direct streams of this epoch."""
        return f"group/{self.group}/{self.epoch}".encode()

    def rank_of(self, peer: PeerId) -> int | None:
        return next((rank for rank, seat in enumerate(self.seats) if seat.peer == peer), None)

    def membership(self, rank: int) -> GroupMembership:
        """What the member of that rank announces."""
        return GroupMembership(self.group, rank, self.size, self.epoch, self.shares)


def group_id(model: str, span: Span, leader: PeerId) -> str:
    """16 hexadecimal digits; the same for every epoch."""
    return hashlib.sha256(f"{model} {span} {leader}".encode()).hexdigest()[:16]


def sign(invitation: Invitation, identity: Identity) -> bytes:
    """The bytes to send. Raises UsageError if `identity` is not the leader's."""
    if invitation.leader != identity.peer:
        raise UsageError("a leader invites in its own name")
    body = msgpack.packb(_to_body(invitation))
    data: bytes = msgpack.packb([body, identity.sign(_CONTEXT + body)])
    try:
        open_invitation(data)
    except RemoteProtocolError as error:
        raise UsageError(f"nobody would accept this invitation: {error}") from error
    return data


@functools.lru_cache(maxsize=64)
def open_invitation(data: bytes) -> Invitation:
    """Decode and verify. Raises RemoteProtocolError for anything that is not in order."""
    if len(data) > MAX_INVITATION_BYTES:
        raise RemoteProtocolError("an invitation is too large")
    try:
        body, signature = unpack(data, 2)
        invitation = _from_body(unpack(body, 11, most=MOST_MEMBERS))
    except (ValueError, TypeError, UsageError, RecursionError, OverflowError) as error:
        raise RemoteProtocolError(f"a malformed invitation: {error}") from error
    if not verify(invitation.leader, _CONTEXT + body, signature):
        raise RemoteProtocolError("an invitation with a bad signature")
    return invitation


def _to_body(told: Invitation) -> list[Any]:
    return [
        *(_VERSION, told.name, told.epoch, told.model, told.layers),
        *([told.span.first, told.span.end], told.numerics, list(told.shares)),
        [[seat.peer, seat.host, seat.port] for seat in told.seats],
        *(told.kv_tokens, told.expires_s),
    ]


def _from_body(body: list[Any]) -> Invitation:
    version, name, epoch, model, layers, span, numerics, shares, seats, kv_tokens, end_s = body
    if version != _VERSION:
        raise ValueError(f"invitation of version {version!r}")
    return Invitation(
        name=text(name, 32),
        epoch=integer(epoch, MAX_EPOCH),
        model=text(model, 64),
        layers=integer(layers, 1 << 12),
        span=Span(*(integer(edge, 1 << 12) for edge in items(span, 2))),
        numerics=text(numerics, 16),
        shares=tuple(integer(share, 1000) for share in items(shares)),
        seats=tuple(_seat(items(seat, 3)) for seat in items(seats)),
        kv_tokens=integer(kv_tokens, 1 << 40),
        expires_s=real(end_s),
    )


def _seat(parts: list[Any]) -> Seat:
    peer, host, port = parts
    return Seat(PeerId(text(peer, 64)), text(host, 64), integer(port, (1 << 16) - 1, least=1))
