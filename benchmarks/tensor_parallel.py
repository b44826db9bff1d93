"""Tensor-parallel stages in one machine: are answers equal, weights shared, sums quick?

    python benchmarks/tensor_parallel.py [--rows parity memory pair sums]
                                         [--prompts 20] [--tokens 64]

*parity*: a route of three stages of degree 1, 2 (cut 2:1) and 3 (5:3:1 of 9 heads), each rank a
process, against one process: the largest difference of logits over the largest of them, and greedy
answers, for SmolLM2 and for a small Qwen3-MoE with random weights. All prompts run in one batch.
*memory*: bytes of weights that the largest member holds over its share of the span's.
*pair*: two members, the first made three times as slow (it waits twice as long as it computed,
before each sum): the stage's decode step cut in proportion against equal halves, by turns; the
median, and the fastest tenth, which is what a neighbour on the machine has not disturbed. A member
that computes all the time loses more to neighbours than one that waits, so "processor" puts the
step together from the processor time of each member for each half of a layer.
*sums*: 8 KB between two processes, through shared memory against gloo, by turns.
*group*: peers of a LAN group (`tensor_parallel_group.py`): the member is killed and frozen amid an
answer, `--strikes` times each; seconds until clients know, the record is gone, and it serves again.

    python benchmarks/tensor_parallel.py --device cuda [--batch 1 32] [--ctx 1024]

measures a stage over all GPUs of the machine instead: see `tensor_parallel_gpu.py`, and
`tensor_parallel_product.py`, which `--rows product` runs on a CPU, too. Ratios travel, absolute
numbers do not. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from tensor_parallel_group import group
from torch import Tensor, distributed, multiprocessing

from hexswarm.config import DEFAULT_MODEL
from hexswarm.config import cache as default_home
from hexswarm.peer import ranks as ranks_module
from hexswarm.peer.cuts import Cut, Member, cut_by_heads, plan_cut, whole
from hexswarm.peer.models.registry import architecture
from hexswarm.peer.ranks import Ranks
from hexswarm.peer.runner import Runner
from hexswarm.peer.shard import Shard
from hexswarm.peer.shared_sums import SharedSums, make_bells, make_memory, map_memory
from hexswarm.peer.slices import read_sizes
from hexswarm.peer.steps import Activations, Batch, Result, Row, TailPolicy
from hexswarm.peer.weights import load_span
from hexswarm.records import Sampling, Span
from hexswarm.store import ModelFolder, resolve

LOGITS, GREEDY = TailPolicy(Sampling(), logits=True), TailPolicy(Sampling())
BLOCK, PROMPT = 16, 24
SLOWNESS = 3.0
MOE = {
    "num_hidden_layers": 6, "hidden_size": 144, "intermediate_size": 288, "head_dim": 16,
    "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 600, "num_experts": 12,
    "num_experts_per_tok": 4, "moe_intermediate_size": 60, "mlp_only_layers": [1],
    "max_position_embeddings": 512, "norm_topk_prob": True, "tie_word_embeddings": False,
}  # fmt: skip
PAIR = {
    "num_hidden_layers": 6, "hidden_size": 1024, "intermediate_size": 3072, "head_dim": 64,
    "num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": 600,
    "max_position_embeddings": 512, "tie_word_embeddings": False,
}  # fmt: skip


def random_model(home: Path, family: str, fields: dict[str, Any]) -> ModelFolder:
    """A folder of a model with random weights, as transformers saves it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **fields))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    folder = home / family
    model.save_pretrained(folder)
    return resolve(str(folder), home=home)


def small_model(home: Path) -> ModelFolder:
    """SmolLM2."""
    return resolve(DEFAULT_MODEL, home=home)


