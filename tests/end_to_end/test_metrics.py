"""A peer tells its numbers to whoever asks on its own machine, and they follow what it does."""

from __future__ import annotations

import re
import urllib.request
from pathlib import Path

import pytest

from hexswarm.demo import Process
from tests.end_to_end.swarm import LivingSwarm, complaint, until

pytestmark = pytest.mark.end_to_end

EXTRA = ("--metrics-port", "0", "--kv-tokens", "4096")


def address(peer: Process) -> str:
    """Where a peer says that its numbers are."""
    line = next(line for line in peer.lines if line.startswith("metrics "))
    return line.removeprefix("metrics ")


def read(url: str) -> dict[str, float]:
    with urllib.request.urlopen(url, timeout=10) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        lines = answer.read().decode().splitlines()
    pairs = (line.rpartition(" ") for line in lines if not line.startswith("#"))
    return {re.sub(r"\{.*span=\"([\d:]+)\".*\}", r"{\1}", name): float(v) for name, _, v in pairs}


def test_numbers_follow_an_answer(tiny_model: Path) -> None:
    with LivingSwarm(("0:6",), model=str(tiny_model), extra=EXTRA) as local:
        url = address(local.peers[0])
        before = read(url)
        assert before["hexswarm_up{0:6}"] == 1
        assert before["hexswarm_kv_tokens"] == 4096
        with local.client() as client:
            client.generate([5, 6, 7], max_new_tokens=20)
            after = read(url)
            grown = {name: after[name] - before[name] for name in after if "_total" in name}
            assert grown["hexswarm_rows_total"] >= 20
            assert grown["hexswarm_tokens_total"] >= 22
            assert grown["hexswarm_batch_crashes_total"] == 0
            steps = after["hexswarm_decode_batch_seconds_count"]
            assert steps - before["hexswarm_decode_batch_seconds_count"] >= 19
        until(lambda: read(url)["hexswarm_kv_leased_tokens"] == 0, 20, "its KV came back")

        taken = url.rpartition(":")[2].removesuffix("/metrics")
        done = local.hexswarm("peer", "--span", "0:6", "--metrics-port", taken, home="other")
        assert "--metrics-port" in complaint(done)
