"""What the fuzzer throws at our decoders: valid inputs, what takes them, what they may raise.

A target makes a mutated input from a random generator and hands back a call. The call returns True
if the input was accepted, False if it was refused with one of the typed errors that the target may
raise; anything else that it raises is a crash. Inputs begin valid, for random bytes stop at the
first check: see `fuzz_mutations.py`.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import msgpack
from fuzz_mutations import mutate, mutate_tree, mutate_value

from hexswarm import advice
from hexswarm.advice import Proposal, SignedAdvice, advice_key, tail_of
from hexswarm.directory import SignedAnnouncement, directory_key, sign
from hexswarm.errors import CorruptWeights, ModelError, RemoteProtocolError, UsageError
from hexswarm.gguf import read_gguf
from hexswarm.gguf_config import gguf_config
from hexswarm.guard import guard_decoding, unpack_dictionary
from hexswarm.headers import check_safetensors
from hexswarm.identity import Identity
from hexswarm.messages import _KINDS, Message, decode, encode
from hexswarm.peer.groups import invitation
from hexswarm.peer.groups.invitation import Invitation, Seat, open_invitation
from hexswarm.records import (
    Announcement,
    Coordinates,
    GroupMembership,
    GroupOffer,
    PeerId,
    Span,
    Speed,
)
from hexswarm.templates import RENDER_S, Templates
from hexswarm.transports.libp2p import load_hivemind
from hexswarm.wire import FrameDecoder, pack

NOW = 1.7e9
MODEL = "ab" * 32
KEYS = [Identity(bytes([number]) * 32) for number in range(1, 5)]

Call = Callable[[], bool]


@dataclass(frozen=True)
class Target:
    """`make` draws an input: the call, and the bytes to print if it crashes."""

    name: str
    weight: int
    make: Callable[[random.Random], tuple[Call, bytes]]
    limit_s: float = 0.05


# --- messages and frames ------------------------------------------------------------------------

_SAMPLES: dict[str, Any] = {
    "bytes": b"k" * 16,
    "int": 1,
    "float": 0.5,
    "bool": True,
    "str": "",
    "tuple[str, ...]": ("/ip4/10.0.0.1/tcp/31337",),
    "tuple[int, ...]": (1, 2),
}


def example(kind: type[Message]) -> Message:
    """A valid message of `kind`, whatever fields it has."""
    values = {item.name: _SAMPLES[str(item.type)] for item in fields(kind)}
    if "dtype" in values:
        values["dtype"] = "float32"
    return kind(**values)


HEADERS = [encode(example(kind)) for kind in _KINDS.values()]
FRAMES = [
    b"".join(bytes(part) for part in pack(example(kind), payload))
    for kind in _KINDS.values()
    for payload in (b"", b"\0\0\0\1", bytes(1500))
]


def messages(rng: random.Random) -> tuple[Call, bytes]:
    header = rng.choice(HEADERS)
    data = mutate_tree(header, rng) if rng.random() < 0.7 else mutate(header, rng, HEADERS)

    def call() -> bool:
        try:
            encode(decode(data))  # what is taken can be sent on
        except RemoteProtocolError:
            return False
        return True

    return call, data


def frames(rng: random.Random) -> tuple[Call, bytes]:
    """A few frames on one stream, mutated, in pieces of any size."""
    stream = b"".join(rng.choice(FRAMES) for _ in range(rng.randint(1, 4)))
    data = mutate(stream, rng, FRAMES)
    cuts = sorted(rng.randint(0, len(data)) for _ in range(rng.randint(0, 5)))

    def call() -> bool:
        decoder, taken = FrameDecoder(), 0
        try:
            for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True):
                taken += len(decoder.feed(data[start:end], 0.0))
        except RemoteProtocolError:
            return False
        assert decoder.held <= len(data)
        return taken > 0

    return call, data


# --- records ------------------------------------------------------------------------------------


def announcement(peer: PeerId, **changes: Any) -> Announcement:
    values: dict[str, Any] = {
        "peer": peer, "model": MODEL, "model_name": "M", "layers": 30, "span": Span(0, 10),
        "state": "online", "dtype": "float32", "device": "cpu",
        "speed": Speed(0.001, 0.0001, 0.002), "free_kv_tokens": 4096, "queue_s": 0.0,
        "addresses": ("/ip4/10.0.0.1/tcp/31337",), "neighbours": ((KEYS[0].peer, 0.01),),
        "group": GroupMembership("g", 0, 2, 1, (600, 400)), "issued_s": NOW, "sequence": 7,
        "coordinates": Coordinates((0.1, 0.2, 0.3), 0.01, 0.1),
        "up_bytes_per_s": 1e6, "down_bytes_per_s": 1e7,
        "offer": GroupOffer("lab", 1 << 30, "10.0.0.1", 4711),
    }  # fmt: skip
    return Announcement(**{**values, **changes})


RECORDS = [sign(announcement(key.peer, sequence=n), NOW + 90, key) for n, key in enumerate(KEYS)]
ADVICE = [
    advice.sign(
        Proposal(key.peer, MODEL, 30, ((tail_of(key.peer), Span(0, 9)),), 9.0, number, NOW), key
    )
    for number, key in enumerate(KEYS)
]
_GENUINE = {record.data for record in (*RECORDS, *ADVICE)}
_KEY_HASH = hashlib.sha1(msgpack.packb(directory_key(MODEL, 0, 1))).digest()
_ADVICE_HASH = hashlib.sha1(msgpack.packb(advice_key(MODEL))).digest()


class Forgery(Exception):
    """A record was taken that nobody signed."""


def records(rng: random.Random) -> tuple[Call, bytes]:
    """An entry of the directory, some of it altered on the way."""
    record: SignedAnnouncement | SignedAdvice = rng.choice(rng.choice([RECORDS, ADVICE]))
    advised = isinstance(record, SignedAdvice)
    owner = record.author if isinstance(record, SignedAdvice) else record.peer
    key_hash = _ADVICE_HASH if advised else _KEY_HASH
    value, subkey = msgpack.packb(record.data), msgpack.packb(owner)
    expires_s, resigned = record.expires_s, False
    match rng.randrange(6):
        case 0:
            subkey = mutate(subkey, rng, [subkey])
        case 1:
            expires_s = rng.choice([math.nan, math.inf, -1.0, 0.0, NOW + 96, 1e300, NOW + 89])
        case 2:  # the thief signs what he has altered, with a key of his own
            value, resigned = msgpack.packb(_resigned(record.data, rng)), True
        case _:
            value = mutate(value, rng, [value])

    def call() -> bool:
        try:
            found = advice.check_entry(key_hash, subkey, value, expires_s, NOW)
        except RemoteProtocolError:
            return False
        if not resigned and found.data not in _GENUINE:
            raise Forgery(f"taken as {owner}")
        return True

    return call, value


def _resigned(data: bytes, rng: random.Random) -> bytes:
    *kind, old, _ = msgpack.unpackb(data)
    body = mutate_tree(old, rng)
    context = b"hexswarm/1 advice\0" if kind else b"hexswarm/1 announcement\0"
    resigned: bytes = msgpack.packb([*kind, body, rng.choice(KEYS).sign(context + body)])
    return resigned


INVITATIONS = [
    invitation.sign(
        Invitation(
            *("lab", 3, MODEL, 30, Span(0, 10), "float32", (600, 400)),
            (Seat(key.peer, "10.0.0.1", 4711), Seat(PeerId("other"), "10.0.0.2", 4712)),
            *(4096, NOW + 60),
        ),
        key,
    )
    for key in KEYS
]


def invitations(rng: random.Random) -> tuple[Call, bytes]:
    """What a leader sends to those whom it wants, altered on the way."""
    data = mutate(rng.choice(INVITATIONS), rng, INVITATIONS)
    if resigned := rng.random() < 0.5:
        body = mutate_tree(msgpack.unpackb(rng.choice(INVITATIONS))[0], rng)
        signature = rng.choice(KEYS).sign(b"hexswarm/1 invitation\0" + body)
        data = msgpack.packb([body, signature])

    def call() -> bool:
        try:
            found = open_invitation(data)
        except RemoteProtocolError:
            return False
        if not resigned and data not in INVITATIONS:
            raise Forgery(f"taken as {found.leader}")
        return True

    return call, data


def dictionaries(rng: random.Random) -> tuple[Call, bytes]:
    """What a neighbour in the DHT hands over: hivemind's wrapper with our guard."""
    data = mutate_tree(DICTIONARY, rng) if rng.random() < 0.5 else mutate(DICTIONARY, rng, NESTED)
    wrapped = msgpack.packb(msgpack.ExtType(0x50, data))
    if rng.random() < 0.3:
        wrapped = mutate(rng.choice(NESTED), rng, [wrapped])

    def call() -> bool:
        taken = True
        try:
            unpack_dictionary(data)
        except ValueError:
            taken = False
        try:
            load_hivemind().MSGPackSerializer.loads(wrapped)
        except (ValueError, TypeError, msgpack.UnpackException):
            return False  # hivemind's own kinds: it answers with an error, and goes on
        return taken

    return call, wrapped


