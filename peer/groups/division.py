"""From shares in thousandths to a cut, the same on every member.

A leader works out shares once, by what its members have of memory and speed, and tells them in its
invitation. Thousandths are exact for all, so every member computes the same `Cut` from them and its
own copy of the config, in fractions (`hexswarm.peer.cuts`), and nobody has to believe a range that
somebody else wrote. Less than a thousandth is below the grain of most cuts.

Memory is for a part's weights and for its heads of the KV pool. Shares are worked out as if KV
followed the shares, which it does but for whole heads; what comes of it is checked to the byte, by
the leader before it asks and by each member before it accepts. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hexswarm.errors import OutOfMemory
from hexswarm.peer import cuts
from hexswarm.peer.cuts import Cut, Member, Part, Sizes
from hexswarm.peer.shares import apportion
from hexswarm.records import SHARES_SUM

Shares = tuple[int, ...]
"""Parts of a thousand, by rank."""


@dataclass(frozen=True, slots=True)
class Room:
    """What a peer brings into a group."""

    free_bytes: int
    """For weights and KV."""
    layer_s: float
    """Seconds of one whole layer alone, decode at batch 1."""


def shares_for(sizes: Sizes, rooms: Sequence[Room], kv_tokens: int, kv_value_bytes: int) -> Shares:
    """The shares by the members' memory and speed. Raises OutOfMemory, UsageError (too many)."""
    weights = sizes.part_bytes(cuts.whole(sizes))
    pool = part_kv_bytes(sizes, cuts.whole(sizes), kv_tokens, kv_value_bytes)
    members = [
        Member(1 / max(room.layer_s, 1e-9), max(1, room.free_bytes * weights // (weights + pool)))
        for room in rooms
    ]
    parts = cuts.member_shares(sizes, members)
    shares = tuple(apportion(SHARES_SUM, parts))
    for rank, room in enumerate(rooms):
        check_room(sizes, shares, rank, room.free_bytes, kv_tokens, kv_value_bytes)
    return shares


def cut_of(sizes: Sizes, shares: Shares) -> Cut:
    """The cut that these shares mean; `parts[rank]` is a member's. Raises UsageError if none."""
    return cuts.plan_cut(sizes, [Member(float(share)) for share in shares])


def check_room(
    sizes: Sizes, shares: Shares, rank: int, free_bytes: int, kv_tokens: int, kv_value_bytes: int
) -> None:
    """Raise OutOfMemory unless the part of `rank` fits."""
    part = cut_of(sizes, shares).parts[rank]
    needed = part_needs(sizes, part, kv_tokens, kv_value_bytes)
    if needed > free_bytes:
        raise OutOfMemory(
            f"rank {rank} of {len(shares)} would hold {needed / 1e9:.2f} GB of weights and KV and "
            f"has room for {free_bytes / 1e9:.2f}",
            remedy="take a member with more memory, fewer layers or fewer --kv-tokens",
        )


def part_needs(sizes: Sizes, part: Part, kv_tokens: int, kv_value_bytes: int) -> int:
    """Bytes of a part's weights and KV."""
    return sizes.part_bytes(part) + part_kv_bytes(sizes, part, kv_tokens, kv_value_bytes)


def part_kv_bytes(sizes: Sizes, part: Part, kv_tokens: int, kv_value_bytes: int) -> int:
    values = 2 * sizes.layers * len(part.kv_heads) * sizes.head_dim
    return values * kv_value_bytes * kv_tokens
