"""A swarm under load as a discrete-event simulation: the world of `herd.py`.

Everything that makes routing under load hard is in it, and nothing else: unlike peers in four
regions, continuous batches, finite KV, announcements that are seconds old when a client reads them.
Time is virtual, chance is seeded, and the arrivals of a world are drawn before any policy runs, so
that two policies meet exactly the same requests.

*Peers.* A peer that becomes free takes all decode rows that wait, and up to `CHUNK` prompt tokens
beside them. Such a batch lasts

    widest row x decode_layer_s + layers of the further rows x row_layer_s
    + prompt tokens x their layers x prefill_layer_s

where a prompt alone reads the weights at least once. The tail's row counts one layer more: the LM
head. *Links.* One way is half a round trip with exponential jitter; the activations of a prompt
also pay bandwidth. *Sessions.* KV is leased at all stages or refused; the prompt goes once around
the route, then decode steps run around the ring, tail to head, without the client.

*Load 1* is the fluid bound: the largest rate of requests for which each layer's work can be divided
among its holders with no peer over 100 %, every decode step costing what it costs in a batch of
`ROWS`. Peers hold intervals of layers, so serving layers from the left, each by the holder whose
span ends first, finds such a division if there is one (Glover 1967), and bisection finds the rate.
The bound ignores links, stages and chance; larger batches are cheaper a row, so a little more than
1 can be survived.

Left out: dying peers, gathering at the head, KV length in the step time.
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

import numpy as np
from numpy.typing import NDArray

from hexswarm.records import Announcement, Coordinates, Load, PeerId, Span, Speed

MODEL = "4e" * 32
LAYERS = 32
HIDDEN_BYTES = 16 * 1024
"""One token's activations: hidden size 8,192 at two bytes."""
REGIONS_S = ((0.0, 0.0), (0.035, 0.0), (0.06, 0.07), (0.13, -0.03))
"""Places of the regions in the delay space, seconds: round trips of 35 to 140 ms between them."""
SITES = 3
"""Places in a region where clients are."""
CLIENTS = 200
SLOWEST_LAYER_S = 0.008
"""Decode seconds a layer of the slowest peer: 1.7 GB (a layer of 70B in bf16) at 210 GB/s."""
SPEEDS = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
ROW_SHARE = 1 / 5
"""What a further row costs relative to the first: 0.24 on our CPU, 0.02 on a datacenter's GPU."""
PREFILL_SHARE = 1 / 50
"""What a prompt token costs relative to a decode row alone."""
KV_BYTES = (1e9, 4e9)
"""What a peer has left for KV beside its weights."""
KV_TOKEN_LAYER_BYTES = 4096
"""Eight KV heads of 128, keys and values, at two bytes: as large models have them."""
CHUNK = 256
"""Prompt tokens beside the decode rows of one batch."""
ROWS = 8
"""The batch at which capacity is defined."""
JITTER = 0.05
"""Mean of the exponential jitter relative to the way."""
MEMORY_S = 10.0
"""Over how long a peer averages its load."""
ANNOUNCE_S = (5.0, 30.0)
"""A peer announces after a time drawn from this."""
REFRESH_S = 10.0
"""A client reads the directory this often."""
PHASES = 16
"""So many groups of clients read at different moments."""
ATTEMPTS = 6
"""Routes tried before a request counts as refused."""
WARM_S, COOL_S = 60.0, 10.0
"""Requests in the first seconds do not count (sessions last about 30 s, so the swarm is filled by
then), and others still come while the last counted ones run."""
STRICTNESS = (1.2, 3.0)
"""Limits are drawn from this, times the best time per token of the idle swarm."""
PROMPT = (160.0, 0.9)
ANSWER = (64.0, 0.6)
"""Median and sigma of the log-normal lengths, tokens."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What does not change about a peer."""

    peer: PeerId
    region: int
    span: Span
    speed: Speed
    kv_tokens: int
    bytes_per_s: float
    place: Coordinates


@dataclass(frozen=True, slots=True)
class Request:
    """One request of one client, drawn in advance."""

    arrive_s: float
    client: int
    prompt: int
    answer: int
    strictness: float
    """Its limit, where a policy has limits: so many times the best time per token when idle."""
    measured: bool
    """Arrived neither in the warm-up nor in the cool-down."""


