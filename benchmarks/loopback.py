"""A ring of three real peers on loopback against plain transformers, in one interleaved run.

Every round measures plain transformers (this process, one thread), then one stream through the
swarm, then four at once, on the same prompt; ratios are taken within a round and reported as
medians, so that a noisy machine cancels out. CPU seconds are those of all processes: peers,
bootstrap, their libp2p daemons, and this process as the client.

    python benchmarks/loopback.py                 # the figures; last line is one JSON object
    python benchmarks/loopback.py --equal         # also: greedy tokens of 20 prompts are equal
    python benchmarks/loopback.py --soak          # also: 200 sessions in a row, then 50 at once
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import psutil
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hexswarm.client import AsyncClient, Completion
from hexswarm.config import DEFAULT_MODEL, cache
from hexswarm.demo import LocalSwarm
from hexswarm.messages import Hidden
from hexswarm.store import resolve
from hexswarm.wire import pack

TOKENS = 64

SUBJECTS = (
    "the history of the lighthouse",
    "how bread is baked",
    "why the sky is blue",
    "the life of a river",
    "how a bicycle stays upright",
    "the rules of chess",
    "what a database index is",
    "the seasons of the year",
    "how to plant a tree",
    "the water cycle",
    "what makes a good story",
    "the invention of paper",
    "how a computer adds numbers",
    "the planets of the solar system",
    "the work of a librarian",
    "how sound travels",
    "the use of the compass",
    "why leaves change their colour",
    "the first railways",
    "how honey is made",
)


def spans(layers: int) -> list[str]:
    """Three spans as equal as can be."""
    edges = [layers * n // 3 for n in range(4)]
    return [f"{first}:{end}" for first, end in itertools.pairwise(edges)]


def chat(subject: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"Explain in a long and detailed text {subject}."}]


@dataclass(frozen=True)
class Run:
    """One answer: ids, seconds to the first token, tokens/s after it, CPU seconds a token."""

    ids: list[int]
    ttft_s: float
    rate: float
    cpu_s: float
    wall_s: float


class Stopwatch:
    """A transformers streamer that notes when each token came."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._prompt = True

    def put(self, value: Any) -> None:
        if self._prompt:
            self._prompt = False
            return
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


class Plain:
    """transformers, as its users run it: `generate`, greedy, one thread."""

    def __init__(self, folder: Any, device: str = "cpu", dtype: str = "float32") -> None:
        torch.set_num_threads(1)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
        self.model = model.to(device).eval()

    def run(self, messages: list[dict[str, str]], tokens: int = TOKENS) -> Run:
        text = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        cpu_s, began_s = time.process_time(), time.perf_counter()
        inputs = self.tokenizer(text, return_tensors="pt", add_special_tokens=False)
        inputs = inputs.to(self.model.device)
        watch = Stopwatch()
        with torch.inference_mode():
            out = self.model.generate(
                **inputs, max_new_tokens=tokens, do_sample=False, streamer=watch
            )
        ended_s = time.perf_counter()
        ids = out[0, inputs["input_ids"].shape[1] :].tolist()
        return Run(
            ids=ids,
            ttft_s=watch.times[0] - began_s,
            rate=(len(ids) - 1) / (watch.times[-1] - watch.times[0]),
            cpu_s=(time.process_time() - cpu_s) / len(ids),
            wall_s=ended_s - began_s,
        )


class Swarm:
    """The same through the swarm."""

    def __init__(self, swarm: LocalSwarm, client: AsyncClient) -> None:
        self.client = client
        self.processes = [psutil.Process(node.pid) for node in swarm.processes]
        self.processes += [kid for p in self.processes for kid in p.children(recursive=True)]
        self.processes += psutil.Process().children(recursive=True)
        self.processes = list({p.pid: p for p in self.processes}.values())

    def cpu_s(self) -> float:
        """CPU seconds so far of this process, the peers and all daemons."""
        total = time.process_time()
        for process in self.processes:
            times = process.cpu_times()
            total += times.user + times.system
        return total

    async def run(self, prompts: list[list[dict[str, str]]], tokens: int = TOKENS) -> list[Run]:
        """All prompts at once; CPU seconds are shared evenly."""
        cpu_s, began_s = self.cpu_s(), time.perf_counter()
        answers: list[Completion] = await asyncio.gather(
            *(self.client.generate(prompt, max_new_tokens=tokens) for prompt in prompts)
        )
        wall_s = time.perf_counter() - began_s
        cpu_s = (self.cpu_s() - cpu_s) / sum(len(answer.ids) for answer in answers)
        return [
            Run(list(answer.ids), answer.ttft_s, answer.tokens_per_s, cpu_s, wall_s)
            for answer in answers
        ]


