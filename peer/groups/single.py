"""What a peer of `--group auto` hosts by itself, until it is worth more in a group."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hexswarm.errors import MemberLost

if TYPE_CHECKING:
    from hexswarm.peer.hosting import Host


class Single:
    """Another host, which can be given up as if it had been lost."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self.given_up: MemberLost | None = None

    @property
    def shard(self) -> Any:
        return self._host.shard

    @property
    def title(self) -> str:
        return self._host.title

    @property
    def lost(self) -> MemberLost | None:
        return self.given_up or self._host.lost

    def give_up(self, why: MemberLost) -> None:
        """From now on it is lost."""
        self.given_up = why

    def guard(self) -> None:
        self._host.guard()

    def close(self) -> None:
        self._host.close()
