"""Real peers that die in the middle of an answer: it goes on, and the tokens are the same.

One swarm of the tiny model for all tests of this module, each layer held twice, in the order of the
file: the first tests use up a head, a middle and a tail, the last ones take what is left, until
nobody can go on. `benchmarks/chaos.py` is the whole matrix, with figures.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hexswarm.blocking import BlockingConversation, Client, Stream
from hexswarm.config import ClientConfig
from hexswarm.errors import PeerLost
from hexswarm.records import PeerId
from hexswarm.trace import Repair
from tests.end_to_end.conftest import POOL
from tests.end_to_end.swarm import (
    TINY_SPANS,
    LivingSwarm,
    environment,
    until,
    whole_pool_is_free,
)

pytestmark = pytest.mark.end_to_end

PROMPT = [*range(5, 45)]
"""Long enough to be known from the answer before, where the route is the same."""
TOKENS = 400
BEGUN = 20
"""Tokens that have come when something happens."""
MENDED_S = 8.0
"""Longest stall: the bar of the kill matrix."""
REPAIR_S = 3.0
EXIT_S = 30.0


@pytest.fixture(scope="module")
def local(tiny_model: Path) -> Iterator[LivingSwarm]:
    extra = ("--kv-tokens", str(POOL))
    with LivingSwarm([*TINY_SPANS] * 2, model=str(tiny_model), extra=extra) as local:
        yield local
        assert not any("Traceback" in peer.log_text for peer in local.peers)


@pytest.fixture(scope="module")
def asker(local: LivingSwarm) -> Iterator[Client]:
    with local.client() as client:
        yield client


@pytest.fixture(scope="module")
def expected(asker: Client) -> tuple[int, ...]:
    """What is answered while nobody dies."""
    return asker.generate(PROMPT, max_new_tokens=TOKENS).ids


def begun(talk: BlockingConversation, stage: int, tokens: int = TOKENS) -> tuple[Stream, PeerId]:
    """An answer of which some tokens have come, and who serves that stage of it."""
    stream = talk.generate(PROMPT, stream=True, max_new_tokens=tokens)
    for _ in range(BEGUN):
        next(stream)
    session = talk._conversation._session
    assert session is not None
    return stream, session.route.stages[stage].peer


def only_repair(stream: Stream) -> Repair:
    (repair,) = stream.completion.mends
    return repair


# --- one of two ---------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [1, 0], ids=["middle", "head"])
def test_a_peer_that_is_killed_is_replaced_and_the_tokens_are_the_same(
    local: LivingSwarm, asker: Client, expected: tuple[int, ...], stage: int
) -> None:
    with asker.conversation() as talk:
        stream, victim = begun(talk, stage)
        local.peer_of(victim).end(signal.SIGKILL)
        list(stream)
        done = stream.completion
    assert done.ids == expected
    repair = only_repair(stream)
    assert [(place.peer, str(place.span)) for place in repair.lost] == [(victim, TINY_SPANS[stage])]
    (successor,) = repair.by
    assert (successor.peer, successor.span) == (done.route.stages[stage].peer, repair.lost[0].span)
    assert successor.peer != victim
    assert len(PROMPT) + BEGUN <= repair.position < len(PROMPT) + TOKENS
    assert 0 < repair.stall_s < MENDED_S
    with asker.conversation() as talk:  # the next answer does not ask the dead
        again = talk.generate(PROMPT, max_new_tokens=8)
    assert (again.ids, again.mends) == (expected[:8], ())


def test_a_tail_that_is_told_to_stop_costs_its_answers_nothing(
    local: LivingSwarm, asker: Client, expected: tuple[int, ...]
) -> None:
    """It ends what runs or hands it on, and leaves with status 0."""
    with asker.conversation() as talk:
        stream, victim = begun(talk, 2)
        process = local.peer_of(victim)
        process.send(signal.SIGTERM)
        list(stream)
        assert stream.completion.ids == expected
    assert process.wait(EXIT_S) == 0
    assert asker.generate(PROMPT, max_new_tokens=8).ids == expected[:8]


# --- nobody left --------------------------------------------------------------------------------


def command(local: LivingSwarm, name: str, tokens: int) -> subprocess.Popen[bytes]:
    """`hexswarm generate`, of whose answer something has been read."""
    words = [sys.executable, "-m", "hexswarm.cli", "generate", "--raw", "Hi"]
    words += ["--bootstrap", local.bootstrap[0], "--model", local.model]
    words += ["--home", str(local.home / name), "--max-new-tokens", str(tokens)]
    words += ["--repair-s", str(REPAIR_S)]
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()
    )
    assert process.stdout is not None
    assert process.stdout.read(1)
    return process


def test_a_client_that_is_killed_gives_its_kv_back(local: LivingSwarm, asker: Client) -> None:
    process = command(local, "killed", 2000)
    process.kill()
    process.communicate()
    until(lambda: whole_pool_is_free(asker, POOL), 20, "all KV has come back")


def test_without_a_replica_the_layers_are_named_in_bounded_time(
    local: LivingSwarm, expected: tuple[int, ...]
) -> None:
    """In Python by a typed error, at the command line in one line and by the exit status."""
    config = ClientConfig(
        tuple(local.bootstrap), local.home / "last", model=local.model, repair_s=REPAIR_S
    )
    process = command(local, "told", 1500)
    try:
        with Client(config=config) as client, client.conversation() as talk:
            stream, last = begun(talk, 1, 1500)
            local.peer_of(last).end(signal.SIGKILL)
            began_s = time.monotonic()
            with pytest.raises(PeerLost) as caught:
                list(stream)
            assert REPAIR_S - 1 < time.monotonic() - began_s < REPAIR_S + 5
        _, errors = process.communicate(timeout=REPAIR_S + 10)
    finally:
        process.kill()
        process.wait()
    assert caught.value.layers == (2, 4)
    assert "(layers 2-3)" in str(caught.value)
    assert "hexswarm peer --span 2:4" in caught.value.remedy
    (line,) = errors.decode().strip().splitlines()
    assert line.startswith("hexswarm: peer ")
    assert "(layers 2-3)" in line
    assert process.returncode == 1
