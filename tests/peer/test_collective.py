"""Collectives over real streams on loopback: members are threads; one is a process that dies."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from hexswarm.errors import MemberLost, UsageError
from hexswarm.identity import Identity
from hexswarm.peer import collective as module
from hexswarm.peer.collective import Collective
from hexswarm.peer.patience import Limits
from hexswarm.peer.reduction import Format
from hexswarm.peer.stream_sums import StreamSums
from hexswarm.transports.direct import DirectStream, Listener, dial

HOST = "127.0.0.1"
IDS = [Identity(bytes([number + 1]) * 32) for number in range(4)]
LIMITS = Limits(floor_s=0.4, most_s=3.0, grace_s=0.1)
PATIENT = Limits(floor_s=15.0, most_s=18.0)
"""Where nobody is to be lost: a busy machine stands still for longer than `LIMITS` allow."""
MEMBER = """
import sys
import numpy as np
from hexswarm.identity import Identity
from hexswarm.peer.collective import Collective
from hexswarm.transports.direct import dial

size, ports = int(sys.argv[1]), [int(port) for port in sys.argv[2:]]
ids = [Identity(bytes([number + 1]) * 32) for number in range(size)]
rank = size - 1
streams = {o: dial(ids[rank], ids[o].peer, "127.0.0.1", ports[o]) for o in range(rank)}
group = Collective(rank, streams, epoch=1)
values = np.ones(64, np.float32)
while True:
    group.all_reduce(values)
    values[:] = 1
"""


class Doors:
    """One listener for each rank, and the streams that came in there."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._arrived: list[queue.Queue[DirectStream]] = [queue.Queue() for _ in range(size)]
        self.listeners = [
            Listener(
                IDS[rank],
                HOST,
                0,
                allowed=lambda peer: peer in {item.peer for item in IDS},
                deliver=self._arrived[rank].put,
            )
            for rank in range(size)
        ]

    def streams(self, inside: int) -> list[dict[int, DirectStream]]:
        """Streams between all ranks; only the first `inside` are of this process."""
        found: list[dict[int, DirectStream]] = [{} for _ in range(inside)]
        for rank in range(inside):
            for other in range(rank):
                port = self.listeners[other].port
                found[rank][other] = dial(IDS[rank], IDS[other].peer, HOST, port)
        ranks = {item.peer: rank for rank, item in enumerate(IDS)}
        for rank in range(inside):
            while len(found[rank]) < self.size - 1:
                stream = self._arrived[rank].get(timeout=20)
                found[rank][ranks[stream.remote]] = stream
        return found

    def close(self) -> None:
        for listener in self.listeners:
            listener.close()


Make = Callable[..., list[Collective]]


@pytest.fixture
def make() -> Iterator[Make]:
    """make(size, options...) gives the members of a group; they are closed afterwards."""
    closing: list[Any] = []

    def group(size: int, *, inside: int = 0, doors: Doors | None = None, **options: Any) -> Any:
        if doors is None:
            doors = Doors(size)
            closing.append(doors)
        options = {"epoch": 1, "limits": PATIENT, **options}
        made = [
            Collective(rank, streams, **options)
            for rank, streams in enumerate(doors.streams(inside or size))
        ]
        closing.extend(made)
        return made

    yield group
    for item in closing:
        item.close()


