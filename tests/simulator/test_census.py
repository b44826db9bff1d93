"""A cluster out of announcements: speeds, links, room; and the times that follow from it."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hexswarm.errors import UsageError
from hexswarm.peer.scheduler import Policy as Scheduling
from hexswarm.records import Announcement, Link, ModelSpec, PeerId, RouteRequest, Span, Speed
from hexswarm.router.network import Snapshot, snapshot
from hexswarm.router.placement.cluster import COORDINATOR
from hexswarm.router.routing import find_route
from hexswarm.simulator import speeds
from hexswarm.simulator.census import Census, cluster_of
from hexswarm.simulator.ours import Ours
from hexswarm.simulator.policy import Request
from hexswarm.simulator.report import Report
from hexswarm.simulator.run import simulate

LAYERS = 12
SPEC = ModelSpec("a" * 64, "m", "llama", LAYERS, 64, 1000, 2048, 256)
ME = PeerId("me")
SPEED = Speed(decode_layer_s=0.002, prefill_layer_s=0.0004, head_s=0.01, row_layer_s=0.0005)
RTT_S = 0.02


def word(peer: str, first: int, end: int, **changes: Any) -> Announcement:
    said = Announcement(
        peer=PeerId(peer),
        model=SPEC.digest,
        model_name=SPEC.name,
        layers=LAYERS,
        span=Span(first, end),
        state="online",
        dtype="float32",
        device="cpu",
        speed=SPEED if end == LAYERS else replace(SPEED, head_s=0.0),
        free_kv_tokens=512,
        queue_s=0.0,
        addresses=("/ip4/10.0.0.1/tcp/1",),
        kv_tokens=4096,
    )
    return replace(said, **changes)


def seen(words: Sequence[Announcement], rtt_s: float = RTT_S) -> Snapshot:
    """All ways alike."""
    ends = sorted([ME, *(item.peer for item in words)])
    links = {(a, b): Link(rtt_s) for a in ends for b in ends if a < b}
    return snapshot(words, links, 0.0, client=ME)


def played(census: Census, answers: Sequence[int], handle_s: float = 0.0) -> Report:
    """Requests of 32 tokens and such answers, at the same moment."""
    policy = Ours(census.cluster, census.model, census.plan)
    requests = [Request(n, 0.0, 32, length, COORDINATOR) for n, length in enumerate(answers)]
    return simulate(
        census.cluster,
        census.model,
        census.plan,
        policy,
        requests,
        until_s=30.0,
        settings=census.settings(handle_s),
    )


def test_what_a_unit_would_announce_is_what_its_peer_announced() -> None:
    words = [word("a", 0, 5), word("b", 5, LAYERS, speed=replace(SPEED, decode_layer_s=0.004))]
    census = cluster_of(seen(words), SPEC)
    for said, unit, span in zip(words, census.plan.units, census.plan.spans, strict=True):
        told = speeds.speed(unit.profile)
        for name in ("decode_layer_s", "prefill_layer_s", "head_s", "row_layer_s"):
            assert getattr(told, name) == pytest.approx(getattr(said.speed, name)), name
        assert (unit.id, span) == (said.peer, said.span)
        assert unit.profile.kv_tokens[len(said.span)] == 4096


def test_only_who_serves_this_model_is_there() -> None:
    others = [
        word("b", 0, LAYERS, state="joining"),
        word("c", 0, LAYERS, state="draining"),
        word("d", 0, LAYERS, model="b" * 64),
    ]
    census = cluster_of(seen([word("a", 0, LAYERS), *others]), SPEC)
    assert [unit.id for unit in census.plan.units] == ["a"]
    with pytest.raises(UsageError, match="nobody serves"):
        cluster_of(seen(others), SPEC)


def test_ways_are_what_the_client_knows() -> None:
    fast = word("b", 6, LAYERS, up_bytes_per_s=3e6, down_bytes_per_s=5e6)
    words = [word("a", 0, 6, up_bytes_per_s=2e6), fast]
    links = {(PeerId("a"), PeerId("b")): Link(0.04), (PeerId("a"), ME): Link(0.1, 1e6)}
    cluster = cluster_of(snapshot(words, links, 0.0, client=ME), SPEC).cluster
    assert cluster.way("a", "b").one_way_s == 0.02
    assert cluster.way("a", "b").bytes_per_s == 2e6
    assert cluster.way("b", "a").bytes_per_s == 3e6
    assert cluster.way(COORDINATOR, "a").one_way_s == 0.05
    assert cluster.way("a", COORDINATOR).bytes_per_s == 1e6
    assert cluster.way(COORDINATOR, "b").one_way_s == 0.0  # nobody has measured it
    assert cluster.node("a").in_bytes_per_s == math.inf


def test_a_view_of_nobody_is_everywhere_at_once() -> None:
    cluster = cluster_of(snapshot([word("a", 0, LAYERS)], {}, 0.0), SPEC).cluster
    assert cluster.way(COORDINATOR, "a").one_way_s == 0.0


def test_a_peer_without_a_pool_has_what_is_free() -> None:
    (unit,) = cluster_of(seen([word("a", 0, LAYERS, kv_tokens=0)]), SPEC).plan.units
    assert unit.profile.kv_tokens[LAYERS] == 512


def test_the_plan_of_some_peers_lets_the_others_idle() -> None:
    census = cluster_of(seen([word(name, 0, LAYERS) for name in "abc"]), SPEC)
    assert census.only([PeerId("b")]).spans == (None, Span(0, LAYERS), None)
    assert census.plan.spans == (Span(0, LAYERS),) * 3


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_peers_on_cpus_gather_as_such(device: str) -> None:
    found = cluster_of(seen([word("a", 0, LAYERS, device=device)]), SPEC).settings()
    on = Scheduling.of(256, head=True, accelerator=device != "cpu")
    assert found.scheduling(Scheduling.of(256, head=True, accelerator=True)) == on


@settings(max_examples=20)
@given(st.lists(st.integers(1, LAYERS - 1), unique=True, max_size=3), st.floats(0, 0.05))
def test_a_token_takes_its_ring(cuts: list[int], handle_s: float) -> None:
    """Compute of all layers, the head, and for each hop its way and its handling."""
    edges = [0, *sorted(cuts), LAYERS]
    words = [word(f"p{edges[n]:02}", *edges[n : n + 2]) for n in range(len(edges) - 1)]
    report = played(cluster_of(seen(words), SPEC), [6], handle_s)
    hops = len(words) if len(words) > 1 else 0
    ring_s = LAYERS * SPEED.decode_layer_s + SPEED.head_s + hops * RTT_S / 2
    assert report.decode.p50_s == pytest.approx(ring_s + len(words) * handle_s)
    assert report.tpot.mean_s == pytest.approx(ring_s + len(words) * handle_s)


def test_the_router_foretells_the_same_of_the_announcements() -> None:
    """But for what it reckons for framing, and for the bytes, of which nobody knows here."""
    words = [word("a", 0, 7), word("b", 4, LAYERS)]
    view = seen(words)
    wanted = RouteRequest(SPEC.digest, LAYERS, 256, 32, 8, client=ME, warm=frozenset("ab"))
    route = find_route(view, wanted, 0.0, random.Random(0))
    report = played(cluster_of(view, SPEC), [8], handle_s=0.0002)
    assert report.tpot.mean_s == pytest.approx(route.tpot_s)


def test_sessions_at_once_pay_for_their_rows_and_share_the_head() -> None:
    """One peer, answers of one length: after the prompts all go in one batch."""
    report = played(cluster_of(seen([word("a", 0, LAYERS)]), SPEC), [40] * 4)
    batch_s = LAYERS * (SPEED.decode_layer_s + 3 * SPEED.row_layer_s) + SPEED.head_s
    assert report.decode.p50_s == pytest.approx(batch_s)
