"""What one peer has and is at this moment: the facts that its tasks share.

`daemon` makes and replaces them, `moving` chooses what is claimed, `surveying` finds the place in
the network, `telling` reads them all. Everything runs in one event loop, so nothing is locked.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hexswarm.config import PeerConfig
from hexswarm.identity import Identity
from hexswarm.membership import Membership
from hexswarm.peer.advising import Advising
from hexswarm.peer.engine import Engine
from hexswarm.peer.hosting import Hosting
from hexswarm.peer.loading import Served
from hexswarm.peer.placement import Placement
from hexswarm.peer.server import PeerServer
from hexswarm.records import Coordinates, PeerId, Span, State
from hexswarm.skew import SteadyClock
from hexswarm.store import ModelFolder

if TYPE_CHECKING:
    from hexswarm.peer.groups.grouped import Grouped


@dataclass(slots=True)
class Life:
    """Of one process, from its start to its end."""

    config: PeerConfig
    member: Membership
    identity: Identity
    rng: random.Random
    state: State = "joining"
    hosting: Hosting = field(init=False)
    """Where the layers are computed, now and after a loss."""
    groups: Grouped | None = None
    """The same, if it may be others of the LAN: what the peer says of groups, and hears."""
    folder: ModelFolder = field(init=False)
    device: str = ""
    dtype: str = ""
    placement: Placement | None = None
    """None: the span was given."""
    advising: Advising | None = None
    """None: no advice is followed."""
    claimed: Span = field(init=False)
    """What is announced until it is served."""
    served: Served = field(init=False)
    engine: Engine | None = None
    """None before the first layers are served, and between two spans."""
    server: PeerServer | None = None
    place: Coordinates | None = None
    addresses: tuple[str, ...] = ()
    online_s: float = 0.0
    """When it began to serve these layers."""

    @property
    def peer(self) -> PeerId:
        return self.identity.peer

    @property
    def clock(self) -> SteadyClock:
        return self.member.clock
