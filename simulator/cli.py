"""The subcommand `simulate`: what a plan is worth as service. A door: it prints."""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

from hexswarm.config import from_flags
from hexswarm.errors import UsageError
from hexswarm.files import check_outputs, parsed, read_text, write_text
from hexswarm.paint import layers_text
from hexswarm.plan_options import OURS, SimulateOptions
from hexswarm.plots import Bars, Chart, Series, plots
from hexswarm.progress import gauge
from hexswarm.router.placement.cluster import Cluster, Model, parse
from hexswarm.router.placement.groups import parse_plan
from hexswarm.router.placement.plan import Plan
from hexswarm.simulator.churn import Churn, Outage, outages
from hexswarm.simulator.ours import Ours
from hexswarm.simulator.policy import Policy, Request
from hexswarm.simulator.report import TPOT_S, TTFT_S, Report, Spread
from hexswarm.simulator.rivals import NAMES, rival
from hexswarm.simulator.run import simulate
from hexswarm.simulator.workload import (
    Length,
    binned,
    poisson,
    read_bins,
    read_lengths,
    usable,
)

T = TypeVar("T")

SCALES = tuple(step / 20 for step in range(1, 61))
"""Multiples of both limits for which attainment is drawn."""


def run(flags: argparse.Namespace) -> int:
    """Simulate and print; exit status 1 if no request got a token."""
    options = from_flags(SimulateOptions, flags, {})
    assert options.plan is not None
    check_outputs([flags.svg], [flags.cluster, options.plan, options.trace, options.bins])
    cluster = parsed(flags.cluster, parse)
    plan = parsed(options.plan, lambda said: parse_plan(cluster, said))
    model = cluster.model(plan.model)
    if holes := plan.missing(model.layers):
        raise UsageError(
            f"{options.plan}: nobody holds {', '.join(map(layers_text, holes))}",
            remedy="search longer (hexswarm plan --seconds), or for more machines",
        )
    policy = _policy(cluster, model, plan, options)
    requests = _requests(model, options)
    with gauge("simulating", options.seconds) as show:
        report = simulate(
            cluster,
            model,
            plan,
            policy,
            requests,
            seed=options.seed,
            until_s=options.seconds,
            warmup_s=options.warmup,
            outages=_outages(plan, options),
            told=lambda now, came, ended: show(now, f"{ended:,} of {came:,} requests ended"),
        )
    curve = attainment(report)
    if flags.svg:
        write_text(flags.svg, picture(report, curve))
    if flags.json:
        print(json.dumps(report_json(report, curve)))
    else:
        print(report_text(report))
    return 0 if report.ttft.count else 1


def _policy(cluster: Cluster, model: Model, plan: Plan, options: SimulateOptions) -> Policy:
    if options.policy == OURS:
        return Ours(cluster, model, plan, seed=options.seed)
    if options.policy not in NAMES:
        raise UsageError(
            f"there is no policy {options.policy!r}",
            remedy="there are " + ", ".join((OURS, *NAMES)),
        )
    lines = plan.pipelines or None
    return rival(options.policy, cluster, model, plan, seed=options.seed, pipelines=lines)


def _requests(model: Model, options: SimulateOptions) -> tuple[Request, ...]:
    """Lengths of the trace, or the mean ones that the cluster file tells; at the rate or load."""
    lengths: Sequence[Length] = [(round(model.input_tokens), round(model.output_tokens))]
    if options.trace is not None:
        lengths = _listed(options.trace, lambda lines: usable(read_lengths(lines)))
    load = options.load or (options.rate or 0.0) * fmean(map(sum, lengths))
    rng = random.Random(options.seed)
    if options.bins is None:
        return poisson(lengths, load, options.seconds, rng)
    return binned(lengths, _listed(options.bins, read_bins), load, options.seconds, rng)


def _listed(path: Path, read: Callable[[list[str]], T]) -> T:
    """What `read` makes of a file's lines; its complaints get the file's name."""
    text = read_text(path)
    try:
        return read(text.splitlines())
    except UsageError as error:
        raise UsageError(f"{path}: {error.cause}", remedy=error.remedy) from error


