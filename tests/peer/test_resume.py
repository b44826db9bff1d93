"""A stage whose neighbour was lost: what it keeps, what it sends again, and what it refuses.

One stage alone; whoever talks to it is made up. Whole rings that lose stages are in
`swarm/test_session.py`.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hexswarm.guests import BACKLOG_BYTES, PARTNER_BACKLOG_BYTES
from hexswarm.messages import (
    AskProgress,
    Cancel,
    Close,
    Failed,
    Generate,
    Hidden,
    Message,
    Open,
    Opened,
    Progress,
    Refuse,
    Resume,
    Token,
    Tokens,
)
from hexswarm.peer.actions import BULK, STEP, Action, Dial, Drop, Send, Submit
from hexswarm.peer.admission import Hosted
from hexswarm.peer.cache import BlockTables
from hexswarm.peer.journal import MOST_EACH_BYTES, Journal
from hexswarm.peer.leases import Lease
from hexswarm.peer.order import REMEMBERED
from hexswarm.peer.resume import (
    AGAIN_S,
    ALL_BYTES,
    CLIENT_BYTES,
    NEIGHBOUR_BYTES,
    REPEAT_BYTES,
    REPLAY_BYTES,
    REPLAYS,
    Allowance,
)
from hexswarm.peer.sessions import StageSession
from hexswarm.peer.stage import StageTable
from hexswarm.peer.steps import Activations, Result, Row, Step
from hexswarm.records import Load, PeerId, Span
from hexswarm.wire import Frame

KEY, MODEL = b"k" * 16, "ab" * 32
CLIENT, PREVIOUS, NEXT, OTHER = map(PeerId, ("client", "previous", "next", "other"))
MIDDLE = Open(KEY, 0, MODEL, 2, 4, PREVIOUS, NEXT, (), 512)
TAIL = replace(MIDDLE, first=4, end=6)
HEAD = replace(MIDDLE, first=0, end=2)
GENERATE = Generate(KEY, 0, 0, 4, (), 0.0, 1.0, 0, 0.0, 1.0, 0)


class Ledger:
    """KV for one session after the other."""

    def __init__(self) -> None:
        self.tables = BlockTables(64, lease_s=60.0)
        self.now = 0.0

    def open(
        self, session: bytes, tokens: int, names: Sequence[Hashable] = (), *, publish: bool = True
    ) -> Lease:
        return self.tables.lease(session, tokens, self.now, names, publish=publish)

    def extend(self, session: bytes, tokens: int) -> object:
        return self.tables.extend(session, tokens, self.now)

    def close(self, session: bytes, names: Sequence[Hashable] = ()) -> bool:
        return self.tables.release(session, 0.0, names)

    def expire(self) -> list[bytes]:
        return []

    def load_now(self, *, prompts: bool = True) -> Load:
        return Load(0.0, 0.0, 0.0, self.tables.free_tokens)

    def speed_now(self) -> None:
        return None


class Stage:
    """A stage of all six layers of which every output row is its position, plus 1000 an epoch."""

    def __init__(self, opened: Open = MIDDLE, journal_bytes: int = 1 << 20) -> None:
        self.journal = Journal(journal_bytes)
        self.ledger = Ledger()
        hosted = Hosted(PeerId("p0"), MODEL, Span(0, 6), 6, 1)
        self.table = StageTable(hosted, self.ledger, self.journal)
        self.opened = opened
        self.now = 0.0
        self.waiting: list[Step] = []
        self.open(opened)

    def say(self, peer: PeerId, message: Message, payload: bytes = b"") -> list[Action]:
        made = self.table.on_frame(peer, Frame(message, payload), self.now)
        for action in made:
            if isinstance(action, Drop):
                self.waiting.clear()
                assert action.position is not None
                self.ledger.tables.rewind(KEY, action.position)
            elif isinstance(action, Submit):
                step = action.step
                self.ledger.tables.write(KEY, step.position, step.count, 0.0)
                self.waiting.append(step)
        return made

    def open(self, message: Open) -> Message:
        """And the way to the successor comes about."""
        made = self.say(CLIENT, message)
        if any(isinstance(action, Dial) for action in made):
            made += self.table.dialled(KEY, message.epoch, True, self.now)
        self.opened = message
        (answer,) = [action.message for action in made if isinstance(action, Send)]
        return answer

    def reopen(self, epoch: int = 1, successor: str = OTHER) -> Opened:
        answer = self.open(replace(self.opened, epoch=epoch, successor=successor))
        assert isinstance(answer, Opened)
        return answer

    def keeps(self, rows: int, row_bytes: int) -> None:
        """As if it had sent on as many large rows."""
        self.answer(0, 1)
        for position in range(rows):
            self.journal.keep(KEY, position, 1, bytes(row_bytes), "float32")
        self.table._sessions[KEY].order.done = rows
        self.ledger.tables.write(KEY, 1, rows - 1, self.now)

    def step(
        self, position: int, count: int = 1, last: bool = True, epoch: int = 0, salt: int = 0
    ) -> list[Action]:
        if self.opened.first == 0:
            payload = (position + salt).to_bytes(4, "little") * count
            return self.say(CLIENT, Tokens(KEY, epoch, 0, position, last), payload)
        message = Hidden(KEY, epoch, 0, position, count, last, "float32")
        return self.say(PREVIOUS, message, ids(position + salt, count))

    def compute(self, piece: int = 1 << 20) -> list[Action]:
        """All that waits, in rows of at most `piece` tokens."""
        made: list[Action] = []
        for step in self.waiting:
            for first in range(0, step.count, piece):
                made += self.finish(step, first, min(piece, step.count - first))
        self.waiting.clear()
        return made

    def ring(self) -> list[Action]:
        """One step of a ring of one: its end is the next one's beginning."""
        (step,) = self.waiting
        self.waiting.clear()
        made = self.finish(step, 0, step.count)
        self.waiting += [action.step for action in made if isinstance(action, Submit)]
        return made

    def finish(self, step: Step, first: int, count: int) -> list[Action]:
        position, sample = step.position + first, step.last and first + count == step.count
        row = Row(
            *(KEY, position, count, None, sample, (), step.turn, step.span, step.policy),
            epoch=step.epoch,
        )
        if self.opened.end < 6:
            data = ids(position + 1000 * step.epoch, count)
            return self.table.on_results([Result(row, Activations(data, "float32"))], 0.0)
        token = position + count if sample else None
        return self.table.on_results([Result(row, token=token)], 0.0)

    def answer(self, position: int, count: int = 1, last: bool = True) -> list[Send]:
        """Take a step, compute it, and see what goes out."""
        self.step(position, count, last)
        return sends(self.compute())

    @property
    def state(self) -> object:
        """All that a refusal must not touch."""
        session = self.table._sessions[KEY]
        order = session.order
        return (
            *(order.received, order.done, dict(order._known), session.turn, session.standing),
            *(self.ledger.tables.length(KEY), self.journal.end(KEY), self.journal.used_bytes),
            *(session.send_from, session.end, session.produced, list(self.waiting)),
        )

    @property
    def progress(self) -> tuple[int, int]:
        epoch = self.opened.epoch
        (send,) = sends(self.say(CLIENT, AskProgress(KEY, epoch, 7)))
        assert isinstance(send.message, Progress)
        assert (send.peer, send.message.nonce) == (CLIENT, 7)
        return send.message.received, send.message.done


