"""How many requests end in time: a quick queue model of disjoint pipelines under Poisson arrivals.

HexGen judges a partition of its GPUs by SLO attainment: the part of requests whose whole answer
comes within a multiple (the *SLO scale*) of what a reference takes for the same request alone, in a
queue simulation after AlpaServe (arXiv 2302.11665). AlpaServe's requests are one pass through a
pipeline; ours generate, and machines batch. So a pipeline here is a server of shared speed:

- With x tokens a second through a stage that is never idle, a batch holds the rows that gathered
  during the one before: b = x s(b), s the time of a step at b rows and their share of prompts. A
  row waits for half a step of a busy stage, then takes one: W = s(b) (1 + busy/2), b between 1 and
  `max_rows`. One way round all stages and hops is the time per token; n = x (sum of W + hops)
  inverts to that time at n requests in flight, and beyond the slowest stage's capacity it is n/x.
- All n requests of a pipeline advance alike, so each ends when the pipeline's *progress* (tokens
  that a request has made since time zero) reaches its own mark: arrivals and ends are the only
  events, and a heap of marks is the whole state. A prompt counts as as many tokens as it takes.
- A request goes where it is expected to end first, and waits in line there if the KV is full.

Some 10 us a request; the simulator (`hexswarm.simulator`) judges what this has chosen. With one row
(`max_rows`) it is HexGen's own serving, which does not batch. Rejected: an M/G/1 formula for each
pipeline (attainment of 0.99 asks for the tail); stepping through batches (that is the simulator).
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from hexswarm.errors import UsageError
from hexswarm.router.placement.cluster import COORDINATOR, Cluster, Model, Profile
from hexswarm.router.placement.plan import Unit
from hexswarm.router.placement.speeds import step_layer_s

_GRID = 33


@dataclass(frozen=True, slots=True)
class Stage:
    """Layers that one unit of a pipeline computes."""

    layers: int
    profile: Profile


@dataclass(frozen=True, slots=True)
class Pipeline:
    """Stages that hold the whole model, and what lies between them."""

    stages: tuple[Stage, ...]
    hops_s: float
    """Of one token once around the ring."""
    ends_s: float
    """From the coordinator to the head, and from the tail back."""

    def alone_s(self, input_tokens: int, output_tokens: int) -> float:
        """A whole answer, with nobody else there."""
        prompt = sum(s.layers * s.profile.prefill_layer_s(input_tokens) for s in self.stages)
        token = sum(s.layers * s.profile.decode_layer_s(1) for s in self.stages)
        return prompt + self.ends_s + (output_tokens - 1) * token + output_tokens * self.hops_s


@dataclass(frozen=True, slots=True)
class Job:
    """A request of the queue model."""

    arrives_s: float
    input_tokens: int
    output_tokens: int
    limit_s: float


@dataclass(frozen=True, slots=True)
class Slo:
    """Answers within `scale` times what `reference` takes for the same request alone."""

    scale: float
    reference: Pipeline
    lengths: tuple[int, int] = (32, 128)
    """Of prompts and of answers, both uniform between these (HexGen: 32-128 and 32-128)."""

    def jobs(self, rate: float, seconds: float, rng: random.Random) -> list[Job]:
        """Poisson arrivals."""
        if rate <= 0:
            raise UsageError("a rate of requests is positive")
        jobs: list[Job] = []
        now = rng.expovariate(rate)
        while now < seconds:
            ins, outs = rng.randint(*self.lengths), rng.randint(*self.lengths)
            jobs.append(Job(now, ins, outs, self.limit_s(ins, outs)))
            now += rng.expovariate(rate)
        return jobs

    def limit_s(self, input_tokens: int, output_tokens: int) -> float:
        """The deadline of one request, from its arrival."""
        return self.scale * self.reference.alone_s(input_tokens, output_tokens)

    @property
    def token_s(self) -> float:
        """The deadline of a mean request for each of its tokens."""
        mean = sum(self.lengths) // 2
        return self.limit_s(mean, mean) / mean


def pipeline(
    cluster: Cluster, model: Model, units: Sequence[Unit], layers: Sequence[int]
) -> Pipeline:
    """These units one behind the other."""
    ring = [*units, units[0]]
    hops = 0.0
    for row, (a, b) in enumerate(itertools.pairwise(ring)):
        way = cluster.way(a.node, b.node)
        size = model.activation_bytes if row < len(units) - 1 else model.token_bytes
        hops += way.one_way_s + size / way.bytes_per_s
    ends = cluster.way(COORDINATOR, units[0].node).one_way_s
    ends += cluster.way(units[-1].node, COORDINATOR).one_way_s
    stages = (Stage(held, unit.profile) for unit, held in zip(units, layers, strict=True))
    return Pipeline(tuple(stages), hops, ends)


@dataclass(frozen=True, slots=True)
class Curve:
    """A pipeline's speed at every number of requests in flight."""

    token_s: tuple[float, ...]
    """Seconds a token, at index n."""
    prompt_s: tuple[float, ...]
    """Seconds of a mean prompt on top of that, at index n."""
    most: int
    """Requests that the KV has room for."""
    tokens_per_s: float
    """Capacity."""

    def rate(self, token_s: float) -> float:
        """Most tokens a second while a token takes no longer than this; 0: it always does."""
        fit = [n / s for n, s in enumerate(self.token_s) if n and s <= token_s]
        return max(fit, default=0.0)


