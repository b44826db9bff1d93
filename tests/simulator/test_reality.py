"""What the benchmark against real swarms reckons with: views read back, paces, errors."""

from __future__ import annotations

import json
from typing import Any

import pytest

from hexswarm.records import Coordinates, Link, PeerId
from hexswarm.router.network import snapshot
from tests.lab.scripts import load
from tests.simulator.test_census import LAYERS, ME, SPEC, SPEED, seen, word

view = load("reality_view")
figures = load("reality_figures")


def test_a_view_is_read_back() -> None:
    """All that a peer says of itself but its group, and all ways that the client knows of."""
    place = Coordinates((0.01, 0.02, 0.0), 0.001, 0.2)
    near = (PeerId("b"), 0.004)
    words = [
        word("a", 0, 6, coordinates=place, neighbours=(near,), up_bytes_per_s=2e6, issued_s=3.5),
        word("b", 6, LAYERS, rows=1.5, busy=0.25, queue_s=0.001, state="draining", sequence=7),
    ]
    ways = {(PeerId("a"), ME): Link(0.03, 2e6, 0.001), (PeerId("b"), ME): Link(0.08)}
    before = snapshot(words, ways, 5.0, client=ME)
    said = json.loads(json.dumps({"client": ME, **before.to_json()}))
    after = view.read_view(said)
    assert after.announcements == before.announcements
    for a, b in [*ways, ("a", "b")]:
        link = before.link(a, b)
        assert after.link(a, b).rtt_s == link.rtt_s
        assert after.link(a, b).bytes_per_s == link.bytes_per_s


def hop(peer: str, first: int, end: int, compute_s: float, rows: float = 1.0) -> dict[str, Any]:
    measured = {"compute_s": compute_s, "queue_s": 0.0, "link_s": None, "serialise_s": 0.001}
    return {"peer": peer, "span": [first, end], "measured": measured, "rows": rows}


def answered(*hops: dict[str, Any]) -> dict[str, Any]:
    return {"trace": {"hops": list(hops)}}


def test_a_pace_is_what_batches_took_in_units_of_what_was_announced() -> None:
    words = [word("a", 0, 6), word("b", 6, LAYERS)]
    head = hop("a", 0, 6, 2 * 6 * SPEED.decode_layer_s)
    row_s = SPEED.decode_layer_s + 3 * SPEED.row_layer_s
    tail = hop("b", 6, LAYERS, 1.5 * (6 * row_s + SPEED.head_s), rows=4.0)
    silent = {**hop("a", 0, 6, 1.0), "measured": None}
    found = view.paces(seen(words), SPEC, [answered(head, tail), answered(silent, tail)])
    assert found == {"a": pytest.approx(2.0), "b": pytest.approx(1.5)}


def test_other_speeds_leave_the_rest_as_it_was() -> None:
    before = seen([word("a", 0, 6), word("b", 6, LAYERS)])
    after = view.paced(before, {"a": 2.0}, 3.0)
    one, other = after.announcements
    assert one.speed.decode_layer_s == 2 * SPEED.decode_layer_s
    assert other.speed.head_s == 3 * SPEED.head_s
    assert after.links == before.links
    assert [item.span for item in after.announcements] == [w.span for w in before.announcements]


def test_errors_of_cases_do_not_cancel_out() -> None:
    rows = []
    for count, predicted_s in ((1, 0.12), (4, 0.08)):
        course = figures.Course(figures.Case("eu5", count))
        course.measured += [figures.Times(0.09, 0.1, 0.5), figures.Times(0.11, 0.1, 0.5)]
        course.predicted.append(figures.Times(predicted_s, 0.1, 0.4))
        course.replayed.append(figures.Times(0.1, 0.1, 0.4))
        course.parts.append(figures.parts([answered(hop("a", 0, 6, 0.05, count))], 0.001))
        course.load.append(1.0)
        rows.append(course.row())
    assert [row["error"] for row in rows] == [pytest.approx(0.2), pytest.approx(-0.2)]
    found = figures.summary(rows)
    assert found["error"] == pytest.approx(0.2)
    assert found["error_one"] == pytest.approx(0.2)
    assert found["predicted_s"] == pytest.approx(found["measured_s"])
    assert found["replay_error"] == pytest.approx(0.0)
    assert len(list(figures.table(rows))) == 3
