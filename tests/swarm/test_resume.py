"""Where stages go on after a loss: by example, and against a model that plays the plan through."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hexswarm.resume import Held, Part, plan_resume

NEW = Held()


def test_a_newcomer_in_the_middle_gets_the_journal_of_the_one_before() -> None:
    held = [Held(20, 0), NEW, Held(18, 18)]
    assert plan_resume(held, 20) == [Part(20, 0), Part(0, 18), Part(18, 18)]


def test_a_new_head_computes_what_the_client_sends_and_sends_on_what_is_lacking() -> None:
    held = [NEW, Held(19, 0), Held(18, 18)]
    assert plan_resume(held, 20) == [Part(0, 19), Part(19, 18), Part(18, 18)]


def test_a_new_tail_gets_all_rows() -> None:
    assert plan_resume([Held(20, 0), Held(20, 0), NEW], 20) == [
        Part(20, 20),
        Part(20, 0),
        Part(0, 0),
    ]


def test_without_a_journal_the_stage_before_computes_again() -> None:
    """And the one before that sends it the inputs."""
    held = [Held(20, 0), Held(20, 20), NEW]
    assert plan_resume(held, 20) == [Part(20, 0), Part(0, 0), Part(0, 0)]
    half = [Held(20, 0), Held(20, 5), Held(9, 9)]
    assert plan_resume(half, 20) == [Part(20, 20), Part(20, 9), Part(9, 9)]
    short = [Held(20, 0), Held(7, 5), Held(2, 2)]
    assert plan_resume(short, 20) == [Part(20, 2), Part(2, 2), Part(2, 2)]


def test_nobody_starts_above_what_is_known_and_the_tail_below_it() -> None:
    """The stages were ahead of the client: it never heard the token that the tail chose."""
    held = [Held(21, 0), Held(21, 0), Held(21, 21)]
    assert plan_resume(held, 20) == [Part(20, 20), Part(20, 19), Part(19, 19)]
    assert plan_resume([Held(20, 20)], 20) == [Part(19, 19)]
    assert plan_resume([NEW], 20) == [Part(0, 0)]


def test_what_lies_above_a_position_can_be_left_out() -> None:
    assert Held(9, 4).crop(6) == Held(6, 4)
    assert Held(9, 4).crop(2) == Held(2, 2)
    assert Held(9, 4).crop(20) == Held(9, 4)


@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 35)), min_size=1, max_size=5),
    st.integers(1, 24),
)
def test_each_stage_gets_all_that_it_lacks(words: list[tuple[int, int]], end: int) -> None:
    """Whatever stages claim, from anywhere to anywhere: what the one before sends begins where the
    next one starts, and comes from its journal or is computed; nobody computes without need."""
    held = [Held(*word) for word in words]
    parts = plan_resume(held, end)
    assert len(parts) == len(held)
    assert parts[-1].start <= end - 1
    for stage, part, after in zip(held, parts, [*parts[1:], None], strict=True):
        assert 0 <= part.start <= min(stage.cached, end)
        if after is None:
            assert part.send_from == part.start == min(stage.cached, end - 1)
            continue
        assert part.send_from == after.start
        from_journal = range(part.send_from, part.start)
        assert not from_journal or stage.journal <= part.send_from
        if part.start < min(stage.cached, end):
            assert stage.journal > part.send_from == part.start
