"""State machines that Hypothesis drives with hostile input: the directory, and a stage table.

KV accounting, reservations, promises, bans and shelves have theirs beside their own tests.
"""

from __future__ import annotations

import math
import random
from dataclasses import fields, replace
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from hexswarm.directory import EXPIRE_S, SKEW_S, Directory, SignedAnnouncement
from hexswarm.errors import LocalProtocolError
from hexswarm.messages import _KINDS, Message, Open, Ping, decode, encode
from hexswarm.records import PeerId
from tests.loopback import CLIENT, MODEL, Loopback, answer
from tests.peer.test_announcer import ME

PEERS = [PeerId(name) for name in "abc"]


class Records(RuleBasedStateMachine):
    """A directory against a list of all that was ever said to it."""

    def __init__(self) -> None:
        super().__init__()
        self.view, self.now = Directory(), 1000.0
        self.said: list[SignedAnnouncement] = []
        self.forgotten: dict[PeerId, int] = {}
        self.version = 0

    @rule(
        peer=st.sampled_from(PEERS),
        sequence=st.integers(0, 6),
        life_s=st.sampled_from([-5.0, 1.0, 90.0, 3600.0, 1e9]),
    )
    def hear(self, peer: PeerId, sequence: int, life_s: float) -> None:
        word = replace(ME, peer=peer, sequence=sequence, issued_s=self.now)
        data = f"{peer} {sequence} {len(self.said)}".encode()
        record = SignedAnnouncement(word, self.now + life_s, data)
        self.view.merge([record], self.now)
        latest_s = min(record.expires_s, self.now + EXPIRE_S + SKEW_S)
        self.said.append(replace(record, expires_s=latest_s))

    @rule(index=st.integers(0, 99))
    def hear_again(self, index: int) -> None:
        """An old word, from whoever kept it, brings nobody back."""
        if self.said:
            self.view.merge([self.said[index % len(self.said)]], self.now)

    @rule(peer=st.sampled_from(PEERS))
    def forget(self, peer: PeerId) -> None:
        self.view.forget(peer)
        known = [record.announcement.sequence for record in self.said if record.peer == peer]
        if known:
            self.forgotten[peer] = max(known)

    @rule(seconds=st.sampled_from([0.5, 10.0, 100.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @invariant()
    def alive_is_the_last_word_of_each_unless_it_ran_out(self) -> None:
        expected = {}
        for peer in PEERS:
            own = [record for record in self.said if record.peer == peer]
            if not own:
                continue
            rank = max((r.announcement.sequence, r.announcement.issued_s, r.data) for r in own)
            last = next(
                r for r in own if (r.announcement.sequence, r.announcement.issued_s, r.data) == rank
            )
            dead = self.forgotten.get(peer, -1) >= last.announcement.sequence
            if last.expires_s > self.now and not dead:
                expected[peer] = last.announcement.sequence
        found = {item.peer: item.sequence for item in self.view.alive(self.now)}
        # A word with the forgotten one's sequence and later bytes may bring the peer back.
        for peer, sequence in found.items():
            assert expected.get(peer, self.forgotten.get(peer)) == sequence
        assert set(expected) <= set(found)

    @invariant()
    def nobody_outlives_his_words(self) -> None:
        latest_s = max((record.expires_s for record in self.said), default=-math.inf)
        assert latest_s <= self.now + EXPIRE_S + SKEW_S
        assert self.view.alive(self.now + EXPIRE_S + SKEW_S) == ()

    @invariant()
    def versions_only_rise(self) -> None:
        assert self.view.version >= self.version
        self.version = self.view.version


Records.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestRecords = Records.TestCase

_FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "int": st.sampled_from([0, 1, 2, 3, 15, 16, 63, 64, 65, 1 << 16]),
    "float": st.sampled_from([0.0, 0.5, 1.0, 1e9]),
    "bool": st.booleans(),
    "str": st.sampled_from(["", "client", "other", "p0", "p1", "p2", "lost", "unknown", "float32"]),
    "bytes": st.just(bytes(16)),
    "tuple[str, ...]": st.just(()),
    "tuple[int, ...]": st.sampled_from([(), (0,), (5, 7)]),
}


@st.composite
def hostile(draw: st.DrawFn) -> Message:
    """Any message that passes the schema, with numbers near those that are in use."""
    kind = draw(st.sampled_from(sorted(_KINDS)))
    made = _KINDS[kind]
    values = {item.name: draw(_FIELDS[str(item.type)]) for item in fields(made)}
    if "dtype" in values:
        values["dtype"] = "float32"
    if made is Open:
        values["digest"] = MODEL
    try:
        return decode(encode(made(**values)))
    except LocalProtocolError:  # a number or a word that this field does not permit
        return Ping(1)


class Hostile(RuleBasedStateMachine):
    """Honest sessions on three stages; others say whatever the schema permits about them."""

    def __init__(self) -> None:
        super().__init__()
        self.swarm = Loopback((0, 2), (2, 4), (4, 6), blocks=32)
        self.mine, self.told = self.swarm.opened(64)
        self.theirs, _ = self.swarm.open(32, who=PeerId("other"))
        self.swarm.run()
        self.asked: list[int] = []

    @rule(
        who=st.sampled_from(["other", "stranger", "p0", "p1", "p2"]),
        host=st.sampled_from(["p0", "p1", "p2"]),
        message=hostile(),
        whose=st.sampled_from(["mine", "theirs", "nobody's"]),
        payload=st.sampled_from([b"", bytes(4), bytes(3), b"\xff" * 4, bytes(400)]),
    )
    def intrude(self, who: str, host: str, message: Message, whose: str, payload: bytes) -> None:
        """Nobody but the client and the neighbours may do anything to a session."""
        key = {"mine": self.mine.key, "theirs": self.theirs.key, "nobody's": b"n" * 16}[whose]
        if hasattr(message, "session"):
            message = replace(message, session=key)  # type: ignore[call-arg]
        neighbour = who.startswith("p") and whose != "nobody's"
        if who == host or neighbour:
            return  # a stage of the session that lies about it can spoil it, and nothing else
        self.swarm.say(who, host, message, payload)

    @rule(tokens=st.lists(st.integers(0, 96), min_size=1, max_size=8))
    def ask(self, tokens: list[int]) -> None:
        if self.mine.running:
            self.swarm.run()
        self.asked = tokens
        self.swarm.ask(self.mine, tokens, 4)

    @rule(times=st.integers(1, 20), rng=st.randoms(use_true_random=False))
    def go_on(self, times: int, rng: random.Random) -> None:
        for _ in range(times):
            if moves := self.swarm.moves():
                rng.choice(moves)()

    @invariant()
    def kv_in_use_is_the_sum_of_the_leases(self) -> None:
        for host in self.swarm.hosts.values():
            tables = host.ledger.tables
            assert host.kv_in_use == sum(len(tables.blocks(key)) for key in tables.sessions)
            assert set(tables.sessions) == set(host.table._sessions)

    @invariant()
    def my_session_is_as_if_alone(self) -> None:
        assert self.told.error is None
        if self.told.tokens:
            assert self.told.tokens == answer(self.asked, len(self.told.tokens), 6)

    def teardown(self) -> None:
        self.swarm.run()
        if self.asked:
            assert self.told.tokens == answer(self.asked, 4, 6)
        for who, session, _ in list(self.swarm.sessions.values()):
            if who == CLIENT:
                self.swarm.carry_out(session, session.close())
        self.swarm.run()
        for host in self.swarm.hosts.values():
            assert self.mine.key not in host.ledger.tables.sessions


Hostile.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestHostile = Hostile.TestCase
