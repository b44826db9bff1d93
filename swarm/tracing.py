"""What a client does with a session after an answer: asks its stages where the time went.

That never delays an answer: it runs in the background, the session stays open for it (one round
trip, `OpenSession.trace` bounds it), and is closed as soon as the stages have told. A client that
closes waits `CLOSE_S` for what is under way.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

from hexswarm.conversation import Completion
from hexswarm.errors import HexswarmError
from hexswarm.planning import Plan
from hexswarm.runtime import OpenSession
from hexswarm.trace import HopTrace, SessionTrace, Shares, save

log = logging.getLogger(__name__)

CLOSE_S = 1.0


class Tracer:
    """Traces under way, and the last ones made."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._tasks: dict[OpenSession, asyncio.Task[None]] = {}

    def begin(
        self, session: OpenSession, draft: SessionTrace, told: Callable[[SessionTrace], None]
    ) -> None:
        """Complete `draft`, which has no measured shares yet, hand it to `told`, and keep it."""
        before = self._tasks.get(session)
        if before is not None:
            before.cancel()  # of an earlier turn: the stages count the new one now
        task = asyncio.create_task(self._trace(session, draft, told))
        self._tasks[session] = task
        task.add_done_callback(lambda done: self._forget(session, done))

    def close_session(self, session: OpenSession) -> None:
        """Close it now, or as soon as its stages have told."""
        task = self._tasks.get(session)
        if task is None:
            session.close()
        else:
            task.add_done_callback(lambda _: session.close())

    async def settle(self) -> None:
        """Wait for the traces that are under way."""
        if self._tasks:
            await asyncio.wait(set(self._tasks.values()))

    async def close(self) -> None:
        """Wait a moment for what is under way; the rest is dropped."""
        tasks = set(self._tasks.values())
        if not tasks:
            return
        _, late = await asyncio.wait(tasks, timeout=CLOSE_S)
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)

    async def _trace(
        self, session: OpenSession, draft: SessionTrace, told: Callable[[SessionTrace], None]
    ) -> None:
        try:
            trace = draft.with_measured(await session.trace())
        except HexswarmError as error:  # a peer was lost: the prediction alone is of no use
            log.info("session %s leaves no trace: %s", session.name, error)
            return
        told(trace)
        try:
            save(self.folder, trace)
        except OSError as error:
            log.warning("the trace of session %s could not be kept: %s", session.name, error)

    def _forget(self, session: OpenSession, task: asyncio.Task[None]) -> None:
        if self._tasks.get(session) is task:
            del self._tasks[session]
        if not task.cancelled() and task.exception() is not None:
            log.error("tracing failed", exc_info=task.exception())


def draft(plan: Plan, completion: Completion, model: str, now: float) -> SessionTrace:
    """A trace of what was predicted and seen, before the stages have told."""
    route, budget = plan.route, completion.predicted or plan.budget()
    return SessionTrace(
        session=completion.session,
        model=model,
        when_s=now,
        prompt_tokens=completion.prompt_tokens,
        new_tokens=len(completion.ids),
        predicted_ttft_s=route.ttft_s,
        predicted_tpot_s=route.tpot_s,
        predicted_tpot_p95_s=route.tpot_p95_s,
        ttft_s=completion.ttft_s,
        tpot_s=completion.tpot_s,
        hops=tuple(
            HopTrace(
                peer=hop.peer,
                span=hop.span,
                origin=hop.origin,
                predicted=Shares(hop.compute_s, hop.queue_s, hop.link_s, hop.serialise_s),
            )
            for hop in budget.hops
        ),
        repairs=completion.mends,
    )
