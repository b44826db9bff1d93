"""Advisory plans: made alike by all, carried out in turn, dropped when they stall."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import numpy as np
import pytest

from hexswarm.errors import UsageError
from hexswarm.records import Span, uncovered
from hexswarm.router.placement import advice, joining
from hexswarm.router.placement.advice import Advice, Census, Follower, Move
from hexswarm.router.placement.flow import arrays, solver
from hexswarm.router.placement.plan import Unit
from hexswarm.router.placement.rates import rates
from tests.placement.worlds import cluster, profile

LAYERS = 8
LOAD_S = 5.0
TRIES = 4
FALL = (1.0, 2.4, 4.2, 7.5)
"""How T(k) falls: more layers leave less room for a batch."""


def joined(seed: int, peers: int = 10) -> Census:
    """Peers that came one by one, by the rule, on one wide network."""
    rng = Random(seed)
    place = cluster(["a"] * peers, LAYERS, regions={("a", "a"): 1e9})
    speeds = [rng.choice((60.0, 100.0, 150.0)) for _ in range(peers)]
    units = [
        Unit(f"n{at}", f"n{at}", profile(*(speed / fall for fall in FALL)))
        for at, speed in enumerate(speeds)
    ]
    spans: list[Span] = []
    for unit in units:
        others = [
            joining.Holder(units[at].id, span, units[at].profile.throughput[len(span)])
            for at, span in enumerate(spans)
        ]
        offer = joining.Offer(unit.id, LAYERS, unit.profile.throughput)
        spans.append(joining.choose(offer, others).span)
    table = rates(place, place.models["m"], units)
    return Census(tuple(unit.id for unit in units), table, tuple(spans))


@pytest.fixture(scope="module")
def stuck() -> tuple[Census, Advice]:
    """A swarm for which there is advice."""
    for seed in range(20):
        census = joined(seed)
        found = advice.advise(census, LOAD_S, 30.0, tries=TRIES)
        if found is not None and len(found.moves) >= 4:
            return census, found
    raise AssertionError("the rule left nothing to advise in twenty swarms")


def flow(census: Census, spans: list[Span | None]) -> float:
    solve = solver(census.rates)
    solve.load(*arrays(spans))
    return solve.value()


def test_anybody_computes_the_same(stuck: tuple[Census, Advice]) -> None:
    census, found = stuck
    again = Census(census.peers, census.rates, census.spans)
    assert advice.advise(again, LOAD_S, 45.0, tries=TRIES) == replace(found, made_s=45.0)
    assert census.seed(0) != census.seed(1)
    assert census.seed(0) != replace(census, spans=(None, *census.spans[1:])).seed(0)


def test_every_step_of_an_advice_covers_the_model(stuck: tuple[Census, Advice]) -> None:
    census, found = stuck
    spans = list(census.spans)
    assert not uncovered([span for span in spans if span], LAYERS)
    before = flow(census, spans)
    for move in found.moves:
        spans[census.peers.index(move.peer)] = move.to
        assert not uncovered([span for span in spans if span], LAYERS), move
    assert flow(census, spans) >= max(advice.GAIN * before, advice.KEEP**10 * found.tokens_per_s)


def test_an_advice_that_promises_too_much_is_not_followed(stuck: tuple[Census, Advice]) -> None:
    """What counts is the flow in one's own view."""
    census, found = stuck
    back = tuple(
        Move(peer, span) for peer, span in zip(census.peers, census.spans, strict=True) if span
    )
    lie = Advice(1, back, 1e9, 40.0)
    assert not Follower("n0").hear(lie, census, LOAD_S)
    too_long = Advice(1, (Move("n0", Span(0, 8)),), 1e9, 40.0)
    assert advice.judge(too_long, census, LOAD_S).gain == 0
    assert Follower("n0").hear(found, census, LOAD_S)
    held = Follower("n0")
    assert held.hear(found, census, LOAD_S)
    louder = replace(found, tokens_per_s=1e9, made_s=found.made_s + 60.0)
    assert not held.hear(louder, census, LOAD_S), "it is no better than what is followed"
    slow = advice.judge(found, census, advice.HORIZON_S)
    assert slow.gain < advice.judge(found, census, LOAD_S).gain


