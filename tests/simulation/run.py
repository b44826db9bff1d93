"""Play seeds of the simulated world, or one of them again with what happened in it.

    .venv/bin/python tests/simulation/run.py --seeds 0:1000 --jobs 2
    .venv/bin/python tests/simulation/run.py --seed 17              # its plan, and its last events

A seed that breaks a rule prints the rule and the command that plays it again. The last line is one
JSON object. Status 1 if any seed is broken.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
if __name__ in ("__main__", "__mp_main__"):  # in pytest `tests` is found without
    sys.path.append(str(ROOT))  # at the end: our `kernels/` must hide nobody's package

from tqdm import tqdm  # noqa: E402

from tests.simulation.outcome import Outcome  # noqa: E402
from tests.simulation.plans import draw  # noqa: E402
from tests.simulation.world import play  # noqa: E402

EVENTS = 400


def again(seed: int) -> str:
    """The command that plays a seed again."""
    return f".venv/bin/python tests/simulation/run.py --seed {seed}"


def _uncollected(seed: int) -> Outcome:
    """A seed without the cycle collector, which would take a fifth of its time; then its turn."""
    gc.disable()
    try:
        return play(seed)
    finally:
        gc.enable()
        gc.collect()


def outcomes(seeds: Iterable[int], jobs: int) -> Iterator[Outcome]:
    """The outcome of each seed, in order."""
    if jobs == 1:
        yield from map(_uncollected, seeds)
        return
    with multiprocessing.get_context("spawn").Pool(jobs, gc.freeze) as pool:
        yield from pool.imap(_uncollected, seeds, chunksize=4)


def share(values: list[float], part: float) -> float:
    """The value below which this part of the values lies."""
    ordered = sorted(values)
    return round(ordered[min(int(part * len(ordered)), len(ordered) - 1)], 3) if ordered else 0.0


def summary(found: list[Outcome], wall_s: float, core_s: float) -> dict[str, object]:
    stalls_s = [stall_s for outcome in found for stall_s in outcome.stalls_s]
    broken = [outcome for outcome in found if outcome.broken]
    rules = Counter(rule for outcome in broken for rule in {rule for rule, _ in outcome.broken})
    return {
        "seeds": len(found),
        "broken": len(broken),
        "rules": dict(sorted(rules.items())),
        "broken_seeds": [outcome.seed for outcome in broken][:50],
        "requests": {
            "answered": sum(outcome.done for outcome in found),
            "failed_with_excuse": sum(outcome.failed for outcome in found),
            "client_gone": sum(outcome.abandoned for outcome in found),
        },
        "longest_stall_s": {
            name: share(stalls_s, part)
            for name, part in (("p50", 0.5), ("p95", 0.95), ("max", 1.0))
        },
        "groups": {
            "worlds": sum(outcome.epochs > 0 for outcome in found),
            "epochs": sum(outcome.epochs for outcome in found),
            "sums": sum(outcome.sums for outcome in found),
            "longest_shown_s": round(max((o.shown_s for o in found), default=0.0), 2),
            "longest_away_s": round(max((o.away_s for o in found), default=0.0), 2),
        },
        "virtual_hours": round(sum(outcome.virtual_s for outcome in found) / 3600, 2),
        "seconds": round(wall_s, 1),
        "core_s_per_seed": round(core_s / max(1, len(found)), 3),
    }


def many(first: int, end: int, jobs: int) -> int:
    began_s, found = time.monotonic(), []
    bar = tqdm(outcomes(range(first, end), jobs), total=end - first, unit="seed", leave=False)
    for outcome in bar:
        found.append(outcome)
        for rule, what in outcome.broken[:1]:
            bar.write(f"seed {outcome.seed}: {rule}: {what}\n    {again(outcome.seed)}")
    spent = [os.times()]
    core_s = sum(times.user + times.system + times.children_user for times in spent)
    told = summary(found, time.monotonic() - began_s, core_s)
    print(json.dumps(told))
    return int(told["broken"] != 0)


def one(seed: int, events: int) -> int:
    print(draw(seed), flush=True)
    outcome = play(seed, keep=events)
    print(*outcome.lines, sep="\n")
    for rule, what in outcome.broken:
        print(f"{rule}: {what}")
    print(
        json.dumps(
            {
                "seed": seed,
                "broken": [rule for rule, _ in outcome.broken],
                "trace": outcome.trace,
                "events": outcome.events,
                "virtual_s": round(outcome.virtual_s, 1),
            }
        )
    )
    return int(bool(outcome.broken))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seeds", default="0:200", help="FIRST:END (default: 0:200)")
    parser.add_argument("--seed", type=int, help="play this one, and tell what happened")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: 2)")
    parser.add_argument(
        "--events", type=int, default=EVENTS, help="with --seed: so many of the last events"
    )
    flags = parser.parse_args()
    if flags.seed is not None:
        return one(flags.seed, flags.events)
    first, _, end = flags.seeds.partition(":")
    return many(int(first), int(end), flags.jobs)


if __name__ == "__main__":
    sys.exit(main())
