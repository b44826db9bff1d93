"""What names of prompts are worth: time to the first token with and without, on three real peers.

Each round draws a system prompt that nobody has seen, and two clients of one swarm, one that names
its prompts (`hexswarm.prefix`) and one that does not, take turns with the same requests:

    first     system prompt and question: nothing is known
    question  the same system prompt and another question, in a new session
    talk      the whole talk so far, its answer included, and a third question, in a new session

Who goes first alternates. Ratios are taken within a round; the answers of both must be equal.

    python benchmarks/prefix.py                     # the figures; last line is one JSON object
    python benchmarks/prefix.py --system 2048 --rounds 5
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import platform
import random
import statistics
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from hexswarm.client import AsyncClient, Completion
from hexswarm.config import DEFAULT_MODEL, cache
from hexswarm.demo import LocalSwarm
from hexswarm.store import resolve

KINDS = ("first", "question", "talk")
QUESTION = 24
"""Tokens of a question."""


def spans(layers: int) -> list[str]:
    """Three spans as equal as can be."""
    edges = [layers * n // 3 for n in range(4)]
    return [f"{first}:{end}" for first, end in itertools.pairwise(edges)]


async def ask(client: AsyncClient, ids: list[int], tokens: int) -> Completion:
    """An answer, after which the stages have heard that it is over."""
    answer = await client.generate(ids, max_new_tokens=tokens)
    await client._tracer.settle()
    return answer


async def requests(
    client: AsyncClient, system: list[int], questions: list[list[int]], tokens: int
) -> dict[str, Completion]:
    """The three of a round, each in its own session."""
    first = await ask(client, [*system, *questions[0]], tokens)
    question = await ask(client, [*system, *questions[1]], tokens)
    talk = [*system, *questions[1], *question.ids, *questions[2]]
    return dict(zip(KINDS, (first, question, await ask(client, talk, tokens)), strict=True))


async def compare(
    named: AsyncClient, plain: AsyncClient, flags: argparse.Namespace
) -> dict[str, float]:
    """Medians over rounds of both, and of their ratios."""
    rng, rows = random.Random(flags.seed), list[dict[str, float]]()
    vocabulary = named.folder.spec.vocabulary

    def words(count: int) -> list[int]:
        return [rng.randrange(100, vocabulary) for _ in range(count)]

    for number in range(flags.rounds + 1):
        system, questions = words(flags.system), [words(QUESTION) for _ in range(3)]
        pair = [("with", named), ("without", plain)]
        done = {}
        for name, client in pair if number % 2 else pair[::-1]:
            done[name] = await requests(client, system, questions, flags.tokens)
        if not number:
            continue  # the first one warms everything
        row = {"equal": float(all(done["with"][k].ids == done["without"][k].ids for k in KINDS))}
        for kind in KINDS:
            one, other = done["with"][kind], done["without"][kind]
            row[f"{kind}_s"], row[f"{kind}_without_s"] = one.ttft_s, other.ttft_s
            row[f"{kind}_ratio"] = one.ttft_s / other.ttft_s
            row[f"{kind}_reused"] = one.reused_tokens
            if one.tpot_s and other.tpot_s:
                row[f"{kind}_tpot_ratio"] = one.tpot_s / other.tpot_s
        rows.append(row)
        print(
            f"round {number}/{flags.rounds}:",
            *(f"{k} {row[f'{k}_s']:.3f} against {row[f'{k}_without_s']:.3f} s," for k in KINDS),
            "equal" if row["equal"] else "DIFFERENT",
            flush=True,
        )
    figures = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    figures["equal"] = statistics.mean(row["equal"] for row in rows)
    for kind in KINDS[1:]:
        ratios = sorted(row[f"{kind}_ratio"] for row in rows)
        figures[f"{kind}_ratio_least"], figures[f"{kind}_ratio_most"] = ratios[0], ratios[-1]
    return figures


async def measure(flags: argparse.Namespace) -> dict[str, Any]:
    cut = spans(resolve(flags.model, home=cache()).spec.layers)
    extra = ("--device", flags.device, "--dtype", flags.dtype)
    with LocalSwarm(cut, model=flags.model, threads=1, extra=extra) as local:
        homes = [local.home / name for name in ("with", "without")]
        async with (
            AsyncClient(local.bootstrap, model=flags.model, home=homes[0]) as named,
            AsyncClient(local.bootstrap, model=flags.model, home=homes[1]) as plain,
        ):
            plain._runtime.secret = b""
            return await compare(named, plain, flags)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--system", type=int, default=512, help="tokens of the system prompt")
    parser.add_argument("--tokens", type=int, default=40, help="of an answer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    flags = parser.parse_args()
    figures = asyncio.run(measure(flags))
    figures["load_average"] = os.getloadavg()[0]
    figures["machine"] = f"{platform.machine()}, {os.cpu_count()} cores"
    rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in figures.items()}
    for name, value in rounded.items():
        print(f"{name:24} {value}")
    print(json.dumps(rounded))


if __name__ == "__main__":
    main()