def together(*acts: Callable[[], Any]) -> list[Any]:
    """Run all at the same time; what they return, or the MemberLost that they raise."""
    results: list[Any] = [None] * len(acts)

    def run(number: int, act: Callable[[], Any]) -> None:
        try:
            results[number] = act()
        except MemberLost as error:
            results[number] = error

    threads = [threading.Thread(target=run, args=pair) for pair in enumerate(acts)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    return results


@pytest.mark.parametrize("wire", Format)
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_all_have_the_same_bits(make: Make, size: int, wire: Format) -> None:
    """Small vectors and large ones, one after the other, by either algorithm."""
    generator = np.random.default_rng(size)
    group = make(size, wire=wire, swap_bytes=4096)
    for count in (5, 3000, 0, 100_000, 5):
        parts = [generator.standard_normal(count).astype(np.float32) for _ in group]
        total = parts[0].copy()
        wire.round(total)
        for part in parts[1:]:
            rounded = part.copy()
            wire.round(rounded)
            total += rounded
        wire.round(total)
        if size == 1:
            total = parts[0].copy()  # nothing goes over a wire
        acts = (lambda m=m, p=p: m.all_reduce(p) for m, p in zip(group, parts, strict=True))
        assert together(*acts) == [None] * size
        assert [part.tobytes() for part in parts] == [total.tobytes()] * size


def test_the_leader_tells_all_others(make: Make) -> None:
    group = make(3)
    for data in (b"", b"step", os.urandom(300_000)):
        _, *heard = together(
            lambda data=data: group[0].broadcast(data), *(member.receive for member in group[1:])
        )
        assert [bytes(item) for item in heard] == [data, data]


def test_a_follower_that_hears_nothing_gives_up(make: Make) -> None:
    group = make(2, limits=LIMITS)
    began_s = time.monotonic()
    with pytest.raises(MemberLost) as caught:
        group[1].receive(patience_s=0.2)
    assert caught.value.rank == 0
    assert 0.2 <= time.monotonic() - began_s < 2


def test_misuse_is_told(make: Make) -> None:
    group = make(2)
    for values in (np.zeros(4), np.zeros((2, 2), np.float32), np.zeros(8, np.float32)[::2]):
        with pytest.raises(UsageError):
            group[0].all_reduce(values)
    with pytest.raises(UsageError):
        group[1].broadcast(b"")
    with pytest.raises(UsageError):
        group[0].receive()
    with pytest.raises(UsageError):
        Collective(0, {2: group[0]._streams[1]}, epoch=1)


@pytest.mark.parametrize("count", [8, 200_000])
def test_a_member_that_does_not_come_is_named_by_all(make: Make, count: int) -> None:
    """Also when its stream is full, so that nobody could finish sending."""
    group = make(4, swap_bytes=1 << 30, limits=LIMITS)
    began_s = time.monotonic()
    acts = [
        lambda member=member: member.all_reduce(np.ones(count, np.float32))
        for member in group
        if member.rank != 2
    ]
    errors = together(*acts)
    assert time.monotonic() - began_s < LIMITS.most_s
    assert [error.rank for error in errors] == [2, 2, 2]
    assert all(error.peer == IDS[2].peer and error.epoch == 1 for error in errors)
    with pytest.raises(MemberLost):  # and the epoch stays over
        group[0].all_reduce(np.ones(count, np.float32))
    with pytest.raises(MemberLost) as late:
        _come_late(group[2], count)
    assert late.value.rank == 2
    assert "given up" in late.value.how


def _come_late(member: Collective, count: int) -> None:
    """For the first sum all that it needs may be there."""
    for _ in range(2):
        member.all_reduce(np.ones(count, np.float32))


def test_an_abort_ends_a_collective_from_another_thread(make: Make) -> None:
    group = make(2, limits=Limits(floor_s=30, most_s=60))
    waiting = threading.Event()

    def wait() -> None:
        waiting.set()
        group[0].all_reduce(np.ones(8, np.float32))

    def abort() -> None:
        waiting.wait(5)
        group[0].abort()

    began_s = time.monotonic()
    error, _ = together(wait, abort)
    assert isinstance(error, MemberLost)
    assert time.monotonic() - began_s < 10


@pytest.mark.parametrize(
    ("blow", "size"), [(signal.SIGKILL, 2), (signal.SIGKILL, 3), (signal.SIGSTOP, 3)]
)
def test_a_process_that_is_killed_or_frozen(make: Make, blow: signal.Signals, size: int) -> None:
    """In the middle of its sums. The others raise at once, or within the deadline."""
    doors = Doors(size)
    words = [sys.executable, "-c", MEMBER, str(size)]
    ports = [str(listener.port) for listener in doors.listeners]
    process = subprocess.Popen([*words, *ports], cwd="/")
    try:
        limits = Limits(5.0, 10.0, 0.2) if blow == signal.SIGKILL else Limits(0.5, 5.0, 0.2)
        group = make(size, inside=size - 1, doors=doors, limits=limits)
        struck = threading.Event()
        struck_s = 0.0

        def strike() -> None:
            nonlocal struck_s
            struck_s = time.monotonic()
            struck.set()
            os.kill(process.pid, blow)

        def work(member: Collective) -> None:
            for number in range(1 << 20):
                values = np.ones(64, np.float32)
                member.all_reduce(values)
                assert (values == size).all()
                if number == 20 and member.rank == 0:
                    strike()

        errors = together(*(lambda member=member: work(member) for member in group))
        took_s = time.monotonic() - struck_s
        assert struck.is_set()
        assert [error.rank for error in errors] == [size - 1] * (size - 1)
        assert took_s < 2.5  # a kill is told by its stream, long before that deadline
    finally:
        process.kill()
        process.wait()
        doors.close()


def test_a_dead_stream_does_not_keep_the_thread_busy(make: Make) -> None:
    """Rank 1 has sent its part and is gone; rank 0 waits for rank 2 meanwhile, asleep."""
    group = make(3, limits=LIMITS)
    group[1]._exchange.start(_loaded(group[1]), 0.0)
    group[1]._write()
    group[1].close()
    began_s, cpu_s = time.monotonic(), time.thread_time()
    with pytest.raises(MemberLost) as caught:
        group[0].all_reduce(np.ones(8, np.float32))
    assert caught.value.rank == 2
    assert time.monotonic() - began_s > LIMITS.floor_s
    assert time.thread_time() - cpu_s < 0.1


def _loaded(member: Collective) -> Any:
    operation = member._operation(8)
    operation.load(np.ones(8, np.float32))
    return operation


def test_few_lengths_keep_their_buffers(make: Make) -> None:
    group = make(2)
    for count in range(20):
        together(*(lambda m=m, n=count: m.all_reduce(np.ones(n, np.float32)) for m in group))
    assert len(group[0]._operations) == module.LENGTHS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_shard_sums_over_streams_as_over_anything(make: Make, dtype: torch.dtype) -> None:
    """Totals in rank order, unequal columns side by side."""
    doors = [StreamSums(member) for member in make(3)]
    terms = [torch.randn(2, 3, 8).to(dtype) for _ in doors]
    total = terms[0].float()
    for term in terms[1:]:
        total = total + term.float()
    found = together(
        *(lambda d=d, x=x: d.total(x.clone()) for d, x in zip(doors, terms, strict=True))
    )
    assert all(torch.equal(item, total) for item in found)
    table = torch.randn(2, 9).to(dtype)
    ranges = [range(5), range(5, 8), range(8, 9)]
    found = together(
        *(
            lambda d=d, r=r: d.beside(table[:, r.start : r.stop], r, 9)
            for d, r in zip(doors, ranges, strict=True)
        )
    )
    assert all(torch.equal(item, table.float()) for item in found)


def test_columns_that_do_not_make_up_the_width_are_told(make: Make) -> None:
    doors = [StreamSums(member) for member in make(2, limits=LIMITS)]
    errors = together(*(lambda d=d: d.beside(torch.zeros(1, 2), range(2), 5) for d in doors))
    assert all(isinstance(error, MemberLost) for error in errors)
