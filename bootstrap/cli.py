"""`hexswarm bootstrap`: the operator's door."""

from __future__ import annotations

import argparse
import asyncio
import signal
from collections.abc import Callable

from hexswarm.bootstrap.seed import run_bootstrap
from hexswarm.config import BootstrapConfig, from_flags


def run(flags: argparse.Namespace) -> int:
    """Run until SIGTERM or Ctrl-C."""
    config = from_flags(BootstrapConfig, flags)
    asyncio.run(run_bootstrap(config, _say, _stop_on_signals))
    return 0


def _stop_on_signals(stop: Callable[[], None]) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)


def _say(addresses: tuple[str, ...]) -> None:
    print("give one of these to others as --bootstrap:", flush=True)
    for address in addresses:
        print(address, flush=True)
