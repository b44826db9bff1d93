"""Whether the ranks of this machine are alive, also while none of them computes.

Sums notice who does not come, but only while there are sums, and on GPUs nobody on the host waits
for them at all. So each rank has a socket beside, on which a thread of its own answers bytes: a
process that was killed closes it, a frozen one is silent. The other way round the end of rank 0 is
the end of every rank, whatever its device is doing at that moment.

Silence counts from `guard` on: while weights are read and kernels compiled, a thread may wait for
the interpreter's lock. If the watcher itself did not run (a laptop that slept), what it did not
hear is nobody's silence.
"""

from __future__ import annotations

import os
import select
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress

EVERY_S = 0.5
SILENT_S = 3.0
"""A rank that says nothing for so long is lost."""
_BEAT = b"."

Lost = Callable[[int, str], None]


class Pulse:
    """Watches the other ranks from a thread; tells once of each that is lost."""

    def __init__(
        self,
        ends: Mapping[int, socket.socket],
        lost: Lost,
        *,
        every_s: float = EVERY_S,
        silent_s: float = SILENT_S,
    ) -> None:
        self._ends, self._lost = dict(ends), lost
        self._every_s, self._silent_s = every_s, silent_s
        self._heard_s: dict[int, float] = {}
        """When, of those whose silence counts."""
        self._closed = self._guarding = False
        for end in self._ends.values():
            end.setblocking(False)
        self._thread = threading.Thread(target=self._live, name="hexswarm-pulse", daemon=True)
        self._thread.start()

    def guard(self) -> None:
        """From now on silence is a loss."""
        self._guarding = True

    def close(self) -> None:
        """Stop watching; the ranks end when they see it."""
        self._closed = True
        self._thread.join()
        for end in self._ends.values():
            end.close()

    def _live(self) -> None:
        ranks = {end.fileno(): rank for rank, end in self._ends.items()}
        poll = select.poll()
        for number in ranks:
            poll.register(number, select.POLLIN)
        looked_s = beat_s = time.monotonic()
        while ranks and not self._closed:
            ready = poll.poll(self._every_s * 1e3 / 5)
            now = time.monotonic()
            if now - looked_s > self._every_s:  # we were held up, not they
                self._heard_s = dict.fromkeys(self._heard_s, now)
            looked_s = now
            for number, _ in ready:
                if not self._hear(ranks[number], now):
                    poll.unregister(number)
                    self._tell(ranks.pop(number), "is gone")
            if now - beat_s >= self._every_s:
                beat_s = now
                self._beat(now)
            if self._guarding:
                self._judge(ranks, now)

    def _hear(self, rank: int, now: float) -> bool:
        """Whether the rank is still there."""
        try:
            heard = self._ends[rank].recv(64)
        except BlockingIOError:
            return True
        except OSError:
            return False
        if self._guarding:
            self._heard_s[rank] = now
        return bool(heard)

    def _beat(self, now: float) -> None:
        for rank, end in self._ends.items():
            if self._guarding:
                self._heard_s.setdefault(rank, now)
            with suppress(OSError):  # full: it does not read; gone: that is heard
                end.send(_BEAT)

    def _judge(self, ranks: dict[int, int], now: float) -> None:
        for number, rank in list(ranks.items()):
            if now - self._heard_s.get(rank, now) > self._silent_s:
                del ranks[number]
                self._tell(rank, f"said nothing for {self._silent_s:.0f} s")

    def _tell(self, rank: int, how: str) -> None:
        if not self._closed:
            self._lost(rank, how)


def answer(end: socket.socket) -> None:
    """In a thread of a child: answer rank 0 until it is gone, then end this process at once."""
    with suppress(OSError):
        while heard := end.recv(64):
            end.sendall(_BEAT * len(heard))
    os._exit(1)  # also where the device thread hangs in a sum that will never be complete