def ids(position: int, count: int) -> bytes:
    return b"".join(i.to_bytes(4, "little") for i in range(position, position + count))


def sends(actions: list[Action]) -> list[Send]:
    return [action for action in actions if isinstance(action, Send)]


def failure(actions: list[Action]) -> str:
    (send,) = actions
    assert isinstance(send, Send)
    assert isinstance(send.message, Failed)
    assert send.peer == CLIENT
    return send.message.code


def spans(made: list[Send]) -> list[tuple[int, int, bool]]:
    out = []
    for send in made:
        assert isinstance(send.message, Hidden)
        out.append((send.message.position, send.message.count, send.message.last))
    return out


# --- rewiring -----------------------------------------------------------------------------------


def test_a_stage_tells_what_it_kept_and_forgets_what_it_did_not_do() -> None:
    stage = Stage()
    stage.answer(0, 8)
    stage.answer(8)
    stage.step(9)
    assert stage.progress == (10, 9)
    made = stage.say(CLIENT, replace(MIDDLE, epoch=1, successor=OTHER))
    assert Drop(KEY, 9) in made
    assert stage.ledger.tables.length(KEY) == 9
    (told,) = sends(stage.table.dialled(KEY, 1, True, 0.0))
    assert isinstance(told.message, Opened)
    assert (told.message.cached, told.message.journal, told.message.epoch) == (9, 0, 1)
    stage.opened = replace(MIDDLE, epoch=1)
    assert stage.progress == (9, 9)


