"""Records hold their invariants: what is constructed is sound, what is not raises UsageError."""

from __future__ import annotations

import itertools
import math
from dataclasses import FrozenInstanceError, fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hexswarm.errors import UsageError
from hexswarm.records import (
    Announcement,
    GroupMembership,
    GroupOffer,
    Link,
    ModelSpec,
    PeerId,
    Route,
    RouteRequest,
    Sampling,
    Span,
    Speed,
    Stage,
    uncovered,
)
from tests.strategies import (
    MODEL,
    announcements,
    groups,
    model_specs,
    requests,
    samplings,
    spans,
    speeds,
)

A, B = PeerId("12D3KooWPeerA"), PeerId("12D3KooWPeerB")


@given(spans())
def test_a_span_reads_what_it_writes(span: Span) -> None:
    """Parsing the text of a span gives the span."""
    assert Span.parse(str(span)) == span


@given(spans(), spans())
def test_a_span_is_the_set_of_its_layers(one: Span, other: Span) -> None:
    """Length, membership and inclusion agree with those of the set."""
    layers = set(range(one.first, one.end))
    assert len(one) == len(layers)
    assert {layer for layer in range(20) if layer in one} == layers
    assert one.covers(other) == (set(range(other.first, other.end)) <= layers)


@pytest.mark.parametrize("text", ["", "5", "a:b", "1:2:3", "5:5", "7:3", "-1:4", "1.5:3", "0:"])
def test_what_is_no_span_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(UsageError) as error:
        Span.parse(text)
    assert "FIRST:END" in error.value.remedy


@given(st.lists(spans(layers=15), max_size=5), st.integers(1, 12))
def test_uncovered_is_the_complement(given_: list[Span], layers: int) -> None:
    """The holes are exactly the layers in no span, as maximal runs in order."""
    holes = uncovered(given_, layers)
    covered = {layer for span in given_ for layer in range(span.first, span.end)}
    told = [layer for hole in holes for layer in range(hole.first, hole.end)]
    assert told == [layer for layer in range(layers) if layer not in covered]
    assert all(one.end < other.first for one, other in itertools.pairwise(holes))


@given(st.one_of(announcements(), model_specs, requests(), groups(), speeds, samplings))
def test_records_do_not_change(record: Any) -> None:
    """Every record is frozen, slotted, and equal to a copy of itself."""
    assert replace(record) == record
    assert not hasattr(record, "__dict__")
    with pytest.raises(FrozenInstanceError):
        setattr(record, fields(record)[0].name, None)


GOOD: dict[str, Any] = {
    "peer": A,
    "model": MODEL,
    "model_name": "M",
    "layers": 12,
    "span": Span(0, 12),
    "state": "online",
    "dtype": "float32",
    "device": "cpu",
    "speed": Speed(0.001, 0.001, 0.0),
    "free_kv_tokens": 0,
    "queue_s": 0.0,
    "addresses": (),
}


@pytest.mark.parametrize(
    "bad",
    [
        {"span": Span(0, 13)},
        {"dtype": "int3"},
        {"state": "asleep"},
        {"free_kv_tokens": -1},
        {"queue_s": -0.1},
        {"queue_s": math.nan},
        {"queue_s": math.inf},
        {"addresses": ("/ip4/10.0.0.1/tcp/1",) * 9},
        {"neighbours": ((B, 0.1),) * 9},
        {"sequence": -1},
        {"issued_s": math.nan},
    ],
    ids=str,
)
def test_a_senseless_announcement_is_refused(bad: dict[str, Any]) -> None:
    assert Announcement(**GOOD).serving
    with pytest.raises(UsageError):
        Announcement(**{**GOOD, **bad})


@pytest.mark.parametrize("state", ["joining", "draining"])
def test_only_online_peers_serve(state: Any) -> None:
    assert not Announcement(**{**GOOD, "state": state}).serving


def test_only_rank_0_of_a_group_serves() -> None:
    for rank in range(3):
        member = Announcement(**GOOD, group=GroupMembership("g", rank, 3, 1))
        assert member.serving == (rank == 0)


