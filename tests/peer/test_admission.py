"""Reservations: leased at once, begun soon or gone, and nothing of it costs a block."""

from __future__ import annotations

import math
import tracemalloc
from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from hexswarm.links import HELLO_S
from hexswarm.messages import (
    MAX_TOKENS,
    Cancel,
    Close,
    Failed,
    Generate,
    Hidden,
    Message,
    Open,
    Opened,
    Refuse,
    Tokens,
    Trace,
)
from hexswarm.peer.actions import Action, Send, Watch
from hexswarm.peer.admission import AGAIN_S, IDLE_S, MAX_WAITING, RESERVE_S, SHARE
from hexswarm.records import Load, PeerId, Speed
from hexswarm.wire import Frame
from tests.loopback import CLIENT, MODEL, Host, Loopback

KEY = b"k" * 16
PREVIOUS, NEXT, STRANGER = PeerId("previous"), PeerId("next"), PeerId("stranger")
HEAD = Open(KEY, 0, MODEL, 0, 2, PREVIOUS, NEXT, (), 64)
MIDDLE = replace(HEAD, first=2, end=4)
TAIL = replace(HEAD, first=4, end=6)
GENERATE = Generate(KEY, 0, 0, 4, (), 0.0, 1.0, 0, 0.0, 1.0, 0)
HIDDEN = Hidden(KEY, 0, 0, 0, 1, True, "float32")
TOKENS = Tokens(KEY, 0, 0, 0, True)
ONE = bytes(4)


def opened(message: Open) -> tuple[Loopback, Host]:
    """One peer of all six layers with one session."""
    swarm = Loopback((0, 6))
    swarm.say(CLIENT, "p0", message)
    while swarm.dials:
        swarm._finish_dial()
    return swarm, swarm.hosts[PeerId("p0")]


def expire(swarm: Loopback, host: Host, now: float) -> list[Action]:
    host.ledger.now = now
    actions = host.table.expire(now)
    swarm.act(host, actions)
    return actions


def told(actions: list[Action]) -> list[Message]:
    return [action.message for action in actions if isinstance(action, Send)]


def test_a_reservation_outlasts_the_slowest_dial() -> None:
    """Else a route with one slow link could never open."""
    assert RESERVE_S >= HELLO_S


def test_what_nobody_uses_is_freed_and_the_client_told() -> None:
    swarm, host = opened(MIDDLE)
    assert host.table.expires_s == RESERVE_S
    assert expire(swarm, host, RESERVE_S - 0.001) == []
    actions = expire(swarm, host, RESERVE_S)
    (failed,) = told(actions)
    assert isinstance(failed, Failed)
    assert (failed.code, failed.peer) == ("expired", "p0")
    assert "opening" in failed.reason
    assert {action.peer for action in actions if isinstance(action, Watch)} == {
        *(CLIENT, PREVIOUS, NEXT)
    }
    swarm.check_clean()
    assert host.table.expires_s == math.inf
    (late,) = told(swarm.say(PREVIOUS, "p0", HIDDEN, ONE))
    assert isinstance(late, Failed)
    assert late.code == "unknown"


@pytest.mark.parametrize(
    ("mine", "who", "message", "payload"),
    [
        (HEAD, CLIENT, TOKENS, ONE),
        (HEAD, CLIENT, GENERATE, b""),
        (MIDDLE, CLIENT, GENERATE, b""),
        (MIDDLE, PREVIOUS, HIDDEN, ONE),
        (TAIL, CLIENT, GENERATE, b""),
        (TAIL, PREVIOUS, HIDDEN, ONE),
    ],
)
def test_the_first_sign_of_a_turn_commits(
    mine: Open, who: PeerId, message: Message, payload: bytes
) -> None:
    swarm, host = opened(mine)
    swarm.say(who, "p0", message, payload)
    assert host.table.expires_s == math.inf
    assert expire(swarm, host, 3 * RESERVE_S) == []
    assert len(host.table) == 1


