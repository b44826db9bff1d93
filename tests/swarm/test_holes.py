"""The hole in a route: what is tried, in which order, and that as little as possible changes."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hexswarm.errors import NoRoute
from hexswarm.holes import NOBODY, attempts, fill, joined
from hexswarm.records import Announcement, PeerId, Route, RouteRequest, Span, Speed, Stage
from hexswarm.router.network import snapshot
from hexswarm.router.routing import find_route
from tests.strategies import MODEL, NAME, requests, snapshots

LAYERS = 12
REQUEST = RouteRequest(MODEL, LAYERS, hidden_bytes=1152, prompt_tokens=20, new_tokens=30)


def peer(name: str, first: int, end: int, layer_s: float = 0.001) -> Announcement:
    return Announcement(
        peer=PeerId(name),
        model=MODEL,
        model_name=NAME,
        layers=LAYERS,
        span=Span(first, end),
        state="online",
        dtype="float32",
        device="cpu",
        speed=Speed(layer_s, layer_s / 10, 0.002),
        free_kv_tokens=1000,
        queue_s=0.0,
        addresses=("/x",),
    )


def route(*stages: tuple[str, int, int]) -> Route:
    made = tuple(Stage(PeerId(name), Span(first, end)) for name, first, end in stages)
    return Route(made, 0.0, 0.0)


THIRDS = route(("a", 0, 4), ("b", 4, 8), ("c", 8, 12))


def filled(
    gone: str, *others: Announcement, before: Route = THIRDS, **asked: Any
) -> tuple[list[str], RouteRequest]:
    """What becomes of `before` if the peers named by the letters of `gone` are no more."""
    held = [peer(stage.peer, stage.span.first, stage.span.end) for stage in before.stages]
    view = snapshot([*held, *others], {}, 0.0)
    lost = {PeerId(name) for name in gone}
    request = replace(REQUEST, deny=frozenset(lost), **asked)
    found, kept = fill(view, request, before, lost, 0.0, random.Random(1))
    return [f"{stage.peer}{stage.span}" for stage in found.stages], kept


def test_only_the_hole_changes() -> None:
    quick = [peer("x", 0, 4, 1e-4), peer("z", 8, 12, 1e-4)]
    assert filled("b", peer("y", 4, 8), *quick)[0] == ["a0:4", "y4:8", "c8:12"]


def test_several_peers_may_fill_a_hole_and_one_may_fill_two() -> None:
    assert filled("b", peer("x", 4, 6), peer("y", 6, 12))[0] == ["a0:4", "x4:6", "y6:8", "c8:12"]
    assert filled("bc", peer("x", 4, 12))[0] == ["a0:4", "x4:12"]


def test_two_holes_with_somebody_well_between() -> None:
    others = [peer("x", 0, 4), peer("y", 8, 12)]
    assert filled("ac", *others)[0] == ["x0:4", "b4:8", "y8:12"]
    assert filled("ac", peer("x", 0, 4), peer("y", 0, 12))[0][1] == "b4:8"


def test_the_hole_is_widened_if_nobody_has_just_these_layers() -> None:
    """One peer cannot serve two stages: x has both ends, so the middle is asked to move."""
    assert filled("ac", peer("x", 0, 12), peer("y", 0, 12))[0] in (
        ["x0:4", "b4:8", "y8:12"],
        ["y0:4", "b4:8", "x8:12"],
    )
    assert filled("ac", peer("x", 0, 12))[0] == ["x0:12"]


def test_who_is_well_may_serve_more() -> None:
    """a holds 0 to 8 and served half of it."""
    before = route(("a", 0, 4), ("b", 4, 8), ("c", 8, 12))
    held = [peer("a", 0, 8), peer("b", 4, 8), peer("c", 8, 12)]
    view = snapshot(held, {}, 0.0)
    request = replace(REQUEST, deny=frozenset({PeerId("b")}))
    found, _ = fill(view, request, before, {PeerId("b")}, 0.0, random.Random(1))
    assert str(found) == "a [0:8] -> c [8:12]"


def test_one_that_came_back_is_taken_if_it_is_not_denied() -> None:
    held = [peer("a", 0, 4), peer("b", 4, 8), peer("c", 8, 12)]
    found, _ = fill(snapshot(held, {}, 0.0), REQUEST, THIRDS, {PeerId("b")}, 0.0, random.Random(1))
    assert found.stages[1].peer == "b"


def test_limits_are_kept_by_a_wider_hole_or_else_not_at_all() -> None:
    slow, quick = peer("x", 4, 8, 0.1), peer("y", 4, 12, 0.001)
    names, kept = filled("b", slow, quick, tpot_s=0.1)
    assert names[:2] == ["a0:4", "y4:8"]
    assert kept.tpot_s == 0.1
    wide = peer("y", 0, 12, 0.001)
    names, kept = filled("b", slow, wide, tpot_s=0.1)
    assert kept.tpot_s == 0.1
    names, kept = filled("b", slow, tpot_s=0.1)
    assert names == ["a0:4", "x4:8", "c8:12"]
    assert kept.tpot_s is None, "late is better than not at all"


def test_the_error_names_the_smallest_hole() -> None:
    with pytest.raises(NoRoute) as caught:
        filled("b", peer("x", 4, 7), peer("y", 0, 4))
    assert caught.value.missing in (((7, 8),), ())
    with pytest.raises(NoRoute):
        filled("abc")


def test_spans_that_adjoin_are_one() -> None:
    assert joined([Span(0, 2), Span(2, 4), Span(6, 8)]) == [Span(0, 4), Span(6, 8)]


@given(st.integers(1, 6), st.data())
def test_attempts_grow_to_the_whole(count: int, data: st.DataObject) -> None:
    """Each attempt covers what is gone, no two are alike, and the last one is the whole route."""
    made = route(*((f"p{index}", 2 * index, 2 * index + 2) for index in range(count)))
    lost = data.draw(st.sets(st.integers(0, count - 1), min_size=1))
    tried = list(attempts(made, {PeerId(f"p{index}") for index in lost}))
    for holes in tried:
        for index in lost:
            assert any(hole.covers(made.stages[index].span) for hole in holes)
    assert tried[-1] == [Span(0, 2 * count)]
    assert len({tuple(holes) for holes in tried}) == len(tried)
    assert sum(map(len, tried[0])) == 2 * len(lost), "the first one is no larger than it must be"


@settings(max_examples=30, deadline=None)
@given(snapshots(usable=True), requests(), st.data())
def test_a_filled_route_is_a_route(view: Any, request_: RouteRequest, data: st.DataObject) -> None:
    """Whatever is lost of whatever route: the rest is kept where the first attempt fits, nobody
    denied comes in, nobody is made up."""
    try:
        before = find_route(view, request_, 0.0, random.Random(1))
    except NoRoute:
        return
    gone = data.draw(st.sets(st.sampled_from([s.peer for s in before.stages]), min_size=1))
    denied = replace(request_, deny=frozenset(gone))
    try:
        after, _ = fill(view, denied, before, gone, 0.0, random.Random(2))
    except NoRoute:
        with pytest.raises(NoRoute):
            find_route(view, denied, 0.0, random.Random(3))
        return
    peers = {stage.peer for stage in after.stages}
    assert not peers & gone
    assert not any(name.startswith(NOBODY) for name in peers)
    assert after.tail.span.end == request_.layers