@pytest.mark.parametrize("busy", [False, True])
def test_followers_carry_it_out_in_turn(stuck: tuple[Census, Advice], busy: bool) -> None:
    """Never more at a time than allowed, never a hole, and in the end the advised placement."""
    census, found = stuck
    served = dict(zip(census.peers, census.spans, strict=True))
    followers = [Follower(peer) for peer in census.peers]
    assert all(item.hear(found, census, LOAD_S, busy=busy) for item in followers)
    moving: dict[str, tuple[Span, float]] = {}
    began, now = list[float](), found.made_s
    while any(item.advice for item in followers) and now < 3600:
        now += 1.0
        for peer, (span, done_s) in list(moving.items()):
            if done_s <= now:
                served[peer] = span
                del moving[peer]
                assert not uncovered([held for held in served.values() if held], LAYERS)
        for item in followers:
            loading = {peer: span for peer, (span, _) in moving.items()}
            target = item.turn(served, loading, LAYERS, now, busy=busy)
            if target is not None:
                moving[item.peer] = target, now + LOAD_S
                began.append(now)
        assert len(moving) <= advice.width(len(served), busy=busy)
    assert {move.peer: move.to for move in found.moves}.items() <= served.items()
    assert len(began) == len(found.moves)
    if busy:
        assert min(np.diff(began), default=60.0) >= 59.0


def test_an_advice_that_stalls_is_dropped(stuck: tuple[Census, Advice]) -> None:
    census, found = stuck
    last = Follower(found.moves[-1].peer)
    assert last.hear(found, census, LOAD_S)
    served = dict(zip(census.peers, census.spans, strict=True))
    assert last.turn(served, {}, LAYERS, found.made_s + advice.READ_S) is None
    assert last.advice is not None
    assert last.turn(served, {}, LAYERS, found.made_s + advice.PATIENCE_S + 1.0) is None
    assert last.advice is None


def drained(census: Census) -> Census:
    """The same peers, which drop their layers before they load others."""
    return replace(census, beside=False)


def test_who_drops_its_layers_first_is_spared_meanwhile() -> None:
    """Also between two moves every layer is held; and the time without the mover is reckoned."""
    advised = 0
    for seed in range(12):
        census = drained(joined(seed))
        found = advice.advise(census, LOAD_S, 30.0, tries=2)
        if found is None:
            continue
        advised += 1
        spans = list(census.spans)
        for move in found.moves:
            spans[census.peers.index(move.peer)] = None
            assert not uncovered([span for span in spans if span], LAYERS), move
            spans[census.peers.index(move.peer)] = move.to
        beside = replace(census, beside=True)
        gains = [advice.judge(found, swarm, LOAD_S).gain for swarm in (census, beside)]
        assert gains[0] <= gains[1]
        assert advice.judge(found, census, LOAD_S).after == pytest.approx(found.tokens_per_s)
    assert advised >= 2


def test_no_move_is_advised_to_those_who_stay(stuck: tuple[Census, Advice]) -> None:
    census, found = stuck
    names = frozenset(move.peer for move in found.moves[:2])
    other = advice.advise(replace(census, staying=names), LOAD_S, 30.0, tries=TRIES)
    assert other is None or names.isdisjoint(move.peer for move in other.moves)
    everybody = replace(census, staying=frozenset(census.peers))
    assert advice.advise(everybody, LOAD_S, 30.0, tries=1) is None