@pytest.mark.parametrize(
    ("who", "message"),
    [
        (STRANGER, GENERATE),
        (PREVIOUS, GENERATE),
        (STRANGER, HIDDEN),
        (CLIENT, HIDDEN),
        (PREVIOUS, replace(HIDDEN, epoch=1)),
        (CLIENT, replace(GENERATE, epoch=1)),
        (CLIENT, Cancel(KEY, 0, 0)),
        (CLIENT, Trace(KEY, 0)),
        (CLIENT, replace(MIDDLE, kv_tokens=100)),
    ],
)
def test_nothing_else_prolongs_a_reservation(who: PeerId, message: Message) -> None:
    """Not even to ask for more: who only ever asks holds nothing for long."""
    swarm, host = opened(MIDDLE)
    host.ledger.now = RESERVE_S / 2
    swarm.say(who, "p0", message, ONE if isinstance(message, Hidden) else b"")
    assert host.table.expires_s == RESERVE_S
    expire(swarm, host, RESERVE_S)
    assert len(host.table) == 0
    assert host.kv_in_use == 0


def test_an_extension_of_a_committed_session_reserves_nothing() -> None:
    swarm, host = opened(MIDDLE)
    swarm.say(CLIENT, "p0", GENERATE)
    swarm.say(CLIENT, "p0", replace(MIDDLE, kv_tokens=100))
    assert host.table.expires_s == math.inf


def test_every_answer_tells_the_load() -> None:
    """Of the moment after the lease, or after it was given back."""
    swarm, host = opened(TAIL)
    (granted,) = told(host.table.dialled(KEY, 0, True, 0.0))
    assert isinstance(granted, Opened)
    assert granted.load == Load(0.25, 1.5, 0.5, 60 * 16)
    (refused,) = told(swarm.say(CLIENT, "p0", replace(TAIL, session=b"2" * 16, digest="cd" * 32)))
    assert isinstance(refused, Refuse)
    assert refused.load == granted.load
    (unreachable,) = told(host.table.dialled(KEY, 0, False, 0.0))
    assert isinstance(unreachable, Refuse)
    assert unreachable.load == replace(granted.load, free_kv_tokens=64 * 16)


def fast(host: Host, load: Load) -> None:
    """The peer knows its speed, 1 ms a layer, and is as busy as told."""
    host.ledger.speed, host.ledger.load = Speed(0.001, 0.001, 0.001), load


def answers(swarm: Loopback, message: Open) -> Message:
    """What the client hears of it, the next peer being in reach."""
    said = told(swarm.say(CLIENT, "p0", message))
    while swarm.dials:
        dial = swarm.dials.popleft()[1]
        host = swarm.hosts[PeerId("p0")]
        said += told(host.table.dialled(dial.session, dial.epoch, True, host.ledger.now))
    (answer,) = said
    return answer


def test_what_cannot_be_promised_is_refused_and_leases_nothing() -> None:
    """The tail is asked for its head, too."""
    swarm = Loopback((0, 6))
    host = swarm.hosts[PeerId("p0")]
    fast(host, Load(queue_s=0.002))
    for message, step_s in ((MIDDLE, 0.004), (TAIL, 0.005)):
        refused = answers(swarm, replace(message, step_s=step_s * 0.99))
        assert isinstance(refused, Refuse)
        assert refused.code == "slow"
        assert refused.retry_s > 0
        assert refused.load.queue_s == 0.002
        swarm.check_clean()
        assert isinstance(answers(swarm, replace(message, step_s=step_s)), Opened)
        swarm.say(CLIENT, "p0", Close(KEY))


def test_an_answer_tells_of_those_whom_the_load_does_not_show() -> None:
    """Not of the session itself, which its client knows of."""
    swarm = Loopback((0, 6))
    host = swarm.hosts[PeerId("p0")]
    fast(host, Load())
    first, second = (replace(MIDDLE, session=bytes([number]) * 16) for number in (1, 2))
    granted = answers(swarm, first)
    assert isinstance(granted, Opened)
    assert granted.load.rows == 0
    granted = answers(swarm, second)
    assert isinstance(granted, Opened)
    assert granted.load.rows == pytest.approx(2 / 6)
    assert granted.load.queue_s == pytest.approx(0.001 * 2 / 6)
    swarm.say(CLIENT, "p0", Close(first.session))
    refused = answers(swarm, replace(first, digest="cd" * 32))
    assert isinstance(refused, Refuse)
    assert refused.load.rows == pytest.approx(2 / 6)
    swarm.say(CLIENT, "p0", Close(second.session))


