"""The router against a search that simply tries everything, and what it says when it fails."""

from __future__ import annotations

import itertools
import math
import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hexswarm.errors import NoRoute, UsageError
from hexswarm.records import (
    Announcement,
    GroupMembership,
    GroupOffer,
    Link,
    PeerId,
    Route,
    RouteRequest,
    Span,
    Speed,
    Stage,
)
from hexswarm.router import cost, native
from hexswarm.router.candidates import usable
from hexswarm.router.network import Snapshot, snapshot
from hexswarm.router.routing import AVOID, find_route, predicted, replan
from tests.strategies import CLIENT, MODEL, NAME, OTHER_MODEL, peer_id, requests, snapshots

LAYERS = 12
A, B, C, D = (peer_id(index) for index in range(4))
REQUEST = RouteRequest(MODEL, LAYERS, hidden_bytes=1152, prompt_tokens=20, new_tokens=30)


def peer(
    name: PeerId, first: int, end: int, layer_s: float = 0.001, **changes: Any
) -> Announcement:
    base = Announcement(
        peer=name,
        model=MODEL,
        model_name=NAME,
        layers=LAYERS,
        span=Span(first, end),
        state="online",
        dtype="float32",
        device="cpu",
        speed=Speed(layer_s, layer_s / 10, 0.002),
        free_kv_tokens=1000,
        queue_s=0.0,
        addresses=(f"/ip4/10.0.0.{name[-1]}/tcp/4001",),
    )
    return replace(base, **changes)


def route(
    peers: Sequence[Announcement],
    links: dict[tuple[PeerId, PeerId], Link] | None = None,
    **asked: Any,
) -> Route:
    view = snapshot(peers, links or {}, 0.0)
    return find_route(view, replace(REQUEST, **asked), 0.0, random.Random(0))


def shape(found: Route) -> list[tuple[PeerId, int, int]]:
    return [(stage.peer, stage.span.first, stage.span.end) for stage in found.stages]


def outcome(view: Snapshot, request: RouteRequest, now: float, rng: random.Random) -> Route | str:
    """The route, or the words in which it is refused."""
    try:
        return find_route(view, request, now, rng)
    except NoRoute as error:
        return str(error)


def every_route(
    peers: Sequence[Announcement], layers: int, cuts: Sequence[int]
) -> Iterator[tuple[Stage, ...]]:
    """All ways to cover the layers with one stage a peer, stages beginning and ending at `cuts`."""

    def extend(stages: tuple[Stage, ...], reached: int) -> Iterator[tuple[Stage, ...]]:
        if reached == layers:
            yield stages
            return
        used = {stage.peer for stage in stages}
        for item in peers:
            if item.peer not in used and reached in item.span:
                for end in cuts:
                    if reached < end <= item.span.end:
                        stage = Stage(item.peer, Span(reached, end), item.addresses)
                        yield from extend((*stages, stage), end)

    return extend((), 0)


def assert_sound(view: Snapshot, request: RouteRequest, found: Route) -> None:
    """`found` covers each layer once with peers that hold it, at the cost that it states."""
    layers = list(
        itertools.chain.from_iterable(range(s.span.first, s.span.end) for s in found.stages)
    )
    assert layers == list(range(request.layers))
    for stage in found.stages:
        item = view.announcement(request.model, stage.peer)
        assert item.span.covers(stage.span)
        assert item.serving
        assert item.free_kv_tokens >= request.kv_tokens
        assert stage.addresses == item.addresses
    for percentile, times in ((50, (found.ttft_s, found.tpot_s)), (95, late_times(found))):
        again = cost.predict(view, request, found.stages, percentile)
        assert times == (again.ttft_s, again.tpot_s)
    items = [view.announcement(request.model, stage.peer) for stage in found.stages]
    assert found.price == cost.price(found.stages, items)


def late_times(found: Route) -> tuple[float, float]:
    return found.ttft_p95_s, found.tpot_p95_s


# The optimum


SMALL = 6
"""Layers of the swarms in which every route is tried."""


def whole_s(request: RouteRequest, times: cost.Times) -> float:
    """Seconds of the whole answer."""
    return times.ttft_s + max(request.new_tokens - 1, 0) * times.tpot_s


