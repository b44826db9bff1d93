"""Every kernel on a GPU: first against float64, then against the floor of the card.

    python benchmarks/kernels_gpu.py            # all, about two minutes on an H100
    python benchmarks/kernels_gpu.py --only int4 sample

Checks draw fresh inputs at each run and fill outputs with NaN before. Times are medians by CUDA
events of graphs that hold several launches, through several sets of inputs that together are larger
than the second-level cache. "of the ceiling" is bytes over the bandwidth, or operations over the
rate of a large matrix product, both measured here. The last line is one JSON object. `--device cpu`
checks the script itself on tiny shapes (with TRITON_INTERPRET=1); it times nothing of worth.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from kernels_gpu_checks import CHECKS
from kernels_gpu_shapes import Case, cases

REPEATS = 9
CACHE_BYTES = 64 << 20
"""What sets of inputs must exceed together."""


@dataclass(slots=True)
class Report:
    """Figures as they come, on the screen and for the last line."""

    device: str
    read_tb_s: float
    matrix_tflops: float
    torch: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def add(self, case: Case, took_s: float) -> None:
        """One row of the table."""
        floor_s = max(
            case.read_bytes / (self.read_tb_s * 1e12), case.operations / self.matrix_tflops / 1e12
        )
        row = {
            "kernel": case.kernel,
            "shape": case.shape,
            "us": round(took_s * 1e6, 2),
            "of_ceiling": round(floor_s / took_s, 3),
        }
        if case.operations:
            row["tflops"] = round(case.operations / took_s / 1e12, 1)
        self.rows.append(row)
        rate = f"{row['tflops']:6.0f} TFLOP/s" if case.operations else " " * 14
        print(f"{case.kernel:22} {case.shape:42} {row['us']:10.2f} us {row['of_ceiling']:7.1%} "
              f"{rate}", flush=True)  # fmt: skip


def medians(runs: Sequence[Callable[[], Any]], device: str) -> float:
    """Seconds of one launch: the median over replays of a graph that goes through all `runs`."""
    for run in runs:
        run()
    if device == "cpu":
        began = time.perf_counter()
        runs[0]()
        return time.perf_counter() - began
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    rounds = max(1, 8 // len(runs))
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for run in runs:
                run()
    graph.replay()
    times = []
    for _ in range(REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times) / (rounds * len(runs))


def ceilings(device: str) -> tuple[float, float]:
    """Bytes read and operations of a matrix product per second, in TB and TFLOP."""
    size = 1 << (29 if device != "cpu" else 16)
    x = torch.randn(size, device=device)
    ways = (lambda: x.sum(), lambda: x.amax(), lambda: torch.linalg.vector_norm(x))
    read = x.nbytes / min(medians([way], device) for way in ways)
    side = 8192 if device != "cpu" else 64
    a, b = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    return read / 1e12, 2 * side**3 / medians([lambda: torch.mm(a, b)], device) / 1e12


def sets(case: Case, device: str) -> list[Callable[[], Any]]:
    """The case's launch with as many sets of inputs as the cache cannot hold."""
    first = case.make()
    if device == "cpu":
        return [first]
    count = min(max(-(-CACHE_BYTES // max(case.read_bytes, 1)), 1), 8)
    return [first, *(case.make() for _ in range(count - 1))]


def wanted(given: argparse.Namespace, kernel: str) -> bool:
    """Was this asked for?"""
    return not given.only or any(word in kernel for word in given.only)


def warm(given: argparse.Namespace, part: int, parts: int) -> None:
    """Run each thing once in a process of its own, so that Triton's cache on disk has it."""
    checks = [check for kernel, check in CHECKS.items() if wanted(given, kernel)]
    for at, check in enumerate(checks):
        if at % parts == part:
            with contextlib.suppress(Exception):  # it shows again, and is told, where it counts
                check(given.device)
    timed = [] if given.check else cases(given.device)
    for at, case in enumerate(case for case in timed if wanted(given, case.kernel)):
        if at % parts == part:
            with contextlib.suppress(Exception), torch.inference_mode():
                case.make()()
                torch.cuda.empty_cache()


def compile_all(given: argparse.Namespace) -> float:
    """Compile on many processors at a time; seconds."""
    began, workers = time.perf_counter(), given.workers
    command = [sys.executable, str(Path(__file__)), *sys.argv[1:], "--warm"]
    started = [subprocess.Popen([*command, f"{i}/{workers}"]) for i in range(workers)]
    try:
        for process in started:
            process.wait(timeout=120)
    except subprocess.TimeoutExpired:
        print("compiling ahead took too long", flush=True)
    finally:
        for process in started:
            process.kill()
            process.wait()
    return time.perf_counter() - began


def main(given: argparse.Namespace) -> None:
    """Check, then time."""
    device = given.device
    seed = time.time_ns() % (1 << 31)
    torch.manual_seed(seed)
    random.seed(seed)
    if given.warm:
        part, parts = map(int, given.warm.split("/"))
        warm(given, part, parts)
        return
    if given.workers and device != "cpu":
        print(f"compiled in {compile_all(given):.0f} s; seed {seed}", flush=True)
    read, matrix = ceilings(device)
    name = torch.cuda.get_device_name() if device != "cpu" else "cpu"
    report = Report(name, read, matrix, torch.__version__)
    print(f"{name}: reads {read:.3f} TB/s, multiplies {matrix:.0f} TFLOP/s", flush=True)
    began = time.perf_counter()

    for kernel, check in CHECKS.items():
        errors = check(device) if wanted(given, kernel) else []
        if not errors:
            continue
        for what, error, bound in errors:
            if not error <= bound:
                report.failed.append(f"{kernel}: {what}: {error:.2e} > {bound:g}")
        worst = max(errors, key=lambda found: found[1] / max(found[2], 1e-30))
        print(f"checked {kernel:42} {len(errors):3} cases, worst {worst[0]}: {worst[1]:.1e} "
              f"(bound {worst[2]:g})", flush=True)  # fmt: skip
    print(f"checks took {time.perf_counter() - began:.0f} s; FAILED: {report.failed or 'none'}")
    if not given.check:
        for case in cases(device, tiny=device == "cpu"):
            if wanted(given, case.kernel):
                _time(case, report, device)
    took_s = round(time.perf_counter() - began, 1)
    print(json.dumps({**asdict(report), "took_s": took_s}))


def _time(case: Case, report: Report, device: str) -> None:
    try:
        with torch.inference_mode():
            report.add(case, medians(sets(case, device), device))
    except Exception as error:  # a variant that does not fit the card must not end the table
        report.failed.append(f"{case.kernel} {case.shape}: {type(error).__name__}: {error}"[:300])
        print(f"{case.kernel:22} {case.shape:42} {type(error).__name__}", flush=True)
    if device != "cpu":
        torch.cuda.empty_cache()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", nargs="*", default=[], help="kernels whose name holds a word")
    parser.add_argument("--workers", type=int, default=10, help="processes that compile ahead")
    parser.add_argument("--warm", default="", help="of such a process: which part of how many")
    parser.add_argument("--check", action="store_true", help="do not time")
    main(parser.parse_args())
