"""Whatever is repeated, reordered or made up, only the next step is taken."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hexswarm.peer.order import REMEMBERED, Order

Frame = tuple[int, int, bool, int]


def judged(order: Order, frame: Frame) -> str:
    position, count, last, digest = frame
    return order.judge(position, count, last, 4 * count, digest)


def offer(order: Order, frame: Frame) -> str:
    verdict = judged(order, frame)
    if verdict == "next":
        order.take(frame[0], frame[1], frame[2], 4 * frame[1], frame[3])
    return verdict


def cut(counts: list[int], start: int = 0) -> list[Frame]:
    frames, position = [], start
    for index, count in enumerate(counts):
        frames.append((position, count, index == len(counts) - 1, position * 7))
        position += count
    return frames


@given(st.lists(st.integers(1, 9), min_size=1, max_size=20), st.randoms(use_true_random=False))
def test_in_any_order_and_however_often_each_step_is_taken_once(
    counts: list[int], rng: object
) -> None:
    frames = cut(counts)
    order, taken = Order(), []
    copies = [frame for frame in frames for _ in range(3)]
    for _ in frames:  # at worst the next one is the last of every round
        rng.shuffle(copies)  # type: ignore[attr-defined]
        for frame in copies:
            before = order.received
            verdict = offer(order, frame)
            assert verdict in ("next", "again", "gap")
            if verdict == "next":
                taken.append(frame)
            else:
                assert order.received == before
    assert taken == frames
    assert order.received == sum(counts)


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=20),
    st.tuples(st.integers(0, 200), st.integers(1, 30), st.booleans(), st.integers(0, 9)),
)
def test_only_the_same_step_is_the_same(counts: list[int], other: Frame) -> None:
    order = Order()
    frames = cut(counts)
    for frame in frames:
        offer(order, frame)
    end = order.received
    verdict = judged(order, other)
    if other[0] >= end:
        assert verdict == ("next" if other[0] == end else "gap")
    else:
        assert verdict == ("again" if other in frames else "conflict")


def test_what_nobody_remembers_is_late_and_not_wrong() -> None:
    order = Order()
    for frame in cut([2] * (REMEMBERED + 3)):
        offer(order, frame)
    assert judged(order, (4, 2, False, 28)) == "late"
    assert judged(order, (4, 2, False, 99)) == "late"
    assert judged(order, (6, 2, False, 42)) == "again"
    assert judged(order, (5, 2, False, 0)) == "conflict", "it reaches into what is remembered"


def test_a_turn_begins_at_or_below_what_is_done() -> None:
    order = Order()
    for frame in cut([4, 1]):
        offer(order, frame)
    order.done = 4
    assert order.judge(5, 1, True, 4, 0, begins=True) == "gap", "not computed yet"
    assert order.judge(4, 1, True, 4, 0, begins=True) == "next"
    assert (order.received, order.done) == (5, 4), "looking changes nothing"
    order.begin()
    assert (order.received, order.done) == (4, 4)
    assert offer(order, (2, 1, True, 0)) == "next"
    assert (order.received, order.done) == (3, 2)
    assert judged(order, (2, 1, True, 1)) == "conflict"


def test_after_a_repair_it_goes_on_exactly_there() -> None:
    order = Order()
    for frame in cut([4, 4, 4]):
        offer(order, frame)
    order.done = 8
    order.resume(6)
    assert (order.received, order.done) == (6, 6)
    assert judged(order, (7, 1, False, 0)) == "gap"
    assert judged(order, (4, 2, False, 28)) == "late"
    assert judged(order, (4, 4, False, 28)) == "conflict", "rows above the start come anew"
    assert offer(order, (6, 2, False, 0)) == "next"


def test_failed_steps_may_come_anew() -> None:
    order = Order()
    for frame in cut([4, 4, 4]):
        offer(order, frame)
    order.rewind(4)
    assert order.received == 4
    assert judged(order, (0, 4, False, 0)) == "again"
    assert offer(order, (4, 4, False, 99)) == "next"
