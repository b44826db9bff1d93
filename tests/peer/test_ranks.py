"""Ranks that are processes: the answers of one process, and no hang when one of them is lost."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from hexswarm.errors import MemberLost, OutOfMemory
from hexswarm.peer.commands import Plan, pack_plan, receive, send, unpack_plan
from hexswarm.peer.cuts import Cut, Member, plan_cut
from hexswarm.peer.led import LedShard
from hexswarm.peer.models.registry import architecture
from hexswarm.peer.rank import follow
from hexswarm.peer.ranks import Ranks
from hexswarm.peer.runner import Runner
from hexswarm.peer.shard import Shard
from hexswarm.peer.shared_sums import SharedSums, make_bells, make_memory, map_memory
from hexswarm.peer.slices import read_sizes
from hexswarm.peer.steps import Activations, Batch, Result, Row, TailPolicy
from hexswarm.peer.weights import load_span
from hexswarm.records import Sampling, Span
from hexswarm.store import ModelFolder, resolve
from tests import tiny

torch.set_num_threads(1)
ALL = Span(0, tiny.LAYERS)
LATER = Span(1, tiny.LAYERS)
LOGITS = TailPolicy(Sampling(), logits=True)
BLOCKS = {b"a": (3, 1, 4), b"b": (0, 5, 2)}
MOE = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 20}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    home = tmp_path_factory.mktemp("ranks")
    model = tiny.model("qwen3_moe", mlp_only_layers=[1], **MOE)
    return resolve(str(tiny.save_folder(home / "model", model, "1MB")), home=home)


def in_three(folder: ModelFolder) -> Cut:
    return plan_cut(read_sizes(folder.config, ALL), [Member(2.0), Member(1.0), Member(1.0)])


def one_process(folder: ModelFolder, span: Span) -> Runner:
    tensors = load_span(folder, span, dtype=torch.float32)
    shard = Shard(architecture(folder.config), span, tiny.LAYERS, tensors, backend="torch")
    return Runner(shard, shard.make_pool(8))


@pytest.fixture(scope="module")
def ranks(folder: ModelFolder) -> Iterator[Ranks]:
    with Ranks(folder, ALL, in_three(folder)) as made:
        yield made


def row(session: bytes, position: int, ids: list[int], span: Span = ALL) -> Row:
    payload: object = ids
    if span.first:
        x = torch.randn(len(ids), 32, generator=torch.Generator().manual_seed(ids[0]))
        payload = Activations(x.numpy().tobytes(), "float32")
    blocks = BLOCKS[session]
    return Row(session, position, len(ids), payload, True, blocks, policy=LOGITS, span=span)


def logits(results: list[Result]) -> torch.Tensor:
    assert [result.error for result in results] == [None] * len(results)
    return torch.stack(
        [torch.frombuffer(bytearray(one.logits or b""), dtype=torch.float32) for one in results]
    )


BATCHES = [
    (row(b"a", 0, [5, 6, 7, 8, 9]),),
    (row(b"a", 5, [10]), row(b"b", 0, [1, 2, 3])),
    (row(b"a", 6, [11]), row(b"b", 3, [4])),
    (row(b"a", 0, [5, 6, 7], LATER), row(b"b", 0, [7], LATER)),
    (row(b"a", 3, [8], LATER), row(b"b", 4, [12])),
]
"""Prompts, decode steps, entry amid the span, and both ways of entry in one batch."""


def _expect_done(door: socket.socket) -> None:
    assert receive(door) == ["done"]


@contextmanager
def followed(folder: ModelFolder) -> Iterator[LedShard]:
    """Rank 0 of two; the other is a thread that does all that a child does."""
    cut = plan_cut(read_sizes(folder.config, ALL), [Member(1.0), Member(2.0)])
    memory, bells, (door, theirs) = make_memory(2), make_bells(2), socket.socketpair()
    sums = SharedSums(0, map_memory(memory, 2), bells[0])
    tensors = load_span(folder, ALL, dtype=torch.float32, part=cut.parts[0])
    shard = Shard(
        *(architecture(folder.config), ALL, tiny.LAYERS, tensors), part=cut.parts[0], sums=sums
    )
    plan = Plan(
        *(str(folder.path), str(folder.home), folder.spec.digest, 0, tiny.LAYERS, "float32", 1)
    )
    with ThreadPoolExecutor(1) as threads, door, theirs:
        life = threads.submit(follow, theirs, memory, bells[1])
        try:
            send(door, pack_plan(plan, cut.parts[1]))
            assert receive(door)[0] == "loaded"  # type: ignore[index]
            yield LedShard(
                shard, sums, lambda command: send(door, command), lambda: _expect_done(door)
            )
        finally:
            door.close()
            life.result(20)
            sums.leave(MemberLost(0, "local", 0, "is done"))
            os.close(memory)


def test_ranks_answer_as_one(folder: ModelFolder) -> None:
    with followed(folder) as shard:
        whole, runner = one_process(folder, ALL), Runner(shard, shard.make_pool(8))  # type: ignore[arg-type]
        for rows in BATCHES:
            got, expected = (logits(one.run(Batch(rows))) for one in (runner, whole))
            assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.end_to_end
def test_three_processes_answer_as_one(folder: ModelFolder, ranks: Ranks) -> None:
    cut, whole = in_three(folder), one_process(folder, ALL)
    runner = Runner(ranks.shard, ranks.shard.make_pool(8))  # type: ignore[arg-type]
    assert ranks.held_bytes.keys() == set(range(len(cut)))
    for rank, part in enumerate(cut.parts):
        norms = ranks.held_bytes[rank] - cut.sizes.part_bytes(part)
        assert 0 < norms < 0.02 * ranks.held_bytes[rank]
    for rows in BATCHES:
        got, expected = (logits(one.run(Batch(rows))) for one in (runner, whole))
        assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
    runner.forget((3, 1))
    assert ranks.lost is None


@pytest.mark.end_to_end
def test_ranks_of_a_process_group_answer_as_one(folder: ModelFolder) -> None:
    """The way of GPUs, with gloo: ids and hidden states handed out by the group, and its end."""
    cut = plan_cut(read_sizes(folder.config, ALL), [Member(), Member(2.0)])
    whole = one_process(folder, ALL)
    with Ranks(folder, ALL, cut, devices=("cpu", "cpu"), backend="torch", sums="gloo") as ranks:
        runner = Runner(ranks.shard, ranks.shard.make_pool(8))  # type: ignore[arg-type]
        ranks.shard.warm(runner.pool)
        for rows in BATCHES:
            got, expected = (logits(one.run(Batch(rows))) for one in (runner, whole))
            assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
        ranks.guard()
        assert ranks.lost is None
        os.kill(ranks.children[1].pid, signal.SIGKILL)
        with pytest.raises(MemberLost):
            runner.run(Batch(BATCHES[1]))
        assert ranks.lost is not None


@pytest.mark.end_to_end
def test_a_pool_that_does_not_fit_is_told_in_words(folder: ModelFolder) -> None:
    """Of the rank that has no room, and the group is over: the others have theirs."""
    cut = plan_cut(read_sizes(folder.config, ALL), [Member(), Member()])
    with Ranks(folder, ALL, cut) as ranks:
        with pytest.raises(OutOfMemory, match="GB of KV"):
            ranks.shard.make_pool(1 << 40)
        assert ranks.lost is not None


@pytest.mark.end_to_end
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
def test_a_lost_child_ends_the_group(folder: ModelFolder, how: signal.Signals) -> None:
    """A typed error at once or at the deadline, for good; no child is left."""
    cut = plan_cut(read_sizes(folder.config, ALL), [Member(), Member()])
    with Ranks(folder, ALL, cut, timeout_s=0.5) as ranks:
        runner = Runner(ranks.shard, ranks.shard.make_pool(8))  # type: ignore[arg-type]
        logits(runner.run(Batch(BATCHES[0])))
        child = ranks.children[1]
        os.kill(child.pid, how)
        began = time.monotonic()
        with pytest.raises(MemberLost, match="rank 1"):
            runner.run(Batch(BATCHES[1]))
        assert time.monotonic() - began < 5
        assert ranks.lost is not None
        with pytest.raises(MemberLost):
            runner.run(Batch(BATCHES[1]))
    assert child.returncode == -signal.SIGKILL


@pytest.mark.end_to_end
def test_a_child_that_cannot_load_is_told_of(folder: ModelFolder) -> None:
    other = replace(folder, spec=replace(folder.spec, digest="0" * 64))
    cut = plan_cut(read_sizes(folder.config, ALL), [Member(), Member()])
    with pytest.raises(MemberLost, match="not the model that rank 0 has"):
        Ranks(other, ALL, cut)


def test_plans_travel(folder: ModelFolder) -> None:
    plan = Plan("/model", "/home", "ab", 0, 3, "bfloat16", 2, timeout_s=1.5)
    for part in in_three(folder).parts:
        assert unpack_plan(pack_plan(plan, part)) == (plan, part)


@pytest.mark.end_to_end
def test_a_failure_of_rank_0_ends_the_group(ranks: Ranks) -> None:
    """Amid a command: the others would wait for sums that never come. Uses up the shared group."""
    runner = Runner(ranks.shard, ranks.shard.make_pool(8))  # type: ignore[arg-type]
    with torch.inference_mode():
        ranks.shard._shard.layers[1].o.resize_(0, 0)  # type: ignore[union-attr]
    with pytest.raises(RuntimeError):
        runner.run(Batch(BATCHES[0]))
    with pytest.raises(MemberLost, match="rank 0"):
        runner.run(Batch(BATCHES[0]))
    assert all(child.wait(10) == 1 for child in ranks.children.values())
