"""What plans pass, whole and pipeline by pipeline."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hexswarm.records import Span
from hexswarm.router.placement.cluster import Cluster, Model, Node
from hexswarm.router.placement.expected import NOWHERE, Load
from hexswarm.router.placement.flow import Flow
from hexswarm.router.placement.latency import Latency
from hexswarm.router.placement.plan import Plan, Unit
from hexswarm.router.placement.worth import expected, worth
from tests.placement.worlds import cluster, placements, profile, worlds

WIDE = {("a", "a"): 1e9}


def three(pipelines: tuple[tuple[int, ...], ...] = ()) -> tuple[Cluster, Model, Plan]:
    """Of four machines two could each follow two others; 10 + 30 tokens/s begin, 30 + 10 end."""
    pool = cluster(["a"] * 4, 2, regions=WIDE)
    speeds = (10.0, 30.0, 30.0, 10.0)
    units = tuple(Unit(f"n{at}", f"n{at}", profile(rate)) for at, rate in enumerate(speeds))
    spans = (Span(0, 1), Span(0, 1), Span(1, 2), Span(1, 2))
    return pool, pool.models["m"], Plan("m", "c", units, spans, pipelines)


@given(st.data())
def test_without_pipelines_a_plan_is_one_flow(data: st.DataObject) -> None:
    """Flow and hops are those of `Flow`, and each unit's use is what its hops bring."""
    pool, model, units = data.draw(worlds())
    spans = data.draw(placements(units, model.layers))
    flow = Flow(pool, model, units)
    found = worth(pool, model, Plan("m", "c", units, spans))
    assert found.flow == pytest.approx(flow.value(spans), rel=1e-9)
    assert found.edges == flow.edges(spans)
    for at, use in enumerate(found.uses):
        brought = sum(edge.tokens_per_s for edge in found.edges if edge.receiver == at)
        assert use.carried == pytest.approx(brought)
        assert use.carried <= use.capacity * (1 + 1e-6)


def test_pipelines_hand_nothing_to_each_other() -> None:
    """40 tokens/s pass where everybody hands to everybody, and 10 + 10 through fixed pairs."""
    free = worth(*three())
    assert free.flow == pytest.approx(40.0)
    pairs = worth(*three(((0, 2), (1, 3))))
    assert pairs.flow == pytest.approx(20.0)
    hops = {(edge.sender, edge.receiver) for edge in pairs.edges}
    assert hops == {(None, 0), (0, 2), (2, None), (None, 1), (1, 3), (3, None)}
    assert set(pairs.binding.units) == {0, 3}
    better = worth(*three(((0, 3), (1, 2))))
    assert better.flow == pytest.approx(40.0)
    assert better.binding.all_units == frozenset(range(4))


def test_the_coordinators_connection_is_common_to_all() -> None:
    pool, model, plan = three(((0, 3), (1, 2)))
    narrow = 0.5 * 40.0 * model.token_bytes
    hub = Node("coordinator", "", "a", narrow, narrow)
    found = worth(replace(pool, coordinator=hub), model, plan)
    assert found.flow == pytest.approx(20.0)
    assert sum(edge.tokens_per_s for edge in found.edges if edge.sender is None) == found.flow
    assert found.binding.units == ()


def test_pipelines_share_a_load_by_their_flows() -> None:
    """Times are the means of the pipelines alone, each at its part of the load."""
    pool, model, plan = three(((0, 3), (1, 2)))
    load = Load.of(model, 8.0)
    told = expected(pool, model, plan, worth(pool, model, plan), load)
    alone = []
    for line, part in (((0, 3), 0.25), ((1, 2), 0.75)):
        latency = Latency(pool, model, [plan.units[at] for at in line])
        mine = replace(load, tokens_per_s=part * 8.0)
        alone.append(part * latency.estimate([plan.spans[at] for at in line], mine).tpot_s)
    assert told.tpot_s == pytest.approx(sum(alone))
    assert told.share == pytest.approx((0.25, 0.75, 0.75, 0.25))
    whole = replace(plan, pipelines=())
    latency = Latency(pool, model, plan.units).estimate(plan.spans, load)
    assert expected(pool, model, whole, worth(pool, model, whole), load) == latency


def test_nothing_is_expected_where_nothing_flows() -> None:
    pool, model, plan = three()
    hole = replace(plan, spans=(Span(0, 1), None, None, None))
    found = worth(pool, model, hole)
    assert found.flow == 0
    assert expected(pool, model, hole, found, Load.of(model, 1.0)) is NOWHERE
