"""`hexswarm demo`: a whole swarm as real processes on this machine, one answer, and away again.

A bootstrap node and four peers with unequal spans, one of them held twice; then one chat request
through the ordinary client. `LocalSwarm` starts and ends the processes; tests and benchmarks use it
too. State goes to a temporary folder, models to the usual cache.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Self

from hexswarm.config import DEFAULT_MODEL, cache
from hexswarm.errors import HexswarmError
from hexswarm.records import Span

READY_S = 300.0
"""Loading and measuring on a slow disk; the model itself is made before the processes start."""
END_S = 35.0


class ProcessFailed(HexswarmError):
    """A process of the local swarm ended before it was ready."""


@dataclass
class Process:
    """One node: its process and the lines that it printed until it was ready."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    lines: list[str] = field(default_factory=list)

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def log_text(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_for(self, word: str, timeout_s: float) -> list[str]:
        """Read stdout until a line contains `word`. Raises ProcessFailed."""
        deadline_s = time.monotonic() + timeout_s
        stdout = self.process.stdout
        assert stdout is not None
        while time.monotonic() < deadline_s:
            ready, _, _ = select.select([stdout], [], [], 0.2)
            line = stdout.readline().decode(errors="replace") if ready else ""
            if line:
                self.lines.append(line.rstrip())
                if word in line:
                    return self.lines
            elif self.process.poll() is not None:
                break
        reason = (self.log_text.strip().splitlines() or ["no word of it"])[-1]
        raise ProcessFailed(f"{self.name} did not start: {reason}")

    def send(self, number: int) -> None:
        """Send a signal to the process if it still runs."""
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(number)

    def end(self, number: int = signal.SIGTERM, timeout_s: float = END_S) -> int:
        """Send a signal and wait; killed if it does not obey. The exit status."""
        self.send(number)
        return self.wait(timeout_s)

    def wait(self, timeout_s: float = END_S) -> int:
        """Wait for the end; killed if it does not come. The exit status."""
        try:
            status = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            status = self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
        return status


class LocalSwarm:
    """A bootstrap node and peers as child processes on loopback; ends them all on exit."""

    def __init__(
        self,
        spans: Sequence[str | None],
        *,
        model: str = DEFAULT_MODEL,
        threads: int = 0,
        home: Path | None = None,
        extra: Sequence[str] = (),
    ) -> None:
        self.model = model
        self.peers: list[Process] = []
        self.seed: Process
        self._spans = spans
        self._threads = threads
        self._extra = tuple(extra)
        self._folder = None if home else tempfile.TemporaryDirectory(prefix="hexswarm-")
        self.home = home or Path(self._folder.name)  # type: ignore[union-attr]

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def bootstrap(self) -> list[str]:
        return [line for line in self.seed.lines if "/p2p/" in line]

    @property
    def processes(self) -> list[Process]:
        return ([self.seed] if hasattr(self, "seed") else []) + self.peers

    def start(self, started: Callable[[str], None] = lambda _: None) -> None:
        """Start everything; `started` is told the name of each node that is ready."""
        self.start_seed()
        started("bootstrap")
        waiting = [self.spawn_peer(span) for span in self._spans]
        for peer in waiting:
            peer.wait_for("address", READY_S)
            started(peer.name)

    def start_seed(self, port: int = 0) -> Process:
        """Start the bootstrap node (again, with the identity it had)."""
        self.seed = self._spawn("bootstrap", ["bootstrap", "--port", str(port)])
        self.seed.wait_for("/p2p/", READY_S)
        return self.seed

    def spawn_peer(self, span: str | None, *extra: str) -> Process:
        """Start a peer without waiting for it."""
        name = f"peer-{len(self.peers)}"
        words = ["peer", "--model", self.model]
        for address in self.bootstrap:
            words += ["--bootstrap", address]
        if span is not None:
            words += ["--span", span]
        if self._threads:
            words += ["--threads", str(self._threads)]
        process = self._spawn(name, [*words, *self._extra, *extra])
        self.peers.append(process)
        return process

    def add_peer(self, span: str | None, *extra: str) -> Process:
        """Start a peer and wait until it serves."""
        peer = self.spawn_peer(span, *extra)
        peer.wait_for("address", READY_S)
        return peer

    def stop(self) -> list[int]:
        """End all processes, peers first, all at once; their exit statuses."""
        for process in self.processes:
            process.send(signal.SIGTERM)  # once: a second one would not let it drain
        statuses = [process.wait() for process in self.processes]
        if self._folder is not None:
            self._folder.cleanup()
        return statuses

    def _spawn(self, name: str, words: Sequence[str]) -> Process:
        folder = self.home / name
        folder.mkdir(parents=True, exist_ok=True)
        log = folder / "stderr.log"
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        environment.pop("HEXSWARM_BOOTSTRAP", None)
        if self._threads:
            environment["OMP_NUM_THREADS"] = str(self._threads)
        with log.open("ab") as errors:
            command = [*words, "--home", str(folder)]
            return Process(name, self._process(command, environment, errors), log)

    def _process(
        self, words: Sequence[str], environment: Mapping[str, str], errors: IO[bytes]
    ) -> subprocess.Popen[bytes]:
        """A process of the command `hexswarm`. Tests have a quicker way to one."""
        return subprocess.Popen(
            [sys.executable, "-m", "hexswarm.cli", *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=environment,
            bufsize=0,
        )


def demo_spans(layers: int) -> list[str]:
    """Three unequal spans, the middle one twice."""
    first, second = max(1, layers * 8 // 30), max(2, layers * 20 // 30)
    spans = [Span(0, first), Span(first, second), Span(first, second), Span(second, layers)]
    return [str(span) for span in spans]


def run(flags: argparse.Namespace) -> int:
    """Start a swarm, ask it, print route and times, stop it."""
    from tqdm import tqdm

    from hexswarm.ask import print_stream
    from hexswarm.blocking import Client
    from hexswarm.cli import given
    from hexswarm.options import Options
    from hexswarm.progress import Terminal
    from hexswarm.store import resolve

    model = flags.model or DEFAULT_MODEL
    folder = resolve(model, home=cache(), progress=Terminal())
    spans = demo_spans(folder.spec.layers)
    swarm = LocalSwarm(spans, model=model, threads=1)
    try:
        with tqdm(total=len(spans) + 1, desc="starting a swarm", unit="node", leave=False) as bar:
            swarm.start(lambda _: bar.update())
        for name, span in zip(["bootstrap"] + ["peer"] * len(spans), ["", *spans], strict=True):
            print(f"{name} {span}".rstrip(), file=sys.stderr)
        messages = [{"role": "user", "content": flags.prompt}]
        print(f"\n> {flags.prompt}", flush=True)
        with Client(swarm.bootstrap, model=model, home=swarm.home / "client") as client:
            options = given(Options, flags)
            stream = client.generate(messages, stream=True, **options)
            completion = print_stream(stream)
        print(f"\nroute        {completion.route}")
        print(f"first token  {completion.ttft_s * 1e3:.0f} ms")
        print(f"then         {completion.tokens_per_s:.1f} tokens/s")
    finally:
        swarm.stop()
    return 0
