"""Routes of a flow: whole, and together the flow."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hexswarm.records import Span
from hexswarm.router.placement.cluster import Cluster, Model, Node, Profile, Way
from hexswarm.router.placement.flow import Edge, Flow
from hexswarm.router.placement.paths import paths
from hexswarm.router.placement.plan import Unit

LAYERS = 6
MODEL = Model("small", LAYERS, 1e9, 16384, 2, 4096, 80, 80, 2048)


def flow_of(spans: list[Span], rates: list[float]) -> tuple[float, tuple[Edge, ...]]:
    nodes = tuple(Node(f"n{row}", "any", "x", 1e12, 1e12) for row in range(len(spans)))
    hub = Node("coordinator", "", "x", 1e12, 1e12)
    way = {("x", "x"): Way(1e12, 1e-4)}
    cluster = Cluster("test", "", {"small": MODEL}, {}, nodes, hub, {}, way, {}, {})
    points = ((1.0, 1.0),)
    units = [
        Unit(node.id, node.id, Profile((0.0, *[rate] * LAYERS), (0, *[9] * LAYERS), points, points))
        for node, rate in zip(nodes, rates, strict=True)
    ]
    made = Flow(cluster, MODEL, units)
    return made.value(spans), made.edges(spans)


some_spans = st.lists(
    st.tuples(st.integers(0, LAYERS - 1), st.integers(1, LAYERS)).map(
        lambda pair: Span(pair[0], max(pair[0] + 1, pair[1]))
    ),
    min_size=2,
    max_size=10,
)


@settings(max_examples=60)
@given(some_spans, st.randoms(use_true_random=False))
def test_paths_are_whole_and_make_up_the_flow(spans: list[Span], rng: Random) -> None:
    """Every path runs each layer once inside what its units hold; summed they are the flow, and no
    hop carries more than it does in the flow."""
    rates = [rng.uniform(1, 100) for _ in spans]
    value, edges = flow_of(spans, rates)
    found = paths(edges, spans, least=0.0)
    assert sum(path.tokens_per_s for path in found) == pytest.approx(value, rel=1e-6)
    used: dict[tuple[int | None, int | None], float] = {}
    for path in found:
        assert path.spans[0].first == 0
        assert path.spans[-1].end == LAYERS
        for unit, run in zip(path.units, path.spans, strict=True):
            assert spans[unit].covers(run)
        for before, after in zip(path.spans, path.spans[1:], strict=False):
            assert before.end == after.first
        for hop in zip([None, *path.units], [*path.units, None], strict=True):
            used[hop] = used.get(hop, 0.0) + path.tokens_per_s
    held = {(edge.sender, edge.receiver): edge.tokens_per_s for edge in edges}
    assert all(carried <= held[hop] * (1 + 1e-6) + 1e-9 for hop, carried in used.items())


def test_slight_paths_are_left_out() -> None:
    spans = [Span(0, 6), Span(0, 6)]
    _, edges = flow_of(spans, [100.0, 0.5])
    assert [path.units for path in paths(edges, spans)] == [(0,)]
    assert len(paths(edges, spans, least=0.0)) == 2


def test_no_flow_has_no_paths() -> None:
    assert paths((), [None, None]) == ()
