"""The kill matrix: each stage, at each phase of an answer, lost in each way, for several seeds.

A *case* is one greedy answer in which the peer that serves one stage is struck: while the prompt is
computed, at the third token, or at the thirtieth of forty; by SIGKILL, SIGSTOP or SIGTERM. Its ids
must be those of the answer that nobody disturbed, and its *stall* is the longest silence of the
stream over what is normal (`chaos_figures.stall_s`). A seed chooses the prompts, the point of the
prefill at which the strike comes, and (odd seeds) that a freeze stops the peer's daemon too.

Cases run in batches of one for each stage, with a client of its own that has joined and has
answered once: what a client learns of dead peers is the concern of `loop`, here every case meets
two replicas that it has nothing against. After a batch all peers are whole again.
"""

from __future__ import annotations

import asyncio
import itertools
import signal
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from chaos_figures import quantile, stall_s
from chaos_swarm import Heard, Replicas, hear, online

from hexswarm.client import AsyncClient
from hexswarm.conversation import Prompt
from hexswarm.records import Route

PHASES = ("prefill", "early", "late")
SIGNALS = ("KILL", "STOP", "TERM")
TOKENS = 40
PIECE = {"early": 3, "late": 30}
"""The token at which a strike comes."""
MOMENTS = (0.25, 0.5, 0.75)
"""Shares of the time from the opening to the first token at which a strike of a prefill comes."""
PREFILL_TOKENS = 800
DECODE_TOKENS = 100
STALL_P95_S, STALL_MAX_S = 3.0, 8.0
DRAIN_S = 30.0

