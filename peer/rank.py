"""A rank of a tensor-parallel group that is not its first: a child of the peer's process.

    python -m hexswarm.peer.rank DOOR PULSE MEMORY RANK:BELL...

with the descriptors of its sockets to rank 0 (commands; signs of life), of the shared memory and of
its bells. It loads its part, then does what rank 0 does, command by command, until that closes the
sockets or dies. What goes wrong here ends the process, and by that the group.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import torch

from hexswarm.errors import CorruptWeights, HexswarmError, MemberLost
from hexswarm.peer.commands import Plan, receive, send, unpack_plan
from hexswarm.peer.cuts import Part
from hexswarm.peer.device_group import DeviceGroup
from hexswarm.peer.following import Follower
from hexswarm.peer.pulse import answer
from hexswarm.peer.ranks import build
from hexswarm.peer.shard import Shard
from hexswarm.peer.shared_sums import SharedSums, map_memory
from hexswarm.peer.weights import load_span
from hexswarm.store import resolve

log = logging.getLogger(__name__)


def load(plan: Plan, part: Part, sums: SharedSums | DeviceGroup) -> Shard:
    """The shard of `part`. Raises a ModelError or OutOfMemory."""
    folder = resolve(plan.model, home=Path(plan.home))
    if folder.spec.digest != plan.digest:
        raise CorruptWeights(f"{plan.model} is not the model that rank 0 has")
    dtype = getattr(torch, plan.dtype)
    tensors = load_span(folder, plan.span, dtype=dtype, part=part, quant=plan.quant)
    return build(folder, tensors, plan, part, sums)


def follow(door: socket.socket, memory: int, bells: dict[int, socket.socket]) -> None:
    """The life of a rank."""
    first = receive(door)
    if first is None:
        return
    plan, part = unpack_plan(first)
    torch.set_num_threads(plan.threads)
    sums = _sums(plan, part, memory, bells)
    try:
        shard = load(plan, part, sums)
    except HexswarmError as error:
        send(door, ["failed", type(error).__name__, error.cause])
        return
    send(door, ["loaded", shard.weight_bytes])
    follower = Follower(shard, sums, lambda said: send(door, said))
    while (command := receive(door)) is not None:
        if command[0] == "join" and isinstance(sums, DeviceGroup):
            sums.join_all(plan, shard)
        else:
            follower.obey(command)


def _sums(
    plan: Plan, part: Part, memory: int, bells: dict[int, socket.socket]
) -> SharedSums | DeviceGroup:
    if plan.sums != "shared":
        return DeviceGroup(plan.sums, even=plan.even)
    mapped = map_memory(memory, part.size, plan.term)
    return SharedSums(part.rank, mapped, bells, term=plan.term, timeout_s=plan.timeout_s)


def main(arguments: Sequence[str]) -> int:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # rank 0 decides when the group ends
    door, pulse, memory, *others = arguments
    pairs = (one.split(":") for one in others)
    bells = {int(rank): socket.socket(fileno=int(bell)) for rank, bell in pairs}
    life = socket.socket(fileno=int(pulse))
    threading.Thread(target=answer, args=(life,), name="hexswarm-pulse", daemon=True).start()
    try:
        with socket.socket(fileno=int(door)) as opened:
            follow(opened, int(memory), bells)
    except (MemberLost, ConnectionError) as error:
        log.warning("the group ends: %s", error)
        return 1
    finally:
        os.close(int(memory))
    return 0


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stderr.flush()
    os._exit(status)  # a device that waits for a rank that is gone would not let go