def test_what_is_asked_anew_is_judged_anew_and_the_same_on_another_route_is_not() -> None:
    swarm = Loopback((0, 6))
    host = swarm.hosts[PeerId("p0")]
    fast(host, Load())
    mine = replace(MIDDLE, step_s=0.002)
    assert isinstance(answers(swarm, mine), Opened)
    host.ledger.load = Load(queue_s=0.1)
    assert isinstance(answers(swarm, replace(mine, kv_tokens=100)), Opened)
    mine = replace(mine, epoch=1, successor="elsewhere")
    assert isinstance(answers(swarm, mine), Opened), "another stage of its route was lost"
    for change in ({"step_s": 0.0015}, {"step_s": 0.0021}, {"first": 1}, {"end": 5}):
        refused = answers(swarm, replace(mine, epoch=2, **change))  # type: ignore[arg-type]
        assert isinstance(refused, Refuse)
        assert refused.code == "slow"
    host.ledger.load = Load()
    other = answers(swarm, replace(MIDDLE, session=b"2" * 16))
    assert isinstance(other, Refuse)
    assert other.code == "busy", "the first promise holds"
    assert isinstance(answers(swarm, replace(mine, epoch=2, step_s=0.0)), Opened)
    assert isinstance(answers(swarm, replace(MIDDLE, session=b"2" * 16)), Opened)


@pytest.mark.parametrize("end", ["full", "closed", "lost", "expired", "unreachable"])
def test_a_promise_ends_with_its_session(end: str) -> None:
    """Or never begins, if there is no room for it."""
    swarm = Loopback((0, 6))
    host = swarm.hosts[PeerId("p0")]
    fast(host, Load())
    mine = replace(MIDDLE, step_s=0.002, kv_tokens=9999 if end == "full" else 64)
    swarm.say(CLIENT, "p0", mine)
    swarm.dials.clear()
    match end:
        case "closed":
            swarm.say(CLIENT, "p0", Close(KEY))
        case "lost":
            swarm.act(host, host.table.on_lost(CLIENT))
        case "expired":
            expire(swarm, host, RESERVE_S)
        case "unreachable":
            swarm.act(host, host.table.dialled(KEY, 0, False, 0.0))
    swarm.check_clean()
    granted = answers(swarm, replace(MIDDLE, session=b"2" * 16))
    assert isinstance(granted, Opened)
    assert granted.load.rows == 0


@pytest.mark.parametrize(
    ("who", "message", "payload"),
    [
        (PREVIOUS, replace(HIDDEN, position=1), ONE),
        (CLIENT, GENERATE, b""),
        (CLIENT, replace(MIDDLE, kv_tokens=100, step_s=0.002), b""),
    ],
)
def test_between_turns_a_promise_rests(who: PeerId, message: Message, payload: bytes) -> None:
    """From the question where the time went until anything of the session comes."""
    swarm = Loopback((0, 6))
    host = swarm.hosts[PeerId("p0")]
    fast(host, Load())
    assert isinstance(answers(swarm, replace(MIDDLE, step_s=0.002)), Opened)
    swarm.say(PREVIOUS, "p0", HIDDEN, ONE)
    other = replace(MIDDLE, session=b"2" * 16)
    assert isinstance(answers(swarm, other), Refuse)
    swarm.say(STRANGER, "p0", Trace(KEY, 0))
    assert isinstance(answers(swarm, other), Refuse)
    swarm.say(CLIENT, "p0", Trace(KEY, 0))
    granted = answers(swarm, other)
    assert isinstance(granted, Opened)
    assert granted.load.rows == 0
    swarm.say(CLIENT, "p0", Close(other.session))
    swarm.say(who, "p0", message, payload)
    swarm.dials.clear()
    refused = answers(swarm, other)
    assert isinstance(refused, Refuse)
    assert refused.code == "busy"


# --- shares ---------------------------------------------------------------------------------------


