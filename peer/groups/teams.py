"""Of whom a leader makes its group, out of those that are there and not left out; pure.

By name: as many as the owners asked for; fewer, down to two, once the group has served, for clients
wait. By policy: the number with the fastest step, if it is worth it at all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from hexswarm.errors import UsageError
from hexswarm.peer.groups import policy
from hexswarm.peer.groups.actions import Facts, Own
from hexswarm.peer.groups.division import Room
from hexswarm.peer.groups.invitation import MOST_MEMBERS
from hexswarm.peer.groups.policy import Candidate, Team
from hexswarm.records import Announcement, PeerId


def by_name(facts: Facts, own: Own, ready: Sequence[Announcement], *, again: bool) -> Team | None:
    """`again`: the group has served before."""
    there = min(len(ready) + 1, MOST_MEMBERS)
    most = min(facts.size or there, there)
    # "All there are" may be more than there are heads to deal out.
    least = 2 if again or facts.size == 0 else facts.size
    for size in range(most, least - 1, -1):
        team = _team(facts, own, ready, size)
        if team is not None:
            return team
    return None


def by_policy(
    facts: Facts, own: Own, ready: Sequence[Announcement], rtts: Mapping[PeerId, float]
) -> Team | None:
    best, chosen = math.inf, None
    alone = fits_alone(facts, own)
    most = min(facts.size or policy.MOST_AUTO, policy.MOST_AUTO, len(ready) + 1)
    for size in range(2, most + 1):
        team = _team(facts, own, ready, size)
        if team is None:
            continue
        rtt_s = max(rtts[one.peer] for one in team.members[1:])
        found = policy.worth(facts.sizes_of(own.span), team, rtt_s, alone=alone)
        if found.worth and found.together_s < best:
            best, chosen = found.together_s, team
    return chosen


def fits_alone(facts: Facts, own: Own) -> bool:
    """Whether the peer has room for its layers without anybody."""
    room = Room(own.free_bytes, own.layer_s)
    sizes = facts.sizes_of(own.span)
    return policy.fits_alone(sizes, room, facts.kv_tokens, facts.kv_value_bytes)


def _team(facts: Facts, own: Own, ready: Sequence[Announcement], size: int) -> Team | None:
    others = [
        Candidate(item.peer, Room(item.offer.free_bytes, item.speed.decode_layer_s))
        for item in ready
        if item.offer is not None
    ]
    leader = Candidate(facts.peer, Room(own.free_bytes, own.layer_s))
    try:
        sizes = facts.sizes_of(own.span)
    except UsageError:
        return None
    return policy.team_of(sizes, leader, others, size, facts.kv_tokens, facts.kv_value_bytes)
