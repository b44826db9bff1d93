"""Helix: turns in proportion to the max-flow, the masks, and how hops are found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hexswarm.records import Span
from hexswarm.router.placement.cluster import Cluster, Model, Profile
from hexswarm.router.placement.plan import Plan
from hexswarm.simulator.rival_helix import Helix, RoundRobin
from hexswarm.simulator.rival_hops import flows
from tests.simulator.rival_world import FORK, FORK_PROFILES, MODEL, ask, profile, units, view, world


def test_flow_is_split_as_capacities_are() -> None:
    carried, exact = flows(*_cluster_model_plan(FORK, FORK_PROFILES))
    assert exact
    assert carried[None, 0] == pytest.approx(50.0)
    assert carried[None, 1] == pytest.approx(150.0)
    assert sum(rate for (_, b), rate in carried.items() if b is None) == pytest.approx(200.0)


def _cluster_model_plan(
    spans: Mapping[str, tuple[int, int]], profiles: Mapping[str, Profile] | None = None
) -> tuple[Cluster, Model, Plan]:
    cluster, plan = world(spans, profiles)
    return cluster, MODEL, plan


def test_helix_hands_on_in_proportion_to_the_flow() -> None:
    cluster, plan = world(FORK, FORK_PROFILES)
    helix, tokens = Helix(cluster, MODEL, plan), Counter[int]()
    for number in range(400):
        request = ask(number, 50 + number % 7)
        visits = helix.route(0.0, request, view(plan))
        assert visits is not None
        tokens[visits[0].unit] += request.input_tokens
        helix.ended(1.0, request, visits)
    assert tokens[1] / tokens[0] == pytest.approx(3.0, rel=0.02)


@settings(max_examples=40)
@given(
    weights=st.lists(st.floats(1, 100), min_size=2, max_size=5),
    lengths=st.lists(st.integers(1, 100), min_size=50, max_size=150),
)
def test_turns_never_differ_by_more_than_one_prompt(
    weights: list[float], lengths: list[int]
) -> None:
    """At any moment every candidate's load is within one prompt of every other's, so the shares
    tend to the weights whatever the lengths are."""
    turns = RoundRobin(dict(enumerate(weights)))
    for tokens in lengths:
        chosen = turns.choose(tokens, range(len(weights)))
        assert chosen is not None
        turns.take(tokens, chosen)
    spread = max(turns.loads.values()) - min(turns.loads.values())
    assert spread <= max(lengths) / min(weights) + 1e-9


def test_helix_leaves_out_hops_below_a_twentieth() -> None:
    cluster, plan = world(FORK, {"slow": profile(4.0), "fast": profile(96.0)})
    helix = Helix(cluster, MODEL, plan)
    taken = {units(helix.route(0.0, ask(number), view(plan))) for number in range(50)}
    assert {visited[0] for visited in taken if visited} == {1}


def test_helix_masks_units_whose_kv_would_be_full() -> None:
    # 0.9 x 1000 tokens; a request is expected to hold 75 + int(0.6 x 25) = 90: ten fit each
    cluster, plan = world(FORK, {name: profile(kv=1000) for name in FORK})
    helix = Helix(cluster, MODEL, plan)
    taken = [helix.route(0.0, ask(number), view(plan)) for number in range(21)]
    assert Counter(visits[0].unit for visits in taken[:20] if visits) == {0: 10, 1: 10}
    assert taken[20] is None
    assert taken[0] is not None
    helix.ended(1.0, ask(0), taken[0])
    again = helix.route(1.0, ask(20), view(plan))
    assert units(again) == units(taken[0]), "the room of the one that ended"


def test_a_refused_route_frees_its_room() -> None:
    cluster, plan = world({"all": (0, 4)}, {"all": profile(kv=100)})
    helix = Helix(cluster, MODEL, plan)
    assert helix.route(0.0, ask(0), view(plan)) is not None
    assert helix.route(0.0, ask(1), view(plan)) is None
    helix.refused(0.0, ask(0), frozenset({0}), {})
    assert helix.route(0.0, ask(1), view(plan)) is not None


def test_a_request_that_waits_takes_no_turn() -> None:
    """What a dead end further on costs must not count at the head."""
    cluster, plan = world({"a": (0, 2), "b": (0, 2), "c": (2, 4)}, {"c": profile(kv=100)})
    helix = Helix(cluster, MODEL, plan)
    first = helix.route(0.0, ask(0), view(plan))
    assert first is not None
    assert helix.route(0.0, ask(1), view(plan)) is None
    helix.ended(1.0, ask(0), first)
    assert units(helix.route(1.0, ask(2), view(plan))) == (1, 2), "the other head's turn"


def test_overlapping_spans_are_entered_late_and_exact_ones_are_not() -> None:
    cluster, plan = world({"a": (0, 3), "b": (1, 4)})
    visits = Helix(cluster, MODEL, plan).route(0.0, ask(0), view(plan))
    assert visits is not None
    assert [visit.span for visit in visits] == [Span(0, 3), Span(3, 4)]
    assert not flows(cluster, MODEL, plan)[1]
    cluster, plan = world({"a": (0, 2), "b": (2, 4), "c": (1, 4)}, {"c": profile(50.0)})
    assert flows(cluster, MODEL, plan)[1], "c adds nothing that a's capacity would let through"