def served(view: Snapshot, request: RouteRequest) -> list[Announcement]:
    columns = view.columns(request.model)
    return [columns.announcements[row] for row in usable(view, request)]


@settings(max_examples=150)
@given(snapshots(most=5, layers=SMALL), requests(layers=SMALL))
def test_the_optimum_of_random_swarms(view: Snapshot, request: RouteRequest) -> None:
    """No route of any peers, cut at whatever layers, has the whole answer sooner."""
    try:
        peers = served(view, request)
    except NoRoute as error:
        for first, end in error.missing:
            assert 0 <= first < end <= SMALL
        with pytest.raises(NoRoute):
            find_route(view, request, 0.0, random.Random(0))
        return
    found = find_route(view, request, 0.0, random.Random(0))
    assert_sound(view, request, found)
    known = every_route(peers, SMALL, range(1, SMALL + 1))
    least = min(whole_s(request, cost.predict(view, request, stages)) for stages in known)
    mine = whole_s(request, cost.predict(view, request, found.stages))
    assert mine == pytest.approx(least, rel=1e-9)


@settings(max_examples=60)
@given(snapshots(usable=True), requests(), st.randoms(use_true_random=False))
def test_the_answer_depends_on_nothing_else(
    view: Snapshot, request: RouteRequest, rng: random.Random
) -> None:
    """Order of announcements, time and random state do not change the route."""
    words = list(view.announcements)
    rng.shuffle(words)
    again = snapshot(words, dict(view.links), view.taken_s)
    assert outcome(again, request, 50.0, rng) == outcome(view, request, 0.0, random.Random(0))


@given(snapshots(), requests())
def test_a_route_tells_what_anybody_would_predict(view: Snapshot, request: RouteRequest) -> None:
    """The search predicts from its matrices, others look each way up: to the last bit the same."""
    try:
        found = find_route(view, request, 0.0, random.Random(0))
    except NoRoute:
        return
    for told in (found, *found.spares):
        assert replace(told, spares=()) == predicted(view, request, told.stages)


def test_the_closing_link_counts() -> None:
    """A line A-B-C of short links loses against a ring whose last link is short as well."""
    peers = [peer(A, 0, 4), peer(B, 4, 8), peer(C, 8, 12), peer(D, 8, 12)]
    links = {
        (A, B): Link(0.010),
        (B, C): Link(0.002),
        (A, C): Link(0.100),
        (B, D): Link(0.010),
        (A, D): Link(0.012),
        (C, D): Link(0.100),
    }
    assert shape(route(peers, links)) == [(A, 0, 4), (B, 4, 8), (D, 8, 12)]


def test_a_stage_may_use_less_than_its_peer_holds() -> None:
    peers = [peer(A, 0, 8, 0.001), peer(B, 4, 12, 0.003)]
    links = {(A, B): Link(0.001)}
    assert shape(route(peers, links)) == [(A, 0, 8), (B, 8, 12)]
    faster = [peer(A, 0, 8, 0.003), peer(B, 4, 12, 0.001)]
    assert shape(route(faster, links)) == [(A, 0, 4), (B, 4, 12)]


def test_a_peer_never_comes_twice_even_if_that_were_faster() -> None:
    """A slow peer holds all, a fast one the middle: A-B-A would win if it were allowed."""
    peers = [peer(A, 0, 12, 0.010), peer(B, 4, 8, 0.0001), peer(C, 8, 12, 0.009)]
    links = {(A, B): Link(0.0), (B, C): Link(0.0), (A, C): Link(0.0)}
    assert shape(route(peers, links)) == [(A, 0, 4), (B, 4, 8), (C, 8, 12)]
    assert shape(route(peers[:2], links)) == [(A, 0, 12)]


def test_a_slow_layer_is_left_to_the_one_who_is_quicker_at_it() -> None:
    """Stages hand over anywhere in the overlap, not at the ends of spans alone."""
    peers = [peer(A, 0, 8), peer(B, 4, 12)]
    links = {(A, B): Link(0.001)}
    # A limit that the ends of the overlap miss or overpay: B costs more, A is slower.
    slow, dear = peer(A, 0, 8, 0.003), peer(B, 4, 12, 0.001, busy=0.5)
    found = route([slow, dear], links, tpot_s=0.026, percentile=50.0)
    assert shape(found) == [(A, 0, 5), (B, 5, 12)]
    assert shape(route(peers, links, tpot_s=1.0)) == [(A, 0, 8), (B, 8, 12)]


