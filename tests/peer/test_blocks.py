"""KV that several sessions hold, and that outlives them: what is found by a name is what it says.

The cells of the pool are kept here as a device would: a step writes what its tokens and all before
them make, under the table that the session has when the step is computed; a block that is dropped
is erased. Names are chains over tokens, as a client makes them.
"""

from __future__ import annotations

from itertools import accumulate

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hexswarm.peer.blocks import BlockPool
from hexswarm.peer.cache import BLOCK_TOKENS, BlockTables
from hexswarm.peer.leases import BeyondLease, KvFull, SharedBlock, blocks_of

A, B, C = (bytes([i]) * 16 for i in range(3))
PROMPT = list(range(40))


def names(ids: list[int]) -> list[str]:
    """Of the full blocks."""
    return [str(ids[: end + 16]) for end in range(0, len(ids) - len(ids) % 16, 16)]


def said(cache: BlockTables, key: bytes, ids: list[int], now: float = 0.0) -> None:
    """A session that asked for `ids` and computed what it did not find."""
    known = cache.lease(key, len(ids) + 8, now, names(ids)).known
    cache.write(key, known, len(ids) - known, now)
    cache.computed(key, len(ids), now)


# --- examples -----------------------------------------------------------------------------------


def test_what_a_session_leaves_is_found_by_its_name_and_counts_as_free() -> None:
    cache = BlockTables(8)
    said(cache, A, PROMPT)
    cache.release(A, 1.0, names([*PROMPT, 7, 8, 9, 10, 11, 12, 13, 14]))
    assert (cache.free_blocks, cache.kept_blocks) == (8, 2), "the third was never full"
    lease = cache.lease(B, 48, 2.0, names(PROMPT))
    assert (lease.blocks, lease.known) == ((0, 1, 2), 32)
    assert lease.consecutive
    assert cache.length(B) == 32
    assert cache.free_blocks == 5
    assert cache.lease(C, 48, 2.0, names([*range(16), *range(50, 80)])).known == 16


def test_an_answer_is_found_if_its_names_are_told_at_the_end() -> None:
    cache = BlockTables(8)
    said(cache, A, PROMPT)
    cache.write(A, 40, 8, 0.0)
    talk = [*PROMPT, *range(100, 108)]
    cache.computed(A, 47, 0.0)
    assert cache.lease(B, 64, 0.0, names([*talk, 1])).known == 32, "not before it is full"
    cache.computed(A, 48, 0.0)
    cache.release(A, 1.0, names(talk))
    assert cache.lease(C, 64, 0.0, names([*talk, 1])).known == 48


def test_what_is_not_computed_yet_is_not_found() -> None:
    cache = BlockTables(8)
    cache.lease(A, 48, 0.0, names(PROMPT))
    cache.write(A, 0, 40, 0.0)
    assert cache.lease(B, 48, 0.0, names(PROMPT)).known == 0
    cache.computed(A, 20, 0.0)
    cache.release(B, 0.0)
    assert cache.lease(B, 48, 0.0, names(PROMPT)).known == 16
    cache.release(B, 0.0)
    cache.rewind(A, 20)  # the rest of the prompt was given up, and what comes may be other words
    cache.write(A, 20, 20, 0.0)
    cache.computed(A, 40, 0.0)
    assert cache.lease(B, 48, 0.0, names(PROMPT)).known == 16


def test_the_last_token_is_always_computed() -> None:
    cache = BlockTables(8)
    said(cache, A, PROMPT[:32])
    assert cache.lease(B, 32, 0.0, names(PROMPT[:32])).known == 16


def test_without_names_or_where_it_is_switched_off_nothing_is_kept() -> None:
    off = BlockTables(8, keep=False)
    said(off, A, PROMPT)
    off.release(A, 0.0, names(PROMPT))
    assert (off.kept_blocks, off.lease(B, 48, 0.0, names(PROMPT)).known) == (0, 0)
    cache = BlockTables(8)
    dropped: list[int] = []
    cache.on_release = dropped.extend
    cache.lease(A, 48, 0.0)
    cache.write(A, 0, 40, 0.0)
    cache.computed(A, 40, 0.0)
    cache.release(A, 0.0)
    assert (cache.kept_blocks, dropped) == (0, [0, 1, 2])


