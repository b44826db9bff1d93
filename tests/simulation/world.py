"""A whole swarm drawn from a seed, with faults, in virtual time; and the verdict on it.

    outcome = play(seed)
    outcome.broken       # what did not hold: [("I1", "ask 3 got ...")]
    outcome.trace        # a hash of every frame and fault: the same for the same seed

Real is everything between a caller's `stream` and the integers that a device computes: the whole
client (`AsyncClient` with its planner, opener, sessions and repair), links, stage tables, leases,
scheduler, announcements and their signatures; in some seeds groups of a LAN with their formation,
invitations, epochs and collectives. What stands in for something is listed in `peers.py` (engine
thread, runner), `lan.py` (a group's threads and tensors), `board.py` (DHT) and `wires.py`
(network). The caller's process and each peer's can be stopped and killed (`processes.py`); what
goes wrong is drawn in `faults.py`; what must hold is said in `invariants.py`.

    0 s           peers announce themselves
    settled_s     clients join, requests begin to come, faults begin
    faults_end_s  everything that was harmed is well again
    afterwards    the swarm must serve again; requests end; clients close; nothing may be held

Rejected: drawing faults while the world runs (a fault would depend on what the code did before, so
that a change of code changes the scenario of a seed).
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from typing import Any

from hexswarm.directory import ANNOUNCE_S, EXPIRE_S
from hexswarm.peer.steps import Row, SessionKey
from hexswarm.records import PeerId
from tests.simulation import faults, invariants, processes
from tests.simulation.board import Board
from tests.simulation.clients import SimulatedClient
from tests.simulation.invariants import Ask, Judge
from tests.simulation.lan import LAN_DELAY_S, GroupPeer, GroupSpec
from tests.simulation.outcome import Outcome, controlled
from tests.simulation.peers import LEASE_S, PeerSpec, SimulatedPeer, name_of
from tests.simulation.plans import FIRST_CLIENT, LAYERS, ROOMY, Plan, draw
from tests.simulation.processes import Process
from tests.simulation.stranger import Stranger
from tests.simulation.watch import Watch
from tests.simulation.wires import Trace, Wires

DEADLINE_S = 75.0
"""A request ends so long after it was made or the last fault ended, whichever is later."""
SERVE_AGAIN_S = 2 * ANNOUNCE_S
GROUPS_S = 40.0
"""So long after the faults groups are waited for, which leave a member out that failed often."""
AMPLE_S = 25.0
"""For a client to read a record that is shown: two periods, if one reading failed."""
LOOK_S = 0.25
"""Period of looking at the rules."""


class World:
    """A running swarm."""

    def __init__(self, plan: Plan, keep: int = 0) -> None:
        self.plan = plan
        self.trace = Trace(keep)
        self.judge = Judge()
        rng = random.Random(f"chance {plan.seed}")
        self.wires = Wires(random.Random(rng.random()), self.trace, plan.delay_s)
        self.board = Board(random.Random(rng.random()))
        self.stranger = Stranger(self)
        self.peers: dict[int, SimulatedPeer] = {}
        self.clients: dict[int, SimulatedClient] = {}
        self.asks: list[Ask] = list(plan.asks)
        specs = (*plan.specs, *plan.lan)
        self.numbers = (*(spec.number for spec in specs), *plan.clients)
        self.dead_since_s: dict[SessionKey, float] = {}
        self.told_s: dict[PeerId, float] = {}
        self._specs: dict[int, PeerSpec] = {spec.number: spec for spec in specs}
        self.watch = Watch(self)
        self._ways = random.Random(f"ways {plan.seed}")
        self._past: list[Process] = []
        """Of peers and clients that were killed or have left."""
        self._stirred_s: dict[tuple[PeerId, PeerId], float] = {}
        self._tasks: set[asyncio.Task[Any]] = set()

    # --- what faults use ------------------------------------------------------------------------

    @property
    def now(self) -> float:
        return asyncio.get_running_loop().time()

    def note(self, *words: object) -> None:
        self.trace.note(self.now, *words)

    def delay_s(self, a: int, b: int) -> float:
        """The usual one-way delay between two numbers."""
        here, there = self._specs.get(a), self._specs.get(b)
        if isinstance(here, GroupSpec) and isinstance(there, GroupSpec) and here.name == there.name:
            return LAN_DELAY_S
        return self.plan.delay_s * (1 + (a * 7 + b * 7) % 5)

    def spec_of(self, peer: PeerId) -> PeerSpec:
        return next(spec for spec in self._specs.values() if spec.peer == peer)

    @property
    def serving_now(self) -> list[SimulatedPeer]:
        """Those that have an engine: not who waits for its group, or follows a leader."""
        return [peer for peer in self.peers.values() if peer.engine is not None]

    def serving(self, number: int) -> SimulatedPeer | None:
        peer = self.peers.get(number)
        return peer if peer is not None and not peer.gone else None

    def kill(self, peer: SimulatedPeer) -> None:
        """SIGKILL: its streams end, its tasks with them."""
        peer.gone = True
        self.wires.drop(peer.transport)
        peer.halt()
        peer.process.kill()
        self._past.append(peer.process)
        del self.peers[peer.spec.number]

    def restart(self, number: int) -> None:
        """The same identity, and nothing in memory."""
        if number not in self.peers:
            self._start(self._specs[number])

    def drain(self, peer: SimulatedPeer) -> None:
        """SIGTERM; when it has gone, its supervisor starts it again."""
        self._spawn(self._drain(peer))

    async def _drain(self, peer: SimulatedPeer) -> None:
        peer.state = "draining"
        await asyncio.wait({peer.process.spawn(peer.drain())})
        if peer.gone:
            return
        await self._leave(peer)
        await asyncio.sleep(0.5)
        self.restart(peer.spec.number)

    async def _leave(self, peer: SimulatedPeer) -> None:
        """End it well; nothing of it may be left."""
        main = peer.main
        main.cancel()
        await asyncio.wait({main})
        await asyncio.wait({peer.process.spawn(peer.leave())})
        await peer.transport.close()
        await asyncio.sleep(0)
        del self.peers[peer.spec.number]
        self._past.append(peer.process)
        self.judge.hear("I8", invariants.no_task_is_left([peer.process]))

    def kill_client(self, number: int) -> None:
        client = self.clients[number]
        if client.killed:
            return
        client.killed = True
        for ask in self.asks:
            if ask.client == number and ask.ended_s is None:
                ask.abandoned, ask.ended_s = True, self.now
        self.wires.drop(client.transport)
        client.process.kill()
        self._past.append(client.process)

    # --- rules ------------------------------------------------------------------------------------

    def look(self) -> None:
        """Look at the rules that hold at every moment."""
        now, judge = self.now, self.judge
        self._stir(now)
        self._bury(now)
        for peer in self.serving_now:
            judge.hear("I3", invariants.leases_add_up(peer))
            if not peer.process.stopped:
                dead = self.dead_since_s
                judge.hear("I3", invariants.leases_end(peer, dead, self._calm_s, now))
        for peer in self.peers.values():
            if not peer.process.stopped:
                judge.hear("I6", self._believed(peer, now))
        self.watch.look(now)
        for number in self._specs:
            shown = self.board.last(name_of(number))
            if shown is not None:
                self.told_s[name_of(number)] = shown.accepted_s
        for client in self.clients.values():
            if client.killed:
                continue
            good = self._whole(client)
            if not client.whole or client.whole[-1][1] != good:
                client.whole.append((now, good))
            if client.process.running:
                judge.hear("I6", self._believed(client, now))
        for ask in self.asks:
            deadline_s = max(ask.at_s, self.plan.faults_end_s) + DEADLINE_S
            if not ask.abandoned:
                judge.hear("I5", invariants.in_time(ask, deadline_s, now))

    def _believed(self, who: SimulatedPeer | SimulatedClient, now: float) -> Iterator[str]:
        if not any(invariants.outlived(told_s, now) for told_s in self.told_s.values()):
            return iter(())  # as most of the time: whoever is believed, it is not too long
        seen = [item.peer for item in who.member.others()]
        return invariants.records_end(seen, self.told_s, now)

    def _calm_s(self, client: PeerId, peer: PeerId) -> float:
        """How long the way between them has been open, and the peer running."""
        return self.now - max(self._stirred_s.get((client, peer), 0.0), 0.0)

    def _stir(self, now: float) -> None:
        """Note which ways are disturbed at this moment."""
        calm = self.wires.calm
        if calm and all(peer.process.running for peer in self.peers.values()):
            return
        callers = [*(client.peer for client in self.clients.values()), self.stranger.peer]
        for peer in self.peers.values():
            for caller in callers:
                if not (peer.process.running and (calm or self.wires.open(caller, peer.peer))):
                    self._stirred_s[caller, peer.peer] = now

    def _bury(self, now: float) -> None:
        """Notice which sessions no client has any more."""
        alive: set[SessionKey] = set()
        for client in self.clients.values():
            if not client.killed:
                alive.update(client.runtime._sessions)
        for peer in self.serving_now:
            for session in peer.engine.tables.sessions:
                if session not in alive and not self.stranger.owns(session):
                    self.dead_since_s.setdefault(session, now)

    def _whole(self, client: SimulatedClient) -> bool:
        """Whether a ring of healthy peers exists, joined with each other and the client."""
        if not client.process.running:
            return False
        healthy = [peer for peer in self.peers.values() if self._healthy(peer, client)]

        def closes(ring: list[SimulatedPeer]) -> bool:
            layer = ring[-1].spec.span.end if ring else 0
            if layer == LAYERS:
                return len(ring) == 1 or self.wires.open(ring[-1].peer, ring[0].peer)
            for peer in healthy:
                span = peer.spec.span
                if span.first <= layer < span.end and peer not in ring:
                    joined = not ring or self.wires.open(ring[-1].peer, peer.peer)
                    if joined and closes([*ring, peer]):
                        return True
            return False

        return closes([])

    def _healthy(self, peer: SimulatedPeer, client: SimulatedClient) -> bool:
        return (
            peer.process.running
            and not isinstance(peer, GroupPeer)  # it may be gone with any of its members
            and peer.state == "online"
            and peer.spec.blocks == ROOMY
            and not self.stranger.hogs(peer.peer)
            and self._known(peer, client)
            and self.wires.open(client.peer, peer.peer)
        )

    def _known(self, peer: SimulatedPeer, client: SimulatedClient) -> bool:
        """Whether the client has heard of the peer, or had ample time for it."""
        shown = self.board.last(peer.peer)
        if shown is None or self.now < shown.accepted_s:
            return False
        heard = client.member.directory._records
        return peer.peer in heard or self.now > shown.visible_s + AMPLE_S

    def on_row(self, peer: SimulatedPeer, row: Row) -> None:
        """A device has computed a row."""
        self.note(
            peer.process.name, row.session.hex()[:6], row.epoch, row.turn, row.position, row.count
        )
        self.judge.hear("I2", invariants.computed_once(peer, row))

    def on_pick(self, peer: SimulatedPeer, row: Row) -> None:
        """A device begins with a row."""
        dead = self.dead_since_s
        said = invariants.closed_is_closed(peer, row, dead, self._calm_s, self.now)
        self.judge.hear("I4", said)

    # --- life ---------------------------------------------------------------------------------

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _start(self, spec: PeerSpec) -> None:
        rng = random.Random(self._ways.random())
        if isinstance(spec, GroupSpec):
            peer: SimulatedPeer = GroupPeer(spec, self, rng)
        else:
            peer = SimulatedPeer(spec, self.wires, self.board, rng, self.on_row)
            peer.engine.on_pick = lambda row: self.on_pick(peer, row)
        self.peers[spec.number] = peer
        peer.main = peer.process.spawn(peer.serve())

    async def play(self) -> None:
        """The whole story; ends early once something is wrong."""
        plan = self.plan
        for a in self.numbers:
            for b in self.numbers:
                if a < b:
                    self.wires.shape(name_of(a), name_of(b), self.delay_s(a, b))
        for spec in self._specs.values():
            self._start(spec)
        await asyncio.sleep(plan.settled_s - 0.5)
        for number in plan.clients:
            client = self.clients[number] = SimulatedClient(number, self)
            client.process.spawn(client.start())
        await asyncio.sleep(0.5)
        self.look()
        for ask in plan.asks:
            self._spawn(self._ask(ask))
        for fault in plan.faults:
            self._spawn(faults.commit(self, fault))
        await self._watch_until(plan.faults_end_s + 0.1)
        served_s = await self._serve_again()
        if not self.judge.found:
            again = invariants.serves_again(served_s, plan.faults_end_s, SERVE_AGAIN_S)
            self.judge.hear("I7", again)
        formed_s = plan.faults_end_s + GROUPS_S
        while self.watch.waiting and not self.judge.found and self.now < formed_s:
            await self._watch_until(self.now + LOOK_S)
        while not self.judge.found and any(ask.ended_s is None for ask in self.asks):
            await self._watch_until(self.now + LOOK_S)
        await self._watch_until(self._forgotten_s())
        await self._close()

    def _forgotten_s(self) -> float:
        """When the last of those that stay dead must have been forgotten."""
        dead = [name_of(n) for n in self._specs if n not in self.peers]
        told_s = max((self.told_s.get(peer, 0.0) for peer in dead), default=0.0)
        return told_s + EXPIRE_S + invariants.RECORD_SLACK_S + 1.0 if dead else 0.0

    async def _ask(self, ask: Ask) -> None:
        await asyncio.sleep(ask.at_s - self.now)
        client = self.clients[ask.client]
        if client.killed:
            ask.abandoned, ask.ended_s = True, self.now
            return
        ask.wanted = self._wanted(ask)
        task = client.process.spawn(client.ask(ask))
        await asyncio.wait({task})
        if not task.cancelled() and task.exception() is not None:
            self.judge.blame("I5", f"{ask} ended with {task.exception()!r}")
            ask.ended_s = self.now
        self.note(str(ask), ask.got)
        self.judge.hear("I1", invariants.same_tokens(ask))
        if not ask.abandoned:
            self.judge.hear("I5", invariants.excused(ask, client.whole))
            if self.plan.mild:
                self.judge.hear("I5", invariants.goes_on(ask, client.whole))

    def _wanted(self, ask: Ask) -> list[int]:
        """What a single process answers."""
        if ask.style != "talk":
            stops = () if ask.style == "logits" else ask.stops
            found = invariants.wanted(ask.prompt, ask.max_new, LAYERS, stops)
            if ask.style == "logits" and (
                ends := [i for i, t in enumerate(found) if t in ask.stops]
            ):
                return found[: ends[0] + 1]
            return found
        half = max(1, ask.max_new // 2)
        first = invariants.wanted(ask.prompt, half, LAYERS, ask.stops)
        again = [*ask.prompt, *first, 5, 6, 7]
        return first + invariants.wanted(again, half, LAYERS, ask.stops)

    async def _watch_until(self, until_s: float) -> None:
        while self.now < until_s and not self.judge.found:
            await asyncio.sleep(min(LOOK_S, until_s - self.now))
            self.look()

    async def _serve_again(self) -> float | None:
        """When a request was first answered after the faults; a client is there for it."""
        living = [client for client in self.clients.values() if not client.killed]
        if not living:
            client = SimulatedClient(FIRST_CLIENT + 9, self)
            self.clients[client.number] = client
            await asyncio.wait({client.process.spawn(client.start())})
            living = [client]
        client, end_s = living[0], self.plan.faults_end_s + SERVE_AGAIN_S
        while self.now <= end_s and not self.judge.found:
            ask = Ask(len(self.asks), client.number, self.now, (1, 2, 3), 8, "whole", frozenset())
            ask.stops = self.plan.stops
            ask.wanted = self._wanted(ask)
            task = client.process.spawn(client.ask(ask))
            while not task.done() and self.now <= end_s and not self.judge.found:
                await self._watch_until(self.now + LOOK_S)
            self.judge.hear("I1", invariants.same_tokens(ask))
            if ask.done:
                return self.now
            if not task.done():
                task.cancel()
            await self._watch_until(self.now + 2.0)
        return None

    async def _close(self) -> None:
        """Clients close, then nothing may be held; then peers close, and nothing may run."""
        for ask in self.asks:
            self.judge.hear("I1", invariants.same_tokens(ask))
        for client in self.clients.values():
            if not client.killed:
                await asyncio.wait({client.process.spawn(client.client.close())})
                await client.transport.close()
        await self.stranger.close()
        await asyncio.sleep(1.0)
        end_s = self.now + LEASE_S + invariants.LEASE_SLACK_S
        while self.now < end_s and not self.judge.found:
            if not any(invariants.nothing_is_held(self)):
                break
            await asyncio.sleep(1.0)
        if not self.judge.found:
            self.judge.hear("I3", invariants.nothing_is_held(self))
        left = [client.process for client in self.clients.values() if not client.killed]
        self.judge.hear("I8", invariants.no_task_is_left(left))
        await asyncio.gather(*list(self._tasks))
        for peer in list(self.peers.values()):
            await self._leave(peer)


def play(seed: int, *, quiet: bool = False, keep: int = 0, plan: Plan | None = None) -> Outcome:
    """Run the world of a seed; `keep` so many events in words."""
    plan = plan or draw(seed, quiet=quiet)
    world: World | None = None
    virtual_s = 0.0

    async def story() -> None:
        nonlocal world, virtual_s
        world = World(plan, keep)
        try:
            await world.play()
        finally:
            virtual_s = world.now

    with controlled(seed) as listener:
        processes.run(story())
    assert world is not None
    world.judge.hear("I9", invariants.no_error_was_logged(listener))
    asks = world.asks
    return Outcome(
        seed=seed,
        broken=tuple(world.judge.found),
        trace=world.trace.digest,
        events=world.trace.events,
        done=sum(ask.done for ask in asks),
        failed=sum(ask.error is not None for ask in asks),
        abandoned=sum(ask.abandoned for ask in asks),
        stalls_s=tuple(ask.stall_s for ask in asks if ask.done),
        virtual_s=virtual_s,
        epochs=world.watch.epochs_served,
        sums=world.watch.account.sums,
        shown_s=world.watch.longest_shown_s,
        away_s=world.watch.longest_away_s,
        lines=tuple(world.trace.lines),
    )
