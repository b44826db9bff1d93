"""What a crowd of strangers costs a peer: memory, and the steps of an honest session.

    python benchmarks/strangers.py [--strangers 200] [--daemons 18] [--tokens 300] [--kinds loud]

One real peer serves the whole default model on loopback, one honest client has it answer the same
prompt again and again: before, while a crowd of strangers holds on to the peer, and after. The
crowd is a process of its own with `--daemons` libp2p daemons, each an identity of its own, which
share the strangers evenly: a daemon for each stranger (60 MiB, 0.4 s of CPU) would measure this
machine. So eleven strangers of one identity also meet the bounds for one; the bounds for
many identities are held by tests/swarm/test_guests.py. Loopback addresses are in no address block.
All strangers of one identity do the same thing, and do it again a second after they were thrown
out:

    silent      opens a stream and says nothing
    greeting    says half a greeting, byte by byte
    half        greets on one lane only
    slow        makes a link, announces the largest payload of a guest and trickles it
    oversized   makes a link, announces 4 MiB and sends as fast as it can
    huge        makes a link and announces 4 GiB
    malformed   makes a link and sends noise as a header
    deaf        makes a link, asks for answers and reads none
    loud        makes a link and sends pings without a pause

In the first seconds all call at once; after that offenders wait. `--tokens 80` sees little more
than those seconds.

Strangers have no session; who has one may hold more (`hexswarm.guests`), against KV. Memory is the
resident set of the peer's process and of its libp2p daemon, which is hivemind's, apart. Steps are
the times between pieces of text at the honest client. A real crowd has its own machines: this one
runs as idle work, so that it takes what the peer, its daemon and the client leave, and what it
costs them is seen and not what it costs itself. (At nice 19 alone it is not so: a scheduler that
sees no idle processor wakes the daemon on the one that computes. A crowd that molested somebody
else had p95 rise to 1.6 times.) On a busy machine such a crowd does little: see `tries`.
`peer_cpu_ms` and `daemon_cpu_ms` are CPU time a token, before and with the crowd. The last line is
one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable

os.environ.setdefault("OMP_NUM_THREADS", "1")

import psutil

from hexswarm.client import AsyncClient
from hexswarm.demo import LocalSwarm
from hexswarm.errors import PeerLost
from hexswarm.guests import GUEST
from hexswarm.messages import PROTOCOL_VERSION, GoAway, Hello, Measure, Ping, Probe
from hexswarm.records import PeerId
from hexswarm.transports.base import Stream
from hexswarm.transports.libp2p import Libp2pTransport
from hexswarm.wire import pack

AGAIN_S = 1.0
TRICKLE_S = 0.5
PROMPT = [{"role": "user", "content": "Explain in a long and detailed text how bread is baked."}]


def data_of(message: Hello | Ping | Probe | Measure | GoAway, payload: bytes = b"") -> bytes:
    return b"".join(pack(message, payload))


class Stranger:
    """One of the crowd; `streams` are those that it has open."""

    def __init__(self, transport: Libp2pTransport, target: PeerId, address: str, seed: int) -> None:
        self.transport = transport
        self.target = target
        self.address = address
        self.rng = random.Random(seed)
        self.streams: list[Stream] = []

    async def dial(self) -> Stream:
        stream = await self.transport.dial(self.target, (self.address,))
        self.streams.append(stream)
        return stream

    async def link(self, lanes: int = 2) -> list[Stream]:
        name = self.rng.randbytes(16)
        for lane in range(lanes):
            stream = await self.dial()
            stream.write([data_of(Hello(PROTOCOL_VERSION, "", lane, name))])
        for stream in self.streams:
            if not await stream.read(1 << 12):
                raise PeerLost(self.target, None, "hung up")
        return self.streams

    async def trickle(self, stream: Stream, data: bytes, piece: int) -> None:
        """Send `data` bit by bit, until it is over or the other end has had enough."""
        for at in range(0, len(data), piece):
            stream.write([data[at : at + piece]])
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TRICKLE_S):
                    if not await stream.read(1 << 12):
                        return
        await self.hold(stream)

    async def hold(self, stream: Stream) -> None:
        while await stream.read(1 << 12):
            pass

    # --- what they do ---------------------------------------------------------------------------

    async def silent(self) -> None:
        await self.hold(await self.dial())

    async def greeting(self) -> None:
        await self.trickle(await self.dial(), data_of(Hello(PROTOCOL_VERSION, "", 0, bytes(16))), 1)

    async def half(self) -> None:
        (stream,) = await self.link(lanes=1)
        await self.hold(stream)

    async def slow(self) -> None:
        _, bulk = await self.link()
        whole = data_of(Probe(1), self.rng.randbytes(GUEST.payload_bytes))
        bulk.write([whole[: len(whole) // 2]])
        await self.trickle(bulk, whole[len(whole) // 2 : -1], 1 << 10)

    async def oversized(self) -> None:
        _, bulk = await self.link()
        bulk.write([data_of(GoAway(1.0), self.rng.randbytes(4 << 20))])
        await self.hold(bulk)

    async def huge(self) -> None:
        step, _ = await self.link()
        step.write([b"\0\0\0\3" + b"\xff" * 4 + self.rng.randbytes(1 << 16)])
        await self.hold(step)

    async def malformed(self) -> None:
        step, _ = await self.link()
        step.write([b"\0\0\x04\0" + b"\0" * 4 + self.rng.randbytes(1 << 10)])
        await self.hold(step)

    async def deaf(self) -> None:
        step, bulk = await self.link()
        for nonce in itertools.count():
            step.write([data_of(Measure(nonce, "nobody", ("/ip4/127.0.0.1/tcp/1",) * 8))])
            await asyncio.sleep(0.1)
            if nonce == 200:
                await self.hold(bulk)
                return

    async def loud(self) -> None:
        step, _ = await self.link()
        reading = asyncio.ensure_future(self.hold(step))
        try:
            while not reading.done():
                step.write([data_of(Ping(nonce)) for nonce in range(500)])
                await step.drain()
                await asyncio.sleep(0.02)
        finally:
            reading.cancel()


KINDS = ("silent", "greeting", "half", "slow", "oversized", "huge", "malformed", "deaf", "loud")


async def molest(stranger: Stranger, kind: str, told: Counter[str]) -> None:
    """Do the same thing over and over."""
    act: Callable[[], Awaitable[None]] = getattr(stranger, kind)
    while True:
        told["tries"] += 1
        try:
            await act()
        except (PeerLost, OSError):
            told["refused"] += 1
        finally:
            for stream in stranger.streams:
                stream.close()
            stranger.streams.clear()
        await asyncio.sleep(AGAIN_S)


def yield_all() -> None:
    """Take what nobody else wants: a processor that runs only such work counts as idle to Linux."""
    os.nice(19)
    if hasattr(os, "SCHED_IDLE"):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


async def attack(
    target: PeerId, address: str, strangers: int, daemons: int, kinds: list[str]
) -> None:
    """The crowd: says how many streams it has open, once a second, until its input ends."""
    yield_all()
    transports = [
        transport
        for start in range(0, daemons, 4)
        for transport in await asyncio.gather(
            *(Libp2pTransport.create() for _ in range(start, min(start + 4, daemons)))
        )
    ]
    told: Counter[str] = Counter()
    crowd = [
        Stranger(transports[number % daemons], target, address, number)
        for number in range(strangers)
    ]
    tasks = [
        asyncio.create_task(molest(stranger, kinds[number % daemons % len(kinds)], told))
        for number, stranger in enumerate(crowd)
    ]
    ended = asyncio.create_task(asyncio.to_thread(sys.stdin.read))
    while not ended.done():
        streams = sum(len(stranger.streams) for stranger in crowd)
        holding = sum(bool(stranger.streams) for stranger in crowd)
        print(json.dumps({"streams": streams, "holding": holding, **told}), flush=True)
        await asyncio.wait({ended}, timeout=1.0)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await asyncio.gather(*(transport.close() for transport in transports))


class Crowd:
    """The attacking process, as seen from here."""

    def __init__(self, target: str, address: str, flags: argparse.Namespace) -> None:
        self.words = ["--attack", target, address, "--kinds", *flags.kinds]
        self.words += ["--strangers", str(flags.strangers), "--daemons", str(flags.daemons)]
        self.reports: list[dict[str, int]] = []
        self._begun = asyncio.Event()
        self._reader: asyncio.Task[None]
        self._process: asyncio.subprocess.Process

    async def __aenter__(self) -> Crowd:
        pipe = asyncio.subprocess.PIPE
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, __file__, *self.words, stdin=pipe, stdout=pipe
        )
        self._reader = asyncio.create_task(self._read())
        await self._begun.wait()
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            async with asyncio.timeout(20.0):
                await self._process.wait()
        except TimeoutError:
            self._process.kill()
            await self._process.wait()
        self._reader.cancel()

    async def _read(self) -> None:
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            self.reports.append(json.loads(line))
            self._begun.set()
        self._begun.set()  # it has ended, perhaps without a word


class Scales:
    """Resident memory of the peer and of its daemon, watched twice a second."""

    def __init__(self, pid: int) -> None:
        self.peer = psutil.Process(pid)
        self.daemons = self.peer.children(recursive=True)
        self.peak = [0, 0]

    def now(self) -> list[int]:
        return [
            self.peer.memory_info().rss,
            sum(daemon.memory_info().rss for daemon in self.daemons),
        ]

    def cpu_s(self) -> list[float]:
        """CPU seconds so far."""
        spent = [[process.cpu_times() for process in some] for some in ([self.peer], self.daemons)]
        return [sum(times.user + times.system for times in some) for some in spent]

    async def watch(self) -> None:
        while True:
            self.peak = [max(pair) for pair in zip(self.peak, self.now(), strict=True)]
            await asyncio.sleep(0.5)


async def steps(client: AsyncClient, tokens: int) -> list[float]:
    """Seconds between the pieces of one greedy answer."""
    times = []
    async for _ in client.stream(PROMPT, max_new_tokens=tokens):
        times.append(time.perf_counter())
    return [b - a for a, b in itertools.pairwise(times)]


async def weighed(
    client: AsyncClient, tokens: int, scales: Scales
) -> tuple[list[float], list[float]]:
    """The same, and CPU milliseconds a token of peer and daemon."""
    cpu_s = scales.cpu_s()
    times = await steps(client, tokens)
    return times, [(b - a) / tokens * 1e3 for a, b in zip(cpu_s, scales.cpu_s(), strict=True)]


def p95(times: list[float]) -> float:
    return statistics.quantiles(times, n=20)[-1]


async def measure(flags: argparse.Namespace) -> dict[str, object]:
    with LocalSwarm(["0:30"], threads=1) as local:
        peer = local.peers[0]
        address = next(line.split()[-1] for line in peer.lines if "/p2p/" in line)
        where, _, target = address.partition("/p2p/")
        async with AsyncClient(local.bootstrap, home=local.home / "client") as client:
            scales = Scales(peer.pid)
            for _ in range(2):  # what an allocator takes once it never gives back
                await steps(client, flags.tokens)
            quiet, cpu_quiet = await weighed(client, flags.tokens, scales)
            before = scales.now()
            print(f"before: {mib(before)} MiB, p95 {p95(quiet) * 1e3:.1f} ms", flush=True)
            watching = asyncio.create_task(scales.watch())
            async with Crowd(target, where, flags) as crowd:
                crowded, cpu_crowded = await weighed(client, flags.tokens, scales)
                crowded += await steps(client, flags.tokens)
                during = scales.now()
            watching.cancel()
            print(f"during: {mib(during)} MiB, p95 {p95(crowded) * 1e3:.1f} ms", flush=True)
            quiet += await steps(client, flags.tokens)
            after = scales.now()
    last = crowd.reports[-1]
    grown = [peak - start for peak, start in zip(scales.peak, before, strict=True)]
    return {
        "strangers": flags.strangers,
        "identities": flags.daemons,
        "held_streams_mean": statistics.mean(report["streams"] for report in crowd.reports),
        "holding_mean": statistics.mean(report["holding"] for report in crowd.reports),
        "tries": last["tries"],
        "refused": last.get("refused", 0),
        "peer_mib": mib([before[0], scales.peak[0], after[0]]),
        "daemon_mib": mib([before[1], scales.peak[1], after[1]]),
        "peer_growth_mib": grown[0] / 2**20,
        "daemon_growth_mib": grown[1] / 2**20,
        "peer_cpu_ms": [cpu_quiet[0], cpu_crowded[0]],
        "daemon_cpu_ms": [cpu_quiet[1], cpu_crowded[1]],
        "step_p50_ms": [statistics.median(quiet) * 1e3, statistics.median(crowded) * 1e3],
        "step_p95_ms": [p95(quiet) * 1e3, p95(crowded) * 1e3],
        "step_p95_ratio": p95(crowded) / p95(quiet),
    }


def mib(sizes: list[int]) -> list[float]:
    return [round(size / 2**20, 1) for size in sizes]


def rounded(value: object) -> object:
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return round(value, 2) if isinstance(value, float) else value


def main() -> None:
    parser = argparse.ArgumentParser(description="what a crowd of strangers costs a peer")
    parser.add_argument("--strangers", type=int, default=200)
    parser.add_argument("--daemons", type=int, default=18)
    parser.add_argument("--tokens", type=int, default=300)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="what they do")
    parser.add_argument("--attack", nargs=2, metavar=("PEER", "ADDRESS"), help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.attack:
        target, address = flags.attack
        asyncio.run(attack(PeerId(target), address, flags.strangers, flags.daemons, flags.kinds))
        return
    figures = asyncio.run(measure(flags))
    for name, value in figures.items():
        print(f"{name:20} {rounded(value)}")
    print(json.dumps({name: rounded(value) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
