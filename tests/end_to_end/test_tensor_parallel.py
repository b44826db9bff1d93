"""`hexswarm peer --tensor-parallel`: the answers of plain peers, and the end of a rank.

One peer holds the whole tiny model over two ranks that are processes, so an answer whose rank is
lost can go on only with the ranks that were started again. What is expected comes from the swarm of
plain peers.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from hexswarm import demo
from hexswarm.blocking import Client
from hexswarm.config import ClientConfig
from tests.end_to_end.conftest import POOL
from tests.end_to_end.swarm import (
    TINY_LAYERS,
    LivingSwarm,
    gone,
    refresh,
    until,
    whole_pool_is_free,
)

pytestmark = pytest.mark.end_to_end

PROMPT = [5, 6, 7]
TOKENS = 600
BEGUN = 20
SILENT_S, GONE_S, BACK_S = 3.0, 5.0, 60.0
"""Until a frozen rank is noticed; until the directory knows; starting ranks on a busy machine."""


@pytest.fixture(scope="module")
def local(tiny_model: Path) -> Iterator[LivingSwarm]:
    extra = ("--kv-tokens", str(POOL), "--tensor-parallel", "3:1")
    with LivingSwarm([f"0:{TINY_LAYERS}"], model=str(tiny_model), extra=extra) as local:
        children = ranks(local.peers[0])
        yield local
        children += ranks(local.peers[0])
        assert local.peers[0].process.poll() is None
    assert all(gone(child) for child in children)


@pytest.fixture(scope="module")
def asker(local: LivingSwarm) -> Iterator[Client]:
    home = local.home / "patient"
    config = ClientConfig(
        bootstrap=tuple(local.bootstrap), model=local.model, home=home, repair_s=BACK_S
    )
    with Client(config=config) as client:
        yield client


@pytest.fixture(scope="module")
def expected(tiny_client: Client) -> tuple[int, ...]:
    return tiny_client.generate(PROMPT, max_new_tokens=TOKENS).ids


def ranks(peer: demo.Process) -> list[psutil.Process]:
    """The children of a peer that compute with it."""
    children = psutil.Process(peer.pid).children()
    return [child for child in children if "hexswarm.peer.rank" in child.cmdline()]


def test_unequal_ranks_answer_like_plain_peers(
    local: LivingSwarm, asker: Client, expected: tuple[int, ...]
) -> None:
    assert "2 ranks, " in local.peers[0].lines[0]
    assert len(ranks(local.peers[0])) == 1
    assert asker.generate(PROMPT, max_new_tokens=TOKENS).ids == expected
    assert whole_pool_is_free(asker, POOL)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
def test_an_answer_outlives_a_rank(
    local: LivingSwarm, asker: Client, expected: tuple[int, ...], how: signal.Signals
) -> None:
    """The directory hears of it, the ranks are started again, and the tokens are the same."""
    (child,) = ranks(local.peers[0])
    with asker.conversation() as talk:
        stream = talk.generate(PROMPT, stream=True, max_new_tokens=TOKENS)
        for _ in range(BEGUN):
            next(stream)
        os.kill(child.pid, how)
        lost_s = time.monotonic()
        until(lambda: all(a.state != "online" for a in refresh(asker)), GONE_S, "it is told")
        assert time.monotonic() - lost_s < GONE_S
        list(stream)
    assert stream.completion.ids == expected
    assert len(stream.completion.mends) == 1
    assert gone(child)
    (successor,) = ranks(local.peers[0])
    assert successor.pid != child.pid


def test_a_rank_that_is_lost_while_nobody_asks_is_replaced(
    local: LivingSwarm, asker: Client, expected: tuple[int, ...]
) -> None:
    (child,) = ranks(local.peers[0])
    until(lambda: all(a.state == "online" for a in refresh(asker)), BACK_S, "it serves")
    os.kill(child.pid, signal.SIGSTOP)
    until(lambda: gone(child), SILENT_S + GONE_S, "the frozen rank is ended")
    until(lambda: all(a.state == "online" for a in refresh(asker)), BACK_S, "it serves again")
    assert asker.generate(PROMPT, max_new_tokens=BEGUN).ids == expected[:BEGUN]
