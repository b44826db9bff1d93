"""What a peer knows of itself as a member of groups, and what `Formation` wants done: records.

The order of a group's life, and who does what in it, is in `hexswarm.peer.groups.formation`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from hexswarm.peer.cuts import Sizes
from hexswarm.peer.groups.invitation import Invitation, Refusal
from hexswarm.records import PeerId, Span

AUTO = "auto"
"""The name under which groups are formed where they pay."""

Role = Literal["alone", "leader", "member"]


@dataclass(frozen=True, slots=True)
class Facts:
    """What does not change while the peer lives."""

    peer: PeerId
    name: str
    """`--group`: `auto` or a name."""
    size: int
    """`--group-size`; 0: all there."""
    model: str
    """Digest."""
    layers: int
    """Of the model."""
    numerics: str
    host: str
    """Of its listener for direct streams."""
    port: int
    leads: bool
    """`--span` was given."""
    kv_tokens: int
    kv_value_bytes: int
    """Of one number in the KV pool."""
    sizes_of: Callable[[Span], Sizes]
    """By the model's config: `slices.read_sizes(config, span, weight_bytes)`."""


@dataclass(frozen=True, slots=True)
class Own:
    """What does change: the peer at this moment."""

    span: Span
    """That it was given, or holds or claims by itself."""
    free_bytes: int
    """For weights and KV, if it gave up what it holds now."""
    layer_s: float
    """Seconds of one whole layer alone (`Speed.decode_layer_s`), measured or announced."""
    sessions: int = 0
    """Open on what it serves by itself."""


# --- actions: what is to be done, in order --------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Invite:
    """Leader: send the signed invitation to `peer`."""

    peer: PeerId
    invitation: Invitation


@dataclass(frozen=True, slots=True)
class Commit:
    """Leader: tell `peer` that all have said yes and it is to load."""

    peer: PeerId
    group: str
    epoch: int


@dataclass(frozen=True, slots=True)
class Release:
    """Leader: tell `peer` that the epoch is over, or will not be."""

    peer: PeerId
    group: str
    epoch: int


@dataclass(frozen=True, slots=True)
class Answer:
    """Member: tell `leader` yes (no refusal) or no."""

    leader: PeerId
    group: str
    epoch: int
    refusal: Refusal | None


@dataclass(frozen=True, slots=True)
class Report:
    """Member: tell `leader` that its part is loaded and its streams are open."""

    leader: PeerId
    group: str
    epoch: int


@dataclass(frozen=True, slots=True)
class Leave:
    """Member: tell `leader` that it is no longer in the epoch, and why."""

    leader: PeerId
    group: str
    epoch: int
    how: str


@dataclass(frozen=True, slots=True)
class Load:
    """Both: give up what is held, load the part of `rank`, open the streams of `topic` to all
    others. Then `on_loaded`, or `on_failed`."""

    invitation: Invitation
    rank: int


@dataclass(frozen=True, slots=True)
class Serve:
    """Leader: every rank is there. Take sessions, announce `online`."""

    invitation: Invitation


@dataclass(frozen=True, slots=True)
class Close:
    """Both: the epoch is over. Stop at once, close the streams, free the part; a load under way is
    abandoned, and what it comes to is nobody's concern."""

    group: str
    epoch: int
    how: str


@dataclass(frozen=True, slots=True)
class Announce:
    """What is to be announced has changed: `offer`, `membership`, `state`."""


Action = Invite | Commit | Release | Answer | Report | Leave | Load | Serve | Close | Announce
