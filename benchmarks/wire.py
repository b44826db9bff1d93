"""What the wire adds to a token at each hop: bytes beside the hidden state, and microseconds.

    python benchmarks/wire.py [--repeats 5] [--hidden 576 4096]

Bytes are exact: a frame of `Hidden` (stage to stage) or `Tokens` (tail to head) minus the payload
that the model itself needs. Two sessions are shown: a young one with small numbers, and the longest
that the schema allows. Times are of one frame packed, or decoded as it comes from a stream, in one
thread; the median of the repeats, each of 2,000 frames. The last line is one JSON object:
`wire_overhead_bytes` is the larger of both messages in a usual session (position 4,000).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

from hexswarm.messages import MAX_TOKENS, Hidden, Message, Tokens
from hexswarm.wire import FrameDecoder, pack

FRAMES = 2000
KEY = os.urandom(16)


@dataclass(frozen=True, slots=True)
class Case:
    """A message as a session of some age sends it."""

    name: str
    message: Message
    payload: int
    """Bytes that the model needs."""


def cases(hidden: int) -> list[Case]:
    """Both messages of the ring, young, usual and extreme."""
    top = 1 << 16
    ages = {"young": (0, 0, 40), "usual": (0, 3, 4000), "extreme": (top, top, MAX_TOKENS)}
    made = []
    for age, (epoch, turn, position) in ages.items():
        siblings = top if age == "extreme" else 0
        step = Hidden(KEY, epoch, turn, position, 1, True, "bfloat16", siblings)
        made.append(Case(f"Hidden {age}", step, 2 * hidden))
        token = Tokens(KEY, epoch, turn, position, True, siblings)
        made.append(Case(f"Tokens {age}", token, 4))
    return made


def overhead(case: Case) -> int:
    """Bytes of the frame that are not the model's."""
    return sum(map(len, pack(case.message, bytes(case.payload)))) - case.payload


def each_us(work: Callable[[], None], repeats: int) -> float:
    """Median microseconds of one of the FRAMES that `work` does."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        times.append((time.perf_counter() - began) / FRAMES * 1e6)
    return statistics.median(times)


def pack_us(case: Case, repeats: int) -> float:
    payload = bytes(case.payload)

    def work() -> None:
        for _ in range(FRAMES):
            pack(case.message, payload)

    return each_us(work, repeats)


def decode_us(case: Case, repeats: int) -> float:
    data = b"".join(pack(case.message, bytes(case.payload)))
    decoder = FrameDecoder()

    def work() -> None:
        for _ in range(FRAMES):
            decoder.feed(data, 0.0)

    return each_us(work, repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description="bytes and time that the wire adds to a token")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--hidden", type=int, nargs="+", default=[576, 4096])
    flags = parser.parse_args()
    usual: list[int] = []
    times: dict[str, float] = {}
    for hidden in flags.hidden:
        print(f"hidden size {hidden}, bfloat16: {2 * hidden} bytes of activations a token and hop")
        for case in cases(hidden):
            added = overhead(case)
            packed, decoded = pack_us(case, flags.repeats), decode_us(case, flags.repeats)
            print(
                f"  {case.name:<15} + {added:3} bytes ({added / case.payload:7.2%})"
                f"   pack {packed:5.2f} us   decode {decoded:5.2f} us"
            )
            if case.name.endswith("usual"):
                usual.append(added)
            if case.name == "Hidden usual":
                times = {"pack_us": round(packed, 2), "decode_us": round(decoded, 2)}
    print(json.dumps({"wire_overhead_bytes": max(usual), **times}))


if __name__ == "__main__":
    main()
