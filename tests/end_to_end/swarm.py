"""Helpers of the tests with real processes: swarms, commands, and waiting for what must come.

`LocalSwarm()` is the small default model on three peers; nodes and commands come out of `warm.py`.
Everything that waits goes through `until`, so that no test sleeps for longer than it must and a
failure says what did not happen.
"""

from __future__ import annotations

import atexit
import functools
import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, TypeVar

import psutil

from hexswarm import demo
from hexswarm.blocking import Client
from hexswarm.config import DEFAULT_MODEL
from hexswarm.errors import HexswarmError, NoRoute, Refused
from hexswarm.records import Announcement, PeerId
from tests.end_to_end.warm import Warm

T = TypeVar("T")

SPANS = ("0:10", "10:20", "20:30")
TINY_SPANS = ("0:2", "2:4", "4:6")
TINY_LAYERS = 6
TINY_CONTEXT = 4096
NOBODY = "/ip4/127.0.0.1/tcp/1/p2p/12D3KooWAzbLSDFLmF8qzKZf6dsxFbmACvu3KECT9H8rDd35kP5T"
"""A well-formed address at which nobody listens."""


class LocalSwarm(demo.LocalSwarm):
    """Three spans of the default model, one thread each, unless told otherwise."""

    def __init__(
        self, spans: Sequence[str | None] = SPANS, *, model: str = DEFAULT_MODEL, **more: Any
    ) -> None:
        super().__init__(spans, model=model, threads=1, **more)

    def _process(
        self, words: Sequence[str], environment: Mapping[str, str], errors: IO[bytes]
    ) -> Any:
        return _warm().start(words, environment, errors)

    def client(self, name: str = "client", **more: Any) -> Client:
        """A client with a home of its own."""
        return Client(self.bootstrap, model=self.model, home=self.home / name, **more)

    def hexswarm(self, *words: str, home: str = "cli", **more: Any) -> subprocess.CompletedProcess:
        """`hexswarm` with this swarm's address and model."""
        known = [word for address in self.bootstrap for word in ("--bootstrap", address)]
        command, *rest = words
        folder = str(self.home / home)
        return hexswarm(command, *known, "--model", self.model, "--home", folder, *rest, **more)


class LivingSwarm(LocalSwarm):
    """A swarm whose peers come and go: each is known by its id."""

    def id_of(self, peer: demo.Process) -> PeerId:
        line = next(line for line in peer.lines if "/p2p/" in line)
        return PeerId(line.rpartition("/p2p/")[2])

    def peer_of(self, peer: PeerId) -> demo.Process:
        return next(node for node in self.peers if node.lines and self.id_of(node) == peer)

    def again(self, old: demo.Process, span: str) -> demo.Process:
        """Start a peer that has ended once more, in its old home."""
        number = self.peers.index(old)
        later = self.peers[number:]
        del self.peers[number:]  # the next peer is named after the number of those before it
        try:
            peer = self.spawn_peer(span)
        finally:
            self.peers += later[1:]
        peer.wait_for("address", demo.READY_S)
        return peer


def environment() -> dict[str, str]:
    """The environment of a command: whatever is set here, less a swarm of the user's."""
    own = {name: text for name, text in os.environ.items() if name != "HEXSWARM_BOOTSTRAP"}
    return {**own, "OMP_NUM_THREADS": "1"}


@functools.cache
def _warm() -> Warm:
    started = Warm(environment())
    atexit.register(started.close)
    return started


def hexswarm(
    *words: str, stdin: str = "", timeout_s: float = 100, cwd: Path | None = None
) -> subprocess.CompletedProcess:
    """The command `hexswarm` as a person runs it, less the seconds of its imports."""
    return _warm().run(words, environment(), stdin, timeout_s, cwd)


def node(words: Sequence[str], home: Path, log: Path) -> demo.Process:
    """The command `hexswarm` as a node that serves until it is told to stop; started as above."""
    with log.open("wb") as errors:
        process = _warm().start([*words, "--home", str(home)], environment(), errors)
    return demo.Process(home.name, process, log)


def all_of(calls: Mapping[str, Callable[[], T]]) -> dict[str, T]:
    """The results of all `calls`, two at a time: as many as the test machine has cores."""
    with ThreadPoolExecutor(2) as pool:
        futures = {name: pool.submit(call) for name, call in calls.items()}
        return {name: future.result() for name, future in futures.items()}


def until(condition: Callable[[], T], timeout_s: float, what: str, every_s: float = 0.1) -> T:
    """Ask until `condition` is true and return it; AssertionError if it does not become so."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        found = condition()
        if found:
            return found
        assert time.monotonic() < deadline_s, f"after {timeout_s:.0f} s still not: {what}"
        time.sleep(every_s)


def complaint(done: subprocess.CompletedProcess) -> str:
    """What a command that failed as it should said; AssertionError if that is not one line."""
    assert done.returncode not in (0, None), done.stdout
    assert "Traceback" not in done.stderr, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("hexswarm: "), done.stderr
    return lines[0].removeprefix("hexswarm: ")


def refresh(client: Client) -> tuple[Announcement, ...]:
    """The announcements of the client's model, read from the directory now."""
    member = client._client._member
    client._wait(member.refresh(client.spec.digest))
    return client.snapshot().of_model(client.spec.digest)


def whole_pool_is_free(client: Client, tokens: int) -> bool:
    """True if each stage admits a session that needs its whole pool: then no lease is left."""
    try:
        with client.generate([5], stream=True, max_new_tokens=tokens - 1) as stream:
            next(stream, None)
    except HexswarmError:
        return False
    return True


def pool_is_announced_free(client: Client, tokens: int) -> bool:
    """True if those who have only the directory to go by will find the whole pool free, too."""
    refresh(client)
    member, digest = client._client._member, client.spec.digest
    told = [item.free_kv_tokens for item in member.alive() if item.model == digest]
    return bool(told) and min(told) >= tokens


def patient(call: Callable[[], T], timeout_s: float = 20) -> T:
    """`call` again and again as long as the swarm is said to be full: the word is seconds old."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        try:
            return call()
        except (NoRoute, Refused) as error:
            if "full" not in str(error) or time.monotonic() > deadline_s:
                raise
            time.sleep(0.2)


def family(pid: int) -> list[psutil.Process]:
    """A process and all its descendants."""
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def gone(process: psutil.Process) -> bool:
    """True if a process has ended; a zombie waits only for its parent."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def damaged(folder: Path, copy: Path) -> Path:
    """A copy of a model folder, to be damaged."""
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy
