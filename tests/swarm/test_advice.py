"""Advice as a signed record: what every node of the directory takes, and what it refuses."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hexswarm import advice as module
from hexswarm.advice import (
    MAX_MOVES,
    TAIL,
    Proposal,
    SignedAdvice,
    advice_key,
    check_entry,
    open_advice,
    open_entry,
    sign,
    tail_of,
)
from hexswarm.directory import EXPIRE_S, MAX_RECORD_BYTES, SKEW_S, directory_key
from hexswarm.errors import RemoteProtocolError, UsageError
from hexswarm.guard import _books
from hexswarm.identity import Identity
from hexswarm.records import Span
from tests.swarm.test_directory import RECORD, forge
from tests.swarm.test_directory import announcement as word

NOW = 1.7e9
MODEL = "ab" * 32
ME, OTHER = (Identity(bytes([index]) * 32) for index in range(2))


def proposal(**changes: Any) -> Proposal:
    moves = ((tail_of(OTHER.peer), Span(4, 8)), (tail_of(ME.peer), Span(0, 4)))
    return replace(Proposal(ME.peer, MODEL, 8, moves, 1234.5, (1 << 64) - 1, NOW), **changes)


TOLD = sign(proposal(), ME)
KEY = hashlib.sha1(msgpack.packb(advice_key(MODEL))).digest()


def admit(
    told: SignedAdvice = TOLD,
    *,
    key: bytes = KEY,
    subkey: bytes | None = None,
    value: bytes | None = None,
    expires_s: float | None = None,
    now: float = NOW,
) -> object:
    """`check_entry` as a node calls it, with one thing altered."""
    return check_entry(
        key,
        msgpack.packb(told.author) if subkey is None else subkey,
        msgpack.packb(told.data) if value is None else value,
        told.expires_s if expires_s is None else expires_s,
        now,
    )


def packed(body: list[Any], signer: Identity = ME, kind: Any = "advice") -> bytes:
    """A record as a hostile peer might make it: any body, well signed."""
    raw = msgpack.packb(body)
    data: bytes = msgpack.packb([kind, raw, signer.sign(module._CONTEXT + raw)])
    return data


def test_an_honest_advice_is_admitted_and_says_the_same() -> None:
    assert TOLD.proposal == proposal()
    assert admit() == TOLD == open_advice(TOLD.data) == open_entry(msgpack.packb(TOLD.data))
    assert TOLD.expires_s == NOW + EXPIRE_S
    assert sign(proposal(issued_s=NOW + 0.01), ME).sequence > TOLD.sequence
    assert _books(msgpack.packb(TOLD.data)) == (ME.peer, "", TOLD.sequence)


def test_announcements_are_admitted_as_before() -> None:
    key = hashlib.sha1(msgpack.packb(directory_key(RECORD.announcement.model, 0, 1))).digest()
    value, owner = msgpack.packb(RECORD.data), msgpack.packb(RECORD.peer)
    assert check_entry(key, owner, value, RECORD.expires_s, NOW) == RECORD
    with pytest.raises(RemoteProtocolError, match="wrong key"):
        check_entry(KEY, owner, value, RECORD.expires_s, NOW)
    assert _books(value) == (RECORD.peer, "", RECORD.announcement.sequence)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"subkey": msgpack.packb(OTHER.peer)}, "somebody else"),
        ({"subkey": b""}, "no owner"),
        ({"key": bytes(20)}, "wrong key"),
        ({"key": hashlib.sha1(msgpack.packb(advice_key("cd" * 32))).digest()}, "wrong key"),
        (
            {"key": hashlib.sha1(msgpack.packb(directory_key(MODEL, 0, 1))).digest()},
            "wrong key",
        ),
        ({"expires_s": NOW + EXPIRE_S + 1}, "altered expiry"),
        ({"expires_s": NOW + 1e6}, "live too long"),
        ({"now": NOW - SKEW_S - 1}, "live too long"),
        ({"value": msgpack.packb(bytes(MAX_RECORD_BYTES + 1))}, "malformed"),
        ({"value": msgpack.packb(bytes(9999))}, "too large"),
        ({"value": msgpack.packb("advice")}, "foreign"),
        ({"value": msgpack.packb(TOLD.data[:-1])}, "malformed"),
    ],
    ids=str,
)
def test_each_rule_of_admission(change: dict[str, Any], why: str) -> None:
    with pytest.raises(RemoteProtocolError, match=why):
        admit(**change)


def test_nobody_advises_in_another_name() -> None:
    body = module._to_body(proposal())
    stolen = packed(body, OTHER)
    for name in (ME.peer, OTHER.peer):
        with pytest.raises(RemoteProtocolError, match="bad signature"):
            admit(value=msgpack.packb(stolen), subkey=msgpack.packb(name))
    with pytest.raises(UsageError, match="own name"):
        sign(proposal(author=OTHER.peer), ME)


def test_a_signature_for_one_kind_of_record_is_none_for_another() -> None:
    """An announcement's body and signature in an advice's cover, and the other way round."""
    body, signature = msgpack.unpackb(RECORD.data)
    with pytest.raises(RemoteProtocolError):
        open_entry(msgpack.packb(msgpack.packb(["advice", body, signature])))
    _, body, signature = msgpack.unpackb(TOLD.data)
    with pytest.raises(RemoteProtocolError):
        open_entry(msgpack.packb(msgpack.packb([body, signature])))


@given(st.integers(0, len(TOLD.data) - 1), st.integers(1, 255))
@settings(max_examples=150)
def test_any_flipped_byte_is_refused(index: int, flip: int) -> None:
    data = bytearray(TOLD.data)
    data[index] ^= flip
    with pytest.raises(RemoteProtocolError):
        open_entry(msgpack.packb(bytes(data)))


@given(st.binary(max_size=200))
@settings(max_examples=150)
def test_any_bytes_in_its_cover_are_refused(junk: bytes) -> None:
    for data in (module._BEGIN + junk, msgpack.packb(["advice", junk, junk])):
        with pytest.raises(RemoteProtocolError):
            open_advice(data)


TAIL_OF_ME = tail_of(ME.peer)
MOVES = [[TAIL_OF_ME, 0, 4]]


@pytest.mark.parametrize(
    ("index", "value"),
    [
        *((0, 2), (0, None), (1, "nobody"), (1, 7), (2, "m" * 65), (3, 0), (3, 3), (3, 1 << 13)),
        *((4, []), (4, {}), (4, "ab"), (4, [[TAIL_OF_ME, 0]]), (4, [[TAIL_OF_ME, 4, 4]])),
        *((4, [[TAIL_OF_ME, -1, 4]]), (4, [[TAIL_OF_ME, 0, 9]]), (4, [[TAIL_OF_ME[1:], 0, 4]])),
        *((4, [[TAIL_OF_ME + "x", 0, 4]]), (4, MOVES * 2), (4, [[b"x" * TAIL, 0, 4]])),
        *((4, [[f"{at:010}", 0, 4] for at in range(MAX_MOVES + 1)]), (5, 0.0), (5, -1.0)),
        *((5, float("nan")), (5, float("inf")), (5, "1"), (6, -1), (6, 1.0), (7, float("nan"))),
        *((7, -1.0), (7, "now")),
    ],
    ids=str,
)
def test_the_schema_is_strict_also_if_well_signed(index: int, value: Any) -> None:
    body = module._to_body(proposal())
    body[index] = value
    with pytest.raises(RemoteProtocolError):
        open_advice(packed(body))


def test_a_longer_or_shorter_body_is_refused() -> None:
    body = module._to_body(proposal())
    for other in (body[:-1], [*body, 0]):
        with pytest.raises(RemoteProtocolError):
            open_advice(packed(other))
    with pytest.raises(RemoteProtocolError):
        open_advice(packed(body, kind="advise"))


def test_the_largest_advice_fits() -> None:
    moves = tuple((f"{at:0{TAIL}}", Span(4094, 4096)) for at in range(MAX_MOVES))
    told = sign(proposal(layers=4096, moves=moves, tokens_per_s=1 / 3, issued_s=NOW + 1 / 3), ME)
    assert len(told.data) <= MAX_RECORD_BYTES
    assert told.proposal.moves == moves
    with pytest.raises(UsageError):
        proposal(layers=4096, moves=(*moves, ("x" * TAIL, Span(0, 1))))


# --- what planners know of a peer ---------------------------------------------------------------


def test_who_stays_announces_as_before_and_others_how_many_layers_they_hold() -> None:
    """One field more, in the same version: nobody has to be upgraded for those who stay."""
    assert len(msgpack.unpackb(msgpack.unpackb(RECORD.data)[0])) == 25
    moving = forge(word(most_layers=12))
    assert len(msgpack.unpackb(msgpack.unpackb(moving.data)[0])) == 26
    opened = open_entry(msgpack.packb(moving.data))
    assert opened == moving
    with pytest.raises(UsageError):
        word(most_layers=31)


@pytest.mark.parametrize("most", [0, -1, 31, 1.0, True, None, "12"])
def test_the_field_has_one_form(most: Any) -> None:
    with pytest.raises(RemoteProtocolError):
        open_entry(msgpack.packb(forge(word(most_layers=12), _25=most).data))
