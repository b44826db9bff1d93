"""All-reduce between the members of a group, against gloo: on loopback and on an emulated LAN.

    python benchmarks/all_reduce.py                     # loopback; the lab too if root and netlab
    python benchmarks/all_reduce.py --members 4 --kib 8 16 64 256 1024 --no-gloo

Every member is a process; in the lab each has a network namespace of its own, 0.2 ms away from the
others (1 Gbit/s). The methods take turns within one run, a few dozen sums each, so that what else
the machine does meets all of them. Times are those of rank 0, wall clock, from the call to the sum,
encryption and conversions included for ours; gloo has neither encryption nor authentication.
`swap` and `scatter` are our two algorithms, bfloat16 on the wire as for gloo; `float32` is `swap`
with as many bytes, so half the values. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from hexswarm.identity import Identity
from hexswarm.peer.collective import Collective, Wire
from hexswarm.peer.reduction import Format
from hexswarm.transports.direct import Listener, dial

LAN_RTT_MS = 0.2
PORT, STORE_PORT = 29700, 29701
TTL_S = 600
LARGE_BYTES = 128 << 10
"""From here on fewer sums make a block."""
SETTINGS = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


# --- one member -----------------------------------------------------------------------------------


def identity(rank: int) -> Identity:
    return Identity(hashlib.sha256(f"benchmark {rank}".encode()).digest())


class Streams:
    """Direct streams of this rank to all others, by topic: one set for each collective."""

    def __init__(self, rank: int, hosts: list[str], ports: list[int]) -> None:
        self._rank, self._hosts, self._ports = rank, hosts, ports
        self._ids = [identity(other) for other in range(len(hosts))]
        self._arrived: dict[tuple[bytes, str], Wire] = {}
        self._changed = threading.Condition()
        known = {other.peer for other in self._ids}
        self.listener = Listener(
            self._ids[rank],
            hosts[rank],
            ports[rank],
            allowed=known.__contains__,
            deliver=self._deliver,
        )

    def _deliver(self, stream: Any) -> None:
        with self._changed:
            self._arrived[stream.topic, stream.remote] = stream
            self._changed.notify_all()

    def group(self, topic: str) -> dict[int, Wire]:
        """Dial lower ranks, wait for higher ones."""
        found: dict[int, Wire] = {}
        for other in range(self._rank):
            where = self._hosts[other], self._ports[other]
            found[other] = dial(
                self._ids[self._rank], self._ids[other].peer, *where, topic.encode()
            )
        wanted = [(topic.encode(), item.peer) for item in self._ids[self._rank + 1 :]]
        with self._changed:
            self._changed.wait_for(lambda: all(key in self._arrived for key in wanted), 30)
            for other, key in enumerate(wanted, self._rank + 1):
                found[other] = self._arrived.pop(key)
        return found


def member(plan: dict[str, Any], rank: int) -> None:
    """Measure with the others; rank 0 prints the times."""
    import torch
    import torch.distributed as gloo

    torch.set_num_threads(1)
    hosts, size = plan["hosts"], len(plan["hosts"])
    os.environ["GLOO_SOCKET_IFNAME"] = plan["device"]
    store = gloo.TCPStore(hosts[0], plan["store_port"], size, rank == 0, wait_for_workers=True)
    streams = Streams(rank, hosts, plan["ports"])
    store.set(f"listening {rank}", "1")
    store.wait([f"listening {other}" for other in range(size)])
    if plan["gloo"]:
        gloo.init_process_group("gloo", store=store, rank=rank, world_size=size)

    def ours(topic: str, wire: Format, swap_bytes: int) -> Collective:
        return Collective(rank, streams.group(topic), epoch=1, wire=wire, swap_bytes=swap_bytes)

    groups = {
        "swap": ours("swap", Format.BFLOAT16, 1 << 30),
        "scatter": ours("scatter", Format.BFLOAT16, -1),
        "float32": ours("float32", Format.FLOAT32, 1 << 30),
    }
    for wire_bytes in plan["bytes"]:
        methods: dict[str, Callable[[], None]] = {}
        for name, group in groups.items():
            count = wire_bytes // group.wire.value_bytes
            values = np.zeros(count, np.float32)  # they are summed in place, over and over
            methods[name] = lambda group=group, values=values: group.all_reduce(values)  # type: ignore[misc]
        if plan["gloo"]:
            tensor = torch.zeros(wire_bytes // 2, dtype=torch.bfloat16)
            methods["gloo"] = lambda tensor=tensor: gloo.all_reduce(tensor)  # type: ignore[misc]
        times = measure(methods, plan["blocks"], 5 if wire_bytes >= LARGE_BYTES else 30)
        if rank == 0:
            print(json.dumps({"bytes": wire_bytes, "times": times}), flush=True)
    for group in groups.values():
        group.close()
    streams.listener.close()


def measure(
    methods: dict[str, Callable[[], None]], blocks: int, each: int
) -> dict[str, list[float]]:
    """Seconds of each sum; the first block of each method warms up."""
    times: dict[str, list[float]] = {name: [] for name in methods}
    for block in range(blocks + 1):
        for name, method in methods.items():
            for _ in range(each):
                began_s = time.perf_counter()
                method()
                if block:
                    times[name].append(time.perf_counter() - began_s)
    return times


# --- the parent -----------------------------------------------------------------------------------

Start = Callable[[int, list[str]], "subprocess.Popen[str]"]


def play(plan: dict[str, Any], start: Start) -> dict[int, dict[str, list[float]]]:
    """Start all members, collect what rank 0 prints; they end with this call, also on failure."""
    words = [sys.executable, str(Path(__file__).resolve()), "--as", json.dumps(plan)]
    processes = [start(rank, [*words, str(rank)]) for rank in range(len(plan["hosts"]))]
    try:
        out, _ = processes[0].communicate(timeout=TTL_S)
        lines = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
        if len(lines) != len(plan["bytes"]):
            raise SystemExit("rank 0 did not come to its end")
        return {line["bytes"]: line["times"] for line in lines}
    finally:
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10 if sys.exc_info()[0] is None else 0)
            process.kill()
            process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def on_loopback(members: int, plan: dict[str, Any]) -> dict[int, dict[str, list[float]]]:
    where = {"hosts": ["127.0.0.1"] * members, "device": "lo", "store_port": free_port()}
    where["ports"] = [free_port() for _ in range(members)]

    def start(rank: int, words: list[str]) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE if rank == 0 else subprocess.DEVNULL
        environment = {**os.environ, **SETTINGS}
        return subprocess.Popen(words, stdout=pipe, text=True, cwd="/", env=environment)

    return play({**plan, **where}, start)


def on_lan(members: int, plan: dict[str, Any]) -> dict[int, dict[str, list[float]]]:
    import lab

    path = lab.find_netlab()
    assert path is not None
    topology = {"name": lab._name("red"), "regions": {"lan": members}, "lan_rtt_ms": LAN_RTT_MS}
    with lab.load_netlab(path).Lab.up(topology, ttl=TTL_S) as net:
        names = [f"lan{number}" for number in range(1, members + 1)]
        where = {"hosts": [net.hosts[name] for name in names], "device": "eth0"}
        where |= {"store_port": STORE_PORT, "ports": [PORT] * members}

        def start(rank: int, words: list[str]) -> subprocess.Popen[str]:
            pipe = subprocess.PIPE if rank == 0 else subprocess.DEVNULL
            settings = {"stdout": pipe, "text": True, "cwd": "/", "env": SETTINGS}
            started: subprocess.Popen[str] = net.popen(names[rank], words, **settings)
            return started

        return play({**plan, **where}, start)


def summary(times: list[float]) -> dict[str, float]:
    """Milliseconds: the median, and the nine tenths around it."""
    ordered = sorted(seconds * 1e3 for seconds in times)
    low, high = ordered[len(ordered) // 20], ordered[-1 - len(ordered) // 20]
    return {"p50": round(statistics.median(ordered), 3), "p5": round(low, 3), "p95": round(high, 3)}


def networks(wanted: str) -> Iterator[tuple[str, Callable[..., Any]]]:
    if wanted != "lan":
        yield "loopback", on_loopback
    if wanted != "loopback":
        import lab

        reason = lab.unable()
        if reason:
            print(f"no emulated LAN: {reason}")
        else:
            yield "lan", on_lan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--members", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--kib", type=int, nargs="+", default=[8, 16, 1024])
    parser.add_argument("--blocks", type=int, default=10)
    parser.add_argument("--network", choices=["both", "loopback", "lan"], default="both")
    parser.add_argument("--no-gloo", action="store_true")
    parser.add_argument("--as", dest="member", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.member:
        member(json.loads(options.member[0]), int(options.member[1]))
        return
    sizes = [kib << 10 for kib in options.kib]
    plan = {"bytes": sizes, "blocks": options.blocks, "gloo": not options.no_gloo}
    rows = []
    for network, run in networks(options.network):
        for members in options.members:
            before, found = os.getloadavg()[0], run(members, plan)
            for size, times in found.items():
                row = {"network": network, "members": members, "bytes": size}
                row |= {"load_before": round(before, 1)}
                row |= {name: summary(seconds) for name, seconds in times.items()}
                rows.append(row)
                shown = "  ".join(f"{name} {summary(s)['p50']:.3f}" for name, s in times.items())
                print(f"{network:8} {members} members {size >> 10:5} KiB, p50 ms: {shown}")
    print(json.dumps({"rows": rows, "cores": os.cpu_count()}))


if __name__ == "__main__":
    main()
