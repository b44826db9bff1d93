"""Groups of exchanges played in memory: bytes on pipes, time and order as Hypothesis draws them."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hexswarm.peer import exchange as module
from hexswarm.peer import reduction, spreading
from hexswarm.peer.exchange import Exchange, Loss
from hexswarm.peer.patience import Pace
from hexswarm.peer.reduction import Format, Kind, Operation, Scatter, Swap
from hexswarm.peer.spreading import Gather, Hear, Say
from tests.peer.group import LATEST_S, LIMITS, Group


def vectors(rng: Random, size: int, count: int, wire: Format) -> list[np.ndarray]:
    """Values of all magnitudes, so that another order of adding gives other bits."""
    generator = np.random.default_rng(rng.getrandbits(32))
    made = []
    for _ in range(size):
        scale = 10.0 ** generator.integers(-6, 6, count)
        values = (generator.standard_normal(count) * scale).astype(np.float32)
        made.append(values)
    return made


def expected(parts: list[np.ndarray], wire: Format) -> bytes:
    """The rank-order sum in float32, of rounded parts, rounded."""
    total = parts[0].copy()
    wire.round(total)
    for part in parts[1:]:
        rounded = part.copy()
        wire.round(rounded)
        total += rounded
    wire.round(total)
    return total.tobytes()


Kinds = type[Swap] | type[Scatter]


def reducing(kind: Kinds, rank: int, size: int, values: np.ndarray, wire: Format) -> Operation:
    made = kind(rank, size, len(values), wire)
    made.load(values)
    return made


@pytest.fixture(autouse=True)
def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several segments in a vector of some hundred values."""
    monkeypatch.setattr(reduction, "SEGMENT_BYTES", 256)


SIZES = st.integers(2, 5)
SEEDS = st.integers(0, 1 << 32)
KINDS = st.sampled_from([Swap, Scatter])
WIRES = st.sampled_from(Format)


@settings(deadline=None, max_examples=60)
@given(SIZES, st.lists(st.integers(0, 400), min_size=1, max_size=2), KINDS, WIRES, SEEDS)
def test_every_member_has_the_sum_in_the_order_of_ranks(
    size: int, counts: list[int], kind: Kinds, wire: Format, seed: int
) -> None:
    """Any lengths, any interleaving, any cut of the bytes, narrow pipes: equal bits everywhere."""
    rng = Random(seed)
    group = Group(size, rng, room=rng.choice([40, 400, 1 << 30]))
    rounds = [vectors(rng, size, count, wire) for count in counts]
    wanted = [expected(parts, wire) for parts in rounds]
    group.run(
        *(
            [
                lambda parts=parts, rank=rank: reducing(kind, rank, size, parts[rank], wire)
                for parts in rounds
            ]
            for rank in range(size)
        )
    )
    assert not group.lost_s
    for parts, total in zip(rounds, wanted, strict=True):
        assert [part.tobytes() for part in parts] == [total] * size
    assert group.now == 0.0  # nobody had to wait for a deadline


@settings(deadline=None, max_examples=30)
@given(SIZES, st.lists(st.binary(max_size=300), min_size=1, max_size=4), SEEDS)
def test_a_leader_may_run_ahead_of_its_followers(
    size: int, messages: list[bytes], seed: int
) -> None:
    """Broadcasts need no answer: they wait in the pipes, and come in order."""
    group = Group(size, Random(seed))
    heard: list[list[Hear]] = [[Hear() for _ in messages] for _ in range(size)]
    group.run(
        [lambda data=data: Say(size, data) for data in messages],
        *([lambda item=item: item for item in heard[rank]] for rank in range(1, size)),
    )
    for rank in range(1, size):
        assert [bytes(item.data or b"") for item in heard[rank]] == messages
        assert all(item.data is not None for item in heard[rank])


@settings(deadline=None, max_examples=30)
@given(st.lists(st.binary(max_size=300), min_size=2, max_size=5), SEEDS)
def test_bytes_of_all_members_come_together(parts: list[bytes], seed: int) -> None:
    """Of any lengths, empty ones too."""
    size = len(parts)
    group = Group(size, Random(seed))
    made = [Gather(rank, size, memoryview(parts[rank]), 300) for rank in range(size)]
    group.run(*([lambda item=item: item] for item in made))
    assert not group.lost_s
    for item in made:
        assert [bytes(part) for part in item.parts] == parts


def test_more_bytes_than_were_agreed_are_refused() -> None:
    member = Exchange(0, 2, 1, LIMITS)
    member.start(Gather(0, 2, memoryview(b""), 4), 0.0)
    _deliver(member, 1, _frame(Kind.PART, epoch=1, number=1, payload=b"12345"))
    assert member.loss is not None
    assert member.loss.rank == 1


