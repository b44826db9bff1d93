"""A real peer under many sessions against the bare engine, on one machine with a GPU.

    python benchmarks/daemon_gpu.py [--device cuda --shape 8b --layers 32 --sessions 64]
    python benchmarks/daemon_gpu.py --device cpu --shape tiny --layers 2 --sessions 8 --tokens 40

Writes a model with random weights to disk, starts `hexswarm bootstrap` and one `hexswarm peer` that
serves all of it on loopback, and lets several client processes hold all sessions at once, over the
real links; then one session alone. Tokens are counted by when they came to the clients, between the
moment when the last session has begun and the one when the first ends.

*Bare* is the same model in this process: a decode step of the layers, the LM head and the choice of
a token for as many rows with as many tokens cached, one after another without anybody between
(medians by CUDA events); `runner` is the same with rows and results on the host, waiting for each.
It also says how long the weights took from the disk's cache to the device (`startup_s`), and where
the peer's time went: share of the time in which the device had no batch (`idle`), microseconds of
the processor a token in the peer and in its libp2p daemon. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import psutil
from random_model import VOCABULARY, write_model

PROMPT, IN_A_ROW = 32, 6


# --- the bare engine ------------------------------------------------------------------------------


def bare(folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Start-up, and steps in this process."""
    import torch
    from engine_gpu import free, timed

    from hexswarm.kernels.ragged import ragged
    from hexswarm.peer.models.architecture import read_architecture
    from hexswarm.peer.runner import Runner
    from hexswarm.peer.shard import Shard
    from hexswarm.peer.steps import Batch, Row, TailPolicy
    from hexswarm.peer.weights import stream_span
    from hexswarm.records import Sampling, Span
    from hexswarm.store import resolve

    began = time.perf_counter()
    found = resolve(str(folder), home=Path(os.environ["HEXSWARM_CACHE"]))
    hashed_s = time.perf_counter() - began
    span, dtype = Span(0, given.layers), getattr(torch, given.dtype)
    began, a = time.perf_counter(), read_architecture(found.config)
    with stream_span(found, span, dtype=dtype, device=given.device) as tensors:
        shard = Shard(*(a, span, given.layers, tensors, given.dtype, given.device))
    read_s = time.perf_counter() - began
    length = PROMPT + given.tokens // 2
    each = -(-(length + 2) // 16)
    pool = shard.make_pool(each * given.sessions)
    if shard.backend == "triton":
        shard.warm(pool)
    startup_s = time.perf_counter() - began
    say(
        f"hashed in {hashed_s:.1f} s; read in {read_s:.1f} s, {shard.backend}, ready in "
        f"{startup_s:.1f} s"
    )
    runner, policy, report = Runner(shard, pool), TailPolicy(Sampling()), {}
    for count in sorted({1, given.sessions}):
        rows = [
            Row(bytes([n]), length, 1, [n], True, tuple(range(n * each, (n + 1) * each)))
            for n in range(count)
        ]
        batch = Batch(tuple(rows))
        policies = {row.session: policy for row in rows}
        for _ in range(3):
            assert not any(result.error for result in runner.run(batch, policies))
        times = []
        for _ in range(20):
            began = time.perf_counter()
            runner.run(batch, policies)
            times.append(time.perf_counter() - began)
        with torch.inference_mode():
            extents = [pool.extent(length, 1, row.blocks) for row in rows]
            laid = ragged(extents, shard.device)
            ids = torch.arange(count, device=given.device)
            steps = partial(_steps, shard, pool, laid, ids)
            step_s = timed(steps, given.device) / IN_A_ROW
        report[str(count)] = {
            "step_ms": round(step_s * 1e3, 3),
            "runner_ms": round(statistics.median(times) * 1e3, 3),
            "tokens_s": round(count / step_s, 1),
        }
        say(f"bare, {count} rows: {report[str(count)]}")
    del tensors, shard, pool, runner, steps
    gc.collect()
    free()
    return {"startup_s": round(startup_s, 1), "read_s": round(read_s, 1), "bare": report}


def _steps(shard: Any, pool: Any, batch: Any, ids: Any) -> None:
    """A token for each row, all on the device; so many that the device never waits for the host."""
    for _ in range(IN_A_ROW):
        shard.head(shard.forward(shard.embed(ids), batch, pool)).argmax(-1)


# --- clients --------------------------------------------------------------------------------------


async def client(address: str, model: str, home: str) -> None:
    """One JSON line each way: so many sessions of so many tokens; when each token came."""
    from hexswarm.client import AsyncClient

    async with AsyncClient([address], model=model, home=home) as own:
        say(json.dumps({"ready": True}))
        while line := await asyncio.to_thread(sys.stdin.readline):
            asked = json.loads(line)
            count, tokens = asked["sessions"], asked["tokens"]
            runs = (_session(own, asked["seed"] + n, tokens) for n in range(count))
            say(json.dumps(await asyncio.gather(*runs)))


async def _session(own: Any, seed: int, tokens: int) -> list[float]:
    """The moments at which its tokens came."""
    from hexswarm.instructions import Emit, Turn
    from hexswarm.options import Options
    from hexswarm.records import Sampling

    ids = [(seed * 31 + n * 7) % 200 + 1 for n in range(PROMPT)]
    session, _ = await own._open(ids, tokens, Options(max_new_tokens=tokens))
    times: list[float] = []
    try:
        known = len(session.machine.cached)
        session.generate(Turn(known, tuple(ids[known:]), tokens, Sampling(), ()))
        while len(times) < tokens:
            event = await session.wait()
            if isinstance(event, Emit) and event.token is not None:
                times.append(event.arrived_s)
    finally:
        session.close()
    return times


class Clients:
    """Processes that ask all at once."""

    def __init__(self, count: int, address: str, model: Path, home: Path) -> None:
        words = [sys.executable, __file__, "--client", address, str(model)]
        self._all = [
            subprocess.Popen(
                [*words, str(home / f"client-{n}")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for n in range(count)
        ]

    def ready(self) -> None:
        for process in self._all:
            _line(process)

    def ask(self, sessions: int, tokens: int) -> list[list[float]]:
        """Token times of every session."""
        each = [sessions // len(self._all)] * len(self._all)
        each[0] += sessions - sum(each)
        asked = [(p, n) for p, n in zip(self._all, each, strict=True) if n]
        for number, (process, count) in enumerate(asked):
            line = json.dumps({"sessions": count, "tokens": tokens, "seed": 100 * number})
            assert process.stdin is not None
            process.stdin.write(line + "\n")
            process.stdin.flush()
        return [times for process, _ in asked for times in _line(process)]

    def end(self) -> None:
        for process in self._all:
            assert process.stdin is not None
            process.stdin.close()
        for process in self._all:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _line(process: subprocess.Popen[str]) -> Any:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"a client ended with status {process.wait()}")
    return json.loads(line)


# --- the daemon -----------------------------------------------------------------------------------


def processor_s(process: psutil.Process) -> float:
    """Of a process, of all its threads."""
    times = process.cpu_times()
    return float(times.user + times.system)


def gauges(port: int) -> dict[str, float]:
    """The peer's metrics, without labels."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        lines = answer.read().decode().splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))
    return {name: float(value) for name, value in pairs if "{" not in name}


def window(times: Sequence[Sequence[float]]) -> tuple[float, float, int]:
    """When all sessions ran, and how many tokens came then."""
    begin, end = max(t[1] for t in times), min(t[-1] for t in times)
    return begin, end, sum(begin < at <= end for session in times for at in session)


def measure(
    clients: Clients, peer: psutil.Process, port: int, sessions: int, tokens: int
) -> dict[str, float]:
    """One round: what the clients saw, and what the peer did."""
    daemons = peer.children(recursive=True)
    before, peer_s = gauges(port), processor_s(peer)
    daemon_s = sum(map(processor_s, daemons))
    times = clients.ask(sessions, tokens)
    after = gauges(port)
    begin, end, came = window(times)
    given = {name: after[name] - before.get(name, 0.0) for name in after}
    first, last = min(t[0] for t in times), max(t[-1] for t in times)
    steps = given["hexswarm_decode_batch_seconds_count"]
    total = sum(map(len, times))
    busy_s, all_s = given["hexswarm_busy_seconds_total"], last - first
    found = {
        "tokens_s": came / (end - begin),
        "window_s": end - begin,
        "step_ms": 1e3 * given["hexswarm_decode_batch_seconds_sum"] / max(steps, 1),
        "rows_a_step": given["hexswarm_rows_total"] / max(steps, 1),
        "rows_a_token": given["hexswarm_rows_total"] / total,
        "idle": max(0.0, 1 - busy_s / all_s),
        "queue_ms": 1e3 * after["hexswarm_queue_seconds"],
        "peer_us_a_token": 1e6 * (processor_s(peer) - peer_s) / total,
        "daemon_us_a_token": 1e6 * (sum(map(processor_s, daemons)) - daemon_s) / total,
    }
    rounded = {name: round(value, 4) for name, value in found.items()}
    say(f"{sessions} sessions: {rounded}")
    return rounded


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return int(held.getsockname()[1])


def through_daemon(folder: Path, home: Path, given: argparse.Namespace) -> dict[str, Any]:
    """A peer that serves the whole model, and clients."""
    from hexswarm.demo import LocalSwarm

    port, room = free_port(), PROMPT + given.tokens + 32
    extra = ["--device", given.device, "--dtype", given.dtype, "--metrics-port", str(port)]
    extra += ["--kv-tokens", str(room * (given.sessions + 1))]
    span, report = f"0:{given.layers}", dict[str, Any]()
    swarm = LocalSwarm([span], model=str(folder), home=home / "swarm", extra=extra)
    began = time.perf_counter()
    with swarm:
        report["peer_ready_s"] = round(time.perf_counter() - began, 1)
        say(f"the peer serves after {report['peer_ready_s']} s")
        clients = Clients(given.clients, swarm.bootstrap[0], folder, home)
        try:
            clients.ready()
            peer = psutil.Process(swarm.peers[0].pid)
            for _ in range(2):  # graphs are captured when a batch size comes for the second time
                clients.ask(given.sessions, max(16, given.tokens // 8))
            clients.ask(1, 16)
            rounds = [
                measure(clients, peer, port, given.sessions, given.tokens)
                for _ in range(given.rounds)
            ]
            rounds.sort(key=lambda one: one["tokens_s"])
            report["daemon"] = {
                str(given.sessions): rounds[len(rounds) // 2],
                "1": measure(clients, peer, port, 1, given.tokens),
            }
            report["spread"] = [rounds[0]["tokens_s"], rounds[-1]["tokens_s"]]
        finally:
            clients.end()
            errors = swarm.peers[0].log_text.strip()
    if errors:
        say(f"the peer said:\n{errors[-2000:]}")
    return report


def say(text: str) -> None:
    print(text, flush=True)


def main() -> None:
    if "--client" in sys.argv:
        asyncio.run(client(*sys.argv[2:]))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shape", choices=sorted(VOCABULARY), default="8b")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--sessions", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--clients", type=int, default=4, help="processes")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="for model and state; default: a new one")
    given = parser.parse_args()
    home = Path(given.folder or tempfile.mkdtemp(prefix="hexswarm-"))
    os.environ["HEXSWARM_CACHE"] = str(home / "cache")
    report: dict[str, Any] = {"shape": given.shape, "layers": given.layers, "tokens": given.tokens}
    try:
        began = time.perf_counter()
        written = write_model(home / "model", given.shape, given.layers, given.dtype, given.device)
        took_s = time.perf_counter() - began
        say(f"wrote {written / 1e9:.1f} GB in {took_s:.1f} s")
        report |= bare(home / "model", given)
        report |= through_daemon(home / "model", home, given)
    finally:
        if given.folder is None:
            shutil.rmtree(home, ignore_errors=True)
    report["of_bare"] = {
        count: round(one["tokens_s"] / report["bare"][count]["tokens_s"], 3)
        for count, one in report["daemon"].items()
    }
    say(json.dumps(report))


if __name__ == "__main__":
    main()
