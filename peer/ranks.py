"""A tensor-parallel group inside one machine: this process leads, the other ranks are its children.

`Ranks` loads this process's part, starts one child for each other part (`hexswarm.peer.rank`), and
gives them commands; its `shard` stands where a `Shard` does (`hexswarm.peer.led`). Ranks on a CPU
add up through shared memory; ranks with a GPU each through memory that they link once all have
loaded (`hexswarm.peer.device_group`).

The children live as long as their group. If one dies, freezes or cannot compute, or if this process
fails in the midst of a command, the ranks are no longer in step: `lost` says so, and so does each
later call. `hexswarm.peer.pulse` notices it also while nobody computes. Whoever owns the group
closes it and makes another one, with KV that is empty.

Rejected: giving children the whole batch and a runner of their own (they would check payloads and
hold sampling state for nothing), threads (the interpreter's lock), fork (torch has threads), rank 0
as a child, too (one more way between the network and the device; what hangs here hangs in a sum,
and sums are ended from outside). POSIX only.
"""

from __future__ import annotations

import itertools
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from hexswarm.errors import HexswarmError, MemberLost, OutOfMemory
from hexswarm.kernels.quantise import Quantised
from hexswarm.peer import rendezvous
from hexswarm.peer.commands import Plan, pack_plan, receive, send
from hexswarm.peer.cuts import Cut, Part
from hexswarm.peer.device_group import DeviceGroup
from hexswarm.peer.division import even, in_words
from hexswarm.peer.led import LedShard
from hexswarm.peer.models.architecture import read_architecture
from hexswarm.peer.pulse import SILENT_S, Pulse
from hexswarm.peer.shard import Shard
from hexswarm.peer.shared_sums import (
    TIMEOUT_S,
    SharedSums,
    make_bells,
    make_memory,
    map_memory,
)
from hexswarm.peer.weights import load_span
from hexswarm.progress import Progress
from hexswarm.records import Span
from hexswarm.store import ModelFolder

LOADING_S = 600.0
"""Most that a child may take to read its weights, or to compile."""
ENDING_S = 2.0
"""For the children to end by themselves."""
_generations = itertools.count()


