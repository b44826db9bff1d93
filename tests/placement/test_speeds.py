"""The analytic speeds: they reproduce the tables of the cluster files, and groups behave."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hexswarm.errors import UsageError
from hexswarm.router.placement import speeds
from hexswarm.router.placement.cluster import Cluster, GpuSpec, Model, Profile, parse

CLUSTERS = Path(__file__).parents[3] / "shared" / "clusters"
MODEL = "llama-70b"
ESTIMATED = (
    "hexgen-full-price-58",
    "hexgen-half-price-28",
    "hexgen-homogeneous-a100-16",
    "hexgen-case-study-8",
)
A100 = GpuSpec(312e12, 1555e9, 40 * 2**30, 300e9)
A6000 = GpuSpec(155e12, 768e9, 48 * 2**30, 12e9)
A4000 = GpuSpec(77e12, 448e9, 16 * 2**30, 12e9)
RTX3090TI = GpuSpec(80e12, 1008e9, 24 * 2**30, 12e9)
SHAPE = Model(MODEL, 80, 1.711e9, 16384, 2, 4096, 750, 240, 2048)
CONSTANTS = speeds.Estimate(0.6, 0.4, 0.45, 5e-5, 2e-5, 0.9, 0.5, 0.6, 512, 4096)


def equal(gpu: GpuSpec, count: int) -> Profile:
    made = speeds.profile(SHAPE, CONSTANTS, [gpu] * count, [1 / count] * count)
    assert made is not None
    return made


@pytest.mark.parametrize(
    ("gpu", "count", "layers", "prefill_64", "prefill_2048", "decode_1", "decode_512", "rate_1"),
    [
        (A100, 8, 80, 0.8515, 4.1212, 0.8416, 2.0590, 154650.811),
        (A6000, 4, 72, 1.4804, 21.2382, 1.2312, 7.8377, 59016.457),
        (RTX3090TI, 3, 27, 1.4569, 40.1122, 1.1764, 13.1481, 38297.827),
        (A4000, 2, 12, 3.4874, 56.2870, 3.3498, 22.3259, 20945.579),
    ],
)
def test_a_few_lines_of_the_tables(
    gpu: GpuSpec,
    count: int,
    layers: int,
    prefill_64: float,
    prefill_2048: float,
    decode_1: float,
    decode_512: float,
    rate_1: float,
) -> None:
    made = equal(gpu, count)
    assert made.max_layers == layers
    assert made.prefill_layer_s(64) * 1e3 == pytest.approx(prefill_64, abs=6e-5)
    assert made.prefill_layer_s(2048) * 1e3 == pytest.approx(prefill_2048, abs=6e-5)
    assert made.decode_layer_s(1) * 1e3 == pytest.approx(decode_1, abs=6e-5)
    assert made.decode_layer_s(512) * 1e3 == pytest.approx(decode_512, abs=6e-5)
    assert made.throughput[1] == pytest.approx(rate_1, rel=1e-7)


def read(name: str) -> Cluster:
    path = CLUSTERS / f"{name}.json"
    if not path.exists():
        pytest.skip(f"{path} is not on this machine")
    return parse(json.loads(path.read_text()))


@pytest.mark.parametrize("name", ESTIMATED)
def test_every_table_of_the_files(name: str) -> None:
    """To the digits that they print: 1e-4 ms, 1e-3 tokens a second, one token of KV."""
    cluster = read(name)
    model, estimate = cluster.model(MODEL), speeds.estimate_of(cluster)
    tables = 0
    for type in cluster.types.values():
        assert type.spec is not None
        for degree, held in type.profiles[MODEL].items():
            made = speeds.profile(model, estimate, [type.spec] * degree, [1 / degree] * degree)
            assert made is not None
            tables += 1
            assert made.max_layers == held.max_layers
            for ours, theirs in ((made.prefill, held.prefill), (made.decode, held.decode)):
                assert [at for at, _ in ours] == [at for at, _ in theirs]
                for (_, a), (_, b) in zip(ours, theirs, strict=True):
                    assert a == pytest.approx(b, abs=6e-8)
            assert made.throughput == pytest.approx(held.throughput, rel=1e-6)
            assert all(abs(a - b) <= 1 for a, b in zip(made.kv_tokens, held.kv_tokens, strict=True))
    assert tables >= 4


@settings(max_examples=25)
@given(st.lists(st.sampled_from([A100, A6000, A4000, RTX3090TI]), min_size=2, max_size=8))
def test_a_group_waits_for_its_slowest_member(members: list[GpuSpec]) -> None:
    """A group is never faster than its slowest member alone would be in a group of its like."""
    share = 1 / len(members)
    mixed = speeds.profile(SHAPE, CONSTANTS, members, [share] * len(members))
    assert mixed is not None
    alike = [equal(gpu, len(members)) for gpu in set(members)]
    assert mixed.max_layers == min(made.max_layers for made in alike)
    for rows in (1, 32, 512):
        slowest = max(made.decode_layer_s(rows) for made in alike)
        assert mixed.decode_layer_s(rows) <= slowest + 1e-12
        assert mixed.prefill_layer_s(rows) <= max(m.prefill_layer_s(rows) for m in alike) + 1e-12


def test_an_uneven_cut_helps_unlike_cards() -> None:
    members = [A6000, A6000, A4000, A4000]
    even = speeds.profile(SHAPE, CONSTANTS, members, [0.25] * 4)
    uneven = speeds.profile(SHAPE, CONSTANTS, members, [0.375, 0.375, 0.125, 0.125])
    assert even is not None
    assert uneven is not None
    assert uneven.decode_layer_s(1) < 0.9 * even.decode_layer_s(1)
    assert uneven.max_layers > 1.5 * even.max_layers


def test_machines_of_a_lan_pay_for_the_link() -> None:
    inside = equal(A6000, 4)
    lan = speeds.Lan(2, 0.9e-3, 0.625e9)
    across = speeds.profile(SHAPE, CONSTANTS, [A6000] * 4, [0.25] * 4, lan)
    assert across is not None
    saved = 4 * 2 * CONSTANTS.hop_s
    assert across.decode_layer_s(1) - inside.decode_layer_s(1) == pytest.approx(
        4 * 0.9e-3 - saved, rel=0.05
    )


def test_a_limit_on_a_layers_time_bounds_the_batch() -> None:
    made = equal(A6000, 4)
    tight = speeds.within(made, SHAPE, 2e-3)
    loose = speeds.within(made, SHAPE, 8e-3)
    assert tight is not None
    assert loose is not None
    assert tight.throughput[40] < loose.throughput[40]
    assert speeds.within(made, SHAPE, 1e-3) is None
    """One row takes 1.23 ms and its part of a prompt."""


def test_other_lengths_change_the_rate_and_not_the_prompt_times() -> None:
    cluster = read("hexgen-half-price-28")
    short = speeds.for_lengths(cluster, MODEL, 80, 80)
    node = cluster.nodes[0]
    long, other = cluster.profile(node, MODEL), short.profile(node, MODEL)
    assert long is not None
    assert other is not None
    for (at, ours), (there, theirs) in zip(other.prefill, long.prefill, strict=True):
        assert at == there
        assert ours == pytest.approx(theirs, abs=6e-8)
    assert other.decode_layer_s(64) < long.decode_layer_s(64)
    assert short.model(MODEL).output_tokens == 80


def test_what_has_no_constants_says_so() -> None:
    cluster = replace(read("hexgen-half-price-28"), estimate={})
    with pytest.raises(UsageError, match="no constants"):
        speeds.estimate_of(cluster)


@pytest.mark.parametrize("shares", [[0.5, 0.6], [1.0], [1.5, -0.5]])
def test_shares_must_make_a_whole(shares: list[float]) -> None:
    with pytest.raises(UsageError, match="shares"):
        speeds.profile(SHAPE, CONSTANTS, [A100, A100], shares)
