"""Promises of time: what the router predicts, kept for all who were promised, in any order."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from hexswarm.peer.load import WINDOW_S
from hexswarm.peer.promises import ROOM, Promises, expected_step_s
from hexswarm.records import Announcement, Load, PeerId, RouteRequest, Span, Speed, Stage
from hexswarm.router.cost import budgets, elements
from hexswarm.router.network import snapshot
from tests.strategies import MODEL, speeds

LAYERS = 12
SPEED = Speed(0.001, 0.001, 0.002, 0.0001)
IDLE = Load()
loads = st.builds(
    Load,
    queue_s=st.integers(0, 20).map(lambda ms: ms / 1000),
    rows=st.integers(0, 30).map(lambda tenths: tenths / 10),
)


def admit(
    promises: Promises, session: object, step_s: float, now: float = 0.0, layers: int = 4
) -> str | None:
    """The code of the refusal by an idle peer, if it is one."""
    breach = promises.admit(session, layers, False, step_s, SPEED, IDLE, now)
    return None if breach is None else breach.code


@given(speeds, loads, st.integers(1, LAYERS), st.booleans())
def test_what_is_expected_is_what_the_router_predicts(
    speed: Speed, load: Load, layers: int, tail: bool
) -> None:
    """With one row more, the session's own."""
    span = Span(LAYERS - layers, LAYERS) if tail else Span(0, layers)
    item = Announcement(
        *(PeerId("p"), MODEL, "m", LAYERS, Span(0, LAYERS), "online", "float32", "cpu", speed),
        *(64, load.queue_s, ("/x",)),
        rows=load.rows,
    )
    view = snapshot([item], {}, 0.0)
    request = RouteRequest(MODEL, LAYERS, 1, 1, 1)
    stages = [Stage(item.peer, span)]
    (part,) = elements(view, request, stages)
    (asked_s,) = budgets(view, replace(request, tpot_s=1e-9), stages)
    # The router takes the last stage of the route for the tail.
    head_s = 0.0 if tail else speed.head_s
    predicted_s = part.compute_s + part.queue_s - head_s
    assert expected_step_s(speed, load, layers, tail=tail) == pytest.approx(predicted_s)
    if asked_s:
        breach = Promises(LAYERS).admit("a", layers, True, asked_s, speed, load, 0.0)
        assert breach is None, "what a client asks for on a true view is granted"


@given(speeds, loads, st.integers(1, LAYERS), st.floats(1, 4), st.floats(1, 4))
def test_more_rows_never_make_it_faster(
    speed: Speed, load: Load, layers: int, few: float, more: float
) -> None:
    first, second = (
        expected_step_s(speed, load, layers, tail=True, more_rows=rows)
        for rows in sorted((few, more))
    )
    assert first <= second


def test_an_idle_peer_promises_what_it_can_do_and_nothing_faster() -> None:
    alone_s = expected_step_s(SPEED, IDLE, 4, tail=False)
    assert admit(Promises(LAYERS), "a", alone_s) is None
    promises = Promises(LAYERS)
    assert admit(promises, "a", alone_s * 0.99) == "slow"
    assert len(promises) == 0
    assert promises.foreseen(SPEED, IDLE, 4, 0.0) == IDLE


def test_the_tail_counts_its_head() -> None:
    alone_s = expected_step_s(SPEED, IDLE, 4, tail=False)
    breach = Promises(LAYERS).admit("a", 4, True, alone_s, SPEED, IDLE, 0.0)
    assert breach is not None
    assert "6.0 ms, not 4.0" in str(breach)


@pytest.mark.parametrize("step_s", [0.0, 1.0])
def test_a_tight_promise_protects_against_everybody(step_s: float) -> None:
    """With a promise of their own or without; and no longer than its session is open."""
    promises = Promises(LAYERS)
    assert admit(promises, "first", expected_step_s(SPEED, IDLE, 4, tail=False)) is None
    assert admit(promises, "second", step_s) == "busy"
    assert admit(promises, "second", step_s, now=500.0) == "busy"
    promises.release("first")
    assert admit(promises, "second", step_s, now=500.0) is None


def test_a_burst_does_not_see_an_idle_peer() -> None:
    """As many are let in as can be served together, though the load tells of none of them."""
    promises = Promises(LAYERS)
    step_s = 2 * expected_step_s(SPEED, IDLE, 4, tail=False)
    said = [admit(promises, number, step_s) for number in range(40)]
    admitted = said.count(None)
    assert 2 <= admitted < 40
    assert said == [None] * admitted + ["slow"] * (40 - admitted)
    told = promises.foreseen(SPEED, IDLE, 4, 0.0)
    assert expected_step_s(SPEED, told, 4, tail=False) > step_s
    assert admit(promises, "late", step_s, now=WINDOW_S) is None, "by now the load tells of them"


def test_who_was_told_the_foreseen_load_predicts_what_is_expected() -> None:
    promises = Promises(LAYERS)
    for number in range(3):
        assert admit(promises, number, 0.0) is None
    told = promises.foreseen(SPEED, IDLE, 4, 1.0)
    predicted_s = expected_step_s(SPEED, told, 4, tail=False)
    assert admit(promises, "a", predicted_s * (1 - 10 * ROOM), now=1.0) == "slow"
    assert admit(promises, "a", predicted_s, now=1.0) is None
    assert promises.foreseen(SPEED, IDLE, 4, 1.0, without="a") == told


