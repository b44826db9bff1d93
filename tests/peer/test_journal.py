"""What is kept can be sent again, exactly; the bound holds; the largest goes first."""

from __future__ import annotations

import sys
from collections.abc import Callable

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from hexswarm.peer.journal import BLOCK_ROWS, Journal, Piece

A, B, C = b"a" * 16, b"b" * 16, b"c" * 16


def rows(first: int, count: int, size: int = 4, salt: int = 0) -> bytes:
    """A row says which position it belongs to."""
    return b"".join((first + i + 1000 * salt).to_bytes(size, "little") for i in range(count))


def everything(journal: Journal, session: bytes, most_bytes: int = 1 << 30) -> list[Piece]:
    start = journal.start(session)
    return [] if start is None else journal.pieces(session, start, journal.end(session), most_bytes)


class Kept(RuleBasedStateMachine):
    """Any keeping, cropping and dropping gives what a plain list of rows would."""

    most_bytes = 700

    def __init__(self) -> None:
        super().__init__()
        self.journal = Journal(self.most_bytes)
        self.model: dict[bytes, tuple[int, list[tuple[bytes, str]]]] = {}
        self.lost: set[bytes] = set()
        self.salt = 0

    def size(self, session: bytes) -> int:
        return sum(len(data) for data, _ in self.model[session][1])

    @rule(
        session=st.sampled_from([A, B, C]),
        at=st.integers(-6, 3),
        count=st.integers(1, 40),
        dtype=st.sampled_from(["float32", "float32", "bfloat16"]),
    )
    def keep(self, session: bytes, at: int, count: int, dtype: str) -> None:
        """At the end mostly, sometimes below it, sometimes beyond."""
        self.salt += 1
        first, kept = self.model.get(session, (0, []))
        position = max(0, first + len(kept) + min(at, 1))
        size = 4 if dtype == "float32" else 2
        data = rows(position, count, size, self.salt % 60)
        self.journal.keep(session, position, count, memoryview(data), dtype)
        if session in self.lost:
            return
        if not first <= position <= first + len(kept):
            first, kept = position, []
        kept = kept[: position - first]
        kept += [(data[i * size : (i + 1) * size], dtype) for i in range(count)]
        self.model[session] = (first if len(kept) > count else position, kept)
        if sum(map(self.size, self.model)) > self.most_bytes:
            largest = max(self.model, key=lambda key: (self.size(key), key))
            self.lost.add(largest)
            del self.model[largest]

    @rule(session=st.sampled_from([A, B, C]), back=st.integers(0, 60))
    def crop(self, session: bytes, back: int) -> None:
        first, kept = self.model.get(session, (0, []))
        position = max(0, first + len(kept) - back)
        self.journal.crop(session, position)
        if session in self.model:
            self.model[session] = (first, kept[: max(0, position - first)])
            if not self.model[session][1]:
                del self.model[session]

    @rule(session=st.sampled_from([A, B, C]))
    def drop(self, session: bytes) -> None:
        self.journal.drop(session)
        self.model.pop(session, None)
        self.lost.discard(session)

    @rule(
        session=st.sampled_from([A, B, C]),
        skip=st.integers(0, 50),
        less=st.integers(0, 50),
        most_bytes=st.integers(1, 100),
    )
    def replay(self, session: bytes, skip: int, less: int, most_bytes: int) -> None:
        first, kept = self.model.get(session, (0, []))
        begin, end = first + skip, first + len(kept) - less
        at = begin
        for piece in self.journal.pieces(session, begin, end, most_bytes):
            wanted = kept[at - first : at - first + piece.count]
            assert piece.position == at
            assert piece.data == b"".join(data for data, _ in wanted)
            assert {piece.dtype} == {dtype for _, dtype in wanted}
            assert len(piece.data) <= max(most_bytes, 4)
            at += piece.count
        assert at == max(begin, end)

    @invariant()
    def the_bound_holds_and_nothing_else_is_lost(self) -> None:
        assert self.journal.used_bytes == sum(map(self.size, self.model)) <= self.most_bytes
        for session in (A, B, C):
            first, kept = self.model.get(session, (0, []))
            assert self.journal.start(session) == (first if kept else None)
            if kept:
                assert self.journal.end(session) == first + len(kept)


