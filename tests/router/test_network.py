"""The snapshot: what it takes in, which source it believes, and what it tells others."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import FrozenInstanceError, fields, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hexswarm.errors import UsageError
from hexswarm.records import Announcement, Coordinates, GroupMembership, Link, Load, Span, Speed
from hexswarm.router import vivaldi
from hexswarm.router.columns import Columns
from hexswarm.router.network import CACHED, JITTER, Snapshot, Ways, snapshot
from hexswarm.router.regions import REGIONS
from tests.strategies import (
    CLIENT,
    MODEL,
    NAME,
    OTHER_MODEL,
    announcements,
    coordinates,
    milliseconds,
    peer_id,
    snapshots,
)

A, B, C = (peer_id(index) for index in range(3))


def place(x_s: float, error: float = 0.1, height_s: float = 0.0) -> Coordinates:
    return Coordinates((x_s, 0.0, 0.0), height_s, error)


def announcement(peer: Any = A, span: tuple[int, int] = (0, 10), **changes: Any) -> Announcement:
    base = Announcement(
        peer=peer,
        model=MODEL,
        model_name=NAME,
        layers=30,
        span=Span(*span),
        state="online",
        dtype="float32",
        device="cpu",
        speed=Speed(0.001, 0.0001, 0.002),
        free_kv_tokens=1000,
        queue_s=0.0,
        addresses=(),
    )
    return replace(base, **changes)


# --- who serves what ------------------------------------------------------------------------


def test_coverage_counts_serving_peers_of_each_layer() -> None:
    view = snapshot(
        [
            announcement(A, (0, 10)),
            announcement(B, (5, 12)),
            announcement(C, (12, 30), state="draining"),
        ],
        {},
        0.0,
    )
    assert view.coverage(MODEL) == (1,) * 5 + (2,) * 5 + (1,) * 2 + (0,) * 18
    assert view.missing(MODEL, 30) == [Span(12, 30)]
    assert [item.peer for item in view.serving(MODEL)] == [A, B]


def test_an_unknown_model_has_no_coverage_and_misses_everything() -> None:
    view = snapshot([announcement()], {}, 0.0)
    assert view.coverage(OTHER_MODEL) == ()
    assert view.missing(OTHER_MODEL, 3) == [Span(0, 3)]
    assert view.columns(OTHER_MODEL).peers == ()
    assert view.ways(OTHER_MODEL, np.arange(0)).rtt_s.shape == (0, 0)


def test_only_the_leader_of_a_group_serves() -> None:
    leader = announcement(A, group=GroupMembership("g", 0, 2, 1))
    member = announcement(B, group=GroupMembership("g", 1, 2, 1))
    view = snapshot([member, leader], {}, 0.0)
    assert [item.peer for item in view.serving(MODEL)] == [A]
    assert view.columns(MODEL).serving.tolist() == [True, False]


def test_the_last_word_of_a_peer_counts_for_each_model() -> None:
    words = [
        announcement(A, (0, 10), sequence=3),
        announcement(A, (10, 20), sequence=4),
        announcement(A, (20, 30), sequence=2),
        announcement(A, (0, 5), model=OTHER_MODEL),
    ]
    view = snapshot(words, {}, 0.0)
    assert view.announcement(MODEL, A).span == Span(10, 20)
    assert view.announcement(OTHER_MODEL, A).span == Span(0, 5)
    with pytest.raises(UsageError):
        view.announcement(MODEL, B)


# --- how far apart --------------------------------------------------------------------------


def test_measured_beats_announced_beats_estimated_beats_nothing() -> None:
    near = [announcement(peer, coordinates=place(x)) for peer, x in ((A, 0.0), (B, 0.03))]
    told = [replace(near[0], neighbours=((B, 0.02),)), near[1]]
    measured = snapshot(told, {(B, A): Link(0.01, 1e6)}, 0.0)
    assert measured.known_link(A, B) == (Link(0.01, 1e6), "measured")
    announced = Link(0.02, jitter_s=JITTER * 0.01)
    assert snapshot(told, {}, 0.0).known_link(B, A) == (announced, "announced")
    link, origin = snapshot(near, {}, 0.0).known_link(A, B)
    assert (link.rtt_s, origin) == (0.03, "estimated")
    assert link.jitter_s == vivaldi.spread_s(place(0.0), place(0.03))
    assert snapshot(near, {}, 0.0).known_link(A, C) == (Link(0.0), "unmeasured")
    assert measured.known_link(A, A) == (Link(0.0), "measured")
    assert measured.linked(A, B)
    assert not snapshot(near, {}, 0.0).linked(A, B)


def test_a_peer_that_understates_its_distance_is_not_believed_against_the_other_end() -> None:
    told = [announcement(A, neighbours=((B, 0.0),)), announcement(B, neighbours=((A, 0.08),))]
    assert snapshot(told, {}, 0.0).link(A, B).rtt_s == 0.08


@pytest.mark.parametrize("rtt_s", [math.nan, math.inf, -1.0])
def test_a_senseless_announced_distance_is_ignored(rtt_s: float) -> None:
    told = [announcement(A, neighbours=((B, rtt_s), (A, 0.5))), announcement(B)]
    view = snapshot(told, {}, 0.0)
    assert view.known_link(A, B)[1] == "unmeasured"
    assert not view.ways(MODEL, np.arange(2)).known[0, 1]


def test_coordinates_of_a_newcomer_tell_nothing() -> None:
    told = [announcement(A, coordinates=place(0.0)), announcement(B, coordinates=place(0.1, 1.0))]
    assert snapshot(told, {}, 0.0).known_link(A, B)[1] == "unmeasured"


def test_sure_coordinates_leave_the_jitter_of_any_way() -> None:
    told = [announcement(A, coordinates=place(0.0, 0.0)), announcement(B, coordinates=place(1, 0))]
    assert snapshot(told, {}, 0.0).link(A, B).jitter_s == JITTER * 0.5


def test_bandwidth_is_what_the_sender_sends_and_the_receiver_takes() -> None:
    told = [
        announcement(A, up_bytes_per_s=2e6, down_bytes_per_s=5e7),
        announcement(B, up_bytes_per_s=9e6, down_bytes_per_s=1e6),
        announcement(C, up_bytes_per_s=1e-9),
    ]
    view = snapshot(told, {}, 0.0)
    assert view.link(A, B).bytes_per_s == 1e6
    assert view.link(B, A).bytes_per_s == 9e6
    assert view.link(A, CLIENT).bytes_per_s == 2e6
    assert view.link(CLIENT, C).bytes_per_s == math.inf
    assert view.link(C, A).bytes_per_s == 1.0, "nothing that is told may make costs infinite"
    timed = snapshot(told, {(A, B): Link(0.01)}, 0.0)
    assert timed.link(A, B) == Link(0.01, 1e6), "the measured round trip says nothing of bytes"


def test_a_way_to_a_peer_behind_a_relay_is_relayed() -> None:
    hidden = ("/ip4/1.2.3.4/tcp/4001/p2p/12D3KooWRelay/p2p-circuit",)
    told = [announcement(A, addresses=hidden), announcement(B, addresses=("/ip4/1.2.3.4/tcp/1",))]
    view = snapshot(told, {}, 0.0)
    assert view.link(A, B).relayed
    assert view.link(CLIENT, A).relayed
    assert not view.link(CLIENT, B).relayed
    assert view.columns(MODEL).relayed.tolist() == [True, False]


def test_of_two_measured_directions_the_worse_counts() -> None:
    links = {(A, B): Link(0.01, 1e6, 0.002), (B, A): Link(0.03, 2e6, 0.001)}
    assert snapshot([], links, 0.0).link(A, B) == Link(0.03, 1e6, 0.002)


def test_the_client_has_coordinates_of_its_own() -> None:
    told = [announcement(A, coordinates=place(0.05)), announcement(B)]
    view = snapshot(told, {}, 0.0, client=CLIENT, coordinates=place(0.0))
    assert view.known_link(CLIENT, A) == (view.link(A, CLIENT), "estimated")
    assert view.link(CLIENT, A).rtt_s == 0.05
    assert view.known_link(CLIENT, B)[1] == "unmeasured"
    rtt_s, _, known = view.client_ways(CLIENT, MODEL, np.arange(2))
    assert rtt_s.tolist() == [0.05, 0.0]
    assert known.tolist() == [True, False]
    assert not view.client_ways(None, MODEL, np.arange(2))[2].any()


@given(snapshots(), st.randoms(use_true_random=False), st.none() | coordinates)
def test_ways_are_the_links_of_all_pairs(
    view: Snapshot, rng: random.Random, own: Coordinates | None
) -> None:
    """The matrices say what `known_link` says, whichever rows are asked for in whichever order."""
    view = snapshot(view.announcements, view.links, 0.0, client=CLIENT, coordinates=own)
    peers = view.columns(MODEL).peers
    order = rng.sample(range(len(peers)), rng.randint(0, len(peers)))
    for rows in (order, range(len(peers))):
        ways = view.ways(MODEL, np.array(rows, dtype=np.intp))
        rtt_s, jitter_s, known = view.client_ways(CLIENT, MODEL, np.array(rows, dtype=np.intp))
        for i, row in enumerate(rows):
            for j, column in enumerate(rows):
                link, origin = view.known_link(peers[row], peers[column])
                assert ways.rtt_s[i, j] == link.rtt_s
                assert ways.jitter_s[i, j] == link.jitter_s
                assert ways.s_per_byte[i, j] == 1 / link.bytes_per_s
                assert ways.known[i, j] == (origin != "unmeasured")
                assert ways.linked[i, j] == view.linked(peers[row], peers[column])
            link, origin = view.known_link(CLIENT, peers[row])
            assert (rtt_s[i], jitter_s[i]) == (link.rtt_s, link.jitter_s)
            assert known[i] == (origin != "unmeasured")


def test_a_client_that_announces_itself_is_a_row_like_others() -> None:
    told = [announcement(A, coordinates=place(0.0)), announcement(B, coordinates=place(0.1))]
    view = snapshot(told, {}, 0.0, client=A, coordinates=place(9.0))
    rtt_s, _, known = view.client_ways(A, MODEL, np.arange(2))
    assert rtt_s.tolist() == view.ways(MODEL, np.arange(2)).rtt_s[0].tolist() == [0.0, 0.1]
    assert known.all()


def test_ways_of_all_peers_are_computed_once() -> None:
    view = snapshot([announcement(peer) for peer in (A, B)], {}, 0.0)
    ways = view.ways(MODEL, np.arange(2))
    assert view.ways(MODEL, np.arange(2)) is ways
    assert view.updated(announcement(A, sequence=1), 1.0).ways(MODEL, np.arange(2)) is not ways
    with pytest.raises(ValueError, match="read-only"):
        ways.rtt_s[0, 1] = 1.0
    many = snapshot([announcement(peer_id(index)) for index in range(CACHED + 1)], {}, 0.0)
    rows = np.arange(CACHED + 1)
    assert many.ways(MODEL, rows) is not many.ways(MODEL, rows)


# --- arrays ---------------------------------------------------------------------------------

OF_REGIONS = {"regions", "region", "access_s"}
"""What may differ from a snapshot made from scratch: centres stay for a while."""


def assert_columns_equal(one: Columns, other: Columns) -> None:
    for name in {field.name for field in fields(Columns)} - OF_REGIONS:
        a, b = getattr(one, name), getattr(other, name)
        if isinstance(a, np.ndarray):
            assert a.dtype == b.dtype, name
            assert np.array_equal(a, b, equal_nan=a.dtype == np.float64), name
        else:
            assert a == b, name
    assert len(one.region) == len(one.access_s) == len(one.peers)


@given(snapshots())
def test_columns_say_what_announcements_say(view: Snapshot) -> None:
    columns = view.columns(MODEL)
    assert columns.announcements == view.of_model(MODEL)
    for row, item in enumerate(columns.announcements):
        assert columns.peers[row] == item.peer
        assert columns.index[item.peer] == row
        assert (columns.first[row], columns.end[row]) == (item.span.first, item.span.end)
        assert columns.serving[row] == item.serving
        speed = (columns.decode_layer_s, columns.prefill_layer_s, columns.head_s)
        assert Speed(*(array[row] for array in speed), columns.row_layer_s[row]) == item.speed
        load = (columns.queue_s, columns.rows, columns.busy, columns.free_kv_tokens)
        assert Load(*(array[row] for array in load)) == item.load
        assert columns.kv_tokens[row] == item.kv_tokens
        assert columns.layers[row] == item.layers
        if item.coordinates is None:
            assert np.isnan(columns.position[row]).all()
            assert not columns.placed[row]
        else:
            assert tuple(columns.position[row]) == item.coordinates.position_s
            assert columns.height[row] == item.coordinates.height_s
            assert columns.error[row] == item.coordinates.error
        assert columns.up_s_per_byte[row] == (1 / item.up_bytes_per_s if item.up_bytes_per_s else 0)
    for name in ("queue_s", "position", "region"):
        assert not getattr(columns, name).flags.writeable


changes = st.lists(
    st.one_of(
        st.tuples(st.just("word"), announcements(others=6)),
        st.tuples(st.just("gone"), st.integers(0, 5), st.sampled_from([MODEL, OTHER_MODEL])),
        st.tuples(
            st.just("load"),
            st.dictionaries(
                st.integers(0, 7).map(peer_id),
                st.builds(Load, milliseconds(9), st.just(2.0), st.just(0.5), st.just(77)),
                max_size=4,
            ),
        ),
        st.tuples(
            st.just("links"),
            st.dictionaries(
                st.tuples(*[st.integers(0, 7).map(peer_id)] * 2).filter(lambda ab: ab[0] != ab[1]),
                st.builds(Link, milliseconds(9), st.just(1e6)),
                max_size=4,
            ),
            st.none() | coordinates,
        ),
    ),
    max_size=6,
)


def all_ways(view: Snapshot) -> Ways:
    return view.ways(MODEL, np.arange(len(view.columns(MODEL).peers)))


def all_client_ways(view: Snapshot) -> list[Any]:
    """As lists, for a client that is a peer and one that is none."""
    rows = np.arange(len(view.columns(MODEL).peers))
    clients = (peer_id(0), CLIENT)
    return [[x.tolist() for x in view.client_ways(client, MODEL, rows)] for client in clients]


@given(snapshots(), changes)
def test_a_changed_snapshot_equals_one_from_scratch(
    view: Snapshot, changes: Sequence[tuple[Any, ...]]
) -> None:
    """Words, departures, loads and ways in any order leave what the same records make anew."""
    for step, (kind, *what) in enumerate(changes):
        now = 200.0 + step
        held = {(item.peer, item.model): item for item in view.announcements}
        before = (view, view.to_json())
        view.columns(MODEL), view.columns(OTHER_MODEL)
        all_ways(view), all_client_ways(view)
        if kind == "word":
            view, items = view.updated(what[0], now), [*held.values(), what[0]]
        elif kind == "gone":
            peer, model = peer_id(what[0]), what[1]
            view, _ = view.without(model, peer, now), held.pop((peer, model), None)
            items = list(held.values())
        elif kind == "links":
            columns = view.columns(MODEL)
            view, items = view.with_links(what[0], what[1], now), list(held.values())
            assert view.links == snapshot([], what[0], now).links
            assert view.columns(MODEL) is columns, "nothing of the peers is made anew"
        else:
            view, items = view.with_loads(MODEL, what[0], now), []
            for item in held.values():
                load = what[0].get(item.peer) if item.model == MODEL else None
                items.append(item.with_load(load) if load else item)
        scratch = snapshot(items, view.links, now, coordinates=view.coordinates)
        assert view == scratch
        for model in (MODEL, OTHER_MODEL):
            assert view.of_model(model) == scratch.of_model(model)
            assert_columns_equal(view.columns(model), scratch.columns(model))
        for a in (*(peer_id(index) for index in range(7)), CLIENT):
            assert view.known_link(a, B) == scratch.known_link(a, B)
        assert (all_ways(view).rtt_s == all_ways(scratch).rtt_s).all()
        assert all_client_ways(view) == all_client_ways(scratch)
        assert before[0].to_json() == before[1], "the old snapshot is as it was"


def test_the_place_of_a_peer_with_two_models_is_in_its_newest_word() -> None:
    old = announcement(A, coordinates=place(0.1), issued_s=1.0)
    view = snapshot([old, announcement(B, coordinates=place(0.0))], {}, 0.0)
    assert view.columns(MODEL).position[0, 0] == 0.1
    later = announcement(A, model=OTHER_MODEL, coordinates=place(0.2), issued_s=2.0)
    moved = view.updated(later, 1.0)
    assert moved.columns(MODEL).position[0, 0] == 0.2
    assert moved.link(A, B).rtt_s == 0.2
    back = moved.without(OTHER_MODEL, A, 2.0)
    assert back.columns(MODEL).position[0, 0] == 0.1
    assert back.link(A, B).rtt_s == 0.1


# --- regions --------------------------------------------------------------------------------


def cities(count: int, rng: random.Random) -> list[Announcement]:
    """Peers of five cities 60 ms and more apart, each within 3 ms, behind lines of 0-10 ms."""
    middles = [(0.0, 0.0), (0.06, 0.0), (0.0, 0.09), (0.15, 0.15), (-0.1, 0.05)]
    found = []
    for index in range(count):
        x, y = middles[index % 5]
        spot = (x + rng.uniform(-0.003, 0.003), y + rng.uniform(-0.003, 0.003), 0.0)
        where = Coordinates(spot, rng.uniform(0, 0.01), 0.1)
        found.append(announcement(peer_id(index), coordinates=where))
    return found


def approximate_errors(view: Snapshot) -> np.ndarray:
    columns = view.columns(MODEL)
    rtt_s = view.ways(MODEL, np.arange(len(columns.peers))).rtt_s
    region, access_s = columns.region, columns.access_s
    guess_s = columns.region_rtt_s[np.ix_(region, region)] + np.add.outer(access_s, access_s)
    pairs = ~np.eye(len(region), dtype=bool)
    return np.abs(guess_s - rtt_s)[pairs]


def test_regions_stand_for_the_round_trips_of_their_peers() -> None:
    view = snapshot(cities(200, random.Random(1)), {}, 0.0)
    columns = view.columns(MODEL)
    for city in range(5):
        assert len(set(columns.region[city::5])) == 1
    assert len(set(columns.region)) == 5
    assert np.percentile(approximate_errors(view), 95) <= 0.004


def test_liars_far_away_take_no_regions_from_honest_peers() -> None:
    far = [
        announcement(peer_id(1000 + index), coordinates=place(100.0 + 50 * index, 0.0))
        for index in range(40)
    ]
    columns = snapshot([*cities(200, random.Random(2)), *far], {}, 0.0).columns(MODEL)
    assert len(columns.region_rtt_s) <= REGIONS
    for city in range(5):
        assert len(set(columns.region[city:200:5])) == 1
    assert len(set(columns.region[:200])) == 5


def test_peers_without_a_place_are_near_everything() -> None:
    lost = [announcement(peer_id(900)), announcement(peer_id(901), coordinates=place(5.0, 1.0))]
    columns = snapshot([*cities(20, random.Random(3)), *lost], {}, 0.0).columns(MODEL)
    assert columns.region[-2:].tolist() == [0, 0]
    assert (columns.region[:-2] > 0).all()
    assert not columns.region_rtt_s[0].any()
    assert not columns.region_rtt_s[:, 0].any()
    assert columns.access_s[-2:].tolist() == [0.0, 0.0]


def test_centres_stay_until_a_tenth_of_the_rows_has_changed() -> None:
    items = cities(100, random.Random(4))
    view = snapshot(items, {}, 0.0)
    regions = view.columns(MODEL).regions
    moved = replace(items[0], coordinates=items[1].coordinates, sequence=1)
    view = view.updated(moved, 1.0)
    assert view.columns(MODEL).regions is regions
    assert view.columns(MODEL).region[0] == view.columns(MODEL).region[1]
    for index in range(10):
        view = view.without(MODEL, peer_id(index), 2.0)
    assert view.columns(MODEL).regions is regions
    view = view.without(MODEL, peer_id(10), 3.0)
    assert view.columns(MODEL).regions is not regions


@given(st.lists(st.none() | coordinates, max_size=40))
def test_every_peer_is_in_a_region_that_exists(places: list[Coordinates | None]) -> None:
    """Whatever the places, regions are few, symmetric and at no negative distance."""
    told = [announcement(peer_id(index), coordinates=at) for index, at in enumerate(places)]
    columns = snapshot(told, {}, 0.0).columns(MODEL)
    rtt_s = columns.region_rtt_s
    assert 1 <= len(rtt_s) <= REGIONS
    assert np.array_equal(rtt_s, rtt_s.T)
    assert np.isfinite(rtt_s).all()
    assert (rtt_s >= 0).all()
    assert ((columns.region > 0) == columns.placed).all()
    assert (columns.region < len(rtt_s)).all()
    assert (columns.access_s >= 0).all()


# --- for those who want to look -------------------------------------------------------------


@given(snapshots(), st.randoms(use_true_random=False))
def test_the_order_of_announcements_does_not_matter(view: Snapshot, rng: random.Random) -> None:
    """A snapshot of the same words in another order, some of them twice, is equal."""
    words = [*view.announcements, *view.announcements[:2]]
    rng.shuffle(words)
    turned = {(b, a): link for (a, b), link in view.links.items()}
    again = snapshot(words, turned, view.taken_s)
    assert again == view
    assert again.to_json() == view.to_json()


@given(snapshots())
def test_the_graph_and_the_json_tell_the_same(view: Snapshot) -> None:
    """Both exports have the same peers and measured ways, and JSON survives a round trip."""
    graph, plain = view.to_networkx(), json.loads(json.dumps(view.to_json(), allow_nan=False))
    told = {(link["a"], link["b"]): link["rtt_s"] for link in plain["links"]}
    assert {(a, b): graph.edges[a, b]["rtt_s"] for a, b in graph.edges if a < b} == told
    assert all(graph.has_edge(b, a) for a, b in graph.edges)
    for link in plain["links"]:
        speed = view.link(link["b"], link["a"]).bytes_per_s
        assert link["back_bytes_per_s"] == (speed if math.isfinite(speed) else None)
        assert link["origin"] in ("measured", "announced")
    for peer in plain["peers"]:
        assert graph.nodes[peer["peer"]]["span"] == peer["span"]


def test_a_snapshot_does_not_change() -> None:
    links = {(A, B): Link(0.01)}
    view = snapshot([announcement()], links, 0.0)
    links[A, B] = Link(9.0)
    assert view.link(A, B) == Link(0.01)
    with pytest.raises(FrozenInstanceError):
        view.taken_s = 1.0  # type: ignore[misc]
    with pytest.raises(TypeError):
        view.links[A, B] = Link(9.0)  # type: ignore[index]
