"""Which stage of a route is to be done without, by what stages say of themselves and others.

Pure functions of a route and a message. A stage may speak of its neighbours in the ring alone: the
blamed lose a session, and a hostile stage must not choose them freely. What it says of anybody else
falls back on itself.
"""

from __future__ import annotations

from collections.abc import Iterable

from hexswarm.errors import HexswarmError, PeerLost, Refused, SessionClosed
from hexswarm.messages import Failed, Refuse
from hexswarm.records import PeerId, Route, Stage


def index_of(route: Route, peer: PeerId) -> int:
    return [stage.peer for stage in route.stages].index(peer)


def layers_of(route: Route, peer: PeerId) -> tuple[int, int]:
    span = route.stages[index_of(route, peer)].span
    return span.first, span.end


def lost(route: Route, peer: PeerId, how: str, beside: PeerId | None = None) -> PeerLost:
    return PeerLost(peer, layers_of(route, peer), how, beside=beside)


def blocking(route: Route, peer: PeerId, message: Refuse) -> Stage:
    """The stage without which the next route should do."""
    index = index_of(route, peer)
    return _next(route, index) if message.code == "unreachable" else route.stages[index]


def refused(route: Route, peer: PeerId, message: Refuse) -> HexswarmError:
    """A stage that cannot reach the next one is seldom the one to do without."""
    stage = blocking(route, peer, message)
    if stage.peer != peer:
        return lost(route, stage.peer, f"cannot be reached by its neighbour {peer[-8:]}", peer)
    return Refused(peer, message.code, message.reason, message.retry_s)


def failing(route: Route, peer: PeerId, message: Failed) -> PeerId:
    """Whom a `Failed` of `peer` is about: a neighbour that it lost or that forgot, else itself."""
    index = index_of(route, peer)
    neighbours = {route.stages[index - 1].peer, _next(route, index).peer}
    if message.code in ("lost", "unknown") and message.peer in neighbours:
        return PeerId(message.peer)
    return peer


def failure(route: Route, peer: PeerId, message: Failed) -> HexswarmError:
    """What a `Failed` of `peer` means, once the session was open."""
    blamed = failing(route, peer, message)
    if message.code == "lost" and blamed != peer:
        return lost(route, blamed, f"was lost by its neighbour {peer[-8:]}", peer)
    if message.code == "draining":
        return lost(route, peer, "has left the swarm")
    if message.code in ("expired", "unknown"):
        return SessionClosed(f"peer {peer[-8:]}: {message.reason}")
    return Refused(peer, message.code, message.reason)


def overdue(route: Route, peer: PeerId, granted: set[PeerId]) -> PeerLost:
    """The reservation of `peer` ended while others were awaited: blame whom its stage waited for,
    or, if that stage had answered, the last silent one (others are silent because they wait)."""
    silent = [stage for stage in route.stages if stage.peer not in granted]
    waited = peer not in granted
    slow = _next(route, index_of(route, peer)) if waited else silent[-1]
    return lost(route, slow.peer, "did not open before the reservations of the others ended")


def waits(route: Route, silent: Iterable[Stage]) -> list[tuple[PeerId, PeerId]]:
    """Ways on which stages that have not answered may be waiting for the next one."""
    ways = ((stage.peer, _next(route, route.stages.index(stage)).peer) for stage in silent)
    return [(a, b) for a, b in ways if a != b]


def _next(route: Route, index: int) -> Stage:
    return route.stages[(index + 1) % len(route.stages)]
