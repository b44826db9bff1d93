"""A small run of `benchmarks/fuzz.py`, and proof that it sees what it looks for."""

from __future__ import annotations

import importlib.util
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from hexswarm import directory
from hexswarm.peer.stage import StageTable
from hexswarm.wire import FrameDecoder

FOLDER = Path(__file__).parents[2] / "benchmarks"
MODULES = ("fuzz_mutations", "fuzz_targets", "fuzz_control", "fuzz")


@pytest.fixture(scope="module")
def fuzz() -> Iterator[ModuleType]:
    """The script with its neighbours, loaded by path as `python benchmarks/fuzz.py` would."""
    for name in MODULES:
        spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    yield sys.modules["fuzz"]
    for name in MODULES:
        del sys.modules[name]


def test_no_input_crashes_a_decoder_or_harms_a_session(fuzz: ModuleType) -> None:
    outcome = fuzz.fuzz(20_000, 7)
    assert outcome.crashes == []
    assert outcome.slow == []
    assert outcome.inputs == 20_000
    assert outcome.looks == 200
    assert set(outcome.by_target) == {
        "frames", "messages", "records", "dictionaries", "invitations", "safetensors", "gguf",
        "template", "stage",
    }  # fmt: skip
    assert 2_000 < outcome.accepted < 10_000, "inputs are neither all nonsense nor all valid"


def test_the_same_seed_gives_the_same_inputs(fuzz: ModuleType) -> None:
    one, again, other = (fuzz.fuzz(1000, seed, names=("frames", "records")) for seed in (3, 3, 4))
    assert (one.accepted, one.by_target) == (again.accepted, again.by_target)
    assert (one.accepted, one.by_target) != (other.accepted, other.by_target)


PLANTED: dict[str, tuple[str, Any, str, Any]] = {
    "an untyped error": ("safetensors", "hexswarm.headers", "_sizes", lambda values: values[9]),
    "a forged record": ("records", directory, "verify", lambda *_: True),
    "a decoder that hoards": ("frames", FrameDecoder, "held", property(lambda self: 1 << 40)),
    "an index out of range": ("gguf", "hexswarm.gguf", "_place", lambda listed, *_: listed[9]),
    "a stage that obeys strangers": (
        "stage", StageTable, "_owned", lambda self, peer, key: self._sessions.get(key),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANTED)
def test_planted_faults_are_found(
    fuzz: ModuleType, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    target, where, attribute, fault = PLANTED[name]
    directory.open_record.cache_clear()
    if isinstance(where, str):
        monkeypatch.setattr(f"{where}.{attribute}", fault)
    else:
        monkeypatch.setattr(where, attribute, fault)
    outcome = fuzz.fuzz(3000, 1, names=(target,))
    directory.open_record.cache_clear()
    assert outcome.crashes


def test_a_slow_input_is_found_and_a_slow_machine_is_not(fuzz: ModuleType) -> None:
    outcome, times = fuzz.Outcome(), iter([0.0, 0.1, 0.1, 0.11, 0.2, 0.21, 0.3, 0.31])
    clock = fuzz.time.perf_counter
    target = fuzz.Target("any", 1, lambda rng: (lambda: True, b""))
    try:
        fuzz.time.perf_counter = lambda: next(times)
        outcome.one(target, lambda: True, b"")
        assert outcome.slow == []
        assert outcome.accepted == 1
        times = iter([float(n) for n in range(8)])
        outcome.one(target, lambda: True, b"")
    finally:
        fuzz.time.perf_counter = clock
    assert len(outcome.slow) == 1


def test_mutations_of_all_kinds_change_something(fuzz: ModuleType) -> None:
    mutations, rng = sys.modules["fuzz_mutations"], random.Random(1)
    data = bytes(range(64))
    for way in mutations._WAYS:
        changed = 0
        for _ in range(50):
            copy = bytearray(data)
            way(copy, rng, [data])
            changed += bytes(copy) != data
            way(bytearray(), rng, [data])
        assert changed > 20, way
