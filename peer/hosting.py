"""Where a peer's layers are computed: one device, or a group of ranks that stands for one.

A `Host` has a shard for the runner, tells when it is `lost`, and is closed. `Hosting` makes hosts,
again and again if need be: it is asked when one can be started, and told when one was lost, so that
how long to wait, and when to give up, is its own matter. The daemon knows nothing of ranks.

`Machine` is the usual hosting: this machine's own devices, as `--tensor-parallel` says. Ranks on
one CPU share its cores out in proportion to their parts; ranks with a GPU each are as fast as their
cards read memory, which is measured if the cards are not all of one kind.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Protocol

import torch

from hexswarm.clock import Clock
from hexswarm.config import PeerConfig
from hexswarm.degree import Degree
from hexswarm.errors import HexswarmError, MemberLost, UsageError
from hexswarm.kernels.dispatch import choose
from hexswarm.peer.division import Load, Places, divide
from hexswarm.peer.fitting import held_bytes, kept_bits, kv_bytes, shrink
from hexswarm.peer.memory import free_bytes
from hexswarm.peer.models.architecture import read_architecture
from hexswarm.peer.ranks import Ranks
from hexswarm.peer.restarts import Restarts
from hexswarm.peer.shard import BITS, Shard
from hexswarm.peer.shares import apportion
from hexswarm.peer.slices import read_sizes
from hexswarm.peer.weights import stream_span
from hexswarm.progress import Progress
from hexswarm.records import DTYPES, Span
from hexswarm.store import ModelFolder

_READ_BYTES = 256 << 20
_READS = 8


class Host(Protocol):
    """What computes a span, from its start to its end."""

    shard: Any
    """What the runner and `loading` ask of a `Shard`."""

    @property
    def title(self) -> str:
        """What it is, in a few words; nothing for one device."""

    @property
    def lost(self) -> MemberLost | None:
        """Why it can compute no longer; asked often, from any thread, and never waits."""

    def guard(self) -> None:
        """All is loaded, compiled and measured: from now on silence is a loss."""

    def close(self) -> None:
        """End it, after the device thread; not in the event loop, since it may wait."""


class Hosting(Protocol):
    """Where hosts come from."""

    def places(self, device: str) -> Places | None:
        """The devices with what is free of their memory, to choose layers by; None for one."""

    async def ready(self) -> None:
        """Return when a host can be started; raises HexswarmError when none ever will."""

    def start(
        self, folder: ModelFolder, span: Span, device: str, dtype: str, progress: Progress
    ) -> Host:
        """Load `span`; not in the event loop. Raises HexswarmError."""

    def lost(self, error: HexswarmError) -> None:
        """A host was lost, or could not be started anew."""


@dataclass(slots=True)
class Alone:
    """One process, one device."""

    shard: Shard
    title: str = ""
    lost: MemberLost | None = None

    def guard(self) -> None:
        """Nobody else is there."""

    def close(self) -> None:
        """Nothing but memory, which goes with the shard."""


class Machine:
    """Hosts on the devices of this machine."""

    def __init__(self, config: PeerConfig, clock: Clock) -> None:
        self._config, self._clock = config, clock
        self._cores = config.threads or torch.get_num_threads()
        self._restarts = Restarts()
        self._pause_s: float | None = 0.0
        self._error: HexswarmError | None = None

    def places(self, device: str) -> Places | None:
        """Raises UsageError if there are not as many."""
        degree = self._config.tensor_parallel
        devices = _devices(degree, device)
        if len(devices) == 1:
            return None
        own = ("cpu",) if devices[0] == "cpu" else devices
        speeds = (1.0,) * len(devices) if len(own) == 1 else _speeds(devices)
        return Places(devices, speeds, tuple(map(free_bytes, own)))

    async def ready(self) -> None:
        if self._pause_s is None:
            assert self._error is not None
            self._error.remedy = "see what is wrong with its device, then start the peer again"
            raise self._error
        await asyncio.sleep(self._pause_s)

    def lost(self, error: HexswarmError) -> None:
        self._pause_s = self._restarts.failed(self._clock.monotonic())
        self._error = error

    def start(
        self, folder: ModelFolder, span: Span, device: str, dtype: str, progress: Progress
    ) -> Host:
        places = self.places(device)
        if places is None:
            torch.set_num_threads(self._cores)
            host: Host = self._alone(folder, span, device, dtype, progress)
        else:
            host = self._ranks(folder, span, places, dtype, progress)
        self._restarts.started(self._clock.monotonic())
        return host

    def _alone(
        self, folder: ModelFolder, span: Span, device: str, dtype: str, progress: Progress
    ) -> Alone:
        a, quant = read_architecture(folder.config), self._config.quant
        held = held_bytes(folder, span, dtype, kept_bits(self._config, folder, device, dtype))
        kind, layers = getattr(torch, dtype), folder.spec.layers
        with stream_span(
            folder, span, dtype=kind, device=device, progress=progress, quant=quant, held=held
        ) as tensors:
            shard = Shard(a, span, layers, tensors, dtype, device, quant=quant)
        return Alone(shard)

    def _ranks(
        self, folder: ModelFolder, span: Span, places: Places, dtype: str, progress: Progress
    ) -> Ranks:
        degree, on_cpu = self._config.tensor_parallel, places.devices[0] == "cpu"
        sizes, backend = read_sizes(folder.config, span, DTYPES[dtype]), "torch"
        if not on_cpu:
            backend = _backend(folder, places.devices, dtype)
        bits = BITS[self._config.quant] if backend == "triton" else 16
        kv = kv_bytes(folder, dtype, self._config.kv_tokens) * len(span)
        cut = divide(sizes, degree, places, Load(kv, shrink(folder, span, dtype, bits)))
        threads = [max(1, self._cores // len(cut))] * len(cut)
        if on_cpu and self._cores >= len(cut):
            threads = apportion(self._cores, [Fraction(share) for share in cut.shares])
        torch.set_num_threads(threads[0])
        progress.note(f"starting {len(cut)} ranks for layers {span}")
        return Ranks(
            *(folder, span, cut),
            dtype=dtype,
            quant=self._config.quant,
            threads=threads,
            devices=places.devices,
            backend=backend,
            progress=progress,
        )


def _devices(degree: Degree, device: str) -> tuple[str, ...]:
    """Of each rank."""
    kind = torch.device(device)
    if kind.type == "cpu":
        return ("cpu",) * (degree.count or 1)
    there = torch.cuda.device_count()
    count = degree.count or there
    if count > 1 and kind.index is not None:
        raise UsageError(
            f"--device {device} is one GPU, --tensor-parallel {degree} wants {count}",
            remedy="say --device cuda, and CUDA_VISIBLE_DEVICES for which",
        )
    if count > there:
        raise UsageError(
            f"--tensor-parallel {degree} wants {count} GPUs, this machine has {there}",
            remedy=f"at most --tensor-parallel {there}, or --device cpu",
        )
    return (device,) if count == 1 else tuple(f"cuda:{n}" for n in range(count))


def _backend(folder: ModelFolder, devices: Sequence[str], dtype: str) -> str:
    """The same for all, since ranks must sum alike: what the oldest card can."""
    head_dim = read_architecture(folder.config).head_dim
    found = {choose(torch.device(one), getattr(torch, dtype), head_dim) for one in devices}
    return found.pop() if len(found) == 1 else "torch"


def _speeds(devices: Sequence[str]) -> tuple[float, ...]:
    """Bytes that each card reads in a second; of cards of one kind nothing is measured."""
    if len({torch.cuda.get_device_name(one) for one in devices}) == 1:
        return (1.0,) * len(devices)
    return tuple(_read_bytes_per_s(one) for one in devices)


def _read_bytes_per_s(device: str) -> float:
    """A decode step is reading: the best of a few."""
    x = torch.zeros(_READ_BYTES // 4, device=device)
    best = float("inf")
    for _ in range(_READS):
        torch.cuda.synchronize(device)
        began = time.perf_counter()
        x.sum().item()
        best = min(best, time.perf_counter() - began)
    del x
    torch.cuda.empty_cache()
    return _READ_BYTES / best