def test_a_promise_that_is_broken_already_lets_nobody_in() -> None:
    promises = Promises(LAYERS)
    assert admit(promises, "first", 0.005) is None
    slower = replace(SPEED, decode_layer_s=0.002)
    breach = promises.admit("second", 4, False, 0.0, slower, IDLE, 60.0)
    assert breach is not None
    assert breach.code == "busy"


def test_asked_anew_a_session_does_not_stand_in_its_own_way() -> None:
    promises = Promises(LAYERS)
    alone_s = expected_step_s(SPEED, IDLE, 4, tail=False)
    assert admit(promises, "a", alone_s) is None
    assert admit(promises, "a", alone_s, now=1.0) is None
    assert admit(promises, "a", alone_s / 2, now=2.0) == "slow"
    assert admit(promises, "b", 0.0, now=3.0) == "busy", "what was promised before still holds"


def test_who_rests_neither_counts_nor_is_protected_until_he_wakes() -> None:
    promises = Promises(LAYERS)
    alone_s = expected_step_s(SPEED, IDLE, 4, tail=False)
    assert admit(promises, "thinker", alone_s) is None
    promises.rest("thinker")
    assert admit(promises, "other", alone_s, now=5.0) is None
    promises.release("other")
    promises.wake("thinker", 20.0)
    assert admit(promises, "other", alone_s, now=20.0) == "slow"
    assert admit(promises, "other", 2 * alone_s, now=20.0) == "busy"


class Ledger(RuleBasedStateMachine):
    """Open, rest, wake, close and wait in any order, at any load.

    After every grant all promises hold, by the formula of the module's text written once more; a
    refusal is given only if one would not, and changes nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.promises = Promises(LAYERS)
        self.held: dict[int, tuple[int, bool, float, float]] = {}
        self.resting: dict[int, tuple[int, bool, float, float]] = {}
        self.now = 0.0

    def expected_s(self, session: int, load: Load) -> float:
        layers, tail, _, _ = self.held[session]
        others, seen = 0.0, 0.0
        for other, (count, _, _, since_s) in self.held.items():
            fresh = max(0.0, 1 - (self.now - since_s) / WINDOW_S)
            if other == session:
                seen = count / LAYERS * (1 - fresh)
            else:
                others += count / LAYERS * fresh
        rows = max(0.0, load.rows - seen)
        read_s, row_s = SPEED.decode_layer_s, SPEED.row_layer_s
        wait_s = others * layers / 2 * (row_s + max(0.0, 1 - rows) * read_s)
        compute_s = layers * (read_s + (rows + others) * row_s)
        return load.queue_s + wait_s + compute_s + (SPEED.head_s if tail else 0.0)

    def broken(self, load: Load) -> set[int]:
        return {
            session
            for session, (_, _, step_s, _) in self.held.items()
            if step_s and self.expected_s(session, load) > step_s * (1 + ROOM)
        }

    @rule(
        session=st.integers(0, 9),
        layers=st.integers(1, LAYERS),
        tail=st.booleans(),
        share=st.sampled_from([0.0, 0.9, 1.0, 1.3, 2.0, 5.0]),
        load=loads,
    )
    def ask(self, session: int, layers: int, tail: bool, share: float, load: Load) -> None:
        step_s = share * expected_step_s(SPEED, load, layers, tail=tail)
        before = dict(self.held)
        since_s = self.held.get(session, (0, False, 0.0, self.now))[3]
        self.held[session] = layers, tail, step_s, since_s
        broken = self.broken(load)
        breach = self.promises.admit(session, layers, tail, step_s, SPEED, load, self.now)
        if breach is None:
            assert not broken
            self.resting.pop(session, None)
            return
        assert broken
        assert breach.code == ("slow" if session in broken else "busy")
        self.held = before

    @rule(session=st.integers(0, 9))
    def close(self, session: int) -> None:
        self.held.pop(session, None)
        self.resting.pop(session, None)
        self.promises.release(session)

    @rule(session=st.integers(0, 9))
    def rest(self, session: int) -> None:
        if session in self.held:
            self.resting[session] = self.held.pop(session)
        self.promises.rest(session)

    @rule(session=st.integers(0, 9))
    def wake(self, session: int) -> None:
        if session in self.resting:
            self.held[session] = (*self.resting.pop(session)[:3], self.now)
        self.promises.wake(session, self.now)

    @rule(seconds=st.sampled_from([0.0, 0.5, 3.0, 9.5, 60.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @invariant()
    def the_books_agree(self) -> None:
        assert len(self.promises) == len(self.held) + len(self.resting)
        fresh = sum(
            layers / LAYERS * max(0.0, 1 - (self.now - since_s) / WINDOW_S)
            for layers, _, _, since_s in self.held.values()
        )
        told = self.promises.foreseen(SPEED, IDLE, 4, self.now)
        assert told.rows == pytest.approx(fresh)


Ledger.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestLedger = Ledger.TestCase
