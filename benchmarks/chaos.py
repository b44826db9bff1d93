"""What happens to answers when real peers die: the kill matrix, churn, restarts, overload.

Six peers (three stages of the default model, two replicas each, one thread each) as processes on
this machine, a client in this process, and somebody who kills.

    python benchmarks/chaos.py matrix            # 81 cases: stage x phase x signal x seed
    python benchmarks/chaos.py matrix --only stage=1,phase=early,signal=KILL --seeds 1
    python benchmarks/chaos.py loop              # kill -9 of a random peer every 10 s for 10 min
    python benchmarks/chaos.py rolling           # SIGTERM of every peer in turn, 50 sessions
    python benchmarks/chaos.py bootstraps        # every bootstrap dead for 10 min, then a newcomer
    python benchmarks/chaos.py load              # 1,000 sessions at once, three rounds
    python benchmarks/chaos.py all

On a GPU, which all peers share, with a model of more weight (`random_model.py`):

    python benchmarks/chaos.py matrix --device cuda --model FOLDER

`met` says whether a part reached its bars, which its module names (`chaos_matrix.py`,
`chaos_soak.py`, `chaos_load.py`). Progress goes to stderr; the last line is one JSON object. Every
process is ended by its id, also on failure. Stalls include the computing of what is replayed, and
on two cores the other stages, the client and six daemons share them: look at `load_average`.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Collection, Coroutine, Mapping
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import chaos_load
import chaos_soak
from chaos_figures import rounded
from chaos_matrix import Matrix, cases, figures
from chaos_swarm import Replicas
from tqdm import tqdm

from hexswarm.config import DEFAULT_MODEL, cache
from hexswarm.demo import ProcessFailed
from hexswarm.errors import HexswarmError
from hexswarm.store import resolve

STAGES = 3
REPLICAS = 2
KV_TOKENS = 16384
LOAD_KV_TOKENS = 9600
"""Room for 600 sessions of one block each."""
AXES = ("stage", "phase", "signal", "seed")

Said = Callable[[str], None]
Part = Callable[[argparse.Namespace], dict[str, Any]]


def swarm_of(flags: argparse.Namespace, *, replicas: int = REPLICAS, **more: Any) -> Replicas:
    layers = resolve(flags.model, home=cache()).spec.layers
    edges = [layers * number // STAGES for number in range(STAGES + 1)]
    spans = [f"{first}:{end}" for first, end in itertools.pairwise(edges)]
    kv_tokens = str(more.pop("kv_tokens", KV_TOKENS))
    extra = ("--kv-tokens", kv_tokens, "--device", flags.device, "--dtype", flags.dtype)
    return Replicas(spans, replicas, model=flags.model, extra=extra, **more)


class Progress:
    """A bar on a terminal and a line for each step."""

    def __init__(self, name: str, total: int | None) -> None:
        self._began_s = time.monotonic()
        self._bar = tqdm(total=total, desc=name, file=sys.stderr, disable=None)

    def __call__(self, text: str) -> None:
        self._bar.update()
        tqdm.write(f"{time.monotonic() - self._began_s:6.1f} s  {text}", file=sys.stderr)

    def close(self) -> None:
        self._bar.close()


def carry_out(
    name: str,
    swarm: Replicas,
    work: Callable[[Said], Coroutine[Any, Any, dict[str, Any]]],
    total: int | None = None,
) -> dict[str, Any]:
    """Start the swarm, let `work` do its worst, end the swarm."""
    began_s, said = time.monotonic(), Progress(name, total)
    try:
        with swarm:
            found = asyncio.run(work(said))
    finally:
        said.close()
    return {**found, "whole_s": time.monotonic() - began_s, "load_average": os.getloadavg()[0]}


# --- parts ----------------------------------------------------------------------------------------


def matrix(flags: argparse.Namespace) -> dict[str, Any]:
    batches = cases(STAGES, flags.seeds, flags.only)

    async def work(said: Said) -> dict[str, Any]:
        course = Matrix(swarm)
        await course.run(batches, said)
        return figures(course)

    swarm = swarm_of(flags)
    return carry_out("matrix", swarm, work, sum(map(len, batches)))


def loop(flags: argparse.Namespace) -> dict[str, Any]:
    swarm, sessions = swarm_of(flags), flags.sessions or 8

    async def work(said: Said) -> dict[str, Any]:
        return await chaos_soak.loop(swarm, flags.minutes, flags.every, sessions, flags.seed, said)

    return carry_out("loop", swarm, work, int(flags.minutes * 60 / flags.every))


def rolling(flags: argparse.Namespace) -> dict[str, Any]:
    swarm, sessions = swarm_of(flags), flags.sessions or 50

    async def work(said: Said) -> dict[str, Any]:
        return await chaos_soak.rolling(swarm, sessions, said)

    return carry_out("rolling", swarm, work, STAGES * REPLICAS)


def bootstraps(flags: argparse.Namespace) -> dict[str, Any]:
    swarm, sessions = swarm_of(flags, replicas=1, seeds=2), flags.sessions or 2

    async def work(said: Said) -> dict[str, Any]:
        return await chaos_soak.bootstraps(swarm, flags.minutes, sessions, said)

    return carry_out("bootstraps", swarm, work, int(flags.minutes * 12))


def load(flags: argparse.Namespace) -> dict[str, Any]:
    swarm, sessions = swarm_of(flags, replicas=1, kv_tokens=LOAD_KV_TOKENS), flags.sessions or 1000

    async def work(said: Said) -> dict[str, Any]:
        return await chaos_load.load(swarm, sessions, 3, said)

    return carry_out("load", swarm, work, 3)


PARTS: Mapping[str, Part] = {
    "matrix": matrix,
    "loop": loop,
    "rolling": rolling,
    "bootstraps": bootstraps,
    "load": load,
}


# --- the command ----------------------------------------------------------------------------------


def choice(text: str) -> dict[str, Collection[str]]:
    """`stage=1,phase=early,phase=late` as the values to keep of each axis."""
    found: dict[str, set[str]] = {}
    for word in text.split(","):
        name, _, value = word.partition("=")
        if name not in AXES or not value:
            raise argparse.ArgumentTypeError(f"{word!r} is not {'|'.join(AXES)}=VALUE")
        found.setdefault(name, set()).add(value)
    return found


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    made.add_argument("part", nargs="+", choices=[*PARTS, "all"])
    made.add_argument("--model", default=DEFAULT_MODEL)
    made.add_argument("--device", default="cpu", help="of the peers")
    made.add_argument("--dtype", default="float32", help="of the peers: others may break ties")
    made.add_argument("--seeds", type=int, default=3, help="matrix: how many")
    made.add_argument(
        "--only", type=choice, default={}, metavar="AXIS=VALUE,...", help="matrix: these cases"
    )
    made.add_argument("--minutes", type=float, default=10.0, help="loop, bootstraps: how long")
    made.add_argument("--every", type=float, default=10.0, help="loop: seconds between two kills")
    made.add_argument("--seed", type=int, default=0, help="loop: who is killed")
    made.add_argument(
        "--sessions",
        type=int,
        default=0,
        help="at once (loop 8, rolling 50, bootstraps 2, load 1000)",
    )
    return made


def main() -> None:
    flags = parser().parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # not without ending the peers
    names = list(PARTS) if "all" in flags.part else flags.part
    found: dict[str, Any] = {}
    for name in names:
        try:
            found[name] = PARTS[name](flags)
        except ProcessFailed as error:  # of one part; the others start a swarm of their own
            found[name] = {"met": False, "error": str(error)}
    found["met"] = all(part["met"] for part in found.values())
    found["machine"] = f"{platform.machine()}, {os.cpu_count()} cores"
    print(json.dumps(rounded(found)))


if __name__ == "__main__":
    try:
        main()
    except HexswarmError as problem:
        sys.exit(f"chaos.py: {problem}")