def ask(swarm: Loopback, who: PeerId, number: int, tokens: int) -> Message | None:
    """Open a session at the tail, in reach of its head; the answer."""
    message = replace(TAIL, session=bytes([number]) * 16, kv_tokens=tokens)
    said = told(swarm.say(who, "p0", message))
    while swarm.dials:
        dial = swarm.dials.popleft()[1]
        host = swarm.hosts[PeerId("p0")]
        said += told(host.table.dialled(dial.session, dial.epoch, True, host.ledger.now))
    return said[0] if said else None


def full_of(swarm: Loopback, who: PeerId, numbers: range) -> None:
    """`who` fills the 64 blocks with sessions that have begun."""
    tokens = 64 * 16 // len(numbers)
    for number in numbers:
        assert isinstance(ask(swarm, who, number, tokens), Opened)
        swarm.say(who, "p0", replace(GENERATE, session=bytes([number]) * 16))


def test_one_client_may_have_all_that_nobody_else_wants() -> None:
    swarm = Loopback((0, 6))
    full_of(swarm, CLIENT, range(8))
    assert expire(swarm, swarm.hosts[PeerId("p0")], 3 * IDLE_S) == []


def test_while_another_waits_nobody_gets_more_than_a_share() -> None:
    swarm = Loopback((0, 6))
    full_of(swarm, CLIENT, range(8))
    refused = ask(swarm, STRANGER, 100, 128)
    assert isinstance(refused, Refuse)
    assert (refused.code, refused.retry_s > 0) == ("full", True)
    swarm.say(CLIENT, "p0", Close(bytes([0]) * 16))
    for number, longer in ((1, 129), (50, 16)):
        greedy = ask(swarm, CLIENT, number, longer)
        assert isinstance(greedy, Refuse), "neither longer ones nor new ones"
        assert (greedy.code, greedy.retry_s) == ("full", AGAIN_S)
        assert "others wait" in greedy.reason
    assert isinstance(ask(swarm, CLIENT, 1, 100), Opened), "what it has, it may ask for again"
    assert isinstance(ask(swarm, STRANGER, 100, 128), Opened)
    swarm.say(CLIENT, "p0", Close(bytes([1]) * 16))
    assert isinstance(ask(swarm, CLIENT, 51, 128), Opened), "now nobody waits any more"


def test_nobody_waits_for_ever_nor_for_what_cannot_come() -> None:
    swarm = Loopback((0, 6))
    full_of(swarm, CLIENT, range(8))
    never = ask(swarm, STRANGER, 100, 64 * 16 + 1)
    assert isinstance(never, Refuse)
    assert never.retry_s == 0
    swarm.say(CLIENT, "p0", Close(bytes([0]) * 16))
    assert isinstance(ask(swarm, CLIENT, 50, 128), Opened)
    refused = ask(swarm, STRANGER, 100, 128)
    assert isinstance(refused, Refuse)
    swarm.say(CLIENT, "p0", Close(bytes([50]) * 16))
    host = swarm.hosts[PeerId("p0")]
    host.ledger.now = refused.retry_s + AGAIN_S + 0.1
    assert isinstance(ask(swarm, CLIENT, 51, 128), Opened), "it did not come back"


def test_a_squatter_loses_what_rests_and_nothing_that_runs() -> None:
    """Down to its share, but no further."""
    swarm = Loopback((0, 6))
    host = swarm.hosts[PeerId("p0")]
    full_of(swarm, CLIENT, range(8))
    assert expire(swarm, host, IDLE_S) == []
    busy = [bytes([number]) * 16 for number in range(3)]
    for key in busy:
        swarm.say(CLIENT, "p0", replace(GENERATE, session=key))
    assert isinstance(ask(swarm, STRANGER, 100, 128), Refuse)
    failures = [m for m in told(expire(swarm, host, IDLE_S)) if isinstance(m, Failed)]
    ended = {m.session for m in failures}
    assert len(ended) == 4, "the pool's half is four of eight"
    assert all("others wait" in m.reason for m in failures)
    assert ended.isdisjoint(busy)
    assert isinstance(ask(swarm, STRANGER, 100, 128), Opened)
    swarm.check()


