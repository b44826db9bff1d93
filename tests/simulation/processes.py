"""Processes that can be stopped and killed, all in one event loop on virtual time.

A *process* is whatever runs in its name: every callback of asyncio carries a context, and a context
variable in it says whose it is. The loop looks before it runs a callback:

- of a *stopped* process (SIGSTOP) it is put aside, in order, and runs when the process goes on.
  Timers run late, data that arrived meanwhile is found all at once, the clock has gone on: what a
  real process finds when it wakes up.
- of a *killed* process timers never run again. Its tasks are cancelled, so that no coroutine is
  left to the garbage collector's mood; nothing that its clean-up code says leaves the process,
  since the network was cut first (`hexswarm.transports.memory` and `wires.py`).
- callbacks of nobody (the network, the world that injects faults) always run.

The loop never sleeps and asks no selector: with nothing ready the clock jumps to the next timer.
Equal histories give equal order, so a run is a function of its seed. Rejected: stopping a process
by freezing its links alone (its timers would go on, and it would see everybody else fall silent).
"""

from __future__ import annotations

import asyncio
import contextvars
import heapq
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

OWNER: contextvars.ContextVar[Process | None] = contextvars.ContextVar("owner", default=None)
NOBODY = contextvars.Context()
"""What runs in it belongs to no process: the flight of bytes."""
EPOCH_S = 1.7e9


class Process:
    """The tasks and timers of one peer or client."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.stopped = self.killed = False
        self.skew_s = 0.0
        """What its wall clock is wrong by."""
        self._late: list[asyncio.Handle] = []
        self._tasks: dict[asyncio.Task[Any], None] = {}
        self._context = contextvars.Context()
        self._context.run(OWNER.set, self)

    def __repr__(self) -> str:
        return f"Process({self.name})"

    @property
    def running(self) -> bool:
        return not self.stopped and not self.killed

    def spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """A task of this process."""
        loop = asyncio.get_running_loop()
        return loop.create_task(work, context=self._context.copy())

    def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call in the name of this process: timers and tasks that come of it are its own."""
        return self._context.copy().run(function, *arguments)

    def adopt(self) -> None:
        """The running task belongs to this process from now on."""
        OWNER.set(self)
        task = asyncio.current_task()
        assert task is not None
        self.register(task)

    def register(self, task: asyncio.Task[Any]) -> None:
        self._tasks[task] = None
        task.add_done_callback(self._forget)
        if self.killed:
            task.cancel()

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._tasks.pop(task, None)

    @property
    def tasks(self) -> list[asyncio.Task[Any]]:
        """Those that have not ended."""
        return list(self._tasks)

    def stop(self) -> None:
        self.stopped = True

    def put_aside(self, handle: asyncio.Handle) -> None:
        self._late.append(handle)

    def go_on(self) -> None:
        self.stopped = False
        late, self._late = self._late, []
        loop = asyncio.get_running_loop()
        assert isinstance(loop, SimulatedLoop)
        loop.ready(late)

    def kill(self) -> None:
        """End everything; cut its network first."""
        self.killed = True
        self.go_on()
        for task in self.tasks:
            task.cancel()


class ProcessClock:
    """The `Clock` of a process; the wall clock may be wrong."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._loop = asyncio.get_running_loop()

    def monotonic(self) -> float:
        return self._loop.time()

    def wall(self) -> float:
        return EPOCH_S + self._process.skew_s + self._loop.time()


class Deadlock(Exception):
    """Nothing is ready and no timer is set, yet somebody waits."""


class SimulatedLoop(asyncio.SelectorEventLoop):
    """See the module. Overrides what asyncio runs once a round; no file or socket is watched."""

    _ready: Any
    _scheduled: list[asyncio.TimerHandle]
    _stopping: bool

    def __init__(self) -> None:
        super().__init__()
        self._now_s = 0.0
        self.rounds = 0
        self.set_task_factory(_task)

    def time(self) -> float:
        return self._now_s

    def call_soon(self, callback: Any, *args: Any, context: Any = None) -> asyncio.Handle:
        """asyncio's own without its checks: this and `_run_once` are a tenth of a world's time."""
        handle = asyncio.Handle(callback, args, self, context)
        self._ready.append(handle)
        return handle

    def call_at(
        self, when: float, callback: Any, *args: Any, context: Any = None
    ) -> asyncio.TimerHandle:
        timer = asyncio.TimerHandle(when, callback, args, self, context)
        heapq.heappush(self._scheduled, timer)
        timer._scheduled = True
        return timer

    def call_later(
        self, delay: float, callback: Any, *args: Any, context: Any = None
    ) -> asyncio.TimerHandle:
        return self.call_at(self._now_s + delay, callback, *args, context=context)

    def ready(self, handles: list[asyncio.Handle]) -> None:
        self._ready.extend(handles)

    def call_soon_threadsafe(
        self, callback: Any, *args: Any, context: Any = None
    ) -> asyncio.Handle:
        return self.call_soon(callback, *args, context=context)

    def run_in_executor(self, executor: Any, function: Any, *args: Any) -> Any:
        """There are no threads here: what would wait in one is done at once."""
        done = self.create_future()
        done.set_result(function(*args))
        return done

    def _run_once(self) -> None:
        scheduled, ready = self._scheduled, self._ready
        while scheduled and scheduled[0]._cancelled:
            heapq.heappop(scheduled)._scheduled = False
        if not ready and not self._stopping:
            if not scheduled:
                raise Deadlock("everybody waits for something that nobody will do")
            self._now_s = max(self._now_s, scheduled[0]._when)
        while scheduled and scheduled[0]._when <= self._now_s:
            handle = heapq.heappop(scheduled)
            handle._scheduled = False
            ready.append(handle)
        self.rounds += 1
        if not self.rounds % 1024:
            self._sweep()
        for _ in range(len(ready)):
            handle = ready.popleft()
            if handle._cancelled:
                continue
            owner = handle._context.get(OWNER)
            if owner is not None:
                if owner.stopped:
                    owner.put_aside(handle)
                    continue
                if owner.killed and isinstance(handle, asyncio.TimerHandle):
                    continue
            try:
                handle._context.run(handle._callback, *handle._args)
            except (SystemExit, KeyboardInterrupt):
                raise
            except BaseException as error:
                told = {"message": f"Exception in {handle!r}", "exception": error, "handle": handle}
                self.call_exception_handler(told)

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """They are swept out now and then."""

    def _sweep(self) -> None:
        """Forget cancelled timers: every timeout that did not run out leaves one."""
        left = [handle for handle in self._scheduled if not handle._cancelled]
        heapq.heapify(left)
        self._scheduled[:] = left


def _task(loop: Any, work: Any, *, context: contextvars.Context | None = None) -> Any:
    task: asyncio.Task[Any] = asyncio.Task(work, loop=loop, context=context)
    owner = OWNER.get() if context is None else context.get(OWNER)
    if owner is not None:
        owner.register(task)
    return task


def run(scenario: Coroutine[Any, Any, T]) -> T:
    """Run to the end on virtual time."""
    with asyncio.Runner(loop_factory=SimulatedLoop) as runner:
        return runner.run(scenario)
