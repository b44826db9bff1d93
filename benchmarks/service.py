"""Service of our plans and policy against Helix's in one simulator: latencies and highest loads.

    python benchmarks/service.py            # both rows, both clusters; last line is one JSON object
    python benchmarks/service.py --quick    # one cluster, short windows: it runs
    python benchmarks/service.py --parts    # also each side's plan under the other side's policy

LLaMA-2 70B on Helix's two clusters of 24 GPUs (`single24`: one site; `geo24`: three sites, 100
Mbit/s and 50 ms apart); requests with the lengths of the Azure conversation trace, arrivals as
bursty as the trace's, all from the coordinator. Both sides meet the same requests, the same links,
the same seconds a layer.

*Helix*: its published placement, its scheduler (interleaved weighted round-robin on the max-flow,
KV mask), whole prompts, every token over the coordinator; `simulator/rival_helix.py` says what is
simplified. *Ours*: a plan by `plan_for_service` at the same load (the search is counted in steps,
so that equal seeds give equal plans), the router and the scheduler that clients and peers run,
tokens from tail to head.

*Online*: Helix's own online loads, 600 and 320 tokens a second. prompt: from the moment a route
took the request to its first token; decode: a token's way round, over tokens, as Helix reports it;
tpot: the mean of one request, over requests. The window begins after 600 s, which is three
lifetimes of a request under Helix on single24 and two on geo24, five to seven of ours.

*Highest load*: at which 95 % of the requests have their first token within 5 s and then at most 1 s
a token on average. Helix's is sought on a grid of shares of its online load; ours on a grid of
multiples of it, with a plan made for such a load (`HIGH_S`), from where the estimate says that it
ends (`hexswarm.router.placement.latency`). The windows are as long as they must be for some 200
requests: 500 s after 300 s for Helix, 150 s after 300 s for ours, two lifetimes of either side's
requests or more. The ratio is ours over the *lowest load at which Helix failed*, where it failed at
all loads of the grid, too. One seed: near the limit a step of a grid is noise.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from hexswarm.router.placement.cluster import Cluster, Model, parse
from hexswarm.router.placement.expected import Estimate, Load
from hexswarm.router.placement.latency import Latency
from hexswarm.router.placement.plan import Plan, parse_spans, whole_units
from hexswarm.router.placement.service import Target, most_load, plan_for_service
from hexswarm.simulator import workload
from hexswarm.simulator.ours import Ours
from hexswarm.simulator.policy import Policy
from hexswarm.simulator.report import Report
from hexswarm.simulator.rival_helix import Helix
from hexswarm.simulator.run import simulate

HERE = Path(__file__).resolve().parent
SHARED = HERE.parents[1] / "shared"
MODEL = "llama-70b"
LOAD_S = {"single24": 600.0, "geo24": 320.0}
"""Tokens a second that Helix offers online."""

HIGH_S = {"single24": 1500.0, "geo24": 1000.0}
"""Tokens a second for which the plan of the second row is made."""

GOOD = 0.95
SHARES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2)
"""Helix's grid, of the online load."""
MULTIPLES = (1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 6.0)
"""Ours."""

Judge = Callable[[float], bool]


@dataclass(frozen=True, slots=True)
class Windows:
    """Virtual seconds."""

    online_s: tuple[float, float] = (600.0, 900.0)
    helix_highest_s: tuple[float, float] = (300.0, 800.0)
    highest_s: tuple[float, float] = (300.0, 450.0)
    search: int = 1000
    """Pieces of the search for a plan, 125 steps each."""


QUICK = Windows(
    online_s=(60.0, 120.0), helix_highest_s=(40.0, 120.0), highest_s=(40.0, 80.0), search=60
)


