"""The failure detector: what is noticed, how soon, and what is nobody's fault."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hexswarm.detector import (
    ASK_MOST_S,
    BEAT_S,
    BUSY_S,
    MOST_SILENCE_S,
    PING_S,
    SILENCE_S,
    STUCK_QUESTIONS,
    Ask,
    Decision,
    Detector,
    Pulse,
    Slow,
    Suspect,
    culprit,
)
from hexswarm.messages import Progress
from hexswarm.records import PeerId

STAGES = A, B, C = PeerId("a"), PeerId("b"), PeerId("c")
OTHER = PeerId("witness")
KNOWN = 100
"""Ids of the prompt."""


def far(received: int, done: int, step_s: float = 0.0, computed: int = 0) -> Progress:
    return Progress(b"s" * 16, 0, 0, received, done, step_s, computed)


def all_done(known: int) -> dict[PeerId, Progress]:
    return {peer: far(known, known) for peer in STAGES}


class Client:
    """A client that listens: links that are quiet as told, and answers to pings."""

    def __init__(
        self, tpot_s: float = 0.05, ttft_s: float = 0.5, others: Iterable[PeerId] = ()
    ) -> None:
        self.now, self.known = 0.0, KNOWN
        self.pulse = Pulse()
        self.detector = Detector(
            0.0, KNOWN, ttft_s=ttft_s, tpot_s=tpot_s, expected_s=dict.fromkeys(STAGES, tpot_s / 3)
        )
        self.heard_s = dict.fromkeys([*STAGES, *others], 0.0)
        self.frozen: set[PeerId] = set()
        self.pongs: list[tuple[float, PeerId]] = []
        self.pings = 0
        self.rtt_s = 0.02
        self.rtts_s: dict[PeerId, float] = {}
        """Of those that are not like the others."""
        self.told: Callable[[], dict[PeerId, Progress]] = lambda: all_done(self.known)
        self.asked = 0

    def beat(self, tokens: int = 0, after_s: float = BEAT_S, owed: bool = True) -> list[Decision]:
        self.now += after_s
        self.known += tokens
        for at_s, peer in list(self.pongs):
            if at_s <= self.now and peer not in self.frozen:
                self.heard_s[peer] = max(self.heard_s[peer], at_s)
                self.pongs.remove((at_s, peer))
        if tokens:
            self.heard_s[C] = self.now
        silent_s = {peer: self.now - at_s for peer, at_s in self.heard_s.items()}
        for peer in self.pulse.beat(self.now, silent_s):
            self.pings += 1
            self.pongs.append((self.now + self.rtts_s.get(peer, self.rtt_s), peer))
        made = self.detector.beat(self.now, self.known, self.pulse, owed=owed)
        if made == [Ask()]:
            self.asked += 1
            told = {p: item for p, item in self.told().items() if p not in self.frozen}
            return self.detector.progress(self.now, told, self.known)
        return made

    def run(self, seconds: float, every: int = 1, tokens: int = 0) -> list[Decision]:
        """Beats until something is decided; `tokens` at every so many."""
        for number in range(1, round(seconds / BEAT_S) + 1):
            made = self.beat(tokens if number % every == 0 else 0)
            if made:
                return made
        return []

    def in_its_prompt(self) -> Client:
        """Before the first token; all stages get on with it."""

        def told() -> dict[PeerId, Progress]:
            return {peer: far(100 + self.asked, self.asked) for peer in STAGES}

        self.told = told
        assert self.run(3.0) == []
        return self

    def running(self) -> Client:
        assert self.run(3.0, tokens=2) == []
        return self


# --- silence --------------------------------------------------------------------------------------


@pytest.mark.parametrize("peer", [A, B])
def test_a_frozen_stage_is_left_within_two_seconds(peer: PeerId) -> None:
    client = Client().running()
    client.frozen = {peer}
    began_s = client.now
    (made,) = client.run(8.0)
    assert isinstance(made, Suspect)
    assert made.peer == peer
    assert "silent" in made.how
    assert client.now - began_s <= 2.1


@pytest.mark.parametrize("peer", STAGES)
def test_before_the_first_token_too_if_all_others_answer(peer: PeerId) -> None:
    client = Client().in_its_prompt()
    client.frozen = {peer}
    began_s = client.now
    (made,) = client.run(8.0)
    assert isinstance(made, Suspect)
    assert made.peer == peer
    assert client.now - began_s <= 1.7


def test_before_the_first_token_it_takes_longer_where_another_is_late() -> None:
    """The others may be as busy, and only one of them so far has been as late."""
    client = Client().in_its_prompt()
    client.rtts_s = {A: 0.6}
    client.run(1.0)
    client.frozen = {B}
    began_s = client.now
    (made,) = client.run(8.0)
    assert isinstance(made, Suspect)
    assert made.peer == B
    assert client.now - began_s > 2.4


def test_however_late_answers_were_no_silence_is_waited_for_longer_than_the_longest() -> None:
    """Not even before the first token, beside others that are late."""
    client = Client().in_its_prompt()
    client.rtts_s = {A: 0.6}
    client.pulse._remember(3.9, client.now)
    client.frozen = {B}
    began_s = client.now
    made = next(item for item in client.run(12.0) if isinstance(item, Suspect))
    assert made.peer == B
    assert client.now - began_s <= MOST_SILENCE_S + 0.5


def test_before_the_first_token_two_that_are_silent_do_not_excuse_each_other() -> None:
    client = Client().in_its_prompt()
    client.frozen = {A, C}
    began_s = client.now
    assert {item.peer for item in client.run(8.0) if isinstance(item, Suspect)} == {A, C}
    assert client.now - began_s <= 2.1


@given(st.booleans(), st.lists(st.floats(0.0, 1.0), min_size=6, max_size=40))
def test_nobody_is_left_who_is_at_most_twice_as_late_as_was_usual(
    first: bool, shares: list[float]
) -> None:
    """Whoever it is, however late the others are, before the first token and after it: no silence
    is held against a stage that is below `SILENCE_S`, or twice the longest one of lately (up to
    `MOST_SILENCE_S`). Lately is some seconds ago, and a beat may pass before it is noticed."""
    client = Client().in_its_prompt() if first else Client().running()
    client.told = lambda: {peer: far(9 + client.asked, client.asked) for peer in STAGES}
    client.frozen = set(STAGES)  # they are heard when the test says so
    began_s, ended, left = dict(client.heard_s), list[tuple[float, float]](), iter(shares)
    due_s = dict.fromkeys(STAGES, client.now + 0.1)
    while True:
        for peer in STAGES:
            if client.now + BEAT_S < due_s[peer]:
                continue
            client.heard_s[peer] = now = due_s[peer]
            ended.append((now, now - began_s[peer]))
            longest_s = max(quiet_s for at_s, quiet_s in ended if now - at_s < 10)
            most_s = min(MOST_SILENCE_S, max(SILENCE_S, 1.7 * (longest_s - BEAT_S)))
            share = next(left, None)
            if share is None:
                return
            began_s[peer], due_s[peer] = now, now + BEAT_S + share * (most_s - 2 * BEAT_S)
        assert not any(isinstance(item, Suspect) for item in client.beat())


def test_two_frozen_at_once() -> None:
    client = Client().running()
    client.frozen = {A, C}
    made = client.run(8.0)
    assert {item.peer for item in made if isinstance(item, Suspect)} == {A, C}


def test_as_long_as_tokens_come_nobody_is_left_for_silence() -> None:
    client = Client().running()
    client.frozen = {A}
    assert client.run(20.0, tokens=1) == []


def test_nobody_is_heard_at_all() -> None:
    """It may be our own network: that waits longer, and then all are left."""
    client = Client().running()
    client.frozen = set(STAGES)
    assert client.run(3.9) == []
    assert len(client.run(2.0)) == 3


def test_a_witness_tells_whose_network_is_down() -> None:
    client = Client(others=[OTHER]).running()
    client.frozen = set(STAGES)
    assert len(client.run(2.2)) == 3


def test_a_client_that_was_held_up_accuses_nobody() -> None:
    client = Client().running()
    for _ in range(30):
        assert client.beat(after_s=3.0) == []
        client.beat()  # now it hears what was sent meanwhile
        client.known += 1


@given(
    st.lists(st.floats(0.0, SILENCE_S - PING_S - 0.01), min_size=30, max_size=60),
    st.randoms(use_true_random=False),
)
def test_late_answers_of_a_busy_machine_are_no_silence(
    late_s: list[float], rng: random.Random
) -> None:
    """Pongs that take up to 1.1 s, beats that come late: as long as tokens come now and then, and
    every ping is answered, nobody is left."""
    client = Client().running()
    for number, rtt_s in enumerate(late_s):
        client.rtt_s = rtt_s
        made = client.beat(number % 12 == 0, after_s=BEAT_S * rng.uniform(1, 3))
        assert not any(isinstance(item, Suspect) for item in made)


def test_a_ping_that_we_sent_late_is_answered_late() -> None:
    client = Client().running()
    client.rtts_s = {B: SILENCE_S - PING_S - 0.01}
    client.beat(tokens=1)
    client.heard_s = dict.fromkeys(STAGES, client.now)
    for after_s in (0.1, 0.1, 0.19, 0.3, *(12 * [0.1])):
        assert client.beat(after_s=after_s) == []


def test_who_was_late_before_gets_more_time() -> None:
    client = Client().running()
    client.frozen = {B}
    assert client.run(1.2) == []
    client.frozen = set()
    assert client.run(2.0, tokens=1) == []
    client.frozen = {B}
    began_s = client.now
    assert client.run(9.0)
    assert SILENCE_S + 0.3 < client.now - began_s < MOST_SILENCE_S


def test_quiet_stages_are_pinged_and_busy_ones_are_not() -> None:
    client = Client().running()
    pings = client.pings
    client.run(4 * PING_S, tokens=1)
    assert 4 <= client.pings - pings <= 10, "the head and the middle; the tail speaks anyway"


# --- the deadline ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("told", "blamed"),
    [
        ({A: far(149, 149), B: far(160, 160), C: far(160, 160)}, A),
        ({A: far(160, 150), B: far(150, 150), C: far(150, 150)}, A),
        ({A: far(160, 160), B: far(159, 159), C: far(159, 159)}, B),
        ({A: far(160, 160), B: far(160, 159), C: far(159, 159)}, B),
        ({A: far(160, 160), B: far(160, 160), C: far(160, 159)}, C),
        ({A: far(160, 160), B: far(160, 160), C: far(160, 160)}, C),
        ({A: far(160, 160), C: far(159, 159)}, B),
    ],
)
def test_a_ring_that_stands_still_is_asked_and_the_fault_is_read_along_it(
    told: dict[PeerId, Progress], blamed: PeerId
) -> None:
    client = Client().running()
    assert client.known == 160
    client.told = lambda: told
    began_s = client.now
    (made,) = client.run(10.0)
    assert isinstance(made, Suspect)
    assert made.peer == blamed
    lost = made.beside is not None
    assert client.asked == (3 if lost else 6)
    assert client.now - began_s < (3.0 if lost else 5.0), "a frame is lost, or somebody is slow"
    assert culprit(STAGES, told, 160) == made


def test_a_ring_that_moves_is_slow_and_not_stuck() -> None:
    """A long prompt: positions go on, however long it takes."""
    client = Client(ttft_s=0.5)
    moved = 0

    def told() -> dict[PeerId, Progress]:
        nonlocal moved
        moved += 1
        return {A: far(100, moved), B: far(moved, 0), C: far(0, 0)}

    client.told = told
    assert client.run(60.0) == []
    assert client.asked > 20


def test_one_that_computes_for_others_is_busy_and_not_stuck() -> None:
    """A crowd: our step waits behind those of others, for which it is asked less and less often."""
    client = Client().running()
    client.told = lambda: {
        A: far(160, 160), B: far(160, 159, computed=round(client.now * 10)), C: far(159, 159)
    }  # fmt: skip
    began_s = client.now
    assert client.run(BUSY_S - 1) == []
    assert client.asked <= BUSY_S / ASK_MOST_S + 5
    (made,) = client.run(5.0)
    assert isinstance(made, Suspect)
    assert made.peer == B
    assert client.now - began_s < BUSY_S + 4.0, "nobody is starved for ever"


def test_one_that_computes_for_nobody_any_more_is_stuck() -> None:
    client = Client().running()
    until_s = client.now + 8.0
    client.told = lambda: {
        A: far(160, 160),
        B: far(160, 159, computed=round(min(client.now, until_s) * 10)),
        C: far(159, 159),
    }
    (made,) = client.run(20.0)
    assert isinstance(made, Suspect)
    assert made.peer == B
    assert until_s + 2.0 < client.now < until_s + 6.5


def test_work_for_others_is_no_excuse_for_a_frame_that_was_lost() -> None:
    client = Client().running()
    client.told = lambda: {
        peer: far(160 - (peer != A), 160 - (peer != A), computed=round(client.now * 10))
        for peer in STAGES
    }
    began_s = client.now
    (made,) = client.run(10.0)
    assert isinstance(made, Suspect)
    assert (made.peer, made.beside) == (B, A)
    assert client.now - began_s < 3.0


def test_what_another_turn_has_found_out_needs_one_answer_less() -> None:
    """And answers of its own: a lost way is no reason to leave a ring that moves."""
    client = Client().running()
    lost = [(B, A)]
    assert client.detector.agree(lost) == []
    client.told = lambda: {peer: far(160 - (peer != A), 160 - (peer != A)) for peer in STAGES}
    while client.asked < STUCK_QUESTIONS - 1:
        assert client.detector.agree(lost) == []
        assert client.run(BEAT_S) == []
    assert client.detector.agree([(C, B)]) == []
    (made,) = client.detector.agree(lost)
    assert isinstance(made, Suspect)
    assert (made.peer, made.beside) == (B, A)
    assert client.detector.agree(lost) == [], "it is said once"


def test_the_first_token_may_take_four_times_what_was_predicted() -> None:
    client = Client(ttft_s=10.0)
    client.told = lambda: {A: far(100, 50), B: far(50, 50), C: far(50, 50)}
    assert client.run(9.0) == []
    assert client.asked == 0
    assert client.run(50.0) == [], "40 s, and the time of three questions"
    assert client.asked > 0
    (made,) = client.run(10.0)
    assert isinstance(made, Suspect)
    assert made.peer == A


def test_a_slow_ring_has_a_late_deadline() -> None:
    client = Client(tpot_s=1.0)
    assert client.run(20.0, every=10, tokens=1) == []
    known = client.known
    client.told = lambda: {
        A: far(known, known), B: far(known, known - 1), C: far(known - 1, known - 1)
    }  # fmt: skip
    assert client.run(12.0) == [], "ten steps, and the time of three questions"
    assert client.asked > 0
    (made,) = client.run(5.0)
    assert isinstance(made, Suspect)
    assert made.peer == B


def test_a_caller_who_does_not_choose_is_no_silence_of_the_stages() -> None:
    client = Client().running()
    for _ in range(200):
        assert client.beat(owed=False) == []
    assert client.asked == 0


def test_a_replacement_gets_the_time_of_its_replay() -> None:
    client = Client().running()
    client.detector.replaced(
        client.now, client.known, replay_s=3.0, tpot_s=0.05, expected_s=dict.fromkeys(STAGES, 0.02)
    )
    assert client.run(2.5) == []
    assert client.asked == 0
    client.told = lambda: {A: far(160, 160), B: far(160, 50), C: far(50, 50)}
    assert client.run(14.0) == []
    assert client.asked > 0
    (made,) = client.run(10.0)
    assert isinstance(made, Suspect)
    assert made.peer == B


@pytest.mark.parametrize("ttft_s", [0.5, 3.0, 60.0])
def test_one_that_freezes_in_a_long_prompt_is_left_as_soon_as_in_a_short_one(ttft_s: float) -> None:
    """Who computes answers pings."""
    client = Client(ttft_s=ttft_s).in_its_prompt()
    client.frozen = {B}
    began_s = client.now
    (made,) = client.run(8.0)
    assert isinstance(made, Suspect)
    assert made.peer == B
    assert client.now - began_s <= 2.1


# --- pace -----------------------------------------------------------------------------------------


def slow_down(client: Client, steps: dict[PeerId, float]) -> list[Decision]:
    client.told = lambda: {peer: far(0, 0, steps.get(peer, 0.017)) for peer in STAGES}
    return client.run(20.0, every=4, tokens=1)


def test_a_straggler_is_named_within_ten_steps() -> None:
    client = Client()
    client.run(8.0, tokens=2)
    known = client.known
    assert slow_down(client, {B: 0.35}) == [Slow(B, 0.35)]
    assert client.known - known <= 8


def test_a_stage_that_is_slow_from_the_start_is_held_against_what_it_announced() -> None:
    client = Client(tpot_s=0.05)
    client.known += 1
    client.run(6.0, every=60)
    assert slow_down(client, {C: 0.36}) == [Slow(C, 0.36)]


def test_where_all_are_slower_nobody_is_the_straggler() -> None:
    client = Client().running()
    client.run(5.0, tokens=2)
    assert slow_down(client, dict.fromkeys(STAGES, 0.13)) == []
    assert client.asked >= 1
    assert client.asked <= 3, "it does not ask for ever"


@given(st.lists(st.sampled_from([1, 1, 2, 2, 3]), min_size=10, max_size=80))
def test_common_jitter_is_no_straggler(tokens: list[int]) -> None:
    client = Client(tpot_s=0.05)
    for count in tokens:
        assert client.beat(count) == []