@settings(deadline=None, max_examples=80)
@given(SIZES, KINDS, st.booleans(), st.integers(0, 250), SEEDS)
def test_a_lost_member_is_lost_to_all_others_within_the_deadline(
    size: int, kind: Kinds, killing: bool, after: int, seed: int
) -> None:
    """Killed or frozen at any point: either everybody was through, or everybody names it."""
    rng = Random(seed)
    group, victim = Group(size, rng, room=rng.choice([50, 1 << 30])), rng.randrange(size)
    rounds = [vectors(rng, size, 300, Format.FLOAT32) for _ in range(50)]
    programs = [
        [
            lambda parts=parts, rank=rank: reducing(kind, rank, size, parts[rank], Format.FLOAT32)
            for parts in rounds
        ]
        for rank in range(size)
    ]
    group.run(*programs, events=after)
    assert not group.lost_s
    (group.kill if killing else group.freeze)(victim)
    began_s = group.now
    group.go()
    others = set(range(size)) - {victim}
    assert set(group.lost_s) == others
    for rank in others:
        loss = group.members[rank].loss
        assert loss is not None
        assert loss.rank == victim, loss
        assert group.lost_s[rank] - began_s <= (0.0 if killing else LATEST_S)


def test_who_waits_for_the_culprit_is_not_blamed() -> None:
    """Rank 2 is frozen after its part has reached rank 0, not rank 1: what rank 0 misses is the
    sum of rank 1, which is the one that it must not blame."""
    group = Group(3, Random(1))
    values = vectors(group.rng, 3, 30, Format.FLOAT32)
    programs = [
        [lambda rank=rank: reducing(Scatter, rank, 3, values[rank], Format.FLOAT32)]
        for rank in range(3)
    ]
    group.run(*programs, events=0)
    while (data := group.members[2].outgoing(0)) is not None:
        group.pipes[2, 0] += data
        group.members[2].sent(0, len(data), 0.0)
    group.freeze(2)
    group.go()
    assert [group.members[rank].loss.rank for rank in (0, 1)] == [2, 2]  # type: ignore[union-attr]


def test_a_slow_member_that_answers_is_waited_for_and_not_for_ever() -> None:
    """It is asked again and again; the operation as a whole has an end."""
    member = Exchange(0, 2, 1, LIMITS)
    member.start(reducing(Swap, 0, 2, np.zeros(4, np.float32), Format.FLOAT32), 0.0)
    here = _frame(Kind.HERE, epoch=1, number=1)
    now = 0.0
    while member.loss is None:
        now = member.wake_s
        member.tick(now)
        if member.loss is None:
            _deliver(member, 1, here, now + 0.01)
    assert member.loss.rank == 1
    assert LIMITS.most_s - LIMITS.floor_s <= now <= LIMITS.most_s


# --- single frames --------------------------------------------------------------------------------


def _frame(
    kind: int,
    *,
    epoch: int,
    number: int,
    payload: bytes = b"",
    version: int = module.VERSION,
    about: int = 0,
    offset: int = 0,
) -> bytes:
    head = module._HEADER.pack(version, kind, about, epoch, number, offset, len(payload))
    return head + payload


def _deliver(member: Exchange, rank: int, data: bytes, now: float = 0.0) -> int:
    """How many of the bytes were taken."""
    taken = 0
    while taken < len(data) and (buffer := member.buffer(rank)) is not None:
        count = min(len(buffer), len(data) - taken)
        buffer[:count] = data[taken : taken + count]
        member.filled(rank, count, now)
        taken += count
    return taken


def _two(epoch: int = 5) -> tuple[Exchange, np.ndarray]:
    """Rank 0 of two, in its second operation."""
    member, values = Exchange(0, 2, epoch, LIMITS), np.ones(2, np.float32)
    part = np.zeros(2, np.float32).tobytes()
    member.start(reducing(Swap, 0, 2, values.copy(), Format.FLOAT32), 0.0)
    _deliver(member, 1, _frame(Kind.PART, epoch=epoch, number=1, payload=part))
    _flush(member)
    assert member.done
    member.finish(0.0)
    member.start(reducing(Swap, 0, 2, values, Format.FLOAT32), 0.0)
    return member, values


def _flush(member: Exchange) -> bytes:
    data = b""
    for rank in member.others:
        while (piece := member.outgoing(rank)) is not None:
            data += bytes(piece)
            member.sent(rank, len(piece), 0.0)
    return data


@given(st.integers(0, 4), st.integers(0, 9), st.binary(max_size=200))
def test_frames_of_an_old_epoch_are_dropped(epoch: int, number: int, payload: bytes) -> None:
    """Whatever they are, words about lost members included."""
    member, values = _two()
    data = b"".join(
        _frame(kind, epoch=epoch, number=number, payload=payload if kind < Kind.CALL else b"")
        for kind in Kind
    )
    assert _deliver(member, 1, data) == len(data)
    assert member.loss is None
    assert not member.done
    part = np.full(2, 7, np.float32).tobytes()
    _deliver(member, 1, _frame(Kind.PART, epoch=5, number=2, payload=part))
    _flush(member)
    assert member.done
    assert values.tolist() == [8, 8]


def test_a_frame_of_an_operation_that_is_over_is_dropped() -> None:
    member, _ = _two()
    data = _frame(Kind.PART, epoch=5, number=1, payload=b"x" * 70_000)
    assert _deliver(member, 1, data) == len(data)
    assert member.loss is None