def test_a_queue_diverts() -> None:
    peers = [peer(A, 0, 12, queue_s=0.5), peer(B, 0, 12, 0.002)]
    assert shape(route(peers)) == [(B, 0, 12)]


def test_equal_rings_are_told_apart_by_the_way_to_the_client() -> None:
    peers = [peer(A, 0, 12), peer(B, 0, 12)]
    links = {(CLIENT, A): Link(0.15), (CLIENT, B): Link(0.01)}
    assert shape(route(peers, links, client=CLIENT)) == [(B, 0, 12)]
    assert shape(route(peers)) == [(A, 0, 12)]


def test_times_by_hand() -> None:
    peers = [
        peer(A, 0, 6, queue_s=0.001, rows=2.0, speed=Speed(0.001, 0.0001, 0.002, 0.0005)),
        peer(B, 6, 12, 0.002),
    ]
    links = {
        (A, B): Link(0.02, 1e6, 0.003),
        (CLIENT, A): Link(0.1, jitter_s=0.01),
        (CLIENT, B): Link(0.2),
    }
    asked = {"client": CLIENT, "prompt_tokens": 452, "warm": frozenset({A})}
    found = route(peers, links, **asked)
    hop = 0.010 + cost.HOP_S
    compute = 6 * (0.001 + 2 * 0.0005) + 6 * 0.002 + 0.002
    assert found.tpot_s == pytest.approx(0.001 + compute + 2 * hop + 1152e-6)
    late = 0.15 * compute + (math.log(20) - 1) * 0.001 + 2 * 0.003
    assert found.tpot_p95_s == pytest.approx(found.tpot_s + late)
    # 452 / 8 = 56.5 tokens a chunk: 64 KiB of activations are 56, so eight chunks.
    count, tokens = cost.chunks(replace(REQUEST, prompt_tokens=452))
    assert (count, tokens) == (8, 56.5)
    chunks = [tokens * 6 * 0.0001, tokens * 6 * 0.0002]  # above 6 ms and 12 ms: weights are read
    first = 0.001 + sum(chunks) + hop + tokens * 1152e-6
    slowest = max(chunks)
    opening = max(0.1 + 0.02, 0.2 * 7)  # A is warm and linked to B; B is not
    ways = 0.05 + 0.1 + 2 * cost.HOP_S
    assert found.ttft_s == pytest.approx(opening + ways + first + 7 * slowest + 0.002)
    assert found.price == pytest.approx(14.0)


# Limits


def test_limits_that_can_be_kept_choose_another_route() -> None:
    """The fastest ring is far from the client; a limit on the first token asks for the near one."""
    peers = [peer(A, 0, 12, 0.001), peer(B, 0, 12, 0.002)]
    links = {(CLIENT, A): Link(0.4), (CLIENT, B): Link(0.01), (A, B): Link(0.4)}
    assert shape(route(peers, links, client=CLIENT, new_tokens=400)) == [(A, 0, 12)]
    assert shape(route(peers, links, client=CLIENT, ttft_s=0.2)) == [(B, 0, 12)]
    with pytest.raises(NoRoute, match="both limits") as error:
        route(peers, links, client=CLIENT, ttft_s=0.2, tpot_s=0.015)
    assert error.value.binding == "both"


def test_under_a_limit_the_cheapest_route_that_keeps_it_is_taken() -> None:
    """The fast peer is busy: it is left to those whose limits need it."""
    peers = [peer(A, 0, 12, 0.001, busy=0.8), peer(B, 0, 12, 0.004)]
    assert shape(route(peers)) == [(A, 0, 12)]
    assert shape(route(peers, tpot_s=0.1)) == [(B, 0, 12)]
    apart = {(A, B): Link(0.05)}
    assert shape(route(peers, apart, tpot_s=0.03)) == [(A, 0, 12)]
    full = [peer(A, 0, 12, 0.001, free_kv_tokens=100, kv_tokens=1000), peers[1]]
    assert shape(route(full, tpot_s=0.1)) == [(B, 0, 12)]


