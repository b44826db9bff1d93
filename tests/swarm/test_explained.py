"""Routes, decisions and traces as a person reads them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from hexswarm.errors import NoRoute
from hexswarm.explained import (
    repair_text,
    route_json,
    route_text,
    sums,
    trace_json,
    trace_text,
    verdict,
    why_json,
    why_text,
)
from hexswarm.records import PeerId, Route, RouteRequest, Span, Stage
from hexswarm.router.explain import Budget, Explanation, Hop, Rejected
from hexswarm.trace import Place, Repair, SessionTrace
from tests.swarm.test_trace import A, B, trace, traced

REQUEST = RouteRequest("m", 6, 4, 128, 64, tpot_s=0.05, percentile=95.0)


def route(*peers: PeerId, tpot_s: float = 0.031) -> Route:
    each = 6 // len(peers)
    stages = tuple(Stage(peer, Span(i * each, (i + 1) * each)) for i, peer in enumerate(peers))
    return Route(stages, 0.1, tpot_s, ttft_p95_s=0.2, tpot_p95_s=0.04, price=8.5)


def budget() -> Budget:
    whole = replace(route(A, B), spares=(route(B, A, tpot_s=0.05),))
    hops = tuple(
        Hop(
            peer=stage.peer, span=stage.span, compute_s=0.010, queue_s=0.001, link_s=0.004,
            serialise_s=0.0005, origin="measured", rtt_s=0.008, price=4.25,
        )
        for stage in whole.stages
    )  # fmt: skip
    return Budget(whole, hops, 0.02, 0.01)


def test_a_route_is_a_table_with_promises() -> None:
    lines = route_text(budget()).splitlines()
    assert lines[0].split() == [
        *("peer", "layers", "compute", "queue", "link", "serialise"),
        *("sum", "round", "trip", "known", "from", "price"),
    ]
    assert lines[1].split() == [
        *(A[-8:], "0:3", "10.0", "1.00", "4.00", "0.50", "15.5", "8.00", "measured", "4.25")
    ]
    assert lines[2].split()[:2] == [B[-8:], "3:6"]
    assert "time per token 31.0 ms median, 40.0 ms p95" in lines
    assert "first token    100.0 ms median, 200.0 ms p95" in lines
    assert "price          8.50 layers of an idle peer" in lines
    assert lines[-1].startswith("spare 1")
    assert "(50.0 ms a token)" in lines[-1]
    assert len({line.find("10.0") for line in lines[1:3]}) == 1, "columns stand below each other"


def test_unmeasured_ways_are_named() -> None:
    bound = replace(budget(), route=replace(route(A, B), unmeasured=((A, B),)))
    assert f"not measured: {A[-8:]}-{B[-8:]}" in route_text(bound)


def test_a_route_as_json() -> None:
    document = json.loads(json.dumps(route_json(budget())))
    assert document["hops"][0]["peer"] == A
    assert document["hops"][0]["span"] == [0, 3]
    assert document["tpot_s"] == pytest.approx(
        sum(
            hop["compute_s"] + hop["queue_s"] + hop["link_s"] + hop["serialise_s"]
            for hop in document["hops"]
        )
    )
    assert document["spares"][0]["stages"][0] == {"peer": B, "span": [0, 3]}
    assert (document["price"], document["tpot_p95_s"]) == (8.5, 0.04)


def test_why_a_route_was_chosen() -> None:
    made = Explanation(
        REQUEST, budget(), (Rejected(route(B, A, tpot_s=0.06), "it needs 60 ms"),), "tpot",
        "the cheapest route within the limit", None,
    )  # fmt: skip
    text = why_text(made)
    assert text.startswith("asked: 128 tokens in, 64 out; at most 50.0 ms a token (p95)")
    assert "it needs 60 ms" in text
    assert text.endswith("decided by tpot: the cheapest route within the limit")
    for line in route_text(budget()).splitlines():
        assert line in text
    document = json.loads(json.dumps(why_json(made)))
    assert document["rejected"][0]["why"] == "it needs 60 ms"
    assert (document["binding"], document["error"], document["missing"]) == ("tpot", None, [])


def test_why_there_is_no_route() -> None:
    error = NoRoute(
        "too slow", binding="tpot", missing=((2, 4),), achievable={"tpot_s": 0.031, "ttft_s": 0.1},
        remedy="ask for less",
    )  # fmt: skip
    made = Explanation(REQUEST, None, (), "tpot", "no ring is so fast", error)
    lines = why_text(made).splitlines()
    assert lines[2:6] == [
        "no route",
        "  too slow; ask for less",
        "  no peer for layers 2-3",
        "  best achievable time per token: 31.0 ms",
    ]
    document = json.loads(json.dumps(why_json(made)))
    assert document["chosen"] is None
    assert document["missing"] == [[2, 4]]
    assert document["achievable"] == {"tpot_s": 0.031, "ttft_s": 0.1}


def test_all_wishes_are_repeated() -> None:
    asked = replace(
        REQUEST, ttft_s=1.0, allow=frozenset([A]), deny=frozenset([B]), trusted=frozenset([A]),
        dtypes=frozenset(["float32"]), min_bytes_per_s=1.5e6,
    )  # fmt: skip
    text = why_text(Explanation(asked, None, (), "peers", "nobody is left", None))
    for words in (
        *("1000.0 ms to the first token", f"allow {A[-8:]}", f"deny {B[-8:]}"),
        *(f"trusted {A[-8:]}", "dtype float32", "at least 1.5 MB/s"),
    ):
        assert words in text


# --- traces ---------------------------------------------------------------------------------------


def told(tpot_s: float | None = 0.033, **b: float) -> SessionTrace:
    return trace(tpot_s=tpot_s).with_measured({A: traced(), B: traced(**b)})


def test_a_trace_shows_both_sides_of_the_law() -> None:
    text = trace_text(told())
    assert "session 0123abcd, M: 8 tokens in, 20 out" in text
    assert "10.0 > 11.0" in text
    assert "predicted  L = 20.0 compute + 2.00 queue + 8.00 link + 1.00 serialise = 31.0 ms" in text
    text = trace_text(told(0.034))
    assert (
        "measured   L = 22.0 compute + 2.00 queue + 8.00 link + 1.00 serialise + 1.00 rest"
        " = 34.0 ms" in text
    )
    assert "- 1.00 rest = 32.0 ms" in trace_text(told(0.032))
    predicted, measured = sums(told())
    assert sum(predicted.values()) == pytest.approx(0.031)
    assert measured is not None
    assert sum(measured.values()) == pytest.approx(0.033)


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (told(0.0315), "as predicted"),
        (told(0.06, compute_s=0.38), f"+28.0 ms of it in the compute of {B[-8:]}"),
        (told(0.06, wait_s=0.28), f"+27.0 ms of it in the queue of {B[-8:]}"),
        (told(0.06, successor_rtt_s=0.062), f"+27.0 ms of it in the link onward of {B[-8:]}"),
        (told(0.06, handle_s=0.28), f"+27.5 ms of it in the serialise of {B[-8:]}"),
        (told(0.06), "+27.0 ms of it in the rest, which no stage accounts for"),
        (told(0.02, compute_s=0.01), "faster than predicted"),
        (told(None), "too short"),
        (trace(tpot_s=0.06).with_measured({A: traced()}), f"{B[-8:]} did not tell"),
    ],
)
def test_the_verdict_names_the_part_and_the_peer(made: SessionTrace, words: str) -> None:
    assert words in verdict(made)
    assert trace_text(made).endswith(verdict(made))


def test_a_gap_is_a_question_mark() -> None:
    text = trace_text(trace().with_measured({A: traced()}))
    assert "10.0 > ?" in text
    assert "measured   L = 33.0 ms" in text


def test_a_trace_as_json() -> None:
    document = json.loads(json.dumps(trace_json(told())))
    assert document["session"] == "0123abcd"
    assert document["measured"]["compute_s"] == pytest.approx(0.022)
    assert document["hops"][0]["measured"]["link_s"] == pytest.approx(0.004)
    assert document["verdict"] == verdict(told())
    partial = trace_json(trace().with_measured({A: traced()}))
    assert partial["measured"] is None
    assert partial["rest_s"] is None


def test_a_repair_is_told_in_one_line() -> None:
    by = (Place(B, Span(10, 15)), Place(PeerId("peer-c"), Span(15, 20)))
    repair = Repair((Place(A, Span(10, 20)),), by, 17, 1.44, "vanished")
    text = repair_text(repair)
    assert text == (
        f"peer {A[-8:]} (layers 10-19): vanished; peers {B[-8:]} (layers 10-14), "
        "peer-c (layers 15-19) took over after 1.4 s"
    )
    assert trace_text(replace(trace(), repairs=(repair,))).endswith(text)
