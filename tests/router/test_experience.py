"""Experience: who gets the blame when a ring is slower than its peers announced."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hexswarm.records import Announcement, PeerId
from hexswarm.router.experience import HALF_LIFE_S, LEAST, MOST, PEERS, Experience
from tests.strategies import announcements, peer_id

SWARM = tuple(peer_id(index) for index in range(8))
LINKS_S = 0.02
seeds = st.integers(0, 2**32)


@dataclass
class World:
    """Eight peers, rings of three, and a client that predicts, observes and learns."""

    rng: random.Random
    truth: dict[PeerId, float] = field(default_factory=dict)
    """By how much a peer is slower than it announces; 1 if not named."""
    noise: float = 0.0
    slack: float = 0.0
    """Share of the prediction that is the links' jitter."""
    now: float = 0.0
    learnt: Experience = field(default_factory=Experience)

    def __post_init__(self) -> None:
        self.announced_s = {peer: self.rng.uniform(0.01, 0.03) for peer in SWARM}

    def use(self, rounds: int) -> None:
        for _ in range(rounds):
            self.now += 5.0
            ring = self.rng.sample(SWARM, 3)
            shares = self.predicted(ring)
            compute_s = sum(self.announced_s[peer] * self.truth.get(peer, 1.0) for peer in ring)
            observed_s = compute_s * (1 + self.rng.uniform(-self.noise, self.noise)) + LINKS_S
            total_s = sum(shares.values()) + LINKS_S
            slack_s = self.slack * total_s
            self.learnt.observe(shares, total_s, observed_s, self.now, slack_s=slack_s)

    def predicted(self, ring: Sequence[PeerId]) -> Mapping[PeerId, float]:
        return {peer: self.announced_s[peer] * self.factor(peer) for peer in ring}

    def factor(self, peer: PeerId) -> float:
        return self.learnt.factor(peer, self.now)


@given(seeds)
def test_honest_peers_stay_within_a_tenth_of_their_word(seed: int) -> None:
    """However the rings are drawn, noise of which some is beyond the slack convicts nobody."""
    world = World(random.Random(seed), noise=0.06, slack=0.03)
    for _ in range(60):
        world.use(1)
        assert all(0.9 <= world.factor(peer) <= 1.1 for peer in SWARM)


@given(seeds, st.sampled_from([0.0, 0.02]))
def test_of_eight_peers_the_liar_is_found(seed: int, noise: float) -> None:
    """A peer three times slower than it says is at 2 or more after 60 rings, others near 1."""
    liar = SWARM[3]
    world = World(random.Random(seed), {liar: 3.0}, noise)
    world.use(60)
    assert 2.0 <= world.factor(liar) <= 3.3
    assert all(0.75 <= world.factor(peer) <= 1.3 for peer in SWARM if peer != liar)


@given(seeds)
def test_a_peer_that_recovers_is_forgiven(seed: int) -> None:
    """Rings as fast as announced bring the factor back, and nobody else pays for it."""
    world = World(random.Random(seed), {SWARM[0]: 3.0})
    world.use(60)
    world.truth = {}
    world.use(60)
    assert all(0.8 <= world.factor(peer) <= 1.4 for peer in SWARM)
    world.use(60)
    assert all(0.9 <= world.factor(peer) <= 1.2 for peer in SWARM)


@given(seeds)
def test_factors_stay_in_bounds_whatever_is_observed(seed: int) -> None:
    rng = random.Random(seed)
    learnt, now = Experience(), 0.0
    odd = [0.0, 1e-12, 1.0, 1e9, math.inf, math.nan, -1.0]
    for _ in range(100):
        now += rng.choice([-10.0, 0.0, 1.0, 1e6])
        ring = {peer: rng.choice(odd) for peer in rng.sample(SWARM, 3)}
        learnt.observe(ring, rng.choice(odd), rng.choice(odd), now, rng.choice([0.0, 1.0]))
        learnt.observe_stage(SWARM[0], rng.choice(odd), rng.choice(odd), now)
        assert all(LEAST <= learnt.factor(peer, now) <= MOST for peer in SWARM)