def _nested(depth: int) -> bytes:
    data = b"\x90"
    for _ in range(depth):
        data = b"\xc9" + (1 + len(data)).to_bytes(4, "big") + b"\x40\x91" + data
    return data


NESTED = [_nested(depth) for depth in (1, 7, 8, 9, 60, 900)]
DICTIONARY: bytes = msgpack.packb(
    [math.inf, NOW + 90, [[r.peer, msgpack.packb(r.data), r.expires_s] for r in RECORDS]]
)


# --- files --------------------------------------------------------------------------------------


def _safetensors(entries: dict[str, Any], data: bytes) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


SAFETENSORS = [
    _safetensors(
        {
            "__metadata__": {"format": "pt"},
            "model.embed_tokens.weight": {"dtype": "F32", "shape": [4, 2], "data_offsets": [0, 32]},
            "model.norm.weight": {"dtype": "BF16", "shape": [8], "data_offsets": [32, 48]},
        },
        bytes(48),
    ),
    _safetensors({"a": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}, b""),
    _safetensors({}, b""),
]


def _pair(key: bytes, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(key)) + key + struct.pack("<I", kind) + value


def _text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def _gguf() -> bytes:
    """A llama of one layer in everything that its metadata says, and two small tensors."""
    numbers = {
        b"llama.block_count": 1, b"llama.context_length": 64, b"llama.embedding_length": 8,
        b"llama.feed_forward_length": 16, b"llama.attention.head_count": 2,
        b"llama.attention.head_count_kv": 1, b"tokenizer.ggml.eos_token_id": 0,
    }  # fmt: skip
    pairs = [_pair(b"general.architecture", 8, _text(b"llama"))]
    pairs += [_pair(key, 4, struct.pack("<I", value)) for key, value in numbers.items()]
    pairs += [_pair(b"llama.attention.layer_norm_rms_epsilon", 6, struct.pack("<f", 1e-5))]
    words = b"".join(map(_text, (b"<end>", b"a", b"b")))
    pairs += [_pair(b"tokenizer.ggml.tokens", 9, struct.pack("<IQ", 8, 3) + words)]
    infos = b""
    for name, dims, offset in ((b"token_embd.weight", [8, 3], 0), (b"output_norm.weight", [8], 96)):
        infos += _text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, 0, offset)
    head = struct.pack("<4sIQQ", b"GGUF", 3, 2, len(pairs)) + b"".join(pairs) + infos
    return head + bytes(-len(head) % 32) + bytes(128)


