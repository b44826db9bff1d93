"""What a leader says to its members over the collective of their epoch, and how it is answered.

Every word is one broadcast. An empty one is a *beat*: all answer it with an empty gather, so that
within a second or two of silence each end knows whether the others live; a broadcast alone would
go into a socket's buffer and tell nothing. A list `[kind, field, ...]` is a command for the
members' shards and is not answered: the sums inside keep all in step. A command that may take long
(a pool, a warm-up) is done beside, on a thread of its own, while the member goes on to listen;
`["status"]` asks whether it is done, and all gather their answers: nothing for "not yet". So a
command may take minutes while a member that died or froze is noticed as ever.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import msgpack

from hexswarm.errors import OutOfMemory, RemoteProtocolError
from hexswarm.peer.collective import Collective

BEAT_S = 1.0
"""The leader beats after so long without any other word."""
SILENT_S = 5.0
"""A member waits so long for a word: a leader whose process is held up for a moment is there."""
STATUS = ["status"]
STATUS_EVERY_S = 0.1
LONG_S = 180.0
"""Most that a member may take for it: longer than any card compiles its kernels."""
MOST_ANSWER_BYTES = 512
MOST_WORD_BYTES = 250
"""Of a reason: it and its frame fit an answer."""
MOST_ITEMS = 1 << 20
"""In a list of a command: token ids of a batch."""
LONG = ("pool", "warm")
"""Commands that are done beside."""


def pack(command: Sequence[Any]) -> bytes:
    packed: bytes = msgpack.packb(list(command))
    return packed


def unpack(said: memoryview) -> list[Any]:
    """Raises RemoteProtocolError for what is no command."""
    try:
        found = msgpack.unpackb(
            *(said,),
            max_array_len=MOST_ITEMS,
            max_str_len=256,
            max_bin_len=0,
            max_map_len=0,
            max_ext_len=0,
        )
    except (ValueError, RecursionError, msgpack.UnpackException) as error:
        raise RemoteProtocolError(f"a malformed command: {error}") from error
    if not isinstance(found, list) or not found or not isinstance(found[0], str):
        raise RemoteProtocolError("a command is a list with a name")
    return found


def beat(group: Collective) -> None:
    """The leader: is everybody there? Raises MemberLost."""
    group.broadcast(b"")
    answer_beat(group)


def answer_beat(group: Collective) -> None:
    """A member: here. Raises MemberLost."""
    group.gather(memoryview(b""), 0)


def await_all(group: Collective) -> None:
    """The leader: wait until every member has done the command told last.

    Raises MemberLost, also for a member that is alive and not done within `LONG_S`, or OutOfMemory
    with the words of a member that has no room for its part.
    """
    end_s = time.monotonic() + LONG_S
    while True:
        group.broadcast(pack(STATUS))
        answers = group.gather(memoryview(pack(["done"])), MOST_ANSWER_BYTES)
        if all(answers):
            break
        if time.monotonic() > end_s:
            late = next(rank for rank, answer in enumerate(answers) if not answer)
            raise group.lost(late, f"was not done after {LONG_S:.0f} s")
        time.sleep(STATUS_EVERY_S)
    for rank, answer in enumerate(answers):
        told = unpack(answer)
        if told != ["done"]:
            why = str(told[-1])[:200]
            raise OutOfMemory(f"rank {rank} of the group cannot do its part: {why}")


def answer_status(group: Collective, answer: Sequence[Any]) -> None:
    """A member: how far it is, or nothing. Raises MemberLost."""
    short = [str(part).encode()[:MOST_WORD_BYTES].decode(errors="ignore") for part in answer]
    word = pack(short) if answer else b""
    group.gather(memoryview(word), MOST_ANSWER_BYTES)