@dataclass(frozen=True, slots=True)
class World:
    """A drawn swarm with its clients."""

    machines: tuple[Machine, ...]
    one_way_s: NDArray[np.float64]
    """[peer, peer], without jitter."""
    client_way_s: NDArray[np.float64]
    """[site, peer]."""
    sites: tuple[int, ...]
    """The site of each client."""
    phases: tuple[int, ...]
    """The phase in which each client reads the directory."""
    capacity: float
    """Requests a second at load 1."""

    def announcement(self, index: int, load: Load, now: float, sequence: int) -> Announcement:
        machine = self.machines[index]
        return Announcement(
            peer=machine.peer,
            model=MODEL,
            model_name="herd",
            layers=LAYERS,
            span=machine.span,
            state="online",
            dtype="bfloat16",
            device="cuda",
            speed=machine.speed,
            addresses=(f"/ip4/10.{machine.region}.{index}.1/tcp/1",),
            issued_s=now,
            sequence=sequence,
            queue_s=load.queue_s,
            rows=load.rows,
            busy=load.busy,
            free_kv_tokens=load.free_kv_tokens,
            kv_tokens=machine.kv_tokens,
            coordinates=machine.place,
            up_bytes_per_s=machine.bytes_per_s,
            down_bytes_per_s=machine.bytes_per_s,
        )


def draw_world(rng: random.Random, peers: int = 48, clients: int = CLIENTS) -> World:
    """A swarm whose peers joined one by one, each where layers were held the least."""
    machines: list[Machine] = []
    held = [0.0] * LAYERS
    for index in range(peers):
        factor = rng.choice(SPEEDS)
        span = _join(held, min(16, max(4, round(2 + 2 * factor * rng.uniform(0.5, 1.5)))), rng)
        layer_s = SLOWEST_LAYER_S / factor
        for layer in range(span.first, span.end):
            held[layer] += factor / len(span)
        region = index % len(REGIONS_S)
        x, y = REGIONS_S[region]
        place = Coordinates(
            (x + rng.gauss(0, 0.0005), y + rng.gauss(0, 0.0005), 0.0), rng.uniform(2e-4, 2e-3), 0.02
        )
        speed = Speed(layer_s, layer_s * PREFILL_SHARE, layer_s, layer_s * ROW_SHARE)
        kv_tokens = int(rng.uniform(*KV_BYTES) / KV_TOKEN_LAYER_BYTES / len(span))
        machines.append(
            Machine(PeerId(f"peer{index:03d}"), region, span, speed, kv_tokens, 1e7 * factor, place)
        )
    # A site is where an idle peer might be, with a longer access line.
    sites = [
        Coordinates((x, y, 0.0), 0.002 + 0.004 * number, 0.02)
        for x, y in REGIONS_S
        for number in range(SITES)
    ]
    places = [machine.place for machine in machines]
    one_way = np.array([[_rtt_s(a, b) / 2 for b in places] for a in places])
    np.fill_diagonal(one_way, 0.0)
    return World(
        tuple(machines),
        one_way,
        np.array([[_rtt_s(a, b) / 2 for b in places] for a in sites]),
        tuple(rng.randrange(len(sites)) for _ in range(clients)),
        tuple(rng.randrange(PHASES) for _ in range(clients)),
        capacity(machines),
    )


def _join(held: Sequence[float], length: int, rng: random.Random) -> Span:
    """Where a newcomer helps most: it covers the least held layer, beside others held little."""
    starts = range(0, LAYERS - length + 1, 2 if length % 2 == 0 else 1)
    weakest = [
        (min(held[start : start + length]), sum(held[start : start + length]), rng.random(), start)
        for start in starts
    ]
    first = min(weakest)[3]
    return Span(first, first + length)


def _rtt_s(a: Coordinates, b: Coordinates) -> float:
    return math.dist(a.position_s, b.position_s) + a.height_s + b.height_s


def _mean(shape: tuple[float, float]) -> float:
    """Of a log-normal with this median and sigma."""
    return shape[0] * math.exp(shape[1] ** 2 / 2)


def layer_cost_s(speed: Speed) -> float:
    """Seconds of a peer's time that the mean request takes for each layer, at batch `ROWS`."""
    step_s = (speed.decode_layer_s + (ROWS - 1) * speed.row_layer_s) / ROWS
    return _mean(ANSWER) * step_s + _mean(PROMPT) * speed.prefill_layer_s


def capacity(machines: Sequence[Machine]) -> float:
    """Requests a second at load 1: the fluid bound of the module's docstring."""
    able = [
        (machine.span.first, machine.span.end, 1 / layer_cost_s(machine.speed))
        for machine in machines
    ]
    low, high = 0.0, sum(rate for *_, rate in able)
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if _serves(able, middle) else (low, middle)
    return low


def _serves(able: Sequence[tuple[int, int, float]], rate: float) -> bool:
    left = [amount for *_, amount in able]
    order = sorted(range(len(able)), key=lambda index: able[index][1])
    for layer in range(LAYERS):
        need = rate
        for index in order:
            if able[index][0] <= layer < able[index][1]:
                take = min(need, left[index])
                left[index] -= take
                need -= take
        if need > 1e-12:
            return False
    return True