PART = bytes(8)


@pytest.mark.parametrize(
    ("data", "how"),
    [
        (_frame(Kind.PART, epoch=6, number=2, payload=PART), "in epoch 6"),
        (_frame(Kind.PART, epoch=5, number=3, payload=PART), "left out"),
        (_frame(Kind.PART, epoch=5, number=2, payload=PART[1:]), "does not belong"),
        (_frame(Kind.PART, epoch=5, number=2, payload=PART, offset=1), "does not belong"),
        (_frame(Kind.SUM, epoch=5, number=2, payload=PART), "does not belong"),
        (_frame(Kind.CAST, epoch=5, number=2, payload=PART), "does not belong"),
        (_frame(Kind.HERE, epoch=5, number=2, payload=PART), "another protocol"),
        (_frame(Kind.LOST, epoch=5, number=2, about=2), "another protocol"),
        (_frame(99, epoch=5, number=2), "another protocol"),
        (_frame(Kind.PART, epoch=5, number=2, version=9), "another protocol"),
    ],
)
def test_what_does_not_fit_is_the_senders_fault(data: bytes, how: str) -> None:
    member, _ = _two()
    _deliver(member, 1, data)
    assert member.loss is not None
    assert member.loss.rank == 1
    assert how in member.loss.how
    assert member.buffer(1) is None


def test_a_message_that_is_too_long_costs_no_memory() -> None:
    member = Exchange(1, 2, 1, LIMITS)
    member.start(Hear(), 0.0)
    head = module._HEADER.pack(1, Kind.CAST, 0, 1, 1, 0, spreading.MOST_CAST_BYTES + 1)
    _deliver(member, 0, head)
    assert member.loss is not None


def test_a_word_about_a_lost_member_ends_the_epoch() -> None:
    member = Exchange(0, 3, 1, LIMITS)
    member.start(reducing(Swap, 0, 3, np.zeros(2, np.float32), Format.FLOAT32), 0.0)
    _deliver(member, 1, _frame(Kind.LOST, epoch=1, number=1, about=2))
    assert member.loss == Loss(2, "is lost, says rank 1")
    outcast = Exchange(2, 3, 1, LIMITS)
    outcast.start(reducing(Swap, 2, 3, np.zeros(2, np.float32), Format.FLOAT32), 0.0)
    _deliver(outcast, 1, _frame(Kind.LOST, epoch=1, number=1, about=2))
    assert outcast.loss == Loss(2, "was given up by the others, says rank 1")


def test_who_is_called_answers() -> None:
    member, _ = _two()
    _flush(member)
    _deliver(member, 1, _frame(Kind.CALL, epoch=5, number=2))
    assert module._HEADER.unpack(_flush(member))[1] == Kind.HERE


def test_who_calls_and_does_not_read_is_not_answered_for_ever() -> None:
    member, _ = _two()
    for _ in range(3000):
        _deliver(member, 1, _frame(Kind.CALL, epoch=5, number=2))
    assert len(_flush(member)) < 1100 * reduction.HEADER_BYTES


def test_a_follower_waits_as_long_as_it_was_told_then_the_clock_runs() -> None:
    """An idle leader owes nothing; one that has begun does. What others send changes nothing."""
    member = Exchange(1, 3, 1, LIMITS)
    member.start(Hear(), 0.0, idle_s=30.0)
    _deliver(member, 2, _frame(Kind.HERE, epoch=1, number=1), 3.0)
    assert member.wake_s == 30.0
    _deliver(member, 0, _frame(Kind.CAST, epoch=1, number=1, payload=b"12345")[:-1], 20.0)
    assert member.wake_s == 20.0 + LIMITS.floor_s
    member.tick(21.0)
    member.tick(21.25)
    assert member.loss is not None
    assert member.loss.rank == 0


def test_a_member_that_left_is_missed_when_it_is_needed() -> None:
    member, _ = _two()
    _deliver(member, 1, _frame(Kind.PART, epoch=5, number=2, payload=PART))
    member.ended(1, "closed its stream")
    assert member.done
    assert member.loss is None
    member.finish(0.0)
    member.start(reducing(Swap, 0, 2, np.zeros(2, np.float32), Format.FLOAT32), 0.0)
    assert member.loss == Loss(1, "closed its stream")


@settings(max_examples=30)
@given(st.lists(st.floats(0, 20), min_size=64, max_size=64))
def test_patience_is_five_times_the_usual_within_its_bounds(durations: list[float]) -> None:
    pace = Pace(LIMITS)
    assert pace.patience_s == LIMITS.floor_s
    for seconds in durations:
        pace.add(seconds)
    most_s = LIMITS.most_s - LIMITS.grace_s
    assert LIMITS.floor_s <= pace.patience_s <= most_s
    usual_s = float(np.percentile(durations, 99, method="inverted_cdf"))
    assert pace.patience_s == pytest.approx(min(max(1.0, 5 * usual_s), most_s))