def prompts(count: int, vocabulary: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(11)
    return torch.randint(0, vocabulary, (count, PROMPT), generator=generator).tolist()


class Route:
    """Stages one after another, for sessions that go in step."""

    def __init__(self, runners: Sequence[Runner], tokens: int) -> None:
        self.runners, self._blocks = runners, -(-(PROMPT + tokens) // BLOCK)

    def step(self, position: int, inputs: Sequence[list[int]], policy: TailPolicy) -> list[Result]:
        payloads: list[Any] = list(inputs)
        results: list[Result] = []
        for runner in self.runners:
            rows = tuple(
                Row(
                    *(bytes([n]), position, len(ids), payload, True),
                    tuple(range(n * self._blocks, (n + 1) * self._blocks)),
                    policy=policy,
                )
                for n, (ids, payload) in enumerate(zip(inputs, payloads, strict=True))
            )
            results = runner.run(Batch(rows))
            assert not any(result.error for result in results), results
            payloads = [result.activations for result in results]
        return results

    def logits(self, texts: Sequence[list[int]], tokens: int) -> Tensor:
        """After the prompt and after each of the first `tokens` given ones."""
        found = [self.step(0, [ids[:PROMPT] for ids in texts], LOGITS)]
        for n in range(tokens):
            ids = [text[PROMPT + n : PROMPT + n + 1] for text in texts]
            found.append(self.step(PROMPT + n, ids, LOGITS))
        lines = [bytearray(one.logits or b"") for results in found for one in results]
        return torch.stack([torch.frombuffer(line, dtype=torch.float32) for line in lines])

    def greedy(self, texts: Sequence[list[int]], tokens: int) -> list[list[int]]:
        """Each text with `tokens` more."""
        answers, inputs = [list(ids) for ids in texts], list(texts)
        for n in range(tokens):
            results = self.step(PROMPT + n - 1 if n else 0, inputs, GREEDY)
            inputs = [[one.token or 0] for one in results]
            for answer, new in zip(answers, inputs, strict=True):
                answer += new
        return answers


def parity(folder: ModelFolder, count: int, tokens: int) -> dict[str, Any]:
    """One process, then a route of degrees 1, 2 and 3, on the same prompts."""
    layers = folder.spec.layers
    edges = [0, layers // 3, 2 * layers // 3, layers]
    spans = [Span(a, b) for a, b in itertools.pairwise(edges)]
    cuts = [
        plan_cut(read_sizes(folder.config, spans[1]), [Member(2.0), Member(1.0)]),
        cut_by_heads(read_sizes(folder.config, spans[2]), [5, 3, 1]),
    ]
    texts, blocks = prompts(count, folder.spec.vocabulary), count * -(-(PROMPT + tokens) // BLOCK)

    def one_process(span: Span) -> Runner:
        tensors = load_span(folder, span, dtype=torch.float32)
        shard = Shard(architecture(folder.config), span, layers, tensors)
        return Runner(shard, shard.make_pool(blocks, BLOCK))

    alone = Route([one_process(Span(0, layers))], tokens)
    answers = alone.greedy(texts, tokens)
    expected = alone.logits(answers, 4)
    with ExitStack() as stack:
        groups = [
            stack.enter_context(Ranks(folder, span, cut))
            for span, cut in zip(spans[1:], cuts, strict=True)
        ]
        led = [Runner(one.shard, one.shard.make_pool(blocks, BLOCK)) for one in groups]
        route = Route([one_process(spans[0]), *led], tokens)
        got = route.logits(answers, 4)
        equal = sum(map(list.__eq__, route.greedy(texts, tokens), answers))
    return {
        "logits_error": float((got - expected).abs().max() / expected.abs().max()),
        "greedy_equal": equal,
        "prompts": count,
        "tokens": tokens,
    }


def memory(folder: ModelFolder) -> dict[str, float]:
    """Of real members of the middle of the model, for each cut, the largest's bytes a share."""
    span = Span(folder.spec.layers // 3, folder.spec.layers)
    sizes = read_sizes(folder.config, span)
    total, found = sizes.part_bytes(whole(sizes)), {}
    for shares in ([2, 1], [5, 3, 1], [1, 1]):
        cut = plan_cut(sizes, [Member(float(share)) for share in shares])
        with Ranks(folder, span, cut) as ranks:
            over = ranks.held_bytes[0] / (total * shares[0] / sum(shares))
        found[":".join(map(str, shares))] = round(over, 4)
    return found


class SlowSums(SharedSums):
    """As if this rank computed `slowness` times as long."""

    slowness = SLOWNESS
    _left_s = _left_cpu_s = 0.0
    """When it last left a sum, by the clock and of this thread's processor time."""

    def __init__(self, *given: Any, **options: Any) -> None:
        super().__init__(*given, **options)
        self.computed_s: list[float] = []
        """Processor seconds of each half of a layer."""

    def share(self, x: Tensor) -> Tensor:
        out = super().share(x)
        self._note()
        return out

    def total(self, x: Tensor) -> Tensor:
        self.computed_s.append(time.thread_time() - self._left_cpu_s)
        time.sleep((time.perf_counter() - self._left_s) * (self.slowness - 1))
        out = super().total(x)
        self._note()
        return out

    def _note(self) -> None:
        self._left_s, self._left_cpu_s = time.perf_counter(), time.thread_time()


class TimedSums(SlowSums):
    """The clock alone."""

    slowness = 1.0


@contextmanager
def with_sums(kind: type[SharedSums]) -> Iterator[None]:
    """Rank 0 of groups that are made meanwhile adds up so."""
    plain, ranks_module.SharedSums = SharedSums, kind  # type: ignore[misc]
    try:
        yield
    finally:
        ranks_module.SharedSums = plain  # type: ignore[misc]


def halves_s(folder: ModelFolder, span: Span, cut: Cut, repeats: int) -> list[float]:
    """Processor seconds that rank 0 needs for each half of a layer in a decode step: medians."""
    with with_sums(TimedSums), Ranks(folder, span, cut) as ranks:
        runner, sums = Runner(ranks.shard, ranks.shard.make_pool(4, BLOCK)), ranks.sums
        for position in range(BLOCK + repeats):
            runner.run(Batch((one_row(folder, position),)))
    assert isinstance(sums, TimedSums)
    steps = torch.tensor(sums.computed_s).view(-1, 2 * len(span))
    return steps[BLOCK:].median(0).values.tolist()


def one_row(folder: ModelFolder, position: int) -> Row:
    """A decode step of one session that enters amid the model."""
    x = torch.randn(1, folder.spec.hidden, generator=torch.Generator().manual_seed(1))
    payload = Activations(x.numpy().tobytes(), "float32")
    return Row(b"a", position % 48, 1, payload, True, (0, 1, 2))


def pair(home: Path, repeats: int) -> dict[str, Any]:
    """The decode step of four layers, cut in two ways."""
    folder = random_model(home, "llama", PAIR)
    span = Span(1, folder.spec.layers - 1)
    sizes = read_sizes(folder.config, span)
    halves_cut = plan_cut(sizes, [Member(), Member()])
    cuts: dict[str, Cut] = {
        "halves": halves_cut,
        "in_proportion": plan_cut(sizes, [Member(1 / SLOWNESS), Member()]),
    }
    times: dict[str, list[float]] = {name: [] for name in cuts}
    with with_sums(SlowSums), ExitStack() as stack:
        runners = {}
        for name, cut in cuts.items():
            shard = stack.enter_context(Ranks(folder, span, cut)).shard
            runners[name] = Runner(shard, shard.make_pool(4, BLOCK))
        for position in range(BLOCK + repeats):
            for name, runner in runners.items():
                row = one_row(folder, position)
                began = time.perf_counter()
                (result,) = runner.run(Batch((row,)))
                assert result.error is None, result.error
                times[name].append(time.perf_counter() - began)
    found: dict[str, Any] = {}
    for kind, tenth in (("median", 4), ("undisturbed", 0)):
        halves, ours = (statistics.quantiles(times[name][BLOCK:], n=10)[tenth] for name in cuts)
        found[kind] = {
            "halves_ms": round(halves * 1e3, 2),
            "in_proportion_ms": round(ours * 1e3, 2),
            "ratio": round(halves / ours, 3),
        }
    # Each member's processor time by itself, put together as the sums would.
    fast = plan_cut(sizes, [Member(), Member(1 / SLOWNESS)])
    half, small, large = (
        halves_s(folder, span, cut, repeats) for cut in (halves_cut, cuts["in_proportion"], fast)
    )
    equal_s = sum(SLOWNESS * one for one in half)
    ours_s = sum(max(SLOWNESS * a, b) for a, b in zip(small, large, strict=True))
    found["processor"] = {
        "halves_ms": round(equal_s * 1e3, 2),
        "in_proportion_ms": round(ours_s * 1e3, 2),
        "ratio": round(equal_s / ours_s, 3),
    }
    return found


def sums(rounds: int, elements: int = 2048) -> dict[str, Any]:
    """Medians of an 8 KB sum between two processes, in turns of fifty."""
    descriptor, bells = make_memory(2), make_bells(2)
    out = multiprocessing.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        given = (2, elements, rounds, f"{folder}/store")
        other = multiprocessing.get_context("fork").Process(
            target=_swap, args=(1, descriptor, bells[1], *given, out)
        )
        other.start()
        try:
            _swap(0, descriptor, bells[0], *given, out)
        finally:
            other.join(20)
            other.kill()
            os.close(descriptor)
    shared, gloo = out.get()
    return {
        "shared_ms": round(shared * 1e3, 4),
        "gloo_ms": round(gloo * 1e3, 4),
        "ratio": round(gloo / shared, 2),
    }


def _swap(
    rank: int,
    descriptor: int,
    bells: Any,
    size: int,
    elements: int,
    rounds: int,
    store: str,
    out: Any,
) -> None:
    """One of the two processes."""
    torch.set_num_threads(1)
    group = distributed.ProcessGroupGloo(distributed.FileStore(store, size), rank, size)
    own = SharedSums(rank, map_memory(descriptor, size), bells)
    x = torch.randn(elements)
    times: dict[str, list[float]] = {"shared": [], "gloo": []}
    for _ in range(rounds):
        for name in times:
            for _ in range(50):
                began = time.perf_counter()
                if name == "shared":
                    own.total(x)
                else:
                    group.allreduce([x.clone()]).wait()
                times[name].append(time.perf_counter() - began)
    if rank == 0:
        out.put([statistics.median(some) for some in times.values()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    every = ["sums", "pair", "memory", "parity", "group"]
    parser.add_argument("--rows", nargs="*", choices=[*every, "product"], default=every)
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--strikes", type=int, default=4, help="kills, and as many freezes")
    gpu = parser.add_argument_group("on GPUs")
    gpu.add_argument("--device", default="cpu")
    gpu.add_argument("--ranks", type=int, help="default: all GPUs")
    gpu.add_argument("--shape", choices=["8b", "70b", "tiny"], default="70b")
    gpu.add_argument("--layers", type=int, help="default: 32 of 8b, 16 of 70b")
    gpu.add_argument("--product-layers", type=int, default=8, help="of the peer's decode step")
    gpu.add_argument("--scratch", help="folder for models, 2 GB a layer of 70b")
    gpu.add_argument("--batch", type=int, nargs="*", default=[1, 32])
    gpu.add_argument("--ctx", type=int, default=1024)
    given = parser.parse_args()
    if given.device != "cpu":
        import tensor_parallel_gpu  # needs Triton

        tensor_parallel_gpu.main(given)
        return
    torch.set_num_threads(1)
    report: dict[str, Any] = {"torch": torch.__version__, "load": round(os.getloadavg()[0], 1)}
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(temporary)
        if "sums" in given.rows:  # first, while there are few threads to fork
            report["sums"] = sums(given.repeats)
            print(f"sums: {report['sums']}", flush=True)
        if "pair" in given.rows:
            report["pair"] = pair(home, given.repeats)
            print(f"pair: {report['pair']}", flush=True)
        if "memory" in given.rows:
            report["memory"] = memory(small_model(default_home()))
            print(f"memory: {report['memory']}", flush=True)
        if "parity" in given.rows:
            report["parity"] = {
                name: parity(folder, given.prompts, given.tokens)
                for name, folder in (
                    ("qwen3_moe", random_model(home, "qwen3_moe", MOE)),
                    ("smollm2", small_model(default_home())),
                )
            }
            print(f"parity: {report['parity']}", flush=True)
        if "product" in given.rows:
            import tensor_parallel_product

            report["product"] = tensor_parallel_product.main(given)
        if "group" in given.rows:
            folder = small_model(default_home())
            report["group"] = group(DEFAULT_MODEL, folder.spec.layers, given.strikes)
            print(f"group: {report['group']}", flush=True)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
