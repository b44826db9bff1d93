"""The messages with which a session tells its stages what to do, made from plain values.

Apart from `swarm/session.py`, which decides when they are sent: here stands only what each of them
must contain.
"""

from __future__ import annotations

import array
import sys
from collections.abc import Sequence

from hexswarm import prefix
from hexswarm.instructions import Send, Turn
from hexswarm.messages import Generate, Open, Tokens
from hexswarm.prefix import Namer
from hexswarm.records import PeerId, Route

PROMPT_FRAME_TOKENS = 1 << 16
"""Ids in one frame of a long prompt: 256 KiB."""


def openings(
    key: bytes,
    epoch: int,
    digest: str,
    route: Route,
    kv_tokens: int,
    budgets: Sequence[float],
    *,
    client_loop: bool,
) -> list[Open]:
    """An `Open` for each stage: who comes before and after it, and what it shall promise."""
    stages, made = route.stages, list[Open]()
    for index, (stage, step_s) in enumerate(zip(stages, budgets, strict=True)):
        before, after = stages[index - 1], stages[(index + 1) % len(stages)]
        ring_end = client_loop and index == len(stages) - 1
        opening = Open(
            session=key,
            epoch=epoch,
            digest=digest,
            first=stage.span.first,
            end=stage.span.end,
            predecessor="" if client_loop and index == 0 else before.peer,
            successor="" if ring_end else after.peer,
            successor_addresses=() if ring_end else after.addresses,
            kv_tokens=kv_tokens,
            step_s=step_s,
        )
        made.append(opening)
    return made


def offers(namer: Namer | None, route: Route, ids: Sequence[int]) -> dict[PeerId, bytes]:
    """How each stage is told what `ids` are: by names; nothing without a `namer`."""
    if namer is None:
        return {stage.peer: b"" for stage in route.stages}
    hashes = namer.hashes(ids)
    marked = zip(route.stages, namer.marks(route), strict=True)
    return {stage.peer: prefix.pack(mark, hashes) for stage, mark in marked}


def policy(key: bytes, epoch: int, number: int, turn: Turn, max_new: int) -> Generate:
    """How the tail chooses; `number` counts the session's turns."""
    s = turn.sampling
    return Generate(
        session=key,
        epoch=epoch,
        turn=number,
        max_new=max_new,
        stop_ids=turn.stop_ids,
        temperature=s.temperature,
        top_p=s.top_p,
        top_k=s.top_k,
        min_p=s.min_p,
        repetition_penalty=s.repetition_penalty,
        seed=s.seed,
    )


def feeding(
    head: PeerId, here: tuple[bytes, int, int], position: int, ids: Sequence[int]
) -> list[Send]:
    """Ids for the head from `position` on, in frames; the last one ends the prompt.

    `here` is session, epoch and turn.
    """
    frames: list[Send] = []
    bulk = len(ids) > PROMPT_FRAME_TOKENS
    for start in range(0, len(ids), PROMPT_FRAME_TOKENS):
        piece = ids[start : start + PROMPT_FRAME_TOKENS]
        message = Tokens(*here, position + start, last=start + len(piece) == len(ids))
        frames.append(Send(head, message, ids_to_bytes(piece), bulk))
    return frames


def ids_to_bytes(ids: Sequence[int]) -> bytes:
    """Token ids as little-endian uint32."""
    packed = array.array("I", ids)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()
