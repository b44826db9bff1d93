"""Signed announcements, the rule of admission, and the view merged from them."""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import replace
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hexswarm import directory as module
from hexswarm.directory import (
    EXPIRE_S,
    INDEX,
    MAX_RECORD_BYTES,
    SHARDS,
    SKEW_S,
    Directory,
    SignedAnnouncement,
    check_record,
    directory_key,
    open_record,
    shard_count,
    shard_of,
    sign,
)
from hexswarm.errors import RemoteProtocolError, UsageError
from hexswarm.identity import Identity
from hexswarm.records import Announcement, GroupMembership, GroupOffer, PeerId, Span, Speed
from tests.strategies import announcements, peer_id

NOW = 1.7e9
MODEL = "ab" * 32
IDENTITIES = [Identity(bytes([index]) * 32) for index in range(4)]
ME, OTHER = IDENTITIES[:2]


def announcement(identity: Identity = ME, **changes: Any) -> Announcement:
    values: dict[str, Any] = {
        "peer": identity.peer,
        "model": MODEL,
        "model_name": "SmolLM2-135M-Instruct",
        "layers": 30,
        "span": Span(0, 10),
        "state": "online",
        "dtype": "float32",
        "device": "cpu",
        "speed": Speed(0.001, 0.0001, 0.002),
        "free_kv_tokens": 16384,
        "queue_s": 0.0,
        "addresses": ("/ip4/127.0.0.1/tcp/31337",),
        "issued_s": NOW,
        "sequence": 1,
    }
    return Announcement(**{**values, **changes})


RECORD = sign(announcement(), NOW + EXPIRE_S, ME)
KEY = hashlib.sha1(msgpack.packb(directory_key(MODEL, 0, 1))).digest()


def admit(
    record: SignedAnnouncement = RECORD,
    *,
    key: bytes = KEY,
    subkey: bytes | None = None,
    value: bytes | None = None,
    expires_s: float | None = None,
    now: float = NOW,
) -> SignedAnnouncement:
    """`check_record` as a node calls it, with one thing altered."""
    return check_record(
        key,
        msgpack.packb(record.peer) if subkey is None else subkey,
        msgpack.packb(record.data) if value is None else value,
        record.expires_s if expires_s is None else expires_s,
        now,
    )


def forge(announcement: Announcement, signer: Identity = ME, **changes: Any) -> SignedAnnouncement:
    """A record as a hostile peer might make it: any body, well signed."""
    body = module._to_body(announcement, NOW + EXPIRE_S)
    for index, value in changes.items():
        body[int(index[1:])] = value
    packed = msgpack.packb(body)
    data = msgpack.packb([packed, signer.sign(module._CONTEXT + packed)])
    return SignedAnnouncement(announcement, NOW + EXPIRE_S, data)


# --- codec --------------------------------------------------------------------------------------


@given(announcements(), st.sampled_from(IDENTITIES), st.floats(0, 1e10))
def test_round_trip(told: Announcement, identity: Identity, expires_s: float) -> None:
    told = replace(told, peer=identity.peer)
    record = sign(told, expires_s, identity)
    assert open_record(record.data) == record == SignedAnnouncement(told, expires_s, record.data)
    assert len(record.data) <= MAX_RECORD_BYTES


@settings(max_examples=200)
@given(st.integers(0, len(RECORD.data) - 1), st.integers(1, 255))
def test_any_flipped_byte_is_refused(index: int, flip: int) -> None:
    data = bytearray(RECORD.data)
    data[index] ^= flip
    with pytest.raises(RemoteProtocolError):
        open_record(bytes(data))


@settings(max_examples=300)
@given(
    st.binary(max_size=300) | st.binary(max_size=40).map(lambda b: msgpack.packb([b, bytes(64)]))
)
def test_any_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        open_record(data)