def curve(model: Model, pipeline: Pipeline, max_rows: int, most: int = 1024) -> Curve:
    """The fixed points of the module's docstring, on a grid and interpolated."""
    length = model.input_tokens + model.output_tokens
    room = min(stage.profile.kv_tokens[stage.layers] for stage in pipeline.stages)
    most = max(1, min(most, int(room / length)))
    batches = np.unique(np.geomspace(1, max(max_rows, 1), _GRID))
    layer = {
        id(stage.profile): np.array([step_layer_s(stage.profile, model, float(b)) for b in batches])
        for stage in pipeline.stages
    }
    steps = [stage.layers * layer[id(stage.profile)] for stage in pipeline.stages]
    capacity = min(float((batches / step).max()) for step in steps)
    flow = np.linspace(0.0, capacity, 4 * _GRID)
    token = np.full(len(flow), pipeline.hops_s)
    for step in steps:
        through = np.maximum.accumulate(batches / step)
        batch = np.interp(flow, through, batches)
        taken = np.interp(batch, batches, step)
        token += taken * (1 + np.minimum(flow * step[0], 1.0) / 2)
    flying = flow * token
    counts = np.arange(most + 1)
    per_token = np.interp(counts, flying, token)
    per_token = np.maximum(per_token, counts / capacity)
    prompt = sum(
        stage.layers * stage.profile.prefill_layer_s(model.input_tokens)
        for stage in pipeline.stages
    )
    return Curve(
        tuple(per_token.tolist()),
        tuple((per_token + prompt + pipeline.ends_s).tolist()),
        most,
        capacity,
    )


@dataclass(slots=True)
class _Server:
    """A pipeline at work."""

    speed: Curve
    progress: float = 0.0
    """Tokens that a request which was here all the time would have made."""
    at_s: float = 0.0
    marks: list[tuple[float, int]] = field(default_factory=list)
    line: deque[int] = field(default_factory=deque)

    def advance(self, now: float) -> None:
        if self.marks:
            self.progress += (now - self.at_s) / self.speed.token_s[len(self.marks)]
        self.at_s = now

    def next_end_s(self) -> float:
        if not self.marks:
            return float("inf")
        left = self.marks[0][0] - self.progress
        return self.at_s + max(left, 0.0) * self.speed.token_s[len(self.marks)]

    def expected_s(self, tokens: int) -> float:
        """When one more of so many tokens would end, if nobody else came."""
        count = len(self.marks) + len(self.line) + 1
        inside = min(count, self.speed.most)
        lasts = self.speed.prompt_s[inside] + tokens * self.speed.token_s[inside]
        return lasts * (1 + (count - inside) / self.speed.most)

    def take(self, job: int, jobs: Sequence[Job]) -> None:
        count = len(self.marks) + 1
        prompt = self.speed.prompt_s[count] / self.speed.token_s[count]
        mark = self.progress + prompt + jobs[job].output_tokens - 1
        heapq.heappush(self.marks, (mark, job))


def attainment(curves: Sequence[Curve], jobs: Sequence[Job], skip: float = 0.2) -> float:
    """The part of requests that end in time; the first `skip` of them only fill the pipelines."""
    if not curves or not jobs:
        return 0.0
    servers = [_Server(speed) for speed in curves]
    ends: dict[int, float] = {}
    for number, job in enumerate(jobs):
        _run(servers, jobs, job.arrives_s, ends)
        for server in servers:
            server.advance(job.arrives_s)
        tokens = job.output_tokens
        best = min(range(len(servers)), key=lambda i: (servers[i].expected_s(tokens), i))
        if len(servers[best].marks) < servers[best].speed.most:
            servers[best].take(number, jobs)
        else:
            servers[best].line.append(number)
    _run(servers, jobs, float("inf"), ends)
    judged = range(int(skip * len(jobs)), len(jobs))
    good = sum(ends[n] - jobs[n].arrives_s <= jobs[n].limit_s for n in judged)
    return good / len(judged)


def _run(
    servers: Sequence[_Server], jobs: Sequence[Job], until_s: float, ends: dict[int, float]
) -> None:
    """All ends before a time, each pipeline by itself: they do not touch each other."""
    for server in servers:
        while (end := server.next_end_s()) <= until_s and server.marks:
            server.advance(end)
            _, done = heapq.heappop(server.marks)
            ends[done] = end
            if server.line:
                server.take(server.line.popleft(), jobs)


def highest_rate(
    curves: Sequence[Curve], slo: Slo, seed: int, *, wanted: float = 0.99, spans: float = 12.0
) -> float:
    """The highest rate of requests with the wanted attainment, by bisection on one seed.

    Arrivals go on for so many of the longest deadlines, so that a line that only grows is seen.
    """
    most = sum(speed.tokens_per_s for speed in curves) / (sum(slo.lengths) / 2)
    seconds = spans * slo.limit_s(slo.lengths[1], slo.lengths[1])
    low, high = 0.0, most
    for _ in range(10):
        middle = (low + high) / 2
        jobs = slo.jobs(middle, seconds, random.Random(seed)) if middle > 0 else []
        met = attainment(curves, jobs, skip=0.5) >= wanted
        low, high = (middle, high) if met else (low, middle)
    return low
