"""A session's machine through losses: events in, instructions out, no stage behind it.

With real stages: `test_mended_rings.py`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hexswarm.errors import (
    HexswarmError,
    LocalProtocolError,
    PeerLost,
    Refused,
    RemoteProtocolError,
    SessionClosed,
)
from hexswarm.instructions import (
    Broken,
    Connect,
    Draining,
    Emit,
    EmitLogits,
    EmitProgress,
    Fail,
    Instruction,
    Mend,
    Mended,
    Send,
    Turn,
)
from hexswarm.messages import (
    AskProgress,
    Close,
    Failed,
    Generate,
    GoAway,
    Logits,
    Message,
    Open,
    Opened,
    Progress,
    Refuse,
    Resume,
    Token,
    Tokens,
)
from hexswarm.orders import ids_to_bytes
from hexswarm.records import PeerId, Route, Sampling, Span, Stage
from hexswarm.session import Session
from hexswarm.wire import Frame

A, B, C, D, E = (PeerId(name) for name in "ABCDE")
SPANS = (Span(0, 2), Span(2, 4), Span(4, 6))
KEY = bytes(range(16))
PROMPT = (5, 6, 7, 8)
LOST = PeerLost(B, (2, 4), "is silent")


def route(*peers: PeerId, spans: Sequence[Span] = SPANS) -> Route:
    return Route(tuple(Stage(p, s, ("/x",)) for p, s in zip(peers, spans, strict=True)), 0.0, 0.0)


def say(
    session: Session, peer: PeerId, message: Message, payload: bytes = b""
) -> list[Instruction]:
    return session.on_frame(peer, Frame(message, payload))


def grant(session: Session, peer: PeerId, cached: int = 0, journal: int = 0) -> list[Instruction]:
    return say(session, peer, Opened(KEY, session.epoch, 64, cached=cached, journal=journal))


def grant_all(session: Session, **cached: int) -> list[Instruction]:
    """Every stage opens; what was made when the last one did."""
    made: list[Instruction] = []
    for stage in session.route.stages:
        made = grant(session, stage.peer, cached.get(stage.peer, 0))
    return made


def token(
    session: Session, value: int = 1, peer: PeerId = C, **fields: object
) -> list[Instruction]:
    position, finish = fields.get("position", len(session.cached)), fields.get("finish", "")
    epoch = fields.get("epoch", session.epoch)
    message = Token(KEY, epoch, session.turn, position, value, finish)  # type: ignore[arg-type]
    return say(session, peer, message)


def opened(*, client_loop: bool = False) -> Session:
    session = Session(KEY, route(A, B, C), "digest", 64, client_loop=client_loop)
    session.start()
    grant_all(session)
    return session


def running(tokens: int = 2, *, penalty: float = 1.0) -> Session:
    """A turn with so many tokens of twenty."""
    session = opened()
    sampling = Sampling(repetition_penalty=penalty)
    session.generate(Turn(0, PROMPT, 20, sampling, (99,), PROMPT))
    for value in range(tokens):
        token(session, value)
    return session


def failed(session: Session, code: str, about: str = "") -> Failed:
    return Failed(KEY, session.epoch, code, "so it is", about)


# --- what breaks a turn ---------------------------------------------------------------------------


def test_a_lost_link_breaks_a_running_turn_and_nothing_else_happens() -> None:
    session = running()
    assert session.on_lost(B, "vanished") == [Broken(frozenset({B}))]
    assert session.on_lost(B, "vanished") == []
    assert (session.running, session.mending, session.failed) == (True, True, None)
    why = session.broken[B]
    assert isinstance(why, PeerLost)
    assert why.layers == (2, 4)
    assert session.on_lost(A, "vanished") == [Broken(frozenset({A, B}))]
    assert session.on_lost(D, "is a stranger") == []
    assert session.epoch == 0


def test_a_verdict_counts_like_a_lost_link_but_only_in_a_running_turn() -> None:
    session = running()
    assert session.suspect(D, LOST) == []
    assert session.suspect(B, LOST) == [Broken(frozenset({B}))]
    assert session.broken == {B: LOST}
    idle = opened()
    assert idle.suspect(B, LOST) == []
    assert not idle.broken


CODES = ["lost", "gap", "full", "input", "conflict", "engine", "expired", "unknown", "draining"]


@pytest.mark.parametrize("code", CODES)
def test_a_failing_stage_breaks_the_turn(code: str) -> None:
    session = running()
    assert say(session, B, failed(session, code, B)) == [Broken(frozenset({B}))]
    assert say(session, A, replace(failed(session, code, A), epoch=1)) == [], "of another epoch"


@pytest.mark.parametrize("code", ["lost", "unknown"])
def test_a_neighbours_report_breaks_whom_it_is_about(code: str) -> None:
    session = running()
    assert say(session, A, failed(session, code, B)) == [Broken(frozenset({B}))]
    assert say(session, B, failed(session, code, A)) == [], "the accused accuses nobody"
    assert say(session, C, failed(session, code, B)) == []
    assert set(session.broken) == {B}


def test_a_tail_out_of_order_breaks_and_what_it_repeats_is_passed_over() -> None:
    session = running(3)
    assert token(session, 0, position=4) == []
    assert token(session, 2, position=6) == []
    assert token(session, 9, position=6) == [Broken(frozenset({C}))]
    assert isinstance(session.broken[C], RemoteProtocolError)
    skipping = running(3)
    assert token(skipping, 3, position=8) == [Broken(frozenset({C}))]
    assert token(skipping, 3) == [], "it is not listened to any more"


def test_between_turns_and_while_opening_a_loss_ends_the_session() -> None:
    session = running()
    token(session, 4, finish="stop")
    *_, fail = session.on_lost(B, "vanished")
    assert isinstance(fail, Fail)
    assert isinstance(fail.error, PeerLost)
    for code in CODES:
        idle = opened()
        *_, fail = say(idle, B, failed(idle, code, B))
        assert isinstance(fail, Fail)
    opening = Session(KEY, route(A, B, C), "digest", 64)
    opening.start()
    *_, fail = opening.on_lost(B, "cannot be reached")
    assert isinstance(fail, Fail)
    assert opening.refusing == {B}


# --- whose fault it is ----------------------------------------------------------------------------


@pytest.mark.parametrize("code", ["engine", "input"])
def test_a_failure_that_follows_us_to_another_peer_is_ours(code: str) -> None:
    session = running()
    say(session, B, failed(session, code))
    session.reroute(route(A, D, C))
    grant_all(session, A=6, C=5)
    closing = say(session, D, failed(session, code))
    assert [made.peer for made in closing if isinstance(made, Send)] == [A, D, C]
    error = session.failed
    assert isinstance(error, Refused)
    assert (error.peer, error.code) == (D, code)


def test_a_failure_elsewhere_or_of_the_same_peer_is_not_ours() -> None:
    session = running()
    say(session, B, failed(session, "engine"))
    assert say(session, A, failed(session, "engine")) == [Broken(frozenset({A, B}))], "same epoch"
    session.reroute(route(D, E, C))
    grant_all(session)
    token(session, 7)
    assert say(session, E, failed(session, "engine")) == [Broken(frozenset({E}))], "another place"
    session.reroute(route(D, E, C))
    grant_all(session)
    assert say(session, E, failed(session, "engine")) == [Broken(frozenset({E}))], "the same peer"
    session.reroute(route(D, B, C))
    grant_all(session)
    assert say(session, B, failed(session, "full")) == [Broken(frozenset({B}))], "no doubt there"


# --- another route --------------------------------------------------------------------------------


def test_a_reroute_rewires_who_stays_connects_who_comes_and_closes_who_left() -> None:
    session = running()
    session.on_lost(B, "vanished")
    close, head, new, tail = session.reroute(route(A, D, C), (0.1, 0.2, 0.3))
    assert close == Send(B, Close(KEY))
    assert isinstance(head, Send)
    assert isinstance(new, Connect)
    assert isinstance(tail, Send)
    messages = [head.message, new.message, tail.message]
    wired = []
    for message in messages:
        assert isinstance(message, Open)
        assert (message.epoch, message.kv_tokens, message.session) == (1, 64, KEY)
        wired.append((message.predecessor, message.successor, message.span, message.step_s))
    steps_s = (0.1, 0.2, 0.3)
    ends = ((C, D), (A, C), (D, A))
    assert wired == [(*e, s, t) for e, s, t in zip(ends, SPANS, steps_s, strict=True)]
    assert new.stage.peer == D
    assert (session.epoch, session.broken, session.mending) == (1, {}, True)
    assert [stage.peer for stage in session.silent] == [A, D, C]


def test_when_all_have_opened_each_is_told_where_to_go_on() -> None:
    session = running(2)
    session.on_lost(B, "vanished")
    session.reroute(route(A, D, C))
    assert grant(session, A, 6, 0) == []
    assert grant(session, C, 5, 5) == []
    made = grant(session, D)
    generate, *resumes, mended = made
    assert isinstance(generate, Send)
    assert generate.peer == C
    assert isinstance(generate.message, Generate)
    assert (generate.message.epoch, generate.message.turn) == (1, 0)
    assert (generate.message.max_new, generate.message.stop_ids) == (18, (99,))
    assert generate.payload == b""
    assert resumes == [
        Send(A, Resume(KEY, 1, 0, 6, 0, 6)),
        Send(D, Resume(KEY, 1, 0, 0, 5, 6)),
        Send(C, Resume(KEY, 1, 0, 5, 5, 6)),
    ]
    assert mended == Mended(1)
    assert not session.mending
    assert session.mends == (Mend((B,), 6, 1),)
    assert token(session, 7) == [Emit(7, 6, "")]


def test_a_new_head_gets_all_ids_and_a_new_tail_the_history_it_needs() -> None:
    session = running(2, penalty=1.5)
    session.on_lost(A, "vanished")
    session.on_lost(C, "vanished")
    session.reroute(route(D, B, E))
    generate, *_, feed, mended = grant_all(session, B=6)
    ids = [*PROMPT, 0, 1]
    assert isinstance(generate, Send)
    assert (generate.peer, generate.payload) == (E, ids_to_bytes(ids))
    assert feed == Send(D, Tokens(KEY, 1, 0, 0, True), ids_to_bytes(ids))
    assert mended == Mended(1)
    assert session.mends == (Mend((A, C), 6, 1),)


def test_a_broken_peer_may_be_asked_again() -> None:
    """It restarted, or was suspected wrongly: what it still has is used."""
    session = running(2)
    session.suspect(B, LOST)
    first, second, third = session.reroute(route(A, B, C))
    assert isinstance(first, Send)
    assert isinstance(second, Connect), "perhaps its link is gone"
    assert isinstance(third, Send)
    made = grant_all(session, A=6, B=6, C=5)
    assert Send(B, Resume(KEY, 1, 0, 6, 5, 6)) in made


def test_a_peer_that_shall_serve_other_layers_begins_anew() -> None:
    session = running(2)
    session.on_lost(B, "vanished")
    wide = route(A, C, spans=(Span(0, 3), Span(3, 6)))
    made = session.reroute(wide)
    assert made[:3] == [Send(A, Close(KEY)), Send(B, Close(KEY)), Send(C, Close(KEY))]
    assert [connect.stage.peer for connect in made if isinstance(connect, Connect)] == [A, C]
    assert token(session, 7, epoch=0) == [], "of the tail that it was"


def test_stages_that_are_well_are_replaced_in_a_running_turn() -> None:
    session = running(2)
    made = session.reroute(route(A, D, C))
    assert made[0] == Send(B, Close(KEY))
    assert session.mending
    assert token(session, 2, epoch=0) == [Emit(2, 6, "")]
    grant_all(session, A=7, C=6)
    assert session.mends == (Mend((B,), 7, 1),)


def test_our_own_mistakes_are_named() -> None:
    session = running()
    for other in (route(A, spans=(Span(0, 5),)), route(A, B, spans=(Span(0, 2), Span(2, 7)))):
        with pytest.raises(LocalProtocolError, match="layers"):
            session.reroute(other)
    with pytest.raises(LocalProtocolError, match="budget"):
        session.reroute(route(A, B, C), (0.1,))
    with pytest.raises(LocalProtocolError, match="running"):
        opened().reroute(route(A, D, C))
    assert session.epoch == 0
    session.close()
    assert session.reroute(route(A, D, C)) == [], "the listener learns from its next event"
    assert session.suspect(A, LOST) == session.give_up(LOST) == []


def test_giving_up_ends_it_everywhere() -> None:
    session = running()
    session.on_lost(B, "vanished")
    *closing, fail = session.give_up(LOST)
    assert closing == [Send(peer, Close(KEY)) for peer in (A, B, C)]
    assert fail == Fail(LOST)
    assert (session.failed, session.running, session.mending) == (LOST, False, False)
    assert say(session, C, failed(session, "engine")) == session.on_lost(A, "") == []


# --- losses during a repair -----------------------------------------------------------------------


def test_what_breaks_during_a_repair_is_said_again() -> None:
    session = running()
    session.on_lost(B, "vanished")
    session.reroute(route(A, D, C))
    assert session.on_lost(B, "vanished") == [], "it has left the route"
    refuse = Refuse(KEY, 1, "full", "KV is full", 2.0)
    assert say(session, D, refuse) == [Broken(frozenset({D}))]
    assert isinstance(session.broken[D], Refused)
    assert session.refusing == {D}
    assert session.on_lost(A, "vanished") == [Broken(frozenset({A, D}))]
    assert grant(session, C, 5, 5) == [], "nothing goes on before another route"
    first = session.reroute(route(B, E, C))
    assert first[:2] == [Send(A, Close(KEY)), Send(D, Close(KEY))]
    assert say(session, C, Opened(KEY, 1, 64, cached=5)) == [], "of the last attempt"
    made = grant_all(session, C=5)
    assert made[-1] == Mended(2)
    assert session.mends == (Mend((B, A, D), 6, 2),)


def test_two_repairs_in_one_turn_tell_each_whom_it_replaced() -> None:
    session = running(2)
    session.on_lost(B, "vanished")
    session.reroute(route(A, D, C))
    grant_all(session, A=6, C=5)
    assert token(session, 7) == [Emit(7, 6, "")]
    session.on_lost(A, "vanished")
    session.reroute(route(E, D, C))
    assert grant_all(session, D=6, C=6)[-1] == Mended(2)
    assert session.mends == (Mend((B,), 6, 1), Mend((A,), 7, 2))


def test_a_stage_that_opened_and_was_lost_is_not_gone_on_with() -> None:
    session = running()
    session.on_lost(B, "vanished")
    session.reroute(route(A, D, C))
    grant(session, A, 6)
    grant(session, D)
    assert session.on_lost(D, "vanished") == [Broken(frozenset({D}))]
    assert grant(session, C, 5, 5) == []
    assert session.mending


def test_a_way_that_cannot_be_opened_in_a_repair_is_blamed_on_its_far_end() -> None:
    session = running()
    session.on_lost(B, "vanished")
    session.reroute(route(A, D, C))
    refuse = Refuse(KEY, 1, "unreachable", "", 0.0)
    assert say(session, A, refuse) == [Broken(frozenset({D}))]
    error = session.broken[D]
    assert isinstance(error, PeerLost)
    assert error.layers == (2, 4)


def test_a_reservation_that_ends_in_a_repair_blames_whom_it_waited_for() -> None:
    session = running()
    session.on_lost(B, "vanished")
    session.reroute(route(A, D, C))
    grant(session, A, 6)
    grant(session, D)
    assert say(session, D, failed(session, "expired", D)) == [Broken(frozenset({C}))]


# --- tokens, each once ----------------------------------------------------------------------------


def test_a_tail_that_stays_may_send_what_it_had_chosen_before_it_heard() -> None:
    session = running(2)
    session.on_lost(B, "vanished")
    assert token(session, 2) == [Emit(2, 6, "")], "while nobody knows how to go on"
    session.reroute(route(A, D, C))
    assert token(session, 3, epoch=0) == [Emit(3, 7, "")]
    grant(session, C, 7, 7)
    assert token(session, 4, epoch=0) == [], "after its answer it cannot come"
    grant(session, A, 8)
    made = grant(session, D)
    assert Send(C, Resume(KEY, 1, 0, 7, 7, 8)) in made
    assert token(session, 4, epoch=0) == []
    assert token(session, 4) == [Emit(4, 8, "")]


def test_a_tail_that_left_is_not_listened_to() -> None:
    session = running(2)
    session.suspect(C, LOST)
    assert token(session, 2) == []
    session.reroute(route(A, B, D))
    assert token(session, 2, epoch=0) == []
    assert token(session, 2, peer=D, epoch=0) == [], "it was no tail then"
    session.suspect(A, LOST)
    session.reroute(route(E, B, D))
    assert token(session, 2, peer=D, epoch=0) == []
    assert token(session, 2, peer=D, epoch=1) == [Emit(2, 6, "")]


@pytest.mark.parametrize("rerouted", [False, True])
def test_a_turn_that_ends_during_a_repair_takes_the_session_with_it(rerouted: bool) -> None:
    session = running(2)
    session.on_lost(B, "vanished")
    if rerouted:
        session.reroute(route(A, D, C))
    emit, *closing, fail = token(session, 2, epoch=0, finish="stop")
    assert emit == Emit(2, 6, "stop")
    assert len(closing) == 3
    assert isinstance(fail, Fail)
    assert isinstance(fail.error, SessionClosed)
    assert not session.mending
    assert grant(session, A, 6) == []


def test_cancelling_during_a_repair_ends_the_session_too() -> None:
    session = running(2)
    session.on_lost(B, "vanished")
    emit, *_, fail = session.cancel()
    assert isinstance(emit, Emit)
    assert emit.finish == "cancelled"
    assert isinstance(fail, Fail)
    assert isinstance(fail.error, SessionClosed)


def test_the_kv_of_another_turn_is_not_taken_for_this_ones() -> None:
    """A stage that had not heard of the turn when a loss came holds what an earlier one left."""
    session = running(5)
    session.cancel()
    session.generate(Turn(6, (50, 51), 20, Sampling(), (), (*PROMPT, 0, 1, 50, 51)))
    session.on_lost(A, "vanished")
    session.reroute(route(D, B, C))
    made = grant_all(session, B=9, C=9)
    assert Send(B, Resume(KEY, 1, 1, 6, 6, 8)) in made
    assert Send(C, Resume(KEY, 1, 1, 6, 6, 8)) in made
    session.on_lost(B, "vanished")
    session.reroute(route(D, E, C))
    made = grant_all(session, D=8, C=7)
    assert Send(C, Resume(KEY, 2, 1, 7, 7, 8)) in made, "by then all had heard of it"


@pytest.mark.parametrize("cancelled", [False, True])
def test_a_turn_that_begins_inside_what_stages_may_hold_trusts_its_start_alone(
    cancelled: bool,
) -> None:
    """They may hold more than is cached if the last turn was cancelled; else if this one crops."""
    session = running(5)
    if cancelled:
        session.cancel()
    else:
        token(session, 5, finish="stop")
    position = len(session.cached) - (not cancelled)
    session.generate(Turn(position, (50, 51), 20, Sampling(), ()))
    session.on_lost(A, "vanished")
    session.reroute(route(D, B, C))
    made = grant_all(session, B=30, C=30)
    end = position + 2
    assert Send(B, Resume(KEY, 1, 1, position, position, end)) in made


def test_only_what_came_through_every_stage_is_kept_by_a_cancel() -> None:
    """The first token after a repair may come from a journal, before the newcomer is that far."""
    for tokens, kept in ((0, 0), (1, 0), (2, 7)):
        session = running(2)
        session.on_lost(A, "vanished")
        session.reroute(route(D, B, C))
        grant_all(session, B=6, C=5)
        for value in range(tokens):
            token(session, value)
        session.cancel()
        assert len(session.cached) == kept


NAMES = st.sampled_from([A, B, C, D, E])
EVENTS = st.one_of(
    st.tuples(st.just("token"), NAMES, st.integers(-2, 1), st.integers(-2, 0)),
    st.tuples(st.just("lost"), NAMES, st.just(0), st.just(0)),
    st.tuples(st.just("open"), NAMES, st.integers(0, 12), st.integers(-1, 0)),
    st.tuples(st.just("route"), st.just(A), st.integers(0, 5), st.just(0)),
    st.tuples(st.just("fail"), NAMES, st.integers(0, 8), st.integers(-1, 0)),
)


@settings(max_examples=400)
@given(st.lists(EVENTS, max_size=40))
def test_no_token_is_told_twice_or_skipped(events: list[tuple[str, PeerId, int, int]]) -> None:
    """Whatever comes from whom in whatever order: positions count up by one, told is what is
    remembered, a turn that is broken always says so, and nothing is sent to it but `Open`."""
    session = running(0)
    told: list[int] = []
    for what, peer, number, age in events:
        was_broken = set(session.broken)
        for made in happen(session, what, peer, number, age):
            if isinstance(made, Emit) and made.token is not None:
                assert made.position == len(PROMPT) + len(told)
                told.append(made.token)
            if isinstance(made, Broken):
                assert made.peers == set(session.broken) > was_broken
        if session.failed is None:
            assert session.cached == [*PROMPT, *told]
            assert session.mending or not session.broken
            assert set(session.broken) <= {stage.peer for stage in session.route.stages}


def happen(session: Session, what: str, peer: PeerId, number: int, age: int) -> list[Instruction]:
    epoch = max(0, session.epoch + age)
    match what:
        case "token":
            value = random.Random(len(session.cached) + number).randrange(90)
            return token(session, value, peer, position=len(session.cached) + number, epoch=epoch)
        case "lost":
            return session.on_lost(peer, "vanished")
        case "open":
            return say(session, peer, Opened(KEY, epoch, 64, cached=number, journal=number // 2))
        case "route" if session.running:
            peers = random.Random(number).sample([A, B, C, D, E], 3)
            return session.reroute(route(*peers))
        case "fail":
            return say(session, peer, Failed(KEY, epoch, CODES[number], "", ""))
    return []


# --- the client loop ------------------------------------------------------------------------------


def logits(session: Session, position: int, epoch: int | None = None) -> list[Instruction]:
    at = session.epoch if epoch is None else epoch
    return say(session, C, Logits(KEY, at, session.turn, position), bytes(8))


def test_in_the_client_loop_a_token_chosen_during_a_repair_waits_for_its_end() -> None:
    session = opened(client_loop=True)
    session.generate(Turn(0, PROMPT, 20, Sampling(), ()))
    assert logits(session, 4) == [EmitLogits(bytes(8), 4)]
    session.on_lost(B, "vanished")
    assert session.feed(9) == []
    session.reroute(route(A, D, C))
    made = grant_all(session, A=4, C=4)
    assert not any(isinstance(m, Send) and isinstance(m.message, Generate) for m in made)
    assert Send(A, Tokens(KEY, 1, 0, 4, True), ids_to_bytes([9])) in made
    assert logits(session, 5, 0) == []
    assert logits(session, 5) == [EmitLogits(bytes(8), 5)]


def test_logits_that_a_repair_repeats_are_told_once() -> None:
    session = opened(client_loop=True)
    session.generate(Turn(0, PROMPT, 20, Sampling(), ()))
    logits(session, 4)
    session.on_lost(B, "vanished")
    session.reroute(route(A, D, C))
    grant_all(session, A=4, C=4)
    assert logits(session, 4) == [], "the caller has them and thinks"
    session.feed(9)
    assert logits(session, 4) == []
    assert logits(session, 5) == [EmitLogits(bytes(8), 5)]
    assert logits(session, 7) == [Broken(frozenset({C}))]


# --- news without a loss --------------------------------------------------------------------------


def test_who_drains_in_a_running_turn_is_told_and_may_be_left() -> None:
    session = running(1)
    assert say(session, B, GoAway(12.0)) == [Draining(B, 12.0)]
    assert session.leaving
    assert not session.broken
    session.reroute(route(A, D, C))
    grant_all(session)
    assert not session.leaving
    assert token(session, 3, finish="stop") == [Emit(3, 5, "stop")]
    assert session.failed is None
    staying = running(1)
    say(staying, B, GoAway(12.0))
    *_, fail = token(staying, 3, finish="stop")
    assert isinstance(fail, Fail)


def progress(session: Session, nonce: int, done: int = 3) -> Progress:
    return Progress(KEY, session.epoch, nonce, done, done, 0.01)


def test_progress_is_asked_of_those_that_are_not_broken() -> None:
    session = running()
    session.suspect(B, LOST)
    assert session.ask_progress() == [Send(p, AskProgress(KEY, 0, 1)) for p in (A, C)]
    assert say(session, A, progress(session, 1)) == []
    assert say(session, B, progress(session, 1)) == []
    assert say(session, C, progress(session, 1, 5)) == [EmitProgress()]
    assert {peer: told.done for peer, told in session.progress.items()} == {A: 3, C: 5}
    session.ask_progress()
    assert session.progress == {}
    assert say(session, A, progress(session, 1)) == [], "late"
    assert say(session, D, progress(session, 2)) == [], "a stranger"
    session.give_up(LOST)
    assert session.ask_progress() == []


def test_errors_keep_their_words() -> None:
    session = running()
    error: HexswarmError = PeerLost(B, (2, 4), "has been silent for 2 s")
    session.suspect(B, error)
    assert session.broken[B] is error
