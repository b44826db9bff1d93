"""When a peer announces itself, and what it says: pure functions of state and time."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hexswarm.directory import ANNOUNCE_S, EXPIRE_S
from hexswarm.peer.announcer import (
    BUSY_STEP,
    KV_STEP,
    LOAD_EVERY_S,
    QUEUE_STEP_S,
    SPEED_STEP,
    Announcer,
)
from hexswarm.records import (
    Announcement,
    Coordinates,
    GroupMembership,
    GroupOffer,
    PeerId,
    Span,
    Speed,
)

POOL = 1000
WALL = 1.7e9
ME = Announcement(
    peer=PeerId("me"),
    model="ab" * 32,
    model_name="M",
    layers=6,
    span=Span(0, 6),
    state="online",
    dtype="float32",
    device="cpu",
    speed=Speed(0.1, 0.1, 0.1),
    free_kv_tokens=POOL,
    queue_s=0.0,
    addresses=("/a",),
)


def told(at_s: float = 0.0) -> Announcer:
    """An announcer that has just told `ME`."""
    made = Announcer(POOL, random.Random(1))
    made.stamp(ME, at_s, WALL)
    return made


def test_the_first_word_is_due_at_once() -> None:
    assert Announcer(POOL, random.Random(1)).due(ME, 0.0)
    assert not told().due(ME, 0.0)


def test_a_word_is_repeated_in_time_with_jitter() -> None:
    """Early enough that two lost words in a row do not make the peer vanish."""
    moments = set()
    for seed in range(20):
        made = Announcer(POOL, random.Random(seed))
        made.stamp(ME, 100.0, WALL)
        assert not made.due(ME, 100.0 + 0.79 * ANNOUNCE_S)
        assert made.due(ME, 100.0 + ANNOUNCE_S)
        moments.add(made._last.next_s)  # type: ignore[union-attr]
    assert len(moments) == 20
    assert 2 * ANNOUNCE_S < EXPIRE_S


HOME = Coordinates((0.0, 0.0, 0.0), 0.001, 0.1)


@pytest.mark.parametrize(
    "change",
    [
        {"state": "draining"},
        {"span": Span(0, 3)},
        {"addresses": ("/b",)},
        {"coordinates": HOME},
        {"neighbours": ((PeerId("other"), 0.1),)},
        {"group": GroupMembership("g", 1, 2, 1)},
        {"offer": GroupOffer("lab", 0, "10.0.0.1", 1, waiting=True)},
    ],
)
def test_what_routes_depend_on_is_told_at_once(change: dict[str, Any]) -> None:
    assert told().due(replace(ME, **change), 0.0)


@pytest.mark.parametrize(
    ("change", "due"),
    [
        ({"free_kv_tokens": POOL - int(KV_STEP * POOL)}, False),
        ({"free_kv_tokens": POOL - int(KV_STEP * POOL) - 1}, True),
        ({"queue_s": QUEUE_STEP_S}, False),
        ({"queue_s": 1.5 * QUEUE_STEP_S}, True),
        ({"device": "other"}, False),
        ({"busy": BUSY_STEP}, False),
        ({"busy": BUSY_STEP + 0.01}, True),
        ({"speed": Speed(0.1 * (1 + SPEED_STEP / 2), 0.1, 0.1)}, False),
        ({"speed": Speed(0.2, 0.1, 0.1)}, True),
        ({"rows": 0.5}, False),
        ({"rows": 0.6}, True),
        ({"up_bytes_per_s": 1e6}, True),
        ({"down_bytes_per_s": 1e6}, True),
    ],
)
def test_load_moves_a_word_if_it_moved_enough_and_not_too_often(
    change: dict[str, Any], due: bool
) -> None:
    made, loaded = told(), replace(ME, **change)
    assert not made.due(loaded, LOAD_EVERY_S - 0.01)
    assert made.due(loaded, LOAD_EVERY_S) == due


@pytest.mark.parametrize(
    ("change", "due"),
    [
        ({"coordinates": Coordinates((0.019, 0.0, 0.0), 0.001, 0.1)}, False),
        ({"coordinates": Coordinates((0.021, 0.0, 0.0), 0.001, 0.1)}, True),
        ({"coordinates": Coordinates((0.0, 0.0, 0.0), 0.022, 0.1)}, True),
        ({"coordinates": Coordinates((0.0, 0.0, 0.0), 0.001, 0.4)}, True),
        ({"neighbours": ((PeerId("other"), 0.12),)}, False),
        ({"neighbours": ((PeerId("other"), 0.16),)}, True),
        ({"neighbours": ((PeerId("new"), 0.1),)}, False),
        ({"neighbours": ((PeerId("new"), 0.1), (PeerId("other"), 0.1))}, True),
    ],
)
def test_a_place_that_moved_is_told_but_not_too_often(change: dict[str, Any], due: bool) -> None:
    """By a fifth of a usual way, or in certainty; so is a neighbour that came or went far."""
    settled = replace(ME, coordinates=HOME, neighbours=((PeerId("other"), 0.1),))
    made = Announcer(POOL, random.Random(1))
    made.stamp(settled, 0.0, WALL)
    moved = replace(settled, **change)
    assert not made.due(moved, LOAD_EVERY_S - 0.01)
    assert made.due(moved, LOAD_EVERY_S) == due


def test_on_one_lan_nobody_moves() -> None:
    made = Announcer(POOL, random.Random(1))
    near = replace(ME, coordinates=HOME, neighbours=((PeerId("other"), 0.0004),))
    made.stamp(near, 0.0, WALL)
    shaken = Coordinates((0.0, 0.0009, 0.0), 0.001, 0.1)
    later = replace(near, coordinates=shaken, neighbours=((PeerId("other"), 0.001),))
    assert not made.due(later, LOAD_EVERY_S)


def test_bandwidth_is_told_when_it_is_off_by_half() -> None:
    made = Announcer(POOL, random.Random(1))
    known = replace(ME, up_bytes_per_s=1e6)
    made.stamp(known, 0.0, WALL)
    assert not made.due(replace(ME, up_bytes_per_s=1.4e6), LOAD_EVERY_S)
    assert made.due(replace(ME, up_bytes_per_s=1.6e6), LOAD_EVERY_S)
    assert not made.due(ME, LOAD_EVERY_S), "what is forgotten waits for the next word"


def test_load_is_compared_with_what_was_said() -> None:
    made = told()
    half = replace(ME, free_kv_tokens=POOL // 2)
    made.stamp(half, 10.0, WALL)
    assert not made.due(half, 16.0)
    assert made.due(ME, 16.0)


def test_a_pool_that_is_whole_again_is_told() -> None:
    """However little was missing: else a request for all of it would be refused for long."""
    made = told()
    used = replace(ME, free_kv_tokens=POOL - 1)
    made.stamp(used, 10.0, WALL)
    assert not made.due(ME, 10.0 + LOAD_EVERY_S - 0.01)
    assert made.due(ME, 10.0 + LOAD_EVERY_S)


@given(st.lists(st.floats(0, 4e9), min_size=1, max_size=20))
def test_the_sequence_rises_even_if_the_clock_steps_back(walls: list[float]) -> None:
    """Others keep the word with the higher sequence: ours must never look old to them."""
    made = Announcer(POOL, random.Random(1))
    sequences = []
    for wall in walls:
        stamped, expires_s = made.stamp(ME, 0.0, wall)
        sequences.append(stamped.sequence)
        assert stamped.issued_s == wall
        assert expires_s == wall + EXPIRE_S
        assert stamped.sequence >= int(wall * 1000)
    assert all(a < b for a, b in itertools.pairwise(sequences))


def test_a_restarted_peer_is_newer_than_its_former_life() -> None:
    before, _ = told().stamp(ME, 1.0, WALL)
    after, _ = Announcer(POOL, random.Random(2)).stamp(ME, 0.0, WALL + 1)
    assert after.sequence > before.sequence


def test_equal_seeds_give_equal_words() -> None:
    one, other = (told().stamp(ME, 1.0, WALL) for _ in range(2))
    assert one == other