def test_a_percentile_is_stricter_than_the_median() -> None:
    peers = [peer(A, 0, 12, 0.001, queue_s=0.01), peer(B, 0, 12, 0.002, busy=0.5)]
    assert shape(route(peers, tpot_s=0.035)) == [(A, 0, 12)]
    assert shape(route(peers, tpot_s=0.035, percentile=95.0)) == [(B, 0, 12)]


def test_what_nobody_measured_is_named_and_counts_as_nothing() -> None:
    """A bound makes the router look there; the client measures before it uses the route."""
    found = route([peer(A, 0, 6), peer(B, 6, 12)], {(CLIENT, A): Link(0.1)}, client=CLIENT)
    assert found.unmeasured == ((A, B), (B, A), (CLIENT, B))
    assert found.tpot_s == pytest.approx(12 * 0.001 + 0.002 + 2 * cost.HOP_S)
    both = {(CLIENT, A): Link(0.1), (CLIENT, B): Link(0.1), (A, B): Link(0.05)}
    assert route([peer(A, 0, 6), peer(B, 6, 12)], both, client=CLIENT).unmeasured == ()


def test_an_impossible_limit_is_told_with_the_best_there_is() -> None:
    with pytest.raises(NoRoute, match=r"needs 0\.014 s a token, the limit is 0\.01 s") as error:
        route([peer(A, 0, 12)], tpot_s=0.01)
    assert error.value.remedy == "allow 0.015 s a token"
    assert error.value.binding == "tpot"
    assert error.value.achievable["tpot_s"] == pytest.approx(0.014)
    with pytest.raises(
        NoRoute, match=r"first token takes 0\.0264 s, the limit is 0\.01 s"
    ) as error:
        route([peer(A, 0, 12)], ttft_s=0.01)
    assert error.value.binding == "ttft"


@settings(max_examples=100)
@given(
    snapshots(most=5, layers=SMALL, usable=True),
    requests(layers=SMALL),
    st.integers(1, 100),
    st.integers(1, 900),
    st.sampled_from([50.0, 80.0, 95.0]),
)
def test_limits_of_random_swarms(
    view: Snapshot, request: RouteRequest, tpot_ms: int, ttft_ms: int, percentile: float
) -> None:
    """A route within the limits is found if there is one, and it is the cheapest of those."""
    limits = {"tpot_s": tpot_ms / 1000, "ttft_s": ttft_ms / 1000}
    limited = replace(request, percentile=percentile, **limits)
    try:
        peers = served(view, limited)
    except NoRoute:
        return
    prices = []
    for stages in every_route(peers, SMALL, range(1, SMALL + 1)):
        times = cost.predict(view, limited, stages, percentile)
        if times.tpot_s <= limits["tpot_s"] and times.ttft_s <= limits["ttft_s"]:
            items = [view.announcement(limited.model, stage.peer) for stage in stages]
            prices.append(cost.price(stages, items))
    if prices:
        found = find_route(view, limited, 0.0, random.Random(0))
        assert_sound(view, limited, found)
        assert found.price == pytest.approx(min(prices), rel=1e-5)
        times = cost.predict(view, limited, found.stages, percentile)
        assert times.tpot_s <= limits["tpot_s"] * (1 + 1e-8)
        assert times.ttft_s <= limits["ttft_s"] * (1 + 1e-8)
    else:
        with pytest.raises(NoRoute):
            find_route(view, limited, 0.0, random.Random(0))


# Against the herd


def heads(peers: Sequence[Announcement], draws: int = 400, **asked: Any) -> Counter[PeerId]:
    """How often each peer was the head of a route drawn with a spread of a tenth."""
    view, rng = snapshot(peers, {}, 0.0), random.Random(7)
    request = replace(REQUEST, spread=0.1, **asked)
    return Counter(find_route(view, request, 0.0, rng).head.peer for _ in range(draws))


