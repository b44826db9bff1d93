"""When a peer without a span chooses, yields, moves and stays: announcements in, spans out."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from hexswarm.peer import placement
from hexswarm.peer.placement import HOLE_S, SETTLED_S, USUAL, Placement, token_layer_s
from hexswarm.records import (
    Announcement,
    GroupMembership,
    GroupOffer,
    PeerId,
    Span,
    Speed,
)
from tests.strategies import MODEL, OTHER_MODEL, peer_id

LAYERS = 12
ME = peer_id(50)
SPEED = Speed(1e-3, 2e-4, 0.0)


def told(number: int, first: int, end: int, **more: object) -> Announcement:
    said = Announcement(
        peer=peer_id(number),
        model=MODEL,
        model_name="m",
        layers=LAYERS,
        span=Span(first, end),
        state="online",
        dtype="float32",
        device="cpu",
        speed=SPEED,
        free_kv_tokens=0,
        queue_s=0.0,
        addresses=(),
    )
    return replace(said, **more)  # type: ignore[arg-type]


def peer(longest: int = 6, me: PeerId = ME) -> Placement:
    fits = tuple(min(longest, LAYERS - first) for first in range(LAYERS))
    return Placement(me, MODEL, fits, 100, random.Random(1))


def test_a_joiner_fills_the_hole_and_looks_at_its_own_model_only() -> None:
    view = [told(1, 0, 6), told(3, 6, 12, model=OTHER_MODEL)]
    assert peer().choose(view) == Span(6, 12)
    for state, chosen in (("joining", Span(0, 6)), ("draining", Span(6, 12))):
        others = [told(number, 6, 12, state=state) for number in (4, 5)]
        assert peer().choose([*view, *others]) == chosen


def test_members_of_groups_and_who_waits_for_one_hold_nothing() -> None:
    """Their leader does; a group that loads is a claim of its leader's."""
    offer = GroupOffer("lab", 1 << 30, "10.0.0.1", 4711, waiting=True)
    group = GroupMembership("g", 0, 2, 1, (500, 500))
    rest = [told(1, 0, 6)]
    for word in (
        told(3, 6, 12, group=replace(group, rank=1)),
        told(3, 6, 12, state="joining", offer=offer),
    ):
        assert peer().choose([*rest, word]) == Span(6, 12)
        stays = peer()
        assert stays.wish([*rest, word], Span(0, 6), 0.0) is None
        assert stays.wish([*rest, word], Span(0, 6), HOLE_S) == Span(6, 12), "the hole is seen"
    leads = told(3, 6, 12, state="joining", group=group, offer=replace(offer, waiting=False))
    assert peer().wish([*rest, leads], Span(0, 6), HOLE_S) is None
    assert peer().choose([*rest, told(3, 6, 12, state="joining", group=group)]) == Span(0, 6)


def test_the_later_of_two_claims_yields() -> None:
    mine = told(50, 0, 6, state="joining", issued_s=10.0)
    earlier = told(60, 0, 6, state="joining", issued_s=9.0)
    later = replace(earlier, issued_s=11.0)
    joiner = peer()
    assert joiner.choose([]) == Span(0, 6)
    assert joiner.again([mine, later], Span(0, 6)) == Span(0, 6)
    assert joiner.again([mine, earlier], Span(0, 6)) == Span(6, 12)


def test_a_claim_that_was_known_goes_first_however_often_it_is_repeated() -> None:
    slow = told(60, 0, 6, state="joining", issued_s=1.0)
    joiner = peer()
    assert joiner.choose([slow]) == Span(6, 12)
    mine = told(50, 6, 12, state="joining", issued_s=10.0)
    assert joiner.again([mine, replace(slow, issued_s=31.0)], Span(6, 12)) == Span(6, 12)


def test_a_hole_is_filled_when_it_stays() -> None:
    """Not at once: whoever restarts is back by then. Not by one that holds a last copy as well."""
    spare = peer()
    whole = [told(1, 0, 6), told(2, 6, 12)]
    spare.settle(0.0)
    assert spare.wish(whole, Span(0, 6), 1.0) is None
    hole = whole[:1]
    assert spare.wish(hole, Span(0, 6), 2.0) is None
    assert spare.wish(hole, Span(0, 6), 1.0 + HOLE_S) is None
    assert spare.wish(hole, Span(0, 6), 2.0 + HOLE_S) == Span(6, 12)
    assert spare.wish(whole, Span(0, 6), 3.0 + HOLE_S) is None
    assert spare.wish(hole, Span(0, 6), 4.0 + HOLE_S) is None, "it is another hole"
    other = peer()
    assert other.wish([], Span(0, 6), 0.0) is None
    assert other.wish([], Span(0, 6), HOLE_S) is None, "nothing is won by that"


def test_a_whole_ring_is_reconsidered_rarely() -> None:
    crowd = [told(number, 0, 6) for number in range(1, 9)] + [told(9, 6, 12)]
    mover = peer()
    mover.settle(0.0)
    assert mover.wish(crowd, Span(0, 6), SETTLED_S[0] - 1.0) is None
    assert mover.wish(crowd, Span(0, 6), SETTLED_S[1]) == Span(6, 12)
    assert mover.wish([told(1, 6, 12)], Span(0, 6), SETTLED_S[1]) is None, "the last copy"


def test_speeds_are_measured_or_taken_from_others() -> None:
    fast, slow = Speed(1e-4, 1e-5, 0.0), Speed(1e-2, 1e-3, 0.0)
    view = [told(1, 0, 6, speed=fast), told(2, 0, 6, speed=SPEED), told(3, 0, 6, speed=slow)]
    joiner = peer()
    assert joiner.claimed_speed([]) == USUAL
    assert joiner.claimed_speed(view) == SPEED
    joiner.speed = slow
    assert joiner.claimed_speed(view) == slow
    batch = replace(SPEED, row_layer_s=1e-4)
    row_s = (1e-3 + (placement.ROWS - 1) * 1e-4) / placement.ROWS
    assert token_layer_s(batch) == pytest.approx(0.75 * 2e-4 + 0.25 * row_s)


@pytest.mark.parametrize("wide", [1, 2])
def test_a_joiner_goes_behind_a_peer_with_a_wide_line(wide: int) -> None:
    """Layers 4 and 8 are as thin; each begins where another peer ends."""
    view = [told(4, 5, 8), told(5, 5, 8), told(6, 9, 12), told(7, 9, 12), told(8, 4, 9)]
    ends = {1: (0, 4), 2: (5, 8)}
    for number, (first, end) in ends.items():
        up_bytes_per_s = 1e9 if number == wide else 1.0
        view.append(told(number, first, end, up_bytes_per_s=up_bytes_per_s))
    joiner = peer(longest=1)
    joiner.down_bytes_per_s = 1e9
    view = [replace(item, up_bytes_per_s=item.up_bytes_per_s or 1.0) for item in view]
    assert joiner.choose(view).first == ends[wide][1]
