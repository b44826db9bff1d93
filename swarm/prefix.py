"""Names for what a prompt begins with, so that peers find its KV without ever seeing a token.

A stage in the middle gets activations, not ids; what it could recognise a prompt by, the client has
to tell it. So the client cuts its ids into blocks of 16 and hashes them in a chain,

    hash(i) = blake2b(hash(i - 1) | ids of block i), keyed with the client's secret and the model

and a hash stands for a block *and all before it*. `Open` carries the hashes of the prompt's full
blocks, `Close` those of the whole talk; a stage keeps the blocks under these names when the session
has ended (`hexswarm.peer.blocks`) and answers the next `Open` with how many tokens it has.

The secret is drawn when a process starts and never leaves it: nobody can tell from a hash what was
asked, not even by trying likely prompts. It also makes names of two clients differ, and a stage
looks a name up only for the client that gave it. Rejected: names that all can compute (one system
prompt of a popular program would then be computed once for everybody), because a stranger could
file garbage under them, and tell from the time to the first token what others have asked.

What KV a stage holds depends on who computed before it. Each stage therefore gets, beside the
hashes, a *mark* of the part of the route up to itself: KV that was made behind one peer is not
found behind another, which costs nothing (the other would have to have the prefix itself), and
what a peer that means ill did to one answer ends with it, and does not wait for the next.

The two travel as the payload of messages that had none: an older peer ignores it, and one that has
nothing says `cached=0` as it always did. Pure.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hexswarm.records import Route

BLOCK_TOKENS = 16
"""Tokens of one KV block, and of one hash: client and peers must mean the same."""
HASH_BYTES = 16
MOST_BLOCKS = 4096
"""Hashes in one message: 64 KiB, for 65,536 tokens; what is beyond is computed."""


@dataclass(frozen=True, slots=True)
class Offer:
    """What a client says of a session's tokens: whose KV it is, and the hash of each block."""

    mark: bytes = b""
    hashes: tuple[bytes, ...] = ()

    @property
    def tokens(self) -> int:
        return BLOCK_TOKENS * len(self.hashes)


NOTHING = Offer()


class Namer:
    """Names blocks of ids for one model, as nobody without `secret` can."""

    def __init__(self, secret: bytes, digest: str) -> None:
        self._key = hashlib.blake2b(digest.encode(), key=secret, digest_size=32).digest()

    def hashes(self, ids: Sequence[int]) -> tuple[bytes, ...]:
        """One for each full block, in order, of as many as may be told."""
        last, made = b"", list[bytes]()
        for start in range(0, min(len(ids) // BLOCK_TOKENS, MOST_BLOCKS) * BLOCK_TOKENS, 16):
            block = struct.pack("<16I", *ids[start : start + BLOCK_TOKENS])
            last = self._hash(last + block)
            made.append(last)
        return tuple(made)

    def marks(self, route: Route) -> list[bytes]:
        """For each stage: who computes up to it, itself included."""
        last, made = b"", list[bytes]()
        for stage in route.stages:
            last = self._hash(last + f"{stage.peer} {stage.span.first} {stage.span.end}".encode())
            made.append(last)
        return made

    def _hash(self, data: bytes) -> bytes:
        return hashlib.blake2b(data, key=self._key, digest_size=HASH_BYTES).digest()


def pack(mark: bytes, hashes: Iterable[bytes]) -> bytes:
    """The payload of a message; empty if there is nothing to tell."""
    told = b"".join(hashes)
    return mark + told if told else b""


def unpack(payload: bytes) -> Offer:
    """What a payload tells: nothing, if it is not a mark and whole hashes, and not too many.

    No error, since names are a help to whoever gives them and no claim on anything.
    """
    if len(payload) % HASH_BYTES or not 2 <= len(payload) // HASH_BYTES <= MOST_BLOCKS + 1:
        return NOTHING
    words = [payload[at : at + HASH_BYTES] for at in range(0, len(payload), HASH_BYTES)]
    return Offer(words[0], tuple(words[1:]))
