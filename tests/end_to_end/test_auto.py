"""What peers decide by themselves: `--group auto` and `--tensor-parallel auto`.

One swarm for all tests of this module; in each of them the peers are others, so that it is plain
who answered. What is expected comes from the swarm of plain peers. When a group is *faster* than
its members policy predicts (`tests/peer/test_group_policy.py`); here it is needed.
"""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from hexswarm import demo
from hexswarm.blocking import Client
from hexswarm.config import ClientConfig
from hexswarm.errors import NoRoute
from hexswarm.records import Announcement
from tests.end_to_end.swarm import (
    TINY_LAYERS,
    LivingSwarm,
    all_of,
    complaint,
    hexswarm,
    refresh,
    until,
)

pytestmark = pytest.mark.end_to_end

WHOLE = f"0:{TINY_LAYERS}"
KV = ("--kv-tokens", "16384")
"""25 MB of it for all layers, and 13 MB of weights."""
TIGHT, ROOMY = ("--group", "auto", "--memory", "32MB"), ("--group", "auto", "--memory", "1GB")
PROMPT = [5, 6, 7]
TOKENS = 200
SEEN_S = 15.0
FORMED_S = 60.0
"""Neighbours measure each other and settle; then both load."""


@pytest.fixture(scope="module")
def local(tiny_model: Path) -> Iterator[LivingSwarm]:
    with LivingSwarm((), model=str(tiny_model), extra=KV) as local:
        yield local
        assert not any("Traceback" in peer.log_text for peer in local.peers)


@pytest.fixture(scope="module")
def asker(local: LivingSwarm) -> Iterator[Client]:
    """Who does not wait for what is not there."""
    config = ClientConfig(
        tuple(local.bootstrap), local.home / "asker", model=local.model, patience_s=0
    )
    with Client(config=config) as client:
        yield client


@pytest.fixture(scope="module")
def expected(tiny_client: Client) -> tuple[int, ...]:
    return tiny_client.generate(PROMPT, max_new_tokens=TOKENS).ids


def said_by(local: LivingSwarm, client: Client, peer: demo.Process) -> Announcement | None:
    """What it announces now."""
    me = local.id_of(peer)
    return next((item for item in refresh(client) if item.peer == me), None)


@contextlib.contextmanager
def lent(local: LivingSwarm, client: Client, *extra: str) -> Iterator[demo.Process]:
    """A peer that has said how it begins; afterwards it leaves in order and serves nobody."""
    peer = local.add_peer(WHOLE, *extra)
    try:
        yield peer
    finally:
        assert peer.end() == 0

    def left() -> bool:
        told = said_by(local, client, peer)
        return told is None or not told.serving

    until(left, SEEN_S, "the swarm knows that it left")


# --- groups -------------------------------------------------------------------------------------


def test_neighbours_form_a_group_where_the_layers_fit_none_of_them(
    local: LivingSwarm, asker: Client, expected: tuple[int, ...]
) -> None:
    with contextlib.ExitStack() as opened:
        first = opened.enter_context(lent(local, asker, *TIGHT))
        assert "waiting for the group auto" in first.lines[0]
        until(lambda: said_by(local, asker, first), SEEN_S, "the first one is seen")
        with pytest.raises(NoRoute):
            asker.generate(PROMPT, max_new_tokens=4)
        second = opened.enter_context(lent(local, asker, *TIGHT))

        def members() -> list[Announcement] | None:
            told = [said_by(local, asker, peer) for peer in (first, second)]
            known = [item for item in told if item is not None and item.group is not None]
            formed = len(known) == 2 and any(item.serving for item in known)
            return sorted(known, key=lambda item: not item.serving) if formed else None

        leader, member = until(members, FORMED_S, "the group serves")
        assert leader.group is not None
        assert member.group is not None
        assert (leader.group.rank, member.group.rank) == (0, 1)
        assert leader.group.group == member.group.group
        assert not member.serving, "one speaks for both"
        assert "LAN group of 2" in local.peer_of(leader.peer).wait_for("serving", SEEN_S)[-1]
        answer = asker.generate(PROMPT, max_new_tokens=TOKENS)
        assert answer.ids == expected
        (stage,) = answer.route.stages
        assert (stage.peer, str(stage.span)) == (leader.peer, WHOLE)


def test_a_peer_whose_layers_fit_serves_alone_until_somebody_comes(
    local: LivingSwarm, asker: Client, expected: tuple[int, ...]
) -> None:
    with lent(local, asker, *ROOMY) as alone:
        assert alone.lines[0].startswith(f"serving layers {WHOLE}")
        assert "LAN group" not in alone.lines[0]
        told = until(lambda: said_by(local, asker, alone), SEEN_S, "it is seen")
        assert told.serving
        assert told.group is None
        assert told.offer is not None
        assert (told.offer.name, told.offer.waiting) == ("auto", False)
        assert asker.generate(PROMPT, max_new_tokens=TOKENS).ids == expected


# --- devices ------------------------------------------------------------------------------------


def test_a_cpu_is_one_device_already(
    local: LivingSwarm, asker: Client, expected: tuple[int, ...]
) -> None:
    with lent(local, asker, "--tensor-parallel", "auto", "--device", "cpu") as peer:
        assert f"serving layers {WHOLE}" in peer.lines[0]
        assert " ranks" not in peer.lines[0]
        children = psutil.Process(peer.pid).children()
        assert not [child for child in children if "hexswarm.peer.rank" in child.cmdline()]
        until(lambda: said_by(local, asker, peer), SEEN_S, "it is seen")
        assert asker.generate(PROMPT, max_new_tokens=TOKENS).ids == expected


# --- mistakes -----------------------------------------------------------------------------------

MISTAKES = {
    "both": (("--group", "auto", "--tensor-parallel", "auto"), ("exclude each other",)),
    "no way": (("--tensor-parallel", "all"), ("'all' is no way to cut layers", "use off, auto")),
    "too many": (
        ("--tensor-parallel", "9", "--device", "cpu"),
        ("makes 9 ranks of 4 heads", "at most --tensor-parallel 4"),
    ),
    "one member": (("--group", "auto", "--group-size", "1"), ("a group has 2 to 64 members",)),
}
NO_GPU = (("--tensor-parallel", "auto", "--device", "cuda"), ("no CUDA device", "--device cpu"))
if not torch.cuda.is_available():
    MISTAKES["no GPU"] = NO_GPU


@pytest.fixture(scope="module")
def answers(
    tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, subprocess.CompletedProcess[str]]:
    known = ("peer", "--model", str(tiny_model), "--span", WHOLE, *KV)
    made = {
        name: (*known, "--home", str(tmp_path_factory.mktemp("home")), *words)
        for name, (words, _) in MISTAKES.items()
    }
    return all_of({name: lambda words=words: hexswarm(*words) for name, words in made.items()})


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_gets_one_clear_line(
    answers: dict[str, subprocess.CompletedProcess[str]], name: str
) -> None:
    line = complaint(answers[name])
    for text in MISTAKES[name][1]:
        assert text in line
    assert answers[name].returncode == 2
