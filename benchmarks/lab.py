"""A swarm of real processes on an emulated wide-area network, and clients inside of it.

`netlab` (a program of its own, found by `find_netlab`) makes one network namespace per host and
moves their packets with the delay and bandwidth of a topology. Here: where the peers of the
benchmark and of `tests/lab` sit, how they are started and ended, and the small client that runs
inside a host (`python benchmarks/lab.py ADDRESS HOME`): one JSON object a line each way, so that
one process answers many requests and its start-up is in none of them.

Three regions. `eu` and `uk` are near each other, `us` is an ocean away from `eu` and farther from
`uk` than the sum of the other two ways, as happens on the Internet: coordinates cannot be right
about such a triangle, measured links can.

    eu ── 5 ms ── uk        within a region 0.4 ms
      80 ms    150 ms       100 Mbit/s up, 1 Gbit/s down
          us

Rejected: `tc netem` (many kernels lack it, and namespaces of containers may not use it), and delays
added inside our own transport: what is measured here is what sockets, libp2p and TCP really do.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.machinery
import importlib.util
import itertools
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Self

from hexswarm.config import DEFAULT_MODEL, cache
from hexswarm.demo import READY_S, Process, ProcessFailed
from hexswarm.store import resolve

RTT_MS = {"eu-uk": 5.0, "eu-us": 80.0, "uk-us": 150.0}
LAN_RTT_MS = 0.4
SEED = "eu1"
SPANS = {
    "eu2": "0:10",
    "eu3": "10:20",
    "eu4": "20:30",
    "us1": "0:10",
    "us2": "10:20",
    "us3": "20:30",
    "uk1": "0:15",
    "uk2": "12:30",
}
"""Two regions serve the whole model in thirds, and one in halves that overlap: a ring through both
enters the second peer's span at layer 15, and thirds can be mixed with them at 10 or 20."""
CLIENTS = {"eu": "eu5", "uk": "uk3", "us": "us4"}
STARTING = 4
"""Peers that start at the same time: two for each core of a small machine."""
SETTLE_S = 60.0
STEADY_S = 12.0
"""Two rounds of measuring and one of announcing."""
ANSWER_S = 120.0


# --- netlab ---------------------------------------------------------------------------------------


def find_netlab() -> Path | None:
    """HEXSWARM_NETLAB, then `netlab` on PATH, then `shared/netlab` beside the checkout."""
    named = os.environ.get("HEXSWARM_NETLAB") or shutil.which("netlab")
    path = Path(named) if named else Path(__file__).resolve().parents[2] / "shared" / "netlab"
    return path if path.is_file() else None


def load_netlab(path: Path) -> ModuleType:
    """The program as a module: it starts itself again by its `__file__`."""
    if "netlab" not in sys.modules:
        loader = importlib.machinery.SourceFileLoader("netlab", str(path))
        spec = importlib.util.spec_from_loader("netlab", loader)
        assert spec is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["netlab"] = module
        try:
            loader.exec_module(module)
        except BaseException:
            del sys.modules["netlab"]
            raise
    return sys.modules["netlab"]


def unable() -> str:
    """Why this machine cannot make a lab; empty if it can, which is found out by making one."""
    path = find_netlab()
    if path is None:
        return "netlab was not found: name it with HEXSWARM_NETLAB"
    if os.geteuid() != 0:
        return "network namespaces need root"
    netlab = load_netlab(path)
    try:
        with netlab.Lab.up({"name": _name("try"), "regions": {"eu": 1}}, ttl=60):
            return ""
    except (netlab.LabError, OSError) as error:
        return f"this machine makes no network namespaces with TUN devices: {error}"


def _name(prefix: str) -> str:
    """At most twelve letters and digits, and no other lab's."""
    letter = "abcdefghijklmnopqrstuvwxyz"[next(_labs) % 26]
    return f"{prefix}{os.getpid() % 10**8}{letter}"


_labs = itertools.count()


