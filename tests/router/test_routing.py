"""The router against a search that simply tries everything, and what it says when it fails."""

from __future__ import annotations

import itertools
import random
import time
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
    Link,
    PeerId,
    Route,
    RouteRequest,
    Span,
    Speed,
    Stage,
)
from hexswarm.router import cost
from hexswarm.router.candidates import usable
from hexswarm.router.network import Snapshot, snapshot
from hexswarm.router.routing import find_route, predict
from hexswarm.router.search import any_ring, build_graph
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
    assert found.tpot_s == cost.time_per_token(view, request, found.stages)
    assert found.ttft_s == cost.time_to_first_token(view, request, found.stages)


# The optimum


@settings(max_examples=150)
@given(snapshots(), requests())
def test_the_optimum_of_random_swarms(view: Snapshot, request: RouteRequest) -> None:
    """No route of any peers has less time per token, nor of those an earlier first token."""
    try:
        peers = usable(view, request)
    except NoRoute as error:
        for first, end in error.missing:
            assert 0 <= first < end <= LAYERS
        with pytest.raises(NoRoute):
            find_route(view, request, 0.0, random.Random(0))
        return
    found = find_route(view, request, 0.0, random.Random(0))
    assert_sound(view, request, found)
    cuts = build_graph(peers, LAYERS).cuts
    known = [predict(view, request, stages) for stages in every_route(peers, LAYERS, cuts)]
    least = min(item.tpot_s for item in known)
    assert found.tpot_s == pytest.approx(least, rel=1e-9)
    equal = [item for item in known if item.tpot_s <= least * (1 + 1e-9)]
    if len(equal) < 32:
        assert found.ttft_s == min(item.ttft_s for item in equal)


@settings(max_examples=60)
@given(snapshots(most=4, layers=7, usable=True), requests(layers=7), st.data())
def test_cuts_at_the_ends_of_spans_lose_nothing(
    view: Snapshot, request: RouteRequest, data: st.DataObject
) -> None:
    """Where links obey the triangle inequality, no route with cuts elsewhere is faster."""
    ends = [CLIENT, *(item.peer for item in view.announcements)]
    place = {end: data.draw(st.integers(0, 50)) / 1000 for end in ends}
    links = {(a, b): Link(abs(place[a] - place[b])) for a in ends for b in ends if a < b}
    view = snapshot(view.announcements, links, 0.0)
    try:
        peers = usable(view, request)
    except NoRoute:
        return
    found = find_route(view, request, 0.0, random.Random(0))
    known = every_route(peers, 7, range(8))
    least = min(cost.time_per_token(view, request, stages) for stages in known)
    assert found.tpot_s == pytest.approx(least, rel=1e-9)


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


