"""The effects of a client's sessions: carries out what `session.py` decides.

One `SessionRuntime` serves all sessions of a client over shared links. A session in use is an
`OpenSession`: the state machine plus the queue on which its caller waits.

Every stage tells its load when it grants or refuses a lease. The runtime remembers the newest word
of each peer in `loads`, whatever became of the session: that is fresher than any announcement, and
what a refusal teaches is worth most.

A running turn that loses a stage stands still until it gets another route. Which one is nobody's
business here: `on_broken` is told, and calls `OpenSession.reroute` or `give_up` when it has found
out. Without such a listener the session fails with the first loss. Its caller sees a longer wait.
A dial that hangs does not fail by itself: whoever repairs has a deadline, and calls `suspect`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from hexswarm.clock import Clock, RealClock
from hexswarm.errors import HexswarmError, PeerLost, SessionClosed
from hexswarm.instructions import (
    Broken,
    Connect,
    Draining,
    Emit,
    EmitLogits,
    EmitProgress,
    EmitTraces,
    Fail,
    Instruction,
    Mended,
    Ready,
    Send,
    Turn,
)
from hexswarm.links import BULK, STEP, Links, Outgoing
from hexswarm.messages import Close, Opened, Progress, Refuse, Traced
from hexswarm.prefix import Namer
from hexswarm.records import Load, PeerId, Route
from hexswarm.session import Session
from hexswarm.wire import Frame

Event = Emit | EmitLogits | Ready

TRACE_S = 1.0
"""How long `trace` waits: longer than any round trip, and nobody's answer waits for it."""
MAX_LOADS = 1024
"""Peers whose load is remembered: far more than a client talks to within a load's life."""


