"""The effects of a client's sessions: carries out what `session.py` decides.

One `SessionRuntime` serves all sessions of a client over shared links. A session in use is an
`OpenSession`: the state machine plus the queue on which its caller waits.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable

from hexswarm.errors import HexswarmError, PeerLost
from hexswarm.links import BULK, STEP, Links, Outgoing
from hexswarm.records import PeerId, Route
from hexswarm.session import (
    Connect,
    Emit,
    EmitLogits,
    Fail,
    Instruction,
    Ready,
    Send,
    Session,
    Turn,
)
from hexswarm.wire import Frame

Event = Emit | EmitLogits | Ready


class OpenSession:
    """A session and its one listener."""

    def __init__(self, runtime: SessionRuntime, machine: Session) -> None:
        self.machine = machine
        self.events: asyncio.Queue[Event | Fail] = asyncio.Queue()
        self._runtime = runtime

    @property
    def route(self) -> Route:
        return self.machine.route

    async def wait(self) -> Event:
        """The next event. Raises the session's error when it failed."""
        event = await self.events.get()
        if isinstance(event, Fail):
            raise event.error
        return event

    async def ready(self) -> None:
        """Wait until all stages hold their lease."""
        while not isinstance(await self.wait(), Ready):
            continue

    async def extend(self, kv_tokens: int) -> None:
        """Prolong the lease. Raises Refused if a stage has no room (the session then ends)."""
        if kv_tokens > self.machine.kv_tokens:
            self._runtime.carry_out(self, self.machine.extend(kv_tokens))
            await self.ready()

    def generate(self, turn: Turn) -> None:
        self._forget_events()
        self._runtime.carry_out(self, self.machine.generate(turn))

    def feed(self, token: int) -> None:
        self._runtime.carry_out(self, self.machine.feed(token))

    def cancel(self) -> None:
        self._runtime.carry_out(self, self.machine.cancel())
        self._forget_events()

    def close(self) -> None:
        self._runtime.close(self)

    def _forget_events(self) -> None:
        """Events of an abandoned turn are of no interest; a failure stays."""
        failure = None
        while not self.events.empty():
            event = self.events.get_nowait()
            failure = event if isinstance(event, Fail) else failure
        if failure is not None:
            self.events.put_nowait(failure)


class SessionRuntime:
    """All sessions of one client."""

    def __init__(self) -> None:
        self.links: Links  # set once joined: links and runtime know each other
        self._sessions: dict[bytes, OpenSession] = {}
        self._dials: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._sessions)

    def open(
        self, route: Route, digest: str, kv_tokens: int, *, client_loop: bool = False
    ) -> OpenSession:
        """Begin to open a session along `route`; await `ready()` on the result."""
        machine = Session(os.urandom(16), route, digest, kv_tokens, client_loop=client_loop)
        session = OpenSession(self, machine)
        self._sessions[machine.key] = session
        for stage in route.stages:
            self.links.watch(stage.peer)
        self.carry_out(session, machine.start())
        return session

    def close(self, session: OpenSession) -> None:
        """Free the stages; whoever waits for an event learns that none will come."""
        if session.machine.key not in self._sessions:
            return
        instructions = session.machine.close()
        assert session.machine.failed is not None
        self.carry_out(session, [*instructions, Fail(session.machine.failed)])

    def _release(self, session: OpenSession) -> None:
        """A session is over, whoever ended it: depend on its peers no more."""
        if self._sessions.pop(session.machine.key, None) is not None:
            for stage in session.route.stages:
                self.links.unwatch(stage.peer)

    def close_all(self) -> None:
        for session in list(self._sessions.values()):
            self.close(session)

    def on_frames(self, peer: PeerId, frames: list[Frame]) -> None:
        for frame in frames:
            key = getattr(frame.message, "session", None)
            if key is None:  # GoAway concerns every session with that peer
                for session in list(self._sessions.values()):
                    self.carry_out(session, session.machine.on_frame(peer, frame))
                continue
            found = self._sessions.get(key)
            if found is not None:
                self.carry_out(found, found.machine.on_frame(peer, frame))

    def on_lost(self, peer: PeerId, how: str) -> None:
        for session in list(self._sessions.values()):
            self.carry_out(session, session.machine.on_lost(peer, how))

    def carry_out(self, session: OpenSession, instructions: Iterable[Instruction]) -> None:
        sends: dict[tuple[PeerId, int], list[Outgoing]] = {}
        for instruction in instructions:
            match instruction:
                case Send(peer=peer, message=message, payload=payload, bulk=bulk):
                    sends.setdefault((peer, BULK if bulk else STEP), []).append((message, payload))
                case Connect():
                    task = asyncio.create_task(self._connect(session, instruction))
                    self._dials.add(task)
                    task.add_done_callback(self._dials.discard)
                case Emit() | EmitLogits() | Ready() | Fail():
                    session.events.put_nowait(instruction)
                    if isinstance(instruction, Fail):
                        self._release(session)
        for (peer, lane), outgoing in sends.items():
            sent = self.links.send(peer, outgoing, lane)
            if not sent and session.machine.failed is None:
                self.carry_out(session, session.machine.on_lost(peer, "is not connected"))

    async def _connect(self, session: OpenSession, wish: Connect) -> None:
        stage = wish.stage
        try:
            await self.links.connect(stage.peer, stage.addresses)
        except HexswarmError as error:
            how = error.how if isinstance(error, PeerLost) else error.cause
            self.carry_out(session, session.machine.on_lost(stage.peer, how))
            return
        if session.machine.failed is None:
            self.carry_out(session, [Send(stage.peer, wish.message)])
