"""The directory: how old a view is, and what a unit says of itself."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import settings as effort
from hypothesis import strategies as st

from hexswarm.records import Span
from hexswarm.simulator.board import Board, peer_of, unit_of
from hexswarm.simulator.policy import Execution
from hexswarm.simulator.records import Settings
from hexswarm.simulator.stage import Stage, Tally
from tests.simulator.small import MODEL, READ_S, ROW_S, world

SETTINGS = Settings(announce_s=(5.0, 30.0), spread_s=0.5, refresh_s=10.0, expire_s=90.0)


def stage(number: int = 0) -> Stage:
    _, plan = world([(0, 4), (4, 8)])
    span = plan.spans[number]
    assert span is not None
    unit = plan.units[number]
    return Stage(number, unit, span, MODEL, Execution(), SETTINGS, Tally(), 0.0)


def board(seed: int = 1) -> Board:
    return Board(2, MODEL, SETTINGS, random.Random(seed))


@pytest.mark.parametrize("unit", [0, 7, 123_456])
def test_names_are_those_of_units_in_order(unit: int) -> None:
    assert unit_of(peer_of(unit)) == unit
    assert peer_of(unit) < peer_of(unit + 1)


def test_a_unit_says_what_it_holds_and_how_it_is() -> None:
    some, one = board(), stage()
    one.open(b"s" * 16, 1000, 4, False, 0.0, 0.0)
    some.announce(one, 0.0, at_once=True)
    word = some.view("coordinator", 0.0).announced[0]
    assert word is not None
    assert (word.peer, word.span, word.layers) == (peer_of(0), Span(0, 4), 8)
    assert word.kv_tokens == 4096
    assert word.free_kv_tokens == 4096 - 1008
    assert word.speed.decode_layer_s == pytest.approx(READ_S + ROW_S)
    assert some.view("coordinator", 0.0).announced[1] is None


@effort(max_examples=30)
@given(seed=st.integers(0, 99), asked=st.lists(st.floats(1, 300), min_size=1, max_size=20))
def test_a_view_is_as_old_as_its_reading_and_no_older(seed: int, asked: list[float]) -> None:
    some, one = board(seed), stage()
    now = some.announce(one, 0.0, at_once=True)
    said = [0.0]
    while now < 300:
        said.append(now)
        now = some.announce(one, now)
    for moment in sorted(asked):
        view = some.view("here", moment)
        word = view.announced[0]
        assert word is not None
        # It was in the directory when this was read, which is at most one period ago.
        assert word.issued_s <= moment - SETTINGS.spread_s or word.issued_s == 0
        known = [when for when in said if when <= moment - SETTINGS.refresh_s - SETTINGS.spread_s]
        assert word.issued_s >= max(known, default=0.0)
        assert view is some.view("here", moment)


def test_clients_read_at_moments_of_their_own() -> None:
    some, one = board(), stage()
    some.announce(one, 0.0, at_once=True)
    some.announce(one, 20.0)
    changes = []
    for client in ("a", "b", "c"):
        times = [20 + 0.1 * tick for tick in range(150)]
        seen = [some.view(client, now).announced[0] for now in times]
        changes.append(next(now for now, word in zip(times, seen, strict=True) if word.sequence))  # type: ignore[union-attr]
    assert len(set(changes)) == 3
    assert all(20.5 <= when <= 30.6 for when in changes)


def test_words_of_the_dead_expire() -> None:
    some = board()
    some.announce(stage(), 0.0, at_once=True)
    assert some.view("a", 89.0).announced[0] is not None
    assert some.view("a", 101.0).announced[0] is None


def test_refusals_are_of_one_request() -> None:
    some = board()
    some.announce(stage(), 0.0, at_once=True)
    refused = some.view("a", 5.0, frozenset({0}))
    assert refused.refused == {0}
    assert refused.announced == some.view("a", 5.0).announced
    assert some.view("a", 5.0).refused == frozenset()
