"""hivemind's DHT in our own event loop: announce, read, and refuse what is not in order.

`SwarmDht` wraps one `DHTNode`. No DHT process is started (measured: no gain, 100-200 MiB more).
hivemind's defaults let a stranger erase, forge and hide records, so every node has our validator
(`advice.check_entry`), and what it decodes, keeps and believes is bounded (`hexswarm.guard`).

The node joins by dialling addresses itself (bootstraps and peers remembered on disk) instead of
giving them to the daemon: a daemon with only dead bootstraps refuses to start, and a swarm must
outlive its bootstraps.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from hexswarm.advice import SignedAdvice, advice_key, open_advice
from hexswarm.clock import Clock
from hexswarm.directory import (
    EXPIRE_S,
    INDEX,
    SignedAnnouncement,
    directory_key,
    open_record,
    shard_of,
)
from hexswarm.errors import BootstrapUnreachable, PeerLost, RemoteProtocolError
from hexswarm.guard import ask_time, guard_decoding, guard_node, use_time, validator
from hexswarm.records import PeerId, Remembered
from hexswarm.skew import ASKED, LIMIT_S, Sample, SteadyClock, offset, skew
from hexswarm.transports.libp2p import Libp2pTransport, check_address, load_hivemind

JOIN_S = 6.0
CLOSE_S = 5.0
REMEMBER = 64

T = TypeVar("T")


class SwarmDht:
    """Our node of the directory."""

    def __init__(self, transport: Libp2pTransport, node: Any) -> None:
        self._transport = transport
        self._node = node
        self._dialled: set[PeerId] = set()

    @classmethod
    async def join(
        cls,
        transport: Libp2pTransport,
        *,
        bootstrap: Sequence[str] = (),
        remembered: Sequence[Remembered] = (),
        client: bool = False,
        alone: bool = False,
        clock: Clock,
    ) -> SwarmDht:
        """Start a node and enter the swarm.

        Without any bootstrap address a new swarm begins (unless a remembered peer answers).
        Raises BootstrapUnreachable if addresses were given, nobody answered and
        it was not asked to stay `alone`; ClockSkew if those who answered have another time (a node
        that may be `alone` joins all the same: it may be they who are wrong).
        """
        hivemind = load_hivemind()
        if isinstance(clock, SteadyClock):
            use_time(clock.wall)
        guard_decoding()
        nodes = _targets(bootstrap, remembered)
        answered = await _dial_all(transport, nodes)
        if bootstrap and not answered and not alone:
            raise BootstrapUnreachable(
                f"none of the {len(bootstrap)} bootstrap address(es) answered",
                remedy="check the address and that `hexswarm bootstrap` runs there",
            )
        node = await hivemind.DHTNode.create(
            p2p=transport.p2p,
            initial_peers=[f"/ip4/127.0.0.1/tcp/1/p2p/{peer}" for peer in answered] or None,
            client_mode=client,
            record_validator=validator(clock),
            ensure_bootstrap_success=False,
            num_workers=8,
            wait_timeout=3,
            bootstrap_timeout=JOIN_S / 2,
            cache_locally=False,
            cache_on_store=False,
            cache_nearest=0,
            strict=False,
        )
        guard_node(node, clock)
        samples = await ask_time(node, clock, ASKED)
        if isinstance(clock, SteadyClock):
            clock.judge(samples)
        if abs(ahead_s := offset(samples)) > LIMIT_S and not alone:
            await _shut(node)
            raise skew(ahead_s, len(samples))
        return cls(transport, node)

    async def announce(self, record: SignedAnnouncement, shards: int = 1) -> bool:
        """Store `record` under its model and in the index; True if somebody took it."""
        keys = [
            directory_key(model, shard_of(record.peer, shards), shards)
            for model in (record.announcement.model, INDEX)
        ]
        stored = await self._node.store_many(
            keys, [record.data] * 2, [record.expires_s] * 2, subkeys=[record.peer] * 2
        )
        return any(stored.values())

    async def read(self, model: str = INDEX, shards: int = 1) -> list[SignedAnnouncement]:
        """All announcements of `model` (a digest) that can be found now."""
        keys = [directory_key(model, shard, shards) for shard in range(shards)]
        # One by one: several full shards would not fit one answer.
        found = await asyncio.gather(*map(self._values, keys))
        return [record for values in found for record in _opened(values, open_record)]

    async def advise(self, record: SignedAdvice) -> bool:
        """Store an advice; True if somebody took it."""
        stored = await self._node.store(
            advice_key(record.proposal.model),
            record.data,
            record.expires_s,
            subkey=record.author,
        )
        return bool(stored)

    async def read_advice(self, model: str) -> list[SignedAdvice]:
        """All advice for `model` (a digest) that can be found now."""
        return _opened(await self._values(advice_key(model)), open_advice)

    async def _values(self, key: str) -> list[bytes]:
        """What is stored under `key`."""
        entry = await self._node.get(key, latest=True)
        if entry is None or not isinstance(entry.value, dict):
            return []
        values = [item.value for item in entry.value.values()]
        return [value for value in values if isinstance(value, bytes)]

    async def meet(self, records: Sequence[SignedAnnouncement]) -> None:
        """Let the daemon know the addresses of announced peers, new ones only.

        libp2p's own routing does not find peers in private address ranges, and this is what keeps
        the swarm connected when every bootstrap is gone.
        """
        fresh = [
            record.announcement
            for record in records
            if record.peer not in self._dialled and record.peer != self._transport.local
        ][:REMEMBER]
        self._dialled |= {announcement.peer for announcement in fresh}
        failed = await asyncio.gather(
            *(self._transport.connect(a.peer, a.addresses) for a in fresh if a.addresses),
            return_exceptions=True,
        )
        for outcome in failed:
            if isinstance(outcome, PeerLost):
                self._dialled.discard(PeerId(outcome.peer))

    async def times(self, clock: Clock) -> list[Sample]:
        """What a few other nodes say of our time."""
        return await ask_time(self._node, clock, ASKED)

    async def close(self) -> None:
        await _shut(self._node)


def _opened(values: Sequence[bytes], opener: Callable[[bytes], T]) -> list[T]:
    """Those in order; the validator lets none through that is not, save by a bug of its own."""
    records = []
    for value in values:
        with contextlib.suppress(RemoteProtocolError):
            records.append(opener(value))
    return records


async def _shut(node: Any) -> None:
    with contextlib.suppress(TimeoutError):  # a dead daemon never answers
        async with asyncio.timeout(CLOSE_S):
            await node.shutdown()


def _targets(
    bootstrap: Sequence[str], remembered: Sequence[Remembered]
) -> list[tuple[PeerId, list[str]]]:
    nodes: dict[PeerId, list[str]] = {}
    for address in bootstrap:
        where, _, peer = check_address(address).rpartition("/p2p/")
        nodes.setdefault(PeerId(peer), []).append(where)
    for known in remembered[:REMEMBER]:
        nodes.setdefault(known.peer, []).extend(known.addresses)
    return list(nodes.items())


async def _dial_all(
    transport: Libp2pTransport, nodes: Sequence[tuple[PeerId, list[str]]]
) -> list[PeerId]:
    others = [(peer, where) for peer, where in nodes if peer != transport.local]
    outcomes = await asyncio.gather(
        *(transport.connect(peer, where) for peer, where in others), return_exceptions=True
    )
    for outcome in outcomes:
        if isinstance(outcome, BaseException) and not isinstance(outcome, PeerLost):
            raise outcome
    return [peer for (peer, _), outcome in zip(others, outcomes, strict=True) if outcome is None]


# --- peers remembered on disk ------------------------------------------------------------------


def load_remembered(path: Path) -> list[Remembered]:
    """Peers seen before, latest first; an unreadable file counts as empty."""
    try:
        entries = json.loads(path.read_text())
        found = [
            Remembered(PeerId(str(e["peer"])), tuple(map(str, e["addresses"])), float(e["seen_s"]))
            for e in entries
        ]
    except (OSError, ValueError, TypeError, KeyError):
        return []
    return sorted(found, key=lambda known: -known.seen_s)[:REMEMBER]


def save_remembered(path: Path, known: Sequence[Remembered]) -> None:
    """Write the file anew, at once as a whole."""
    latest = sorted(known, key=lambda entry: -entry.seen_s)[:REMEMBER]
    rows = [
        {"peer": entry.peer, "addresses": entry.addresses, "seen_s": entry.seen_s}
        for entry in latest
    ]
    with contextlib.suppress(OSError):  # a full disk must not end a peer
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(".new")
        draft.write_text(json.dumps(rows))
        draft.replace(path)


def expiry(now: float) -> float:
    """When a record announced at `now` runs out."""
    return now + EXPIRE_S
