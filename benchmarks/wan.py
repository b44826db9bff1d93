"""Is a ring over a wide-area network as fast as its law says, and as the router foretold?

Eight peers in three regions (`lab.py`), one request at a time from clients in each region: along
rings that are forced by naming their peers, and along those that the router takes by itself, with
and without a limit. Every request gives the seconds a token that were predicted and those that
were measured (median and mean over its tokens), and the law

    L = sum of the stages' compute + one-way links of the ring

with the compute as the stages themselves measured it in this very turn (their traces) and the
links as the lab was told to make them. What is left over L is queueing and handling, which the
traces tell too, and the way through sockets and daemons, which is the rest.

    python benchmarks/wan.py                 # 26 requests, about four minutes; needs root, netlab
    python benchmarks/wan.py --quick         # 8 requests of 24 tokens, under two
    python benchmarks/wan.py --requests 60

Progress and a table go to stderr and stdout, the last line is one JSON object. A machine whose
cores are shared stretches compute under the router's feet: look at `load_average` before blaming
the prediction.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import signal
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lab

RINGS = (
    ("eu2", "eu3", "eu4"),
    ("eu2", "us2", "uk2"),
    ("uk1", "uk2"),
    ("eu2", "eu3", "uk2"),
    ("us1", "us2", "us3"),
    ("us1", "eu3", "eu4"),
    ("eu2", "eu3", "us3"),
    ("us1", "us2", "uk2"),
    ("uk1", "eu3", "eu4"),
    ("uk1", "us2", "us3"),
    ("us1", "eu3", "uk2"),
)
"""Each peer once, in ring order; regions mix so that any first few of them are unlike."""
LIMITS = (1.05, 1.5, 2.0, 1.25, 1.75)
"""Limits per token, relative to the best that the router promises this client."""
IMPOSSIBLE = 0.5
PARTS = ("compute", "queue", "link", "serialise")
TOKENS = 48
QUICK_TOKENS = 24
SUBJECTS = ("a river", "a lighthouse", "bread", "chess", "paper", "a bicycle", "sound", "a tree")


@dataclass(frozen=True, slots=True)
class Case:
    """One request to make."""

    client: str
    ring: tuple[str, ...] = ()
    """Hosts whose peers alone may serve; empty: the router's own choice."""
    factor: float | None = None
    """Of the best promise; None: no limit."""


@dataclass(frozen=True, slots=True)
class Row:
    """One request that was answered."""

    case: Case
    ring: tuple[str, ...]
    """Hosts in ring order."""
    limit_s: float | None
    predicted_s: float
    gap_s: float
    """Median time between two tokens."""
    mean_s: float
    compute_s: float
    links_s: float
    wait_s: float
    handle_s: float
    traced: bool
    """All stages told where their time went."""
    predicted_parts_s: Mapping[str, float]
    """Sums over the stages of what the router reckoned with."""
    predicted_ttft_s: float
    ttft_s: float

    @property
    def law_s(self) -> float:
        return self.compute_s + self.links_s

    @property
    def law_ratio(self) -> float:
        return self.gap_s / self.law_s

    @property
    def error(self) -> float:
        """Of the predicted time per token, relative to the measured one."""
        return abs(self.predicted_s - self.gap_s) / self.gap_s

    @property
    def ttft_error(self) -> float:
        return abs(self.predicted_ttft_s - self.ttft_s) / self.ttft_s

    @property
    def rest_s(self) -> float:
        """Per hop: what neither stages nor links account for."""
        return (self.gap_s - self.law_s - self.wait_s - self.handle_s) / len(self.ring)