async def compare(plain: Plain, swarm: Swarm, rounds: int) -> dict[str, Any]:
    """Ratios within each round; medians over the rounds."""
    rows: list[dict[str, float]] = []
    await swarm.run([chat(SUBJECTS[0])])
    plain.run(chat(SUBJECTS[0]))
    for number in range(rounds):
        first = SUBJECTS[number % len(SUBJECTS)]
        four = [chat(SUBJECTS[(number + n) % len(SUBJECTS)]) for n in range(4)]
        base = plain.run(chat(first))
        (one,) = await swarm.run([chat(first)])
        many = await swarm.run(four)
        summed = sum(len(run.ids) for run in many) / many[0].wall_s
        rows.append(
            {
                "plain_tokens_s": base.rate,
                "swarm_tokens_s": one.rate,
                "plain_ttft_s": base.ttft_s,
                "swarm_ttft_s": one.ttft_s,
                "plain_cpu_s": base.cpu_s,
                "swarm_cpu_s": one.cpu_s,
                "swarm_cpu_4_s": many[0].cpu_s,
                "swarm_tokens_4_s": summed,
                "decode_ratio": one.rate / base.rate,
                "ttft_ratio": one.ttft_s / base.ttft_s,
                "cpu_ratio": one.cpu_s / base.cpu_s,
                "cpu_ratio_4": many[0].cpu_s / one.cpu_s,
                "aggregate_ratio_4": summed / (len(base.ids) / base.wall_s),
                "equal": float(one.ids == base.ids),
            }
        )
        print(
            f"round {number + 1}/{rounds}: decode {one.rate:.1f} against {base.rate:.1f} tokens/s, "
            f"first token {one.ttft_s * 1e3:.0f} against {base.ttft_s * 1e3:.0f} ms, "
            f"cpu {one.cpu_s * 1e3:.1f} against {base.cpu_s * 1e3:.1f} ms/token, "
            f"four: {summed:.1f} tokens/s, {many[0].cpu_s * 1e3:.1f} ms/token",
            flush=True,
        )
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]}


async def equal(plain: Plain, swarm: Swarm) -> dict[str, int]:
    """Greedy answers to 20 chat prompts."""
    same = 0
    for subject in SUBJECTS:
        (answer,) = await swarm.run([chat(subject)])
        base = plain.run(chat(subject)).ids
        same += answer.ids == base
        print(f"{'equal' if answer.ids == base else 'DIFFERENT'}: {subject}", flush=True)
    return {"equal_prompts": same, "prompts": len(SUBJECTS)}


async def soak(swarm: Swarm, in_a_row: int = 200, at_once: int = 50) -> dict[str, Any]:
    """Many sessions through one client: all answered, memory flat."""

    def resident() -> list[int]:
        gc.collect()
        own = psutil.Process().memory_info().rss
        return [own, *(process.memory_info().rss for process in swarm.processes)]

    def grown(since: list[int], now: list[int]) -> float:
        return max((b - a) / 2**20 for a, b in zip(since, now, strict=True))

    began_s = time.perf_counter()
    errors = 0
    marks = []
    for number in range(in_a_row):
        (run,) = await swarm.run([chat(SUBJECTS[number % len(SUBJECTS)])], tokens=8)
        errors += len(run.ids) != 8
        if number in (in_a_row // 4, in_a_row - 1):
            marks.append(resident())
    print(f"{in_a_row} in a row: {time.perf_counter() - began_s:.0f} s", flush=True)
    runs = await swarm.run([chat(SUBJECTS[n % len(SUBJECTS)]) for n in range(at_once)], tokens=8)
    errors += sum(len(run.ids) != 8 for run in runs)
    before = resident()
    runs = await swarm.run([chat(SUBJECTS[n % len(SUBJECTS)]) for n in range(at_once)], tokens=8)
    errors += sum(len(run.ids) != 8 for run in runs)
    view = await swarm.client.snapshot()
    return {
        "soak_sessions": in_a_row + 2 * at_once,
        "soak_errors": errors,
        "soak_growth_mib": round(grown(*marks), 1),
        "soak_growth_at_once_mib": round(grown(before, resident()), 1),
        "soak_peers": len(view.announcements),
    }


def wire_overhead(hidden: int) -> int:
    """Bytes of a decode frame beyond the hidden state itself."""
    message = Hidden(bytes(16), 1, 1, 4096, 1, True, "float32", 3)
    return sum(map(len, pack(message, bytes(hidden * 4)))) - hidden * 4


async def measure(flags: argparse.Namespace) -> dict[str, Any]:
    folder = resolve(flags.model, home=cache())
    plain = Plain(folder.path, flags.device, flags.dtype)
    extra = ("--device", flags.device, "--dtype", flags.peer_dtype or flags.dtype)
    cut, threads = spans(folder.spec.layers), flags.peer_threads
    with LocalSwarm(cut, model=flags.model, threads=threads, extra=extra) as local:
        home = local.home / "client"
        async with AsyncClient(local.bootstrap, model=flags.model, home=home) as client:
            swarm = Swarm(local, client)
            figures: dict[str, Any] = await compare(plain, swarm, flags.rounds)
            if flags.equal:
                figures |= await equal(plain, swarm)
            if flags.soak:
                figures |= await soak(swarm)
    figures["wire_overhead_bytes"] = wire_overhead(folder.spec.hidden)
    return figures


def import_ms() -> float:
    """Best of five of `import hexswarm` in a fresh interpreter, less an empty one."""

    def best(code: str) -> float:
        times = []
        for _ in range(5):
            began_s = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True)
            times.append(time.perf_counter() - began_s)
        return min(times)

    return (best("import hexswarm") - best("pass")) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--peer-dtype", help="of the peers alone; plain keeps --dtype")
    parser.add_argument("--peer-threads", type=int, default=1, help="0: as many as are of use")
    parser.add_argument("--equal", action="store_true")
    parser.add_argument("--soak", action="store_true")
    flags = parser.parse_args()
    figures = asyncio.run(measure(flags))
    figures["import_ms"] = import_ms()
    figures["load_average"] = os.getloadavg()[0]
    figures["machine"] = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
    rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in figures.items()}
    for name, value in rounded.items():
        print(f"{name:24} {value}")
    print(json.dumps(rounded))


if __name__ == "__main__":
    main()
