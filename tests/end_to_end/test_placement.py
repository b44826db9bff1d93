"""Peers that choose their layers themselves: they cover a model, and cover it again without one.

Three peers of the tiny model whose memory holds two thirds of it each, started at the same moment:
whoever looks at the same directory at the same time would choose the same layers.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from hexswarm.blocking import Client
from hexswarm.records import Announcement, PeerId, uncovered
from tests.end_to_end.swarm import LivingSwarm, patient, refresh, until

pytestmark = [pytest.mark.end_to_end, pytest.mark.timeout(400)]

EXTRA = ("--kv-tokens", "16384", "--memory", "32MB", "--hole-s", "2", "--drain-s", "2")
"""KV of a layer is 4.2 MB and the embedding, held at both ends, 12.6: four layers of six fit."""
MOST = 4
PROMPT = [5, 6, 7]


@pytest.fixture(scope="module")
def local(tiny_model: Path) -> Iterator[LivingSwarm]:
    with LivingSwarm((None, None, None), model=str(tiny_model), extra=EXTRA) as local:
        yield local


@pytest.fixture(scope="module")
def asker(local: LivingSwarm) -> Iterator[Client]:
    with local.client() as client:
        yield client


def serving(client: Client) -> list[Announcement]:
    return [item for item in refresh(client) if item.serving]


def covered(client: Client) -> bool:
    return not uncovered([item.span for item in serving(client)], client.spec.layers)


def needed(client: Client) -> PeerId:
    """One that holds what no other does: of two thirds each, three peers cannot all be spared."""
    told = {item.peer: item.span for item in serving(client)}
    for peer in told:
        others = [span for other, span in told.items() if other != peer]
        if uncovered(others, client.spec.layers):
            return peer
    raise AssertionError(told)


def covered_without(local: LivingSwarm, client: Client, how: int, within_s: float) -> None:
    """End the one that is needed: the others cover its layers and give the same answer."""
    gone, spans = needed(client), {item.peer: item.span for item in serving(client)}
    before = client.generate(PROMPT, max_new_tokens=8).ids
    local.peer_of(gone).end(how)
    until(
        lambda: covered(client) and gone not in {item.peer for item in serving(client)},
        within_s,
        "the others hold all layers again",
        0.5,
    )
    assert any(item.span != spans[item.peer] for item in serving(client)), "nobody moved"
    assert patient(lambda: client.generate(PROMPT, max_new_tokens=8)).ids == before


def test_peers_without_a_span_cover_the_model_and_answer(local: LivingSwarm, asker: Client) -> None:
    until(lambda: covered(asker), 60, "the peers hold all layers", 0.5)
    assert all(len(item.span) <= MOST for item in serving(asker))
    assert all(item.most_layers == MOST for item in serving(asker)), "planners need to know it"
    assert len(asker.generate(PROMPT, max_new_tokens=8).ids) == 8


def test_when_one_leaves_the_others_cover_its_layers(local: LivingSwarm, asker: Client) -> None:
    covered_without(local, asker, signal.SIGTERM, 60)


@pytest.mark.slow
def test_when_one_is_killed_the_others_do_when_its_word_has_run_out(tiny_model: Path) -> None:
    """That takes 90 s: nobody is told of its death but those who talked to it."""
    swarm = LivingSwarm((None, None, None), model=str(tiny_model), extra=EXTRA)
    with swarm as local, local.client() as client:
        until(lambda: covered(client), 60, "the peers hold all layers", 0.5)
        covered_without(local, client, signal.SIGKILL, 240)
