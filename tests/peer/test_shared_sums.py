"""Sums through shared memory: exact in the order of ranks, alike for all, and never for ever."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hexswarm.errors import MemberLost
from hexswarm.peer.shared_sums import SharedSums, make_bells, make_memory, map_memory
from hexswarm.peer.sums import add_in_order

TERM = 8
GONE = MemberLost(1, "local", 0, "left")
torch.set_num_threads(1)


@contextmanager
def group(size: int, timeout_s: float = 5.0, term: int = TERM) -> Iterator[list[SharedSums]]:
    """The ranks of a group, each with a mapping of its own."""
    descriptor = make_memory(size, term)
    made = [
        SharedSums(rank, map_memory(descriptor, size, term), bells, term=term, timeout_s=timeout_s)
        for rank, bells in enumerate(make_bells(size))
    ]
    os.close(descriptor)
    try:
        yield made
    finally:
        for one in made:
            one.leave(GONE)


def together(made: list[SharedSums], call: Callable[[SharedSums], Any]) -> list[Any]:
    with ThreadPoolExecutor(len(made)) as threads:
        return [job.result(20) for job in [threads.submit(call, one) for one in made]]


@settings(max_examples=30, deadline=None)
@given(
    st.integers(2, 4),
    st.lists(st.integers(1, 50), min_size=1, max_size=6),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_totals_are_the_sum_in_the_order_of_ranks(size, lengths, dtype):
    """Bit for bit, whatever the lengths of rounds that follow each other, at every rank."""
    generator = torch.Generator().manual_seed(len(lengths))
    terms = [
        [torch.randn(n, generator=generator).mul_(10 ** (rank % 3)).to(dtype) for n in lengths]
        for rank in range(size)
    ]
    with group(size) as made:
        got = together(made, lambda one: [one.total(x) for x in terms[one.rank]])
    for own in got:
        for n, total in enumerate(own):
            assert torch.equal(total, add_in_order([terms[rank][n] for rank in range(size)]))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 7), st.sets(st.integers(1, 10), min_size=1, max_size=3))
def test_columns_come_to_lie_beside_each_other(rows, inner):
    ends = [0, *sorted(inner), 11]
    size = len(ends) - 1
    whole = torch.arange(rows * 11.0).view(rows, 11)

    def call(one: SharedSums) -> torch.Tensor:
        columns = range(ends[one.rank], ends[one.rank + 1])
        return one.beside(whole[:, columns.start : columns.stop], columns, 11)

    with group(size) as made:
        assert all(torch.equal(got, whole) for got in together(made, call))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_what_the_leader_has_is_shared(dtype):
    wanted = torch.arange(60).view(5, 12).to(dtype)
    with group(3) as made:
        got = together(made, lambda one: one.share(wanted.clone() if one.rank == 0 else wanted * 0))
    assert all(torch.equal(one, wanted) for one in got)


def test_a_rank_that_leaves_is_known_at_once_and_from_then_on():
    with group(3, timeout_s=30.0) as made:
        began = time.monotonic()
        made[1].leave(GONE)
        with ThreadPoolExecutor(2) as threads:
            jobs = [threads.submit(made[rank].total, torch.ones(3)) for rank in (0, 2)]
            for job in jobs:
                with pytest.raises(MemberLost):
                    job.result(10)
        assert time.monotonic() - began < 10
        with pytest.raises(MemberLost):
            made[0].total(torch.ones(3))
        assert made[0].lost is not None


def test_a_rank_that_leaves_while_it_is_waited_for():
    with group(2, timeout_s=30.0) as made, ThreadPoolExecutor(1) as threads:
        job = threads.submit(made[0].total, torch.ones(3))
        assert select.select([made[1]._bells[0]], [], [], 10)[0]  # it rang, and waits
        made[1].leave(GONE)
        with pytest.raises(MemberLost, match="rank 1"):
            job.result(10)


def test_a_rank_that_does_not_come_is_slept_for_until_the_deadline():
    """Not listened for all the time: the processor is free meanwhile."""
    with group(2, timeout_s=0.3) as made:
        began, used = time.monotonic(), time.thread_time()
        with pytest.raises(MemberLost, match="in time") as caught:
            made[0].total(torch.ones(3))
        assert 0.29 < time.monotonic() - began < 5
        assert time.thread_time() - used < 0.1
        assert caught.value.rank == 1
        with pytest.raises(MemberLost, match="rank 0"):  # a late one finds nobody
            made[1].total(torch.ones(3))
