"""Cluster files and plans: what they mean, and what is said of those that are wrong."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hexswarm.errors import UsageError
from hexswarm.records import Span
from hexswarm.router.placement.cluster import COORDINATOR, Profile, interpolated, parse
from hexswarm.router.placement.plan import Plan, Unit, parse_spans, whole_units

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "cluster.json"

SAID: dict[str, Any] = {
    "schema": "swarm-cluster/1",
    "name": "two",
    "models": {
        "m": {
            "layers": 4,
            "layer_bytes": 1e6,
            "activation_bytes_per_token": 100,
            "token_bytes": 2,
            "kv_bytes_per_token_per_layer": 10,
            "avg_input_tokens": 10,
            "avg_output_tokens": 5,
            "max_input_tokens": 100,
        }
    },
    "node_types": {
        "T": {
            "gpu": "T",
            "gpu_count": 1,
            "memory_gib": 1,
            "profiles": {
                "m": {
                    "max_layers": 2,
                    "throughput_tokens_per_s": {"1": 100, "2": 50},
                    "kv_capacity_tokens": {"1": 1000, "2": 400},
                    "prefill_layer_ms": [[0, 0], [100, 10], [200, 30]],
                    "decode_layer_ms": [[0, 0], [2, 4], [4, 6]],
                }
            },
        }
    },
    "nodes": [
        {"id": "a", "type": "T", "region": "x", "nic_in_gbit_s": 8, "nic_out_gbit_s": 4},
        {"id": "b", "type": "T", "region": "y", "down_gbit_s": 2, "up_gbit_s": 1, "access_ms": 3},
    ],
    "coordinator": {"nic_in_gbit_s": 8, "nic_out_gbit_s": 8, "region": "x"},
    "links": {
        "mode": "regions",
        "intra_region": {"gbit_s": 10, "rtt_ms": 1},
        "inter_region": [["x", "y", 5, 20]],
    },
}


def said(**changed: Any) -> dict[str, Any]:
    return copy.deepcopy(SAID) | changed


def test_units_are_bytes_and_seconds() -> None:
    cluster = parse(said())
    assert cluster.node("a").out_bytes_per_s == 0.5e9
    way = cluster.way("a", "b")
    assert (way.bytes_per_s, way.one_way_s) == (0.25e9, pytest.approx(0.010 + 0.003))
    assert cluster.way("b", "a").bytes_per_s == 0.125e9
    assert cluster.way(COORDINATOR, "a").one_way_s == pytest.approx(0.0005)
    assert cluster.way("a", "a").one_way_s == 0.0


def test_listed_ways_go_both_ways_and_name_the_coordinator() -> None:
    links = {
        "mode": "explicit",
        "symmetric": True,
        "list": [["a", "b", 8, 2], ["source", "a", 16, 1]],
    }
    cluster = parse(said(links=links))
    assert cluster.way("b", "a") == cluster.way("a", "b")
    assert cluster.way(COORDINATOR, "a").bytes_per_s == 2e9
    with pytest.raises(UsageError, match="nothing of the way from b to coordinator"):
        cluster.way("b", COORDINATOR)


def test_a_batch_of_one_reads_all_weights() -> None:
    """Below the least measured point a decode step is as long, a short prompt nearly so."""
    profile = whole_units(parse(said()), "m")[0].profile
    assert profile.decode_layer_s(1) == 0.004
    assert profile.decode_layer_s(3) == pytest.approx(0.005)
    assert profile.prefill_layer_s(50) == pytest.approx(0.005)
    assert profile.prefill_layer_s(1) == pytest.approx(0.004)
    assert profile.prefill_layer_s(300) == pytest.approx(0.050)


@given(
    st.lists(st.floats(1, 1e4), min_size=1, max_size=8, unique=True).map(sorted),
    st.floats(0.5, 2e4),
)
def test_interpolation_meets_its_points_and_grows(at: list[float], where: float) -> None:
    points = tuple((x, 2 * x + 1) for x in at)
    assert all(interpolated(points, x) == pytest.approx(y) for x, y in points)
    assert interpolated(points, where) <= interpolated(points, where * 2) + 1e-9


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"schema": "other"}, "not a cluster file"),
        ({"nodes": [{"id": "a", "type": "Q", "region": "x"}]}, "type 'Q', which is not in"),
        ({"nodes": [SAID["nodes"][0], SAID["nodes"][0]]}, "two nodes called 'a'"),
        ({"nodes": [{"id": "a", "type": "T", "region": "x"}]}, "lacks the field"),
        ({"models": {"m": {"layers": "many"}}}, "wrong kind"),
        ({"links": {"mode": "regions"}}, "lacks the field 'intra_region'"),
    ],
)
def test_what_is_wrong_is_named(changed: dict[str, Any], why: str) -> None:
    with pytest.raises(UsageError, match=why):
        parse(said(**changed))


def test_a_model_without_speeds_lists_those_with() -> None:
    with pytest.raises(UsageError, match=r"'other'.*it has m"):
        parse(said()).model("other")


def test_the_example_of_the_documents_can_be_read() -> None:
    cluster = parse(json.loads(EXAMPLE.read_text()))
    assert whole_units(cluster, next(iter(cluster.models)))


PROFILE = Profile((0.0, 2.0, 1.0), (0, 20, 10), ((1, 1.0),), ((1, 1.0),))


def test_a_plan_says_what_is_missing_and_what_it_is_as_json() -> None:
    units = (
        Unit("a", "a", PROFILE),
        Unit("b", "b", PROFILE),
        Unit("c/0-1", "c", PROFILE, (("c", 0), ("c", 1)), (0.5, 0.5)),
    )
    plan = Plan("m", "two", units, (Span(0, 2), None, Span(3, 4)))
    assert plan.missing(4) == [Span(2, 3)]
    written = plan.to_json()
    assert written["nodes"] == {"a": [0, 2], "b": None}
    assert written["groups"][0]["layers"] == [3, 4]
    assert parse_spans(written["nodes"]) == {"a": Span(0, 2), "b": None}
    with pytest.raises(UsageError, match=r"written .first, end."):
        parse_spans({"a": 7})


def test_a_plan_holds_no_more_than_fits_and_no_gpu_twice() -> None:
    with pytest.raises(UsageError, match="at most 2 layers"):
        Plan("m", "two", (Unit("a", "a", PROFILE),), (Span(0, 3),))
    twice = Unit("c/0", "c", PROFILE, (("c", 0),), (1.0,))
    with pytest.raises(UsageError, match="two groups"):
        Plan("m", "two", (twice, twice), (None, None))
