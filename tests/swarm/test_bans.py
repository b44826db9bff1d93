"""Bans: doubling, probation, forgiveness, and a bounded table."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from hexswarm import bans as module
from hexswarm.bans import FIRST_BAN_S, FORGIVE_S, LONGEST_BAN_S, SPREAD, Bans
from hexswarm.records import PeerId

A, B = PeerId("a"), PeerId("b")


def flapped(times: int) -> tuple[Bans, float]:
    """A peer that failed so often, each time as soon as its ban was over; and that moment."""
    bans, rng, now = Bans(), random.Random(1), 0.0
    for _ in range(times):
        now = bans.strike(A, now, rng)
    return bans, now


def test_bans_double_up_to_ten_minutes() -> None:
    bans, rng, now = Bans(), random.Random(1), 0.0
    for strike in range(12):
        until_s = bans.strike(A, now, rng)
        least_s = min(LONGEST_BAN_S, FIRST_BAN_S * 2**strike)
        assert least_s <= until_s - now <= (1 + SPREAD) * least_s
        assert A in bans.banned(until_s - 0.01)
        assert A not in bans.banned(until_s)
        now = until_s


def test_one_loss_that_many_sessions_notice_is_one_strike() -> None:
    bans, rng = Bans(), random.Random(1)
    until_s = bans.strike(A, 0.0, rng)
    assert [bans.strike(A, 0.1 * n, rng) for n in range(8)] == [until_s] * 8
    assert bans.strikes(A, 1.0) == 1


@pytest.mark.parametrize(("flaps", "most"), [(1, 0.6), (2, 0.3), (3, 0.1), (6, 0.1)])
def test_one_that_flaps_gets_a_small_share_of_new_sessions(flaps: int, most: float) -> None:
    bans, now = flapped(flaps)
    rng = random.Random(2)
    chosen = sum(A not in bans.draw(now, rng) for _ in range(2000)) / 2000
    assert 0.02 < chosen < most


def test_time_forgives() -> None:
    bans, now = flapped(3)
    assert bans.share(A, now) < 0.1
    assert bans.share(A, now + FORGIVE_S) == 0.2
    assert bans.draw(now + 3 * FORGIVE_S, random.Random(1)) == frozenset()
    assert len(bans) == 0


def test_others_are_not_concerned() -> None:
    bans, now = flapped(4)
    assert bans.share(B, now) == 1.0
    assert B not in bans.draw(now, random.Random(3))


@given(st.integers(1, 3000))
def test_the_table_is_bounded(peers: int) -> None:
    bans, rng = Bans(), random.Random(1)
    for number in range(peers):
        bans.strike(PeerId(f"p{number}"), float(number), rng)
    assert len(bans) == min(peers, module.PEERS)
    assert bans.strikes(PeerId(f"p{peers - 1}"), float(peers)) > 0, "the newest stay"


class Machine(RuleBasedStateMachine):
    """Strikes and time in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.bans, self.rng, self.now = Bans(), random.Random(1), 0.0

    @rule(peer=st.sampled_from([A, B]))
    def strike(self, peer: PeerId) -> None:
        before = self.bans.strikes(peer, self.now)
        until_s = self.bans.strike(peer, self.now, self.rng)
        assert self.now < until_s <= self.now + LONGEST_BAN_S * (1 + SPREAD)
        assert before <= self.bans.strikes(peer, self.now) <= before + 1

    @rule(seconds=st.floats(0, 2000))
    def wait(self, seconds: float) -> None:
        before = {peer: self.bans.strikes(peer, self.now) for peer in (A, B)}
        self.now += seconds
        assert all(self.bans.strikes(peer, self.now) <= before[peer] for peer in before)

    @rule()
    def draw(self) -> None:
        drawn = self.bans.draw(self.now, self.rng)
        assert self.bans.banned(self.now) <= drawn

    @invariant()
    def shares_are_shares(self) -> None:
        for peer in (A, B):
            share = self.bans.share(peer, self.now)
            assert (share == 0) == (peer in self.bans.banned(self.now))
            assert 0 <= share <= 1


TestMachine = Machine.TestCase
