"""What each stage is asked to promise: together the limit, and never less than is predicted."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hexswarm.errors import NoRoute
from hexswarm.records import Route, RouteRequest
from hexswarm.router import cost
from hexswarm.router.network import Snapshot
from hexswarm.router.routing import find_route
from tests.strategies import requests, snapshots


def fastest(view: Snapshot, request: RouteRequest) -> Route | None:
    try:
        return find_route(view, replace(request, tpot_s=None, ttft_s=None), 0.0, random.Random(1))
    except NoRoute:
        return None


@given(
    snapshots(usable=True),
    requests(),
    st.sampled_from([50.0, 95.0, 99.0]),
    st.floats(0.5, 5.0),
)
def test_the_limit_is_shared_out(
    view: Snapshot, request: RouteRequest, percentile: float, share: float
) -> None:
    """Also with too tight a limit, where nothing is left to share but the prediction itself."""
    request = replace(request, percentile=percentile)
    route = fastest(view, request)
    if route is None:
        return
    late = cost.lateness(percentile)
    parts = cost.elements(view, request, route.stages, late)
    predicted_s = sum(p.compute_s + p.queue_s + p.link_s + p.serialise_s for p in parts)
    limit_s = share * predicted_s + 1e-6
    asked = cost.budgets(view, replace(request, tpot_s=limit_s), route.stages)
    ways_s = sum(part.link_s + part.serialise_s for part in parts)
    for budget_s, part in zip(asked, parts, strict=True):
        assert budget_s >= part.compute_s + part.queue_s
    stays_s = predicted_s - ways_s
    room = 1 + cost.NEVER_MEET * (1 - 1 / len(parts))
    assert sum(asked) == pytest.approx(max(room * (limit_s - ways_s), stays_s), abs=1e-12)
    if len(parts) == 1:
        assert sum(asked) <= max(limit_s, stays_s) * (1 + 1e-9), "one stage has nobody to lean on"
    if stays_s:
        for budget_s, part in zip(asked, parts, strict=True):
            mine_s = part.compute_s + part.queue_s
            assert budget_s * stays_s == pytest.approx(mine_s * sum(asked), abs=1e-12)


@given(snapshots(usable=True), requests())
def test_without_a_limit_nothing_is_asked(view: Snapshot, request: RouteRequest) -> None:
    route = fastest(view, request)
    if route is not None:
        free = replace(request, tpot_s=None)
        assert cost.budgets(view, free, route.stages) == (0.0,) * len(route.stages)
