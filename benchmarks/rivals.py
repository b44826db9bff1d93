"""Rivals in our simulator against what Helix's authors published of theirs.

    python benchmarks/rivals.py             # all cases, 1,800 s each from an empty cluster: minutes
    python benchmarks/rivals.py --quick     # two cases, 120 s: it runs
    python benchmarks/rivals.py --policies  # several policies on Helix's placement of single24

LLaMA-2 70B, the lengths and arrivals of the Azure conversation trace, everything from the
coordinator. Placements are the published ones (`benchmarks/plans/`), and so are the figures: decode
tokens/s, prompt and decode latency in seconds, p50 and p95. The loads are those in the artifact's
scripts (`artifact_evaluation/*/step3_simulation.py`); for Helix on single24 one version has 700
tokens/s, which fits what was published, while our cluster file has 600. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hexswarm.router.placement.cluster import parse
from hexswarm.simulator import placements, workload
from hexswarm.simulator.report import Report
from hexswarm.simulator.rivals import rival
from hexswarm.simulator.run import simulate

HERE = Path(__file__).resolve().parent
SHARED = HERE.parents[1] / "shared"


@dataclass(frozen=True, slots=True)
class Case:
    """A published run."""

    policy: str
    cluster: str
    load: float
    """Tokens a second that are offered."""
    published: tuple[float, float, float, float, float] | None
    """Decode tokens/s; prompt p50, p95; decode p50, p95."""
    plan: str = ""
    """Whose placement; empty: the policy's."""

    def run(self, until_s: float, seed: int) -> Report:
        """The same in our world."""
        path = HERE / "plans" / f"{self.plan or self.policy}-{self.cluster}-70b.json"
        said = json.loads(path.read_text())
        cluster = parse(json.loads((SHARED / "clusters" / f"{said['cluster']}.json").read_text()))
        plan, model = placements.published(cluster, said), cluster.model(said["model"])
        requests = workload.binned(*traces(), self.load, until_s, random.Random(seed))
        policy = rival(self.policy, cluster, model, plan, seed=seed)
        return simulate(cluster, model, plan, policy, requests, seed=seed, until_s=until_s)


CASES = (
    Case("helix", "single24", 700, (141.6, 2.64, 4.41, 0.98, 3.19)),
    Case("helix", "geo24", 320, (59.3, 5.79, 9.41, 0.93, 7.72)),
    Case("swarm", "single24", 350, (69.8, 3.32, 5.01, 1.04, 2.51)),
    Case("swarm", "geo24", 160, (31.0, 7.22, 14.83, 1.23, 6.50)),
    Case("separate", "single24", 370, (84.0, 0.80, 4.19, 0.22, 1.20)),
    Case("separate", "geo24", 181, (33.6, 4.96, 15.82, 1.20, 5.01)),
)

POLICIES = tuple(
    Case(name, "single24", 600, None, "helix") for name in ("helix", "swarm", "random", "petals")
)


def traces() -> tuple[tuple[workload.Length, ...], tuple[int, ...]]:
    """Lengths and arrivals of the Azure conversation trace."""
    folder = SHARED / "traces"
    lengths = (folder / "azure-conversation.csv").read_text().splitlines()
    bins = (folder / "azure-conversation-arrivals.csv").read_text().splitlines()
    return workload.usable(workload.read_lengths(lengths)), workload.read_bins(bins)


def figures(report: Report) -> tuple[float, float, float, float, float]:
    """As they were published."""
    prompt, decode = report.prompt, report.decode
    found = (report.decode_tokens_per_s, prompt.p50_s, prompt.p95_s, decode.p50_s, decode.p95_s)
    return tuple(round(value, 2) for value in found)  # type: ignore[return-value]


def told(case: Case, report: Report) -> dict[str, Any]:
    """One line on the screen, and the same as plain values."""
    ours = figures(report)
    came = round(report.offered_tokens_per_s)
    print(f"{case.policy:9} {case.cluster:9} {case.load:4.0f} tokens/s ({came} came)")
    for name, row in (("published", case.published), ("ours", ours)):
        if row:
            print(f"  {name:9} {row[0]:6.1f}/s  prompt {row[1]:5.2f} {row[2]:5.2f}", end="")
            print(f"  decode {row[3]:5.2f} {row[4]:5.2f}", flush=True)
    return {
        "policy": case.policy,
        "cluster": case.cluster,
        "offered": case.load,
        "came": came,
        "published": case.published,
        "ours": ours,
        "goodput": round(report.goodput, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two cases, 120 s")
    parser.add_argument("--policies", action="store_true", help="several on one placement, 900 s")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    cases, until_s = (POLICIES, 900.0) if options.policies else (CASES, 1800.0)
    if options.quick:
        cases, until_s = cases[:2], 120.0
    found = [told(case, case.run(until_s, options.seed)) for case in cases]
    print(json.dumps({"until_s": until_s, "seed": options.seed, "cases": found}))


if __name__ == "__main__":
    main()
