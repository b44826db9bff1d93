"""Whether a group is worth forming, and of whom: predictions, not measurements.

Alone a stage of n layers takes n x `layer_s`. In a group every member computes its share of each
layer, the slowest decides, and two sums a layer come on top. A sum of b bytes over the streams of
`hexswarm.transports.direct` takes, for g members whose farthest pair is `rtt_s` apart,

    rtt_s / 2 + FIXED_S + (g - 1) x (MESSAGE_S + b x max(BYTE_S, 1 / bytes_per_s))

fitted to what was measured on an emulated LAN of 0.2 ms (0.35 in fact; machines of two busy cores):
0.77 ms for 8 KB and two members (predicted 0.77), 1.0 ms for 16 KB (0.99), 1.58 ms for 8 KB and
four (1.58), 28 ms for 1 MB and two (29). The greater part of it is TLS on cores that compute as
well, so better machines do better: the prediction errs on the side of staying alone. Large sums
are scattered and cost less than this for four; a decode step has none.

A group is *needed* if a peer alone cannot hold the span: then there is nothing to compare with.
Otherwise it must be *faster* by `GAIN`, for its members could as well serve a copy each: a group
trades the swarm's throughput for one ring's latency. What is compared is a decode step at batch 1,
where sums weigh most.

Members are taken fastest first, or, if those have not the memory, roomiest first. Rejected: trying
all teams (the few peers of a LAN are much alike, and the next epoch may try others). Pure.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from hexswarm.errors import OutOfMemory, UsageError
from hexswarm.peer import cuts
from hexswarm.peer.cuts import Sizes
from hexswarm.peer.groups.division import Room, Shares, cut_of, part_needs, shares_for
from hexswarm.records import PeerId

FIXED_S = 0.185e-3
MESSAGE_S = 0.185e-3
BYTE_S = 27e-9
SUM_VALUE_BYTES = 4
"""Members sum in float32."""
SUMS = 2
"""In a layer: after attention and after the MLP."""
GAIN = 1.25
MOST_AUTO = 8
"""Larger groups than this are made by hand alone."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A peer that might take part."""

    peer: PeerId
    room: Room


@dataclass(frozen=True, slots=True)
class Team:
    """Who is to hold the span, in the order of ranks, the leader first."""

    members: tuple[Candidate, ...]
    shares: Shares


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a team is worth."""

    kind: Literal["needed", "faster", "slower"]
    together_s: float
    """Of a decode step through the span."""
    alone_s: float | None
    """None: one peer cannot hold it."""

    @property
    def worth(self) -> bool:
        return self.kind != "slower"


def sum_s(bytes_: int, members: int, rtt_s: float, bytes_per_s: float = math.inf) -> float:
    """Predicted seconds of one sum over the members of a group."""
    byte_s = max(BYTE_S, 1 / bytes_per_s)
    return rtt_s / 2 + FIXED_S + (members - 1) * (MESSAGE_S + bytes_ * byte_s)


def stage_s(sizes: Sizes, team: Team, rtt_s: float, bytes_per_s: float = math.inf) -> float:
    """Predicted seconds of a decode step of the group."""
    held = cut_of(sizes, team.shares).shares
    layer_s = max(part * one.room.layer_s for part, one in zip(held, team.members, strict=True))
    sums_s = SUMS * sum_s(sizes.hidden * SUM_VALUE_BYTES, len(team.members), rtt_s, bytes_per_s)
    return sizes.layers * (layer_s + sums_s)


def fits_alone(sizes: Sizes, room: Room, kv_tokens: int, kv_value_bytes: int) -> bool:
    return part_needs(sizes, cuts.whole(sizes), kv_tokens, kv_value_bytes) <= room.free_bytes


def worth(
    sizes: Sizes, team: Team, rtt_s: float, *, alone: bool, bytes_per_s: float = math.inf
) -> Verdict:
    """Whether this team should form, rather than its leader stay single.

    `alone`: the span fits the leader; `rtt_s` is that of the pair that is farthest apart.
    """
    together_s = stage_s(sizes, team, rtt_s, bytes_per_s)
    if not alone:
        return Verdict("needed", together_s, None)
    alone_s = sizes.layers * team.members[0].room.layer_s
    return Verdict("faster" if together_s * GAIN <= alone_s else "slower", together_s, alone_s)


def team_of(
    sizes: Sizes,
    leader: Candidate,
    others: Sequence[Candidate],
    size: int,
    kv_tokens: int,
    kv_value_bytes: int,
) -> Team | None:
    """A team of `size`, if there is one that holds the span and can be cut."""
    orders: tuple[Callable[[Candidate], tuple[float, PeerId]], ...] = (
        lambda one: (one.room.layer_s, one.peer),
        lambda one: (-one.room.free_bytes, one.peer),
    )
    if not 2 <= size <= len(others) + 1:
        return None
    for order in orders:
        chosen = sorted(sorted(others, key=order)[: size - 1], key=lambda one: one.peer)
        members = (leader, *chosen)
        try:
            rooms = [one.room for one in members]
            return Team(members, shares_for(sizes, rooms, kv_tokens, kv_value_bytes))
        except (OutOfMemory, UsageError):
            continue
    return None