@pytest.mark.parametrize("opened", [TAIL, replace(TAIL, successor="")])
def test_whoever_sends_no_activations_keeps_no_journal(opened: Open) -> None:
    stage = Stage(opened)
    stage.say(CLIENT, GENERATE)
    stage.answer(0, 8)
    assert stage.journal.used_bytes == 0
    told = stage.open(replace(stage.opened, epoch=1))
    assert isinstance(told, Opened)
    assert (told.cached, told.journal) == (8, 8)


def test_a_journal_that_had_to_go_is_not_promised() -> None:
    stage = Stage(journal_bytes=40)
    stage.answer(0, 8)
    stage.answer(8, 8)
    told = stage.reopen()
    assert (told.cached, told.journal) == (16, 16)


def test_other_layers_have_seen_nothing() -> None:
    stage = Stage()
    stage.answer(0, 8)
    told = stage.open(replace(MIDDLE, epoch=1, first=3))
    assert isinstance(told, Opened)
    assert (told.cached, told.journal) == (0, 0)
    assert stage.journal.used_bytes == 0


def test_results_of_the_old_route_are_dropped_be_they_good_or_bad() -> None:
    stage = Stage()
    stage.answer(0, 8)
    stage.step(8)
    (step,) = stage.waiting
    stage.reopen()
    before = stage.state
    row = Row(KEY, 8, 1, None, True, ())
    assert stage.finish(step, 0, 1) == []
    assert stage.table.on_results([Result(row, error="a crash")], 0.0) == []
    assert stage.state == before


def test_a_replacement_that_cannot_be_reached_costs_nothing_that_was_computed() -> None:
    stage = Stage()
    stage.answer(0, 8)
    stage.say(CLIENT, replace(MIDDLE, epoch=1, successor=OTHER))
    (refused,) = sends(stage.table.dialled(KEY, 1, False, 0.0))
    assert isinstance(refused.message, Refuse)
    assert refused.message.code == "unreachable"
    told = stage.reopen(2, NEXT)
    assert (told.cached, told.journal) == (8, 0)


def test_a_lost_neighbour_is_reported_and_the_stage_waits_for_the_client() -> None:
    stage = Stage()
    stage.answer(0, 8)
    before = stage.state
    for peer in (NEXT, PREVIOUS):
        assert failure(stage.table.on_lost(peer)) == "lost"
    assert stage.state == before
    stage.table.on_lost(CLIENT)
    assert len(stage.table) == 0
    assert stage.journal.used_bytes == 0
    assert stage.ledger.tables.free_blocks == 64


def test_a_draining_peer_stays_in_the_routes_that_it_has() -> None:
    stage = Stage()
    stage.answer(0, 8)
    stage.table.drain(9.0)
    assert stage.reopen().cached == 8


# --- resuming -----------------------------------------------------------------------------------


def test_a_newcomer_behind_gets_the_journal_and_the_rest_as_it_is_computed() -> None:
    stage = Stage()
    stage.answer(0, 8)
    stage.answer(8)
    stage.step(9)
    stage.reopen()
    made = stage.say(CLIENT, Resume(KEY, 1, 0, 9, 0, 10))
    assert made[0] == Drop(KEY, 9)
    (replayed,) = sends(made)
    assert replayed == Send(OTHER, Hidden(KEY, 1, 0, 0, 9, False, "float32"), ids(0, 9), BULK)
    stage.step(9, epoch=1)
    (last,) = sends(stage.compute())
    assert last.message == Hidden(KEY, 1, 0, 9, 1, True, "float32")
    assert last.lane == BULK, "behind the pieces that it must not overtake"
    stage.step(10, epoch=1)
    assert sends(stage.compute())[0].lane == STEP


def test_all_from_the_journal_ends_with_the_last_row() -> None:
    stage = Stage()
    stage.answer(0, 8)
    stage.reopen()
    (replayed,) = sends(stage.say(CLIENT, Resume(KEY, 1, 0, 8, 3, 8)))
    assert spans([replayed]) == [(3, 5, True)]
    assert replayed.payload == ids(3, 5)


def test_a_successor_that_has_everything_gets_nothing_twice() -> None:
    """The stage is new, or lost its journal: it computes what others had long since sent on."""
    stage = Stage(replace(MIDDLE, epoch=3))
    made = stage.say(CLIENT, Resume(KEY, 3, 0, 0, 6, 10))
    assert made == [Drop(KEY, 0)]
    stage.step(0, 10, epoch=3)
    cut = sends(stage.compute(piece=4))
    assert spans(cut) == [(6, 2, False), (8, 2, True)]
    assert bytes(cut[0].payload) == ids(3006, 2)
    told = stage.reopen(4)
    assert (told.cached, told.journal) == (10, 0), "what was not sent is kept all the same"