class OpenSession:
    """A session and its one listener."""

    def __init__(self, runtime: SessionRuntime, machine: Session) -> None:
        self.machine = machine
        self.events: asyncio.Queue[Event | Fail] = asyncio.Queue()
        self._runtime = runtime
        self._traced = asyncio.Event()
        self._tracing = asyncio.Lock()
        self._told = asyncio.Event()
        self._asking = asyncio.Lock()
        self._followed: Route | None = None
        """The route on whose peers it depends; None: it has ended."""

    @property
    def name(self) -> str:
        """What people call the session: the first eight hex digits of its key."""
        return self.machine.name

    @property
    def refusing(self) -> frozenset[PeerId]:
        """All peers known by now to have refused the session, or to be out of reach for it."""
        return frozenset(self.machine.refusing)

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

    def check(self) -> None:
        """Raises what has ended the session, whether its listener has heard of it or not."""
        if self.machine.failed is not None:
            raise self.machine.failed

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

    async def trace(self) -> dict[PeerId, Traced]:
        """Where the time of the last turn went, by stage; without those that do not tell in time.

        Ask before `close`, and best when no turn runs: the sums are those of the turn so far.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(TRACE_S), self._tracing:
                self._traced.clear()
                self._runtime.carry_out(self, self.machine.trace())
                if self.machine.failed is None:
                    await self._traced.wait()
        return dict(self.machine.traced)

    async def progress(self, timeout_s: float) -> dict[PeerId, Progress]:
        """How far the stages are, without those that are broken or do not tell in time."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s), self._asking:
                self._told.clear()
                self._runtime.carry_out(self, self.machine.ask_progress())
                if self.machine.failed is None:
                    await self._told.wait()
        return dict(self.machine.progress)

    def suspect(self, peer: PeerId, error: HexswarmError) -> None:
        """Do without a stage of the running turn, as if its link were lost."""
        self._runtime.carry_out(self, self.machine.suspect(peer, error))

    def reroute(self, route: Route, budgets: Sequence[float] = ()) -> None:
        """Let the running turn go on along `route`; `SessionRuntime.on_mended` tells when it does.

        Raises LocalProtocolError if the route is not for this session, or no turn runs.
        """
        self._runtime.carry_out(self, self.machine.reroute(route, budgets))

    def give_up(self, error: HexswarmError) -> None:
        """No other route can be had: whoever waits for an event gets `error`."""
        self._runtime.carry_out(self, self.machine.give_up(error))

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

    def __init__(self, clock: Clock | None = None) -> None:
        self.links: Links  # set once joined: links and runtime know each other
        self.loads: dict[PeerId, tuple[float, Load]] = {}
        """When each peer last told its load (monotonic time), and the load; newest last."""
        self.secret = os.urandom(32)
        """With which prompts are named (`hexswarm.prefix`); empty: nothing is named."""
        self._clock = clock or RealClock()
        self._sessions: dict[bytes, OpenSession] = {}
        self._held: weakref.WeakValueDictionary[bytes, OpenSession] = weakref.WeakValueDictionary()
        """Also those that ended, while their caller has them: refusals may still come in."""
        self._dials: set[asyncio.Task[None]] = set()
        self.closed = False
        """No session is opened any more."""
        self.on_broken: Callable[[OpenSession], None] | None = None
        """A running turn stands still: see `Session.broken`. None: it fails."""
        self.on_draining: Callable[[OpenSession, PeerId, float], None] | None = None
        """A stage of a running turn exits in so many seconds."""
        self.on_mended: Callable[[OpenSession], None] | None = None
        """A turn goes on, along `OpenSession.route`."""

    def __len__(self) -> int:
        return len(self._sessions)

    def open(
        self,
        route: Route,
        digest: str,
        kv_tokens: int,
        *,
        client_loop: bool = False,
        budgets: Sequence[float] = (),
        prompt: Sequence[int] = (),
    ) -> OpenSession:
        """Begin to open a session along `route`; await `ready()` on the result.

        `budgets` are the seconds a step that each stage shall promise. Of the `prompt` of its first
        turn the stages may have the KV already: once it is open, `Session.cached` tells.
        Raises SessionClosed once all were closed: whoever was still looking for a route stops.
        """
        if self.closed:
            raise SessionClosed("the client was closed", remedy="send the request again")
        machine = Session(
            *(os.urandom(16), route, digest, kv_tokens),
            client_loop=client_loop,
            budgets=budgets,
            namer=Namer(self.secret, digest) if self.secret and prompt else None,
            prompt=prompt,
        )
        session = OpenSession(self, machine)
        self._sessions[machine.key] = self._held[machine.key] = session
        self.carry_out(session, machine.start())
        return session

    def close(self, session: OpenSession, *, keep: bool = True) -> None:
        """Free the stages; whoever waits for an event learns that none will come."""
        if session.machine.key not in self._sessions:
            return
        instructions = session.machine.close(keep=keep)
        assert session.machine.failed is not None
        self.carry_out(session, [*instructions, Fail(session.machine.failed)])

    def _release(self, session: OpenSession) -> None:
        """A session is over, whoever ended it: depend on its peers no more."""
        if self._sessions.pop(session.machine.key, None) is not None:
            self._follow(session, None)

    def _follow(self, session: OpenSession, route: Route | None) -> None:
        """Watch the peers on which a session depends from now on, and no others."""
        before, session._followed = session._followed, route
        for stage in route.stages if route is not None else ():
            self.links.watch(stage.peer)
        for stage in before.stages if before is not None else ():
            self.links.unwatch(stage.peer)

    def close_all(self) -> None:
        """This client goes: nobody will ask for what was said."""
        self.closed = True
        for session in list(self._sessions.values()):
            self.close(session, keep=False)

    def on_frames(self, peer: PeerId, frames: list[Frame]) -> None:
        for frame in frames:
            key = getattr(frame.message, "session", None)
            if key is None:  # GoAway concerns every session with that peer
                for session in list(self._sessions.values()):
                    self.carry_out(session, session.machine.on_frame(peer, frame))
                continue
            if isinstance(frame.message, Opened | Refuse):
                self._hear(peer, frame.message.load)
            found = self._held.get(key)
            if found is not None:
                self.carry_out(found, found.machine.on_frame(peer, frame))

    def _hear(self, peer: PeerId, load: Load) -> None:
        self.loads.pop(peer, None)
        self.loads[peer] = self._clock.monotonic(), load
        if len(self.loads) > MAX_LOADS:
            del self.loads[next(iter(self.loads))]

    def on_lost(self, peer: PeerId, how: str) -> None:
        for session in list(self._sessions.values()):
            self.carry_out(session, session.machine.on_lost(peer, how))

    def carry_out(self, session: OpenSession, instructions: Iterable[Instruction]) -> None:
        if session.route is not session._followed and session.machine.key in self._sessions:
            self._follow(session, session.route)
        sends: dict[tuple[PeerId, int], list[Outgoing]] = {}
        news: list[Broken | Draining | Mended] = []
        for instruction in instructions:
            match instruction:
                case Send(peer=peer, message=message, payload=payload, bulk=bulk):
                    sends.setdefault((peer, BULK if bulk else STEP), []).append((message, payload))
                case Connect():
                    task = asyncio.create_task(self._connect(session, instruction))
                    self._dials.add(task)
                    task.add_done_callback(self._dials.discard)
                case Broken() | Draining() | Mended():
                    news.append(instruction)
                case _:
                    self._tell(session, instruction)
        for (peer, lane), outgoing in sends.items():
            self._send(session, peer, outgoing, lane)
        for item in news:  # at last, since who hears them gives new instructions
            self._announce(session, item)

    def _tell(self, session: OpenSession, event: Event | EmitTraces | EmitProgress | Fail) -> None:
        """What the session's caller waits for."""
        match event:
            case Emit():
                session.events.put_nowait(replace(event, arrived_s=self._clock.monotonic()))
            case EmitTraces():
                session._traced.set()
            case EmitProgress():
                session._told.set()
            case Fail():
                session.events.put_nowait(event)
                session._traced.set()
                session._told.set()
                self._release(session)
            case _:
                session.events.put_nowait(event)

    def _send(
        self, session: OpenSession, peer: PeerId, outgoing: list[Outgoing], lane: int
    ) -> None:
        sent = self.links.send(peer, outgoing, lane)
        if sent or all(isinstance(message, Close) for message, _ in outgoing):
            return  # whoever cannot be told of the end has missed its client already
        if session.machine.failed is None:
            self.carry_out(session, session.machine.on_lost(peer, "is not connected"))

    def _announce(self, session: OpenSession, news: Broken | Draining | Mended) -> None:
        """Tell whoever plans routes, if it is still true."""
        machine = session.machine
        if machine.failed is not None:
            return
        match news:
            case Broken() if self.on_broken is None:
                errors = machine.broken.values()
                self.carry_out(session, machine.give_up(next(iter(errors))) if errors else [])
            case Broken() if machine.broken and self.on_broken is not None:
                self.on_broken(session)
            case Draining(peer=peer, exit_s=exit_s) if self.on_draining is not None:
                self.on_draining(session, peer, exit_s)
            case Mended(epoch=epoch) if self.on_mended is not None and epoch == machine.epoch:
                self.on_mended(session)

    async def _connect(self, session: OpenSession, wish: Connect) -> None:
        stage, machine = wish.stage, session.machine
        try:
            await self.links.connect(stage.peer, stage.addresses)
        except HexswarmError as error:
            if wish.message.epoch == machine.epoch:  # else another route was taken meanwhile
                how = error.how if isinstance(error, PeerLost) else error.cause
                self.carry_out(session, machine.on_lost(stage.peer, how))
            return
        if machine.failed is None and wish.message.epoch == machine.epoch:
            self.carry_out(session, [Send(stage.peer, wish.message, wish.payload)])