@dataclass(frozen=True, slots=True)
class Case:
    """A cluster and both sides' plans."""

    name: str
    cluster: Cluster
    model: Model
    helix: Plan
    ours: Plan
    """For Helix's online load."""
    high: Plan
    """For `HIGH_S`."""
    lengths: Sequence[workload.Length]
    bins: Sequence[int]
    seed: int

    def estimate(self, plan: Plan, load: float) -> Estimate:
        """Without simulating."""
        latency = Latency(self.cluster, self.model, plan.units)
        return latency.estimate(plan.spans, self.load(load))

    def load(self, tokens_per_s: float) -> Load:
        """With the lengths of the trace."""
        asked = sorted(length[0] for length in self.lengths)
        told = [length[1] for length in self.lengths]
        mean = sum(asked) / len(asked)
        return Load(tokens_per_s, mean, sum(told) / len(told), asked[int(0.95 * len(asked))])

    def most(self, plan: Plan) -> float:
        """The highest load by the estimate."""
        latency = Latency(self.cluster, self.model, plan.units)
        return most_load(latency, plan.spans, Target(self.load(LOAD_S[self.name])))

    def run(self, plan: Plan, policy: str, load: float, window_s: tuple[float, float]) -> Report:
        """One simulation."""
        made: Policy
        if policy == "ours":
            made = Ours(self.cluster, self.model, plan, seed=self.seed)
        else:
            made = Helix(self.cluster, self.model, plan)
        warmup_s, until_s = window_s
        rng = random.Random(self.seed)
        requests = workload.binned(self.lengths, self.bins, load, until_s, rng)
        with tqdm(total=round(until_s), desc=f"{policy} at {load:.0f}", leave=False) as bar:

            def told(now: float, arrived: int, ended: int) -> None:
                bar.update(round(now) - bar.n)

            return simulate(
                self.cluster,
                self.model,
                plan,
                made,
                requests,
                seed=self.seed,
                until_s=until_s,
                warmup_s=warmup_s,
                told=told,
            )


def case(name: str, seed: int, pieces: int) -> Case:
    """Read the files, and plan."""
    cluster = parse(json.loads((SHARED / "clusters" / f"helix-{name}.json").read_text()))
    model = cluster.model(MODEL)
    units = whole_units(cluster, MODEL)
    said = json.loads((HERE / "plans" / f"helix-{name}-70b.json").read_text())
    published = parse_spans(said["nodes"])
    helix = Plan(MODEL, cluster.name, units, tuple(published[unit.id] for unit in units))
    traces = SHARED / "traces"
    lengths = workload.usable(
        workload.read_lengths((traces / "azure-conversation.csv").read_text().splitlines())
    )
    arrivals = (traces / "azure-conversation-arrivals.csv").read_text().splitlines()
    bins = workload.read_bins(arrivals)
    found = Case(name, cluster, model, helix, helix, helix, lengths, bins, seed)
    plans = [search(found, load[name], pieces) for load in (LOAD_S, HIGH_S)]
    return replace(found, ours=plans[0], high=plans[1])


def search(case: Case, load: float, pieces: int) -> Plan:
    """Our plan for a load; equal seeds give equal plans."""
    left = [pieces]

    def expired() -> bool:
        left[0] -= 1
        return left[0] <= 0

    began = time.perf_counter()
    found = plan_for_service(
        case.cluster,
        case.model,
        case.helix.units,
        Target(case.load(load)),
        rng=random.Random(case.seed),
        expired=expired,
    )
    took = time.perf_counter() - began
    print(
        f"{case.name}: planned for {load:.0f} in {took:.1f} s, flow {found.flow:.0f}, "
        f"expected tpot {found.told.tpot_s:.3f} s, ttft {found.told.ttft_s:.2f} s"
    )
    return Plan(MODEL, case.cluster.name, case.helix.units, found.spans)


HEAD = (
    "case       plan   policy   load  offered  decode/s  prompt p50/p95  decode p50/p95"
    "  tpot p50/p95  goodput  waiting  stages"
)


def line(case: Case, plan: str, policy: str, load: float, told: Report) -> str:
    """One row of the table."""
    return (
        f"{case.name:<10} {plan:<6} {policy:<7} {load:>5.0f} {told.offered_tokens_per_s:>8.0f} "
        f"{told.decode_tokens_per_s:>9.1f} {told.prompt.p50_s:>8.2f}/{told.prompt.p95_s:<6.2f} "
        f"{told.decode.p50_s:>8.3f}/{told.decode.p95_s:<6.3f}"
        f"{told.tpot.p50_s:>6.3f}/{told.tpot.p95_s:<6.3f}"
        f" {told.goodput:>7.3f} {told.waiting:>8d} {told.stages:>7.1f}"
    )


