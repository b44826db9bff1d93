"""Network coordinates: worlds that can be embedded are found, and liars push nobody far."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hexswarm.records import Coordinates
from hexswarm.router import vivaldi
from tests.strategies import coordinates

Rtt = Callable[[int, int], float]
COUNT = 50


def plane(rng: random.Random) -> Rtt:
    """Points in a plane 150 ms wide, each behind an access line of at most 10 ms."""
    points = [(rng.uniform(0, 0.15), rng.uniform(0, 0.15)) for _ in range(COUNT)]
    lines_s = [rng.uniform(0, 0.01) for _ in range(COUNT)]
    return lambda a, b: math.dist(points[a], points[b]) + lines_s[a] + lines_s[b]


def regions(_: random.Random) -> Rtt:
    """Three regions: 5 ms within, 80 and 150 ms between them."""
    between_s = {(0, 1): 0.08, (0, 2): 0.15, (1, 2): 0.15}
    return lambda a, b: between_s.get((min(a % 3, b % 3), max(a % 3, b % 3)), 0.005)


def converged(rtt: Rtt, rng: random.Random, *, rounds: int, liars: int = 0) -> list[float]:
    """Relative errors of the pairs of honest peers that never measured each other."""
    others = {a: rng.sample([b for b in range(COUNT) if b != a], 8) for a in range(COUNT)}
    places: list[Coordinates | None] = [None] * COUNT
    for _ in range(rounds):
        for a in range(COUNT):
            for b in others[a]:
                lie = Coordinates((9.0, -9.0, 9.0), 0.0, 0.0) if b < liars else None
                places[a] = vivaldi.step(places[a], lie or places[b], rtt(a, b), rng)
    found = [place for place in places if place is not None]
    assert len(found) == COUNT
    return [
        abs(vivaldi.rtt_s(found[a], found[b]) - rtt(a, b)) / rtt(a, b)
        for a in range(liars, COUNT)
        for b in range(liars, a)
        if b not in others[a] and a not in others[b]
    ]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("world", "most"), [(plane, 0.05), (regions, 0.10)])
def test_pairs_that_never_met_are_estimated(
    world: Callable[[random.Random], Rtt], most: float, seed: int
) -> None:
    """50 peers, 8 random neighbours each, 100 rounds of one sample from every neighbour."""
    rng = random.Random(seed)
    assert statistics.median(converged(world(rng), rng, rounds=100)) <= most


@pytest.mark.parametrize("seed", range(2))
def test_a_liar_moves_others_little(seed: int) -> None:
    """One peer of 50 claims to be 16 s away and wholly certain; it has 8 victims on average."""
    rng = random.Random(seed)
    assert statistics.median(converged(plane(rng), rng, rounds=100, liars=1)) <= 0.12


def test_one_lie_moves_a_settled_peer_by_less_than_it_is_unsure() -> None:
    here = Coordinates((0.05, 0.0, 0.0), 0.002, 0.05)
    moved = vivaldi.step(here, Coordinates((1e4, 0.0, 0.0), 0.0, 0.0), 0.05, random.Random(0))
    assert math.dist(here.position_s, moved.position_s) <= 0.05 * vivaldi.SCALE_S
    assert moved.error <= here.error * (1 + vivaldi.RATIO)


rtts = st.floats(-1, 1e9) | st.sampled_from([math.nan, math.inf, 5e-324])
claims = st.builds(
    Coordinates,
    position_s=st.tuples(*[st.floats(-1e4, 1e4)] * 3),
    height_s=st.floats(0, 1e4),
    error=st.floats(0, 1e4),
)


@given(
    st.none() | claims,
    st.lists(st.tuples(st.none() | claims | coordinates, rtts), max_size=30),
    st.integers(0, 9),
)
def test_whatever_is_claimed_and_measured_coordinates_stay_sound(
    place: Coordinates | None, samples: list[tuple[Coordinates | None, float]], seed: int
) -> None:
    """The record's own checks hold after any samples, and the error never exceeds ignorance."""
    rng = random.Random(seed)
    for claim, rtt_s in samples:
        before, place = place, vivaldi.step(place, claim, rtt_s, rng)
        taught = claim is not None and math.isfinite(rtt_s) and rtt_s > 0
        if before is not None and not taught:
            assert place is before
        if taught:
            assert max(map(abs, place.position_s)) <= vivaldi.LONGEST_S
            assert 0 <= place.height_s <= vivaldi.LONGEST_S
            assert 0 < place.error <= vivaldi.NOTHING


def test_the_first_sample_without_the_others_place_makes_a_newcomer() -> None:
    place = vivaldi.step(None, None, 0.05, random.Random(3))
    assert place.error == vivaldi.NOTHING
    assert not vivaldi.informed(place)
    assert math.dist(place.position_s, (0, 0, 0)) == pytest.approx(vivaldi.START_S)
    assert vivaldi.step(None, None, 0.05, random.Random(4)).position_s != place.position_s


