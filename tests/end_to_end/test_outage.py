"""Every bootstrap is dead for a while: nobody who is in notices, and newcomers still find in."""

from __future__ import annotations

import shutil
import signal
import time
from pathlib import Path

import pytest

from hexswarm import demo
from hexswarm.dht import load_remembered
from hexswarm.records import Span
from tests.end_to_end.swarm import LivingSwarm, refresh, until

pytestmark = pytest.mark.end_to_end

OUTAGE_S = 25.0
"""Longer than two periods of reading the directory; the long one is in `benchmarks/chaos.py`."""
JOIN_S = 10.0
PROMPT = [5, 6, 7]


def test_newcomers_join_by_peers_that_somebody_remembers(tiny_model: Path) -> None:
    extra = ("--kv-tokens", "1024")
    spans = ("0:3", "3:6")
    with (
        LivingSwarm(spans, model=str(tiny_model), extra=extra) as local,
        local.client("asker") as asker,
    ):
        expected = asker.generate(PROMPT, max_new_tokens=8).ids
        for name in ("peer-0", "peer-1", "asker"):
            path = local.home / name / "peers.json"
            until(lambda path=path: load_remembered(path), 20, f"{name} remembers its peers")
        dead = local.bootstrap
        local.seed.end(signal.SIGKILL)
        began_s = time.monotonic()

        # A peer that was never here, but was given a list of peers by somebody who was.
        (local.home / "peer-2").mkdir()
        shutil.copy(local.home / "peer-0" / "peers.json", local.home / "peer-2")
        newcomer = local.spawn_peer("0:6")
        assert local.bootstrap == dead, "it is told of nobody else"
        newcomer.wait_for("address", demo.READY_S)
        served_s = time.monotonic() - began_s
        me = local.id_of(newcomer)

        def held() -> list[Span]:
            return [item.span for item in refresh(asker) if item.peer == me]

        until(held, JOIN_S, "the newcomer is seen")
        seen_s = time.monotonic() - began_s
        print(f"without bootstrap: serves after {served_s:.1f} s, seen after {seen_s:.1f} s")
        assert seen_s < JOIN_S + 20, "loading torch and the model included"

        # A client that was never here, likewise.
        (local.home / "guest").mkdir()
        shutil.copy(local.home / "peer-1" / "peers.json", local.home / "guest")
        begun_s = time.monotonic()
        with local.client("guest") as guest:
            assert guest.generate(PROMPT, max_new_tokens=8).ids == expected
        assert time.monotonic() - begun_s < JOIN_S

        # Meanwhile nobody's requests fail.
        answers = 0
        while time.monotonic() - began_s < OUTAGE_S or answers < 5:
            assert asker.generate(PROMPT, max_new_tokens=8).ids == expected
            answers += 1
        assert answers >= 5
