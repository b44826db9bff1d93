"""When a group is worth it: predictions against measurements, and the teams that are chosen."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hexswarm.peer.cuts import Sizes
from hexswarm.peer.groups.division import Room
from hexswarm.peer.groups.policy import (
    GAIN,
    Candidate,
    Team,
    fits_alone,
    stage_s,
    sum_s,
    team_of,
    worth,
)
from hexswarm.peer.groups.standing import CLEAR_S, FIRST_S, JITTER, MOST_PEERS, MOST_S, Standing
from hexswarm.records import PeerId

LLAMA_8B = Sizes(4096, 32, 8, 128, 14_336, 128_256, 16, weight_bytes=2)
TOKENS = 16_384
GB = 1 << 30


def candidate(number: int, layer_s: float = 0.01, free_gb: float = 24) -> Candidate:
    return Candidate(PeerId(f"peer{number:02d}"), Room(int(free_gb * GB), layer_s))


def team(*members: Candidate) -> Team:
    found = team_of(LLAMA_8B, members[0], members[1:], len(members), TOKENS, 2)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("bytes_", "members", "rtt_s", "measured_s"),
    [
        *((8192, 2, 0.35e-3, 0.77e-3), (8192, 4, 0.35e-3, 1.58e-3), (16384, 2, 0.35e-3, 1.0e-3)),
        *((1 << 20, 2, 0.35e-3, 28e-3), (8192, 2, 5e-3, 3.0e-3), (16384, 2, 5e-3, 3.6e-3)),
    ],
)
def test_a_sum_is_predicted_as_it_was_measured(
    bytes_: int, members: int, rtt_s: float, measured_s: float
) -> None:
    assert sum_s(bytes_, members, rtt_s) == pytest.approx(measured_s, rel=0.1)


def test_a_slow_line_counts() -> None:
    assert sum_s(1 << 20, 2, 0.0, 1.25e6) == pytest.approx((1 << 20) / 1.25e6, rel=0.01)


def test_a_group_pays_where_layers_are_slow() -> None:
    """Two machines halve 10 ms a layer less 2 ms of sums; they do nothing for 1 ms."""
    slow = worth(LLAMA_8B, team(candidate(0), candidate(1)), 3e-4, alone=True)
    assert slow.kind == "faster"
    assert slow.worth
    assert slow.alone_s == pytest.approx(0.16)
    assert slow.together_s == pytest.approx(16 * (0.005 + 2 * sum_s(16384, 2, 3e-4)), rel=0.02)
    quick = worth(LLAMA_8B, team(candidate(0, 1e-3), candidate(1, 1e-3)), 3e-4, alone=True)
    assert quick.kind == "slower"
    assert not quick.worth
    far = worth(LLAMA_8B, team(candidate(0), candidate(1)), 20e-3, alone=True)
    assert far.kind == "slower"


def test_a_group_is_needed_where_one_has_not_the_memory() -> None:
    small, other = candidate(0, 1e-3, 6), candidate(1, 1e-3, 6)
    assert not fits_alone(LLAMA_8B, small.room, TOKENS, 2)
    assert fits_alone(LLAMA_8B, candidate(0).room, TOKENS, 2)
    verdict = worth(LLAMA_8B, team(small, other), 3e-4, alone=False)
    assert (verdict.kind, verdict.alone_s, verdict.worth) == ("needed", None, True)


def test_unlike_members_have_unlike_shares() -> None:
    """In proportion to speed the slower one does not hold up the faster."""
    pair = team(candidate(0, 0.01), candidate(1, 0.03))
    assert pair.shares[0] > 2 * pair.shares[1]
    halves = replace(pair, shares=(500, 500))
    assert stage_s(LLAMA_8B, pair, 3e-4) < 0.75 * stage_s(LLAMA_8B, halves, 3e-4)


def test_the_fastest_are_taken_unless_they_lack_the_memory() -> None:
    leader, quick, slow = candidate(0, free_gb=5), candidate(1, 0.005, 1), candidate(2, 0.02, 24)
    chosen = team_of(LLAMA_8B, leader, [quick, slow], 2, TOKENS, 2)
    assert chosen is not None
    assert [one.peer for one in chosen.members] == [leader.peer, slow.peer]
    roomy = replace(quick, room=Room(24 * GB, 0.005))
    chosen = team_of(LLAMA_8B, leader, [slow, roomy], 2, TOKENS, 2)
    assert chosen is not None
    assert [one.peer for one in chosen.members] == [leader.peer, roomy.peer]
    tiny = [candidate(number, free_gb=1) for number in range(2)]
    assert team_of(LLAMA_8B, tiny[0], tiny[1:], 2, TOKENS, 2) is None
    assert team_of(LLAMA_8B, leader, [slow], 3, TOKENS, 2) is None, "too few"


@settings(max_examples=25)
@given(st.permutations(range(1, 6)), st.integers(2, 6))
def test_a_team_is_the_same_whoever_is_named_first(order: list[int], size: int) -> None:
    others = [candidate(number, 0.01 + 0.001 * (number % 3)) for number in range(1, 6)]
    turned = [others[number - 1] for number in order]
    found = team_of(LLAMA_8B, candidate(0), turned, size, TOKENS, 2)
    assert found == team_of(LLAMA_8B, candidate(0), others, size, TOKENS, 2)
    assert found is not None
    assert len(found.members) == size
    assert sum(found.shares) == 1000


@given(st.floats(1e-4, 1), st.floats(0, 2e-3))
def test_a_group_that_is_not_needed_gains_what_it_must(layer_s: float, rtt_s: float) -> None:
    pair = team(candidate(0, layer_s), candidate(1, layer_s))
    verdict = worth(LLAMA_8B, pair, rtt_s, alone=True)
    assert verdict.alone_s is not None
    assert verdict.worth == (verdict.together_s * GAIN <= verdict.alone_s)


# --- who failed -----------------------------------------------------------------------------------

PEER = PeerId("peer")


def test_each_failure_doubles_the_pause_up_to_a_limit() -> None:
    standing, now = Standing(Random(0)), 0.0
    assert not standing.out(PEER, now)
    for count in range(12):
        until_s = standing.strike(PEER, now)
        pause_s = min(FIRST_S * 2**count, MOST_S)
        assert pause_s <= until_s - now <= pause_s * (1 + JITTER)
        assert standing.out(PEER, until_s - 0.01)
        assert not standing.out(PEER, until_s)
        now = until_s
    assert standing.strike(PEER, now + CLEAR_S + 1) - now - CLEAR_S - 1 <= FIRST_S * (1 + JITTER)


def test_the_first_failure_may_be_free_and_the_second_is_not() -> None:
    standing = Standing(Random(0))
    standing.strike(PEER, 0.0, first_free=True)
    assert not standing.out(PEER, 0.0)
    standing.strike(PEER, 0.0, first_free=True)
    assert standing.out(PEER, FIRST_S - 0.01)


def test_few_are_remembered() -> None:
    standing = Standing(Random(0))
    for number in range(MOST_PEERS + 1):
        standing.strike(PeerId(f"peer{number}"), 0.0)
    assert not standing.out(PeerId("peer0"), 1.0)
    assert standing.out(PeerId("peer1"), 1.0)
