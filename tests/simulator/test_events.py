"""Virtual time: order, ties, what an event may schedule."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hexswarm.simulator.events import Agenda


@given(st.lists(st.floats(0, 100, allow_nan=False)))
def test_events_come_in_order_of_time_and_then_of_age(times: list[float]) -> None:
    agenda, seen = Agenda(), []
    for number, when in enumerate(times):
        agenda.at(when, lambda now, each: seen.append((now, each)), number)
    agenda.run(100.0)
    assert seen == sorted((when, number) for number, when in enumerate(times))
    assert agenda.now == 100.0
    assert len(agenda) == 0


def test_what_is_later_than_asked_for_waits() -> None:
    agenda, seen = Agenda(), []
    agenda.at(1.0, seen.append)
    agenda.at(2.0, seen.append)
    agenda.run(1.5)
    assert seen == [1.0]
    assert (agenda.now, agenda.next_s) == (1.5, 2.0)
    agenda.run(2.0)
    assert (seen, agenda.next_s) == ([1.0, 2.0], math.inf)


def test_an_event_may_schedule_others_at_the_same_moment() -> None:
    agenda, seen = Agenda(), []

    def again(now: float, left: int) -> None:
        seen.append(left)
        if left:
            agenda.at(now, again, left - 1)

    agenda.at(3.0, again, 2)
    agenda.run(3.0)
    assert seen == [2, 1, 0]


def test_nothing_is_scheduled_in_the_past() -> None:
    agenda = Agenda()
    agenda.run(5.0)
    with pytest.raises(AssertionError):
        agenda.at(4.0, print)
