"""`hexswarm peer`: the volunteer's door."""

from __future__ import annotations

import argparse
import asyncio
import signal
from collections.abc import Callable
from typing import TYPE_CHECKING

from hexswarm.config import PeerConfig, from_flags
from hexswarm.progress import Terminal

if TYPE_CHECKING:
    from hexswarm.peer.daemon import Peer


def run(flags: argparse.Namespace) -> int:
    """Serve until SIGTERM or Ctrl-C, then drain; a second signal ends at once."""
    config = from_flags(PeerConfig, flags)
    from hexswarm.peer.daemon import run_peer  # torch takes seconds: not before the flags are right

    asyncio.run(run_peer(config, Terminal(), _say, stop_on_signals, _offer))
    return 0


def stop_on_signals(stop: Callable[[], None]) -> None:
    """The first signal calls `stop`, the second one kills as usual."""
    loop = asyncio.get_running_loop()

    def first(number: signal.Signals) -> None:
        loop.remove_signal_handler(number)
        stop()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, first, number)


def _offer(peer: Peer) -> None:
    print(f"waiting for the group {peer.config.group} as {peer.peer}", flush=True)
    _tell_addresses(peer)


def _say(peer: Peer) -> None:
    served = peer.served
    speed = served.measured.speed
    per_token_s = speed.decode_layer_s * len(served.span) + speed.head_s
    where = filter(None, [f"{served.numerics} on {served.device}", served.host.title])
    print(
        f"serving layers {served.span} of {served.folder.spec.name} as {peer.peer} "
        f"({', '.join(where)}, "
        f"{1 / max(per_token_s, 1e-9):.0f} steps/s, "
        f"KV for {peer.config.kv_tokens} tokens)",
        flush=True,
    )
    if peer.metrics_port is not None:
        print(f"metrics http://127.0.0.1:{peer.metrics_port}/metrics", flush=True)
    _tell_addresses(peer)


def _tell_addresses(peer: Peer) -> None:
    for address in peer.addresses:
        print(f"address {address}/p2p/{peer.peer}", flush=True)
