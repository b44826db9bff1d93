"""Expected latency of placements: by hand at no load, both forms alike, and what load does."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hexswarm.errors import UsageError
from hexswarm.records import Span
from hexswarm.router import native
from hexswarm.router.placement.expected import Load
from hexswarm.router.placement.latency import Latency
from tests.placement.serving_worlds import FAR, LAYERS, MODEL, NEAR, load, profile, world

IDLE = load(1e-6)
HOP_S = NEAR.one_way_s
BYTES_S = MODEL.activation_bytes / NEAR.bytes_per_s
ID_S = MODEL.token_bytes / NEAR.bytes_per_s


@pytest.fixture(params=[False, True], ids=["numpy", "compiled"])
def compiled(request: pytest.FixtureRequest) -> bool:
    if request.param and not native.available():
        pytest.skip("not compiled here")
    return bool(request.param)


def spans(*pairs: tuple[int, int] | None) -> list[Span | None]:
    return [Span(*pair) if pair else None for pair in pairs]


def test_a_chain_at_no_load_takes_what_the_formula_says(compiled: bool) -> None:
    cluster, units = world([profile(8), profile(8)])
    latency = Latency(cluster, MODEL, units, compiled=compiled)
    told = latency.estimate(spans((0, 5), (5, 8)), IDLE)
    step_s = 2e-3 + 1e-5
    assert told.tpot_s == pytest.approx(8 * step_s + 2 * HOP_S + BYTES_S + ID_S, rel=1e-3)
    chunk_s = 128 * 1e-5
    carry_s = 128 * BYTES_S
    first_s = 3 * HOP_S + 8 * chunk_s + carry_s
    assert told.ttft_s == pytest.approx(first_s + 5 * chunk_s, rel=2e-3)
    assert told.long_ttft_s == pytest.approx(first_s + 2 * 5 * chunk_s, rel=2e-3)
    assert told.stages == pytest.approx(2)
    assert told.share == pytest.approx((1, 1))


def test_a_slow_link_sets_the_pace_of_a_prompt(compiled: bool) -> None:
    cluster, units = world([profile(8), profile(8)], ["a", "b"])
    latency = Latency(cluster, MODEL, units, compiled=compiled)
    told = latency.estimate(spans((0, 4), (4, 8)), IDLE)
    carry_s = 128 * MODEL.activation_bytes / FAR.bytes_per_s
    later_s = told.long_ttft_s - told.ttft_s
    assert later_s == pytest.approx(carry_s, rel=0.01), "one chunk more waits for the link"


def test_partial_entry_computes_the_rest_alone(compiled: bool) -> None:
    cluster, units = world([profile(8), profile(8)])
    latency = Latency(cluster, MODEL, units, compiled=compiled)
    apart = latency.estimate(spans((0, 5), (5, 8)), IDLE)
    overlapping = latency.estimate(spans((0, 5), (2, 8)), IDLE)
    assert overlapping.tpot_s == pytest.approx(apart.tpot_s, rel=1e-6)


@pytest.mark.parametrize("held", [((0, 4), (5, 8)), ((0, 4), None), ((1, 4), (4, 8)), (None, None)])
def test_a_hole_serves_nobody(compiled: bool, held: tuple[tuple[int, int] | None, ...]) -> None:
    cluster, units = world([profile(8), profile(8)])
    told = Latency(cluster, MODEL, units, compiled=compiled).estimate(spans(*held), IDLE)
    assert math.isinf(told.tpot_s)
    assert math.isinf(told.ttft_s)


def test_twins_share_and_the_faster_has_more(compiled: bool) -> None:
    cluster, units = world([profile(8), profile(8), profile(8), profile(8, slower=1.02)])
    latency = Latency(cluster, MODEL, units, compiled=compiled)
    told = latency.estimate(spans((0, 4), (0, 4), (4, 8), (4, 8)), load(200.0))
    assert told.share[:2] == pytest.approx((0.5, 0.5))
    assert told.share[2] > 0.5 > told.share[3] > 0
    assert told.share[2] + told.share[3] == pytest.approx(1)


def test_the_way_from_tail_to_head_counts(compiled: bool) -> None:
    """Two tails of equal speed; one is an ocean away from the head."""
    cluster, units = world([profile(8)] * 3, ["a", "a", "b"])
    latency = Latency(cluster, MODEL, units, compiled=compiled)
    told = latency.estimate(spans((0, 4), (4, 8), (4, 8)), IDLE)
    assert told.share[1] > 0.999


def test_load_makes_everything_slower(compiled: bool) -> None:
    cluster, units = world([profile(8), profile(8), profile(8)])
    latency = Latency(cluster, MODEL, units, compiled=compiled)
    placed = spans((0, 4), (4, 8), (2, 8))
    told = [latency.estimate(placed, load(rate)) for rate in (1.0, 200.0, 800.0)]
    for less, more in pairwise(told):
        assert less.tpot_s < more.tpot_s
        assert less.ttft_s < more.ttft_s
        assert less.busiest < more.busiest
        assert less.kv < more.kv


def test_kv_is_what_lives_at_once(compiled: bool) -> None:
    """Little's law on one unit."""
    cluster, units = world([profile(8, kv=10_000)])
    asked = load(50.0)
    told = Latency(cluster, MODEL, units, compiled=compiled).estimate(spans((0, 8)), asked)
    alive = asked.requests_per_s * told.answer_s(asked)
    assert told.kv == pytest.approx(alive * (256 + 64) / 10_000)