@pytest.mark.parametrize(("passed_s", "retry_s"), [(0.0, 5.0), (17.0, 5.0), (22.0, 3.0), (30, 1)])
def test_who_comes_as_the_peer_leaves_is_told_when_it_will_be_gone(
    passed_s: float, retry_s: float
) -> None:
    swarm = Loopback((0, 6))
    host = swarm.hosts[PeerId("p0")]
    host.table.drain(25.0, 100.0)
    host.ledger.now = 100.0 + passed_s
    made = host.table.on_frame(CLIENT, Frame(MIDDLE), host.ledger.now)
    (refused,) = told(made)
    assert isinstance(refused, Refuse)
    assert (refused.code, refused.retry_s) == ("draining", retry_s)


def test_a_huge_wish_costs_nothing() -> None:
    """Neither blocks, nor a place among those who wait, nor memory that grows with it."""
    swarm = Loopback((0, 6))
    tracemalloc.start()
    try:
        refused = ask(swarm, STRANGER, 1, MAX_TOKENS)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert isinstance(refused, Refuse)
    assert (refused.code, refused.retry_s) == ("full", 0.0)
    assert peak < 1 << 20
    swarm.check_clean()
    full_of(swarm, CLIENT, range(8))


def test_a_crowd_of_beggars_is_remembered_within_bounds() -> None:
    swarm = Loopback((0, 6))
    full_of(swarm, CLIENT, range(8))
    admission = swarm.hosts[PeerId("p0")].table._admission
    for number in range(MAX_WAITING + 20):
        assert isinstance(ask(swarm, PeerId(f"beggar {number}"), 100, 128), Refuse)
    assert len(admission._waiting) == MAX_WAITING


