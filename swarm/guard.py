"""hivemind's DHT made safe to leave open: its decoders, requests, storage and time, bounded.

Four things are done to hivemind from outside, for it offers no place for them (one: the validator):

- **Decoding.** Its msgpack wrapper decodes extension types within extension types without a limit,
  and a dictionary of records before anybody may look at it. The depth is counted, and dictionaries
  are read by a plain, flat decoder of our own (`unpack_dictionary`).
- **Requests.** One of 4 MiB may ask for 200,000 keys, and the loop stands still for seconds: more
  than `MAX_KEYS` are refused. An answer with an expiry in the far future ends a reader's search at
  once, with nothing: expiries in answers are cut to the horizon.
- **Storage.** It keeps whatever fits; ours keeps what `hexswarm.shelf` says.
- **Time.** It reads the machine's clock at each step; a process whose clock is put forward would
  throw away everything that it holds. It is given ours (`hexswarm.skew`).

Where a class of hivemind's is altered, that holds for the process, and only narrows what is taken.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import math
import random
import threading
from collections.abc import Callable
from typing import Any

import msgpack

from hexswarm.advice import SignedAdvice, check_entry, open_entry
from hexswarm.clock import Clock
from hexswarm.directory import EXPIRE_S, MAX_RECORD_BYTES, SKEW_S
from hexswarm.errors import RemoteProtocolError
from hexswarm.quota import address_block
from hexswarm.records import PeerId
from hexswarm.shelf import MAX_ENTRIES, Kept, Shelf
from hexswarm.skew import Sample
from hexswarm.transports.libp2p import load_hivemind

log = logging.getLogger(__name__)

MAX_DEPTH = 8
MAX_KEYS = 256
"""Keys of one request to store or to find. hivemind asks for 16, and tells a new neighbour all."""
TIME_S = 1.0
"""Limit for asking a node its time: a newcomer waits for it, also if one of those asked is gone."""


# --- decoding ----------------------------------------------------------------------------------


def unpack_dictionary(raw: bytes) -> list[tuple[str, bytes, float]]:
    """Subkeys, values and expiries of hivemind's dictionary type; ValueError if it is not ours."""
    try:
        outer = msgpack.unpackb(
            raw,
            max_array_len=MAX_ENTRIES,
            max_str_len=64,
            max_bin_len=MAX_RECORD_BYTES + 8,
            max_map_len=0,
            max_ext_len=0,
        )
    except (RecursionError, msgpack.UnpackException) as error:
        raise ValueError("a malformed dictionary") from error
    if type(outer) is not list or len(outer) != 3 or type(outer[2]) is not list:
        raise ValueError("a dictionary of another shape")
    items = []
    for item in outer[2]:
        if type(item) is not list or [type(part) for part in item] != [str, bytes, float]:
            raise ValueError("an entry of another shape")
        if not math.isfinite(item[2]):
            raise ValueError("an entry without an end")
        items.append((item[0], item[1], item[2]))
    return items


@functools.cache
def guard_decoding() -> None:
    """Bound what hivemind decodes and is asked (process-wide, once)."""
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
    _guard_dictionaries()
    _guard_requests()


def _guard_dictionaries() -> None:
    from hivemind.dht.storage import DictionaryDHTValue

    def unpackb(cls: Any, raw: bytes) -> Any:
        items = unpack_dictionary(raw)
        with cls().freeze() as made:
            for subkey, value, expires_s in items:
                made.store(subkey, value, expires_s)
        return made

    DictionaryDHTValue.unpackb = classmethod(unpackb)