def test_input_that_comes_before_the_word_waits_for_it() -> None:
    stage = Stage()
    stage.answer(0, 8)
    stage.reopen()
    before = stage.state
    for _ in range(2):  # it may come twice, too
        assert stage.step(5, 3, last=False, epoch=1) == []
        assert stage.step(8, 1, epoch=1) == []
    assert stage.state == before
    made = stage.say(CLIENT, Resume(KEY, 1, 0, 5, 5, 9))
    submitted = [(a.step.position, a.step.count) for a in made if isinstance(a, Submit)]
    assert submitted == [(5, 3), (8, 1)]


def test_what_waits_for_the_word_is_bounded() -> None:
    stage = Stage(replace(MIDDLE, kv_tokens=16))
    stage.reopen()
    assert stage.step(0, 16, last=False, epoch=1) == []
    assert failure(stage.step(16, 1, epoch=1)) == "input"
    stage.reopen(2)
    assert stage.step(0, 16, last=False, epoch=2) == [], "with the route its input goes"


def test_a_newcomer_waits_for_the_word_too() -> None:
    """Its successor may have much of what it computes."""
    stage = Stage(replace(MIDDLE, epoch=1))
    assert stage.step(0, 4, epoch=1) == []
    made = stage.say(CLIENT, Resume(KEY, 1, 0, 0, 3, 4))
    assert isinstance(made[-1], Submit)
    assert spans(sends(stage.compute())) == [(3, 1, True)]


def test_a_word_that_comes_twice_or_late_changes_nothing() -> None:
    stage = Stage()
    stage.answer(0, 8)
    stage.reopen()
    word = Resume(KEY, 1, 0, 8, 0, 9)
    stage.say(CLIENT, word)
    stage.step(8, epoch=1)
    before = stage.state
    assert stage.say(CLIENT, word) == []
    assert stage.say(CLIENT, replace(word, epoch=0)) == []
    for who in (NEXT, PREVIOUS, OTHER):
        assert isinstance(sends(stage.say(who, word))[0].message, Failed)
    assert stage.state == before


@pytest.mark.parametrize(
    "word",
    [
        Resume(KEY, 1, 0, 9, 9, 10),  # more than is cached
        Resume(KEY, 1, 0, 8, 0, 7),  # beyond the end
        Resume(KEY, 1, 0, 8, 0, 513),  # more than is leased
    ],
)
def test_a_word_that_cannot_be_followed_is_refused_and_another_may_come(word: Resume) -> None:
    stage = Stage()
    stage.answer(0, 8)
    stage.reopen()
    before = stage.state
    assert failure(stage.say(CLIENT, word)) == "gap"
    assert stage.state == before
    assert sends(stage.say(CLIENT, Resume(KEY, 1, 0, 8, 0, 9)))


def test_what_is_not_in_the_journal_is_not_sent() -> None:
    stage = Stage(journal_bytes=0)
    stage.answer(0, 8)
    stage.reopen()
    before = stage.state
    assert failure(stage.say(CLIENT, Resume(KEY, 1, 0, 8, 0, 9))) == "gap"
    assert stage.state == before
    assert stage.say(CLIENT, Resume(KEY, 1, 0, 0, 0, 9)) == [Drop(KEY, 0)], "so it computes again"


def test_a_cancelled_turn_does_not_go_on() -> None:
    stage = Stage()
    stage.answer(0, 8)
    stage.reopen()
    stage.say(CLIENT, Cancel(KEY, 1, 0))
    assert stage.say(CLIENT, Resume(KEY, 1, 0, 8, 0, 9)) == []


def test_a_new_tail_learns_how_to_choose_and_the_old_one_learns_it_anew() -> None:
    stage = Stage(TAIL)
    stage.say(CLIENT, GENERATE)
    stage.answer(0, 8)
    stage.reopen()
    stage.say(CLIENT, Resume(KEY, 1, 0, 8, 8, 9))
    assert stage.step(8, epoch=1) == [], "held: this route's word has not come"
    made = stage.say(CLIENT, replace(GENERATE, epoch=1, max_new=1))
    assert isinstance(made[-1], Submit)
    token = sends(stage.compute())[0].message
    assert token == Token(KEY, 1, 0, 9, 9, "length")