def region(host: str) -> str:
    return host.rstrip("0123456789")


def one_way_s(a: str, b: str) -> float:
    """What the lab's wire takes from host to host, half the round trip that it was told."""
    if a == b:
        return 0.0
    first, second = sorted((region(a), region(b)))
    rtt_ms = LAN_RTT_MS if first == second else RTT_MS[f"{first}-{second}"]
    return rtt_ms / 2e3


# --- the swarm ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Member:
    """A peer that serves, and where it is."""

    host: str
    peer: str
    span: str


class WideSwarm:
    """Bootstrap, peers and clients, each in a host of its own; everything ends with the block."""

    def __init__(
        self,
        spans: Mapping[str, str] = SPANS,
        *,
        clients: Sequence[str] = tuple(CLIENTS.values()),
        hosts: Mapping[str, Mapping[str, Any]] | None = None,
        say: Callable[[str], None] = lambda _: None,
        script: Path = Path(__file__),
    ) -> None:
        """`script` is the client that runs inside of a host: ADDRESS and HOME are its words."""
        self.spans = dict(spans)
        self.members: dict[str, Member] = {}
        """By peer id."""
        self.bootstrap = ""
        self._client_hosts = tuple(clients)
        self._settings = dict(hosts or {})
        self._say = say
        self._script = script.resolve()
        self._nodes: list[Process] = []
        self._clients: dict[str, Inside] = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def pids(self) -> list[int]:
        """All processes in the lab's hosts, libp2p daemons included."""
        return [pid for name in self.lab.info["ns"] for pid in self.lab.pids(name)]

    def client(self, host: str) -> Inside:
        """The client in `host`, started when first asked for."""
        if host not in self._clients:
            home = self.home / f"client-{host}"
            words = [sys.executable, str(self._script), self.bootstrap, str(home)]
            self._clients[host] = Inside(host, self._spawn(host, words, stdin=subprocess.PIPE))
        return self._clients[host]

    def start_clients(self) -> None:
        """All clients at the same time, until they are ready."""
        clients = [self.client(host) for host in self._client_hosts]
        for client in clients:
            client.ready()
        self._say("the clients are ready")

    def settle(self, *, steady: bool = False) -> float:
        """Wait until every peer tells where it is and how far others are; the seconds it took.

        With `steady` also until their announced speeds stand still: eight peers that load and probe
        on two cores are not the swarm that is to be measured.
        """
        client, began_s = self.client(self._client_hosts[0]), time.monotonic()
        speeds: list[float] = []
        since_s = began_s
        while time.monotonic() < began_s + SETTLE_S:
            peers, now = client.call("view")["peers"], time.monotonic()
            told = [item["speed"]["decode_layer_s"] for item in peers]
            if len(told) != len(speeds) or not all(map(_near, told, speeds)):
                speeds, since_s = told, now
            placed = len(peers) == len(self.spans) and all(map(_is_placed, peers))
            if placed and now - since_s >= (STEADY_S if steady else 0):
                self._say("every peer has told where it is")
                return now - began_s
            time.sleep(1)
        if steady and placed:
            return time.monotonic() - began_s  # a busy machine: measured as it is
        raise ProcessFailed(f"after {SETTLE_S:.0f} s not every peer has told where it is")

    def peers(self, *hosts: str) -> list[str]:
        """The peer ids of these hosts, in order."""
        by_host = {member.host: member.peer for member in self.members.values()}
        return [by_host[host] for host in hosts]

    def host_of(self, peer: str) -> str:
        return self.members[peer].host

    def log_of(self, host: str) -> str:
        return (self.home / f"{host}.log").read_text(errors="replace")

    # --- starting and ending

    def _start(self) -> None:
        path = find_netlab()
        if path is None:
            raise ProcessFailed("netlab was not found", remedy="name it with HEXSWARM_NETLAB")
        began_s = time.monotonic()
        self.home = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="lab-")))
        self.lab = self._stack.enter_context(load_netlab(path).Lab.up(self._topology(), ttl=1800))
        self._stack.callback(self._end)
        self._share_models()
        seed = self._spawn(SEED, self._hexswarm(SEED, "bootstrap", "--port", "31337"))
        seed.wait_for("/p2p/", READY_S)
        self.bootstrap = next(line for line in seed.lines if "/p2p/" in line)
        self._say(f"bootstrap in {SEED} after {time.monotonic() - began_s:.0f} s")
        hosts = list(self.spans)
        for first in range(0, len(hosts), STARTING):
            group = hosts[first : first + STARTING]
            nodes = [self._spawn(host, self._peer(host)) for host in group]
            for host, node in zip(group, nodes, strict=True):
                self._enlist(host, node)
            self._say(f"{', '.join(group)} serve after {time.monotonic() - began_s:.0f} s")

    def _topology(self) -> dict[str, Any]:
        used = [SEED, *self.spans, *self._client_hosts]
        count = {
            name: max((int(host[2:]) for host in used if region(host) == name), default=1)
            for name in CLIENTS
        }
        return {
            "name": _name("wan"),
            "regions": count,
            "lan_rtt_ms": LAN_RTT_MS,
            "rtt_ms": RTT_MS,
            "hosts": self._settings,
        }

    def _share_models(self) -> None:
        """Models are read from the user's cache; what is measured here stays in the lab.

        The model is made now if it is not there: nothing can be fetched from inside.
        """
        real = resolve(DEFAULT_MODEL, home=cache()).path.parents[1]
        folder = self.home / "cache"
        folder.mkdir()
        (folder / "models").symlink_to(real / "models")
        shutil.copytree(real / "manifests", folder / "manifests")

    def _hexswarm(self, host: str, *words: str) -> list[str]:
        home = ["--home", str(self.home / host), "--host", self.lab.hosts[host]]
        return [sys.executable, "-m", "hexswarm.cli", *words, *home]

    def _peer(self, host: str) -> list[str]:
        known = ["--bootstrap", self.bootstrap, "--span", self.spans[host], "--threads", "1"]
        return self._hexswarm(host, "peer", "--port", "31337", *known)

    def _enlist(self, host: str, node: Process) -> None:
        node.wait_for("address", READY_S)
        line = next(line for line in node.lines if "/p2p/" in line)
        peer = line.rpartition("/p2p/")[2]
        self.members[peer] = Member(host, peer, self.spans[host])

    def _spawn(self, host: str, words: list[str], **more: Any) -> Process:
        log = self.home / f"{host}.log"
        settings = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "HEXSWARM_BOOTSTRAP": ""}
        settings["HEXSWARM_CACHE"] = str(self.home / "cache")
        more.setdefault("stdin", subprocess.DEVNULL)
        with log.open("ab") as errors:
            process = self.lab.popen(
                host,
                words,
                env=settings,
                cwd=self.home,  # `python -m` puts it on the path, and our kernels/ hides another
                stdout=subprocess.PIPE,
                stderr=errors,
                bufsize=0,
                **more,
            )
        self._nodes.append(Process(host, process, log))
        return self._nodes[-1]

    def _end(self) -> None:
        """Clients first, then peers, all asked at once; the lab kills what is left."""
        for client in self._clients.values():
            client.close()
        for node in reversed(self._nodes):
            node.send(signal.SIGTERM)
        for node in reversed(self._nodes):
            node.wait(15)


