"""Sums of a turn: what is prompt and what decode, whose time is whose, who may ask."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hexswarm.messages import Cancel, Generate, Hidden, Open, Tokens, Trace, Traced
from hexswarm.peer.actions import Action, Report, Send
from hexswarm.peer.stage import StageTable
from hexswarm.peer.steps import Activations, Result, Row
from hexswarm.peer.tracing import UNMEASURED_S, Account
from hexswarm.records import PeerId
from hexswarm.wire import Frame
from tests.loopback import CLIENT, MODEL, Loopback

KEY = b"k" * 16
PREVIOUS, NEXT, STRANGER = PeerId("previous"), PeerId("next"), PeerId("stranger")
MIDDLE = Open(KEY, 0, MODEL, 2, 4, PREVIOUS, NEXT, (), 64)
GENERATE = Generate(KEY, 0, 0, 4, (), 0.0, 1.0, 0, 0.0, 1.0, 0)


def row(position: int, count: int = 1, *, sample: bool = True, turn: int = 0) -> Row:
    return Row(KEY, position, count, None, sample, (), turn)


def hidden(made: Row, **spent: float) -> Result:
    data = Activations(bytes(4 * made.count), "float32")
    return replace(Result(made, activations=data), **spent)  # type: ignore[arg-type]


times = st.floats(0.0, 10.0)
steps = st.lists(st.tuples(times, times, times, st.integers(1, 9)), min_size=1, max_size=20)


@given(steps, st.integers(0, 3))
def test_the_parts_of_decode_steps_add_up_to_their_residence(
    visits: list[tuple[float, float, float, int]], pieces: int
) -> None:
    """Whatever the prompt cost before."""
    account = Account()
    for piece in range(pieces):
        account.arrived_s = 1.0
        last = piece == pieces - 1
        made = hidden(row(8 * piece, 8, sample=last), wait_s=0.25, compute_s=0.5)
        assert not account.finished(made, 2.0)
    if not pieces:
        account.finished(hidden(row(0)), 0.0)
    now, residence_s = 3.0, 0.0
    for wait_s, compute_s, handle_s, rows in visits:
        account.arrived_s = now
        spent_s = wait_s + compute_s + handle_s
        made = Result(row(30), wait_s=wait_s, compute_s=compute_s, batch_rows=rows)
        assert account.finished(made, now + spent_s)
        now += spent_s + 0.1
        residence_s += spent_s
    told = account.told(Trace(KEY, 0, 7), 0.01)
    assert told.steps == len(visits)
    assert told.wait_s + told.compute_s + told.handle_s == pytest.approx(residence_s, abs=1e-9)
    assert told.handle_s == pytest.approx(sum(visit[2] for visit in visits), abs=1e-9)
    assert told.rows == pytest.approx(sum(visit[3] for visit in visits) / len(visits))
    assert (told.prompt_wait_s, told.prompt_compute_s) == (0.25 * pieces, 0.5 * pieces)
    assert told.successor_rtt_s == 0.01
    assert told.nonce == 7


def test_a_clock_that_disagrees_gives_no_negative_time() -> None:
    """An engine that says more than passed must not make a frame that cannot be sent."""
    account = Account()
    account.finished(hidden(row(0)), 0.0)
    account.arrived_s = 5.0
    account.finished(hidden(row(1), wait_s=1.0, compute_s=1.0), 5.5)
    assert account.told(Trace(KEY, 0), 0.0).handle_s == 0.0


def opened(message: Open) -> StageTable:
    """A stage of CLIENT in a peer of all six layers."""
    swarm = Loopback((0, 6))
    swarm.say(CLIENT, "p0", message)
    table = swarm.hosts[PeerId("p0")].table
    table.dialled(KEY, 0, True, 0.0)
    return table


def ask(table: StageTable, who: PeerId = CLIENT, epoch: int = 0) -> list[Action]:
    return table.on_frame(who, Frame(Trace(KEY, epoch)), 99.0)


def traced(table: StageTable) -> Traced:
    (action,) = ask(table)
    assert isinstance(action, Send | Report)
    assert isinstance(action.message, Traced)
    return action.message


def arrive(table: StageTable, now: float, position: int, count: int = 1, turn: int = 0) -> None:
    message = Hidden(KEY, 0, turn, position, count, True, "float32")
    assert table.on_frame(PREVIOUS, Frame(message, bytes(4 * count)), now)


def test_only_the_client_of_the_session_is_told() -> None:
    table = opened(MIDDLE)
    (report,) = ask(table)
    assert report == Report(CLIENT, Traced(KEY, 0, 0, *[0.0] * 6, UNMEASURED_S), NEXT)
    for who in (STRANGER, PREVIOUS, NEXT):
        assert ask(table, who) == []
    assert ask(table, epoch=1) == []
    assert ask(StageTable(table._hosted, table._ledger)) == []


def test_a_way_to_oneself_takes_no_time_and_none_is_not_measured() -> None:
    for successor, rtt_s in (("p0", 0.0), ("", UNMEASURED_S)):
        table = opened(replace(MIDDLE, first=4, end=6, successor=successor))
        (send,) = ask(table)
        assert isinstance(send, Send)
        assert isinstance(send.message, Traced)
        assert send.message.successor_rtt_s == rtt_s


def test_a_stage_counts_from_arrival_until_its_frames_are_out() -> None:
    table = opened(MIDDLE)
    arrive(table, 1.0, 0, 8)
    table.on_results([hidden(row(0, 8), wait_s=0.5, compute_s=1.0)], 3.0)
    table.sent(3.5)
    arrive(table, 10.0, 8)
    made = hidden(row(8), wait_s=0.25, compute_s=0.5, batch_rows=4)
    table.on_results([made, hidden(replace(row(8), session=b"?" * 16))], 11.0)
    table.sent(11.125)
    table.sent(99.0)
    assert traced(table) == Traced(KEY, 0, 1, 0.25, 0.5, 0.375, 0.5, 1.0, 4.0, UNMEASURED_S)


def test_a_new_turn_begins_new_sums_and_late_results_count_for_none() -> None:
    table = opened(MIDDLE)
    arrive(table, 0.0, 0)
    table.on_results([hidden(row(0), compute_s=1.0)], 1.0)
    arrive(table, 2.0, 1)
    table.on_frame(CLIENT, Frame(Cancel(KEY, 0, 0)), 2.5)
    table.on_results([hidden(row(1), compute_s=1.0)], 3.0)
    table.on_results([Result(row(1), error="no")], 3.0)
    assert traced(table).steps == 0
    assert traced(table).prompt_compute_s == 1.0
    arrive(table, 4.0, 1, turn=1)
    assert traced(table).prompt_compute_s == 0.0
    table.on_results([hidden(row(1, turn=1), compute_s=2.0)], 6.0)
    assert (traced(table).steps, traced(table).prompt_compute_s) == (0, 2.0)


def test_opening_again_keeps_the_sums() -> None:
    table = opened(MIDDLE)
    arrive(table, 0.0, 0)
    table.on_results([hidden(row(0), compute_s=1.0)], 1.0)
    table.on_frame(CLIENT, Frame(replace(MIDDLE, kv_tokens=80)), 2.0)
    assert traced(table).prompt_compute_s == 1.0


def test_a_ring_of_one_begins_the_next_step_where_the_last_ended() -> None:
    """Telling the client lies beside the ring, not in it."""
    table = opened(Open(KEY, 0, MODEL, 0, 6, "p0", "p0", (), 64))
    table.on_frame(CLIENT, Frame(GENERATE), 0.0)
    table.on_frame(CLIENT, Frame(Tokens(KEY, 0, 0, 0, True), bytes(4)), 0.0)
    for step in range(3):
        made = Result(row(step), token=5, wait_s=0.25, compute_s=0.5)
        table.on_results([made], float(step + 1))
        table.sent(step + 1.5)
    told = traced(table)
    assert (told.steps, told.wait_s, told.compute_s, told.handle_s) == (2, 0.5, 1.0, 0.5)
