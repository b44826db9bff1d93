"""Pictures of plans and runs, and what binds: whole, true to the plan, on the paper."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from xml.etree.ElementTree import Element, fromstring

import pytest

from hexswarm.plan_facts import Facts, facts, plan_json, plan_table, what_binds
from hexswarm.plan_map import lay_out, plan_map
from hexswarm.plots import Bars, Chart, Series, plots
from hexswarm.records import Span
from hexswarm.router.placement.cluster import Cluster, parse
from hexswarm.router.placement.flow import Flow
from hexswarm.router.placement.plan import Plan, whole_units

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "cluster.json"
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def cluster() -> Cluster:
    return parse(json.loads(EXAMPLE.read_text("utf-8")))


def told(cluster: Cluster, *spans: tuple[int, int] | None) -> Facts:
    units = whole_units(cluster, "llama-8b")
    held = tuple(span and Span(*span) for span in spans)
    return facts(cluster, Plan("llama-8b", cluster.name, units, held), None)


def drawn(cluster: Cluster, rng: random.Random) -> Facts:
    """Any plan, holes and idle units included."""
    spans = []
    for unit in whole_units(cluster, "llama-8b"):
        size = rng.randint(1, unit.profile.max_layers)
        first = rng.choice([0, 32 - size, rng.randint(0, 32 - size)])
        spans.append(rng.choice([None, (first, first + size), (first, first + size)]))
    return told(cluster, *spans)


def bars(root: Element) -> list[Element]:
    return [node for node in root.iter(f"{SVG}g") if node.get("class") == "unit"]


@pytest.mark.parametrize("seed", range(25))
def test_any_plan_has_a_picture_with_all_of_it(cluster: Cluster, seed: int) -> None:
    """A bar for each unit that holds something, a hop for each edge, nothing off the paper."""
    found = drawn(cluster, random.Random(seed))
    picture = plan_map(found)
    assert picture == plan_map(found)
    root = fromstring(picture)
    assert len(bars(root)) == sum(span is not None for span in found.plan.spans)
    hops = [node for node in root.iter(f"{SVG}path") if "hop" in node.get("class", "").split()]
    assert len(hops) == len(found.edges)
    w, h = float(root.get("width", "")), float(root.get("height", ""))
    for node in root.iter():
        for name, most in (("x", w), ("x1", w), ("y", h), ("y1", h)):
            assert 0 <= float(node.get(name, "0")) <= most, node.attrib
        assert "nan" not in node.get("d", "")
    assert plan_table(found)
    json.dumps(plan_json(found), allow_nan=False)


@pytest.mark.parametrize("seed", range(40))
def test_nothing_but_what_binds_can_raise_the_flow(cluster: Cluster, seed: int) -> None:
    """Twice the speed and connection of the units of the one cut raise the flow, if no link is in
    it; twice the speed of all units outside all cuts does not."""
    found = drawn(cluster, random.Random(seed))
    if not found.edges:
        assert found.binding.units == ()
        return
    assert found.binding.units or found.binding.links

    def doubled(chosen: set[int]) -> float:
        units = [
            replace(
                unit,
                profile=replace(
                    unit.profile, throughput=tuple(2 * speed for speed in unit.profile.throughput)
                ),
            )
            if at in chosen
            else unit
            for at, unit in enumerate(found.plan.units)
        ]
        homes = {units[at].node for at in chosen & found.binding.all_units}
        nodes = tuple(
            replace(
                node,
                in_bytes_per_s=2 * node.in_bytes_per_s,
                out_bytes_per_s=2 * node.out_bytes_per_s,
            )
            if node.id in homes
            else node
            for node in cluster.nodes
        )
        return Flow(replace(cluster, nodes=nodes), found.model, units).value(found.plan.spans)

    if not found.binding.all_links and found.binding.units == tuple(found.binding.all_units):
        assert doubled(set(found.binding.units)) > found.flow * (1 + 1e-9)
    outside = set(range(len(found.plan.units))) - found.binding.all_units
    assert doubled(outside) == pytest.approx(found.flow, rel=1e-6)


def test_a_hole_is_named(cluster: Cluster) -> None:
    found = told(cluster, (0, 10), None, None, (12, 32), None)
    assert what_binds(found) == "nobody holds layers 10-11"
    assert found.flow == 0


def test_the_slow_stage_of_a_chain_binds(cluster: Cluster) -> None:
    found = told(cluster, (0, 8), None, (8, 20), (20, 32), None)
    (slow,) = found.binding.units
    assert found.uses[slow].capacity == min(use.capacity for use in found.uses if use.capacity)
    marked = [bar for bar in bars(fromstring(plan_map(found))) if "binds" in (bar[0].text or "")]
    assert len(marked) == 1


def test_pipelines_that_share_nothing_have_lanes_of_their_own(cluster: Cluster) -> None:
    """And the table has them one below the other; their flow is that of each alone, summed."""
    found = told(cluster, (0, 9), (0, 9), (9, 32), (9, 32), None)
    ids = [unit.id for unit in found.plan.units]
    assert ids[:4] == ["office-1", "office-2", "office-3", "anna"]
    for lines in (((0, 2), (1, 3)), ((0, 3), (1, 2))):
        apart = facts(cluster, replace(found.plan, pipelines=lines), None)
        assert 0 < apart.flow <= found.flow * (1 + 1e-9)
        office = {at: lay_out(apart).bars[at].y for at in (0, 1, 2)}
        first, second = lines
        mate = first[0] if 2 in first else second[0]
        assert office[2] == office[mate] != office[1 - mate]
        rows = [row for row in plan_table(apart).splitlines() if row.startswith("pipeline")]
        named = [row.split()[2] for row in rows]
        assert named == [ids[at] for line in lines for at in line]
        assert len(rows) == 4


def test_names_of_strangers_do_no_harm(cluster: Cluster) -> None:
    evil = '<script>"&\x1b'
    nodes = tuple(replace(node, region=evil) for node in cluster.nodes)
    found = told(replace(cluster, name=evil), (0, 8), None, (8, 20), (20, 32), None)
    picture = plan_map(replace(found, cluster=replace(found.cluster, nodes=nodes)))
    assert "<script" not in picture
    assert "\x1b" not in picture
    fromstring(picture)


@pytest.mark.parametrize("count", [0, 1, 500])
def test_plots_hold_what_they_are_given(count: int) -> None:
    """Each curve goes through its ends on the paper, and every bar up to the most is there."""
    points = [(float(at + 1), (at + 1) / count) for at in range(count)]
    rows = [(f"n{at}", at / 100) for at in range(count)]
    root = fromstring(
        plots("x", "y", [Chart("a", "s", [Series("", points)], 5.0)], Bars("b", rows))
    )
    curves = [node for node in root.iter(f"{SVG}path") if "curve" in node.get("class", "").split()]
    assert len(curves) == (count > 0)
    assert "nan" not in "".join(node.get("d", "") for node in curves)
    used = [node for node in root.iter(f"{SVG}rect") if "l3" in node.get("class", "").split()]
    assert len(used) == min(count, 400)