def _near(a: float, b: float) -> bool:
    return abs(a - b) <= 0.15 * b


def _is_placed(item: Mapping[str, Any]) -> bool:
    return item["coordinates"] is not None and len(item["neighbours"]) > 1


class Inside:
    """The client in one host, as its parent sees it."""

    def __init__(self, host: str, process: Process) -> None:
        self.host = host
        self._process = process
        self._started = False

    def ready(self) -> None:
        """Wait until it has joined the swarm."""
        if not self._started:
            self._read(READY_S)
            self._started = True

    def call(self, op: str, **words: Any) -> dict[str, Any]:
        """Send one request and wait for its answer; what failed is an answer, too."""
        self.ready()
        stdin = self._process.process.stdin
        assert stdin is not None
        stdin.write(json.dumps({"op": op, **words}).encode() + b"\n")
        stdin.flush()
        return self._read(ANSWER_S)

    def ask(self, prompt: Any, tokens: int, **options: Any) -> dict[str, Any]:
        return self.call("ask", prompt=prompt, options={"max_new_tokens": tokens, **options})

    def close(self) -> None:
        stdin = self._process.process.stdin
        if stdin is not None:
            with contextlib.suppress(OSError):
                stdin.close()

    def _read(self, timeout_s: float) -> dict[str, Any]:
        """The next line that is a JSON object: libraries may print, too."""
        stdout, deadline_s = self._process.process.stdout, time.monotonic() + timeout_s
        assert stdout is not None
        line = b""
        while time.monotonic() < deadline_s:
            if not select.select([stdout], [], [], 0.2)[0]:
                continue
            byte = stdout.read(1 << 16)
            if not byte:
                break
            line += byte
            if line.endswith(b"\n"):
                found = [text for text in line.splitlines() if text.startswith(b"{")]
                if found:
                    answer: dict[str, Any] = json.loads(found[-1])
                    return answer
                line = b""
        last = (self._process.log_text.strip().splitlines() or ["no word of it"])[-1]
        raise ProcessFailed(f"the client in {self.host} does not answer: {last}")


