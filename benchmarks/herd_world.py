"""The swarms and the requests that `herd.py` draws, and what load 1 is.

Unlike peers in four regions joined one by one, each where layers were held the least; clients sit
at a few sites of the same regions. Requests come as a Poisson process and are drawn before any
policy runs, so that two policies meet exactly the same ones.

*Load 1* is the fluid bound: the largest rate of requests for which each layer's work can be divided
among its holders with no peer over 100 %, every decode step costing what it costs in a batch of
`ROWS`. Peers hold intervals of layers, so serving layers from the left, each by the holder whose
span ends first, finds such a division if there is one (Glover 1967), and bisection finds the rate.
The bound ignores links, stages and chance; larger batches are cheaper a row, so a little more than
1 can be survived.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

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
ROWS = 8
"""The batch at which capacity is defined."""
PHASES = 16
"""So many groups of clients read at different moments."""
WARM_S, COOL_S = 60.0, 10.0
"""Requests in the first seconds do not count (sessions last about 30 s, so the swarm is filled by
then), and others still come while the last counted ones run."""
STRICTNESS = (1.2, 3.0)
"""Limits are drawn from this, times a time per token that the policy knows."""
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
    """Its limit, where it has one: so many times a given time per token."""
    lot: float
    """0 to 1: where a share of the requests has a limit, those below the share have one."""
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
        strictness, lot = rng.uniform(*STRICTNESS), rng.random()
        found.append(Request(now, client, prompt, answer, strictness, lot, measures))
        now += rng.expovariate(load * world.capacity)
    return tuple(found)


def _length(shape: tuple[float, float], least: int, rng: random.Random) -> int:
    return min(2048, max(least, round(rng.lognormvariate(math.log(shape[0]), shape[1]))))
