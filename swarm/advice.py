"""Advice in the directory: who should hold what, as one peer of the swarm proposes; signed.

A record of its own beside the announcements, under `hexswarm/1/<digest>/advice`, one per author:
the moves of `router.placement.advice`, in their order. It is admitted by the rules of announcements
(`directory`): subkey = the signer, a bounded size and expiry, a strict schema. It is only ever a
proposal: readers value it in their own view before they follow.

A peer is named by the last `TAIL` characters of its id, for 96 whole ids would not fit in 2 kB; 58
bits are enough to tell peers apart that nobody ground on purpose, and a tail that fits two peers
names neither. A longer advice tells its first moves: the next one goes on from there.

It lives as long as an announcement and is not renewed: everybody reads it within seconds, and what
is left of it after 90 s is known to those who follow. So its time of issue says everything: expiry
and sequence follow from it, and an author cannot be ahead of its time by more than the skew.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from typing import Any

import msgpack

from hexswarm import directory
from hexswarm.directory import EXPIRE_S, MAX_RECORD_BYTES, SignedAnnouncement
from hexswarm.errors import RemoteProtocolError, UsageError
from hexswarm.flat import integer, items, real, text, unpack
from hexswarm.identity import Identity, verify
from hexswarm.records import PeerId, Span

MAX_MOVES = 96
TAIL = 10

_CONTEXT = b"hexswarm/1 advice\0"
_KIND = "advice"
_BEGIN = msgpack.packb([_KIND, b"", b""])[: 2 + len(_KIND)]
"""How the bytes of an advice begin, and those of an announcement do not."""
_VERSION = 1

Proposed = tuple[str, Span]
"""The tail of a peer's id, and what it should hold."""


def tail_of(peer: str) -> str:
    return peer[-TAIL:]


def advice_key(model: str) -> str:
    """DHT key of all advice for `model` (a digest)."""
    return f"hexswarm/1/{model}/advice"


@dataclass(frozen=True, slots=True)
class Proposal:
    """What one peer advises."""

    author: PeerId
    model: str
    layers: int
    """Of the model."""
    moves: tuple[Proposed, ...]
    tokens_per_s: float
    """What the swarm would pass after the last move, as its author reckons."""
    seed: int
    """Of the census that it was made from: whoever has the same can compute it again."""
    issued_s: float
    """Unix time."""

    def __post_init__(self) -> None:
        if not 1 <= len(self.moves) <= MAX_MOVES:
            raise UsageError(f"an advice has 1 to {MAX_MOVES} moves")
        if any(len(tail) != TAIL or to.end > self.layers for tail, to in self.moves):
            raise UsageError("a move is of one peer, to layers that the model has")
        if len({tail for tail, _ in self.moves}) != len(self.moves):
            raise UsageError("a peer moves once")
        if self.tokens_per_s <= 0 or self.issued_s < 0:
            raise UsageError("an advice promises something, at some time")


@dataclass(frozen=True, slots=True)
class SignedAdvice:
    """A proposal, and the bytes that prove it."""

    proposal: Proposal
    data: bytes

    @property
    def author(self) -> PeerId:
        return self.proposal.author

    @property
    def expires_s(self) -> float:
        return self.proposal.issued_s + EXPIRE_S

    @property
    def sequence(self) -> int:
        return int(self.proposal.issued_s * 1000)


def sign(proposal: Proposal, identity: Identity) -> SignedAdvice:
    """Seal `proposal`. Raises UsageError if it is not the identity's own."""
    if proposal.author != identity.peer:
        raise UsageError("a peer advises in its own name")
    body = msgpack.packb(_to_body(proposal))
    return open_advice(msgpack.packb([_KIND, body, identity.sign(_CONTEXT + body)]))


@functools.lru_cache(maxsize=256)
def open_advice(data: bytes) -> SignedAdvice:
    """Decode and verify. Raises RemoteProtocolError for anything that is not in order."""
    if len(data) > MAX_RECORD_BYTES:
        raise RemoteProtocolError("an advice is too large")
    try:
        kind, body, signature = unpack(data, 3)
        proposal = _from_body(unpack(body, 8, most=MAX_MOVES))
    except (ValueError, TypeError, UsageError, RecursionError, OverflowError) as error:
        raise RemoteProtocolError(f"a malformed advice: {error}") from error
    if kind != _KIND or not verify(proposal.author, _CONTEXT + body, signature):
        raise RemoteProtocolError("an advice with a bad signature")
    return SignedAdvice(proposal, data)


def open_entry(value: bytes) -> SignedAnnouncement | SignedAdvice:
    """What a stored value holds. Raises RemoteProtocolError."""
    data = directory.unwrap(value)
    return open_advice(data) if data.startswith(_BEGIN) else directory.open_record(data)


def check_entry(
    key_hash: bytes, subkey: bytes, value: bytes, expires_s: float, now: float
) -> SignedAnnouncement | SignedAdvice:
    """The rule of admission of every DHT node: an announcement or an advice, under its own key.

    Raises RemoteProtocolError; see `directory.check_record`.
    """
    directory.check_outside(subkey, value, expires_s, now)
    entry = open_entry(value)
    if isinstance(entry, SignedAnnouncement):
        return directory.check_record(key_hash, subkey, value, expires_s, now)
    directory.check_owner(subkey, entry.author, expires_s, entry.expires_s)
    key: bytes = msgpack.packb(advice_key(entry.proposal.model))
    if key_hash != hashlib.sha1(key).digest():
        raise RemoteProtocolError("an advice under the wrong key")
    return entry


def _to_body(told: Proposal) -> list[Any]:
    moves = [[tail, to.first, to.end] for tail, to in told.moves]
    return [
        *(_VERSION, told.author, told.model, told.layers, moves),
        *(told.tokens_per_s, told.seed, told.issued_s),
    ]


def _from_body(body: list[Any]) -> Proposal:
    version, author, model, layers, moves, tokens_per_s, seed, issued_s = body
    if version != _VERSION:
        raise ValueError(f"advice of version {version!r}")
    return Proposal(
        author=PeerId(text(author, 64)),
        model=text(model, 64),
        layers=integer(layers, 1 << 12),
        moves=tuple(_move(items(move, 3)) for move in items(moves)),
        tokens_per_s=real(tokens_per_s),
        seed=integer(seed, (1 << 64) - 1),
        issued_s=real(issued_s),
    )


def _move(parts: list[Any]) -> Proposed:
    tail, first, end = parts
    return text(tail, TAIL), Span(integer(first, 1 << 12), integer(end, 1 << 12))
