"""Who closes the pulse is gone at once; who is silent is lost after a while, once guarded."""

from __future__ import annotations

import queue
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress

import pytest

from hexswarm.peer.pulse import Pulse

SILENT_S = 0.5


class Rank:
    """The other end of a pulse; answers while it is told to."""

    def __init__(self) -> None:
        self.ours, self.theirs = socket.socketpair()
        self.answering = threading.Event()
        self.heard = threading.Event()
        self.answering.set()
        self._thread = threading.Thread(target=self._live, daemon=True)
        self._thread.start()

    def _live(self) -> None:
        with suppress(OSError):
            while self.theirs.recv(64):
                self.heard.set()
                if self.answering.is_set():
                    self.theirs.sendall(b".")

    def die(self) -> None:
        self.theirs.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self.theirs.close()


@pytest.fixture
def watched() -> Iterator[tuple[list[Rank], Pulse, queue.Queue[tuple[int, str]]]]:
    told: queue.Queue[tuple[int, str]] = queue.Queue()
    ranks = [Rank(), Rank()]
    ends = {number: rank.ours for number, rank in enumerate(ranks, 1)}
    pulse = Pulse(ends, lambda *lost: told.put(lost), every_s=0.05, silent_s=SILENT_S)
    yield ranks, pulse, told
    for rank in ranks:
        with suppress(OSError):
            rank.die()
    pulse.close()


def test_the_dead_and_the_silent_are_told_once_each(watched) -> None:
    ranks, pulse, told = watched
    pulse.guard()
    ranks[0].answering.clear()
    rank, how = told.get(timeout=5)
    assert rank == 1
    assert "said nothing" in how
    ranks[1].die()
    assert told.get(timeout=5) == (2, "is gone")
    ranks[0].die()
    with pytest.raises(queue.Empty):
        told.get(timeout=0.3)


def test_before_it_is_guarded_silence_is_patience_and_death_is_death(watched) -> None:
    ranks, _, told = watched
    for rank in ranks:
        rank.answering.clear()
    with pytest.raises(queue.Empty):
        told.get(timeout=2 * SILENT_S)
    ranks[1].die()
    assert told.get(timeout=5)[0] == 2


def test_who_answers_is_not_lost(watched) -> None:
    ranks, pulse, told = watched
    pulse.guard()
    with pytest.raises(queue.Empty):
        told.get(timeout=3 * SILENT_S)
    assert all(rank.heard.is_set() for rank in ranks)