@given(st.integers(0, 2**32))
def test_equal_chances_give_equal_coordinates(seed: int) -> None:
    def walk() -> Coordinates:
        rng, place = random.Random(seed), None
        for rtt_s in (0.05, 0.02, 0.1, 0.05):
            there = Coordinates((0.0, 0.0, 0.0), 0.0, 0.1)
            place = vivaldi.step(place, there, rtt_s, rng)
        assert place is not None
        return place

    assert walk() == walk()


@given(st.lists(coordinates, min_size=1, max_size=5), st.lists(coordinates, min_size=1, max_size=5))
def test_matrices_say_what_pairs_say(here: list[Coordinates], there: list[Coordinates]) -> None:
    """Round trips and spreads are the same to the last bit, and symmetric."""

    def arrays(places: list[Coordinates]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return (
            np.array([place.position_s for place in places]),
            np.array([place.height_s for place in places]),
            np.array([place.error for place in places]),
        )

    (at, height_s, error), (others, others_height_s, others_error) = arrays(here), arrays(there)
    rtt_s = vivaldi.rtts_s(at, height_s, others, others_height_s)
    spread_s = vivaldi.spreads_s(rtt_s, error, others_error)
    for i, a in enumerate(here):
        for j, b in enumerate(there):
            assert rtt_s[i, j] == vivaldi.rtt_s(a, b) == vivaldi.rtt_s(b, a)
            assert spread_s[i, j] == vivaldi.spread_s(a, b) == vivaldi.spread_s(b, a)


def test_the_spread_grows_with_the_error_and_ends_at_ignorance() -> None:
    def spread(error: float) -> float:
        ends = [Coordinates((x, 0.0, 0.0), 0.0, error) for x in (0.0, 0.1)]
        return vivaldi.spread_s(*ends)

    assert spread(0.0) == 0
    assert spread(0.1) == pytest.approx(0.05 * 0.1 * vivaldi.TAIL)
    assert spread(1.0) == spread(50.0)


@pytest.mark.parametrize("count", [2, 4, 8])
def test_a_newcomer_finds_its_place_from_a_few_round_trips(count: int) -> None:
    """The median estimate of unseen peers is within 2 % with 8 neighbours, within 20 % with two,
    and no worse than the newcomer says of itself."""
    misses, stated = [], []
    rng = random.Random(7)
    rtt = plane(rng)
    places = _settled(rtt, rng)
    for _ in range(40):
        newcomer, *known = rng.sample(range(COUNT), count + 1)
        here = vivaldi.fit([(places[b], rtt(newcomer, b)) for b in known], rng)
        assert here is not None
        stated.append(here.error)
        for b in {*range(COUNT)} - {newcomer, *known}:
            misses.append(abs(vivaldi.rtt_s(here, places[b]) - rtt(newcomer, b)) / rtt(newcomer, b))
    assert statistics.median(misses) <= {2: 0.2, 4: 0.05, 8: 0.02}[count]
    assert statistics.median(misses) <= statistics.median(stated)


def _settled(rtt: Rtt, rng: random.Random) -> list[Coordinates]:
    """All peers, placed by 60 rounds with 8 others each."""
    places: list[Coordinates | None] = [None] * COUNT
    for _ in range(60):
        for a in range(COUNT):
            for b in rng.sample(range(COUNT), 8):
                if a != b:
                    places[a] = vivaldi.step(places[a], places[b], rtt(a, b), rng)
    found = [place for place in places if place is not None]
    assert len(found) == COUNT
    return found


def test_without_samples_there_is_no_place() -> None:
    here = Coordinates((0.0, 0.0, 0.0), 0.0, 0.1)
    assert vivaldi.fit([], random.Random(0)) is None
    assert vivaldi.fit([(here, math.nan), (here, 0.0)], random.Random(0)) is None


def test_a_fit_has_settled() -> None:
    """Another draw of the order ends at the same round trips."""
    rng = random.Random(5)
    points = [
        Coordinates((rng.uniform(0, 0.1), rng.uniform(0, 0.1), 0.0), 0.003, 0.05) for _ in range(8)
    ]
    truth = Coordinates((0.04, 0.06, 0.0), 0.004, 0.05)
    samples = [(place, vivaldi.rtt_s(truth, place)) for place in points]
    for seed in range(5):
        here = vivaldi.fit(samples, random.Random(seed))
        assert here is not None
        for place, rtt_s in samples:
            assert vivaldi.rtt_s(here, place) == pytest.approx(rtt_s, rel=0.05, abs=0.002)
