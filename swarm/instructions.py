"""What a client's session wants done, as records: its instructions, and what a turn asks for.

`swarm/session.py` decides and says it in these words; `swarm/runtime.py` carries them out over
links, test doubles in memory. (The words between a peer's stage and its server are the same idea:
`peer/actions.py`.)
"""

from __future__ import annotations

from dataclasses import dataclass

from hexswarm.errors import HexswarmError
from hexswarm.messages import Message, Open
from hexswarm.records import PeerId, Sampling, Stage

# --- towards the stages -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Connect:
    """Have a link to the stage's peer, watch it, then send `message` (its Open)."""

    stage: Stage
    message: Open
    payload: bytes = b""


@dataclass(frozen=True, slots=True)
class Send:
    peer: PeerId
    message: Message
    payload: bytes = b""
    bulk: bool = False


# --- towards the caller ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ready:
    """All stages hold their lease."""


@dataclass(frozen=True, slots=True)
class Emit:
    """A token of the running turn; `finish` is "", "stop", "length" or "cancelled"."""

    token: int | None
    position: int
    finish: str
    arrived_s: float = 0.0
    """When it came (monotonic time), however late it is taken; set by whoever has a clock."""


@dataclass(frozen=True, slots=True)
class EmitLogits:
    """Float32 logits for `position`, little-endian."""

    data: bytes
    position: int


@dataclass(frozen=True, slots=True)
class EmitTraces:
    """Every stage has answered `trace`: see `Session.traced`."""


@dataclass(frozen=True, slots=True)
class EmitProgress:
    """Every stage that was asked how far it is has answered: see `Session.progress`."""


@dataclass(frozen=True, slots=True)
class Fail:
    """The session is over; `error` says why."""

    error: HexswarmError


# --- towards whoever plans routes -----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Broken:
    """The running turn stands still until `Session.reroute` or `Session.give_up`.

    Said each time the set grows, also during a repair; `Session.broken` tells why.
    """

    peers: frozenset[PeerId]


@dataclass(frozen=True, slots=True)
class Mended:
    """All stages of the route of `epoch` have been told how to go on."""

    epoch: int


@dataclass(frozen=True, slots=True)
class Draining:
    """A stage of the running turn exits in `exit_s` seconds; until then the turn goes on."""

    peer: PeerId
    exit_s: float


Instruction = (
    Connect
    | Send
    | Ready
    | Emit
    | EmitLogits
    | EmitTraces
    | EmitProgress
    | Fail
    | Broken
    | Mended
    | Draining
)

# --- records --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Turn:
    """What one turn asks for: ids to add from `position` on, and how to answer."""

    position: int
    ids: tuple[int, ...]
    max_new: int
    sampling: Sampling
    stop_ids: tuple[int, ...]
    history: tuple[int, ...] = ()
    """All ids so far; sent to the tail only if a repetition penalty needs them."""

    @property
    def end(self) -> int:
        """Where the answer begins."""
        return self.position + len(self.ids)


@dataclass(frozen=True, slots=True)
class Mend:
    """A repair that came to its end: the session went on with other stages."""

    lost: tuple[PeerId, ...]
    """The peers that were replaced, in the order in which they were lost."""
    position: int
    """So many token ids were known when the turn went on."""
    epoch: int
    """Of the route on which it went on."""
