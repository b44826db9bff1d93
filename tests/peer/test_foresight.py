"""What is foreseen is claimed by the very step that it foresaw, and by nothing else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from hexswarm.peer.cache import BlockTables
from hexswarm.peer.foresight import Ahead, Foresight
from hexswarm.peer.steps import Batch, Result, Row, Step, TailPolicy
from hexswarm.records import Sampling

KEY = b"k" * 16
POLICY = TailPolicy(Sampling())


class World:
    """A session whose prompt of three tokens is being computed."""

    def __init__(self, tokens: int = 40) -> None:
        self.cache = BlockTables(8)
        self.cache.lease(KEY, tokens, 0.0)
        self.cache.write(KEY, 0, 3, 0.0)
        self.foresight = Foresight(self.cache)
        self.row = Row(KEY, 0, 3, [1, 2, 3], True, self.cache.blocks(KEY), policy=POLICY)

    def foresee(self, most: int = 8) -> list[Ahead]:
        return self.foresight.foresee(Batch((self.row,)), {0: "unread"}, most)

    def told(self, **what: Any) -> Ahead:
        (ahead,) = self.foresee()
        self.foresight.told(Result(self.row, **{"token": 7, **what}))
        return ahead


STEP = Step(KEY, 3, 1, [7], last=True, arrived_s=0.0, policy=POLICY)


def test_a_row_follows_with_what_the_device_knows() -> None:
    (ahead,) = World().foresee()
    row = ahead.row
    assert (row.session, row.position, row.count, row.payload) == (KEY, 3, 1, "unread")
    assert row.decode
    assert row.policy is POLICY


def test_it_is_claimed_once() -> None:
    world = World()
    ahead = world.told()
    assert world.foresight.claim(STEP) is ahead
    assert ahead.claimed
    assert world.foresight.claim(STEP) is None


def test_a_result_waits_until_it_is_claimed() -> None:
    world = World()
    ahead = world.told()
    result = Result(ahead.row, token=8)
    assert not world.foresight.computed(ahead, result)
    claimed = world.foresight.claim(STEP)
    assert claimed is not None
    assert claimed.result is result


@pytest.mark.parametrize(
    "other",
    [
        replace(STEP, payload=[8]),
        replace(STEP, position=2),
        replace(STEP, turn=1),
        replace(STEP, epoch=1),
        replace(STEP, count=2, payload=[7, 7]),
        replace(STEP, last=False),
        replace(STEP, policy=TailPolicy(Sampling())),
    ],
    ids=["token", "position", "turn", "epoch", "count", "no last one", "policy"],
)
def test_another_step_voids_it(other: Step) -> None:
    world = World()
    ahead = world.told()
    assert world.foresight.claim(other) is None
    assert world.foresight.claim(STEP) is None
    assert not world.foresight.computed(ahead, Result(ahead.row, token=1))
    assert len(world.foresight) == 0


def test_a_step_that_comes_before_the_token_was_told_voids_it() -> None:
    world = World()
    world.foresee()
    assert world.foresight.claim(STEP) is None


@pytest.mark.parametrize("what", [{"token": None, "error": "ill"}, {"token": None}])
def test_a_row_after_one_that_gave_no_token_is_void(what: dict[str, Any]) -> None:
    world = World()
    world.told(**what)
    assert world.foresight.claim(STEP) is None


def test_an_error_that_nobody_asked_for_is_not_told() -> None:
    """The step will be computed when it comes."""
    world = World()
    ahead = world.told()
    assert not world.foresight.computed(ahead, Result(ahead.row, error="ill"))
    assert world.foresight.claim(STEP) is None


def test_nothing_follows_beyond_the_lease_or_beyond_what_was_taken_back() -> None:
    assert World(tokens=3).foresee() == []
    world = World()
    world.cache.rewind(KEY, 2)
    assert world.foresee() == []
    world = World()
    world.cache.release(KEY, 0.0)
    assert world.foresee() == []


def test_nothing_follows_on_what_nobody_claimed_nor_without_room() -> None:
    world = World()
    (ahead,) = world.foresee()
    follows = world.foresight.foresee(Batch((ahead.row,)), {0: "unread"}, 8)
    assert follows == []
    assert World().foresee(most=0) == []
    assert World().foresee(most=-3) == []


def test_a_claimed_row_has_a_successor() -> None:
    world = World()
    ahead = world.told()
    world.cache.write(KEY, 3, 1, 0.0)
    assert world.foresight.claim(STEP) is ahead
    (follows,) = world.foresight.foresee(Batch((ahead.row,)), {0: "unread"}, 8)
    assert follows.row.position == 4