@pytest.mark.parametrize(
    "data",
    [
        msgpack.packb([b"", b""]),
        msgpack.packb([1, 2]),
        msgpack.packb(["body", "signature"]),
        msgpack.packb([[1] * 19, bytes(64)]),
        msgpack.packb([msgpack.packb([1] * 19), bytes(64)]),
        msgpack.packb([msgpack.packb([[]] * 19), bytes(64)]),
        msgpack.packb([msgpack.packb({}), bytes(64)]),
        b"\x91" * 2000,
        b"\xdd\xff\xff\xff\xff",
        bytes(MAX_RECORD_BYTES + 1),
    ],
)
def test_hostile_records_are_refused(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        open_record(data)


@pytest.mark.parametrize("signature", [None, 7, "x" * 64, [], b"", bytes(64), bytes(65)])
def test_a_signature_of_another_type_is_refused(signature: Any) -> None:
    body = msgpack.unpackb(RECORD.data)[0]
    with pytest.raises(RemoteProtocolError):
        open_record(msgpack.packb([body, signature]))


BODY = [
    *((0, 1), (1, "nobody"), (2, "m" * 65), (3, "n" * 97), (4, 0), (4, 1 << 13), (4, 5), (5, [0])),
    *((5, [5, 5]), (5, [0, 31]), (6, "gone"), (7, "float64"), (8, "d" * 65), (9, [1, 2])),
    *((9, [float("nan")] * 4), (9, [-1.0, 0.0, 0.0, 0.0]), (10, -1), (10, True), (10, 1 << 41)),
    *((11, float("inf")), (11, -1), (12, ["a"] * 9), (12, ["a" * 257]), (12, "a"), (13, [[1]])),
    *((13, [["p", float("nan")]]), (13, [["p", 1]] * 9), (14, [1]), (14, ["g", 3, 2, 0])),
    *((15, "s" * 33), (16, float("nan")), (16, "now"), (17, -1), (17, 1 << 63), (18, float("inf"))),
    *((19, -1.0), (20, 1.5), (20, float("nan")), (21, -1), (22, [0.0] * 4), (22, [9e9] * 5)),
    *((22, [0.0, 0.0, 0.0, -1.0, 0.0]), (23, 0.0), (23, float("inf")), (24, "fast")),
    *((18, None), (1, {}), (2, b"bytes"), (9, [msgpack.Timestamp(1)] * 4)),
]


OFFER = GroupOffer("lab", 1 << 30, "10.0.0.1", 4711, leads=True)
LATER = [
    *((14, ["g", 0, 2, 1, []]), (14, ["g", 0, 2, 1, [500]]), (14, ["g", 0, 2, 1, [500, 501]])),
    *(
        (14, ["g", 0, 2, 1, [1000, 0]]),
        (14, ["g", 0, 2, 1, [999.0, 1]]),
        (14, ["g", 0, 2, 1, 5]),
    ),
    *((14, ["g", 0, 2, 1, [500, 500], 0]), (25, -1), (25, 31), (25, None), (26, None), (26, [])),
    *((26, ["", 1, "h", 1, False, False]), (26, ["lab", -1, "h", 1, False, False])),
    *((26, ["lab", 1, "h", 0, False, False]), (26, ["lab", 1, "h", 1, 1, False])),
    *((26, ["lab", 1, "h", 1, False]), (26, ["lab", 1, "h", 1, False, False, False])),
    *((26, ["lab", 1, b"h", 1, False, False]), (26, ["lab", 1, "h" * 65, 1, False, False])),
]


@pytest.mark.parametrize(("index", "value"), LATER, ids=str)
def test_so_it_is_for_what_came_later(index: int, value: Any) -> None:
    told = announcement(group=GroupMembership("g", 0, 2, 1, (600, 400)), offer=OFFER)
    assert open_record(forge(told).data).announcement == told
    with pytest.raises(RemoteProtocolError):
        open_record(forge(told, **{f"_{index}": value}).data)


def test_a_record_is_no_longer_than_what_it_tells() -> None:
    """Who offers nothing and tells no cut writes what it always wrote."""
    usual = announcement(group=GroupMembership("g", 0, 2, 1))
    body = module._to_body(usual, NOW)
    assert (len(body), len(body[14])) == (25, 4)
    assert len(module._to_body(replace(usual, most_layers=3), NOW)) == 26
    assert len(module._to_body(replace(usual, offer=OFFER), NOW)) == 27


@pytest.mark.parametrize(("index", "value"), BODY, ids=str)
def test_the_schema_is_strict_also_if_well_signed(index: int, value: Any) -> None:
    with pytest.raises(RemoteProtocolError):
        open_record(forge(announcement(), **{f"_{index}": value}).data)


def test_what_sign_makes_is_accepted_at_the_largest_fields() -> None:
    """Addresses and neighbours that do not fit are left out, from the end; the rest stands."""
    largest = announcement(
        model="f" * 64,
        model_name="\u6a21" * 200,
        layers=4096,
        span=Span(4094, 4096),
        state="draining",
        dtype="bfloat16",
        device="d" * 64,
        speed=Speed(1 / 3, 1 / 3, 1 / 3),
        free_kv_tokens=1 << 40,
        queue_s=1 / 3,
        addresses=tuple(f"{n}" + "a" * 255 for n in range(8)),
        neighbours=tuple((PeerId("1" * 63 + str(n)), 1 / 3) for n in range(8)),
        group=GroupMembership("g" * 64, 62, 64, 1 << 62, (*[15] * 63, 55)),
        offer=GroupOffer("n" * 32, 1 << 60, "h" * 64, 65535, leads=True, waiting=True),
        most_layers=4096,
        software="s" * 32,
        issued_s=1 / 3,
        sequence=1 << 62,
    )
    record = sign(largest, NOW, ME)
    assert len(record.data) <= MAX_RECORD_BYTES
    assert len(msgpack.packb(record.data)) <= MAX_RECORD_BYTES + 8
    assert record.announcement.neighbours == ()
    assert record.announcement.addresses == largest.addresses[: len(record.announcement.addresses)]
    assert len(record.announcement.addresses) >= 3
    assert record.announcement.model_name == "\u6a21" * 96
    usual = replace(
        largest, model_name="M", addresses=("/ip4/1.2.3.4/tcp/31337",) * 8, device="cuda:0"
    )
    assert sign(usual, NOW, ME).announcement == usual, "nothing usual is left out"


def test_we_sign_only_what_others_accept() -> None:
    with pytest.raises(UsageError, match="only itself"):
        sign(announcement(OTHER), NOW, ME)
    for wrong in ({"device": "d" * 65}, {"addresses": ("a" * 2000,)}, {"software": "s" * 33}):
        with pytest.raises(UsageError):
            sign(announcement(**wrong), NOW, ME)
    with pytest.raises(UsageError):
        sign(announcement(), float("inf"), ME)


# --- admission ------------------------------------------------------------------------------------


def test_an_honest_record_is_admitted_under_each_of_its_keys() -> None:
    for name, shards in itertools.product((MODEL, INDEX), SHARDS):
        key = directory_key(name, shard_of(ME.peer, shards), shards)
        assert admit(key=hashlib.sha1(msgpack.packb(key)).digest()) == RECORD


def test_the_expiry_horizon() -> None:
    assert admit(now=RECORD.expires_s - EXPIRE_S - SKEW_S)
    with pytest.raises(RemoteProtocolError, match="live too long"):
        admit(now=RECORD.expires_s - EXPIRE_S - SKEW_S - 1)
    for expires_s in (float("inf"), float("nan"), 1e300):
        with pytest.raises(RemoteProtocolError, match="live too long"):
            admit(expires_s=expires_s)


def test_a_record_that_has_run_out_is_let_through() -> None:
    """hivemind would drop the whole dictionary with it; see the module."""
    assert admit(now=RECORD.expires_s + 1000) == RECORD


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"subkey": b""}, "no owner"),
        ({"subkey": msgpack.packb(OTHER.peer)}, "somebody else"),
        ({"subkey": RECORD.peer.encode()}, "somebody else"),
        ({"expires_s": RECORD.expires_s + 1}, "altered expiry"),
        ({"expires_s": RECORD.expires_s - 1}, "altered expiry"),
        ({"key": bytes(20)}, "wrong key"),
        (
            {"key": hashlib.sha1(msgpack.packb(directory_key("cd" * 32, 0, 1))).digest()},
            "wrong key",
        ),
        ({"value": msgpack.packb("text")}, "foreign"),
        ({"value": msgpack.packb([RECORD.data])}, "malformed"),
        ({"value": msgpack.packb({"a": 1})}, "malformed"),
        ({"value": msgpack.packb({(1, 2): 1})}, "malformed"),
        ({"value": b""}, "malformed"),
        ({"value": b"\xc1"}, "malformed"),
        ({"value": RECORD.data}, "foreign|malformed"),
        ({"value": b"\x91" * 2000}, "malformed|foreign"),
        ({"value": msgpack.packb(bytes(MAX_RECORD_BYTES + 1))}, "malformed"),
        ({"value": msgpack.packb(bytes(10_000))}, "too large"),
        ({"value": msgpack.packb(msgpack.ExtType(80, b"x" * 9))}, "malformed"),
        ({"value": msgpack.packb(b"junk")}, "malformed"),
    ],
    ids=str,
)
def test_each_rule_of_admission(change: dict[str, Any], why: str) -> None:
    with pytest.raises(RemoteProtocolError, match=why):
        admit(**change)


