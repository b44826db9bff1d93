"""The flow of placements: against networkx, against published figures, and its own laws."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import networkx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hexswarm.errors import UsageError
from hexswarm.records import Span
from hexswarm.router import native
from hexswarm.router.placement.anneal import cover
from hexswarm.router.placement.bound import upper_bound
from hexswarm.router.placement.cluster import COORDINATOR, Cluster, Model, parse
from hexswarm.router.placement.flow import Flow, arrays, spans_of
from hexswarm.router.placement.plan import Unit, parse_spans, whole_units
from tests.placement.worlds import ID, ONWARD, cluster, placements, profile, worlds

ROOT = Path(__file__).parents[2]
CLUSTERS = ROOT.parent / "shared" / "clusters"
PLANS = ROOT / "benchmarks" / "plans"
needs_clusters = pytest.mark.skipif(not CLUSTERS.exists(), reason="the cluster files are not here")
BACKENDS = [
    pytest.param(
        True, marks=pytest.mark.skipif(not native.available(), reason="not compiled"), id="compiled"
    ),
    pytest.param(False, id="scipy"),
]


def oracle(
    where: Cluster, model: Model, units: Sequence[Unit], spans: Sequence[Span | None]
) -> float:
    """The definition, word by word, as a networkx graph."""
    graph = networkx.DiGraph()
    hub = where.coordinator
    rate = min(hub.in_bytes_per_s, hub.out_bytes_per_s) / ID
    graph.add_edge("begin", "source", capacity=rate)
    graph.add_node("sink")
    shared = Counter(unit.node for unit in units)
    for i, (unit, span) in enumerate(zip(units, spans, strict=True)):
        if span is None:
            continue
        node = where.node(unit.node)
        passes = unit.profile.throughput[len(span)]
        if shared[unit.node] == 1 and span.first > 0:
            passes = min(passes, node.in_bytes_per_s / (ONWARD + ID))
        if shared[unit.node] == 1 and span.end < model.layers:
            passes = min(passes, node.out_bytes_per_s / (ONWARD + ID))
        graph.add_edge(("in", i), ("out", i), capacity=passes)
        if span.first == 0:
            graph.add_edge("source", ("in", i), capacity=wire(where, COORDINATOR, unit.node, ID))
        if span.end == model.layers:
            graph.add_edge(("out", i), "sink", capacity=wire(where, unit.node, COORDINATOR, ID))
        for j, (other, far) in enumerate(zip(units, spans, strict=True)):
            if far and far.first <= span.end < far.end:
                room = wire(where, unit.node, other.node, ONWARD + ID)
                graph.add_edge(("out", i), ("in", j), capacity=room)
    return float(networkx.maximum_flow_value(graph, "begin", "sink"))


def wire(where: Cluster, a: str, b: str, token_bytes: float) -> float:
    """Tokens a second from one machine to another."""
    if a == b:
        return float("inf")
    sends, receives = where.node(a).out_bytes_per_s, where.node(b).in_bytes_per_s
    return min(where.way(a, b).bytes_per_s, sends, receives) / token_bytes


@pytest.mark.parametrize("compiled", BACKENDS)
@settings(max_examples=40)
@given(data=st.data())
def test_the_flow_is_the_max_flow_of_the_definition(compiled: bool, data: Any) -> None:
    """Both backends equal networkx on a graph that is built from the cluster alone."""
    where, model, units = data.draw(worlds())
    flow = Flow(where, model, units, compiled=compiled)
    for _ in range(2):  # the second on what the first left behind
        spans = data.draw(placements(units, model.layers))
        assert flow.value(spans) == pytest.approx(oracle(where, model, units, spans), abs=1e-6)


@pytest.mark.parametrize("compiled", BACKENDS)
@settings(max_examples=25)
@given(data=st.data())
def test_its_edges_are_a_flow_of_that_value(compiled: bool, data: Any) -> None:
    """What a unit receives it sends, within its speed and the links, only to whom it may."""
    where, model, units = data.draw(worlds())
    spans = data.draw(placements(units, model.layers))
    flow = Flow(where, model, units, compiled=compiled)
    received: defaultdict[int | None, float] = defaultdict(float)
    sent: defaultdict[int | None, float] = defaultdict(float)
    for edge in flow.edges(spans):
        assert 0 < edge.tokens_per_s <= edge.capacity + 1e-6
        sent[edge.sender] += edge.tokens_per_s
        received[edge.receiver] += edge.tokens_per_s
        before = spans[edge.sender] if edge.sender is not None else None
        after = spans[edge.receiver] if edge.receiver is not None else None
        at = before.end if before else 0
        assert after.first <= at < after.end if after else at == model.layers
    value = flow.value(spans)
    assert sent[None] == pytest.approx(value, abs=1e-5)
    assert received[None] == pytest.approx(value, abs=1e-5)
    for index, (unit, span) in enumerate(zip(units, spans, strict=True)):
        assert sent[index] == pytest.approx(received[index], abs=1e-5)
        most = unit.profile.throughput[len(span)] if span else 0.0
        assert sent[index] <= most + 1e-6


@settings(max_examples=40)
@given(data=st.data())
def test_no_flow_passes_the_least_cover_or_the_bound(data: Any) -> None:
    """Every layer is computed by somebody who holds it; nobody does more work than he can."""
    where, model, units = data.draw(worlds())
    spans = data.draw(placements(units, model.layers))
    flow = Flow(where, model, units)
    value = flow.value(spans)
    assert value <= min(cover(flow.rates, *arrays(spans))) + 1e-6
    assert value <= upper_bound(where, model, units) + 1e-6


@pytest.mark.parametrize("compiled", BACKENDS)
def test_a_unit_is_entered_in_its_middle(compiled: bool) -> None:
    """0:4 hands on to 2:6, which then runs two of its four layers; nobody goes back."""
    where = cluster(["a", "a"], 6, regions={("a", "a"): 1e9})
    units = [Unit(f"u{at}", f"n{at}", profile(9, 8, 7, 5)) for at in range(2)]
    flow = Flow(where, where.models["m"], units, compiled=compiled)
    assert flow.value([Span(0, 4), Span(2, 6)]) == pytest.approx(5)
    assert flow.value([Span(2, 6), Span(0, 4)]) == pytest.approx(5)
    assert flow.value([Span(0, 3), Span(3, 6)]) == pytest.approx(7)
    assert flow.value([Span(0, 2), Span(3, 6)]) == 0
    assert flow.value([Span(0, 3), None]) == 0
    assert flow.value([None, None]) == 0
    assert flow.edges([None, None]) == ()


@pytest.mark.parametrize("compiled", BACKENDS)
def test_links_and_connections_bind_in_tokens(compiled: bool) -> None:
    """100 bytes a token between stages, 10 with the coordinator."""
    regions = {("a", "a"): 1e9, ("a", "b"): 300.0, ("b", "b"): 1e9}
    units = [Unit(f"u{at}", f"n{at}", profile(50, 50)) for at in range(3)]
    spans = [Span(0, 2), Span(2, 4), Span(2, 4)]
    far = cluster(["a", "b", "b"], 4, regions=regions)
    # 3 tokens/s over each of two links; back to the coordinator 30 each.
    assert Flow(far, far.models["m"], units, compiled=compiled).value(spans) == pytest.approx(6)
    narrow = cluster(["a", "b", "b"], 4, regions=regions, nics={"n0": (1e9, 400.0)})
    assert Flow(narrow, narrow.models["m"], units, compiled=compiled).value(spans) == pytest.approx(
        4
    )
    hub = cluster(["a", "b", "b"], 4, regions=regions, nics={"coordinator": (1e9, 20.0)})
    assert Flow(hub, hub.models["m"], units, compiled=compiled).value(spans) == pytest.approx(2)


def test_units_of_one_machine_hand_on_inside_it() -> None:
    where = cluster(["a"], 4, regions={("a", "a"): 1e9}, nics={"n0": (100.0, 100.0)})
    units = [Unit(f"u{at}", "n0", profile(50, 40)) for at in range(2)]
    # 10 tokens/s of ids over the machine's connection; hidden states do not cross it.
    assert Flow(where, where.models["m"], units).value([Span(0, 2), Span(2, 4)]) == pytest.approx(
        10
    )


@pytest.mark.parametrize("compiled", BACKENDS)
@pytest.mark.parametrize("spans", [[Span(0, 3)], [Span(3, 5)]])
def test_what_is_no_placement_is_refused(compiled: bool, spans: list[Span]) -> None:
    where = cluster(["a"], 4, regions={("a", "a"): 1e9})
    flow = Flow(where, where.models["m"], [Unit("u", "n0", profile(5, 5))], compiled=compiled)
    with pytest.raises(UsageError):
        flow.value(spans)
    with pytest.raises(UsageError):
        flow.edges(spans)


@settings(max_examples=20)
@given(data=st.data())
def test_spans_and_arrays_are_inverse(data: Any) -> None:
    _, model, units = data.draw(worlds())
    spans = data.draw(placements(units, model.layers))
    assert spans_of(*arrays(spans)) == spans


@needs_clusters
@pytest.mark.parametrize("compiled", BACKENDS)
@pytest.mark.parametrize("name", ["helix-single24-70b", "helix-geo24-70b", "helix-small10-30b"])
def test_published_placements_are_worth_what_was_published(name: str, compiled: bool) -> None:
    plan = json.loads((PLANS / f"{name}.json").read_text())
    where = parse(json.loads((CLUSTERS / f"{plan['cluster']}.json").read_text()))
    units = whole_units(where, plan["model"])
    placed = parse_spans(plan["nodes"])
    methods = where.reference[plan["model"]]["max_flow_tokens_per_s"]
    published = next(value for key, value in methods.items() if key.startswith("ilp"))["published"]
    flow = Flow(where, where.model(plan["model"]), units, compiled=compiled)
    assert round(flow.value([placed.get(unit.id) for unit in units]), 3) == published


@needs_clusters
@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("helix-single24", "llama-70b"),
        ("helix-geo24", "llama-70b"),
        ("helix-small10", "llama-30b"),
        ("helix-single24", "llama-30b"),
    ],
)
def test_the_bound_is_that_of_the_files(name: str, model: str) -> None:
    where = parse(json.loads((CLUSTERS / f"{name}.json").read_text()))
    said = where.reference[model]["upper_bound_capped"]
    assert round(upper_bound(where, where.model(model), whole_units(where, model)), 3) == said


def test_units_that_cannot_hold_the_model_have_no_bound() -> None:
    where = cluster(["a"], 4, regions={("a", "a"): 1e9})
    units = [Unit("u", "n0", profile(5, 5, 5))]
    assert upper_bound(where, where.models["m"], units) == 0
    assert upper_bound(where, where.models["m"], []) == 0
    # Six layers of work at 5 tokens/s each, for four layers: the cap at F does not bind.
    assert upper_bound(where, where.models["m"], [*units, units[0]]) == pytest.approx(7.5)
