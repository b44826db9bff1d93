"""Invitations: what is signed is what is read, and what a member makes of one."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hexswarm.errors import OutOfMemory, RemoteProtocolError, UsageError
from hexswarm.identity import Identity
from hexswarm.peer.cuts import whole
from hexswarm.peer.groups import invitation as module
from hexswarm.peer.groups.actions import Answer, Close, Facts, Leave, Load, Own
from hexswarm.peer.groups.division import Room, cut_of, part_needs, shares_for
from hexswarm.peer.groups.invitation import (
    CODES,
    MAX_INVITATION_BYTES,
    MOST_MEMBERS,
    VALID_S,
    Invitation,
    Refusal,
    Seat,
    open_invitation,
    sign,
)
from hexswarm.peer.groups.member import PROMISE_S, Member, Sight
from hexswarm.records import GroupMembership, PeerId, Span
from tests.peer.lan import KV_TOKENS, LAYERS, MODEL, ROOM, announced, sizes_of

LEADER, OTHER = (Identity(bytes([number]) * 32) for number in (1, 2))
ME, THIRD = PeerId("me"), PeerId("third")
WALL = 1.7e9
NOW = 50.0


def invited(**changes: Any) -> Invitation:
    values: dict[str, Any] = {
        "name": "lab",
        "epoch": 7,
        "model": MODEL,
        "layers": LAYERS,
        "span": Span(0, 4),
        "numerics": "float32",
        "shares": (400, 600),
        "seats": (Seat(LEADER.peer, "10.0.0.1", 4711), Seat(ME, "fd00::2", 4712)),
        "kv_tokens": KV_TOKENS,
        "expires_s": WALL + VALID_S,
    }
    return Invitation(**{**values, **changes})


@st.composite
def invitations(draw: st.DrawFn) -> Invitation:
    count = draw(st.integers(2, 5))
    ends = sorted(draw(st.sets(st.integers(1, 999), min_size=count - 1, max_size=count - 1)))
    edges = [0, *ends, 1000]
    seats = [Seat(LEADER.peer, "10.0.0.1", draw(st.integers(1, 65535)))]
    seats += [Seat(PeerId(f"peer{number}"), "h" * number, number) for number in range(1, count)]
    return invited(
        epoch=draw(st.integers(1, module.MAX_EPOCH)),
        shares=tuple(b - a for a, b in itertools.pairwise(edges)),
        seats=tuple(seats),
        kv_tokens=draw(st.integers(1, 1 << 40)),
        expires_s=draw(st.floats(0, 1e10)),
    )


# --- the record -----------------------------------------------------------------------------------


@given(invitations())
def test_round_trip(told: Invitation) -> None:
    """What is signed is read back, and every rank's membership is one that can be announced."""
    assert open_invitation(sign(told, LEADER)) == told
    for rank, seat in enumerate(told.seats):
        assert told.rank_of(seat.peer) == rank
        assert told.membership(rank) == GroupMembership(
            told.group, rank, told.size, told.epoch, told.shares
        )


def test_the_largest_group_can_be_invited() -> None:
    seats = [Seat(PeerId(f"{number:x<64}"), "h" * 64, 65535) for number in range(MOST_MEMBERS)]
    seats[0] = replace(seats[0], peer=LEADER.peer)
    shares = (*[15] * 63, 55)
    data = sign(invited(name="n" * 32, seats=tuple(seats), shares=shares), LEADER)
    assert len(data) <= MAX_INVITATION_BYTES