class Reservations(RuleBasedStateMachine):
    """Reserve, begin, extend, close, lose, expire in any order.

    The stage holds exactly the sessions that it should, and exactly their blocks: a reservation
    never outlives `RESERVE_S`, a session that began ends by its lease (100 s) alone, or by resting
    beyond its client's share while another waits.
    """

    LEASE_S = 100.0

    def __init__(self) -> None:
        super().__init__()
        self.swarm = Loopback((0, 6), blocks=24)
        self.host = self.swarm.hosts[PeerId("p0")]
        self.reserved: dict[bytes, float] = {}
        self.used: dict[bytes, float] = {}
        """When each session last stepped, at first: was opened."""
        self.owner: dict[bytes, PeerId] = {}
        self.lengths: dict[bytes, int] = {}
        self.touched: dict[bytes, float] = {}
        """When each session was last opened, told to generate, or stepped."""
        self.blocks: dict[bytes, int] = {}
        self.waiting: dict[PeerId, float] = {}

    def gone(self, key: bytes) -> None:
        self.reserved.pop(key, None)
        for book in (self.used, self.owner, self.lengths, self.touched, self.blocks):
            del book[key]

    def others_wait(self, who: PeerId) -> bool:
        return any(other != who and end >= self.now for other, end in self.waiting.items())

    def holds(self, who: PeerId) -> int:
        return sum(self.blocks[key] for key, owner in self.owner.items() if owner == who)

    def some(self, index: int) -> bytes:
        return sorted(self.used)[index % len(self.used)]

    @property
    def now(self) -> float:
        return self.host.ledger.now

    @rule(
        number=st.integers(0, 9),
        tokens=st.sampled_from([1, 40, 100, 200]),
        who=st.sampled_from([CLIENT, STRANGER]),
        reachable=st.booleans(),
    )
    def ask(self, number: int, tokens: int, who: PeerId, reachable: bool) -> None:
        key = bytes([number]) * 16
        known, mine = key in self.used, self.owner.get(key) == who
        free = self.host.ledger.tables.free_blocks
        answers = told(self.swarm.say(who, "p0", replace(MIDDLE, session=key, kv_tokens=tokens)))
        if known and not mine:
            assert isinstance(answers[0], Refuse)
        elif answers:
            assert isinstance(answers[0], Refuse)
            assert answers[0].code == "full"
            more = -(-tokens // 16) - self.blocks.get(key, 0)
            if self.others_wait(who) and self.holds(who) + more > SHARE * 24:
                return
            assert more > free
            self.waiting[who] = self.now + answers[0].retry_s + AGAIN_S
        else:
            self.waiting.pop(who, None)
            if not known:
                self.reserved[key] = self.now + RESERVE_S
                self.used[key], self.owner[key], self.lengths[key] = self.now, who, 0
                self.touched[key] = self.now
            self.blocks[key] = max(self.blocks.get(key, 0), -(-tokens // 16))
            assert not (self.others_wait(who) and self.holds(who) > SHARE * 24) or known
            self.swarm.dials.clear()
            self.swarm.act(self.host, self.host.table.dialled(key, 0, reachable, self.now))
            if not reachable:
                self.gone(key)

    @precondition(lambda self: self.used)
    @rule(index=st.integers(0, 9), how=st.sampled_from(["generate", "hidden"]))
    def begin(self, index: int, how: str) -> None:
        key = self.some(index)
        self.reserved.pop(key, None)
        self.touched[key] = self.now
        if how == "generate":
            self.swarm.say(self.owner[key], "p0", replace(GENERATE, session=key))
            return
        position = self.lengths[key]
        step = replace(HIDDEN, session=key, position=position)
        self.swarm.say(PREVIOUS, "p0", step, ONE)
        if self.host.refused:
            self.host.refused.clear()  # above its lease
        else:
            self.used[key], self.lengths[key] = self.now, position + 1

    @precondition(lambda self: self.used)
    @rule(index=st.integers(0, 9), who=st.sampled_from([CLIENT, STRANGER, PREVIOUS]))
    def close(self, index: int, who: PeerId) -> None:
        key = self.some(index)
        self.swarm.say(who, "p0", Close(key))
        if self.owner[key] == who:
            self.gone(key)

    @rule(who=st.sampled_from([CLIENT, STRANGER, PREVIOUS]))
    def lose(self, who: PeerId) -> None:
        self.swarm.act(self.host, self.host.table.on_lost(who))
        for key in [key for key, owner in self.owner.items() if owner == who]:
            self.gone(key)

    @rule(seconds=st.sampled_from([0.0, 0.5, 3.0, 7.0, 10.0, 60.0]))
    def wait(self, seconds: float) -> None:
        now = self.now + seconds
        failed = told(expire(self.swarm, self.host, now))
        late = [key for key, due_s in self.reserved.items() if due_s <= now]
        late += [key for key, used_s in self.used.items() if now - used_s > self.LEASE_S]
        for key in set(late):
            self.gone(key)
        squatters = self.squatters()
        for key in squatters:
            self.gone(key)
        assert {m.session for m in failed if isinstance(m, Failed)} == {*late, *squatters}

    def squatters(self) -> list[bytes]:
        """The longest at rest of those beyond their share, until it is only a share."""
        found: list[bytes] = []
        for key in sorted(self.touched, key=lambda key: self.touched[key]):
            who = self.owner[key]
            gone = sum(self.blocks[other] for other in found if self.owner[other] == who)
            if self.now - self.touched[key] < IDLE_S or not self.others_wait(who):
                continue
            if self.holds(who) - gone > SHARE * 24:
                found.append(key)
        return found

    @invariant()
    def the_books_agree(self) -> None:
        self.swarm.check()
        assert set(self.host.ledger.tables.sessions) == set(self.used)
        assert self.host.table.expires_s == min(self.reserved.values(), default=math.inf)

    def teardown(self) -> None:
        self.swarm.act(self.host, self.host.table.end_all())
        self.host.steps.clear()
        self.swarm.check_clean()


Reservations.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestReservations = Reservations.TestCase


@pytest.mark.parametrize(("first", "end"), [(1, 1), (3, 2)])
def test_an_empty_part_is_refused_also_of_a_session_that_is_open(first: int, end: int) -> None:
    swarm = Loopback((0, 6))
    assert isinstance(answers(swarm, MIDDLE), Opened)
    refused = answers(swarm, replace(MIDDLE, epoch=1, first=first, end=end))
    assert isinstance(refused, Refuse)
    assert refused.code == "span"
