"""Where layers are computed: which devices, how many cores each, and what a loss leads to."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch

from hexswarm.clock import VirtualClock
from hexswarm.config import PeerConfig
from hexswarm.degree import Degree
from hexswarm.errors import MemberLost, OutOfMemory, UsageError
from hexswarm.peer import hosting
from hexswarm.peer.fitting import held_bytes, kv_bytes, longest_runs
from hexswarm.peer.hosting import Machine
from hexswarm.peer.loading import load
from hexswarm.progress import Quiet
from hexswarm.records import Span
from hexswarm.store import ModelFolder, resolve
from tests import tiny

LOST = MemberLost(1, "local", 0, "is gone")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    home = tmp_path_factory.mktemp("hosting")
    built = tiny.model("llama", tied=True, max_position_embeddings=512)
    return resolve(str(tiny.save_folder(home / "model", built)), home=home)


def machine(text: str = "off", **more: object) -> Machine:
    config = PeerConfig(tensor_parallel=Degree.parse(text), **more)  # type: ignore[arg-type]
    return Machine(config, VirtualClock())


@pytest.fixture
def two_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H200")
    monkeypatch.setattr(hosting, "free_bytes", lambda device: 8 << 30)


def test_one_device_is_no_group() -> None:
    assert machine().places("cpu") is None
    assert machine("auto").places("cpu") is None


def test_ranks_of_a_cpu_have_its_memory_in_common() -> None:
    places = machine("3:1").places("cpu")
    assert places is not None
    assert places.devices == ("cpu", "cpu")
    assert places.common


@pytest.mark.usefixtures("two_cards")
def test_cards() -> None:
    for text in ("auto", "2", "3:1"):
        places = machine(text).places("cuda")
        assert places is not None
        assert places.devices == ("cuda:0", "cuda:1")
        assert places.speeds == (1.0, 1.0)
        assert places.rooms_bytes == (8 << 30, 8 << 30)
    with pytest.raises(UsageError, match="this machine has 2; at most --tensor-parallel 2"):
        machine("3").places("cuda")
    with pytest.raises(UsageError, match="say --device cuda"):
        machine("2").places("cuda:1")
    assert machine("off").places("cuda:1") is None


def test_a_group_holds_what_its_members_hold_together(folder: ModelFolder) -> None:
    """Two ranks with half the room each hold about what one holds with all."""
    tokens = 64
    whole = held_bytes(folder, Span(0, 3), "float32") + 3 * kv_bytes(folder, "float32", tokens)
    half = int(0.52 * whole)
    places = hosting.Places(("cuda:0", "cuda:1"), (1.0, 1.0), (half, half))
    found = longest_runs(folder, tokens, "float32", 2 * half, ranks=(Degree(2), places))
    assert found == (3, 2, 1)
    unlike = hosting.Places(("cuda:0", "cuda:1"), (1.0, 1.0), (half // 2, 3 * half // 2))
    fixed = longest_runs(folder, tokens, "float32", 2 * half, ranks=(Degree(2, (1, 1)), unlike))
    assert max(fixed) < 3, "shares that the user gave leave the large card half empty"
    nobody = hosting.Places(("cuda:0", "cuda:1"), (1.0, 1.0), (10, 10))
    with pytest.raises(OutOfMemory):
        longest_runs(folder, tokens, "float32", 20, ranks=(Degree(2), nobody))


def test_after_each_loss_it_waits_longer_and_then_gives_up(monkeypatch) -> None:
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    monkeypatch.setattr(hosting.asyncio, "sleep", sleep)

    async def life() -> None:
        one = machine("2")
        await one.ready()
        for _ in range(hosting.Restarts().failures, 5):
            one.lost(LOST)
            await one.ready()
        one.lost(LOST)
        with pytest.raises(MemberLost, match=r"rank 1 .* is gone; see what is wrong"):
            await one.ready()

    asyncio.run(life())
    assert slept == [0.0, 0.5, 1.0, 2.0, 4.0, 8.0]


@pytest.mark.end_to_end
def test_ranks_are_loaded_measured_and_closed(
    folder: ModelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the door that the daemon uses; the cores are dealt out and given back."""
    monkeypatch.setenv("HEXSWARM_CACHE", str(tmp_path))
    cores = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    config = PeerConfig(tensor_parallel=Degree.parse("3:1"), kv_tokens=2048, threads=4)
    own = Machine(config, VirtualClock())
    try:
        served = load(config, folder, Span(0, 3), "cpu", "float32", Quiet(), own)
        try:
            assert served.host.title.startswith("2 ranks, ")
            assert served.host.lost is None
            assert served.measured.speed.decode_layer_s > 0
            assert served.host.threads == [3, 1]  # type: ignore[attr-defined]
        finally:
            served.host.close()
        assert served.host.lost is not None
    finally:
        torch.set_num_threads(cores)


def test_more_ranks_than_heads_end_the_peer_with_a_remedy(folder: ModelFolder) -> None:
    with pytest.raises(UsageError, match="at most --tensor-parallel 4"):
        machine("5").start(folder, Span(0, 3), "cpu", "float32", Quiet())
