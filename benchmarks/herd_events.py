"""A swarm under load as a discrete-event simulation: what happens in a world of `herd.py`.

Everything that makes routing under load hard is in it, and nothing else: continuous batches, finite
KV, announcements that are seconds old when a client reads them. Time is virtual, chance is seeded.

*Peers.* A peer that becomes free takes all decode rows that wait, and up to `CHUNK` prompt tokens
beside them. Such a batch lasts

    widest row x decode_layer_s + layers of the further rows x row_layer_s
    + prompt tokens x their layers x prefill_layer_s

where a prompt alone reads the weights at least once. The tail's row counts one layer more: the LM
head. The load is measured by `hexswarm.peer.load`, and promises of time are given and refused by
`hexswarm.peer.promises`: the very classes that a peer runs. *Links.* One way is half a round trip
with exponential jitter; the activations of a prompt also pay bandwidth. *Sessions.* KV is leased
and the step time promised at all stages, or the request is refused and tries another ring; the
prompt goes once around the route, then decode steps run around the ring, tail to head, without the
client. All stages tell their loads when they answer, with the rows that they expect to come.

Left out: dying peers, gathering at the head, KV length in the step time, the granted stages of an
attempt that another stage refused (they are free again after a round trip), an announcement ahead
of time when the load has changed, and predictions corrected by experience.
"""

from __future__ import annotations

import heapq
import math
import random
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from herd_world import HIDDEN_BYTES, LAYERS, PHASES, Machine, Request, World

from hexswarm.peer.load import LoadMeter
from hexswarm.peer.promises import Promises
from hexswarm.records import Announcement, Load

CHUNK = 256
"""Prompt tokens beside the decode rows of one batch."""
JITTER = 0.05
"""Mean of the exponential jitter relative to the way."""
ANNOUNCE_S = (5.0, 30.0)
"""A peer announces after a time drawn from this."""
REFRESH_S = 10.0
"""A client reads the directory this often."""
ATTEMPTS = 6
"""Routes tried before a request counts as refused."""

Ring = Sequence[tuple[int, int]]
"""A route as (peer, layers) in order."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What a client asks for."""

    ring: Ring
    steps_s: tuple[float, ...] = ()
    """What each stage shall promise for a decode step; without them nothing."""


class Policy(Protocol):
    """How clients choose; sees only what a client can see."""

    def route(
        self, now: float, view: View, client: int, request: Request, refused: frozenset[int]
    ) -> Choice | None:
        """The ring to try now; `refused` are the peers that refused this request."""

    def told(self, now: float, client: int, loads: dict[int, Load], *, opened: bool) -> None:
        """What the stages answered to the attempt: their loads with `Opened` or `Refuse`."""


class View:
    """What the directory gave to the clients of one phase at their last reading."""

    __slots__ = ("announcements", "key")

    def __init__(self, key: tuple[int, int], announcements: tuple[Announcement, ...]) -> None:
        self.key = key
        """Phase and number of the reading: equal keys are equal views."""
        self.announcements = announcements


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one measured request."""

    request: Request
    tpot_s: float
    """Mean seconds per token after the first; nan if refused."""
    ttft_s: float
    stages: int
    refusals: int
    accepted: bool


@dataclass(slots=True)
class _Session:
    number: int
    request: Request
    peers: list[int]
    layers: list[int]
    """Of each stage; the tail counts one more."""
    ways: list[float]
    """One way to the next stage, the last one's to the head."""
    refusals: int
    made: int = 0
    first_s: float = 0.0
    chunks_left: int = 0


@dataclass(slots=True)
class _Peer:
    number: int
    machine: Machine
    free_kv: int
    rows: list[tuple[_Session, int, float]] = field(default_factory=list)
    chunks: deque[tuple[_Session, int, int]] = field(default_factory=deque)
    """(session, stage, tokens)."""
    running: bool = False
    meter: LoadMeter = field(default_factory=lambda: LoadMeter(0.0))
    promises: Promises = field(default_factory=lambda: Promises(LAYERS))
    marginal_s: float = 0.0
    awake_s: float = 0.0

    def load(self, now: float) -> Load:
        """As `peer/engine.py` tells it."""
        prefill_s = self.machine.speed.prefill_layer_s
        waiting = sum(tokens * session.layers[stage] for session, stage, tokens in self.chunks)
        return self.meter.load(now, waiting * prefill_s, self.free_kv)


@dataclass(frozen=True, slots=True)
class Result:
    outcomes: tuple[Outcome, ...]
    busy: tuple[float, ...]
    """For each peer the share of its throughput in use while measured requests came."""
    awake: tuple[float, ...]
    """For each peer the share of that time in which it computed."""


def simulate(
    world: World,
    requests: Sequence[Request],
    policy: Policy,
    seed: int,
    announce_s: tuple[float, float] = ANNOUNCE_S,
    refresh_s: float = REFRESH_S,
) -> Result:
    """Run all requests under one policy."""
    return _Run(world, requests, policy, seed, announce_s, refresh_s).run()


