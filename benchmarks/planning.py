"""The planner measured: the flow of its placements against published ones and against the bound.

    python benchmarks/planning.py [--quick] [--seeds N] [--clusters FOLDER] [--only NAME]

Prints a table and, as its last line, one JSON object. One core. The limits are wall-clock seconds,
so a busy machine does fewer steps in them: `--seeds` runs each row so often with other seeds and
prints the median and the worst; bars are held by the worst. `--quick` takes a tenth of the time.

- *single24, geo24 (70B), 5 s and 60 s*: against the placements that Helix published (Gurobi, 10 and
  45 minutes on 14 cores);
- *small10 (30B)*: seconds until the optimum, which Gurobi proved in 63 minutes;
- *single24 (30B)*: against Helix's placement on the same table of speeds;
- *256 peers*: generated (`planning_clusters.py`), against the bound;
- *one by one*: peers that join each for itself (`planning_joining.py`).
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from planning_clusters import volunteers
from tqdm import tqdm

from hexswarm.router.placement.cluster import Cluster, parse
from hexswarm.router.placement.plan import whole_units
from hexswarm.router.placement.search import Found, search

CLUSTERS = Path(__file__).parents[2] / "shared" / "clusters"
MOST_UNDER = 0.1
"""Seconds by which a search stops before its limit, for the piece of work that it is in."""


@dataclass(frozen=True, slots=True)
class Row:
    """One figure of the table."""

    name: str
    cluster: str
    model: str
    seconds: float
    against: float
    """Tokens a second that the flow is divided by; 0: the bound."""
    bar: float
    aim: float


ROWS = (
    Row("single24 70B, 5 s", "helix-single24", "llama-70b", 5, 1289.556, 1.10, 1.36),
    Row("geo24 70B, 5 s", "helix-geo24", "llama-70b", 5, 1212.177, 1.10, 1.25),
    Row("single24 70B, 60 s", "helix-single24", "llama-70b", 60, 1289.556, 1.30, 1.58),
    Row("geo24 70B, 60 s", "helix-geo24", "llama-70b", 60, 1212.177, 1.20, 1.36),
    Row("small10 30B, optimum", "helix-small10", "llama-30b", 60, 286.587, 1.0, 1.0),
    Row("single24 30B, 60 s", "helix-single24", "llama-30b", 60, 1137.177, 1.15, 1.22),
    Row("256 peers, 60 s", "volunteers", "llama-70b", 60, 0.0, 0.70, 0.80),
)


def load(name: str, folder: Path) -> Cluster:
    if name == "volunteers":
        return volunteers(256, 1)
    return parse(json.loads((folder / f"{name}.json").read_text(encoding="utf-8")))


def measure(row: Row, cluster: Cluster, seconds: float, seed: int) -> tuple[float, float, Found]:
    """Ratio, and seconds until the best flow was there; the row of the optimum ends at it."""
    model = cluster.model(row.model)
    begun = time.perf_counter()
    reached: list[tuple[float, float]] = []

    def told(found: Found) -> None:
        if not reached or found.flow > reached[-1][1] + 1e-6:
            reached.append((time.perf_counter() - begun, found.flow))

    def expired() -> bool:
        known = "optimum" in row.name and bool(reached) and reached[-1][1] >= row.against - 1e-3
        return known or time.perf_counter() - begun > seconds - MOST_UNDER

    units = whole_units(cluster, row.model)
    found = search(cluster, model, units, rng=random.Random(seed), expired=expired, told=told)
    ratio = found.flow / (row.against or found.bound)
    return ratio, reached[-1][0] if reached else seconds, found


def judge(row: Row, folder: Path, seeds: int, quick: bool, bar: tqdm[Any]) -> dict[str, Any]:
    cluster, seconds = load(row.cluster, folder), row.seconds / (10 if quick else 1)
    ratios, times, flows = [], [], []
    for seed in range(seeds):
        bar.set_description(f"{row.name}, seed {seed}")
        ratio, reached_s, found = measure(row, cluster, seconds, seed)
        ratios.append(ratio)
        times.append(reached_s)
        flows.append(found.flow)
        bar.update()
    return {
        "ratio_median": round(statistics.median(ratios), 4),
        "ratio_worst": round(min(ratios), 4),
        "flow_median": round(statistics.median(flows), 3),
        "bound": round(found.bound, 3),
        "reached_s_worst": round(max(times), 2),
        "seconds": seconds,
        "bar": row.bar,
        "aim": row.aim,
        "held": min(ratios) >= row.bar - 1e-5,
        "aimed": min(ratios) >= row.aim - 1e-5,
    }


def joining() -> dict[str, Any]:
    """The row of `planning_joining.py`, where it is."""
    if importlib.util.find_spec("planning_joining") is None:
        return {}
    row: Callable[[], dict[str, Any]] = importlib.import_module("planning_joining").joining_row
    return row()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="a tenth of the time")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each row")
    parser.add_argument("--clusters", type=Path, default=CLUSTERS, help="folder of cluster files")
    parser.add_argument("--only", default="", help="rows whose name has this in it")
    asked = parser.parse_args()
    rows = [row for row in ROWS if asked.only in row.name]
    figures: dict[str, Any] = {}
    with tqdm(total=len(rows) * asked.seeds, file=sys.stderr, disable=None) as bar:
        for row in rows:
            figures[row.name] = judge(row, asked.clusters, asked.seeds, asked.quick, bar)
    print(f"{'':24}{'median':>8}{'worst':>8}{'bar':>7}{'aim':>7}{'flow':>12}{'bound':>12}{'s':>7}")
    for name, said in figures.items():
        print(
            f"{name:24}{said['ratio_median']:8.3f}{said['ratio_worst']:8.3f}{said['bar']:7.2f}"
            f"{said['aim']:7.2f}{said['flow_median']:12.1f}{said['bound']:12.1f}"
            f"{said['reached_s_worst']:7.2f}"
        )
    if asked.only in "joining one by one":
        figures["joining one by one"] = joining()
        print("joining one by one:", figures["joining one by one"] or "not here")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