def _guard_requests() -> None:
    """Hold `rpc_store` and `rpc_find` to MAX_KEYS, and answers to the horizon."""
    from hivemind.dht.protocol import DHTProtocol

    def few_keys(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        async def wrapped(self: Any, request: Any, context: Any) -> Any:
            if len(request.keys) > MAX_KEYS:
                raise ValueError(f"a request of {len(request.keys)} keys")
            return await method(self, request, context)

        return wrapped

    DHTProtocol.rpc_store = few_keys(DHTProtocol.rpc_store)
    DHTProtocol.rpc_find = few_keys(DHTProtocol.rpc_find)


# --- one node ------------------------------------------------------------------------------------


def validator(clock: Clock) -> Any:
    """Our admission rule in hivemind's shape; made at run time, for its base class is theirs."""
    base = load_hivemind().RecordValidatorBase

    class EntryValidator(base):  # type: ignore[misc, valid-type]
        def validate(self, record: Any) -> bool:
            try:
                check_entry(
                    record.key, record.subkey, record.value, record.expiration_time, clock.wall()
                )
            except RemoteProtocolError as error:
                log.debug("refused a DHT record: %s", error)
                return False
            return True

    return EntryValidator()


async def ask_time(node: Any, clock: Clock, most: int) -> list[Sample]:
    """The clocks of a few nodes that we know, against ours; who does not answer is left out."""
    from hivemind.proto import dht_pb2

    async def ask(peer: Any) -> Sample | None:
        request, began_s = dht_pb2.PingRequest(peer=node.protocol.node_info), clock.wall()
        try:
            answer = await node.protocol.get_stub(peer).rpc_ping(request, timeout=TIME_S)
        except Exception:  # hivemind's own kinds
            return None
        ended_s, theirs_s = clock.wall(), answer.dht_time
        if not (math.isfinite(theirs_s) and theirs_s > 0):
            return None
        return Sample((began_s + ended_s) / 2 - theirs_s, (ended_s - began_s) / 2)

    known = list(node.protocol.routing_table.uid_to_peer_id.values())
    chosen = random.sample(known, min(most, len(known)))
    return [found for found in await asyncio.gather(*map(ask, chosen)) if found is not None]


def guard_node(node: Any, clock: Clock) -> None:
    """Bound what this node stores and believes."""
    for name in ("storage", "cache"):
        early, bounded = getattr(node.protocol, name), _storage(Shelf(), clock)
        setattr(node.protocol, name, bounded)
        for key, (value, _) in early.items():  # what neighbours gave it while it joined
            for subkey, (data, expires_s) in value.items():
                bounded.store_subkey(key, subkey, data, expires_s)
    ask = node.protocol.call_find

    async def call_find(peer: Any, keys: Any) -> Any:
        answer = await ask(peer, keys)
        if answer is None:
            return None
        horizon_s = clock.wall() + EXPIRE_S + SKEW_S
        return {
            key: (_within(found, horizon_s), nearest) for key, (found, nearest) in answer.items()
        }

    node.protocol.call_find = call_find


def _within(found: Any, horizon_s: float) -> Any:
    """A found value with an expiry that cannot end a search for later ones."""
    if found is None or found.expiration_time <= horizon_s:
        return found
    return type(found)(found.value, horizon_s)  # NaN comes here, too


def _storage(shelf: Shelf, clock: Clock) -> Any:
    """hivemind's storage with our books in front."""
    from hivemind.dht.storage import DHTLocalStorage

    class BoundedStorage(DHTLocalStorage):  # type: ignore[misc]
        def store(self, key: Any, value: Any, expiration_time: float, subkey: Any = None) -> bool:
            if subkey is None:  # the dictionary itself, by way of store_subkey: not a stranger's
                return False
            return bool(self.store_subkey(key, subkey, value, expiration_time))

        def store_subkey(self, key: Any, subkey: Any, value: Any, expiration_time: float) -> bool:
            try:
                owner, block, sequence = _books(value)
            except RemoteProtocolError:
                return False
            now = clock.wall()
            if expiration_time <= now:
                return False
            dropped = shelf.put(key, owner, Kept(block, sequence, expiration_time), now)
            if dropped is None:
                return False
            for place, peer in dropped:
                self._drop(place, peer)
            return bool(super().store_subkey(key, subkey, value, expiration_time))

        def _drop(self, key: Any, subkey: Any) -> None:
            held = self.get(key)
            if held is not None and subkey in held.value:
                del held.value[subkey]

    return BoundedStorage()


def _books(value: bytes) -> tuple[PeerId, str, int]:
    """Owner, address block and sequence of an entry; advice claims no address."""
    entry = open_entry(value)
    if isinstance(entry, SignedAdvice):
        return entry.author, "", entry.sequence
    word = entry.announcement
    block = next(filter(None, map(address_block, word.addresses)), "")
    return word.peer, block, word.sequence


def use_time(now: Callable[[], float]) -> None:
    """Let hivemind go by `now` instead of the machine's clock (process-wide)."""
    load_hivemind()
    from hivemind.dht import node, protocol, routing
    from hivemind.utils import timed_storage

    for module in (timed_storage, protocol, node, routing):
        module.get_dht_time = now
