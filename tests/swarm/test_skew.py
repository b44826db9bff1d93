"""Clocks that are wrong, or set while we run: what this process goes by, and what it says."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hexswarm.clock import VirtualClock
from hexswarm.skew import CHECK_EVERY_S, LIMIT_S, Sample, SteadyClock, offset, skew


class Machine(VirtualClock):
    """A clock that somebody sets."""

    set_s = 0.0

    def wall(self) -> float:
        return super().wall() + self.set_s


def judged(clock: SteadyClock, *ahead_s: float) -> SteadyClock:
    clock.judge([Sample(value, 0.05) for value in ahead_s])
    return clock


@pytest.mark.parametrize(
    ("samples", "ahead_s"),
    [
        ([], 0.0),
        ([Sample(5.0, 0.5)], 4.5),
        ([Sample(-5.0, 0.5)], -4.5),
        ([Sample(2.0, 3.0)], 0.0),
        ([Sample(0.0, 0.1), Sample(1e9, 0.1), Sample(0.05, 0.1)], 0.0),
    ],
)
def test_the_offset_is_what_is_certain_of_the_median(samples: list[Sample], ahead_s: float) -> None:
    assert offset(samples) == ahead_s


@pytest.mark.parametrize("step_s", [3600.0, -60.0])
def test_setting_the_machine_moves_nothing_and_is_named(step_s: float) -> None:
    machine = Machine()
    clock = SteadyClock(machine)
    machine.advance(10.0)
    before = clock.wall()
    assert not clock.due
    assert clock.trouble() is None
    machine.set_s = step_s
    assert clock.wall() == before
    assert clock.due, "others are asked at once"
    assert "its own past" in str(clock.trouble())
    judged(clock, 0.0, 0.01, -0.01)
    machine.advance(5.0)
    assert clock.wall() == before + 5.0
    trouble = str(clock.trouble())
    assert f"{abs(step_s):,.1f} s {'ahead of' if step_s > 0 else 'behind'} the swarm" in trouble
    assert "3 nodes" in trouble
    assert not clock.due, "it is not asked again and again"
    machine.set_s = 0.0
    assert clock.due
    assert judged(clock, 0.0).trouble() is None


def test_a_machine_that_slept_is_believed_if_the_swarm_agrees() -> None:
    """The monotonic clock stood still; the machine's Unix time did not."""
    machine = Machine()
    clock = SteadyClock(machine)
    machine.set_s = 1800.0
    judged(clock, -1800.0, -1799.9)
    assert clock.wall() == machine.wall()
    assert clock.trouble() is None


def test_a_wrong_clock_is_kept_and_named_until_it_is_mended() -> None:
    machine = Machine()
    machine.set_s = 20.0
    clock = SteadyClock(machine)
    assert "20.0 s ahead of the swarm's (as 1 node told)" in str(judged(clock, 20.05).trouble())
    machine.set_s = 0.0
    assert judged(clock, 20.05).trouble() is None
    assert clock.wall() == machine.wall()


def test_everybody_is_asked_once_a_minute_and_silence_changes_nothing() -> None:
    machine = Machine()
    clock = SteadyClock(machine)
    machine.advance(CHECK_EVERY_S)
    assert clock.due
    clock.judge([])
    assert not clock.due
    assert clock.trouble() is None


@given(
    st.lists(st.floats(-1e5, 1e5), max_size=7),
    st.floats(-1e5, 1e5),
    st.floats(0, 1e4),
)
def test_liars_cannot_choose_our_time(lies: list[float], step_s: float, later_s: float) -> None:
    """Whatever others say, our time is one of two: as it went on, or the machine's own."""
    machine = Machine()
    clock = SteadyClock(machine)
    machine.set_s = step_s
    machine.advance(later_s)
    went_on = clock.wall()
    judged(clock, *lies)
    assert clock.wall() in (pytest.approx(went_on), pytest.approx(machine.wall()))


def test_the_error_names_offset_and_remedy() -> None:
    error = skew(-62.4, 2)
    assert "62.4 s behind the swarm's (as 2 nodes told)" in error.cause
    assert "clock" in error.remedy
    assert LIMIT_S < 5.0, "records tolerate more than what joins"
