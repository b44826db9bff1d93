"""Who is there to form a group with, and who leads: what a peer reads in announcements; pure.

Near is who offers itself under the same name, for the same model and numbers, is linked, and
answers within `LAN_RTT_S`. Of those of a name one leads, and only somebody who was given layers by
its owner: two that wait and see each other first must not take layers that nobody asked for. Who
leads a group already comes first (one that serves before one that loads); of several the lowest
peer id. All who see each other agree on it, and those who do not are soon corrected: whoever is not
first gives way, unless its epoch serves, for an epoch that serves is not broken for order's sake.

Groups of the name `auto` have no such order among them: there may be any number in a LAN.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from hexswarm.peer.groups.actions import AUTO, Facts
from hexswarm.peer.groups.invitation import LAN_RTT_S
from hexswarm.records import Announcement, PeerId, Span, uncovered

Order = tuple[int, bool, PeerId]
"""The least leads."""


def near(
    facts: Facts, view: Iterable[Announcement], rtts: Mapping[PeerId, float]
) -> list[Announcement]:
    """Who could be in a group with this peer, in the order of peer ids."""
    return sorted(
        (
            item
            for item in view
            if item.peer != facts.peer
            and item.offer is not None
            and item.offer.name == facts.name
            and (item.model, item.layers, item.dtype) == (facts.model, facts.layers, facts.numerics)
            and item.state != "draining"
            and rtts.get(item.peer, LAN_RTT_S + 1) <= LAN_RTT_S
        ),
        key=lambda item: item.peer,
    )


def order_of(item: Announcement) -> Order:
    """Where another peer stands among those that might lead."""
    stage = 0
    if item.group is not None and item.group.rank == 0:
        stage = 2 if item.state == "online" else 1
    return -stage, not (item.offer is not None and item.offer.leads), item.peer


def first(facts: Facts, stage: int, around: Iterable[Announcement]) -> bool:
    """Whether this peer leads its name; `stage`: 2 if its epoch serves, 1 if it loads, else 0."""
    own = (-stage, not facts.leads, facts.peer)
    return facts.leads and (stage == 2 or all(own < order_of(item) for item in around))


def free(
    facts: Facts, around: Iterable[Announcement], own_groups: Collection[str]
) -> list[Announcement]:
    """Who of them is in no group, or only still says so of one that we led and that is over."""
    return [
        item
        for item in around
        if item.group is None or (item.group.rank > 0 and item.group.group in own_groups)
    ]


def apart_s(a: Announcement, b: Announcement) -> float:
    """The longest round trip that either of two peers announces to the other; 0: none."""
    there, back = dict(a.neighbours).get(b.peer, 0.0), dict(b.neighbours).get(a.peer, 0.0)
    return max(there, back)


def together(around: Sequence[Announcement]) -> list[Announcement]:
    """Those of them that are not known to be too far from one before; who leads was near to all."""
    kept: list[Announcement] = []
    for item in around:
        if all(apart_s(item, other) <= LAN_RTT_S for other in kept):
            kept.append(item)
    return kept


def irreplaceable(
    facts: Facts,
    view: Iterable[Announcement],
    peer: PeerId,
    leaving: Collection[PeerId],
    span: Span,
) -> bool:
    """Whether layers would have no holder if `peer` left them, too, to hold `span` with `leaving`.

    In groups by hand somebody has decided that already.
    """
    if facts.name != AUTO:
        return False
    serving = [item for item in view if item.model == facts.model and item.serving]
    held = [item.span for item in serving if item.peer == peer]
    rest = [item.span for item in serving if item.peer != peer and item.peer not in leaving]
    holes = uncovered([*rest, span], facts.layers)
    return any(one.first < hole.end and hole.first < one.end for one in held for hole in holes)