def _outages(plan: Plan, options: SimulateOptions) -> tuple[Outage, ...]:
    if options.churn is None:
        return ()
    law = Churn(options.churn) if options.absence is None else Churn(options.churn, options.absence)
    return outages(plan, law, options.seconds, options.seed)


def attainment(report: Report) -> list[tuple[float, float]]:
    """(scale, share of requests within scale x both limits)."""
    return [(scale, report.good_share(scale * TTFT_S, scale * TPOT_S)) for scale in SCALES]


def report_json(report: Report, curve: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """The report, the limits of its goodput, and attainment over multiples of them."""
    return {
        **report.to_json(),
        "limits": {"ttft_s": TTFT_S, "tpot_s": TPOT_S},
        "attainment": [[scale, _known(share)] for scale, share in curve],
    }


def report_text(report: Report) -> str:
    """The report as a table."""
    since_s, until_s = report.window_s
    rows = [
        f"{report.model} on {report.cluster}, policy {report.policy}: "
        f"{since_s:g}-{until_s:g} s, seed {report.seed}",
        "",
        f"requests   {report.arrived:,} came, {report.finished:,} finished, {report.running:,} "
        f"running, {report.waiting:,} waiting, {report.gave_up:,} gave up",
        f"           {report.refusals:,} refusals, {report.repairs:,} repairs, "
        f"{report.stages:.1f} stages",
        f"tokens/s   offered {report.offered_tokens_per_s:,.1f}, prompts "
        f"{report.prompt_tokens_per_s:,.1f}, answers {report.decode_tokens_per_s:,.1f}",
        f"goodput    {_share(report.goodput)} within {TTFT_S:g} s to the first token "
        f"and {TPOT_S:g} s per token",
        "",
        f"{'seconds':24}{'p50':>9}{'p95':>9}{'p99':>9}{'mean':>9}{'count':>10}",
        _spread("to the first token", report.ttft),
        _spread("  since it had a route", report.prompt),
        _spread("per token, of a request", report.tpot),
        _spread("between two tokens", report.decode),
        _spread("whole answer", report.latency),
        "",
        f"{'unit':24}{'layers':>9}{'busy':>9}{'rows':>9}{'KV peak':>9}",
    ]
    for use in report.uses:
        span = str(use.span) if use.span else "idle"
        rows.append(f"{use.unit:24}{span:>9}{use.busy:>9.0%}{use.rows:>9.1f}{use.kv_peak:>9.0%}")
    return "\n".join(rows)


def _spread(words: str, spread: Spread) -> str:
    values = (spread.p50_s, spread.p95_s, spread.p99_s, spread.mean_s)
    cells = "".join(f"{value:>9.3f}" if math.isfinite(value) else f"{'-':>9}" for value in values)
    return f"{words:24}{cells}{spread.count:>10,}"


def _share(value: float) -> str:
    return f"{value:.1%}" if math.isfinite(value) else "unknown"


def _known(value: float) -> float | None:
    return round(value, 6) if math.isfinite(value) else None


def picture(report: Report, curve: Sequence[tuple[float, float]]) -> str:
    """Distributions, attainment and use as an SVG."""
    counted = report.counted()
    first = [one.ttft_s for one in counted if math.isfinite(one.ttft_s)]
    token = [one.tpot_s for one in counted if math.isfinite(one.tpot_s)]
    charts = [
        Chart("First token", "seconds", [Series("", _shares(first))], TTFT_S),
        Chart("Per token", "seconds", [Series("", _shares(token))], TPOT_S),
        Chart(
            "Within the limits",
            f"x ({TTFT_S:g} s, {TPOT_S:g} s)",
            [Series("", [point for point in curve if math.isfinite(point[1])])],
            1.0,
        ),
    ]
    uses = [(use.unit, use.busy) for use in report.uses if use.span]
    words = f"{report.offered_tokens_per_s:,.1f} tokens/s offered, "
    words += f"goodput {_share(report.goodput)}, policy {report.policy}"
    title = f"{report.model} on {report.cluster}"
    return plots(title, words, charts, Bars("Share of the time in which each unit computed", uses))


def _shares(values: Sequence[float]) -> list[tuple[float, float]]:
    """The empirical distribution: (value, share of all that is at most so large)."""
    ordered = sorted(values)
    return [(value, (at + 1) / len(ordered)) for at, value in enumerate(ordered)]
