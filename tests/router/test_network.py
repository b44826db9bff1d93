"""The snapshot: what it takes in, which source it believes, and what it tells others."""

from __future__ import annotations

import json
import math
import random
from dataclasses import FrozenInstanceError, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hexswarm.errors import UsageError
from hexswarm.records import Announcement, GroupMembership, Link, Span, Speed
from hexswarm.router.network import (
    SAME_HOST_RTT_S,
    UNKNOWN_RTT_S,
    Snapshot,
    snapshot,
)
from tests.strategies import CLIENT, MODEL, NAME, OTHER_MODEL, peer_id, snapshots

A, B, C = (peer_id(index) for index in range(3))


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


def test_only_the_leader_of_a_group_serves() -> None:
    leader = announcement(A, group=GroupMembership("g", 0, 2, 1))
    member = announcement(B, group=GroupMembership("g", 1, 2, 1))
    assert [item.peer for item in snapshot([member, leader], {}, 0.0).serving(MODEL)] == [A]


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


def test_measured_beats_announced_beats_assumed() -> None:
    told = [announcement(A, neighbours=((B, 0.02),)), announcement(B)]
    assert snapshot(told, {(B, A): Link(0.01, 1e6)}, 0.0).known_link(A, B) == (
        Link(0.01, 1e6),
        "measured",
    )
    assert snapshot(told, {}, 0.0).known_link(B, A) == (Link(0.02), "announced")
    assert snapshot(told, {}, 0.0).known_link(A, C) == (Link(UNKNOWN_RTT_S), "assumed")
    assert snapshot(told, {}, 0.0).link(A, A).rtt_s == 0


def test_a_peer_that_understates_its_distance_is_not_believed_against_the_other_end() -> None:
    told = [announcement(A, neighbours=((B, 0.0),)), announcement(B, neighbours=((A, 0.08),))]
    assert snapshot(told, {}, 0.0).link(A, B) == Link(0.08)


@pytest.mark.parametrize("rtt_s", [math.nan, math.inf, -1.0])
def test_a_senseless_announced_distance_is_ignored(rtt_s: float) -> None:
    told = [announcement(A, neighbours=((B, rtt_s), (A, 0.5)))]
    assert snapshot(told, {}, 0.0).known_link(A, B)[1] == "assumed"


def test_peers_at_one_address_are_assumed_near_but_not_through_one_relay() -> None:
    def view(address: str) -> Snapshot:
        peers = (A, B)
        return snapshot([announcement(peer, addresses=(address,)) for peer in peers], {}, 0.0)

    assert view("/ip4/127.0.0.1/tcp/4001").link(A, B).rtt_s == SAME_HOST_RTT_S
    relayed = view("/ip4/1.2.3.4/tcp/4001/p2p/12D3KooWRelay/p2p-circuit")
    assert relayed.link(A, B).rtt_s == UNKNOWN_RTT_S


@given(snapshots())
def test_distances_are_the_links_of_all_pairs(view: Snapshot) -> None:
    """The matrices say what `link` says, whichever peers are asked for in whichever order."""
    peers = [peer_id(index) for index in (3, 0, 5, 1)] + [CLIENT]
    one_way_s, per_byte_s = view.distances(peers)
    expected = [[view.link(a, b) for b in peers] for a in peers]
    assert np.array_equal(one_way_s, [[link.one_way_s for link in row] for row in expected])
    assert np.array_equal(per_byte_s, [[1 / link.bytes_per_s for link in row] for row in expected])
    assert np.array_equal(one_way_s, one_way_s.T)


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
    """Both exports have the same peers and known links, and JSON survives a round trip."""
    graph, plain = view.to_networkx(), json.loads(json.dumps(view.to_json(), allow_nan=False))
    told = {(link["a"], link["b"]): link["rtt_s"] for link in plain["links"]}
    assert {(a, b): graph.edges[a, b]["rtt_s"] for a, b in graph.edges if a < b} == told
    assert all(graph.has_edge(b, a) for a, b in graph.edges)
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
