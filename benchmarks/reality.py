"""Is the simulator right? The same requests through a real swarm and through `simulate`.

Two swarms of real processes: that of `hexswarm demo` on loopback (four peers, three stages), and
the eight peers in three regions of `wan.py`. Each *case* is a number of requests at the same moment
from one client, along the peers that are named or along those that the router takes. Before every
round the directory is read, and what the peers announce there becomes a cluster and a plan
(`hexswarm.simulator.census`); the simulator plays the same requests on it with our own policy. What
is compared is the time per token: the mean of the answers, and the median of their tokens.

Nothing is fitted. The one figure that announcements lack, what a stage takes to get a message from
the line to its device and back (`Settings.handle_s`), is the median over all hops of what the
stages counted themselves (`hexswarm why --trace`) in the rounds before, the first of which is not
compared. The round trips are the client's, the speeds the peers' own: they follow their latest
steps, so the cores that all peers share here, with each other and with anything else that runs, are
in the prediction as far as the minute before was like the minute after: announcements lag by half
a minute. So rounds go through all cases by turns, which spreads each over minutes, first with one
session and then with several, for at four sessions peers compete for cores and announce that.

    python benchmarks/reality.py               # both swarms; the second needs root and netlab
    python benchmarks/reality.py --only loopback --rounds 2

A line for each round goes to stderr, a table to stdout; the last line is one JSON object. `error`
is the mean over the cases of |predicted - measured| / measured, for the mean time per token.

Two things may be wrong: what peers announce (the machine changed since), and the simulator. Where
other programs run beside, the first hides the second; so each round is also *replayed*, with the
compute and the handling that its stages counted in this very round in place of what they announced.
That is no prediction; `replay_error` tells whether queues, batches, links and routes are simulated
as they are.
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
from collections.abc import Mapping, Sequence
from typing import Any

import lab
from reality_figures import (
    Case,
    Course,
    Times,
    averaged,
    error,
    measured,
    parts,
    routes,
    summary,
    table,
    told,
)
from reality_swarms import Loopback, say, wide
from reality_view import paced, paces, read_view

from hexswarm.config import DEFAULT_MODEL, cache
from hexswarm.records import ModelSpec, PeerId
from hexswarm.router.network import Snapshot
from hexswarm.router.placement.cluster import COORDINATOR
from hexswarm.simulator.census import cluster_of
from hexswarm.simulator.ours import Ours, Wishes
from hexswarm.simulator.policy import Request
from hexswarm.simulator.report import Report
from hexswarm.simulator.run import simulate
from hexswarm.store import resolve

PROMPT_TOKENS = 64
SEEDS = 5
"""Runs of the simulator for each prediction: where routes are near-equal it draws lots."""
UNTIL_S = 600.0
ANNOUNCED_S = 45.0
"""Everybody announces within 30 s."""
SUBJECTS = ("a river", "a lighthouse", "bread", "chess", "paper", "a bicycle", "sound", "a tree")


LOOPBACK = tuple(Case("loopback", count) for count in (1, 4))
LAB = tuple(
    Case(client, count, ring)
    for count in (1, 4)
    for client, ring in (
        ("eu5", ("eu2", "eu3", "eu4")),
        ("uk3", ("uk1", "uk2")),
        ("eu5", ("eu2", "us2", "uk2")),
        ("us4", ("us1", "us2", "us3")),
        ("us4", ()),
    )
)


# --- measuring and predicting ---------------------------------------------------------------------


class Trial:
    """Cases on one swarm."""

    def __init__(self, swarm: Loopback | lab.WideSwarm, spec: ModelSpec, tokens: int) -> None:
        self._swarm, self._spec, self._tokens = swarm, spec, tokens
        self._handle_s: list[float] = []
        self._subject = 0
        self._ended_s = 0.0
        """When the last requests did."""

    def run(self, cases: Sequence[Case], rounds: int) -> list[Course]:
        """One session first, then several: each with a round that is not compared."""
        courses = [Course(case) for case in cases]
        for count in sorted({case.at_once for case in cases}):
            those = [course for course in courses if course.case.at_once == count]
            self._handle_s.clear()
            for course in those:
                self._measure(course.case)
            self._wait_for_words(those[0].case)
            for _ in range(rounds):
                for course in those:
                    self._round(course)
        return courses

    def _round(self, course: Course) -> None:
        case = course.case
        view = read_view(self._swarm.client(case.client).call("census"))
        handle_s = statistics.median(self._handle_s)
        pause_s = time.monotonic() - self._ended_s
        answers = self._measure(case)
        course.load.append(os.getloadavg()[0])
        course.measured.append(measured(answers))
        course.parts.append(parts(answers, handle_s))
        lengths = [len(answer["ids"]) for answer in answers]
        course.predicted.append(self._predict(case, view, lengths, handle_s, pause_s))
        own = self._predict(case, *self._as_it_was(view, answers, lengths), pause_s)
        course.replayed.append(own)
        now, then = course.measured[-1], course.predicted[-1]
        say(
            f"{case}: predicted {then.mean_s * 1e3:.1f} measured {now.mean_s * 1e3:.1f} ms a token "
            f"({error(then.mean_s, now.mean_s):+.0%}), replayed {own.mean_s * 1e3:.1f} "
            f"({error(own.mean_s, now.mean_s):+.0%}); "
            + " ".join(
                f"{name[:-2]} {value * 1e3:.2f}" if name.endswith("_s") else f"{name} {value:.2f}"
                for name, value in course.parts[-1].items()
            )
            + f"; load {course.load[-1]:.1f}; {routes(answers)}"
        )

    def _as_it_was(
        self, view: Snapshot, answers: Sequence[Mapping[str, Any]], lengths: Sequence[int]
    ) -> tuple[Snapshot, Sequence[int], float]:
        """The view with the speeds that the stages had in this very round, and their handling."""
        handled = [hop["serialise_s"] for one in answers for hop in told(one)]
        ratios = paces(view, self._spec, answers)
        usual = statistics.median(ratios.values())
        return paced(view, ratios, usual), lengths, statistics.mean(handled)

    def _measure(self, case: Case) -> list[dict[str, Any]]:
        """The real thing; what the stages told of handling is kept."""
        subjects = [SUBJECTS[(self._subject + n) % len(SUBJECTS)] for n in range(case.at_once)]
        self._subject += case.at_once
        options: dict[str, Any] = {"max_new_tokens": self._tokens}
        if case.ring:
            options["allow"] = self._swarm.peers(*case.ring)
        answers: list[dict[str, Any]] = self._swarm.client(case.client).call(
            "ask",
            prompts=[
                f"Here is a long and detailed story about {subject}. " for subject in subjects
            ],
            prompt_tokens=PROMPT_TOKENS,
            options=options,
        )["answers"]
        failed = [answer["says"] for answer in answers if "error" in answer]
        if failed:
            raise SystemExit(f"reality.py: a request failed: {failed[0]}")
        self._ended_s = time.monotonic()
        self._handle_s += [hop["serialise_s"] for one in answers for hop in told(one)]
        return answers

    def _predict(
        self,
        case: Case,
        view: Snapshot,
        lengths: Sequence[int],
        handle_s: float,
        pause_s: float,
    ) -> Times:
        """What the simulator makes of it: the same round twice, of which the second counts, for
        the one before (in the lab it was another case's) is still in the loads that are told."""
        lived = cluster_of(view, self._spec, input_tokens=PROMPT_TOKENS)
        plan = lived.plan
        if case.ring:
            plan = lived.only(map(PeerId, self._swarm.peers(*case.ring)))

        def play(seed: int, *begins_s: float) -> Report:
            requests = [
                Request(number, begin_s, PROMPT_TOKENS, length, COORDINATOR)
                for number, (begin_s, length) in enumerate(itertools.product(begins_s, lengths))
            ]
            policy = Ours(lived.cluster, lived.model, plan, seed=seed, wishes=Wishes(sticky=True))
            return simulate(
                lived.cluster,
                lived.model,
                plan,
                policy,
                requests,
                seed=seed,
                until_s=UNTIL_S,
                warmup_s=begins_s[-1],
                settings=lived.settings(handle_s),
            )

        found = []
        for seed in range(SEEDS):
            ended_s = max(outcome.ended_s for outcome in play(seed, 0.0).outcomes)
            report = play(seed, 0.0, ended_s + pause_s)
            found.append(Times(report.tpot.mean_s, report.decode.p50_s, report.ttft.mean_s))
        return averaged(found)

    def _wait_for_words(self, case: Case) -> None:
        """Until every peer has announced what it learnt."""
        client, since_s = self._swarm.client(case.client), time.time()
        while time.time() < since_s + ANNOUNCED_S:
            words = client.call("census")["peers"]
            if all(word["issued_s"] > since_s for word in words):
                return
            time.sleep(2)


def measure(flags: argparse.Namespace) -> dict[str, Any]:
    spec = resolve(DEFAULT_MODEL, home=cache()).spec
    found: dict[str, Any] = {}
    for name, swarm, cases in (
        ("loopback", Loopback(spec.layers).running(), LOOPBACK),
        ("lab", wide(), LAB),
    ):
        if flags.only and name != flags.only:
            continue
        with swarm as up:
            courses = Trial(up, spec, flags.tokens).run(cases, flags.rounds)
        rows = [course.row() for course in courses]
        print(f"{name}\n" + "\n".join(table(rows)), flush=True)
        found[name] = summary(rows)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--only", choices=("loopback", "lab"))
    flags = parser.parse_args()
    reason = "" if flags.only == "loopback" else lab.unable()
    if reason:
        sys.exit(f"reality.py: {reason}; --only loopback needs none of it")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # not without taking the lab down
    found = measure(flags)
    found["machine"] = f"{platform.machine()}, {os.cpu_count()} cores"
    print(json.dumps(_rounded(found)))


def _rounded(value: Any) -> Any:
    """Floats to four figures behind the point, however deep."""
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, dict):
        return {name: _rounded(one) for name, one in value.items()}
    return [_rounded(one) for one in value] if isinstance(value, list) else value


if __name__ == "__main__":
    main()
