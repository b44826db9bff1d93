"""The subcommand `plan`: who of a cluster should hold which layers. A door: it prints.

The search is anytime: Ctrl-C ends it, and the best plan so far is printed and written as if the
time had been up; a second Ctrl-C ends the command.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from hexswarm.clock import RealClock
from hexswarm.config import from_flags
from hexswarm.errors import UsageError
from hexswarm.files import check_outputs, parsed, write_text
from hexswarm.plan_facts import facts, plan_json, plan_table
from hexswarm.plan_map import plan_map
from hexswarm.plan_options import PlanOptions
from hexswarm.progress import gauge
from hexswarm.router.placement import partition, regroup, service
from hexswarm.router.placement.aims import Capacity, Service, Sited
from hexswarm.router.placement.attainment import Pipeline, Slo
from hexswarm.router.placement.cluster import Cluster, Model, parse
from hexswarm.router.placement.expected import Load
from hexswarm.router.placement.pipelines import Builder
from hexswarm.router.placement.plan import Plan, whole_units
from hexswarm.router.placement.search import Found, search


def plan(flags: argparse.Namespace) -> int:
    """Search, print, write; exit status 1 if the machines cannot hold the model."""
    options = from_flags(PlanOptions, flags, {})
    check_outputs([flags.output, flags.svg], [flags.cluster])
    cluster = parsed(flags.cluster, parse)
    model = chosen(cluster, options.model)
    with deadline(options.seconds) as watch:
        found = _searched(cluster, model, options, watch)
    told = facts(cluster, found, options.load)
    if flags.output:
        write_text(flags.output, json.dumps(found.to_json(), indent=1) + "\n")
    if flags.svg:
        write_text(flags.svg, plan_map(told))
    print(json.dumps(plan_json(told)) if flags.json else plan_table(told))
    return 0 if told.flow > 0 else 1


def chosen(cluster: Cluster, name: str | None) -> Model:
    """The model of that name, or the only one."""
    if name is None and len(cluster.models) == 1:
        (name,) = cluster.models
    if name is None:
        raise UsageError(
            f"cluster {cluster.name} has speeds for several models",
            remedy="choose with --model: " + ", ".join(sorted(cluster.models)),
        )
    return cluster.model(name)


class Watch:
    """How much of the time is left, and what to show of it."""

    def __init__(self, total_s: float, show: Callable[[float, str], object]) -> None:
        self._clock, self._show = RealClock(), show
        self._begun_s = self._clock.monotonic()
        self.until_s = self._begun_s + total_s
        self._words = ""
        self.stopped = False

    def expired(self) -> bool:
        """Asked by searches some ten times a second."""
        return self.now() >= self.until_s

    def now(self) -> float:
        """The time; after Ctrl-C, the end of all time."""
        now = self._clock.monotonic()
        self._show(now - self._begun_s, self._words)
        return math.inf if self.stopped else now

    def best(self, words: str) -> None:
        """What is best so far."""
        self._words = f"best {words}"

    def stop(self, number: int, frame: FrameType | None) -> None:
        """Ctrl-C: enough."""
        if self.stopped:
            raise KeyboardInterrupt
        self.stopped = True


@contextmanager
def deadline(seconds: float) -> Iterator[Watch]:
    """A bar on the terminal, and Ctrl-C as another end of the time."""
    with gauge("searching", seconds) as show:
        watch = Watch(seconds, show)
        before = signal.signal(signal.SIGINT, watch.stop)
        try:
            yield watch
        finally:
            signal.signal(signal.SIGINT, before)


def _searched(cluster: Cluster, model: Model, options: PlanOptions, watch: Watch) -> Plan:
    rng = random.Random(options.seed)
    if options.wanted == "slo":
        return _disjoint(cluster, model, options, rng, watch)
    target = _target(model, options)
    if any(regroup.regroupable(cluster, node) for node in cluster.nodes):
        return _grouped(cluster, model, target, rng, watch)
    units = whole_units(cluster, model.name)
    if target is not None:

        def served(best: service.Served) -> None:
            watch.best(f"{best.flow:,.0f} tokens/s, {best.told.tpot_s * 1e3:,.0f} ms per token")

        spans = service.plan_for_service(
            cluster, model, units, target, rng=rng, expired=watch.expired, told=served
        ).spans
    else:

        def flowing(best: Found) -> None:
            watch.best(f"{best.flow:,.0f} of at most {best.bound:,.0f} tokens/s")

        spans = search(cluster, model, units, rng=rng, expired=watch.expired, told=flowing).spans
    return Plan(model.name, cluster.name, units, spans)


def _target(model: Model, options: PlanOptions) -> service.Target | None:
    """What a plan for service is to keep; None: the flow is wanted."""
    if options.load is None or options.wanted != "service":
        return None
    return service.Target(
        Load.of(model, options.load),
        options.ttft or service.TTFT_S,
        options.tpot or service.TPOT_S,
    )


def _grouped(
    cluster: Cluster,
    model: Model,
    target: service.Target | None,
    rng: random.Random,
    watch: Watch,
) -> Plan:
    """Machines of several GPUs: which groups they form is a part of the plan."""

    def told(plan: Plan, best: Sited) -> None:
        groups = sum(unit.grouped for unit, _ in plan.placed())
        watch.best(f"{best.flow:,.0f} tokens/s, {groups} groups")

    return regroup.general(
        cluster,
        model,
        Capacity() if target is None else Service(target),
        rng=rng,
        clock=watch.now,
        until=watch.until_s,
        told=told,
    ).plan


def _disjoint(
    cluster: Cluster, model: Model, options: PlanOptions, rng: random.Random, watch: Watch
) -> Plan:
    """HexGen's kind of plan: pipelines that share nothing, most requests within the limits."""
    first_s = options.ttft or service.TTFT_S
    token_s = options.tpot or service.TPOT_S
    mean = int(model.output_tokens)
    slo = Slo(1.0, Pipeline((), hops_s=token_s, ends_s=first_s), (mean, mean))
    rate = options.load and options.load / (model.input_tokens + model.output_tokens)
    return partition.disjoint(
        Builder(cluster, model, slo),
        rng=rng,
        expired=watch.expired,
        rate=rate,
        told=lambda worth: watch.best(f"worth {worth:,.2f}"),
    ).plan
