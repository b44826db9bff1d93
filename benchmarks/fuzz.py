"""A million malformed inputs, and an honest session in between that must not notice.

    python benchmarks/fuzz.py --inputs 1000000 --seed 1

Valid frames, messages, directory records, DHT dictionaries, weight files and chat templates are
mutated and handed to our decoders; what still decodes as a message is said to a real stage by a
stranger, by a neighbour of somebody else's session and by a client of the same stage, under names
of sessions that are not theirs. An input *crashes* if anything but a typed error comes out. It is
*slow* above 50 ms, in the best of four runs, since a shared machine stalls by itself. (A chat
template is a program, rendered in a process of its own; it is held to the 2 s of that.) An honest
client's sessions on the same stage are compared with the exact answer after each block, and the
KV accounting with the sum of the leases.

The same seed gives the same inputs. A crash prints its target and the input; put it into the tests.
The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fuzz_control import Control, Harmed
from fuzz_targets import Call, Target, decoders, files, templates
from tqdm import tqdm

from hexswarm.errors import HexswarmError
from hexswarm.templates import Templates

BLOCK = 1000
"""Inputs between two looks at the honest session."""
STAGE_WEIGHT = 13


@dataclass
class Outcome:
    """What was seen."""

    inputs: int = 0
    accepted: int = 0
    crashes: list[str] = field(default_factory=list)
    slow: list[str] = field(default_factory=list)
    slowest_s: dict[str, float] = field(default_factory=dict)
    """By target."""
    looks: int = 0
    by_target: Counter[str] = field(default_factory=Counter)

    def one(self, target: Target, call: Call, data: bytes) -> None:
        """Run an input, and run it again if it was slow."""
        self.inputs += 1
        self.by_target[target.name] += 1
        took_s = self._timed(target, call, data)
        for _ in range(3 if took_s > target.limit_s else 0):
            took_s = min(took_s, self._timed(target, call, data, again=True))
        if took_s > target.limit_s:
            self.slow.append(f"{target.name}: {took_s * 1e3:.0f} ms for {data[:400].hex()}")
        if took_s > self.slowest_s.get(target.name, 0.0):
            self.slowest_s[target.name] = took_s

    def _timed(self, target: Target, call: Call, data: bytes, *, again: bool = False) -> float:
        began_s = time.perf_counter()
        try:
            accepted = call()
        except Exception as error:
            if not again:
                self.crashes.append(f"{target.name}: {error!r} for {data[:4000].hex()}")
            return time.perf_counter() - began_s
        took_s = time.perf_counter() - began_s
        self.accepted += accepted and not again
        return took_s


def fuzz(inputs: int, seed: int, bar: Any = None, names: Sequence[str] = ()) -> Outcome:
    """Run so many inputs; `names` are the targets, all if empty."""
    outcome, renderer = Outcome(), Templates()
    memory = Path("/dev/shm")
    parent = memory if memory.is_dir() else None
    try:
        with tempfile.TemporaryDirectory(prefix="hexswarm-fuzz-", dir=parent) as folder:
            renderer.render("", {})  # its start is not an input's time
            fixed = [*decoders(), *files(Path(folder)), templates(renderer)]
            for first in range(0, inputs, BLOCK):
                count = min(BLOCK, inputs - first)
                _block(outcome, fixed, count, f"{seed}/{first // BLOCK}", names)
                if bar is not None:
                    bar.update(count)
    finally:
        renderer.close()
    return outcome


def _block(
    outcome: Outcome, fixed: list[Target], count: int, seed: str, names: Sequence[str]
) -> None:
    """Inputs from a generator of their own, and a look at the honest session after them."""
    rng = random.Random(seed)
    control = Control(rng.randrange(1 << 30))
    stage = Target("stage", STAGE_WEIGHT, control.make)
    targets = [t for t in (*fixed, stage) if not names or t.name in names]
    chosen = rng.choices(targets, [target.weight for target in targets], k=count)
    for number, target in enumerate(chosen):
        call, data = target.make(rng)
        outcome.one(target, call, data)
        if number % 100 == 99 or number == count - 1:
            try:
                control.look()
                outcome.looks += 1
            except (Harmed, HexswarmError, AssertionError) as error:
                outcome.crashes.append(f"control session in block {seed}: {error!r}")
                return


def main() -> None:
    parser = argparse.ArgumentParser(description="malformed inputs for every decoder")
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", nargs="*", default=[], help="names of targets")
    flags = parser.parse_args()
    began_s = time.monotonic()
    with tqdm(total=flags.inputs, desc="inputs", file=sys.stderr, disable=None) as bar:
        outcome = fuzz(flags.inputs, flags.seed, bar, flags.only)
    for line in (*outcome.crashes[:20], *outcome.slow[:20]):
        print(line)
    print(", ".join(f"{name} {count}" for name, count in outcome.by_target.most_common()))
    template_ms = round(outcome.slowest_s.pop("template", 0.0) * 1e3, 2)
    slowest_ms = round(max(outcome.slowest_s.values(), default=0.0) * 1e3, 2)
    figures = {
        "inputs": outcome.inputs,
        "seed": flags.seed,
        "crashes": len(outcome.crashes),
        "slow": len(outcome.slow),
        "slowest_ms": slowest_ms,
        "template_ms": template_ms,
        "accepted": outcome.accepted,
        "control_answers_exact": outcome.looks,
        "seconds": round(time.monotonic() - began_s, 1),
    }
    print(json.dumps(figures))
    sys.exit(bool(outcome.crashes or outcome.slow))


if __name__ == "__main__":
    main()