class _Run:
    """The event loop; events are (time, number, method, arguments)."""

    def __init__(
        self,
        world: World,
        requests: Sequence[Request],
        policy: Policy,
        seed: int,
        announce_s: tuple[float, float],
        refresh_s: float,
    ) -> None:
        self.world, self.requests, self.policy = world, requests, policy
        self.rng = random.Random(seed)
        self.announce_s, self.refresh_s = announce_s, refresh_s
        self.peers = [
            _Peer(number, machine, machine.kv_tokens)
            for number, machine in enumerate(world.machines)
        ]
        self.history: list[list[tuple[float, Announcement]]] = []
        self.views: dict[int, View] = {}
        self.events: list[tuple[float, int, Callable[..., None], tuple[object, ...]]] = []
        self.number = 0
        self.over = 0
        self.outcomes: list[Outcome] = []
        self.window: list[tuple[float, list[float], list[float]]] = []
        """When the first and the last measured request came: time, work done, time awake."""
        self.one_way = world.one_way_s.tolist()
        self.client_way = world.client_way_s.tolist()

    def at(self, when: float, what: Callable[..., None], *arguments: object) -> None:
        self.number += 1
        heapq.heappush(self.events, (when, self.number, what, arguments))

    def run(self) -> Result:
        for index, peer in enumerate(self.peers):
            idle = Load(free_kv_tokens=peer.free_kv)
            self.history.append([(-1e9, self.world.announcement(index, idle, 0.0, 0))])
            self.at(self.rng.uniform(0, self.announce_s[1]), self.announce, index)
        self.at(self.requests[0].arrive_s, self.arrive, 0)
        now = 0.0
        while self.over < len(self.requests):
            now, _, what, arguments = heapq.heappop(self.events)
            what(now, *arguments)
        (begin, work, awake), (end, work_, awake_) = self.window[0], self.window[-1]
        lasted_s = max(end - begin, 1e-9)  # one request alone has no window
        return Result(
            tuple(self.outcomes),
            tuple((b - a) / lasted_s for a, b in zip(work, work_, strict=True)),
            tuple((b - a) / lasted_s for a, b in zip(awake, awake_, strict=True)),
        )

    def announce(self, now: float, index: int) -> None:
        peer, told = self.peers[index], self.history[index]
        load = peer.load(now)
        told.append((now, self.world.announcement(index, load, now, len(told))))
        self.at(now + self.rng.uniform(*self.announce_s), self.announce, index)

    def view(self, now: float, client: int) -> View:
        """The announcements as they stood when the client last read the directory."""
        phase = self.world.phases[client]
        shift = phase / PHASES * self.refresh_s
        reading = math.floor((now - shift) / self.refresh_s)
        known = self.views.get(phase)
        if known is None or known.key[1] != reading:
            read_s = reading * self.refresh_s + shift
            items = tuple(
                told[bisect_right(told, read_s, key=lambda entry: entry[0]) - 1][1]
                for told in self.history
            )
            known = self.views[phase] = View((phase, reading), items)
        return known

    def arrive(self, now: float, number: int) -> None:
        if number + 1 < len(self.requests):
            self.at(self.requests[number + 1].arrive_s, self.arrive, number + 1)
        request = self.requests[number]
        if request.measured:
            work = [peer.marginal_s for peer in self.peers]
            awake = [peer.awake_s for peer in self.peers]
            self.window[1:] = [(now, work, awake)]
        self.attempt(now, request, frozenset(), 0)

    def attempt(self, now: float, request: Request, refused: frozenset[int], tried: int) -> None:
        """Route and open; the stages answer after the longest round trip."""
        client = request.client
        choice = self.policy.route(now, self.view(now, client), client, request, refused)
        if choice is None or tried == ATTEMPTS:
            self.end(request, math.nan, math.nan, 0, tried, accepted=False)
            return
        self.number += 1
        session = self.session(self.number, request, choice.ring, tried)
        loads, refusing = self.ask(now, session, choice.steps_s or (0.0,) * len(choice.ring))
        ways = self.client_way[self.world.sites[client]]
        answered = now + 2 * max(ways[index] for index in session.peers)
        self.policy.told(now, client, loads, opened=not refusing)
        if refusing:
            self.at(answered, self.attempt, request, refused | refusing, tried + 1)
            return
        arrival = answered + ways[session.peers[0]] * self.jitter()
        for start in range(0, request.prompt, CHUNK):
            session.chunks_left += 1
            self.at(arrival, self.chunk, session, 0, min(CHUNK, request.prompt - start))

    def session(self, number: int, request: Request, ring: Ring, tried: int) -> _Session:
        peers = [index for index, _ in ring]
        layers = [count for _, count in ring]
        layers[-1] += 1
        hops = [self.one_way[a][b] for a, b in zip(peers, [*peers[1:], peers[0]], strict=True)]
        return _Session(number, request, peers, layers, hops, tried)

    def ask(
        self, now: float, session: _Session, steps_s: Sequence[float]
    ) -> tuple[dict[int, Load], frozenset[int]]:
        """Lease KV and promise times at all stages or at none: their loads, and who refuses."""
        tokens = session.request.prompt + session.request.answer
        asked = self.asked(session, steps_s)
        refusing = frozenset(
            peer.number
            for peer, each in asked
            if peer.free_kv < tokens
            or peer.promises.judge(*each, peer.machine.speed, peer.load(now), now) is not None
        )
        loads = {}
        for peer, each in asked:
            if not refusing:
                peer.free_kv -= tokens
                peer.promises.hold(*each, now)
            loads[peer.number] = peer.promises.foreseen(
                peer.machine.speed, peer.load(now), each[1], now, without=session.number
            )
        return loads, refusing

    def asked(
        self, session: _Session, steps_s: Sequence[float]
    ) -> list[tuple[_Peer, tuple[int, int, bool, float]]]:
        """What each stage shall promise: session, layers, with the head, and the seconds a step."""
        found = []
        for stage, index in enumerate(session.peers):
            tail = stage + 1 == len(session.peers)
            layers = session.layers[stage] - tail
            found.append((self.peers[index], (session.number, layers, tail, steps_s[stage])))
        return found

    def jitter(self) -> float:
        return 1 - JITTER * math.log(1 - self.rng.random())

    def chunk(self, now: float, session: _Session, stage: int, tokens: int) -> None:
        peer = self.peers[session.peers[stage]]
        peer.chunks.append((session, stage, tokens))
        if not peer.running:
            self.start(now, peer)

    def step(self, now: float, session: _Session, stage: int) -> None:
        peer = self.peers[session.peers[stage]]
        peer.rows.append((session, stage, now))
        if not peer.running:
            self.start(now, peer)

    def start(self, now: float, peer: _Peer) -> None:
        """Compose a batch of what waits."""
        rows, peer.rows = peer.rows, []
        taken, budget = [], CHUNK
        while peer.chunks and (peer.chunks[0][2] <= budget):
            taken.append(peer.chunks.popleft())
            budget -= taken[-1][2]
        speed = peer.machine.speed
        widest = total = 0
        for session, stage, _ in rows:
            count = session.layers[stage]
            total += count
            widest = max(widest, count)
        prompt = sum(tokens * session.layers[stage] for session, stage, tokens in taken)
        prefill_s = prompt * speed.prefill_layer_s
        took_s = widest * speed.decode_layer_s + (total - widest) * speed.row_layer_s + prefill_s
        if not rows:
            reads = max(session.layers[stage] for session, stage, _ in taken)
            took_s = max(took_s, reads * speed.decode_layer_s)
        peer.running = True
        marginal_s = min(took_s, total * speed.row_layer_s + prefill_s)
        peer.marginal_s += marginal_s
        peer.awake_s += took_s
        self.at(now + took_s, self.done, peer, rows, taken, now, marginal_s)

    def done(
        self,
        now: float,
        peer: _Peer,
        rows: list[tuple[_Session, int, float]],
        taken: list[tuple[_Session, int, int]],
        began_s: float,
        marginal_s: float,
    ) -> None:
        peer.meter.computed(began_s, now, [began_s - since for *_, since in rows], marginal_s)
        peer.running = False
        if peer.rows or peer.chunks:
            self.start(now, peer)
        for session, stage, _ in rows:
            self.leave(now, session, stage)
        for session, stage, tokens in taken:
            if stage + 1 < len(session.peers):
                way = session.ways[stage] * self.jitter()
                size_s = tokens * HIDDEN_BYTES / self.bandwidth(session, stage)
                self.at(now + way + size_s, self.chunk, session, stage + 1, tokens)
                continue
            session.chunks_left -= 1
            if session.chunks_left == 0:
                session.first_s = now
                self.leave(now, session, stage)

    def bandwidth(self, session: _Session, stage: int) -> float:
        machines = self.world.machines
        a, b = session.peers[stage], session.peers[stage + 1]
        return min(machines[a].bytes_per_s, machines[b].bytes_per_s)

    def leave(self, now: float, session: _Session, stage: int) -> None:
        """A step leaves a stage: on to the next, or a token is made."""
        following = stage + 1
        if following == len(session.peers):
            session.made += 1
            following = 0
            if session.made == session.request.answer:
                self.finish(now, session)
                return
        self.at(now + session.ways[stage] * self.jitter(), self.step, session, following)

    def finish(self, now: float, session: _Session) -> None:
        request = session.request
        for index in session.peers:
            self.peers[index].free_kv += request.prompt + request.answer
            self.peers[index].promises.release(session.number)
        tpot_s = (now - session.first_s) / (session.made - 1)
        back = self.client_way[self.world.sites[request.client]][session.peers[-1]]
        ttft_s = session.first_s + back - request.arrive_s
        self.end(request, tpot_s, ttft_s, len(session.peers), session.refusals, accepted=True)

    def end(
        self,
        request: Request,
        tpot_s: float,
        ttft_s: float,
        stages: int,
        refusals: int,
        *,
        accepted: bool,
    ) -> None:
        self.over += 1
        if request.measured:
            self.outcomes.append(Outcome(request, tpot_s, ttft_s, stages, refusals, accepted))