def test_a_newer_turn_crops_what_is_kept() -> None:
    stage = Stage()
    stage.answer(0, 8)
    stage.say(PREVIOUS, Hidden(KEY, 0, 1, 3, 1, True, "float32"), bytes(4))
    assert stage.progress == (4, 3)
    told = stage.reopen()
    assert (told.cached, told.journal) == (3, 0)
    assert stage.journal.end(KEY) == 3


def test_a_newer_turn_sends_away_what_still_waits_of_the_last() -> None:
    stage = Stage()
    stage.answer(0, 8)
    stage.step(8)
    made = stage.say(PREVIOUS, Hidden(KEY, 0, 1, 8, 1, True, "float32"), bytes(4))
    assert made[0] == Drop(KEY, 8)
    assert isinstance(made[1], Submit)


def test_a_replay_comes_in_pieces_of_bounded_size() -> None:
    stage = Stage(replace(MIDDLE, kv_tokens=512), journal_bytes=1 << 24)
    stage.keeps(100, 8 * REPLAY_BYTES // 100)
    stage.reopen()
    made = sends(stage.say(CLIENT, Resume(KEY, 1, 0, 100, 0, 101)))
    assert all(len(send.payload) <= REPLAY_BYTES and send.lane == BULK for send in made)
    assert [at for at, _, _ in spans(made)] == [*range(0, 100, 12)]


@given(
    prompt=st.integers(1, 40),
    piece=st.integers(1, 9),
    decodes=st.integers(0, 5),
    computed=st.integers(0, 45),
    start=st.integers(0, 45),
    send_from=st.integers(0, 45),
    again=st.integers(1, 9),
)
def test_the_successor_gets_what_it_lacks_once_and_in_order(
    prompt: int, piece: int, decodes: int, computed: int, start: int, send_from: int, again: int
) -> None:
    """Wherever the loss came, and however the stage and its successor stand."""
    stage = Stage()
    stage.step(0, prompt)
    for step in list(stage.waiting):
        for first in range(0, step.count, piece):
            if first < computed:
                stage.finish(step, first, min(piece, step.count - first))
    stage.waiting.clear()
    if stage.progress == (prompt, prompt):
        for position in range(prompt, prompt + decodes):
            stage.answer(position)
    _, done = stage.progress
    end = prompt + decodes
    start, send_from = min(start, done), min(send_from, end)
    stage.reopen()
    made = stage.say(CLIENT, Resume(KEY, 1, 0, start, send_from, end))
    if start < end:
        stage.step(start, end - start, epoch=1)
    made += stage.compute(again)
    rows, at = b"", send_from
    for send in sends(made):
        assert isinstance(send.message, Hidden)
        assert send.peer == OTHER
        assert send.message.position == at
        at += send.message.count
        assert send.message.last == (at == end)
        rows += send.payload
    if send_from < end:
        assert at == end
    wanted = b"".join(ids(i if i < start else i + 1000, 1) for i in range(send_from, end))
    assert rows == wanted
    assert stage.progress == (max(start, end), max(start, end))


# --- how much is sent again -----------------------------------------------------------------------

ROWS, ROW_BYTES = 500, 40_000


def repaired(stage: Stage, epoch: int, successor: str) -> int:
    """The stage before the hole in one more repair: so many bytes it sends again."""
    told = stage.reopen(epoch, successor)
    assert told.cached == ROWS, "whatever it may send, it keeps its KV"
    if told.journal == told.cached:
        return 0
    made = sends(stage.say(CLIENT, Resume(KEY, epoch, 0, ROWS, 0, ROWS + 1)))
    assert all(isinstance(send.message, Hidden) for send in made), "what it promised, it sends"
    return sum(len(send.payload) for send in made)


def test_some_repairs_in_a_row_have_the_journal_and_any_number_have_not() -> None:
    """A client may say so as often as it likes, and name any neighbour; honest ones compute."""
    stage = Stage(journal_bytes=1 << 26)
    stage.keeps(ROWS, ROW_BYTES)
    sent = []
    for epoch in range(1, 101):
        stage.now += 0.5
        sent.append(repaired(stage, epoch, f"neighbour {epoch % 7}"))
    whole = ROWS * ROW_BYTES
    assert sent[:REPLAYS] == [whole] * REPLAYS
    assert sum(sent) <= (2 * REPLAYS + 1) * whole
    assert 0 in sent[:10]
    stage.now += AGAIN_S
    again = [repaired(stage, epoch, NEXT) for epoch in range(101, 101 + REPLAYS)]
    assert again == [whole] * REPLAYS


def test_who_wants_more_all_the_same_is_refused_and_nothing_changes() -> None:
    stage = Stage(journal_bytes=1 << 26)
    stage.keeps(ROWS, ROW_BYTES)
    epoch = 1
    while repaired(stage, epoch, OTHER):
        epoch += 1
    before = stage.state
    assert failure(stage.say(CLIENT, Resume(KEY, epoch, 0, ROWS, 0, ROWS + 1))) == "full"
    assert stage.state == before
    assert stage.say(CLIENT, Resume(KEY, epoch, 0, 0, 0, ROWS + 1)) == [Drop(KEY, 0)]


def test_steps_that_are_asked_for_again_count_too() -> None:
    """Turn after turn: each has its own measure, and all together another."""
    stage = Stage(journal_bytes=1 << 26)
    sent = 0
    for turn in range(40):
        hidden = Hidden(KEY, 0, turn, 0, 1, True, "float32")
        stage.say(PREVIOUS, hidden, bytes(4))
        row = Row(KEY, 0, 1, None, True, (), turn)
        stage.table.on_results([Result(row, Activations(bytes(1 << 20), "float32"))], 0.0)
        for _ in range(6):
            sent += sum(len(send.payload) for send in sends(stage.say(PREVIOUS, hidden, bytes(4))))
    assert 0 < sent <= REPLAYS * (1 << 20) + REPEAT_BYTES


def shared(client: PeerId, neighbour: str, number: int) -> StageSession:
    message = replace(MIDDLE, session=number.to_bytes(16, "big"), successor=neighbour)
    return StageSession(message, client, False, False)


def test_a_replay_chokes_no_way() -> None:
    assert MOST_EACH_BYTES < NEIGHBOUR_BYTES < PARTNER_BACKLOG_BYTES
    assert CLIENT_BYTES < ALL_BYTES < BACKLOG_BYTES


@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(1, 128), st.floats(0.0, 20.0)),
        max_size=60,
    )
)
def test_over_any_while_nobody_is_sent_more_than_is_allowed(
    asked: list[tuple[int, int, int, float]],
) -> None:
    """Nor has any client more sent: a full bucket, and what leaks out of it meanwhile."""
    allowance, now = Allowance(), 0.0
    spent: list[tuple[float, int, int, int]] = []
    for client, neighbour, mb, later_s in asked:
        now += later_s
        size = mb << 20
        session = shared(PeerId(f"c{client}"), f"n{neighbour}", client)
        fits = allowance.allows(session, size, size, now)
        assert allowance.spend(session, size, size, now) == fits
        if fits:
            spent.append((now, client, neighbour, size))
    for start, (since_s, *_) in enumerate(spent):
        for until in range(start, len(spent)):
            some = spent[start : until + 1]
            times = 1.001 + (spent[until][0] - since_s) / AGAIN_S
            assert sum(size for *_, size in some) <= ALL_BYTES * times
            for one in range(4):
                mine = sum(size for _, client, _, size in some if client == one)
                assert mine <= CLIENT_BYTES * times
                there = sum(size for _, _, neighbour, size in some if neighbour == one)
                assert there <= NEIGHBOUR_BYTES * times


