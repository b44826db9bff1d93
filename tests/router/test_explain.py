"""Reasons: each rejected route with the true one, budgets that add up, and never an exception."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hexswarm.errors import NoRoute
from hexswarm.records import Link, RouteRequest
from hexswarm.router.explain import Explanation, budget, explain
from hexswarm.router.network import Snapshot, snapshot
from hexswarm.router.routing import find_route
from tests.router.test_routing import REQUEST, A, B, C, peer
from tests.strategies import requests, snapshots


def reasons(view: Snapshot, request: RouteRequest) -> Explanation:
    return explain(view, request, 0.0, random.Random(0))


@settings(max_examples=80)
@given(
    snapshots(most=5, layers=6),
    requests(layers=6),
    st.none() | st.integers(1, 60),
    st.none() | st.integers(1, 900),
)
def test_it_explains_the_route_that_is_found(
    view: Snapshot, request: RouteRequest, tpot_ms: int | None, ttft_ms: int | None
) -> None:
    """Chosen as by find_route, no rejected one twice or the chosen, and every one with a reason."""
    request = replace(
        request,
        tpot_s=tpot_ms / 1000 if tpot_ms else None,
        ttft_s=ttft_ms / 1000 if ttft_ms else None,
    )
    told = reasons(view, request)
    if told.chosen is None:
        with pytest.raises(NoRoute) as error:
            find_route(view, request, 0.0, random.Random(0))
        assert told.error is not None
        assert told.binding == error.value.binding
        assert told.sentence == str(error.value)
        return
    found = find_route(view, request, 0.0, random.Random(0))
    assert told.chosen.route == found
    shapes = [tuple((s.peer, s.span) for s in found.stages)]
    for rejected in told.rejected:
        shapes.append(tuple((s.peer, s.span) for s in rejected.route.stages))
        assert rejected.why
    assert len(set(shapes)) == len(shapes)


@settings(max_examples=60)
@given(snapshots(most=6, usable=True), requests())
def test_a_budget_adds_up_to_the_prediction(view: Snapshot, request: RouteRequest) -> None:
    try:
        found = find_route(view, request, 0.0, random.Random(0))
    except NoRoute:
        return
    told = budget(view, request, found)
    each = [hop.compute_s + hop.queue_s + hop.link_s + hop.serialise_s for hop in told.hops]
    assert sum(each) == pytest.approx(found.tpot_s)
    assert sum(hop.price for hop in told.hops) == pytest.approx(found.price)
    assert told.open_s + told.client_s <= found.ttft_s * (1 + 1e-9)


def test_what_decides_is_named() -> None:
    fast, cheap = peer(A, 0, 12, 0.001, busy=0.8), peer(B, 0, 12, 0.004)
    view = snapshot([fast, cheap], {(A, B): Link(0.05)}, 0.0)
    assert reasons(view, REQUEST).binding == "speed"
    told = reasons(view, replace(REQUEST, tpot_s=0.03))
    assert told.binding == "tpot"
    whys = {rejected.route.head.peer: rejected.why for rejected in told.rejected}
    assert whys[B] == "too slow: 50 ms a token, the limit is 30 ms"
    told = reasons(view, replace(REQUEST, tpot_s=0.2))
    assert told.binding == "price"
    whys = {rejected.route.head.peer: rejected.why for rejected in told.rejected}
    assert whys[A] == "dearer by 400.0%: 65.0 against 13.0"
    held = find_route(view, replace(REQUEST, allow=frozenset({B})), 0.0, random.Random(0))
    assert reasons(view, replace(REQUEST, previous=held)).binding == "speed"
    near = snapshot([peer(A, 0, 12), peer(C, 0, 12, 0.00105)], {}, 0.0)
    held = find_route(near, replace(REQUEST, allow=frozenset({C})), 0.0, random.Random(0))
    told = reasons(near, replace(REQUEST, previous=held))
    assert told.binding == "previous"
    assert "less than the 10% for which a client moves" in told.rejected[0].why


def test_without_a_route_it_tells_what_there_would_be() -> None:
    view = snapshot([peer(A, 0, 12, 0.002)], {}, 0.0)
    told = reasons(view, replace(REQUEST, tpot_s=0.001))
    assert (told.chosen, told.binding) == (None, "tpot")
    assert [rejected.why for rejected in told.rejected] == [
        "too slow: 26 ms a token, the limit is 1 ms"
    ]
    nobody = reasons(snapshot([peer(A, 0, 5)], {}, 0.0), REQUEST)
    assert (nobody.binding, nobody.rejected) == ("coverage", ())
