"""What a stage wants done: the words between the stage table and whoever carries them out.

`peer/stage.py` decides and says it in these records; `peer/server.py` carries them out over links
and engine, the test doubles in memory.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from hexswarm.messages import Hidden, Message, Tokens, Traced
from hexswarm.peer.steps import SessionKey, Step
from hexswarm.records import PeerId

STEP, BULK = 0, 1


@dataclass(frozen=True, slots=True)
class Dial:
    """Have a link to `peer`, then report `dialled(session, epoch, ok, now)`."""

    session: SessionKey
    epoch: int
    peer: PeerId
    addresses: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Send:
    peer: PeerId
    message: Message
    payload: bytes | memoryview = b""
    lane: int = STEP


@dataclass(frozen=True, slots=True)
class Submit:
    """Give a step to the engine."""

    step: Step


@dataclass(frozen=True, slots=True)
class Drop:
    """Forget the steps of a session that have not been computed.

    With `position` its KV ends there, whatever is being computed: that will be written again.
    """

    session: SessionKey
    position: int | None = None


@dataclass(frozen=True, slots=True)
class Watch:
    """Begin (or with `on` false end) to depend on the life of `peer`."""

    peer: PeerId
    on: bool = True


@dataclass(frozen=True, slots=True)
class Report:
    """Send `message` to `peer`, completed by the measured way to `successor`."""

    peer: PeerId
    message: Traced
    successor: PeerId


Action = Dial | Send | Submit | Drop | Watch | Report


def number_siblings(actions: list[Action]) -> list[Action]:
    """Say in each step how many of the same batch follow to the same neighbour."""
    left: dict[PeerId, int] = {}
    numbered: list[Action] = []
    for action in reversed(actions):
        if isinstance(action, Send) and action.lane == STEP:
            action = _numbered(action, left)
        numbered.append(action)
    numbered.reverse()
    return numbered


def _numbered(send: Send, left: dict[PeerId, int]) -> Send:
    if not isinstance(send.message, Tokens | Hidden):
        return send
    follow = left.get(send.peer, 0)
    left[send.peer] = follow + 1
    return replace(send, message=replace(send.message, siblings=follow)) if follow else send