@pytest.mark.parametrize(("rank", "size"), [(-1, 2), (2, 2), (0, 0), (0, 65)])
def test_a_senseless_group_is_refused(rank: int, size: int) -> None:
    with pytest.raises(UsageError):
        GroupMembership("g", rank, size, 0)


@pytest.mark.parametrize("shares", [(500,), (1000, 0), (600, 500), (334, 333, 333), (1001, -1)])
def test_a_cut_gives_every_member_a_part_of_a_thousand(shares: tuple[int, ...]) -> None:
    with pytest.raises(UsageError):
        GroupMembership("g", 0, 2, 1, shares)
    assert GroupMembership("g", 0, 2, 1, (667, 333)).shares == (667, 333)


def test_who_waits_for_a_group_speaks_for_no_layers() -> None:
    offer = GroupOffer("lab", 1 << 30, "10.0.0.1", 4711, waiting=True)
    waiting = Announcement(**{**GOOD, "state": "online"}, offer=offer)
    assert not waiting.stands
    assert not waiting.serving
    assert replace(waiting, offer=replace(offer, waiting=False)).serving


@pytest.mark.parametrize(
    "bad",
    [{"name": ""}, {"name": "a" * 33}, {"name": "a\x1b[2J"}, {"free_bytes": -1}, {"host": ""},
     {"host": "h" * 65}, {"port": 0}, {"port": 1 << 16}],
)  # fmt: skip
def test_a_senseless_offer_is_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        GroupOffer(**{"name": "lab", "free_bytes": 0, "host": "h", "port": 1, **bad})


@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf, 1e5])
@pytest.mark.parametrize("name", ["decode_layer_s", "prefill_layer_s", "head_s"])
def test_a_senseless_speed_is_refused(name: str, value: float) -> None:
    with pytest.raises(UsageError):
        replace(Speed(0.0, 0.0, 0.0), **{name: value})


@pytest.mark.parametrize(
    "bad",
    [{"digest": "ab"}, {"digest": "AB" * 32}, {"layers": 0}, {"hidden": 0}, {"context": 0}],
    ids=str,
)
def test_a_senseless_model_is_refused(bad: dict[str, Any]) -> None:
    good = ModelSpec(MODEL, "M", "LlamaForCausalLM", 30, 576, 49152, 8192, 768)
    with pytest.raises(UsageError):
        replace(good, **bad)


def test_one_way_is_half_of_the_round_trip() -> None:
    assert Link(0.3).one_way_s == 0.15


def test_a_route_has_a_head_and_a_tail_and_tells_itself() -> None:
    route = Route((Stage(A, Span(0, 4)), Stage(B, Span(4, 9))), 0.1, 0.01)
    assert (route.head.peer, route.tail.peer) == (A, B)
    assert str(route) == f"{A[-8:]} [0:4] -> {B[-8:]} [4:9]"


@pytest.mark.parametrize(
    "stages",
    [
        [(A, 1, 4)],
        [(A, 0, 4), (B, 5, 9)],
        [(A, 0, 4), (B, 3, 9)],
        [(A, 0, 4), (B, 4, 6), (A, 6, 9)],
    ],
)
def test_a_route_with_a_gap_an_overlap_or_a_peer_twice_is_refused(stages: Any) -> None:
    with pytest.raises(UsageError):
        Route(tuple(Stage(peer, Span(first, end)) for peer, first, end in stages), 0.1, 0.01)


def test_a_request_needs_kv_for_prompt_and_answer() -> None:
    assert RouteRequest(MODEL, 12, 1152, prompt_tokens=20, new_tokens=30).kv_tokens == 50


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": 101.0},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"min_p": -0.1},
        {"min_p": 1.5},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": math.inf},
        {"seed": -1},
        {"seed": 2**64},
    ],
    ids=str,
)
def test_a_sampling_value_out_of_range_is_named(bad: dict[str, Any]) -> None:
    (name,) = bad
    with pytest.raises(UsageError, match=f"^{name} = "):
        Sampling(**bad)


def test_the_default_is_greedy() -> None:
    assert Sampling().greedy
    assert not Sampling(temperature=0.7).greedy