def test_near_equal_routes_are_drawn_and_the_less_busy_of_two_is_taken() -> None:
    """The differences of the load are too small here for avoiding anybody."""
    peers = [
        peer(A, 0, 12),
        peer(B, 0, 12, 0.00102, busy=0.004),
        peer(C, 0, 12, 0.00101, busy=0.002),
        peer(D, 0, 12, 0.0013),
    ]
    drawn = heads(peers)
    assert drawn[D] <= 4  # not within a tenth
    assert drawn[A] > drawn[C] > drawn[B] > 0
    view, rng = snapshot(peers, {}, 0.0), random.Random(7)
    assert {find_route(view, REQUEST, 0.0, rng).head.peer for _ in range(9)} == {A}


def test_in_a_busy_swarm_the_best_peer_is_avoided_by_lot() -> None:
    """A draw is for the other with a probability of 1/4: the best one avoided and the other not."""
    alone = [peer(A, 0, 12), peer(B, 0, 12, 0.0015)]
    assert heads(alone) == {A: 400}
    crowd = [replace(item, busy=0.3) for item in alone]
    drawn = heads(crowd)
    # Equally busy: of two different draws the lower peer id is taken, so both must be for B.
    assert drawn[B] == pytest.approx(400 / 16, rel=0.6)
    quieter = [crowd[0], replace(crowd[1], busy=0.25)]
    assert heads(quieter)[B] == pytest.approx(400 * 7 / 16, rel=0.25)


def test_the_less_busy_of_two_is_not_taken_at_any_price() -> None:
    """Three times slower is within what a request may avoid, and beyond what quiet is worth."""
    crowd = [peer(A, 0, 12, busy=0.5), peer(B, 0, 12, 0.003, busy=0.1)]
    assert heads(crowd)[B] == pytest.approx(400 / 16, rel=0.6)
    far = [crowd[0], peer(B, 0, 12, 0.02, busy=0.1)]
    assert heads(far) == {A: 400}


def test_a_limit_is_kept_whoever_is_avoided() -> None:
    crowd = [peer(A, 0, 12, busy=0.5), peer(B, 0, 12, 0.0015, busy=0.1)]
    assert heads(crowd)[B] > 100
    view, request = snapshot(crowd, {}, 0.0), replace(REQUEST, spread=0.1, tpot_s=0.016)
    for seed in range(100):
        assert find_route(view, request, 0.0, random.Random(seed)).tpot_s <= 0.016 * (1 + 1e-9)


@settings(max_examples=60)
@given(snapshots(most=6, usable=True), requests(), st.integers(0, 9))
def test_a_drawn_route_is_within_the_spread(
    view: Snapshot, request: RouteRequest, seed: int
) -> None:
    """Its predicted time is at most 1 + spread of the least, whatever was drawn: in an idle swarm.

    Where others compute, it is longer by no more than what avoided peers count dearer.
    """
    busy = float(view.columns(request.model).busy.mean()) > 0
    most = 1.2 + (AVOID if busy else 0.0)
    try:
        best = find_route(view, request, 0.0, random.Random(0))
    except NoRoute:
        return
    drawn = find_route(view, replace(request, spread=0.2), 0.0, random.Random(seed))
    assert_sound(view, request, drawn)
    times = [cost.predict(view, request, item.stages) for item in (best, drawn)]
    assert whole_s(request, times[1]) <= most * whole_s(request, times[0]) * (1 + 1e-9)


def test_a_client_stays_on_its_route_unless_another_is_clearly_better() -> None:
    peers = [peer(A, 0, 12, 0.00105), peer(B, 0, 12, 0.001)]
    held = route([peers[0]])
    assert shape(route(peers, previous=held)) == [(A, 0, 12)]
    assert shape(route([peer(A, 0, 12, 0.002), peers[1]], previous=held)) == [(B, 0, 12)]
    assert shape(route([replace(peers[0], state="draining"), peers[1]], previous=held)) == [
        (B, 0, 12)
    ]
    assert shape(route(peers, previous=held, deny=frozenset({A}))) == [(B, 0, 12)]


# Holes