def test_nobody_speaks_for_another() -> None:
    """A well-made record signed with another key is refused under either name."""
    stolen = forge(announcement(ME), signer=OTHER)
    for name in (ME.peer, OTHER.peer):
        with pytest.raises(RemoteProtocolError, match="bad signature"):
            admit(stolen, subkey=msgpack.packb(name))


@settings(max_examples=200)
@given(st.binary(max_size=100))
def test_any_value_is_refused_and_nothing_worse(value: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        admit(value=value)


def test_shards() -> None:
    assert [shard_count(n) for n in (0, 500, 501, 5000, 5001)] == [1, 1, 16, 16, 64]
    peers = [peer_id(index) for index in range(200)]
    assert {shard_of(peer, 16) for peer in peers} == set(range(16))
    assert {shard_of(peer, 1) for peer in peers} == {0}


# --- the view ----------------------------------------------------------------------------------

records = st.lists(
    st.builds(
        lambda told, identity, ttl: sign(replace(told, peer=identity.peer), NOW + ttl, identity),
        announcements(),
        st.sampled_from(IDENTITIES),
        st.integers(-5, 5),
    ),
    max_size=6,
)


def merged(*parts: list[SignedAnnouncement]) -> Directory:
    made = Directory()
    for part in parts:
        made.merge(part)
    return made


@settings(max_examples=60)
@given(records, records, st.data())
def test_merging_is_commutative_associative_and_idempotent(
    a: list[SignedAnnouncement], b: list[SignedAnnouncement], data: st.DataObject
) -> None:
    """The view depends on what arrived, not on order, grouping or repetition."""
    shuffled = data.draw(st.permutations([*a, *b, *a]))
    one, other = merged(a, b), merged(shuffled)
    assert one._records == other._records
    assert one.alive(NOW) == other.alive(NOW) == merged(b, a, b).alive(NOW)


@settings(max_examples=60)
@given(records)
def test_the_view_has_one_live_word_of_each_peer(told: list[SignedAnnouncement]) -> None:
    alive = merged(told).alive(NOW)
    assert [a.peer for a in alive] == sorted({a.peer for a in alive})
    for found in alive:
        own = [record for record in told if record.peer == found.peer]
        assert found.sequence == max(record.announcement.sequence for record in own)


def test_a_newer_word_wins_even_if_it_runs_out_earlier() -> None:
    new = sign(announcement(state="draining", sequence=2), NOW + 10, ME)
    for order in ([RECORD, new], [new, RECORD]):
        assert [a.state for a in merged(order).alive(NOW)] == ["draining"]
        assert merged(order).alive(NOW + 11) == ()


def test_a_forgotten_peer_returns_with_its_next_word_only() -> None:
    view = merged([RECORD])
    view.forget(ME.peer)
    view.forget(OTHER.peer)
    view.merge([RECORD])
    assert view.alive(NOW) == ()
    view.merge([sign(announcement(sequence=2), NOW + 90, ME)])
    assert len(view.alive(NOW)) == 1


def test_changes_are_counted() -> None:
    """The version moves with what changed, and with nothing else."""
    mine, other = RECORD, sign(announcement(OTHER), NOW + EXPIRE_S, OTHER)
    newer = sign(announcement(sequence=2), NOW + 2 * EXPIRE_S, ME)
    directory = merged([mine])
    first = directory.version
    directory.merge([mine])
    assert directory.version == first
    assert directory.changed(first) == []
    directory.merge([other])
    assert directory.changed(first) == [OTHER.peer]
    second = directory.version
    directory.merge([newer, other])
    assert directory.changed(second) == [ME.peer]
    assert set(directory.changed(first)) == {ME.peer, OTHER.peer}
    third = directory.version
    directory.forget(OTHER.peer)
    directory.forget(OTHER.peer)
    directory.forget(PeerId("nobody"))
    assert directory.version == third + 1
    assert directory.changed(third) == [OTHER.peer]
    assert directory.changed(directory.version) == []


def test_one_record_and_the_next_end() -> None:
    directory = merged([RECORD, sign(announcement(OTHER), NOW + 10, OTHER)])
    assert directory.record(OTHER.peer, NOW) is not None
    assert directory.record(OTHER.peer, NOW + 10) is None
    assert directory.record(PeerId("nobody"), NOW) is None
    assert directory.next_expiry(NOW) == NOW + 10
    assert directory.next_expiry(NOW + 10) == NOW + EXPIRE_S
    assert directory.next_expiry(NOW + EXPIRE_S) == float("inf")
    directory.expire(NOW + 3 * EXPIRE_S)
    assert directory.changed(0) == []


def test_nothing_outlives_its_receipt_by_more_than_a_period_of_expiry() -> None:
    """A word from a clock far ahead, however it came here, ends like all others."""
    ahead = sign(announcement(), NOW + 3600, ME)
    view = Directory()
    view.merge([ahead], NOW)
    assert len(view.alive(NOW + EXPIRE_S)) == 1
    assert view.alive(NOW + EXPIRE_S + SKEW_S) == ()
    view.merge([ahead], NOW + 2 * EXPIRE_S)
    assert view.alive(NOW + 2 * EXPIRE_S) == (), "the same word again is no sign of life"
    view.merge([sign(announcement(sequence=2), NOW + 50, ME)], NOW)
    assert view.alive(NOW + 51) == (), "what ends earlier ends earlier"


def test_memory_of_the_dead_is_given_back() -> None:
    view = merged([RECORD, sign(announcement(OTHER), NOW + EXPIRE_S, OTHER)])
    view.forget(OTHER.peer)
    view.expire(NOW + EXPIRE_S - 1)
    assert len(view._records) == 2
    assert len(view.alive(NOW)) == 1
    view.expire(NOW + 2 * EXPIRE_S + 1)
    assert view._records == {}