# --- inside a host --------------------------------------------------------------------------------


async def serve_parent(bootstrap: str, home: Path) -> None:
    """Answer the parent's requests, one line each, until its pipe ends."""
    from hexswarm.client import AsyncClient

    async with AsyncClient([bootstrap], model=DEFAULT_MODEL, home=home) as client:
        print(json.dumps({"ready": True}), flush=True)
        while line := await asyncio.to_thread(sys.stdin.readline):
            request = json.loads(line)
            act = {"ask": _ask, "view": _view}[request["op"]]
            print(json.dumps(await act(client, request)), flush=True)


async def _ask(client: Any, request: Mapping[str, Any]) -> dict[str, Any]:
    """One generation, timed as its caller sees it."""
    from hexswarm.errors import HexswarmError

    began_s, times = time.monotonic(), []
    try:
        answer = client.stream(request["prompt"], **request["options"])
        async for _ in answer:
            times.append(time.monotonic())
    except HexswarmError as error:
        return {
            "error": type(error).__name__,
            "says": str(error),
            "binding": getattr(error, "binding", ""),
            "achievable": getattr(error, "achievable", {}),
            "took_s": time.monotonic() - began_s,
        }
    done, route = answer.completion, answer.completion.route
    trace = await client.trace(done.session)
    predicted = ("ttft_s", "tpot_s", "ttft_p95_s", "tpot_p95_s")
    return {
        "ids": list(done.ids),
        "text": done.text,
        "stages": [[stage.peer, stage.span.first, stage.span.end] for stage in route.stages],
        "predicted": {name: getattr(route, name) for name in predicted},
        "ttft_s": done.ttft_s,
        "tpot_s": trace.tpot_s,
        "mean_s": 1 / done.tokens_per_s if done.tokens_per_s else 0.0,
        "gaps_s": [later - sooner for sooner, later in itertools.pairwise(times)],
        "trace": trace.to_json(),
    }


async def _view(client: Any, request: Mapping[str, Any]) -> dict[str, Any]:
    """The swarm as this client knows it now."""
    await client._member.refresh(client.spec_digest)  # the clients' own reading may be 30 s old
    view = await client.snapshot()
    shown: dict[str, Any] = view.to_json()
    return {"me": client._member.transport.local, **shown}


if __name__ == "__main__":
    asyncio.run(serve_parent(sys.argv[1], Path(sys.argv[2])))