class Ranks:
    """A group from its start to its end, see `hexswarm.peer.hosting.Host`; a context manager."""

    def __init__(
        self,
        folder: ModelFolder,
        span: Span,
        cut: Cut,
        *,
        dtype: str = "float32",
        quant: str = "none",
        threads: int | Sequence[int] = 1,
        devices: Sequence[str] = (),
        backend: str = "auto",
        sums: str | None = None,
        timeout_s: float = TIMEOUT_S,
        silent_s: float = SILENT_S,
        progress: Progress | None = None,
    ) -> None:
        """Start the children; all ranks load at once. Raises MemberLost or what loading does.

        `threads` are those of each child, or of each rank; this process keeps its own. Without
        `devices` all ranks are on the CPU. `sums` are "shared", "nccl" or "gloo"; None: as the
        devices need it.
        """
        self.cut = cut
        # Of each rank; the first one's are its owner's matter.
        self.threads = [threads] * len(cut) if isinstance(threads, int) else list(threads)
        self._meeting = tempfile.TemporaryDirectory(prefix="hexswarm-ranks-")
        on_gpus = any(device != "cpu" for device in devices)
        self._plan = Plan(
            model=str(folder.gguf or folder.path),
            home=str(folder.home),
            digest=folder.spec.digest,
            first=span.first,
            end=span.end,
            dtype=dtype,
            threads=1,
            quant=quant,
            devices=tuple(devices),
            backend=backend,
            sums=sums or ("nccl" if on_gpus else "shared"),
            even=even(cut),
            meeting=str(Path(self._meeting.name) / "group"),
            generation=next(_generations),
            links=rendezvous.links(),
            timeout_s=timeout_s,
        )
        self.children: dict[int, subprocess.Popen[bytes]] = {}
        self.held_bytes: dict[int, int] = {}
        """Of weights, by rank."""
        self._doors: dict[int, socket.socket] = {}
        self._pulse: Pulse | None = None
        memory, bells = make_memory(len(cut)), make_bells(len(cut))
        self.sums: SharedSums | DeviceGroup
        if self._plan.sums == "shared":
            mapped = map_memory(memory, len(cut))
            self.sums = SharedSums(0, mapped, bells[0], timeout_s=timeout_s)
        else:
            self.sums = DeviceGroup(self._plan.sums, even=self._plan.even)
        try:
            self._start_all(memory, bells, silent_s)
            shard = self._load(folder, progress)
            self._await_loaded()
            if isinstance(self.sums, DeviceGroup):
                self._join(self.sums, shard)
            self.shard = LedShard(shard, self.sums, self.tell, self.done)
        except BaseException:
            self.close()
            raise
        finally:
            os.close(memory)

    def __enter__(self) -> Ranks:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def title(self) -> str:
        return in_words(self.cut)

    @property
    def lost(self) -> MemberLost | None:
        """Why the group is over, None while it is not."""
        return self.sums.lost

    def guard(self) -> None:
        """All is loaded, compiled and measured: from now on silence of a rank is a loss."""
        if self._pulse is not None:
            self._pulse.guard()
        if isinstance(self.sums, DeviceGroup):
            self.sums.guard()

    def tell(self, command: Sequence[Any]) -> None:
        """Give all children a command."""
        for rank, door in self._doors.items():
            try:
                send(door, command)
            except OSError as error:
                raise _lost(rank, "is gone or takes no commands") from error

    def done(self) -> None:
        """Wait until all children say that their last command is done."""
        for rank in self._doors:
            self._answer(rank, "done")

    def close(self) -> None:
        """End the children, those that do not listen by force; the device thread ended before."""
        self.sums.leave(_lost(0, "closed the group"))
        if self._pulse is not None:
            self._pulse.close()
        for door in self._doors.values():
            door.close()
        deadline_s = time.monotonic() + ENDING_S
        for child in self.children.values():
            with suppress(subprocess.TimeoutExpired):
                child.wait(max(0.0, deadline_s - time.monotonic()))
            child.kill()
            child.wait()
        self.sums.close()
        self._meeting.cleanup()

    def _end(self, rank: int, how: str) -> None:
        """A rank is lost, says the pulse, on its thread: wake whoever waits for that rank."""
        self.sums.leave(_lost(rank, how))
        for door in self._doors.values():
            with suppress(OSError):
                door.shutdown(socket.SHUT_RDWR)

    def _start_all(
        self, memory: int, bells: list[dict[int, socket.socket]], silent_s: float
    ) -> None:
        pulses: dict[int, socket.socket] = {}
        try:
            for part in self.cut.parts[1:]:
                pulses[part.rank] = self._start(part, memory, bells[part.rank])
        finally:
            for ends in bells[1:]:
                for bell in ends.values():
                    bell.close()  # else nobody would see the end of a child
            self._pulse = Pulse(pulses, self._end, silent_s=silent_s)

    def _start(self, part: Part, memory: int, bells: dict[int, socket.socket]) -> socket.socket:
        """Start a child; our end of its pulse."""
        door, theirs = socket.socketpair()
        pulse, answers = socket.socketpair()
        self._doors[part.rank] = door
        door.settimeout(self._plan.timeout_s)
        with theirs, answers:
            shared = [theirs.fileno(), answers.fileno(), memory]
            ends = [f"{rank}:{bell.fileno()}" for rank, bell in bells.items()]
            numbers = [*shared, *(bell.fileno() for bell in bells.values())]
            command = [sys.executable, "-P", "-m", "hexswarm.peer.rank"]
            self.children[part.rank] = subprocess.Popen(
                [*command, *map(str, shared), *ends], pass_fds=numbers
            )
        own = replace(self._plan, threads=self.threads[part.rank])
        send(door, pack_plan(own, part))
        return pulse

    def _load(self, folder: ModelFolder, progress: Progress | None) -> Shard:
        plan, part = self._plan, self.cut.parts[0]
        dtype = getattr(torch, plan.dtype)
        tensors = load_span(
            folder, plan.span, dtype=dtype, part=part, progress=progress, quant=plan.quant
        )
        shard = build(folder, tensors, plan, part, self.sums)
        self.held_bytes[0] = shard.weight_bytes
        return shard

    def _await_loaded(self) -> None:
        for rank in self._doors:
            self.held_bytes[rank] = self._answer(rank, "loaded")[0]

    def _join(self, sums: DeviceGroup, shard: Shard) -> None:
        """Meet in a process group, all ranks at once."""
        self.tell(["join"])
        sums.join_all(self._plan, shard)

    def _answer(self, rank: int, expected: str) -> list[Any]:
        """What a child says, which is `expected` with the fields returned, or why it fails."""
        door = self._doors[rank]
        door.settimeout(LOADING_S)
        try:
            answer = receive(door)
        except OSError as error:
            raise self.lost or _lost(rank, f"was not {expected} in time") from error
        if answer is None:
            raise self.lost or _lost(rank, "is gone")
        if answer[0] != expected:
            raise _failure(rank, *answer[1:])
        door.settimeout(self._plan.timeout_s)
        return answer[1:]


def build(
    folder: ModelFolder,
    tensors: dict[str, torch.Tensor | Quantised],
    plan: Plan,
    part: Part,
    sums: Any,
) -> Shard:
    """The shard of `part`, on its device, alike at all ranks."""
    a = read_architecture(folder.config)
    return Shard(
        *(a, plan.span, a.layers, tensors, plan.dtype, plan.device(part.rank)),
        backend=plan.backend,
        quant=plan.quant,
        part=part,
        sums=sums,
    )


def _failure(rank: int, kind: str, why: str) -> HexswarmError:
    """What a child said of its own failure."""
    if kind == "OutOfMemory":
        return OutOfMemory(f"rank {rank}: {why}", remedy="choose a shorter span or fewer KV tokens")
    return _lost(rank, f"cannot load: {why}")


def _lost(rank: int, how: str) -> MemberLost:
    return MemberLost(rank, "local", 0, how)
