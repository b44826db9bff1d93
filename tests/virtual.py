"""An event loop on virtual time: whatever waits for the clock is done at once, in order.

The loop's selector never sleeps. When nothing is ready it moves the clock to the next timer, so a
scenario of minutes runs in milliseconds, and a real machine's load changes nothing. A scenario that
waits for something that cannot come any more is a deadlock and raises instead of hanging.
Works for code that uses the loop alone: tasks, timers, `transports/memory.py`; no sockets, no
threads.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class Deadlock(Exception):
    """Nothing is ready and no timer is set, yet somebody waits."""


class _Jump(selectors.SelectSelector):
    """Instead of waiting, moves the clock."""

    now_s = 0.0

    def select(self, timeout: float | None = None) -> Any:
        if timeout is None:
            raise Deadlock("everybody waits for something that nobody will do")
        self.now_s += max(timeout, 0.0)
        return super().select(0)


class VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._jump = _Jump()
        super().__init__(self._jump)

    def time(self) -> float:
        return self._jump.now_s


class LoopClock:
    """A `Clock` that shows the running loop's time."""

    def monotonic(self) -> float:
        return asyncio.get_running_loop().time()

    def wall(self) -> float:
        return 1.7e9 + self.monotonic()


def run(scenario: Coroutine[Any, Any, T], limit_s: float = 1e4) -> T:
    """Run to the end on virtual time, at most `limit_s` of it: heartbeats go on for ever."""

    async def bounded() -> T:
        async with asyncio.timeout(limit_s):
            return await scenario

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(bounded())


def others() -> set[asyncio.Task[Any]]:
    """Tasks besides the caller's, which a tidy `close` leaves none of."""
    return asyncio.all_tasks() - {asyncio.current_task()}  # type: ignore[arg-type]