def test_a_neighbour_that_is_lost_and_comes_back_owes_nothing() -> None:
    table, session = Stage().table, shared(CLIENT, NEXT, 1)
    allowance = table._allowance
    assert allowance.spend(session, 100 << 20, 100 << 20, 0.0)
    assert not allowance.allows(session, 100 << 20, 100 << 20, 0.0)
    table.on_lost(OTHER)
    assert not allowance.allows(session, 100 << 20, 100 << 20, 0.0)
    table.on_lost(NEXT)
    assert allowance.allows(session, 100 << 20, 100 << 20, 0.0)


def test_who_was_sent_something_long_ago_is_forgotten() -> None:
    allowance = Allowance()
    for number in range(1000):
        session = shared(PeerId(f"c{number}"), f"n{number}", number)
        assert allowance.spend(session, 100, 100, float(number))
    assert len(allowance) <= 3 * (AGAIN_S + 1) + 1


# --- steps that come again, or too soon -----------------------------------------------------------


def test_a_new_head_may_hear_the_ring_before_the_client() -> None:
    """The others had the rows of the last token, so the tail has chosen the next one already."""
    stage = Stage(replace(HEAD, epoch=1))
    stage.say(CLIENT, Resume(KEY, 1, 0, 0, 6, 10))
    ring = Tokens(KEY, 1, 0, 10, True)
    for _ in range(2):  # it may come twice, too
        assert stage.say(PREVIOUS, ring, ids(99, 1)) == []
    ids_of_client = Tokens(KEY, 1, 0, 0, False)
    assert len(stage.say(CLIENT, ids_of_client, ids(0, 4))) == 1
    made = stage.say(CLIENT, replace(ids_of_client, position=4, last=True), ids(4, 6))
    steps = [action.step for action in made if isinstance(action, Submit)]
    assert [(step.position, step.count) for step in steps] == [(4, 6), (10, 1)]
    assert list(steps[1].payload) == [99]
    assert stage.progress == (11, 0)