def test_a_hole_is_filled_and_nothing_else_is_touched() -> None:
    peers = [peer(A, 0, 4), peer(B, 4, 8), peer(C, 8, 12), peer(D, 2, 9, 0.005)]
    view = snapshot(peers, {}, 0.0)
    held = route(peers[:3])
    mended = replan(view, REQUEST, held, Span(4, 8), 0.0, random.Random(0))
    assert shape(mended) == [(A, 0, 4), (D, 4, 8), (C, 8, 12)]
    with pytest.raises(NoRoute, match="no peer serves layers 9-11"):
        replan(view, REQUEST, held, Span(8, 12), 0.0, random.Random(0))
    with pytest.raises(UsageError, match="not whole stages"):
        replan(view, REQUEST, held, Span(4, 7), 0.0, random.Random(0))


@settings(max_examples=80)
@given(snapshots(most=6, usable=True), requests(), st.data())
def test_replanning_is_the_best_of_all_ways_to_fill_the_hole(
    view: Snapshot, request: RouteRequest, data: st.DataObject
) -> None:
    """All stages but those of the hole stay; no other filling has the answer sooner."""
    try:
        held = find_route(view, request, 0.0, random.Random(0))
    except NoRoute:
        return
    first = data.draw(st.integers(0, len(held.stages) - 1))
    last = data.draw(st.integers(first, len(held.stages) - 1))
    hole = Span(held.stages[first].span.first, held.stages[last].span.end)
    gone = {stage.peer for stage in held.stages[first : last + 1]}
    kept = [stage for stage in held.stages if stage.peer not in gone]
    free = [item for item in served(view, request) if item.peer not in gone]
    free = [item for item in free if item.peer not in {stage.peer for stage in kept}]
    pieces = [
        replace(item, span=Span(max(item.span.first, hole.first), min(item.span.end, hole.end)))
        for item in free
        if max(item.span.first, hole.first) < min(item.span.end, hole.end)
    ]
    fillings = []
    if len(hole) <= 6:
        stages = [replace(item, span=item.span) for item in pieces]
        fillings = list(fill(stages, hole))
    try:
        mended = replan(view, request, held, hole, 0.0, random.Random(0))
    except NoRoute:
        assert not fillings
        return
    assert_sound(view, request, mended)
    assert [stage for stage in mended.stages if not hole.covers(stage.span)] == kept
    if fillings:
        ways = [sorted((*kept, *filling), key=lambda s: s.span) for filling in fillings]
        least = min(whole_s(request, cost.predict(view, request, stages)) for stages in ways)
        mine = whole_s(request, cost.predict(view, request, mended.stages))
        assert mine == pytest.approx(least, rel=1e-9)


def fill(peers: Sequence[Announcement], hole: Span) -> Iterator[tuple[Stage, ...]]:
    """All ways to cover the layers of a hole with one stage a peer."""

    def extend(stages: tuple[Stage, ...], reached: int) -> Iterator[tuple[Stage, ...]]:
        if reached == hole.end:
            yield stages
            return
        used = {stage.peer for stage in stages}
        for item in peers:
            if item.peer not in used and reached in item.span:
                for end in range(reached + 1, item.span.end + 1):
                    stage = Stage(item.peer, Span(reached, end), item.addresses)
                    yield from extend((*stages, stage), end)

    return extend((), hole.first)


# Spares


def test_spares_share_as_few_peers_as_possible() -> None:
    peers = [peer(A, 0, 6), peer(B, 6, 12), peer(C, 0, 6, 0.002), peer(D, 6, 12, 0.003)]
    found = route(peers, {pair: Link(0.01) for pair in itertools.combinations((A, B, C, D), 2)})
    assert [{stage.peer for stage in item.stages} for item in (found, *found.spares)] == [
        {A, B},
        {C, D},
        {C, B},
    ]


def test_a_single_chain_has_no_spare() -> None:
    assert route([peer(A, 0, 6), peer(B, 6, 12)]).spares == ()


