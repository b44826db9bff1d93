"""hivemind's DHT in our own event loop: announce, read, and refuse what is not in order.

`SwarmDht` wraps one `DHTNode`. No DHT process is started (measured: no gain, 100-200 MiB more).
Two things are done before a node exists, because hivemind's defaults let a stranger erase or forge
records: our validator is installed on every node (`directory.check_record`), and the depth of its
recursive msgpack decoding is bounded.

The node joins by dialling addresses itself (bootstraps and peers remembered on disk) instead of
giving them to the daemon: a daemon with only dead bootstraps refuses to start, and a swarm must
outlive its bootstraps.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import logging
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hexswarm.directory import (
    EXPIRE_S,
    INDEX,
    SignedAnnouncement,
    check_record,
    directory_key,
    open_record,
    shard_of,
)
from hexswarm.errors import BootstrapUnreachable, PeerLost, RemoteProtocolError
from hexswarm.records import PeerId, Remembered
from hexswarm.transports.libp2p import Libp2pTransport, check_address, load_hivemind

log = logging.getLogger(__name__)

MAX_DEPTH = 8
JOIN_S = 6.0
CLOSE_S = 5.0
REMEMBER = 64


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
        clock: Any,
    ) -> SwarmDht:
        """Start a node and enter the swarm.

        Without any bootstrap address a new swarm begins (unless a remembered peer answers).
        Raises BootstrapUnreachable if addresses were given, nobody answered and
        it was not asked to stay `alone`.
        """
        hivemind = load_hivemind()
        _guard_decoding()
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
            record_validator=_validator(clock),
            ensure_bootstrap_success=False,
            num_workers=8,
            wait_timeout=3,
            bootstrap_timeout=JOIN_S / 2,
            cache_locally=False,
            cache_on_store=False,
            cache_nearest=0,
            strict=False,
        )
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
        found = await self._node.get_many(keys, sufficient_expiration_time=float("inf"))
        records = []
        for entry in found.values():
            if entry is None or not isinstance(entry.value, dict):
                continue
            for item in entry.value.values():
                with contextlib.suppress(RemoteProtocolError):
                    if isinstance(item.value, bytes):
                        records.append(open_record(item.value))
        return records

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

    async def close(self) -> None:
        with contextlib.suppress(TimeoutError):  # a dead daemon never answers
            async with asyncio.timeout(CLOSE_S):
                await self._node.shutdown()


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


def _validator(clock: Any) -> Any:
    """Our admission rule in hivemind's shape; made at run time, for its base class is theirs."""
    base = load_hivemind().RecordValidatorBase

    class AnnouncementValidator(base):  # type: ignore[misc, valid-type]
        def validate(self, record: Any) -> bool:
            try:
                check_record(
                    record.key, record.subkey, record.value, record.expiration_time, clock.wall()
                )
            except RemoteProtocolError as error:
                log.debug("refused a DHT record: %s", error)
                return False
            return True

    return AnnouncementValidator()


@functools.cache
def _guard_decoding() -> None:
    """Bound the recursion of hivemind's msgpack decoding (process-wide, once)."""
    serializer = load_hivemind().MSGPackSerializer
    original = serializer._decode_ext_types.__func__
    state = threading.local()

    def guarded(cls: Any, type_code: int, data: bytes) -> Any:
        depth = getattr(state, "depth", 0)
        if depth >= MAX_DEPTH:
            raise ValueError("a record is nested too deeply")
        state.depth = depth + 1
        try:
            return original(cls, type_code, data)
        finally:
            state.depth = depth

    serializer._decode_ext_types = classmethod(guarded)


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