def test_room_is_made_from_what_was_unused_for_longest_and_from_its_end() -> None:
    cache = BlockTables(8)
    for key, first in ((A, 0), (B, 100)):
        said(cache, key, [*range(first, first + 40)])
        cache.release(key, 0.0)
    assert cache.kept_blocks == 4
    dropped: list[int] = []
    cache.on_release = dropped.extend
    cache.lease(C, 5 * 16, 0.0)
    assert dropped == [1], "the second block of the older one"
    assert cache.lease(A, 32, 0.0, names([*range(40)])).known == 16
    assert (len(dropped), cache.kept_blocks) == (2, 1), "the end of the other gave way to that"


def test_what_nobody_asks_for_goes_after_a_while() -> None:
    cache = BlockTables(8, kept_s=60.0)
    said(cache, A, PROMPT)
    cache.release(A, 0.0)
    cache.expire(59.0)
    assert cache.kept_blocks == 2
    said(cache, B, PROMPT, now=59.0)
    cache.release(B, 59.0)
    cache.expire(110.0)
    assert cache.kept_blocks == 2, "it was asked for"
    cache.expire(119.5)
    assert cache.kept_blocks == 0


def test_a_session_that_goes_back_changes_nobodys_kv() -> None:
    cache = BlockTables(10)
    for key in (A, B):
        said(cache, key, PROMPT)
    before = cache.blocks(A)
    assert cache.blocks(B)[:2] == before[:2]
    with pytest.raises(SharedBlock):
        cache.write(A, 20, 1, 0.0)
    cache.write(A, 16, 4, 0.0)
    assert cache.blocks(A)[0] == before[0]
    assert cache.blocks(A)[1] not in cache.blocks(B)
    cache.write(B, 20, 1, 0.0)  # now it alone has that block, and nobody finds it any more
    assert cache.lease(C, 64, 0.0, names(PROMPT)).known == 16


def test_going_back_needs_room_only_where_others_read() -> None:
    cache = BlockTables(6)
    said(cache, A, PROMPT)
    cache.lease(B, 48, 0.0, names(PROMPT))
    cache.write(B, 32, 8, 0.0)
    cache.lease(C, 32, 0.0)
    assert cache.free_blocks == 0
    with pytest.raises(KvFull):
        cache.write(B, 0, 40, 0.0)
    assert cache.length(B) == 40, "nothing was changed"
    cache.release(A, 0.0)
    cache.write(B, 0, 40, 0.0)
    cache.computed(B, 40, 0.0)
    cache.release(B, 0.0, names(PROMPT))
    assert cache.lease(A, 33, 0.0, names(PROMPT)).known == 32, "under their names, again"


def test_until_it_begins_a_session_counts_as_if_it_shared_nothing() -> None:
    cache = BlockTables(6)
    said(cache, A, PROMPT)
    cache.lease(B, 48, 0.0, names(PROMPT))
    assert (cache.free_blocks, cache.free_tokens) == (2, 0)
    with pytest.raises(KvFull):
        cache.lease(C, 16, 0.0)
    with pytest.raises(KvFull):
        cache.borrow(1, 0.0)
    with pytest.raises(KvFull):
        cache.extend(A, 64, 0.0)
    cache.write(B, 0, 40, 0.0)  # another stage of its route knew nothing
    assert cache.free_blocks == 0
    cache.computed(B, 40, 0.0)
    cache.release(A, 0.0)
    cache.lease(C, 48, 0.0, names(PROMPT))
    assert cache.free_tokens == 0
    cache.write(C, 32, 8, 0.0)
    assert cache.free_tokens == 32, "what it shares is shared from now on"


def test_what_is_found_is_no_longer_free_for_the_rest() -> None:
    cache = BlockTables(4)
    said(cache, A, PROMPT)
    cache.release(A, 0.0)
    with pytest.raises(KvFull):
        cache.lease(B, 5 * 16, 0.0, names(PROMPT))
    assert (cache.free_blocks, cache.kept_blocks) == (4, 2)
    assert cache.lease(B, 4 * 16, 0.0, names(PROMPT)).known == 32


def test_it_is_counted_what_names_were_good_for() -> None:
    cache = BlockTables(16)
    said(cache, A, PROMPT)
    cache.lease(B, 64, 0.0)
    cache.lease(C, 64, 0.0, names(PROMPT))
    cache.write(C, 16, 30, 0.0)  # another stage had no more than that
    told = cache.prefixes
    assert (told.asked, told.found, told.tokens) == (2, 1, 16)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.integers(0, 30))
