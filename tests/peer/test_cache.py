"""Block accounting: conservation under any history, runs of blocks, lengths, leases that end."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from hexswarm.errors import RemoteProtocolError, SessionClosed, UsageError
from hexswarm.peer.cache import BLOCK_TOKENS, BlockTables
from hexswarm.peer.leases import BeyondLease, KvFull, KvGap, blocks_of

A, B, C, D = (bytes([i]) * 16 for i in range(4))


def test_a_lease_covers_its_tokens_with_consecutive_blocks() -> None:
    cache = BlockTables(10)
    lease = cache.lease(A, 33, now=0.0)
    assert lease.blocks == (0, 1, 2)
    assert lease.consecutive
    assert cache.free_tokens == 7 * BLOCK_TOKENS
    assert cache.blocks(A) == lease.blocks
    assert cache.lease_of(A) == lease


def test_a_lease_takes_the_tightest_run() -> None:
    cache = BlockTables(12)
    for session, blocks in ((A, 4), (B, 1), (C, 2)):
        cache.lease(session, blocks * BLOCK_TOKENS, now=0.0)
    cache.lease(D, 16, now=0.0)  # block 7; 8-11 stay free
    cache.release(A, now=1.0)  # 0-3 free
    cache.release(C, now=1.0)  # 5-6 free
    assert cache.lease(A, 32, now=1.0).blocks == (5, 6)


def test_without_a_run_a_lease_is_scattered_over_the_longest_ones() -> None:
    cache = BlockTables(8)
    keys = [bytes([i]) * 16 for i in range(8)]
    for key in keys:
        cache.lease(key, 16, now=0.0)
    for i in (0, 2, 3, 5, 7):
        cache.release(keys[i], now=0.0)
    lease = cache.lease(keys[0], 4 * 16, now=0.0)
    assert lease.blocks[:2] == (2, 3)
    assert not lease.consecutive
    assert cache.free_blocks == 1


def test_a_full_pool_refuses_with_a_time_to_retry_and_is_unchanged() -> None:
    cache = BlockTables(4, lease_s=60.0)
    cache.lease(A, 64, now=0.0)
    with pytest.raises(KvFull) as caught:
        cache.lease(B, 16, now=2.0)
    assert caught.value.free_tokens == 0
    assert 1.0 <= caught.value.retry_s <= 60.0
    assert cache.sessions == (A,)
    with pytest.raises(KvFull) as caught:
        cache.lease(B, 65, now=2.0)
    assert caught.value.retry_s == 0.0, "a session larger than the pool need not ask again"


def test_the_time_to_retry_follows_how_long_sessions_live() -> None:
    cache = BlockTables(1, lease_s=300.0)
    for i in range(30):
        cache.lease(A, 16, now=i * 50.0)
        cache.release(A, now=i * 50.0 + 50.0)
    cache.lease(A, 16, now=2000.0)
    with pytest.raises(KvFull) as caught:
        cache.lease(B, 16, now=2010.0)
    assert caught.value.retry_s == pytest.approx(40.0, rel=0.05)


def test_extending_grows_in_place_if_it_can() -> None:
    cache = BlockTables(6)
    cache.lease(A, 16, now=0.0)
    assert cache.extend(A, 48, now=0.0).blocks == (0, 1, 2)
    cache.lease(B, 16, now=0.0)
    assert cache.extend(A, 64, now=0.0).blocks == (0, 1, 2, 4)
    assert cache.extend(A, 10, now=0.0).tokens == 64, "a lease never shrinks"
    before = cache.lease_of(A)
    with pytest.raises(KvFull):
        cache.extend(A, 16 * 7, now=0.0)
    assert cache.lease_of(A) == before


def test_extending_within_the_last_block_takes_none() -> None:
    cache = BlockTables(1)
    cache.lease(A, 3, now=0.0)
    assert cache.extend(A, 16, now=0.0).tokens == 16


def test_a_step_advances_crops_or_is_refused_without_a_trace() -> None:
    cache = BlockTables(4)
    cache.lease(A, 40, now=0.0)
    cache.write(A, 0, 20, now=0.0)
    assert cache.length(A) == 20
    cache.write(A, 10, 1, now=0.0)
    assert cache.length(A) == 11, "what lay above is cropped"
    with pytest.raises(KvGap) as gap:
        cache.write(A, 12, 1, now=0.0)
    assert (gap.value.position, gap.value.length) == (12, 11)
    with pytest.raises(BeyondLease):
        cache.write(A, 11, 30, now=0.0)
    for position, count in ((-1, 2), (0, 0)):
        with pytest.raises(RemoteProtocolError):
            cache.write(A, position, count, now=0.0)
    assert cache.length(A) == 11
    cache.rewind(A, 5)
    cache.rewind(A, 9)
    assert cache.length(A) == 5


def test_misuse_is_told_apart() -> None:
    cache = BlockTables(4)
    cache.lease(A, 1, now=0.0)
    with pytest.raises(RemoteProtocolError):
        cache.lease(A, 1, now=0.0)
    with pytest.raises(UsageError):
        cache.lease(B, 0, now=0.0)
    with pytest.raises(UsageError):
        BlockTables(0)
    for call in (cache.length, cache.blocks, cache.lease_of):
        with pytest.raises(SessionClosed):
            call(B)
    with pytest.raises(SessionClosed):
        cache.write(B, 0, 1, now=0.0)
    assert cache.release(A, now=0.0)
    assert not cache.release(A, now=0.0)


def test_a_refused_step_renews_no_lease() -> None:
    cache = BlockTables(8, lease_s=10.0)
    for key in (A, B, C):
        cache.lease(key, 16, now=0.0)
    cache.write(B, 0, 1, now=9.0)
    cache.renew(C, now=9.0)
    with pytest.raises(KvGap):
        cache.write(A, 5, 1, now=9.0)
    assert cache.expire(now=10.0) == []
    assert cache.expire(now=10.5) == [A]
    assert cache.expire(now=19.5) == [B, C]
    assert cache.free_blocks == 8


@pytest.mark.parametrize("tokens", [16, 32])
def test_asking_again_renews_a_lease_for_a_bounded_time(tokens: int) -> None:
    """A session that is being repaired stands still; one that only ever asks is squatting."""
    cache = BlockTables(8, lease_s=10.0)
    cache.lease(A, 16, now=0.0)
    for now in range(0, 31, 5):
        assert cache.expire(float(now)) == []
        cache.extend(A, tokens, float(now))
    assert cache.expire(30.5) == [A]
    cache.lease(B, 16, now=0.0)
    cache.write(B, 0, 1, now=9.0)
    for now in range(9, 40, 10):
        assert cache.expire(float(now)) == [], "a step begins the count anew"
        cache.extend(B, tokens, float(now))
    assert cache.expire(39.5) == [B]


@given(st.lists(st.integers(1, 100), min_size=1, max_size=8))
def test_on_an_empty_pool_every_lease_is_consecutive(sizes: list[int]) -> None:
    """Without releases the pool is never fragmented."""
    cache = BlockTables(sum(map(blocks_of, sizes)))
    for i, tokens in enumerate(sizes):
        assert cache.lease(bytes([i]) * 16, tokens, now=0.0).consecutive
    assert cache.free_blocks == 0


class Accounting(RuleBasedStateMachine):
    """Whatever happens, blocks are conserved and none has two owners."""

    keys = Bundle("keys")

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.blocks = 24
        self.cache = BlockTables(self.blocks, lease_s=5.0)
        self.lengths: dict[bytes, int] = {}

    @rule(target=keys, key=st.integers(0, 7))
    def name(self, key: int) -> bytes:
        return bytes([key]) * 16

    @rule(key=keys, tokens=st.integers(1, 200))
    def lease(self, key: bytes, tokens: int) -> None:
        free = self.cache.free_blocks
        try:
            lease = self.cache.lease(key, tokens, self.now)
        except KvFull:
            assert blocks_of(tokens) > free
        except RemoteProtocolError:
            assert key in self.lengths
        else:
            assert len(lease.blocks) == blocks_of(tokens)
            self.lengths[key] = 0

    @rule(key=keys, tokens=st.integers(1, 300))
    def extend(self, key: bytes, tokens: int) -> None:
        try:
            before = self.cache.lease_of(key)
            after = self.cache.extend(key, tokens, self.now)
        except SessionClosed:
            assert key not in self.lengths
        except KvFull:
            assert blocks_of(tokens) - len(before.blocks) > self.cache.free_blocks
        else:
            assert after.blocks[: len(before.blocks)] == before.blocks, "written KV stays put"
            assert len(after.blocks) == blocks_of(max(tokens, before.tokens))

    @rule(key=keys, position=st.integers(0, 100), count=st.integers(1, 60))
    def write(self, key: bytes, position: int, count: int) -> None:
        try:
            self.cache.write(key, position, count, self.now)
        except SessionClosed:
            assert key not in self.lengths
        except KvGap:
            assert position > self.lengths[key]
        except BeyondLease:
            assert position + count > self.cache.lease_of(key).tokens
        else:
            self.lengths[key] = position + count

    @rule(key=keys)
    def release(self, key: bytes) -> None:
        assert self.cache.release(key, self.now) == (key in self.lengths)
        self.lengths.pop(key, None)

    @rule(seconds=st.floats(0.0, 4.0))
    def expire(self, seconds: float) -> None:
        self.now += seconds
        for key in self.cache.expire(self.now):
            del self.lengths[key]

    @invariant()
    def conserved(self) -> None:
        owned = [block for key in self.lengths for block in self.cache.blocks(key)]
        assert len(owned) == len(set(owned)), "a block has one owner"
        assert set(owned) <= set(range(self.blocks))
        assert self.cache.free_blocks + len(owned) == self.blocks
        assert set(self.cache.sessions) == set(self.lengths)
        assert all(self.cache.length(key) == length for key, length in self.lengths.items())

    def teardown(self) -> None:
        for key in self.lengths:
            self.cache.release(key, self.now)
        everything = self.cache.lease(b"all", self.blocks * BLOCK_TOKENS, self.now)
        assert everything.blocks == tuple(range(self.blocks)), "free runs are joined again"


TestAccounting = Accounting.TestCase
TestAccounting.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
