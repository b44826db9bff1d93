"""Swarms that many tests share: starting one takes ten seconds, asking it takes one."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from hexswarm.blocking import Client
from hexswarm.config import DEFAULT_MODEL, cache
from hexswarm.progress import Quiet
from hexswarm.store import resolve
from tests import tiny
from tests.end_to_end.swarm import (
    TINY_CONTEXT,
    TINY_LAYERS,
    TINY_SPANS,
    LocalSwarm,
    whole_pool_is_free,
)

POOL = 4096
"""KV tokens of each peer of the tiny swarm."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """These tests come last: what takes a second should fail first, and swarms idle for nobody."""
    here = Path(__file__).parent
    items.sort(key=lambda item: here in item.path.parents)


@pytest.fixture(scope="session", autouse=True)
def ctrl_c_is_heard() -> None:
    """A shell that runs us in the background ignores SIGINT, and so would all that we start."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def default_folder() -> Path:
    """The default model, fetched and converted if this machine does not have it yet."""
    return resolve(DEFAULT_MODEL, home=cache(), progress=Quiet()).path


@pytest.fixture(scope="session", autouse=True)
def own_cache(default_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Hashes and speeds of models that live for one test run stay out of the user's cache."""
    folder, real = tmp_path_factory.mktemp("cache"), default_folder.parents[1]
    (folder / "models").symlink_to(real / "models")
    shutil.copytree(real / "manifests", folder / "manifests")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HEXSWARM_CACHE", str(folder))
        patch.setenv("HEXSWARM_HOME", str(folder / "home"))
        patch.delenv("HEXSWARM_BOOTSTRAP", raising=False)
        patch.setenv("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))
        yield


@pytest.fixture(scope="session")
def tiny_model(default_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six random layers with the default model's words: loads in a moment, says nonsense."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    built = tiny.model(
        "llama", tied=True, num_hidden_layers=TINY_LAYERS, hidden_size=64, intermediate_size=128,
        head_dim=16, vocab_size=49152, max_position_embeddings=TINY_CONTEXT, eos_token_id=2,
    )  # fmt: skip
    built.save_pretrained(folder, max_shard_size="300KB")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(default_folder / name, folder / name)
    return folder


@pytest.fixture(scope="session")
def swarm() -> Iterator[LocalSwarm]:
    """The default model on a ring of three."""
    with LocalSwarm() as local:
        yield local


@pytest.fixture(scope="session")
def client(swarm: LocalSwarm) -> Iterator[Client]:
    with swarm.client() as client:
        yield client


@pytest.fixture(scope="session")
def tiny_swarm(tiny_model: Path) -> Iterator[LocalSwarm]:
    """The tiny model on a ring of three; at the end all KV must have come back."""
    extra = ("--kv-tokens", str(POOL))
    with LocalSwarm(TINY_SPANS, model=str(tiny_model), extra=extra) as local:
        yield local
        assert all(peer.process.poll() is None for peer in local.peers)


@pytest.fixture(scope="session")
def tiny_client(tiny_swarm: LocalSwarm) -> Iterator[Client]:
    with tiny_swarm.client() as client:
        yield client
        assert whole_pool_is_free(client, POOL)
