"""The rivals' placement rules, by hand and against what Helix's authors published."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest

from hexswarm.errors import UsageError
from hexswarm.records import Span
from hexswarm.router.placement.cluster import COORDINATOR, Cluster, Model, Node, NodeType, Profile
from hexswarm.router.placement.cluster import parse as parse_cluster
from hexswarm.router.placement.flow import Flow
from hexswarm.router.placement.plan import Unit, whole_units
from hexswarm.simulator import placements
from hexswarm.simulator.rival_hops import flows
from hexswarm.simulator.rival_separate import chains

ROOT = Path(__file__).parents[2]
PLANS = ROOT / "benchmarks" / "plans"
CLUSTERS = ROOT.parent / "shared" / "clusters"
NAMES = sorted(path.stem for path in PLANS.glob("*.json"))
MODEL = Model("m", 6, 1000.0, 100, 2, 1.0, 75, 25, 2048)

needs_clusters = pytest.mark.skipif(not CLUSTERS.exists(), reason="the cluster files are not here")


def profile(most: int, rate: float, kv: int = 100_000) -> Profile:
    """`rate` through one layer."""
    return Profile(
        throughput=(0.0, *(rate / k for k in range(1, most + 1))),
        kv_tokens=(0, *(kv for _ in range(most))),
        prefill=((100.0, 1e-3),),
        decode=((1.0, 1e-3),),
    )


def world(*types: tuple[str, Profile]) -> Cluster:
    """One machine of each."""
    nodes = tuple(Node(f"n{at}", name, "r", 1e9, 1e9) for at, (name, _) in enumerate(types))
    kinds = {name: NodeType(name, "gpu", 1, 1e9, {"m": {1: held}}) for name, held in types}
    return Cluster(
        "c", "", {"m": MODEL}, kinds, nodes, Node(COORDINATOR, "", "r", 1e9, 1e9), {}, {}, {}, {}
    )


BIG, SMALL = ("big", profile(4, 400.0)), ("small", profile(2, 90.0))


def test_swarm_evens_stages_of_the_size_that_the_smallest_holds() -> None:
    # stages of 2 layers; 200, 200, 45, 45, 45: each big one alone, the small ones fill the third
    plan = placements.swarm(world(SMALL, BIG, SMALL, BIG, SMALL), "m")
    assert [str(span) for span in plan.spans] == ["4:6", "2:4", "4:6", "0:2", "4:6"]
    with pytest.raises(UsageError, match="too few"):
        placements.swarm(world(SMALL, SMALL), "m")


def test_petals_fills_the_weakest_stretch() -> None:
    cluster = world(BIG, SMALL, SMALL)
    for seed in range(20):
        rng = Random(seed)
        coming = [0, 1, 2]
        Random(seed).shuffle(coming)
        spans = placements.petals(cluster, "m", rng).spans
        assert spans[coming[0]] is not None
        assert spans[coming[0]].first == 0, "nothing is held yet: the first window"
        if coming[0] == 0:  # the big one first: the two small ones find its end
            assert spans[coming[1]] == Span(4, 6)
    assert {placements.petals(cluster, "m", Random(5)).spans for _ in range(3)}.__len__() == 1


def test_separate_pipelines_by_type_and_replicas() -> None:
    plan = placements.separate(world(BIG, SMALL, BIG, SMALL, SMALL, BIG, BIG), "m")
    by_type = {0: plan.spans[::2], 1: plan.spans[1::2]}
    assert [str(plan.spans[at]) for at in (1, 3, 4)] == ["0:2", "2:4", "4:6"], by_type
    # 16 layers of room: two pipelines of two, each half
    assert [str(plan.spans[at]) for at in (0, 2, 5, 6)] == ["0:3", "0:3", "3:6", "3:6"]


def test_a_type_that_is_too_small_is_stretched_or_idles() -> None:
    cluster = world(BIG, SMALL, SMALL)
    plan = placements.separate(cluster, "m")
    assert plan.spans[1] == Span(0, 3)
    held = plan.units[1].profile
    assert (held.max_layers, held.throughput[3]) == (3, pytest.approx(45.0 * 2 / 3))
    assert held.kv_tokens[3] == (2 * (1000 + 100_000)) // 3 - 1000
    assert plan.spans[0] == Span(0, 6)
    full = ("small", replace(SMALL[1], kv_tokens=(0, 4000, 3500)))
    plan = placements.separate(world(BIG, full, full), "m")
    assert plan.spans[1:] == (None, None), "three layers would leave room for 2,000 tokens"
    with pytest.raises(UsageError, match="no type"):
        placements.separate(world(full, full), "m")


def test_room_that_somebody_measured_counts() -> None:
    unit = Unit("n1", "n1", SMALL[1])
    wide = placements.stretched(unit, MODEL, 3, 123)
    assert wide is not None
    assert wide.profile.kv_tokens[3] == 123
    assert placements.stretched(unit, MODEL, 2) is unit


def test_published_plans_name_real_machines() -> None:
    said: dict[str, Any] = {"model": "m", "nodes": {"n0": [0, 4], "n1": None, "n9": [4, 6]}}
    with pytest.raises(UsageError, match="n9"):
        placements.published(world(BIG, SMALL), said)


def cluster_of(said: dict[str, Any]) -> Cluster:
    return parse_cluster(json.loads((CLUSTERS / f"{said['cluster']}.json").read_text()))


def test_there_are_plans() -> None:
    assert len(NAMES) == 15


@needs_clusters
@pytest.mark.parametrize("name", NAMES)
def test_published_plans_are_worth_what_was_published(name: str) -> None:
    """To all digits that are known; and the flow that weighs Helix's turns is as large."""
    said = json.loads((PLANS / f"{name}.json").read_text())
    cluster = cluster_of(said)
    plan, model = placements.published(cluster, said), cluster.model(said["model"])
    value = Flow(cluster, model, plan.units).value(plan.spans)
    carried, _ = flows(cluster, model, plan)
    assert sum(rate for (a, _), rate in carried.items() if a is None) == pytest.approx(value)
    if "kv_tokens" in said:
        assert len(chains(cluster, model, plan)) == 3
        return
    method = {"helix": "ilp"}.get(name.split("-")[0], name.split("-")[0])
    method = "ilp (optimal)" if "small10" in name else method
    known = cluster.reference[said["model"]]["max_flow_tokens_per_s"]
    assert round(value, 3) == known[method]["recomputed"] == said["flow_tokens_per_s"]
    assert len(plan.units) == len(whole_units(cluster, said["model"]))


@needs_clusters
@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith(("swarm", "petals"))])
def test_rules_reproduce_published_placements(name: str) -> None:
    """Swarm's exactly; Petals' with the artifact's seed, but for one whose speeds were others."""
    said = json.loads((PLANS / f"{name}.json").read_text())
    cluster, model = cluster_of(said), said["model"]
    want = placements.published(cluster, said).spans
    if name.startswith("swarm"):
        assert placements.swarm(cluster, model).spans == want
    elif name != "petals-single24-30b":
        assert placements.petals(cluster, model, Random(0)).spans == want
