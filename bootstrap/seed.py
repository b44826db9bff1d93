"""`hexswarm bootstrap`: a node of the directory with an address that does not change.

It serves nothing and decides nothing: it is one more DHT node, which validates what it stores, is
always on, and keeps its identity on disk so that its address survives restarts. A swarm needs one
to be found by newcomers; once peers know each other they go on without it. Several bootstraps name
each other with `--bootstrap`, so that losing one loses nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from hexswarm.clock import RealClock
from hexswarm.config import BootstrapConfig
from hexswarm.directory import INDEX
from hexswarm.identity import Identity
from hexswarm.membership import Membership
from hexswarm.records import PeerId
from hexswarm.version import __version__
from hexswarm.wire import Frame


class Seed:
    """A running bootstrap node."""

    def __init__(self, config: BootstrapConfig) -> None:
        self.config = config
        self._identity_path = config.identity or config.folder / "identity" / "bootstrap.key"
        self.peer = Identity.claim(self._identity_path).peer
        self._member = Membership(config, RealClock(), software=f"hexswarm/{__version__}")

    async def start(self) -> tuple[str, ...]:
        """Listen and join; the addresses to give to others.

        Other bootstraps that do not answer are no reason to stay away.
        """
        await self._member.join(_nothing, _nobody, identity=self._identity_path, alone=True)
        self._member.follow(INDEX)
        addresses = await self._member.transport.addresses()
        return tuple(f"{address}/p2p/{self.peer}" for address in addresses)

    async def died(self) -> None:
        """Wait for an end that nobody asked for. Raises NetworkError then."""
        await self._member.transport.died()

    async def close(self) -> None:
        await self._member.close()


def _nothing(peer: PeerId, frames: list[Frame]) -> None:
    """A bootstrap node takes part in no session."""


def _nobody(peer: PeerId, how: str) -> None:
    """Nor does it depend on anybody."""


async def run_bootstrap(
    config: BootstrapConfig,
    on_ready: Callable[[tuple[str, ...]], None],
    stop_with: Callable[[Callable[[], None]], None],
) -> None:
    """Run a bootstrap node until it is told to stop."""
    seed, stop = Seed(config), asyncio.Event()
    stop_with(stop.set)
    try:
        on_ready(await seed.start())
        async with asyncio.TaskGroup() as tasks:
            watching = tasks.create_task(seed.died())
            await stop.wait()
            watching.cancel()
    finally:
        await seed.close()