def test_a_pool_gives_back_all_it_took(counts: list[int], named: int) -> None:
    """Taken, named, held twice, given back and dropped: in the end all is free and one run."""
    pool = BlockPool(sum(counts), lambda blocks: None, kept_s=1.0)
    taken = [pool.take(count) for count in counts]
    for block in range(min(named, sum(counts))):
        pool.publish(block, block)
    twice = pool.find(range(named))
    pool.hold(twice)
    for blocks in taken:
        pool.give(blocks, 0.0)
    assert pool.free == sum(counts) - len(twice)
    pool.give(twice, 0.0)
    assert (pool.free, pool.kept) == (sum(counts), len(twice))
    pool.forget(2.0)
    assert (pool.free, pool.kept) == (sum(counts), 0)
    assert pool.take(sum(counts)) == tuple(range(sum(counts)))


# --- any history --------------------------------------------------------------------------------


class Sharing(RuleBasedStateMachine):
    """Whatever sessions do, each reads what it computed, and a name gives what it says."""

    BLOCKS = 12

    @initialize()
    def begin(self) -> None:
        self.now = 0.0
        self.cache = BlockTables(self.BLOCKS, lease_s=1e9, kept_s=50.0)
        self.cache.on_release = self.erase
        self.cells: list[list[object]] = [[None] * 16 for _ in range(self.BLOCKS)]
        self.ids: dict[bytes, list[int]] = {}
        """What each session's steps were given."""
        self.sure: dict[bytes, int] = {}
        self.waiting: dict[bytes, list[tuple[int, int]]] = {}
        self.resting: dict[bytes, list[int]] = {}
        """The prompts of those that were let in and have not begun."""

    def erase(self, blocks: tuple[int, ...]) -> None:
        for block in blocks:
            self.cells[block] = [None] * 16

    def values(self, ids: list[int]) -> list[object]:
        """What each position holds when computed from these tokens: it depends on all before."""
        return list(accumulate(ids, lambda seen, token: (seen, token), initial=()))[1:]

    @precondition(lambda self: len(self.ids) < 3)
    @rule(
        same=st.sampled_from([0, 20, 40, 40]),
        other=st.integers(0, 1),
        count=st.sampled_from([20, 40, 41, 48]),
        room=st.sampled_from([1, 30]),
        publish=st.sampled_from([True, True, False]),
        at_once=st.booleans(),
        rests=st.booleans(),
    )
    def lease(
        self,
        same: int,
        other: int,
        count: int,
        room: int,
        publish: bool,
        at_once: bool,
        rests: bool,
    ) -> None:
        key = next(key for key in (A, B, C) if key not in self.ids)
        ids = [*range(same), *([200 + other] * count)][:count]
        free = self.cache.free_tokens // 16
        try:
            lease = self.cache.lease(key, count + room, self.now, names(ids), publish=publish)
        except KvFull:
            assert blocks_of(count + room) > free
            return
        found = [self.cells[block] for block in lease.blocks[: lease.known // 16]]
        assert [cell for cells in found for cell in cells] == self.values(ids[: lease.known])
        assert lease.known < count + room
        self.ids[key], self.sure[key] = ids[: lease.known], lease.known
        self.waiting[key] = []
        self.resting[key] = ids
        if not rests:
            self.first_step(key, agreed=lease.known // 16 - (len(ids) % 16 == 0))
            if at_once:
                self.compute(key, count)

    def first_step(self, key: bytes, agreed: int) -> None:
        """The prompt begins where all stages agree, at a block; there is room for that."""
        ids, position = self.resting.pop(key), 16 * max(0, agreed)
        if len(ids) > position:
            self.cache.write(key, position, len(ids) - position, self.now)
            self.written(key, position, ids[position:])

    @precondition(lambda self: self.resting)
    @rule(index=st.integers(0, 2), less=st.integers(0, 3))
    def begin_later(self, index: int, less: int) -> None:
        key = sorted(self.resting)[index % len(self.resting)]
        self.first_step(key, self.cache.lease_of(key).known // 16 - less)

    def step(self, key: bytes, position: int, ids: list[int]) -> None:
        before, table = self.cache.length(key), self.cache.blocks(key)
        try:
            self.cache.write(key, position, len(ids), self.now)
        except KvFull:
            shared = [b for b in table if sum(b in self.cache.blocks(k) for k in self.ids) > 1]
            assert len(shared) > self.cache.free_tokens // 16
        except SharedBlock:
            assert position % 16
            assert sum(table[position // 16] in self.cache.blocks(k) for k in self.ids) > 1
        except BeyondLease:
            assert position + len(ids) > self.cache.lease_of(key).tokens
        else:
            self.written(key, position, ids)
            return
        assert (self.cache.length(key), self.cache.blocks(key)) == (before, table)

    def written(self, key: bytes, position: int, ids: list[int]) -> None:
        self.ids[key][position:] = ids
        self.sure[key] = min(self.sure[key], position)
        self.waiting[key] = [step for step in self.waiting[key] if sum(step) <= position]
        self.waiting[key].append((position, len(ids)))

    def any_key(self, index: int) -> bytes:
        return sorted(self.ids)[index % len(self.ids)]

    @precondition(lambda self: self.ids)
    @rule(
        index=st.integers(0, 2),
        back=st.sampled_from([0, 3, 16, 24, 48]),
        count=st.integers(1, 20),
        at_once=st.booleans(),
    )
    def go_on(self, index: int, back: int, count: int, at_once: bool) -> None:
        """A decode step, a prompt of a later turn, or one that goes back."""
        key = self.any_key(index)
        if not self.waiting[key] and key not in self.resting:
            position = max(0, self.cache.length(key) - back)
            self.step(key, position, [300 + back] * count)
            if at_once:
                self.compute(key, count)

    @precondition(lambda self: any(self.waiting.values()))
    @rule(index=st.integers(0, 2), most=st.sampled_from([10, 48]))
    def compute_some(self, index: int, most: int) -> None:
        self.compute(self.any_key(index), most)

    def compute(self, key: bytes, most: int) -> None:
        if not self.waiting[key]:
            return
        position, count = self.waiting[key].pop(0)
        if count > most:
            self.waiting[key].insert(0, (position + most, count - most))
            count = most
        end, table = position + count, self.cache.blocks(key)
        values = self.values(self.ids[key][:end])
        for at in range(position, end):
            self.cells[table[at // 16]][at % 16] = values[at]
        self.sure[key] = end
        self.cache.computed(key, end, self.now)

    @precondition(lambda self: any(self.waiting.values()))
    @rule(index=st.integers(0, 2))
    def cancel(self, index: int) -> None:
        """What waits is given up."""
        key = self.any_key(index)
        self.waiting[key].clear()
        self.cache.rewind(key, self.sure[key])
        del self.ids[key][self.sure[key] :]

    @precondition(lambda self: self.ids)
    @rule(index=st.integers(0, 2), told=st.booleans())
    def release(self, index: int, told: bool) -> None:
        key = self.any_key(index)
        ids = self.ids.pop(key)[: self.sure.pop(key)]
        del self.waiting[key]
        self.resting.pop(key, None)
        self.cache.release(key, self.now, names(ids) if told else ())

    @rule(seconds=st.floats(0.0, 30.0))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.cache.expire(self.now)

    @precondition(lambda self: len(self.ids) < 3)
    @rule(count=st.integers(1, 4))
    def borrow(self, count: int) -> None:
        """A step of the peer's own meets nothing of anybody's."""
        try:
            blocks = self.cache.borrow(count, self.now)
        except KvFull:
            assert count > self.cache.free_tokens // 16
            return
        self.erase(blocks)
        self.cache.give_back(blocks, self.now)

    @invariant()
    def counted(self) -> None:
        if not hasattr(self, "cache"):
            return
        owned = [block for key in self.ids for block in self.cache.blocks(key)]
        assert self.cache.free_blocks + len(set(owned)) == self.BLOCKS
        for key in self.ids:
            assert len(set(self.cache.blocks(key))) == len(self.cache.blocks(key))
        pool = self.cache._pool
        assert [pool.holders(block) for block in range(self.BLOCKS)] == [
            owned.count(block) for block in range(self.BLOCKS)
        ]
        assert pool.kept == sum(
            pool.name(block) is not None and not pool.holders(block) for block in range(self.BLOCKS)
        )

    @invariant()
    def everybody_reads_what_it_computed(self) -> None:
        for key, ids in getattr(self, "ids", {}).items():
            table = self.cache.blocks(key)
            read = [self.cells[table[at // 16]][at % 16] for at in range(self.sure[key])]
            assert read == self.values(ids[: self.sure[key]])

    def teardown(self) -> None:
        for key in getattr(self, "ids", {}):
            self.cache.release(key, self.now)
        everything = self.cache.lease(b"all", self.BLOCKS * BLOCK_TOKENS, self.now)
        assert everything.blocks == tuple(range(self.BLOCKS))
        assert all(cell is None for cells in self.cells for cell in cells), "nothing is left lying"


TestSharing = Sharing.TestCase
TestSharing.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