SUBJECTS = (
    "the history of the lighthouse", "how bread is baked", "the life of a river",
    "how a bicycle stays upright", "the invention of paper", "the water cycle",
    "what makes a good story", "the use of the compass",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Case:
    """One answer to disturb."""

    stage: int
    phase: str
    signal: str
    seed: int

    def __str__(self) -> str:
        return f"stage {self.stage}, {self.phase}, SIG{self.signal}, seed {self.seed}"


@dataclass(frozen=True, slots=True)
class Normal:
    """The same answer undisturbed."""

    ids: tuple[int, ...]
    first_s: float
    opened_s: float
    """Until its stages were open."""
    gap_s: float
    """Median between two tokens."""
    longest_s: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a case."""

    case: Case
    same: bool
    struck: bool
    """The strike came while the answer was being given."""
    stall_s: float
    mends: int
    error: str
    status: int | None = None
    """Exit status after SIGTERM."""


def cases(stages: int, seeds: int, only: Mapping[str, Collection[str]]) -> list[list[Case]]:
    """All batches; `only` names the values to keep of stage, phase, signal or seed."""

    def kept(case: Case) -> bool:
        return all(str(getattr(case, name)) in values for name, values in only.items())

    batches = [
        [Case(stage, phase, number, seed) for stage in range(stages)]
        for seed, phase, number in itertools.product(range(seeds), PHASES, SIGNALS)
    ]
    left = [[case for case in batch if kept(case)] for batch in batches]
    return [batch for batch in left if batch]


def prompt(client: AsyncClient, seed: int, wanted: int = 0) -> Prompt:
    """A chat of at least so many tokens that asks for a long answer; the same for each seed."""
    subject = SUBJECTS[seed % len(SUBJECTS)]
    ask = f"Explain in a long and detailed text {subject}."
    text = ""
    topics = itertools.cycle(SUBJECTS[seed:] + SUBJECTS[:seed])
    while len(client.encode([{"role": "user", "content": text + ask}])) < wanted:
        text += f"Somebody told me yesterday a good deal about {next(topics)}. "
    return [{"role": "user", "content": text + ask}]


async def undisturbed(client: AsyncClient, seed: int, long: bool) -> Normal:
    """The answer that all others are held against: of two, the quicker one's times."""
    asked = prompt(client, seed, PREFILL_TOKENS if long else DECODE_TOKENS)
    found: list[Heard] = []
    for _ in range(2):
        heard = await hear(client, asked, TOKENS, strike=lambda _: None, after_open_s=0.0)
        if heard.error or len(heard.ids) != TOKENS:
            raise SystemExit(f"chaos.py: nothing to compare with: {heard.error or heard.ids}")
        found.append(heard)
    if found[0].ids != found[1].ids:
        raise SystemExit("chaos.py: two undisturbed answers differ")
    best = min(found, key=lambda heard: heard.times_s[0])
    opened = [heard.struck_s or 0.0 for heard in found]
    return Normal(
        ids=best.ids,
        first_s=best.times_s[0],
        opened_s=min(opened),
        gap_s=quantile(best.gaps_s, 0.5),
        longest_s=max(best.gaps_s),
    )


class Matrix:
    """The cases one after another on one swarm."""

    def __init__(self, swarm: Replicas) -> None:
        self.outcomes: list[Outcome] = []
        self.normal: dict[tuple[bool, int], Normal] = {}
        self._swarm = swarm
        self._clients = 0

    async def run(self, batches: list[list[Case]], said: Callable[[str], None]) -> None:
        """Carry out all batches; `said` gets a line for each case."""
        await self._learn(batches)
        for batch in batches:
            struck: list[tuple[Outcome, int | None]] = []
            async with self._client() as client:
                await online(client, self._swarm.ids())
                await client.generate("Hello", max_new_tokens=2)
                for case in batch:
                    struck.append(await self._one(client, case))
            for outcome in await self._settled(struck):
                self.outcomes.append(outcome)
                said(line(outcome))
            await asyncio.to_thread(self._swarm.revive)

    def _client(self) -> AsyncClient:
        self._clients += 1
        home = self._swarm.home / f"client-{self._clients}"
        client = AsyncClient(self._swarm.bootstrap, model=self._swarm.model, home=home)
        client._runtime.secret = b""  # prompts have no names: each is computed, none is found
        return client

    async def _learn(self, batches: list[list[Case]]) -> None:
        """The undisturbed answers that these cases need."""
        wanted = {(case.phase == "prefill", case.seed) for batch in batches for case in batch}
        async with self._client() as client:
            await online(client, self._swarm.ids())
            await client.generate("Hello", max_new_tokens=2)
            for long, seed in sorted(wanted):
                self.normal[long, seed] = await undisturbed(client, seed, long)

    async def _one(self, client: AsyncClient, case: Case) -> tuple[Outcome, int | None]:
        long = case.phase == "prefill"
        normal, hit = self.normal[long, case.seed], list[int]()
        number = signal.Signals[f"SIG{case.signal}"]

        def strike(route: Route) -> None:
            whole = number == signal.SIGSTOP and case.seed % 2 == 1
            hit.append(self._swarm.strike(route, case.stage, number, whole))

        moment = MOMENTS[case.seed % len(MOMENTS)] * (normal.first_s - normal.opened_s)
        heard = await hear(
            client,
            prompt(client, case.seed, PREFILL_TOKENS if long else DECODE_TOKENS),
            TOKENS,
            strike=strike,
            piece=PIECE.get(case.phase),
            after_open_s=moment if long else None,
        )
        outcome = Outcome(
            case=case,
            same=heard.ids == normal.ids,
            struck=bool(hit) and self._in_phase(case, heard),
            stall_s=stall_s(heard.signs_s, normal.first_s, normal.gap_s),
            mends=heard.mends,
            error=heard.error,
        )
        return outcome, hit[0] if hit else None

    def _in_phase(self, case: Case, heard: Heard) -> bool:
        """A strike that was meant for the prefill came before the first token."""
        if case.phase != "prefill" or heard.struck_s is None or not heard.times_s:
            return heard.struck_s is not None
        return heard.struck_s < heard.times_s[0]

    async def _settled(self, struck: list[tuple[Outcome, int | None]]) -> list[Outcome]:
        """What SIGTERM did to the peers themselves: all were given their time at once."""
        settled = []
        for outcome, number in struck:
            if outcome.case.signal == "TERM" and number is not None:
                status = await asyncio.to_thread(self._swarm.peers[number].wait, DRAIN_S)
                outcome = replace(outcome, status=status)
            settled.append(outcome)
        return settled


def line(outcome: Outcome) -> str:
    """A case for the person who watches."""
    what = "same tokens" if outcome.same else "DIFFERENT"
    if outcome.error:
        what = outcome.error
    missed = "" if outcome.struck else ", the strike came too late"
    left = "" if outcome.status is None else f", exit {outcome.status}"
    silent = f"stall {outcome.stall_s:.2f} s, {outcome.mends} mends"
    return f"{outcome.case}: {what}, {silent}{missed}{left}"


def figures(matrix: Matrix) -> dict[str, Any]:
    """Shares, stalls, and what failed."""
    found = matrix.outcomes
    stalls = [item.stall_s for item in found]
    left = [item.status for item in found if item.status is not None]
    same = sum(item.same for item in found)
    return {
        "runs": len(found),
        "same_tokens": same,
        "struck_in_phase": sum(item.struck for item in found),
        "stall_p50_s": quantile(stalls, 0.5),
        "stall_p95_s": quantile(stalls, 0.95),
        "stall_max_s": max(stalls, default=0.0),
        **dict(_by("signal", found, SIGNALS)),
        **dict(_by("phase", found, PHASES)),
        "undisturbed_longest_gap_s": max(n.longest_s for n in matrix.normal.values()),
        "undisturbed_gap_s": quantile([n.gap_s for n in matrix.normal.values()], 0.5),
        "prefill_first_s": max(n.first_s for n in matrix.normal.values()),
        "terminated_with_0": left.count(0),
        "terminated": len(left),
        "failed": [line(item) for item in found if not item.same],
        "met": same == len(found)
        and quantile(stalls, 0.95) <= STALL_P95_S
        and max(stalls, default=0.0) <= STALL_MAX_S,
    }


def _by(name: str, found: list[Outcome], values: Collection[str]) -> Iterator[tuple[str, float]]:
    for value in values:
        stalls = [item.stall_s for item in found if getattr(item.case, name) == value]
        if stalls:
            yield f"stall_p95_s_{value.lower()}", quantile(stalls, 0.95)
            yield f"stall_max_s_{value.lower()}", max(stalls)
