"""From a config to a peer that offers itself for groups: listener, speed, memory, and the rest.

Who cuts layers in proportion must know how fast each member is before it holds anything. So a peer
that waits for a group times one layer of the model, loaded for that alone; the figure is kept like
any other measured speed.
"""

from __future__ import annotations

import asyncio
import platform
from dataclasses import replace

import torch

from hexswarm.config import PeerConfig
from hexswarm.errors import UsageError
from hexswarm.peer.cache import BLOCK_TOKENS
from hexswarm.peer.cuts import Sizes
from hexswarm.peer.fitting import MEMORY_SHARE
from hexswarm.peer.groups.actions import Facts, Own
from hexswarm.peer.groups.division import cut_of
from hexswarm.peer.groups.epoch import Epoch, LoadPart, Owner
from hexswarm.peer.groups.formation import Formation
from hexswarm.peer.groups.grouped import Grouped
from hexswarm.peer.groups.streams import Door, Place
from hexswarm.peer.hosting import Hosting
from hexswarm.peer.life import Life
from hexswarm.peer.memory import free_bytes
from hexswarm.peer.models.architecture import read_architecture
from hexswarm.peer.patience import LIMITS, Limits
from hexswarm.peer.probe import CHUNK_TOKENS, Measured, cached, measure
from hexswarm.peer.runner import Runner
from hexswarm.peer.shard import Shard
from hexswarm.peer.slices import read_sizes
from hexswarm.peer.stream_sums import StreamSums
from hexswarm.peer.weights import load_span
from hexswarm.progress import Progress
from hexswarm.records import DTYPES, Span, Speed
from hexswarm.store import resolve
from hexswarm.version import __version__

MOST_FLOOR_S = 4.0
"""A frozen member is noticed so late at worst, with a little grace."""
WILDCARDS = ("0.0.0.0", "::")
PROBE_BLOCKS = -(-4 * CHUNK_TOKENS // BLOCK_TOKENS)
"""Of KV, for the layer that is timed."""


async def enter(life: Life, machine: Hosting, progress: Progress) -> Grouped:
    """Open the door and be ready to offer ourselves; the model is known, the network joined.

    Raises AddressInUse, UsageError or what loading a layer does.
    """
    config, folder = life.config, life.folder
    addresses = await life.member.transport.addresses()
    door = Door(life.identity, config.host, config.group_port)
    try:
        speed = await asyncio.to_thread(_layer_speed, life, progress)
        facts = _facts(life, direct_host(config, addresses), door.port)
    except BaseException:
        door.close()
        raise
    room = config.memory or int(free_bytes(life.device) * MEMORY_SHARE)
    own = Own(Span(0, folder.spec.layers), room, speed.decode_layer_s)
    load, limits = _loader(life, progress), limits_of(speed)

    def begin(place: Place, owner: Owner, before: Epoch | None) -> Epoch:
        return Epoch(place, door, load, owner, before, limits)

    return Grouped(life, machine, Formation(facts, life.rng), door, begin, own)


def limits_of(speed: Speed) -> Limits:
    """When a member is late: who computes a layer of a prompt cannot answer meanwhile."""
    layer_s = CHUNK_TOKENS * speed.prefill_layer_s
    return replace(LIMITS, floor_s=min(max(LIMITS.floor_s, layer_s), MOST_FLOOR_S))


def direct_host(config: PeerConfig, addresses: tuple[str, ...]) -> str:
    """Where direct streams come in: as we listen, or, if that is everywhere, as others reach us.

    Raises UsageError if that is not known.
    """
    if config.host not in WILDCARDS:
        return config.host
    for address in (*config.announce, *addresses):
        parts = address.split("/")
        if len(parts) > 4 and parts[1] in ("ip4", "ip6") and "p2p-circuit" not in parts:
            return parts[2]
    raise UsageError(
        "no address is known under which neighbours reach this peer",
        remedy="listen on an address of the LAN with --host",
    )


def _facts(life: Life, host: str, port: int) -> Facts:
    config, folder = life.config, life.folder
    value_bytes = DTYPES[life.dtype]

    def sizes_of(span: Span) -> Sizes:
        return read_sizes(folder.config, span, value_bytes)

    return Facts(
        peer=life.peer,
        name=config.group,
        size=config.group_size,
        model=folder.spec.digest,
        layers=folder.spec.layers,
        numerics=life.dtype if config.quant == "none" else f"{life.dtype}+{config.quant}",
        host=host,
        port=port,
        leads=config.span is not None,
        kv_tokens=config.kv_tokens,
        kv_value_bytes=value_bytes,
        sizes_of=sizes_of,
    )


def _loader(life: Life, progress: Progress) -> LoadPart:
    """What loads our part in an epoch."""
    config, device, dtype = life.config, life.device, life.dtype

    def load(place: Place, sums: StreamSums) -> Shard:
        asked = place.invitation
        folder = resolve(config.model, home=config.cache, progress=progress, span=asked.span)
        sizes = read_sizes(folder.config, asked.span, DTYPES[dtype])
        part = cut_of(sizes, asked.shares).parts[place.rank]
        if config.threads:
            torch.set_num_threads(config.threads)
        kind = getattr(torch, dtype)
        tensors = load_span(
            folder, asked.span, dtype=kind, progress=progress, part=part, quant=config.quant
        )
        a, layers = read_architecture(folder.config), folder.spec.layers
        return Shard(
            *(a, asked.span, layers, tensors, dtype, device),
            quant=config.quant,
            part=part,
            sums=sums,
        )

    return load


def _layer_speed(life: Life, progress: Progress) -> Speed:
    """Of one layer of the middle; blocking."""
    config, device, dtype = life.config, life.device, life.dtype
    middle = life.folder.spec.layers // 2
    span = Span(middle, middle + 1)
    if config.threads:
        torch.set_num_threads(config.threads)
    parts = (
        *("one layer", life.folder.spec.digest, dtype, config.quant, device),
        *(torch.get_num_threads(), __version__, torch.__version__),
        *(platform.processor(), platform.node()),
    )

    def timed() -> Measured:
        folder = resolve(config.model, home=config.cache, progress=progress, span=span)
        kind = getattr(torch, dtype)
        tensors = load_span(folder, span, dtype=kind, progress=progress, quant=config.quant)
        a, spec = read_architecture(folder.config), folder.spec
        shard = Shard(a, span, spec.layers, tensors, dtype, device, quant=config.quant)
        runner = Runner(shard, shard.make_pool(PROBE_BLOCKS))
        return measure(runner.run, span, spec.layers, spec.hidden, dtype)

    progress.note(f"measuring the speed of a layer on {device}")
    return cached(config.cache / "speed.json", parts, timed).speed