def cases(requests: int) -> list[Case]:
    """Half of the requests along forced rings, a quarter own choices, a quarter with limits."""
    hosts = list(lab.CLIENTS.values())
    limited, free = max(3, requests // 4), max(3, requests // 4)
    forced = zip(range(max(2, requests - limited - free)), itertools.cycle(RINGS), strict=False)
    turn = itertools.cycle(hosts)
    plan = [Case(next(turn), ring) for _, ring in forced]
    plan += [Case(hosts[number % len(hosts)]) for number in range(free)]
    factors = itertools.islice(itertools.cycle(LIMITS), limited)
    plan += [Case(next(turn), (), factor) for factor in factors]
    return [*plan, *(Case(host, (), IMPOSSIBLE) for host in hosts)]


class Course:
    """The cases one after another, and what came of them."""

    def __init__(self, swarm: lab.WideSwarm, tokens: int) -> None:
        self.rows: list[Row] = []
        self.refused: list[tuple[Case, dict[str, Any]]] = []
        self.failed: list[tuple[Case, dict[str, Any]]] = []
        self._swarm = swarm
        self._tokens = tokens
        self._best_s: dict[str, float] = {}

    def run(self, plan: Iterable[Case]) -> Iterator[str]:
        """Make the requests; yields a line after each."""
        for number, case in enumerate(plan):
            yield f"{number + 1:3} {self._one(case, SUBJECTS[number % len(SUBJECTS)])}"

    def _one(self, case: Case, subject: str) -> str:
        options: dict[str, Any] = {}
        if case.ring:
            options["allow"] = self._swarm.peers(*case.ring)
        if case.factor is not None:
            options["max_latency"] = case.factor * self._best(case.client)
        asked = [{"role": "user", "content": f"Write a long story about {subject}."}]
        answer = self._swarm.client(case.client).ask(asked, self._tokens, **options)
        if "error" not in answer:
            self.rows.append(self._row(case, options.get("max_latency"), answer))
            return shown(self.rows[-1])
        refusal = case.factor is not None and answer["error"] == "NoRoute"
        (self.refused if refusal else self.failed).append((case, answer))
        return f"{case.client} {answer['error']}: {answer['says']}"

    def _best(self, client: str) -> float:
        """The least seconds a token that the router promises this client."""
        if client not in self._best_s:
            answer = self._swarm.client(client).ask("Hello", 2)
            promised = answer["predicted"]
            self._best_s[client] = promised["tpot_p95_s"] or promised["tpot_s"]
        return self._best_s[client]

    def _row(self, case: Case, limit_s: float | None, answer: dict[str, Any]) -> Row:
        hosts = tuple(self._swarm.host_of(peer) for peer, _, _ in answer["stages"])
        hops = answer["trace"]["hops"]
        told = [hop["measured"] for hop in hops if hop["measured"] is not None]
        whole = len(told) == len(hosts)
        # A stage that did not tell in time counts as it was predicted: marked in the table.
        used = [hop["measured"] or hop["predicted"] for hop in hops]
        return Row(
            case=case,
            ring=hosts,
            limit_s=limit_s,
            predicted_s=answer["predicted"]["tpot_s"],
            gap_s=answer["tpot_s"],
            mean_s=answer["mean_s"],
            compute_s=sum(item["compute_s"] for item in used),
            links_s=links_s(hosts),
            wait_s=sum(item["queue_s"] for item in used),
            handle_s=sum(item["serialise_s"] for item in used),
            traced=whole,
            predicted_parts_s={
                part: sum(hop["predicted"][f"{part}_s"] or 0.0 for hop in hops) for part in PARTS
            },
            predicted_ttft_s=answer["predicted"]["ttft_s"],
            ttft_s=answer["ttft_s"],
        )


def links_s(hosts: Sequence[str]) -> float:
    """The one-way links of the ring that these hosts make."""
    return sum(lab.one_way_s(a, b) for a, b in zip(hosts, [*hosts[1:], hosts[0]], strict=True))


def shown(row: Row) -> str:
    """Milliseconds a token: of each pair the prediction first."""
    foretold = row.predicted_parts_s
    limit = f" limit {row.limit_s * 1e3:.0f}" if row.limit_s is not None else ""
    return (
        f"{row.case.client} {'-'.join(row.ring):12}{'' if row.case.ring else ' chosen'}{limit}: "
        f"{row.predicted_s * 1e3:.1f} {row.gap_s * 1e3:.1f} mean {row.mean_s * 1e3:.1f} "
        f"({row.error:.0%}) = compute{'' if row.traced else '?'} "
        f"{foretold['compute'] * 1e3:.1f} {row.compute_s * 1e3:.1f} + links "
        f"{foretold['link'] * 1e3:.1f} {row.links_s * 1e3:.1f} + wait {row.wait_s * 1e3:.2f} "
        f"+ handle {row.handle_s * 1e3:.2f} + {len(row.ring)} x {row.rest_s * 1e3:.2f}; "
        f"law x{row.law_ratio:.3f}; first token {row.predicted_ttft_s * 1e3:.0f} "
        f"{row.ttft_s * 1e3:.0f}"
    )


def figures(course: Course) -> dict[str, Any]:
    """Medians and worst cases over all requests; bars are the project's own."""
    rows = course.rows
    limited = [row for row in rows if row.limit_s is not None]
    kept = [row for row in limited if row.limit_s is not None and row.mean_s <= row.limit_s]
    impossible = [item for item in course.refused if item[0].factor == IMPOSSIBLE]
    result: dict[str, Any] = {
        "requests": len(rows) + len(course.refused) + len(course.failed),
        "answered": len(rows),
        "failed": [answer["says"] for _, answer in course.failed],
        "rings": len({row.ring for row in rows}),
        "traced": sum(row.traced for row in rows),
        **spread("tpot_error", [row.error for row in rows]),
        **spread("ttft_error", [row.ttft_error for row in rows]),
        **spread("law_ratio", [row.law_ratio for row in rows]),
        **spread("rest_per_hop_s", [row.rest_s for row in rows]),
        "limits_accepted": len(limited),
        "limits_kept_share": len(kept) / len(limited) if limited else None,
        "limits_refused": len(course.refused),
        "impossible_refused": len(impossible),
    }
    for part in ("compute_s", "links_s", "wait_s", "handle_s"):
        shares = [getattr(row, part) / row.gap_s for row in rows]
        result[f"share_{part.removesuffix('_s')}"] = statistics.mean(shares)
    return result


def spread(name: str, values: Sequence[float]) -> dict[str, float]:
    """Median and 95th percentile (of few values the largest)."""
    ordered = sorted(values)
    last = ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]
    return {f"{name}_median": statistics.median(ordered), f"{name}_p95": last}


def measure(requests: int, tokens: int) -> dict[str, Any]:
    began_s = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - began_s:6.1f} s  {text}", file=sys.stderr, flush=True)

    with lab.WideSwarm(say=say) as swarm:
        swarm.start_clients()
        started_s = time.monotonic() - began_s
        settled_s = swarm.settle(steady=True)
        course = Course(swarm, tokens)
        for line in course.run(cases(requests)):
            say(line)
    for row in course.rows:
        print(shown(row))
    return {
        **figures(course),
        "tokens": tokens,
        "started_s": started_s,
        "settled_s": settled_s,
        "whole_s": time.monotonic() - began_s,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=23, help="beside three impossible ones")
    parser.add_argument("--quick", action="store_true", help="5 and 3 requests, few tokens")
    flags = parser.parse_args()
    reason = lab.unable()
    if reason:
        sys.exit(f"wan.py: {reason}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # not without taking the lab down
    found = measure(5 if flags.quick else flags.requests, QUICK_TOKENS if flags.quick else TOKENS)
    found["load_average"] = os.getloadavg()[0]
    found["machine"] = f"{platform.machine()}, {os.cpu_count()} cores"
    rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in found.items()}
    print(json.dumps(rounded))


if __name__ == "__main__":
    main()
