"""Batches of whole prompts."""

from __future__ import annotations

from hexswarm.peer.steps import Step
from hexswarm.peer.steptime import StepTime
from hexswarm.simulator.whole import MOST_PROMPTS, WholePrompts


def key(number: int) -> bytes:
    return number.to_bytes(16, "big")


def prompt(number: int, tokens: int = 100) -> Step:
    return Step(key(number), 0, tokens, None, True, 0.0)


def decode(number: int, position: int = 100) -> Step:
    return Step(key(number), position, 1, None, True, 0.0)


def queue(prompts: int = 0, rows: int = 0) -> WholePrompts:
    return WholePrompts(StepTime(0.01), most_prompts=prompts, most_rows=rows)


def taken(waiting: WholePrompts) -> list[tuple[bytes, int]]:
    batch = waiting.pick(1.0)
    return [(row.session, row.count) for row in batch.rows] if batch else []


def test_prompts_go_whole_beside_all_decodes_in_order_of_arrival() -> None:
    waiting = queue(prompts=2)
    for step in (prompt(1), decode(2), prompt(3, 2000), prompt(4), decode(5)):
        waiting.submit(step, 0.5)
    assert len(waiting) == 5
    assert taken(waiting) == [(key(1), 100), (key(2), 1), (key(3), 2000), (key(5), 1)]
    assert taken(waiting) == [(key(4), 100)]
    assert waiting.pick(1.0) is None


def test_limits_are_those_of_the_profile_or_usual_ones() -> None:
    waiting, bounded = queue(), queue(rows=2)
    for number in range(5):
        waiting.submit(prompt(number), 0.0)
        bounded.submit(decode(number), 0.0)
    assert len(taken(waiting)) == MOST_PROMPTS
    assert [len(taken(bounded)) for _ in range(3)] == [2, 2, 1]


def test_a_row_knows_since_when_it_waited() -> None:
    waiting = queue()
    waiting.submit(decode(1), 0.25)
    batch = waiting.pick(1.0)
    assert batch is not None
    assert batch.rows[0].ready_s == 0.25
    assert batch.rows[0].decode


def test_what_is_dropped_is_gone() -> None:
    waiting = queue()
    for step in (prompt(1), decode(2, 70), decode(1, 160)):
        waiting.submit(step, 0.0)
    assert waiting.drop(key(1)) == 0
    assert waiting.drop(key(1)) is None
    assert taken(waiting) == [(key(2), 1)]


def test_waiting_prompts_are_told_as_seconds() -> None:
    waiting = queue()
    assert waiting.prompts_s() == 0
    waiting.submit(prompt(1, 50), 0.0)
    fifty_s = waiting.prompts_s()
    waiting.submit(prompt(2, 500), 0.0)
    assert waiting.prompts_s() > 2 * fifty_s > 0
    batch = waiting.pick(0.0)
    assert batch is not None
    before_s = waiting.times.predict(0, 550)
    waiting.finished(batch, 9.0, 9.0)
    assert waiting.times.predict(0, 550) > before_s
