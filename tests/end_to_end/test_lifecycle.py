"""How nodes come and go: draining, restarts, life without any bootstrap, and nothing left behind.

One swarm of the tiny model for all tests of this module, in the order of the file: each leaves it
whole for the next, with two peers for the middle layers, and the last one stops it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from hexswarm.blocking import BlockingConversation, Client
from hexswarm.demo import Process
from hexswarm.dht import load_remembered
from hexswarm.errors import HexswarmError, NetworkError
from hexswarm.records import PeerId
from tests.end_to_end.conftest import POOL
from tests.end_to_end.swarm import (
    LivingSwarm,
    environment,
    family,
    gone,
    refresh,
    until,
)

pytestmark = pytest.mark.end_to_end

DRAIN_S = 30.0
FOUND_S = 30.0
"""For some attempts, of which each may wait eight seconds for a peer that is gone."""
PROMPT = [5, 6, 7]


@pytest.fixture(scope="module")
def local(tiny_model: Path) -> Iterator[LivingSwarm]:
    extra = ("--kv-tokens", str(POOL), "--drain-s", "120")
    with LivingSwarm(("0:2", "2:4", "2:4", "4:6"), model=str(tiny_model), extra=extra) as local:
        yield local


@pytest.fixture(scope="module")
def asker(local: LivingSwarm) -> Iterator[Client]:
    with local.client() as client:
        yield client


@pytest.fixture(scope="module")
def expected(asker: Client) -> tuple[int, ...]:
    return asker.generate(PROMPT, max_new_tokens=8).ids


def states(client: Client) -> dict[PeerId, str]:
    return {item.peer: item.state for item in refresh(client)}


def remembered(local: LivingSwarm, *names: str) -> None:
    """Wait until these nodes have written down whom they met: at the latest after ten seconds."""
    for name in names:
        file = local.home / name / "peers.json"
        until(lambda file=file: load_remembered(file), 20, f"{name} remembers its peers")


def middle_of(local: LivingSwarm, answer: Any) -> Process:
    return local.peer_of(answer.route.stages[1].peer)


def two_through_one_middle(
    local: LivingSwarm, asker: Client, opened: contextlib.ExitStack
) -> tuple[BlockingConversation, BlockingConversation, Process]:
    """Two conversations whose middle stage is the same peer, and that peer.

    Two peers hold the middle and a client may choose either, so of three conversations two share.
    """
    seen: dict[str, BlockingConversation] = {}
    for _ in range(3):
        talk = opened.enter_context(asker.conversation())
        middle = middle_of(local, talk.generate(PROMPT, max_new_tokens=1))
        if middle.name in seen:
            return seen[middle.name], talk, middle
        seen[middle.name] = talk
    raise AssertionError("three conversations went through three peers, of which there are two")


class Reader(threading.Thread):
    """Reads a stream to its end in the background."""

    def __init__(self, stream: Any) -> None:
        super().__init__(daemon=True)
        self.stream = stream
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            for _ in self.stream:
                continue
        except BaseException as error:
            self.error = error


# --- leaving ------------------------------------------------------------------------------------


def test_a_peer_that_is_told_to_stop_ends_what_runs_and_hands_back_the_rest(
    local: LivingSwarm, asker: Client, expected: tuple[int, ...]
) -> None:
    with contextlib.ExitStack() as opened:
        idle, busy, middle = two_through_one_middle(local, asker, opened)
        stream = busy.generate(PROMPT, max_new_tokens=1500, stream=True)
        next(stream)
        middle.send(signal.SIGTERM)
        reader = Reader(stream)
        me = local.id_of(middle)
        until(lambda: states(asker).get(me) == "draining", 10, "the peer announces that it leaves")
        assert reader.is_alive(), "the answer was too short to say anything"
        other = idle.generate(PROMPT, max_new_tokens=8)
        assert (other.ids, other.reused_tokens) == (expected, 0)
        assert middle_of(local, other) is not middle
        reader.join(2 * DRAIN_S)
        ended_s = time.monotonic()
        assert reader.error is None
        assert (len(stream.completion.ids), stream.completion.finish) == (1500, "length")
        assert stream.completion.ids[:8] == expected
        # The conversation is still open here, but does not hold the peer back for two minutes.
        assert middle.wait(DRAIN_S) == 0
        assert time.monotonic() - ended_s < DRAIN_S
        assert "Traceback" not in middle.log_text
        assert busy.generate(PROMPT, max_new_tokens=8).ids == expected
    local.again(middle, "2:4")


def test_ctrl_c_in_a_terminal_ends_a_node_in_order(tmp_path: Path) -> None:
    """A terminal signals the whole job, of which the libp2p daemon must not be a part."""
    process = subprocess.Popen(
        [sys.executable, "-m", "hexswarm.cli", "bootstrap", "--port", "0", "--home", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        while b"/p2p/" not in process.stdout.readline():
            assert process.poll() is None
        (daemon,) = psutil.Process(process.pid).children()
        assert os.getpgid(daemon.pid) != os.getpgid(process.pid)
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=10)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0
    assert errors == b""
    until(lambda: gone(daemon), 5, "the daemon has ended")


# --- bootstraps ---------------------------------------------------------------------------------


def test_a_bootstrap_that_restarts_keeps_its_address(
    local: LivingSwarm, asker: Client, expected: tuple[int, ...]
) -> None:
    remembered(local, "bootstrap")
    before = local.bootstrap
    port = int(before[0].split("/")[4])
    assert local.seed.end() == 0
    local.start_seed(port)
    assert local.bootstrap == before
    assert asker.generate(PROMPT, max_new_tokens=8).ids == expected
    with local.client("after-restart") as newcomer:
        assert newcomer.generate(PROMPT, max_new_tokens=8).ids == expected


def test_the_swarm_outlives_its_bootstraps(
    local: LivingSwarm, asker: Client, expected: tuple[int, ...]
) -> None:
    with local.client("acquaintance") as client:
        assert client.generate(PROMPT, max_new_tokens=8).ids == expected
    living = [node for node in local.peers if node.process.poll() is None]
    remembered(local, *(node.log.parent.name for node in living))

    # A running answer does not notice.
    stream = asker.generate(PROMPT, max_new_tokens=600, stream=True)
    next(stream)
    local.seed.end(signal.SIGKILL)
    reader = Reader(stream)
    reader.join(60)
    assert reader.error is None
    assert len(stream.completion.ids) == 600

    # New requests go on, also when a peer dies, and of the daemon that it had nothing is left.
    answer = asker.generate(PROMPT, max_new_tokens=8)
    middle = middle_of(local, answer)
    processes = family(middle.pid)
    assert len(processes) == 2
    middle.end(signal.SIGKILL)
    until(lambda: all(map(gone, processes)), 10, "the peer and its daemon have ended")
    again = until(lambda: attempt(asker), FOUND_S, "the request goes by another peer")
    assert again.ids == expected
    assert middle_of(local, again) is not middle

    # The dead one comes back by the peers that it remembers, and is found.
    me = local.id_of(middle)
    middle = local.again(middle, "2:4")
    assert local.id_of(middle) == me
    until(lambda: states(asker).get(me) == "online", 30, "the peer that came back is seen")
    for node in local.peers:
        if node is not middle and node.lines[0].startswith("serving layers 2:4"):
            node.end(signal.SIGKILL)
    back = until(lambda: attempt(asker), FOUND_S, "the request goes by the peer that came back")
    assert back.ids == expected
    assert middle_of(local, back) is middle

    # A client that was here before finds its way back, too.
    with local.client("acquaintance") as client:
        assert (
            until(lambda: attempt(client), FOUND_S, "an old acquaintance is served").ids == expected
        )


def attempt(client: Client) -> Any:
    try:
        return client.generate(PROMPT, max_new_tokens=8)
    except HexswarmError:
        return None


# --- ends ---------------------------------------------------------------------------------------


def test_a_node_whose_daemon_dies_says_so_and_ends(local: LivingSwarm) -> None:
    middle = next(node for node in local.peers[1:] if node.process.poll() is None)
    (daemon,) = psutil.Process(middle.pid).children()
    daemon.kill()
    until(lambda: middle.process.poll() is not None, 20, "the peer has ended")
    assert middle.process.returncode == 1
    assert middle.log_text.strip().splitlines()[-1] == (
        "hexswarm: the libp2p daemon has died; start again"
    )
    assert "Traceback" not in middle.log_text


def test_a_client_whose_daemon_dies_gets_an_error(local: LivingSwarm) -> None:
    client = local.client("acquaintance")  # no bootstrap is left to be found by others
    before = set(psutil.Process().children())
    client.start()
    (daemon,) = set(psutil.Process().children()) - before
    daemon.kill()
    began_s = time.monotonic()
    with pytest.raises(NetworkError):
        client.generate(PROMPT, max_new_tokens=8)
    client.close()
    assert time.monotonic() - began_s < 20


def test_nothing_is_left_of_a_swarm_that_was_stopped(local: LivingSwarm) -> None:
    living = [node for node in local.peers if node.process.poll() is None]
    processes = [process for node in living for process in family(node.pid)]
    assert len(processes) == 2 * len(living) > 0
    began_s = time.monotonic()
    local.stop()
    assert time.monotonic() - began_s < DRAIN_S
    assert [node.process.returncode for node in living] == [0] * len(living)
    assert all(map(gone, processes))
    assert not local.home.exists()
