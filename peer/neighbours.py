"""Which neighbours a peer measures, and which of them it announces: pure choices.

The network graph that clients build needs two kinds of edges. *Short* ones tell which peers are
near each other, which is where good rings are; *long* ones hold the coordinates together, for a
crowd that only measures itself may drift, or turn, against the rest of the world. So half of a
round goes to the nearest peers, as coordinates tell, and the other half to peers at random. (The
choice is Vivaldi's own advice, section 5.4 of the paper: some neighbours near, some far.)

An announcement has room for few: the nearest, since nobody else could tell these ways as well, then
peers with which routes were shared lately, since their next routes are likely the same, then any.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence

from hexswarm.records import Announcement, Coordinates, PeerId
from hexswarm.router import vivaldi

MOST = 8
NEAREST = 4


def to_measure(
    others: Sequence[Announcement],
    place: Coordinates | None,
    rng: random.Random,
    most: int = MOST,
) -> list[Announcement]:
    """At most `most` of `others`: half the nearest to `place`, half at random."""
    if len(others) <= most:
        return list(others)
    nearest: list[Announcement] = []
    if place is not None:
        placed = [(item.coordinates, item) for item in others if item.coordinates is not None]
        near = sorted((vivaldi.rtt_s(place, at), item.peer, item) for at, item in placed)
        nearest = [item for _, _, item in near[: most // 2]]
    held = {item.peer for item in nearest}
    rest = [item for item in others if item.peer not in held]
    return nearest + rng.sample(rest, most - len(nearest))


def to_announce(
    rtts: Mapping[PeerId, float], recent: Collection[PeerId], most: int = MOST
) -> tuple[tuple[PeerId, float], ...]:
    """At most `most` of the measured neighbours, in order of their ids."""
    ordered = sorted(rtts, key=lambda peer: (rtts[peer], peer))
    shared = [peer for peer in ordered if peer in recent]
    wanted = dict.fromkeys([*ordered[:NEAREST], *shared, *ordered])
    return tuple((peer, rtts[peer]) for peer in sorted(list(wanted)[:most]))
