"""A peer that cannot serve at the moment, between two hosts or two spans: it says so at once.

Clients have heard of it not long ago and would wait for an answer. It refuses who wants to open a
session, and tells who has one that it is gone; nothing else needs an answer.
"""

from __future__ import annotations

from collections.abc import Iterable

from hexswarm.messages import Failed, Hidden, Message, Open, Refuse, Tokens
from hexswarm.records import PeerId
from hexswarm.wire import Frame

RETRY_S = 5.0
"""Loading takes longer than that, but directories are slow."""


def answers(me: PeerId, frames: Iterable[Frame]) -> list[Message]:
    """What to say to the sender of `frames`."""
    said: list[Message] = []
    for frame in frames:
        match frame.message:
            case Open(session=session, epoch=epoch):
                why = "the peer is starting again"
                said.append(Refuse(session, epoch, "draining", why, RETRY_S))
            case Tokens(session=session, epoch=epoch) | Hidden(session=session, epoch=epoch):
                said.append(Failed(session, epoch, "unknown", "no such session", me))
    return said
