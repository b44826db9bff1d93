"""How much a stranger may ask of us: token buckets and address blocks, pure.

An identity costs nothing, so each limit exists three times: for one identity, for one block of
addresses (/24 of IPv4, /48 of IPv6: what one customer of a provider gets for nothing), and for all
together. Only the last one holds against a botnet, and then honest newcomers wait too; whoever
takes part in a session never stands in these queues.

What is counted. *Streams* that come in: a link takes two. *Frames*: of a guest (`hexswarm.guests`)
every one, of a partner those that are not the flow of a session (tokens, activations, logits),
since each of them makes us decide or answer something. A guest over its rate loses its link, which
is all it has; a partner is read more slowly instead, because an honest client that opens a thousand
sessions at once looks like a flood for a moment. While all guests together are over their rate,
only those that were modest so far are heard: a crowd of loud strangers does not silence a quiet
one.

Addresses that are not global (loopback, a LAN, a container's gateway) belong to no block: they
stand for many machines or for the only one. Nor does whoever comes through a relay: its address is
the relay's.

The tables are bounded; the key that was silent longest is forgotten first, which fills its bucket.
Rejected: counting in windows (twice the rate at their border), and a ban after a flood (an address
is soon somebody else's).
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

MOST_KEYS = 4096


@dataclass(frozen=True, slots=True)
class Rate:
    """So many a second for ever, and `burst` at once."""

    per_s: float
    burst: float


STREAMS_EACH = Rate(1.0, 24.0)
STREAMS_BLOCK = Rate(16.0, 256.0)
STREAMS_ALL = Rate(100.0, 1024.0)
GUEST_FRAMES = Rate(20.0, 1024.0)
"""The burst is a client's that opens a thousand sessions before the first one is granted."""
GUEST_FRAMES_ALL = Rate(2000.0, 4096.0)
MODEST_FRAMES = 32
"""A guest that has said no more than this is heard even while all guests together are too loud."""
CONTROL_FRAMES = Rate(2000.0, 4096.0)


class Buckets:
    """One token bucket for each key; at first, and when forgotten, it is full."""

    def __init__(self, rate: Rate, most_keys: int = MOST_KEYS) -> None:
        self._rate = rate
        self._most_keys = most_keys
        self._used: dict[str, tuple[float, float]] = {}
        """Tokens that are missing, and when they were; last used last."""

    def __len__(self) -> int:
        return len(self._used)

    def used(self, key: str, now: float) -> float:
        """Tokens missing from the bucket of `key`."""
        used, at_s = self._used.get(key, (0.0, now))
        return max(0.0, used - max(0.0, now - at_s) * self._rate.per_s)

    def take(self, key: str, now: float, amount: float = 1.0) -> bool:
        """Take `amount` tokens; False, and nothing taken, if there are not so many."""
        used = self.used(key, now) + amount
        if used > self._rate.burst:
            return False
        self._keep(key, used, now)
        return True

    def owe(self, key: str, now: float, amount: float = 1.0) -> float:
        """Take `amount` tokens even if there are fewer; the seconds until the debt is paid."""
        used = self.used(key, now) + amount
        self._keep(key, used, now)
        return max(0.0, used - self._rate.burst) / self._rate.per_s

    def _keep(self, key: str, used: float, now: float) -> None:
        self._used.pop(key, None)
        self._used[key] = used, now
        if len(self._used) > self._most_keys:
            del self._used[next(iter(self._used))]


class Quotas:
    """The buckets of one process."""

    def __init__(self) -> None:
        self._streams = Buckets(STREAMS_EACH)
        self._streams_block = Buckets(STREAMS_BLOCK)
        self._streams_all = Buckets(STREAMS_ALL)
        self._guests = Buckets(GUEST_FRAMES)
        self._guests_all = Buckets(GUEST_FRAMES_ALL)
        self._control = Buckets(CONTROL_FRAMES)

    def stream(self, peer: str, block: str, now: float) -> bool:
        """A stream of `peer`, with which we share no session, came in: shall we serve it?"""
        if not self._streams.take(peer, now):
            return False
        if block and not self._streams_block.take(block, now):
            return False
        return self._streams_all.take("", now)

    def guest(self, peer: str, frames: int, now: float) -> bool:
        """A guest said so much: shall we listen?"""
        if not self._guests.take(peer, now, frames):
            return False
        if self._guests_all.take("", now, frames):
            return True
        return self._guests.used(peer, now) <= MODEST_FRAMES

    def control(self, peer: str, frames: int, now: float) -> float:
        """A partner said so much beside the flow of sessions: seconds not to read from it."""
        return self._control.owe(peer, now, frames)


def address_block(address: str) -> str:
    """The block of a multiaddress, "" if it has none of its own (see the module)."""
    parts = address.split("/")
    if "p2p-circuit" in parts or len(parts) < 3 or parts[1] not in ("ip4", "ip6"):
        return ""
    try:
        found = ipaddress.ip_address(parts[2].partition("%")[0])
    except ValueError:
        return ""
    if isinstance(found, ipaddress.IPv6Address) and found.ipv4_mapped is not None:
        found = found.ipv4_mapped
    if not found.is_global:
        return ""
    return str(ipaddress.ip_network((found, 24 if found.version == 4 else 48), strict=False))