@st.composite
def placed(draw: st.DrawFn) -> list[Span | None]:
    found: list[Span | None] = []
    for _ in range(6):
        first = draw(st.integers(0, LAYERS - 1))
        end = draw(st.integers(first, LAYERS))
        found.append(Span(first, end) if first < end else None)
    return found


@pytest.mark.skipif(not native.available(), reason="not compiled here")
@settings(max_examples=60, deadline=None)
@given(placed(), st.sampled_from([1.0, 300.0, 3000.0]), st.integers(1, 5))
def test_both_forms_say_the_same(held: list[Span | None], rate: float, rounds: int) -> None:
    regions = ["a", "a", "b", "b", "a", "b"]
    cluster, units = world([profile(8, slower=1 + 0.3 * at) for at in range(6)], regions)
    forms = [Latency(cluster, MODEL, units, compiled=form) for form in (False, True)]
    slow, quick = (form.estimate(held, load(rate), rounds) for form in forms)
    assert quick.tpot_s == pytest.approx(slow.tpot_s, rel=1e-6)
    assert quick.ttft_s == pytest.approx(slow.ttft_s, rel=1e-6)
    assert quick.long_ttft_s == pytest.approx(slow.long_ttft_s, rel=1e-6)
    assert quick.kv == pytest.approx(slow.kv, rel=1e-6)
    assert quick.busiest == pytest.approx(slow.busiest, rel=1e-6)
    assert quick.share == pytest.approx(slow.share, rel=1e-6, abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 2), min_size=6, max_size=6), st.sampled_from([1.0, 500.0]))
def test_each_layer_is_visited_once(thirds: list[int], rate: float) -> None:
    """Shares of those that hold a layer add up to one, where no span overlaps another in part."""
    cuts = [(0, 3), (3, 5), (5, 8)]
    cluster, units = world([profile(8, slower=1 + 0.1 * at) for at in range(6)])
    told = Latency(cluster, MODEL, units).estimate(spans(*(cuts[at] for at in thirds)), load(rate))
    if len(set(thirds)) < 3:
        assert math.isinf(told.tpot_s)
        return
    for third in range(3):
        sums = sum(share for share, at in zip(told.share, thirds, strict=True) if at == third)
        assert sums == pytest.approx(1)


def test_a_load_without_tokens_is_none() -> None:
    with pytest.raises(UsageError):
        Load(0.0, 256.0, 64.0, 384.0)
    of = Load.of(MODEL, 640.0)
    assert of.requests_per_s == pytest.approx(2.0)
    assert of.long_input_tokens == pytest.approx(1.8 * 256)
