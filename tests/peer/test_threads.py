"""The fewest threads with nearly the best time are found, on a machine that is made up."""

from __future__ import annotations

import random

import pytest
import torch

from hexswarm.kernels import native
from hexswarm.peer.threads import BUDGET_S, ENOUGH, ROUNDS, counts, fewest_threads
from tests.peer.test_native import logits_of, small_shard


class Machine:
    """Steps that take as long as `time_s` says, and now and then longer."""

    def __init__(self, time_s, rng=None):
        self.time_s, self.rng, self.now, self.steps = time_s, rng, 0.0, []

    def __call__(self, count):
        self.steps.append(count)
        taken = self.time_s(count)
        if self.rng and self.rng.random() < 0.5:
            taken *= self.rng.uniform(1.0, 20.0)
        self.now += taken
        return taken

    def choose(self, most):
        return fewest_threads(self, most, lambda: self.now)


@pytest.mark.parametrize(
    ("most", "expected"),
    [(1, (1,)), (2, (1, 2)), (6, (1, 2, 4, 6)), (8, (1, 2, 4, 8)), (12, (1, 2, 4, 8, 12))],
)
def test_counts_are_powers_of_two_and_all(most, expected):
    assert counts(most) == expected


def test_one_thread_needs_no_measuring():
    machine = Machine(lambda count: 1.0)
    assert machine.choose(1) == 1
    assert not machine.steps


@pytest.mark.parametrize("fill", [1, 2, 4, 8])
def test_threads_beyond_the_memorys_bandwidth_are_left_alone(fill):
    """Four cores fill the way to memory, each further one costs a little: four it is."""
    machine = Machine(lambda count: 0.01 / min(count, fill) + 1e-4 * count)
    assert machine.choose(16) == fill


def test_no_count_within_reach_of_the_best_is_smaller():
    """Whatever the times are; disturbed steps only ever take longer."""
    rng = random.Random(4)
    for _ in range(200):
        most = rng.randint(2, 20)
        times = {count: rng.uniform(0.001, 0.003) for count in counts(most)}
        chosen = Machine(times.__getitem__).choose(most)
        limit = ENOUGH * min(times.values())
        assert times[chosen] <= limit
        assert all(times[count] > limit for count in times if count < chosen)


def test_a_noisy_neighbour_does_not_decide():
    hits = sum(
        Machine(lambda count: 0.01 / count, random.Random(seed)).choose(4) == 4
        for seed in range(100)
    )
    assert hits > 90


def test_slow_steps_are_tried_once():
    machine = Machine(lambda count: BUDGET_S)
    machine.choose(4)
    assert machine.steps == [1, 2, 4]
    quick = Machine(lambda count: 1e-6)
    quick.choose(4)
    assert quick.steps == [1, 2, 4] * (1 + ROUNDS)


@pytest.mark.skipif(not native.available(), reason="installed without a compiler")
def test_a_team_of_another_size_computes_the_same():
    torch.set_num_threads(1)
    shard = small_shard()
    expected = logits_of(shard)
    for count in (3, 1, 2):
        shard.threads = count
        assert shard.threads == count
        assert torch.equal(logits_of(shard), expected)
    other = small_shard(backend="torch")
    other.threads = 2
    assert other.threads == 1