def online(case: Case, windows: Windows, parts: bool) -> dict[str, Any]:
    """Latencies at Helix's online load."""
    load = LOAD_S[case.name]
    pairs = [("helix", "helix"), ("ours", "ours")]
    pairs += [("helix", "ours"), ("ours", "helix")] if parts else []
    told: dict[tuple[str, str], Report] = {}
    for plan, policy in pairs:
        chosen = case.ours if plan == "ours" else case.helix
        told[plan, policy] = case.run(chosen, policy, load, windows.online_s)
        print(line(case, plan, policy, load, told[plan, policy]), flush=True)
    foreseen = case.estimate(case.ours, load)
    helix, ours = told["helix", "helix"], told["ours", "ours"]
    return {
        "decode_p50": round(ours.decode.p50_s / helix.decode.p50_s, 3),
        "decode_p95": round(ours.decode.p95_s / helix.decode.p95_s, 3),
        "prompt_p50": round(ours.prompt.p50_s / helix.prompt.p50_s, 3),
        "prompt_p95": round(ours.prompt.p95_s / helix.prompt.p95_s, 3),
        "goodput": [round(helix.goodput, 3), round(ours.goodput, 3)],
        "tpot_foreseen_over_simulated": round(foreseen.tpot_s / ours.tpot.mean_s, 3),
        "ttft_foreseen_over_simulated": round(foreseen.ttft_s / ours.ttft.mean_s, 3),
    }


def highest(case: Case, windows: Windows) -> dict[str, Any]:
    """The highest load that each side serves."""
    online_load = LOAD_S[case.name]

    def serves(policy: str) -> Judge:
        mine = policy == "ours"
        plan = case.high if mine else case.helix
        window_s = windows.highest_s if mine else windows.helix_highest_s

        def judge(load: float) -> bool:
            told = case.run(plan, policy, load, window_s)
            print(line(case, policy, policy, load, told), flush=True)
            return told.goodput >= GOOD

        return judge

    grid = [share * online_load for share in SHARES]
    kept, failed = last_that_serves(grid, serves("helix"), len(grid) // 2)
    ladder = [multiple * online_load for multiple in MULTIPLES]
    foreseen = case.most(case.high)
    begin = max([at for at, load in enumerate(ladder) if load <= foreseen], default=0)
    ours, broken = last_that_serves(ladder, serves("ours"), begin, runs=3)
    return {
        "helix": kept,
        "helix_failed": failed,
        "ours": ours,
        "ours_failed": broken,
        "foreseen": round(foreseen),
        "over_helix_failed": round(ours / failed, 2) if ours and failed else None,
    }


def last_that_serves(
    loads: Sequence[float], serves: Judge, begin: int, runs: int = 8
) -> tuple[float | None, float | None]:
    """The highest load of an ascending grid that is served, and the lowest that is not, as far as
    so many runs tell; bisection, from `begin`."""
    low, high, at = -1, len(loads), begin
    while high - low > 1 and runs > 0:
        runs -= 1
        if serves(loads[at]):
            low = at
        else:
            high = at
        at = (low + high) // 2 if low >= 0 or high <= 1 else max(0, high // 2)
        at = min(max(at, low + 1), len(loads) - 1)
    return (loads[low] if low >= 0 else None), (loads[high] if high < len(loads) else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one cluster, short windows")
    parser.add_argument("--parts", action="store_true", help="also each plan under both policies")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--clusters", nargs="+", choices=sorted(LOAD_S), default=["single24", "geo24"]
    )
    options = parser.parse_args()
    windows = QUICK if options.quick else Windows()
    names = options.clusters[:1] if options.quick else options.clusters
    found: dict[str, Any] = {}
    began = time.perf_counter()
    for name in names:
        chosen = case(name, options.seed, windows.search)
        print(HEAD)
        found[name] = {"online": online(chosen, windows, options.parts)}
        found[name]["highest"] = highest(chosen, windows)
    found["seconds"] = round(time.perf_counter() - began)
    found["cpu_seconds"] = round(time.process_time())
    print(json.dumps(found))


if __name__ == "__main__":
    main()
