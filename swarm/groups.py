"""The tensor-parallel groups of LANs, as their members' announcements tell; pure.

A group is one vertex of the network: its leader's announcement, with its address, span and measured
speed. The others say to which group and epoch they belong, and how it is cut; that is for people to
read. A member's word about its group counts as far as the leader says the same: rank, size, epoch
and cut are claims, and anybody may claim to be in a group.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from hexswarm.records import Announcement, GroupMembership, PeerId, Span
from hexswarm.svg import harmless


@dataclass(frozen=True, slots=True)
class Group:
    """One epoch of one group."""

    told: GroupMembership
    """As the leader tells it."""
    leader: PeerId
    span: Span
    serving: bool
    members: tuple[PeerId, ...]
    """Those that say so, too, in the order of ranks, the leader first."""

    @property
    def missing(self) -> int:
        """Ranks that no announcement is known of."""
        return self.told.size - len(self.members)


def groups(peers: Iterable[Announcement]) -> list[Group]:
    """All groups of two and more among `peers`, which serve one model, by span and leader."""
    known = sorted(
        (item for item in peers if item.group is not None and item.group.size > 1),
        key=lambda item: item.peer,
    )
    found = []
    for item in known:
        told = item.group
        if told is None or told.rank:
            continue
        ranks = {0: item.peer}
        for other in known:
            if other.group is not None and _same(told, other.group) and other.span == item.span:
                ranks.setdefault(other.group.rank, other.peer)
        members = tuple(ranks[rank] for rank in sorted(ranks))
        found.append(Group(told, item.peer, item.span, item.serving, members))
    return sorted(found, key=lambda group: (group.span, group.leader))


def _same(a: GroupMembership, b: GroupMembership) -> bool:
    return (a.group, a.epoch, a.size, a.shares) == (b.group, b.epoch, b.size, b.shares)


def group_name(told: GroupMembership) -> str:
    """The beginning of a group's id: enough to tell those of a swarm apart."""
    return harmless(told.group[:4])


def cut_text(told: GroupMembership) -> str:
    """Shares of the weights in thousandths, by rank."""
    return ":".join(map(str, told.shares)) or "not told"


def group_line(group: Group) -> str:
    """For `hexswarm status`."""
    told = group.told
    there = f", {group.missing} not announced" if group.missing else ""
    return (
        f"group {group_name(told)} epoch {told.epoch}: {told.size} members{there}, "
        f"cut {cut_text(told)}, leader {harmless(group.leader[-8:])}, layers {group.span}, "
        f"{'serving' if group.serving else 'not serving'}"
    )


def group_json(group: Group) -> dict[str, Any]:
    """The same as plain values."""
    told = group.told
    return {
        "group": told.group,
        "epoch": told.epoch,
        "size": told.size,
        "shares": list(told.shares),
        "span": [group.span.first, group.span.end],
        "leader": group.leader,
        "members": list(group.members),
        "serving": group.serving,
    }


def standing(item: Announcement) -> str:
    """A peer's state in one word, for people: `member` and `waiting` hold no layers for routes."""
    if item.offer is not None and item.offer.waiting:
        return "waiting"
    if item.group is not None and item.group.rank and item.state == "online":
        return "member"
    return item.state