GGUF = [_gguf()]


def files(folder: Path) -> list[Target]:
    """Weight files are read from disk, so they are written there: `folder` should be in memory."""
    path = folder / "fuzzed"

    def safetensors(rng: random.Random) -> tuple[Call, bytes]:
        data = rng.choice(SAFETENSORS)
        data = _mutated_json(data, rng) if rng.random() < 0.5 else mutate(data, rng, SAFETENSORS)
        path.write_bytes(data)

        def call() -> bool:
            try:
                check_safetensors(path)
            except CorruptWeights:
                return False
            return True

        return call, data

    def gguf(rng: random.Random) -> tuple[Call, bytes]:
        data = mutate(GGUF[0], rng, GGUF)
        path.write_bytes(data)

        def call() -> bool:
            try:
                header = read_gguf(path)
                gguf_config(header)
                header.hf_tensors()
            except ModelError:
                return False
            return True

        return call, data

    return [Target("safetensors", 14, safetensors), Target("gguf", 12, gguf)]


def _mutated_json(data: bytes, rng: random.Random) -> bytes:
    length = int.from_bytes(data[:8], "little")
    header = mutate_value(json.loads(data[8 : 8 + length]), rng)
    text = json.dumps(header, default=repr).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


# --- chat templates -----------------------------------------------------------------------------

TEMPLATE = (
    b"{% for m in messages %}{{ '<start>' + m['role'] + ' ' + m['content'] + '<end>' }}{% endfor %}"
    b"{% if add_generation_prompt %}{{ bos_token | default('') }}{% set x = namespace(n=1) %}"
    b"{{ messages | tojson }}{% endif %}"
)
_VARIABLES = {"messages": [{"role": "user", "content": "hi"}], "add_generation_prompt": True}


def templates(renderer: Templates) -> Target:
    def make(rng: random.Random) -> tuple[Call, bytes]:
        data = mutate(TEMPLATE, rng, [TEMPLATE])
        text = data.decode("utf-8", "replace")

        def call() -> bool:
            try:
                renderer.render(text, _VARIABLES)
            except UsageError:
                return False
            return True

        return call, data

    return Target("template", 1, make, RENDER_S + 1.0)


def decoders() -> list[Target]:
    """Those that need nothing but bytes."""
    guard_decoding()
    return [
        Target("frames", 20, frames),
        Target("messages", 20, messages),
        Target("records", 10, records),
        Target("invitations", 4, invitations),
        Target("dictionaries", 10, dictionaries),
    ]
