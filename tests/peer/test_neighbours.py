"""Who is measured and who is announced."""

from __future__ import annotations

import random
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from hexswarm.peer.neighbours import MOST, NEAREST, to_announce, to_measure
from hexswarm.records import Announcement, Coordinates, PeerId
from hexswarm.router import vivaldi
from tests.peer.test_announcer import ME
from tests.strategies import coordinates

HERE = Coordinates((0.0, 0.0, 0.0), 0.001, 0.1)


def crowd(places: list[Coordinates | None]) -> list[Announcement]:
    return [replace(ME, peer=PeerId(f"p{n}"), coordinates=at) for n, at in enumerate(places)]


@given(
    st.lists(st.none() | coordinates, max_size=40),
    st.none() | coordinates,
    st.randoms(use_true_random=False),
)
def test_some_near_ones_and_some_at_random(
    places: list[Coordinates | None], place: Coordinates | None, rng: random.Random
) -> None:
    """At most eight different ones, all if there are no more; the four nearest are among them."""
    others = crowd(places)
    chosen = to_measure(others, place, rng)
    assert len({item.peer for item in chosen}) == len(chosen) == min(MOST, len(others))
    if place is not None:
        near = sorted(
            (vivaldi.rtt_s(place, item.coordinates), item.peer)
            for item in others
            if item.coordinates is not None
        )[: MOST // 2]
        assert {peer for _, peer in near} <= {item.peer for item in chosen}


def test_far_ones_have_their_turn() -> None:
    """Else two continents that measure themselves alone would drift apart."""
    others = crowd([Coordinates((0.001 * n, 0.0, 0.0), 0.0, 0.1) for n in range(60)])
    rng = random.Random(1)
    met = {item.peer for _ in range(120) for item in to_measure(others, HERE, rng)}
    assert len(met) == 60


@given(
    st.dictionaries(st.sampled_from([PeerId(f"p{n}") for n in range(30)]), st.floats(0, 1)),
    st.sets(st.sampled_from([PeerId(f"p{n}") for n in range(30)])),
)
def test_the_nearest_are_told_then_those_of_routes(
    rtts: dict[PeerId, float], recent: set[PeerId]
) -> None:
    """Eight at most, with what was measured, in order of ids: equal knowledge, equal words."""
    told = to_announce(rtts, recent)
    assert list(told) == sorted(told)
    assert len(told) == min(MOST, len(rtts))
    assert all(rtts[peer] == rtt_s for peer, rtt_s in told)
    names = {peer for peer, _ in told}
    ordered = sorted(rtts, key=lambda peer: (rtts[peer], peer))
    assert set(ordered[:NEAREST]) <= names
    shared = [peer for peer in ordered[NEAREST:] if peer in recent]
    assert set(shared[: MOST - NEAREST]) <= names