def test_a_newcomer_may_hear_of_the_next_step_before_its_replay_is_complete() -> None:
    stage = Stage(replace(MIDDLE, epoch=1))
    stage.say(CLIENT, Resume(KEY, 1, 0, 0, 8, 8))
    assert stage.step(8, epoch=1) == []
    assert failure(stage.step(8, 2, epoch=1)) == "input", "one such step, not two"
    assert failure(stage.step(9, epoch=1)) == "gap"
    made = stage.step(0, 8, epoch=1)
    assert [a.step.position for a in made if isinstance(a, Submit)] == [0, 8]
    assert failure(stage.step(10, epoch=1)) == "gap", "from now on nothing may be ahead"


@pytest.mark.parametrize("how", ["rewired", "cancelled", "next turn"])
def test_what_was_ahead_is_forgotten_with_its_turn_or_route(how: str) -> None:
    stage = Stage()
    stage.answer(0, 4)
    stage.reopen()
    stage.say(CLIENT, Resume(KEY, 1, 0, 4, 4, 8))
    assert stage.step(8, epoch=1) == []
    if how == "rewired":
        stage.reopen(2)
        made = stage.say(CLIENT, Resume(KEY, 2, 0, 4, 4, 8))
        made += stage.step(4, 4, epoch=2)
    else:
        if how == "cancelled":
            stage.say(CLIENT, Cancel(KEY, 1, 0))
        made = stage.say(PREVIOUS, Hidden(KEY, 1, 1, 4, 4, True, "float32"), ids(4, 4))
    assert [a.step.position for a in made if isinstance(a, Submit)] == [4]
    assert not stage.table._sessions[KEY].early


def test_a_step_that_comes_again_gets_the_stored_answer_in_the_same_cuts() -> None:
    stage = Stage()
    stage.step(0, 8)
    first = sends(stage.compute(piece=3))
    before = stage.state
    again = sends(stage.step(0, 8))
    assert [(s.peer, s.message, bytes(s.payload)) for s in again] == [
        (s.peer, s.message, bytes(s.payload)) for s in first
    ]
    assert stage.state == before
    stage.step(8)
    assert stage.step(8) == [], "it is being computed"
    (answer,) = sends(stage.compute())
    assert sends(stage.step(8)) == [answer]
    assert answer.lane == STEP