@settings(max_examples=60)
@given(snapshots(usable=True), requests())
def test_spares_are_sound_and_outlive_an_earlier_route(
    view: Snapshot, request: RouteRequest
) -> None:
    """Each spare is a route by itself and lacks a peer of every earlier one."""
    try:
        found = find_route(view, request, 0.0, random.Random(0))
    except NoRoute:
        return
    told = [found, *found.spares]
    assert len(told) <= 3
    for index, item in enumerate(told):
        assert_sound(view, request, item)
        mine = {stage.peer for stage in item.stages}
        for earlier in told[:index]:
            assert {stage.peer for stage in earlier.stages} - mine


# Why there is none


def refusal(peers: Sequence[Announcement], **asked: Any) -> NoRoute:
    with pytest.raises(NoRoute) as error:
        route(peers, **asked)
    return error.value


def test_missing_layers_are_named() -> None:
    error = refusal([peer(A, 0, 3), peer(B, 9, 12)])
    assert error.cause == f"no peer serves layers 3-8 of {NAME}"
    assert error.missing == ((3, 9),)
    assert error.remedy == "start one with `hexswarm peer --span 3:9`"
    error = refusal([peer(A, 0, 3), peer(B, 4, 8)])
    assert error.cause == f"no peer serves layers 3, 8-11 of {NAME}"
    assert refusal([peer(A, 0, 11)]).cause == f"no peer serves layer 11 of {NAME}"


def test_peers_that_leave_or_come_are_named() -> None:
    whole = peer(A, 0, 6)
    error = refusal([whole, peer(B, 6, 12, state="draining")])
    assert error.cause == f"the only peers that hold layers 6-11 of {NAME} are draining"
    assert error.missing == ((6, 12),)
    error = refusal([whole, peer(B, 6, 12, state="draining"), peer(C, 6, 12, state="joining")])
    assert error.cause.endswith("are draining or joining")
    error = refusal([whole, peer(B, 6, 12, group=GroupMembership("g", 1, 2, 0))])
    assert error.cause.endswith("are not leading")
    offer = GroupOffer("lab", 1 << 30, "10.0.0.1", 4711, waiting=True)
    error = refusal([whole, peer(B, 6, 12, state="joining", offer=offer)])
    assert error.cause.endswith("are waiting for a group")


def test_a_group_is_one_stage_at_its_leaders_speed() -> None:
    """Its members, whatever they announce, are no stages of their own and no spares."""
    fast, slow = Speed(0.001, 1e-4, 0.0), Speed(0.01, 1e-4, 0.0)
    group = GroupMembership("g", 0, 2, 1, (500, 500))
    lead = peer(A, 0, 12, group=group, speed=fast)
    member = peer(B, 0, 12, group=replace(group, rank=1), speed=Speed(1e-6, 1e-6, 0.0))
    found = route([lead, member, peer(C, 0, 12, speed=slow)])
    assert shape(found) == [(A, 0, 12)]
    assert B not in {stage.peer for spare in found.spares for stage in spare.stages}
    assert found.tpot_s == pytest.approx(0.012, rel=0.2)


def test_full_peers_are_named_with_the_room_they_have() -> None:
    error = refusal([peer(A, 0, 12, free_kv_tokens=49), peer(B, 0, 6)])
    assert error.cause == (
        f"the peers that serve layers 6-11 of {NAME} are full: they have room for at most 49 tokens"
    )
    assert error.remedy.startswith("the request needs 50")
    assert shape(route([peer(A, 0, 12, free_kv_tokens=50)])) == [(A, 0, 12)]


def test_what_the_request_excludes_is_its_own_doing() -> None:
    peers = [peer(A, 0, 12), peer(B, 0, 12)]
    assert shape(route(peers, deny=frozenset({A}))) == [(B, 0, 12)]
    assert shape(route(peers, allow=frozenset({B}))) == [(B, 0, 12)]
    nobody: list[dict[str, Any]] = [{"deny": frozenset({A, B})}, {"allow": frozenset()}]
    for asked in nobody:
        error = refusal(peers, **asked)
        assert error.cause == f"the request excludes every peer that serves layers 0-11 of {NAME}"


