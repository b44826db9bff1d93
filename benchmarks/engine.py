"""Speed of the engine's numerics beside plain transformers, in one process on one CPU thread.

    python benchmarks/engine.py [--model FOLDER] [--repeats 3] [--threads 1] [--backend auto]
                                [--dtype float32|bfloat16] [--stages 1] [--rows]

The model is cut into `--stages` shards, each driven by its runner exactly as a peer drives it (rows
in, activations or tokens out), without scheduler or network. Decode: 64 greedy tokens after a
prompt of 40, at batch 1, 2, 4 and 8; the first token ends the prefill and is not counted. Prefill:
40 and 256 tokens. Each setting runs ours, then transformers in float32 with one thread, and that
again, so that a neighbour on the machine disturbs both; medians are printed. Ratios travel,
absolute numbers do not; on a busy machine trust `cpu_ratio` (processor seconds) before `ratio` (the
clock). `--threads 0` takes as many as a peer would. `equal` says whether the tokens are those of
transformers, which is asked of float32 only. The last line is one JSON object.

    python benchmarks/engine.py --rows

prints instead the figures that a CPU is held to: one stream through three stages, in float32 with
one thread and in bfloat16 with the best count; what a token of eight sessions costs against one of
a single session; and whether sessions of a batch of 32 hear what each hears alone.

    python benchmarks/engine.py --device cuda [--shape 8b 70b] [--batch 1 16 64] [--quant int8 int4]

measures layers with random weights on a GPU instead: see `engine_gpu.py`, and `engine_moe.py` for
`--shape moe`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hexswarm.peer.models.registry import architecture
from hexswarm.peer.probe import try_threads
from hexswarm.peer.runner import Runner
from hexswarm.peer.shard import Shard
from hexswarm.peer.steps import Batch, Row, TailPolicy
from hexswarm.peer.threads import fewest_threads
from hexswarm.records import Sampling, Span

BLOCKS = 256
FOLDER = Path.home() / ".hexswarm/models/SmolLM2-135M-Instruct"
PROMPT, ANSWER = 40, 64
TEXT = """A harbour at dawn is a place of many small sounds. Ropes creak, gulls quarrel over what
the night has left, and somewhere a diesel engine turns over twice before it catches. The
fishermen speak little. Each of them knows what is to be done, and in which order, and the order
has not changed since their fathers stood on the same stones. """


@dataclass(frozen=True, slots=True)
class Timing:
    """One run: seconds by the clock and of the processor, and the tokens it gave."""

    wall_s: float
    cpu_s: float
    tokens: list[list[int]]


class Ours:
    """The model in shards, one after another."""

    def __init__(
        self,
        folder: Path,
        backend: str = "auto",
        dtype: str = "float32",
        stages: int = 1,
        threads: int = 1,
    ) -> None:
        config = architecture(json.loads((folder / "config.json").read_text()))
        tensors: dict[str, torch.Tensor] = {}
        for path in sorted(folder.glob("*.safetensors")):
            tensors.update(load_file(path))
        self.policy, self.runners = TailPolicy(Sampling()), []
        for stage in range(stages):
            first, end = (config.layers * n // stages for n in (stage, stage + 1))
            shard = Shard(
                *(config, Span(first, end), config.layers, dict(tensors), dtype), backend=backend
            )
            self.runners.append(Runner(shard, shard.make_pool(blocks=BLOCKS)))
            shard.threads = threads or self._best(shard, dtype)

    @property
    def shard(self) -> Shard:
        return self.runners[0].shard

    def _best(self, shard: Shard, dtype: str) -> int:
        def resize(count: int) -> None:
            shard.threads = count

        a = shard.architecture
        timed = try_threads(
            *(self.runners[-1].run, resize, shard.span, a.layers, a.hidden, dtype),
        )
        return fewest_threads(timed, len(os.sched_getaffinity(0)))

    def _step(self, position: int, inputs: list[list[int]]) -> list[int]:
        each, payloads = BLOCKS // len(inputs), inputs
        for runner in self.runners:
            rows = tuple(
                Row(
                    session=bytes([index]),
                    position=position,
                    count=len(ids),
                    payload=payload,
                    sample=True,
                    blocks=tuple(range(index * each, (index + 1) * each)),
                    policy=self.policy,
                )
                for index, (ids, payload) in enumerate(zip(inputs, payloads, strict=True))
            )
            results = runner.run(Batch(rows))
            assert not any(result.error for result in results), results
            payloads = [result.activations for result in results]
        assert all(result.token is not None for result in results), results
        return [result.token or 0 for result in results]

    def prefill(self, prompts: list[list[int]]) -> Timing:
        wall, cpu = time.perf_counter(), time.process_time()
        tokens = self._step(0, prompts)
        return Timing(
            time.perf_counter() - wall, time.process_time() - cpu, [[token] for token in tokens]
        )

    def decode(self, prompts: list[list[int]], count: int = ANSWER) -> Timing:
        answers = self.prefill(prompts).tokens
        wall, cpu = time.perf_counter(), time.process_time()
        for step in range(count - 1):
            tokens = self._step(len(prompts[0]) + step, [answer[-1:] for answer in answers])
            for answer, token in zip(answers, tokens, strict=True):
                answer.append(token)
        return Timing(time.perf_counter() - wall, time.process_time() - cpu, answers)


class Theirs:
    """Plain transformers."""

    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def _generate(self, prompts: list[list[int]], count: int, marks: list[Any]) -> list[list[int]]:
        def mark(ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
            marks.append((time.perf_counter(), time.process_time()))
            return torch.zeros(len(ids), dtype=torch.bool)

        ids = torch.tensor(prompts)
        out = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            repetition_penalty=1.0,
            stopping_criteria=[mark],
        )
        answers: list[list[int]] = out[:, len(prompts[0]) :].tolist()
        return answers

    def prefill(self, prompts: list[list[int]]) -> Timing:
        marks: list[Any] = [(time.perf_counter(), time.process_time())]
        tokens = self._generate(prompts, 1, marks)
        return Timing(marks[1][0] - marks[0][0], marks[1][1] - marks[0][1], tokens)

    def decode(self, prompts: list[list[int]]) -> Timing:
        marks: list[Any] = []
        tokens = self._generate(prompts, ANSWER, marks)
        return Timing(marks[-1][0] - marks[0][0], marks[-1][1] - marks[0][1], tokens)


def compare(
    ours: Callable[[], Timing], theirs: Callable[[], Timing], repeats: int
) -> tuple[Timing, Timing, bool]:
    """Medians of interleaved runs, and whether the tokens agree."""
    pairs = [(ours(), theirs()) for _ in range(repeats)]
    equal = all(a.tokens == b.tokens for a, b in pairs)
    sides = []
    for side in (0, 1):
        runs = [pair[side] for pair in pairs]
        wall = statistics.median(run.wall_s for run in runs)
        cpu = statistics.median(run.cpu_s for run in runs)
        sides.append(Timing(wall, cpu, runs[0].tokens))
    return sides[0], sides[1], equal


def rows(folder: Path, ids: list[int], repeats: int) -> dict[str, Any]:
    """What a CPU is held to; every figure by turns with what it is compared with."""
    exact, half = Ours(folder, stages=3), Ours(folder, dtype="bfloat16", stages=3, threads=0)
    theirs, prompt = Theirs(folder), ids[:PROMPT]
    runs: dict[str, list[Timing]] = {"exact": [], "half": [], "theirs": [], "eight": []}
    eight = [ids[7 * i : 7 * i + PROMPT] for i in range(8)]
    for _ in range(repeats + 1):
        runs["theirs"].append(theirs.decode([prompt]))
        runs["exact"].append(exact.decode([prompt]))
        runs["half"].append(half.decode([prompt]))
        runs["eight"].append(exact.decode(eight))
    found: dict[str, Any] = {"bfloat16_threads": half.shard.threads}
    for name, side in (("float32_1_thread", "exact"), ("bfloat16_best", "half")):
        pairs = list(zip(runs["theirs"], runs[side], strict=True))[1:]
        found[name] = {
            "ratio": round(statistics.median(a.wall_s / b.wall_s for a, b in pairs), 3),
            "cpu_ratio": round(statistics.median(a.cpu_s / b.cpu_s for a, b in pairs), 3),
            "equal": all(a.tokens == b.tokens for a, b in pairs),
        }
    pairs = list(zip(runs["exact"], runs["eight"], strict=True))[1:]
    found["cpu_8_over_1"] = round(statistics.median(b.cpu_s / 8 / a.cpu_s for a, b in pairs), 3)
    found["alone_and_among_31"] = company(exact, [ids[5 * i : 5 * i + PROMPT] for i in range(32)])
    return found


def company(ours: Ours, prompts: list[list[int]]) -> dict[str, int]:
    """Of how many sessions 16 tokens are the same alone and in one batch."""
    together = ours.decode(prompts, 16).tokens
    alone = [ours.decode([prompt], 16).tokens[0] for prompt in prompts]
    return {"sessions": len(prompts), "equal": sum(map(list.__eq__, together, alone))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=FOLDER)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--backend", choices=["auto", "torch", "native"], default="auto")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 2, 4, 8])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--stages", type=int, default=1)
    parser.add_argument("--rows", action="store_true", help="the figures that have a bar")
    gpu = parser.add_argument_group("on a GPU")
    gpu.add_argument("--device", default="cpu")
    gpu.add_argument(
        "--shape", nargs="*", choices=["8b", "70b", "tiny", "moe"], default=["8b", "70b"]
    )
    gpu.add_argument("--layers", type=int, help="default: 32 of 8b, 16 of 70b")
    gpu.add_argument("--batch", type=int, nargs="*", default=[1, 16, 64])
    gpu.add_argument("--ctx", type=int, default=1024)
    gpu.add_argument("--quant", nargs="*", choices=["int8", "int4"], default=["int8", "int4"])
    gpu.add_argument("--no-eager", action="store_true", help="without Hugging Face beside it")
    given = parser.parse_args()
    if given.device != "cpu":
        import engine_gpu  # needs Triton

        engine_gpu.main(given)
        return
    torch.set_num_threads(max(given.threads, 1))
    ids = AutoTokenizer.from_pretrained(given.model)(TEXT * 8)["input_ids"]
    if given.rows:
        found = rows(given.model, ids, given.repeats)
        for name, value in found.items():
            print(f"{name}: {value}")
        print(json.dumps(found))
        return
    ours = Ours(given.model, given.backend, given.dtype, given.stages, given.threads)
    theirs = Theirs(given.model)
    ours.prefill([ids[:8]])
    theirs.prefill([ids[:8]])
    report: dict[str, Any] = {
        "torch": torch.__version__,
        "threads": ours.shard.threads,
        "backend": ours.shard.backend,
        "dtype": given.dtype,
        "stages": given.stages,
    }

    for length in (PROMPT, 256):
        prompts = [ids[:length]]
        a, b, equal = compare(
            lambda p=prompts: ours.prefill(p),  # type: ignore[misc]
            lambda p=prompts: theirs.prefill(p),  # type: ignore[misc]
            given.repeats + 2,
        )
        report[f"prefill_{length}"] = {
            "ours_s": round(a.wall_s, 4),
            "transformers_s": round(b.wall_s, 4),
            "ratio": round(b.wall_s / a.wall_s, 3),
            "equal": equal,
        }
        print(f"prefill {length:3d}: {report[f'prefill_{length}']}", flush=True)

    for batch in given.batches:
        prompts = [ids[7 * i : 7 * i + PROMPT] for i in range(batch)]
        a, b, equal = compare(
            lambda p=prompts: ours.decode(p),  # type: ignore[misc]
            lambda p=prompts: theirs.decode(p),  # type: ignore[misc]
            given.repeats,
        )
        count = batch * (ANSWER - 1)
        report[f"decode_{batch}"] = {
            "ours_tok_s": round(count / a.wall_s, 2),
            "transformers_tok_s": round(count / b.wall_s, 2),
            "ratio": round(b.wall_s / a.wall_s, 3),
            "ours_cpu_s_per_token": round(a.cpu_s / count, 5),
            "transformers_cpu_s_per_token": round(b.cpu_s / count, 5),
            "cpu_ratio": round(b.cpu_s / a.cpu_s, 3),
            "equal": equal,
        }
        print(f"decode x{batch}: {report[f'decode_{batch}']}", flush=True)

    if {1, 4} <= set(given.batches):
        four, one = report["decode_4"], report["decode_1"]
        ratio = four["ours_cpu_s_per_token"] / one["ours_cpu_s_per_token"]
        report["cpu_batch_4_over_1"] = round(ratio, 3)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
