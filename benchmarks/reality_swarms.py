"""The two real swarms of `reality.py`, each with its clients, up for as long as a block lasts."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import lab

from hexswarm.demo import LocalSwarm, Process, demo_spans

SCRIPT = Path(__file__).with_name("reality_client.py")
_BEGAN_S = time.monotonic()


def say(text: str) -> None:
    """A line of progress."""
    print(f"{time.monotonic() - _BEGAN_S:6.1f} s  {text}", file=sys.stderr, flush=True)


class Loopback:
    """The demo's swarm, and one client."""

    def __init__(self, layers: int) -> None:
        self._local = LocalSwarm(demo_spans(layers), threads=1)

    @contextlib.contextmanager
    def running(self) -> Iterator[Loopback]:
        """Up until the block ends."""
        with self._local as local:
            log = local.home / "client.log"
            words = [sys.executable, str(SCRIPT), local.bootstrap[0], str(local.home / "client")]
            with log.open("ab") as errors:
                process = subprocess.Popen(
                    words,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    cwd=local.home,  # not the repository, whose kernels/ hides another
                    env={**os.environ, "OMP_NUM_THREADS": "1"},
                    bufsize=0,
                )
            self._client = lab.Inside("loopback", Process("client", process, log))
            try:
                self._client.ready()
                yield self
            finally:
                self._client.close()
                process.wait(30)

    def client(self, host: str) -> lab.Inside:
        return self._client

    def peers(self, *hosts: str) -> list[str]:
        assert not hosts, "on loopback the router chooses"
        return []


@contextlib.contextmanager
def wide() -> Iterator[lab.WideSwarm]:
    """The eight peers of `wan.py`, settled."""
    with lab.WideSwarm(script=SCRIPT, say=say) as swarm:
        swarm.start_clients()
        swarm.settle(steady=True)
        yield swarm