def test_trust_element_types_and_bandwidth_are_conditions() -> None:
    fast = {"up_bytes_per_s": 2e6, "down_bytes_per_s": 9e6}
    peers = [peer(A, 0, 12), peer(B, 0, 12, 0.002, dtype="bfloat16", **fast)]
    assert shape(route(peers, trusted=frozenset({B}))) == [(B, 0, 12)]
    assert shape(route(peers, dtypes=frozenset({"bfloat16"}))) == [(B, 0, 12)]
    assert shape(route(peers, min_bytes_per_s=1e6)) == [(B, 0, 12)]
    refused = {
        "trust": refusal(peers, trusted=frozenset({C})),
        "dtype": refusal(peers, dtypes=frozenset({"float16"})),
        "bandwidth": refusal(peers, min_bytes_per_s=3e6),
    }
    assert {name: error.binding for name, error in refused.items()} == {
        name: name for name in refused
    }
    assert "bfloat16, float32, not in float16" in refused["dtype"].cause


def test_rounded_weights_are_used_by_those_who_ask_for_them() -> None:
    """A route never has peers of another class than was asked for."""
    peers = [peer(A, 0, 12, 0.02), peer(B, 0, 12, 0.001, dtype="float32+int8")]
    assert shape(route(peers)) == [(A, 0, 12)]
    assert shape(route(peers, dtypes=frozenset({"float32+int8"}))) == [(B, 0, 12)]
    halves = [peer(A, 0, 6), peer(B, 6, 12, dtype="float32+int8")]
    error = refusal(halves)
    assert error.binding == "dtype"
    assert "layers 6-11" in error.cause
    assert "float32+int8" in error.cause
    both = frozenset({"float32", "float32+int8"})
    assert shape(route(halves, dtypes=both)) == [(A, 0, 6), (B, 6, 12)]


def test_an_unknown_model_is_told_with_those_that_are_served() -> None:
    other = peer(A, 0, 12, model=OTHER_MODEL, model_name="Other-1B")
    error = refusal([other])
    assert error.cause.startswith("no peer serves the model")
    assert error.remedy == "served here: Other-1B"
    assert error.missing == ((0, 12),)
    assert refusal([]).remedy == "no peer serves anything here"


def test_an_announcement_with_another_number_of_layers_is_another_model() -> None:
    assert refusal([peer(A, 0, 12, layers=24)]).cause.startswith("no peer serves the model")


@pytest.mark.parametrize(
    "asked",
    [
        {"layers": 0},
        {"hidden_bytes": 0},
        {"prompt_tokens": 0},
        {"new_tokens": -1},
        {"tpot_s": 0.0},
        {"ttft_s": float("nan")},
        {"percentile": 20.0},
        {"percentile": 100.0},
        {"spread": -0.1},
        {"min_bytes_per_s": float("nan")},
    ],
)
def test_a_senseless_request_is_refused(asked: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        route([peer(A, 0, 12)], **asked)


# Effort


def random_swarm(count: int, layers: int, rng: random.Random) -> Snapshot:
    """Peers in five regions, spans of a tenth to half of the model, all links known."""
    peers, region = [], {}
    for index in range(count):
        length = rng.randint(layers // 10, layers // 2)
        first = rng.choice([0, layers - length, rng.randint(0, layers - length)])
        name = peer_id(index)
        region[name] = rng.randrange(5)
        span = Span(first, first + length)
        peers.append(peer(name, 0, 1, rng.uniform(0.0005, 0.003), layers=layers, span=span))
    links = {
        (a, b): Link(rng.uniform(0.005, 0.025) + 0.03 * abs(region[a] - region[b]))
        for a, b in itertools.combinations(region, 2)
    }
    return snapshot(peers, links, 0.0)


@pytest.mark.skipif(not native.available(), reason="the native search was not compiled")
@pytest.mark.parametrize(("count", "limit_s"), [(50, 0.01), (200, 0.03)])
def test_it_is_fast(count: int, limit_s: float) -> None:
    """Best of five; about ten times what it takes on a quiet machine (1 and 3 ms)."""
    request = replace(REQUEST, layers=80)
    times = []
    for seed in range(5):
        view = random_swarm(count, 80, random.Random(seed))
        find_route(view, request, 0.0, random.Random(0))  # the snapshot is ready now
        begun = time.perf_counter()
        find_route(view, request, 0.0, random.Random(0))
        times.append(time.perf_counter() - begun)
    assert min(times) < limit_s