@settings(max_examples=100)
@given(st.data())
def test_any_flipped_byte_is_refused(data: st.DataObject) -> None:
    signed = bytearray(sign(invited(), LEADER))
    signed[data.draw(st.integers(0, len(signed) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(RemoteProtocolError):
        open_invitation(bytes(signed))


@given(st.binary(max_size=200))
def test_any_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        open_invitation(data)


@pytest.mark.parametrize(
    ("index", "value"),
    [
        *((0, 2), (1, "n" * 33), (2, 0), (2, -1), (2, True), (2, 1 << 63), (3, 7), (4, 3)),
        *((5, [0]), (5, [0, 9]), (5, [3, 3]), (6, "float8"), (7, [500]), (7, [1000, 0])),
        *((7, [500, 501]), (7, [500.0, 500]), (8, []), (8, [["a", "h", 1]]), (9, 0), (9, "1")),
        *((8, [["a", "h", 1], ["b", "h", 1]]), (8, [["a", "h", 1], ["a", "h", 1]])),
        *((10, float("nan")), (10, float("inf")), (10, None)),
    ],
    ids=str,
)
def test_the_schema_is_strict_also_if_well_signed(index: int, value: Any) -> None:
    body = module._to_body(invited())
    body[index] = value
    packed = msgpack.packb(body)
    data = msgpack.packb([packed, LEADER.sign(module._CONTEXT + packed)])
    with pytest.raises(RemoteProtocolError):
        open_invitation(data)


def test_an_announcement_signature_is_no_invitation_and_nobody_signs_for_others() -> None:
    packed = msgpack.packb(module._to_body(invited()))
    with pytest.raises(RemoteProtocolError, match="bad signature"):
        open_invitation(msgpack.packb([packed, LEADER.sign(b"hexswarm/1 announcement\0" + packed)]))
    with pytest.raises(UsageError, match="own name"):
        sign(invited(), OTHER)
    with pytest.raises(RemoteProtocolError, match="too large"):
        open_invitation(bytes(MAX_INVITATION_BYTES + 1))


@pytest.mark.parametrize(
    "bad",
    [
        {"seats": (Seat(LEADER.peer, "h", 1),), "shares": (1000,)},
        {"seats": (Seat(ME, "h", 1), Seat(ME, "h", 2))},
        {"shares": (500, 400)}, {"span": Span(4, 9)}, {"numerics": "float8"}, {"epoch": 0},
        {"kv_tokens": 0}, {"expires_s": float("inf")},
    ],
)  # fmt: skip
def test_a_senseless_invitation_is_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        invited(**bad)


def test_the_id_of_a_group_is_that_of_its_model_span_and_leader() -> None:
    same = invited(epoch=8, shares=(1, 999))
    assert same.group == invited().group
    assert same.topic != invited().topic
    assert invited(span=Span(0, 5)).group != invited().group
    assert invited(model="cd" * 32).group != invited().group
    seats = (Seat(OTHER.peer, "h", 1), Seat(ME, "h", 1))
    assert invited(seats=seats).group != invited().group


# --- what it means --------------------------------------------------------------------------------


@given(
    st.lists(
        st.builds(Room, st.integers(200_000, 3_000_000), st.sampled_from([0.001, 0.003, 0.01])),
        min_size=2,
        max_size=4,
    )
)
def test_shares_fit_everybodys_memory_and_all_compute_the_same_cut(rooms: list[Room]) -> None:
    """Or there are none, and then together they have not much more than what is needed."""
    sizes = sizes_of(Span(0, 4))
    try:
        shares = shares_for(sizes, rooms, KV_TOKENS, 4)
    except OutOfMemory:
        needed = part_needs(sizes, whole(sizes), KV_TOKENS, 4)
        # A head of four is a quarter of the pool, so no more than that is lost by whole heads.
        assert min(room.free_bytes for room in rooms) * len(rooms) < 2 * needed
        return
    cut = cut_of(sizes, shares)
    assert sum(shares) == 1000
    for room, part in zip(rooms, cut.parts, strict=True):
        assert part_needs(sizes, part, KV_TOKENS, 4) <= room.free_bytes


def facts(**changes: Any) -> Facts:
    base = Facts(
        *(ME, "lab", 2, MODEL, LAYERS, "float32", "10.0.0.2", 4712, False, KV_TOKENS, 4, sizes_of)
    )
    return replace(base, **changes)


OWN = Own(Span(0, 4), ROOM, 0.001)
NEAR = Sight(rtts={LEADER.peer: 3e-4, OTHER.peer: 3e-4})


def reply(member: Member, told: Invitation, own: Own = OWN, sight: Sight = NEAR) -> Refusal | None:
    """What the member says to the leader."""
    *_, answer = member.on_invitation(told.leader, told, own, sight, NOW, WALL)
    assert isinstance(answer, Answer)
    assert (answer.leader, answer.group, answer.epoch) == (told.leader, told.group, told.epoch)
    return answer.refusal


REFUSALS: list[tuple[str, dict[str, Any], dict[str, Any], dict[str, Any], Sight]] = [
    ("off", {"name": "other"}, {}, {}, NEAR),
    ("unnamed", {"seats": (Seat(LEADER.peer, "h", 1), Seat(THIRD, "h", 1))}, {}, {}, NEAR),
    ("model", {"model": "cd" * 32}, {}, {}, NEAR),
    ("model", {"layers": LAYERS + 1}, {}, {}, NEAR),
    ("numerics", {"numerics": "bfloat16"}, {}, {}, NEAR),
    ("expired", {"expires_s": WALL - 6}, {}, {}, NEAR),
    ("expired", {"expires_s": WALL + VALID_S + 6}, {}, {}, NEAR),
    ("far", {}, {}, {}, Sight(rtts={LEADER.peer: 2.1e-3})),
    ("far", {}, {}, {}, Sight()),
    ("busy", {}, {}, {"sessions": 1}, NEAR),
    ("memory", {}, {}, {"free_bytes": 100_000}, NEAR),
    ("memory", {"kv_tokens": 1 << 30}, {}, {}, NEAR),
    ("cut", {}, {"sizes_of": lambda span: replace(sizes_of(span), heads=1, kv_heads=1)}, {}, NEAR),
]  # fmt: skip


@pytest.mark.parametrize(("code", "told", "known", "own", "sight"), REFUSALS)
def test_why_a_member_declines(
    code: str, told: dict[str, Any], known: dict[str, Any], own: dict[str, Any], sight: Sight
) -> None:
    member = Member(facts(**known))
    refusal = reply(member, invited(**told), replace(OWN, **own), sight)
    assert refusal is not None
    assert refusal.code == code
    assert refusal.code in CODES
    assert refusal.reason
    assert member.invitation is None
    assert reply(Member(facts()), invited()) is None, "the usual one is accepted"


def test_a_member_of_another_epoch_declines_until_that_is_over() -> None:
    member = Member(facts())
    assert reply(member, invited()) is None
    seats = (Seat(OTHER.peer, "h", 1), Seat(ME, "h", 1))
    assert reply(member, invited(seats=seats)) == Refusal("taken", "in another group")
    group = invited().group
    member.on_commit(LEADER.peer, group, 7, NOW)
    assert reply(member, invited(seats=seats)) == Refusal("taken", "in another group")
    member.on_release(LEADER.peer, group, 7)
    assert reply(member, invited(seats=seats)) is None


def test_an_epoch_is_taken_once_and_a_later_one_ends_it() -> None:
    member = Member(facts())
    first = invited()
    assert reply(member, first) is None
    assert member.on_commit(LEADER.peer, first.group, 7, NOW)[1:] == [Load(first, 1)]
    stale = reply(member, first)
    assert stale is not None
    assert (stale.code, stale.epoch) == ("stale", 7)
    assert member.phase == "loading", "an old invitation changes nothing"
    later = member.on_invitation(LEADER.peer, invited(epoch=8), OWN, NEAR, NOW, WALL)
    assert later[0] == Close(first.group, 7, "the leader began another epoch")
    assert later[-1] == Answer(LEADER.peer, first.group, 8, None)


def test_only_the_leader_of_an_epoch_commands_it() -> None:
    member = Member(facts())
    told = invited()
    assert member.on_invitation(OTHER.peer, told, OWN, NEAR, NOW, WALL) == [], "somebody else's"
    assert reply(member, told) is None
    assert isinstance(member.on_commit(OTHER.peer, told.group, 7, NOW)[0], Leave)
    assert member.phase == "promised"
    assert member.on_release(OTHER.peer, told.group, 7) == []
    assert member.on_release(LEADER.peer, told.group, 6) == []
    assert member.on_gone(OTHER.peer) == []
    assert member.phase == "promised"


def test_a_promise_runs_out() -> None:
    member = Member(facts())
    told = invited()
    assert reply(member, told) is None
    assert member.tick(NOW + PROMISE_S - 0.01) == []
    assert member.membership is None
    assert member.tick(NOW + PROMISE_S) == [Leave(LEADER.peer, told.group, 7, "took too long")]
    late = member.on_commit(LEADER.peer, told.group, 7, NOW + PROMISE_S)
    assert late == [Leave(LEADER.peer, told.group, 7, "made no such promise")]


def test_the_last_holder_of_layers_stays_unless_the_group_holds_them() -> None:
    """By policy; a group by hand is its owners' wish."""
    mine = announced(ME, span=Span(2, 6), state="online")
    lead = announced(LEADER.peer, span=Span(0, 4), state="online")
    third = announced(THIRD, span=Span(4, 8), state="online")
    by_policy = facts(name="auto")
    for view, code in (
        ([mine, lead], "needed"),
        ([mine, lead, third], None),
        ([mine, lead, replace(third, state="joining")], "needed"),
    ):
        sight = replace(NEAR, view=view)
        refusal = reply(Member(by_policy), invited(name="auto"), sight=sight)
        assert (refusal and refusal.code) == code
        assert reply(Member(facts()), invited(), sight=sight) is None