def draw_requests(
    world: World, load: float, measured: int, rng: random.Random
) -> tuple[Request, ...]:
    """Poisson arrivals at `load`: a warm-up, `measured` requests that count, and a cool-down."""
    now, found, counted = rng.expovariate(load * world.capacity), [], 0
    end_s = math.inf
    while now < end_s:
        measures = now >= WARM_S and counted < measured
        counted += measures
        if counted == measured and end_s == math.inf:
            end_s = now + COOL_S
        client = rng.randrange(len(world.sites))
        prompt, answer = _length(PROMPT, 4, rng), _length(ANSWER, 8, rng)
        found.append(Request(now, client, prompt, answer, rng.uniform(*STRICTNESS), measures))
        now += rng.expovariate(load * world.capacity)
    return tuple(found)


def _length(shape: tuple[float, float], least: int, rng: random.Random) -> int:
    return min(2048, max(least, round(rng.lognormvariate(math.log(shape[0]), shape[1]))))


Ring = Sequence[tuple[int, int]]
"""A route as (peer, layers) in order."""


class Policy(Protocol):
    """How clients choose; sees only what a client can see."""

    def route(
        self, now: float, view: View, client: int, request: Request, refused: frozenset[int]
    ) -> Ring | None:
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


class _Meter:
    """A peer's own load: averages with a memory of `MEMORY_S` that fade when nothing happens."""

    __slots__ = ("at_s", "busy", "rows", "steps", "waits_s")

    def __init__(self) -> None:
        self.at_s = self.rows = self.busy = self.steps = self.waits_s = 0.0

    def fade(self, now: float) -> None:
        keep = math.exp((self.at_s - now) / MEMORY_S)
        self.at_s = now
        self.rows *= keep
        self.busy *= keep
        self.steps *= keep
        self.waits_s *= keep

    def batch(
        self, now: float, rows: int, waits_s: float, took_s: float, marginal_s: float
    ) -> None:
        self.fade(now)
        share = 1 - math.exp(-took_s / MEMORY_S)
        self.rows += rows * share
        self.busy += marginal_s / took_s * share
        self.steps += rows
        self.waits_s += waits_s

    def load(self, now: float, free_kv_tokens: int) -> Load:
        self.fade(now)
        queue_s = self.waits_s / max(self.steps, 1.0)
        return Load(queue_s, self.rows, min(1.0, self.busy), free_kv_tokens)


@dataclass(slots=True)
class _Peer:
    machine: Machine
    free_kv: int
    rows: list[tuple[_Session, int, float]] = field(default_factory=list)
    chunks: deque[tuple[_Session, int, int]] = field(default_factory=deque)
    """(session, stage, tokens)."""
    running: bool = False
    meter: _Meter = field(default_factory=_Meter)
    marginal_s: float = 0.0
    awake_s: float = 0.0


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
        self.peers = [_Peer(machine, machine.kv_tokens) for machine in world.machines]
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
        load = peer.meter.load(now, peer.free_kv)
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
        ring = self.policy.route(now, self.view(now, client), client, request, refused)
        if ring is None or tried == ATTEMPTS:
            self.end(request, math.nan, math.nan, 0, tried, accepted=False)
            return
        tokens = request.prompt + request.answer
        full = {index for index, _ in ring if self.peers[index].free_kv < tokens}
        if not full:
            for index, _ in ring:
                self.peers[index].free_kv -= tokens
        loads = {
            index: self.peers[index].meter.load(now, self.peers[index].free_kv) for index, _ in ring
        }
        ways = self.client_way[self.world.sites[client]]
        answered = now + 2 * max(ways[index] for index, _ in ring)
        self.policy.told(now, client, loads, opened=not full)
        if full:
            self.at(answered, self.attempt, request, refused | full, tried + 1)
            return
        peers = [index for index, _ in ring]
        layers = [count for _, count in ring]
        layers[-1] += 1
        hops = [self.one_way[a][b] for a, b in zip(peers, [*peers[1:], peers[0]], strict=True)]
        session = _Session(request, peers, layers, hops, tried)
        arrival = answered + ways[peers[0]] * self.jitter()
        for start in range(0, request.prompt, CHUNK):
            session.chunks_left += 1
            self.at(arrival, self.chunk, session, 0, min(CHUNK, request.prompt - start))

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
        waits_s = 0.0
        for session, stage, since in rows:
            count = session.layers[stage]
            total += count
            widest = max(widest, count)
            waits_s += now - since
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
        self.at(now + took_s, self.done, peer, rows, taken, waits_s, took_s, marginal_s)

    def done(
        self,
        now: float,
        peer: _Peer,
        rows: list[tuple[_Session, int, float]],
        taken: list[tuple[_Session, int, int]],
        waits_s: float,
        took_s: float,
        marginal_s: float,
    ) -> None:
        peer.meter.batch(now, len(rows), waits_s, took_s, marginal_s)
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
