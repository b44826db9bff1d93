"""One run: a plan, a policy and requests in, a report out."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from hexswarm.errors import UsageError
from hexswarm.router.placement.cluster import Cluster, Model
from hexswarm.router.placement.plan import Plan
from hexswarm.simulator.board import Board
from hexswarm.simulator.churn import Outage
from hexswarm.simulator.clients import Clients
from hexswarm.simulator.events import Agenda
from hexswarm.simulator.links import Links
from hexswarm.simulator.mending import Mending
from hexswarm.simulator.opening import Opening
from hexswarm.simulator.policy import Policy, Request
from hexswarm.simulator.records import Life, Settings
from hexswarm.simulator.report import TPOT_S, TTFT_S, Outcome, Report, Spread, Use, goodput
from hexswarm.simulator.swarm import Swarm
from hexswarm.simulator.workload import offered_tokens_per_s

TICKS = 200
"""So often progress is told."""

Told = Callable[[float, int, int], None]
"""Virtual seconds so far, requests that arrived, requests that ended."""


def simulate(
    cluster: Cluster,
    model: Model,
    plan: Plan,
    policy: Policy,
    requests: Sequence[Request],
    *,
    seed: int = 0,
    until_s: float,
    warmup_s: float = 0.0,
    settings: Settings | None = None,
    outages: Sequence[Outage] = (),
    told: Told | None = None,
) -> Report:
    """Run until `until_s`; what comes before `warmup_s` is not counted.

    `seed` is the world's chance (when peers announce and clients read); requests, policy and
    outages were drawn with their own. Raises UsageError for a plan that does not hold all layers.
    """
    _check(model, plan, requests, until_s, warmup_s)
    world = World(cluster, model, plan, policy, requests, seed, until_s, warmup_s, settings)
    for outage in outages:
        world.agenda.at(outage.dies_s, world.mending.die, outage.unit)
        if outage.back_s < until_s:
            world.agenda.at(outage.back_s, world.mending.come_back, outage.unit)
    world.run(told)
    return world.report()


def _check(
    model: Model, plan: Plan, requests: Sequence[Request], until_s: float, warmup_s: float
) -> None:
    if missing := plan.missing(model.layers):
        raise UsageError(f"nobody holds layers {missing[0]} in this plan")
    if not 0 <= warmup_s < until_s:
        raise UsageError("the warm-up is shorter than the run")
    moments = [request.arrives_s for request in requests]
    if moments != sorted(moments) or (moments and moments[0] < 0):
        raise UsageError("requests are in order of their arrival, from 0 on")


class World:
    """Everything of a run, for `simulate` and for those who look inside."""

    def __init__(
        self,
        cluster: Cluster,
        model: Model,
        plan: Plan,
        policy: Policy,
        requests: Sequence[Request],
        seed: int,
        until_s: float,
        warmup_s: float,
        settings: Settings | None,
    ) -> None:
        self.cluster, self.seed, self.policy = cluster, seed, policy
        self.window_s = warmup_s, until_s
        self.agenda = Agenda()
        settings = settings or Settings()
        links = Links(cluster, lanes=policy.execution.lanes)
        self.swarm = Swarm(self.agenda, links, model, plan, policy, settings)
        board = Board(len(plan.units), model, settings, random.Random(seed))
        self.clients = Clients(Opening(self.swarm, board), requests, self.window_s)
        self.mending = Mending(self.clients)
        self.busy_before_s = [0.0] * len(plan.units)
        for number, span in enumerate(plan.spans):
            if span is not None:
                stage = self.swarm.come(0.0, number)
                board.announce(stage, 0.0, at_once=True)
                self.agenda.at(board.first_s(0.0), self.mending.announce, stage)

    def run(self, told: Told | None) -> None:
        """The warm-up, then the window; progress by the way."""
        warmup_s, until_s = self.window_s
        marks = {warmup_s, until_s}
        if told is not None:
            marks |= {until_s * tick / TICKS for tick in range(1, TICKS)}
        for mark_s in sorted(marks):
            self.agenda.run(mark_s)
            if mark_s == warmup_s:
                self.busy_before_s = self.swarm.busy_s(mark_s)
            if told is not None:
                told(mark_s, self.clients.arrived, self.clients.ended)

    def report(self) -> Report:
        """The figures of the window."""
        since_s, until_s = self.window_s
        lasted_s = until_s - since_s
        outcomes = tuple(map(_outcome, self.clients.lives[: self.clients.arrived]))
        mine = [one for one in outcomes if since_s <= one.request.arrives_s]
        first = [one for one in outcomes if since_s <= one.first_s < until_s]
        ended = [one for one in outcomes if one.done and since_s <= one.last_s < until_s]
        open_ = [one for one in outcomes if one.ended_s != one.ended_s]
        running = {id(session.life) for session in self.swarm.sessions.values()}
        lives = self.clients.lives[: self.clients.arrived]
        requests = [life.request for life in lives]
        return Report(
            policy=self.policy.name,
            cluster=self.cluster.name,
            model=self.swarm.model.name,
            seed=self.seed,
            window_s=self.window_s,
            arrived=len(mine),
            finished=len(ended),
            waiting=len(open_) - len(running),
            running=len(running),
            gave_up=sum(one.gave_up for one in mine),
            refusals=sum(one.refusals for one in mine),
            repairs=sum(one.repairs for one in mine),
            offered_tokens_per_s=offered_tokens_per_s(requests, since_s, until_s),
            prompt_tokens_per_s=sum(one.request.input_tokens for one in first) / lasted_s,
            decode_tokens_per_s=self.clients.heard_tokens / lasted_s,
            ttft=Spread.of(one.ttft_s for one in first),
            prompt=Spread.of(one.first_s - one.begun_s for one in first),
            decode=Spread.of(self.clients.gaps_s),
            tpot=Spread.of(one.tpot_s for one in ended if one.tokens > 1),
            latency=Spread.of(one.latency_s for one in ended),
            goodput=goodput(mine, until_s, TTFT_S, TPOT_S),
            stages=sum(one.stages for one in mine) / max(1, sum(one.stages > 0 for one in mine)),
            uses=self._uses(lasted_s),
            outcomes=outcomes,
        )

    def _uses(self, lasted_s: float) -> tuple[Use, ...]:
        swarm = self.swarm
        busy_s = swarm.busy_s(self.agenda.now)
        found = []
        for number, unit in enumerate(swarm.plan.units):
            share = (busy_s[number] - self.busy_before_s[number]) / lasted_s
            tally = swarm.tallies[number]
            rows = tally.rows / tally.batches if tally.batches else 0.0
            span = swarm.plan.spans[number]
            found.append(Use(unit.id, unit.node, span, share, rows, tally.kv_peak))
        return tuple(found)


def _outcome(life: Life) -> Outcome:
    return Outcome(
        request=life.request,
        begun_s=life.begun_s,
        first_s=life.first_s,
        last_s=life.last_s,
        ended_s=life.ended_s,
        tokens=life.tokens,
        refusals=life.refusals,
        repairs=life.repairs,
        stages=life.stages,
        gave_up=life.gave_up,
    )