def test_jitter_of_the_links_is_not_blamed_on_devices() -> None:
    learnt = Experience()
    for now in range(20):
        learnt.observe({SWARM[0]: 0.05}, 0.08, 0.09, float(now), slack_s=0.02)
    assert learnt.factor(SWARM[0], 20.0) == 1.0
    learnt.observe({SWARM[0]: 0.05}, 0.08, 0.2, 21.0, slack_s=0.02)
    assert learnt.factor(SWARM[0], 21.0) > 1.3


def test_an_old_prediction_is_not_learnt_from_twice() -> None:
    """A long session observes each turn against the prediction of its opening."""
    learnt, factors = Experience(), {SWARM[0]: 1.0}
    for now in range(50):
        learnt.observe({SWARM[0]: 0.05}, 0.05, 0.1, float(now), factors=factors)
    assert 1.8 <= learnt.factor(SWARM[0], 50.0) <= 2.05


def test_what_a_peer_tells_of_itself_can_only_make_it_slower() -> None:
    learnt = Experience()
    learnt.observe_stage(SWARM[0], 0.05, 0.01, 0.0)
    assert learnt.factor(SWARM[0], 0.0) == 1.0
    for now in range(10):
        learnt.observe_stage(SWARM[0], 0.05 * learnt.factor(SWARM[0], now), 0.15, now)
    slow = learnt.factor(SWARM[0], 10.0)
    assert 2.7 <= slow <= 3.0
    learnt.observe_stage(SWARM[0], 0.15, 0.01, 10.0)
    assert learnt.factor(SWARM[0], 10.0) == slow


def test_one_stall_does_not_condemn_a_peer() -> None:
    learnt = Experience()
    learnt.observe({SWARM[0]: 0.05}, 0.05, 60.0, 0.0)
    assert 1.5 < learnt.factor(SWARM[0], 0.0) < 2.1


def test_half_of_what_was_learnt_is_forgotten_in_ten_minutes() -> None:
    learnt = Experience()
    for now in range(30):
        learnt.observe({SWARM[0]: 0.05 * learnt.factor(SWARM[0], now)}, 0.05, 0.2, now)
    then = learnt.factor(SWARM[0], 29.0)
    assert learnt.factor(SWARM[0], 29.0 + HALF_LIFE_S) == pytest.approx(math.sqrt(then))
    assert learnt.factor(SWARM[0], 29.0 + 20 * HALF_LIFE_S) == pytest.approx(1.0, abs=1e-4)


def test_memory_is_bounded_and_the_longest_unseen_go_first() -> None:
    learnt = Experience()
    for index in range(PEERS):
        learnt.observe({peer_id(index): 0.05}, 0.05, 0.2, 0.0)
    learnt.observe({peer_id(0): 0.05}, 0.05, 0.2, 1.0)
    learnt.observe({PeerId("new"): 0.05}, 0.05, 0.2, 1.0)
    assert len(learnt) == PEERS
    assert learnt.factor(peer_id(0), 1.0) > 1
    assert learnt.factor(peer_id(1), 1.0) == 1


@given(announcements())
def test_an_announcement_is_scaled_in_its_speeds_alone(item: Announcement) -> None:
    learnt = Experience()
    assert learnt.apply(item, 0.0) is item
    learnt.observe({item.peer: 0.05}, 0.05, 0.1, 0.0)
    factor = learnt.factor(item.peer, 0.0)
    scaled = learnt.apply(item, 0.0)
    assert scaled.speed.decode_layer_s == item.speed.decode_layer_s * factor
    assert scaled.speed.prefill_layer_s == item.speed.prefill_layer_s * factor
    assert scaled.speed.head_s == item.speed.head_s * factor
    assert scaled.speed.row_layer_s == item.speed.row_layer_s * factor
    assert (scaled.queue_s, scaled.span, scaled.sequence) == (
        item.queue_s,
        item.span,
        item.sequence,
    )