def test_a_cut_advice_is_worth_what_its_first_moves_are(stuck: tuple[Census, Advice]) -> None:
    census, found = stuck
    for most in range(1, len(found.moves)):
        cut = advice.advise(census, LOAD_S, 30.0, tries=TRIES, most=most)
        if cut is not None:
            assert len(cut.moves) <= most
            assert advice.judge(cut, census, LOAD_S).after == pytest.approx(cut.tokens_per_s)
            assert cut.tokens_per_s > flow(census, list(census.spans))


def test_who_drops_its_layers_first_moves_when_others_serve_them() -> None:
    """What others are still loading does not count, nor what one would hold oneself."""
    follower = Follower("n0", beside=False)

    def turn(served: dict[str, Span | None], moving: dict[str, Span]) -> Span | None:
        follower.advice = Advice(1, (Move("n0", Span(4, 8)),), 1.0, 0.0)
        return follower.turn(served, moving, 8, advice.READ_S)

    here: dict[str, Span | None] = {"n0": Span(0, 4), "n1": Span(4, 8), "n2": Span(0, 4)}
    assert turn(here, {}) == Span(4, 8)
    assert turn({**here, "n2": None}, {"n2": Span(0, 4)}) is None
    assert turn({**here, "n2": Span(4, 8)}, {}) is None


def test_one_that_loads_is_waited_for_and_what_was_dropped_stays_dropped(
    stuck: tuple[Census, Advice],
) -> None:
    census, found = stuck
    first, last = found.moves[0], Follower(found.moves[-1].peer)
    assert first.to is not None
    assert last.hear(found, census, LOAD_S)
    served = {**dict(zip(census.peers, census.spans, strict=True)), first.peer: None}
    later_s = found.made_s + advice.PATIENCE_S + 1.0
    assert last.turn(served, {first.peer: first.to}, LAYERS, later_s) is None
    assert last.advice is not None
    assert last.turn(served, {}, LAYERS, later_s) is None
    assert last.advice is None
    assert not last.hear(found, census, LOAD_S)
    assert last.hear(replace(found, made_s=found.made_s + 1.0), census, LOAD_S)


def test_nobody_gives_up_the_last_copy_in_its_own_view() -> None:
    """Whatever the order says: the views of others may be old."""
    census = Census(("n0",), joined(0, 1).rates, (Span(0, 4),))
    follower = Follower("n0")
    follower.advice = Advice(1, (Move("n0", Span(4, 8)),), 1.0, 0.0)
    both = {"n0": Span(0, 4), "n1": Span(0, 4)}
    assert follower.turn(both, {}, 8, advice.READ_S - 1.0) is None
    assert follower.turn(both, {}, 8, advice.READ_S) == Span(4, 8)
    follower.advice = Advice(1, (Move("n0", Span(4, 8)),), 1.0, 0.0)
    other = {"n0": Span(0, 4), "n1": Span(4, 8)}
    assert follower.turn(other, {}, 8, advice.READ_S) is None
    assert follower.advice is not None
    assert advice.judge(follower.advice, census, LOAD_S).before == 0


def test_where_nothing_passes_any_flow_is_a_gain() -> None:
    census = joined(0)
    moves = tuple(Move(peer, span) for peer, span in zip(census.peers, census.spans, strict=True))
    nobody = replace(census, spans=(None,) * len(moves))
    assert advice.judge(Advice(1, moves, 1.0, 0.0), nobody, LOAD_S).gain == float("inf")


def test_one_peer_is_drawn_each_minute() -> None:
    peers = [f"n{at}" for at in range(20)]
    drawn = [advice.drawn(Random(minute).sample(peers, 20), minute) for minute in range(200)]
    assert drawn == [advice.drawn(peers, minute) for minute in range(200)]
    assert len(set(drawn)) > 15


def test_a_census_is_of_one_length() -> None:
    with pytest.raises(UsageError):
        Census(("n0",), joined(0, 2).rates, (None, None))
    assert advice.width(1000, busy=True) == 40
    assert advice.width(5, busy=True) == 1