def test_the_closing_link_counts() -> None:
    """A line A-B-C of short links loses against a ring whose last link is short as well."""
    peers = [peer(A, 0, 4), peer(B, 4, 8), peer(C, 8, 12), peer(D, 8, 12)]
    links = {
        (A, B): Link(0.010),
        (B, C): Link(0.002),
        (A, C): Link(0.100),
        (B, D): Link(0.010),
        (A, D): Link(0.012),
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


def test_a_queue_diverts() -> None:
    peers = [peer(A, 0, 12, queue_s=0.5), peer(B, 0, 12, 0.002)]
    assert shape(route(peers)) == [(B, 0, 12)]


def test_equal_rings_are_told_apart_by_the_way_to_the_client() -> None:
    peers = [peer(A, 0, 12), peer(B, 0, 12)]
    links = {(CLIENT, A): Link(0.15), (CLIENT, B): Link(0.01)}
    assert shape(route(peers, links, client=CLIENT)) == [(B, 0, 12)]
    assert shape(route(peers)) == [(A, 0, 12)]


def test_times_by_hand() -> None:
    peers = [peer(A, 0, 6, queue_s=0.001), peer(B, 6, 12, 0.002)]
    links = {(A, B): Link(0.02, 1e6), (CLIENT, A): Link(0.1), (CLIENT, B): Link(0.2)}
    found = route(peers, links, client=CLIENT, prompt_tokens=226)  # two chunks of 113 tokens
    hop = 0.010 + cost.HOP_S
    assert found.tpot_s == pytest.approx(0.001 + 6 * 0.001 + 6 * 0.002 + 0.002 + 2 * hop + 1152e-6)
    first = 0.001 + 113 * 6 * (0.0001 + 0.0002) + hop + 113 * 1152e-6
    slowest = max(113 * 6 * 0.0002, 113 * 1152e-6)
    ways = 0.05 + 0.1 + 2 * cost.HOP_S
    assert found.ttft_s == pytest.approx(ways + first + slowest + 0.002)


# Limits


def test_limits_that_can_be_kept_choose_another_route() -> None:
    """The fastest ring is far from the client; a limit on the first token asks for the near one."""
    peers = [peer(A, 0, 12, 0.001), peer(B, 0, 12, 0.002)]
    links = {(CLIENT, A): Link(0.4), (CLIENT, B): Link(0.01)}
    assert shape(route(peers, links, client=CLIENT)) == [(A, 0, 12)]
    assert shape(route(peers, links, client=CLIENT, ttft_s=0.2)) == [(B, 0, 12)]
    with pytest.raises(NoRoute, match="both limits"):
        route(peers, links, client=CLIENT, ttft_s=0.2, tpot_s=0.015)


def test_an_impossible_limit_is_told_with_the_best_there_is() -> None:
    with pytest.raises(NoRoute, match=r"needs 0\.014 s a token, the limit is 0\.01 s") as error:
        route([peer(A, 0, 12)], tpot_s=0.01)
    assert error.value.remedy == "allow tpot_s = 0.015"
    with pytest.raises(NoRoute, match=r"first token takes 0\.126 s, the limit is 0\.05 s"):
        route([peer(A, 0, 12)], ttft_s=0.05)


@settings(max_examples=60)
@given(snapshots(most=5, usable=True), requests(), st.integers(1, 200), st.integers(1, 600))
def test_limits_of_random_swarms(
    view: Snapshot, request: RouteRequest, tpot_ms: int, ttft_ms: int
) -> None:
    """A route within the limits is found if there is one, and it is the fastest of those."""
    limited = replace(request, tpot_s=tpot_ms / 1000, ttft_s=ttft_ms / 1000)
    try:
        peers = usable(view, limited)
    except NoRoute:
        return
    cuts = build_graph(peers, LAYERS).cuts
    known = [predict(view, limited, stages) for stages in every_route(peers, LAYERS, cuts)]
    fitting = [
        item for item in known if item.tpot_s <= tpot_ms / 1000 and item.ttft_s <= ttft_ms / 1000
    ]
    if fitting:
        found = find_route(view, limited, 0.0, random.Random(0))
        assert found.tpot_s == pytest.approx(min(item.tpot_s for item in fitting), rel=1e-9)
        assert found.ttft_s <= ttft_ms / 1000
    else:
        with pytest.raises(NoRoute):
            find_route(view, limited, 0.0, random.Random(0))


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
        {"percentile": 95.0},
    ],
)
def test_a_senseless_request_is_refused(asked: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        route([peer(A, 0, 12)], **asked)


# Effort


def test_without_any_effort_there_is_still_a_route() -> None:
    peers = [peer(A, 0, 5), peer(B, 3, 9), peer(C, 2, 4), peer(D, 8, 12)]
    stages = any_ring(build_graph(peers, LAYERS))
    assert [(s.peer, s.span) for s in stages] == [
        (A, Span(0, 5)),
        (B, Span(5, 9)),
        (D, Span(9, 12)),
    ]


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


@pytest.mark.parametrize(("count", "limit_s"), [(50, 0.1), (300, 0.75)])
def test_it_is_fast(count: int, limit_s: float) -> None:
    """Best of five; five times what it takes on a quiet machine (20 and 150 ms)."""
    request = replace(REQUEST, layers=80)
    times = []
    for seed in range(5):
        view = random_swarm(count, 80, random.Random(seed))
        begun = time.perf_counter()
        find_route(view, request, 0.0, random.Random(0))
        times.append(time.perf_counter() - begun)
    assert min(times) < limit_s