Kept.TestCase.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
TestKept = Kept.TestCase


@given(st.lists(st.integers(1, 30), min_size=2, max_size=8), st.integers(0, 7))
def test_a_session_within_its_share_loses_nothing(sizes: list[int], which: int) -> None:
    """Whatever the others keep, and in whatever order."""
    keys = [bytes([i]) * 16 for i in range(len(sizes))]
    modest = keys[which % len(keys)]
    journal = Journal(100 * len(keys))
    for position in range(25):
        for key, count in zip(keys, sizes, strict=True):
            count = 1 if key == modest else count
            journal.keep(key, position * count, count, rows(0, count), "float32")
    assert journal.start(modest) == 0
    assert journal.end(modest) == 25
    assert journal.used_bytes <= journal.most_bytes


def test_the_largest_goes_and_stays_without() -> None:
    journal = Journal(100)
    journal.keep(A, 0, 20, rows(0, 20), "float32")
    journal.keep(B, 0, 4, rows(0, 4), "float32")
    assert journal.start(A) == 0
    journal.keep(B, 4, 4, rows(4, 4), "float32")
    assert (journal.start(A), journal.start(B)) == (None, 0), "not B, which made it too much"
    journal.keep(A, 20, 1, rows(20, 1), "float32")
    assert journal.start(A) is None, "what begins in the middle replaces nobody"
    assert journal.used_bytes == 32
    journal.drop(A)
    journal.keep(A, 0, 1, rows(0, 1), "float32")
    assert journal.start(A) == 0, "another session of that name"


def test_one_session_keeps_no_more_than_a_link_can_take() -> None:
    journal = Journal(1000, most_each_bytes=40)
    journal.keep(A, 0, 10, rows(0, 10), "float32")
    assert journal.start(A) == 0
    journal.keep(A, 10, 1, rows(10, 1), "float32")
    assert journal.start(A) is None


def test_a_journal_of_no_size_keeps_nothing() -> None:
    journal = Journal(0)
    journal.keep(A, 0, 1, rows(0, 1), "float32")
    assert journal.start(A) is None
    assert journal.pieces(A, 0, 1, 100) == []


def test_rows_are_joined_whatever_their_cuts_were() -> None:
    journal = Journal()
    position = 0
    for count in (1, 1, 7, 1, 30, *[1] * (2 * BLOCK_ROWS + 1)):
        journal.keep(A, position, count, rows(position, count), "float32")
        position += count
    (piece,) = everything(journal, A)
    assert piece == Piece(0, position, rows(0, position), "float32")
    counts = [piece.count for piece in everything(journal, A, 40)]
    assert counts == [10] * (position // 10) + [position % 10]
    assert [piece.count for piece in everything(journal, A, 3)] == [1] * position, (
        "one row at least"
    )


def test_what_is_kept_is_not_copied() -> None:
    journal = Journal()
    prompt, row = bytes(8192), bytes(512)
    journal.keep(A, 0, 16, prompt, "float32")
    journal.keep(A, 16, 1, row, "float32")
    first, second = (block.data for block in journal._kept[A].blocks)
    assert first is prompt
    assert isinstance(second, list)
    assert second[0] is row


def test_hundreds_of_single_rows_cost_little_more_than_their_bytes() -> None:
    """Measured: what 1,000 decode steps of 2 kB keep alive."""
    journal = Journal()
    for position in range(1000):
        journal.keep(A, position, 1, bytes(2048), "bfloat16")
    sizeof: Callable[[object], int] = sys.getsizeof
    spent = 0
    for block in journal._kept[A].blocks:
        assert isinstance(block.data, list)
        spent += sizeof(block) + sizeof(block.data) + sum(map(sizeof, block.data))
    assert spent - 1000 * 2048 < 60 * 1000