def test_what_is_sent_again_is_bounded() -> None:
    """Or a few bytes, repeated, would send any number of megabytes to an innocent neighbour."""
    stage = Stage(replace(MIDDLE, kv_tokens=512))
    stage.answer(0, 512)
    sent = 0
    for _ in range(REPEAT_BYTES // 2048 + 10):
        sent += sum(len(send.payload) for send in sends(stage.step(0, 512)))
    assert sent == REPEAT_BYTES
    stage.reopen()
    stage.say(CLIENT, Resume(KEY, 1, 0, 511, 511, 512))
    stage.step(511, epoch=1)
    assert sends(stage.compute())
    assert sends(stage.step(511, epoch=1)), "another route, another measure"


def test_a_client_that_asks_keeps_a_waiting_stage_alive_for_a_while() -> None:
    """Until a newcomer has computed all that was lost, those behind it have nothing to do."""
    stage = Stage()
    stage.answer(0, 8)
    tables = stage.ledger.tables
    asked = []
    for now in range(50, 300, 50):
        stage.ledger.now = float(now)
        asked.append(bool(tables.expire(float(now))))
        stage.say(CLIENT, AskProgress(KEY, 0, now))
    assert asked == [False, False, False, True, False], "three leases, and not for ever"


def test_the_tail_says_its_token_again_and_to_the_client_alone() -> None:
    """Fed to the head once more, a frame too many would circle for ever."""
    stage = Stage(TAIL)
    stage.say(CLIENT, replace(GENERATE, max_new=100))
    told, fed = stage.answer(0, 8)
    assert isinstance(told.message, Token)
    assert isinstance(fed.message, Tokens)
    assert stage.step(0, 8) == [told]
    for position in range(8, 8 + REMEMBERED):
        stage.answer(position)
    assert stage.step(0, 8) == [], "long since"
    assert len(stage.table._sessions[KEY].answers) == REMEMBERED


@pytest.mark.parametrize("opened", [HEAD, MIDDLE, TAIL], ids=["head", "middle", "tail"])
def test_other_content_and_overlaps_are_refused_and_change_nothing(opened: Open) -> None:
    stage = Stage(opened)
    stage.say(CLIENT, GENERATE)
    stage.answer(0, 8, last=False)
    stage.answer(8, 4, last=False)
    before = stage.state
    assert failure(stage.step(0, 8, last=False, salt=1)) == "conflict"
    assert failure(stage.step(0, 8, last=True)) == "conflict"
    assert failure(stage.step(0, 7, last=False)) == "conflict"
    assert failure(stage.step(6, 4, last=False)) == "conflict"
    assert failure(stage.step(11, 2, last=False)) == "conflict"
    assert failure(stage.step(13, 1)) == "gap"
    assert stage.state == before


def test_a_turn_that_begins_above_what_is_there_does_not_begin() -> None:
    stage = Stage()
    stage.answer(0, 8)
    before = stage.state
    late = Hidden(KEY, 0, 1, 9, 1, True, "float32")
    assert failure(stage.say(PREVIOUS, late, bytes(4))) == "gap"
    assert stage.state == before
    assert stage.answer(8), "the turn that runs goes on"


def test_how_to_choose_is_said_once() -> None:
    """Said again by the network it must not begin the count of tokens anew."""
    stage = Stage(replace(TAIL, first=0, predecessor="p0", successor="p0"))
    stage.say(CLIENT, replace(GENERATE, max_new=3))
    stage.step(0, 2)
    said = []
    for _ in range(3):
        said += [s.message for s in sends(stage.ring())]
        stage.say(CLIENT, replace(GENERATE, max_new=3))
    assert [m.finish for m in said if isinstance(m, Token)] == ["", "", "length"]


def test_an_error_of_the_engine_leaves_room_for_the_step_to_come_anew() -> None:
    stage = Stage()
    stage.answer(0, 8)
    stage.step(8)
    made = stage.table.on_results([Result(Row(KEY, 8, 1, None, True, ()), error="no")], 0.0)
    assert failure(made) == "engine"
    assert stage.progress == (8, 8)


# --- progress -----------------------------------------------------------------------------------


def test_progress_tells_who_waits_for_whom_and_how_long_a_step_takes() -> None:
    stage = Stage()
    table = stage.table
    for position in range(30):
        hidden = Hidden(KEY, 0, 0, position, 1, True, "float32")
        table.on_frame(PREVIOUS, Frame(hidden, ids(position, 1)), float(position))
        row = Row(KEY, position, 1, None, True, ())
        spent_s = 0.5 if position >= 14 else 0.25
        table.on_results([Result(row, Activations(bytes(4), "float32"))], position + spent_s)
    hidden = Hidden(KEY, 0, 0, 30, 1, True, "float32")
    table.on_frame(PREVIOUS, Frame(hidden, ids(30, 1)), 31.0)
    (send,) = sends(stage.say(CLIENT, AskProgress(KEY, 0, 3)))
    assert send.message == Progress(KEY, 0, 3, 31, 30, 0.5, 30), "over the last sixteen"
    stage.reopen()
    (send,) = sends(stage.say(CLIENT, AskProgress(KEY, 1, 4)))
    assert send.message == Progress(KEY, 1, 4, 30, 30, 0.0, 30), "another route, another account"


def test_only_the_client_is_told_how_far_a_stage_is() -> None:
    stage = Stage()
    for who in (PREVIOUS, NEXT, OTHER):
        (send,) = sends(stage.say(who, AskProgress(KEY, 0, 1)))
        assert send.peer == who
        assert isinstance(send.message, Failed)
        assert send.message.code == "unknown"
    assert stage.say(CLIENT, AskProgress(KEY, 1, 1)) == []
    stage.say(CLIENT, Close(KEY))
    (send,) = sends(stage.say(CLIENT, AskProgress(KEY, 0, 1)))
    assert isinstance(send.message, Failed)
