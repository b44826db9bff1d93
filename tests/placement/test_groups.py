"""Groups of GPUs: partitions, cuts by heads, groups of a LAN, and plans read back."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hexswarm.errors import UsageError
from hexswarm.records import Span
from hexswarm.router.placement import groups, speeds
from hexswarm.router.placement.cluster import Cluster, GpuSpec, parse
from hexswarm.router.placement.plan import Plan
from hexswarm.router.placement.regroup import regrouped
from tests.placement.worlds import CONSTANTS

MODEL = "llama-70b"
BIG = {"fp16_tflops": 155, "memory_gb_s": 768, "memory_gib": 48, "intra_machine_gb_s": 12}
SMALL = {"fp16_tflops": 77, "memory_gb_s": 448, "memory_gib": 16, "intra_machine_gb_s": 12}


def table() -> dict[str, Any]:
    """A profile as files have it, with figures that no formula gives."""
    return {
        "max_layers": 2,
        "throughput_tokens_per_s": {"1": 777.0, "2": 333.0},
        "kv_capacity_tokens": {"1": 1000, "2": 400},
        "prefill_layer_ms": [[16, 1.0]],
        "decode_layer_ms": [[1, 1.0]],
    }


def kind(gpu: dict[str, float], count: int) -> dict[str, Any]:
    return {
        "gpu": "some",
        "gpu_count": count,
        "memory_gib": gpu["memory_gib"] * count,
        "tensor_parallel": count,
        "gpu_spec": gpu,
        "profiles": {MODEL: table()},
    }


def cluster(lan_rtt_ms: float = 1.0, access_ms: float = 0.2, count: int = 8) -> Cluster:
    """A machine of large cards, one of four small ones beside it, and one far away."""
    return parse(
        {
            "schema": "swarm-cluster/1",
            "name": "test",
            "models": {
                MODEL: {
                    "layers": 80,
                    "layer_bytes": 1.711e9,
                    "activation_bytes_per_token": 16384,
                    "token_bytes": 2,
                    "kv_bytes_per_token_per_layer": 4096,
                    "avg_input_tokens": 80,
                    "avg_output_tokens": 80,
                    "max_input_tokens": 2048,
                }
            },
            "node_types": {"big": kind(BIG, count), "small": kind(SMALL, 4)},
            "nodes": [
                {"id": name, "type": type, "region": region, "access_ms": access_ms}
                | {"up_gbit_s": 10, "down_gbit_s": 10}
                for name, type, region in (
                    ("a", "big", "here"),
                    ("b", "small", "here"),
                    ("c", "small", "there"),
                )
            ],
            "coordinator": {"region": "here", "nic_in_gbit_s": 10, "nic_out_gbit_s": 10},
            "links": {
                "mode": "regions",
                "intra_region": {"gbit_s": 5, "rtt_ms": lan_rtt_ms},
                "inter_region": [["here", "there", 1, 60]],
            },
            "analytic_profile": CONSTANTS,
        }
    )


@given(st.integers(1, 8))
def test_partitions_are_all_and_each_once(count: int) -> None:
    """The partitions of n are exactly the multisets of degrees whose sum is n."""
    found = list(groups.partitions(count))
    assert len(set(found)) == len(found)
    expected = {
        sizes
        for length in range(1, count + 1)
        for sizes in itertools.combinations_with_replacement(sorted(groups.DEGREES)[::-1], length)
        if sum(sizes) == count
    }
    assert set(found) == expected


@settings(max_examples=40)
@given(
    st.lists(
        st.builds(
            GpuSpec,
            st.floats(1e13, 1e15),
            st.floats(1e11, 3e12),
            st.floats(8e9, 8e10),
            st.just(1e10),
        ),
        min_size=1,
        max_size=8,
    )
)
def test_shares_are_whole_heads_of_everybody(members: list[GpuSpec]) -> None:
    """Shares are positive multiples of one head, sum to one, and a card that is better in every
    way never has the smaller share."""
    model = cluster().model(MODEL)
    shares = groups.shares_of(model, members)
    assert shares is not None
    heads = [share * groups.kv_heads(model) for share in shares]
    assert all(head >= 1 and head == pytest.approx(round(head)) for head in heads)
    assert sum(shares) == pytest.approx(1)
    for (a, mine), (b, theirs) in itertools.permutations(zip(members, shares, strict=True), 2):
        if (
            a.flops > b.flops
            and a.memory_bytes > b.memory_bytes
            and a.memory_bytes_per_s > b.memory_bytes_per_s
        ):
            assert mine >= theirs


def test_three_cards_share_eight_heads() -> None:
    unit = groups.group(cluster(), cluster().model(MODEL), [("a", 0), ("a", 1), ("a", 2)])
    assert unit is not None
    assert unit.id == "a/0-2"
    assert sorted(unit.shares) == [0.25, 0.375, 0.375]
    assert groups.shares_of(cluster().model(MODEL), [GpuSpec(1, 1, 1, 1)] * 9) is None


def test_the_files_table_comes_first() -> None:
    pool = cluster()
    whole = groups.group(pool, pool.model(MODEL), [("a", gpu) for gpu in range(8)])
    half = groups.group(pool, pool.model(MODEL), [("a", gpu) for gpu in range(4)])
    assert whole is not None
    assert half is not None
    assert whole.profile.throughput == (0.0, 777.0, 333.0)
    assert half.profile.max_layers == int(0.6 * 4 * 48 * 2**30 / 1.711e9)


def test_groupings_use_each_gpu_once() -> None:
    pool = cluster()
    found = groups.groupings(pool, pool.model(MODEL), pool.nodes[0])
    assert len(found) == len(list(groups.partitions(8)))
    for units in found:
        members = [gpu for unit in units for gpu in unit.members]
        assert sorted(members) == [("a", gpu) for gpu in range(8)]


def test_machines_of_more_than_eight_gpus_are_not_listed() -> None:
    pool = cluster(count=16)
    with pytest.raises(UsageError, match="16 GPUs"):
        groups.groupings(pool, pool.model(MODEL), pool.nodes[0])
    with pytest.raises(UsageError, match="fewer than 5"):
        groups.grouping(pool, pool.model(MODEL), pool.nodes[1], (4, 1))


def test_groups_over_a_lan_are_only_of_machines_nearby() -> None:
    pool = cluster(lan_rtt_ms=0.2, access_ms=0.0, count=4)
    (pair,) = groups.lan_groups(pool, pool.model(MODEL))
    assert pair.id == "a/0-3+b/0-3"
    assert pair.node == "a"
    assert len(pair.members) == len(pair.shares) == 8
    four = groups.lan_groups(cluster(lan_rtt_ms=2.0, access_ms=0.0), pool.model(MODEL))
    assert four == ()


def test_unequal_cards_get_unequal_parts() -> None:
    pool = cluster(lan_rtt_ms=0.2, access_ms=0.0)
    members = [("a", 0), ("a", 1), ("b", 0), ("b", 1)]
    unit = groups.group(pool, pool.model(MODEL), members)
    assert unit is not None
    assert unit.shares == (0.375, 0.375, 0.125, 0.125)
    specs = [groups.spec_of(pool, pool.node(name)) for name, _ in members]
    even = speeds.profile(
        pool.model(MODEL), speeds.estimate_of(pool), specs, [0.25] * 4, speeds.Lan(2, 1e-4, 6.25e8)
    )
    assert even is not None
    assert unit.profile.decode_layer_s(1) < even.decode_layer_s(1)
    assert unit.profile.max_layers > even.max_layers


def some_plan(pool: Cluster) -> Plan:
    model = pool.model(MODEL)
    halves = groups.grouping(pool, model, pool.nodes[0], (4, 4))
    small = groups.grouping(pool, model, pool.nodes[1], (3, 1))
    assert halves is not None
    assert small is not None
    spans = (Span(0, 40), Span(40, 80), Span(0, 3), None)
    return Plan(MODEL, pool.name, (*halves, *small), spans)


def test_a_plan_survives_its_json() -> None:
    pool = cluster()
    plan = some_plan(pool)
    again = groups.parse_plan(pool, plan.to_json())
    assert again == plan


def test_the_cut_that_a_plan_names_is_kept() -> None:
    said = some_plan(cluster()).to_json()
    said["groups"][0]["shares"] = [0.375, 0.375, 0.125, 0.125]
    plan = groups.parse_plan(cluster(), said)
    assert plan.units[0].shares == (0.375, 0.375, 0.125, 0.125)
    assert plan.units[0].profile.decode_layer_s(1) > plan.units[1].profile.decode_layer_s(1)


def test_pipelines_survive_their_json() -> None:
    pool = cluster()
    halves = groups.grouping(pool, pool.model(MODEL), pool.nodes[0], (4, 4))
    small = groups.grouping(pool, pool.model(MODEL), pool.nodes[1], (4,))
    assert halves is not None
    assert small is not None
    spans = (Span(2, 42), Span(42, 80), Span(0, 2))
    plan = Plan(MODEL, pool.name, (*halves, *small), spans, ((2, 0, 1),))
    said = plan.to_json()
    assert said["pipelines"] == [["b/0-3", "a/0-3", "a/4-7"]]
    assert groups.parse_plan(pool, said) == plan
    assert "pipelines" not in replace(plan, pipelines=()).to_json()


@pytest.mark.parametrize(
    ("pipelines", "words"),
    [
        ([["a/0-3", "a/4-7", "z"]], "names z"),
        ([["a/0-3", "a/4-7"], ["a/0-3", "a/4-7"]], "in two pipelines"),
        ([["a/4-7", "a/0-3"], ["b/0-2"]], "breaks off before layer 0"),
        ([["a/0-3", "a/4-7"]], "b/0-2 holds 0:3 and is in no pipeline"),
        ([["a/0-3", "a/4-7"], ["b/0-2"]], "b/0-2 ends before layer 80"),
        ([["a/0-3", "a/4-7"], ["b/0-2", "b/3"]], "breaks off before layer 3"),
        ([3], "wrong kind"),
        ([[["a"]]], "no unit"),
    ],
)
def test_wrong_pipelines_are_named(pipelines: list[Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        groups.parse_plan(cluster(), {**some_plan(cluster()).to_json(), "pipelines": pipelines})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"schema": "other"}, "not a plan"),
        ({"cluster": "other"}, "for cluster other, not for"),
        ({"nodes": {"b/3": None}}, "no node"),
        ({"model": "gpt"}, "no speeds"),
        ({"nodes": {"x": [0, 3]}}, "no node"),
        ({"nodes": {"a": [0, 1]}}, "in group"),
        ({"nodes": {"c": [79, 81]}}, "80 layers"),
        ({"nodes": {"c": [0, 40]}}, "at most"),
        ({"nodes": None}, "wrong kind"),
        ({"groups": [{"id": "g"}]}, "lacks"),
        ({"groups": [{"id": "g", "members": [["a", 9]], "shares": [1], "layers": None}]}, "no GPU"),
        (
            {"groups": [{"id": "g", "members": [["a", 0]], "shares": [0.5, 0.5], "layers": None}]},
            "shares",
        ),
    ],
)
def test_wrong_plans_are_named(change: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        groups.parse_plan(cluster(), {**some_plan(cluster()).to_json(), **change})


def test_unknown_gpus_are_not_regrouped() -> None:
    pool = cluster()
    types = {name: replace(type, spec=None) for name, type in pool.types.items()}
    with pytest.raises(UsageError, match="gpu_spec"):
        groups.groupings(replace(pool, types=types), pool.model(MODEL), pool.nodes[0])


@settings(max_examples=15)
@given(st.integers(0, 2**32))
def test_regrouping_keeps_every_gpu_and_every_other_machine(seed: int) -> None:
    """Only one machine's groups change; its GPUs stay the same, and spans fit their units."""
    pool = cluster()
    plan, rng = some_plan(pool), random.Random(seed)
    for _ in range(3):
        after = regrouped(pool, plan, rng)
        changed = {unit.node for unit in {*plan.units} ^ {*after.units}}
        assert len(changed) <= 1
        assert sorted(gpu for unit in after.units for gpu in unit.members) == sorted(
            gpu for unit in plan.units for gpu in unit.members
        )
        kept = {unit.id: span for unit, span in zip(plan.units, plan.spans, strict=True)}
        for unit, span in zip(after.units, after.spans, strict=True):
            assert unit.node in changed or kept[unit.id] == span
        plan = after
