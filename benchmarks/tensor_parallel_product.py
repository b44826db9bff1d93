"""`hexswarm peer --tensor-parallel` over this machine's devices: as the daemon loads and drives it.

`tensor_parallel.py --device cuda` runs it after the bare layers; `--device cpu --rows product`
tries it anywhere. Models with random weights are saved as folders and loaded by the peer's own door
(`hexswarm.peer.loading`): all GPUs together, and one alone.

*parity*: a small model in float32: the largest difference of logits over the largest of them, and
greedy answers, prompts and decode steps in batches.
*step*: a decode step of some layers of the wanted shape, embedding and LM head included, from rows
with payloads to results with payloads; ranks and one device by turns, medians by the clock. Then
the same as the peer's engine does it (`hexswarm.peer.foresight`): the next step is launched with
the tokens that the device has just chosen, before the host has read them.
*lost*: a rank is killed between two steps: seconds until the group says so, until a step that was
under way is over, and until a new group in the same process answers as before.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tensor_parallel import BLOCK, GREEDY, Route, prompts

from hexswarm.architecture import span_shapes
from hexswarm.clock import RealClock
from hexswarm.config import PeerConfig
from hexswarm.degree import Degree
from hexswarm.errors import HexswarmError
from hexswarm.peer.flight import Flight
from hexswarm.peer.hosting import Machine
from hexswarm.peer.loading import Served, load
from hexswarm.peer.steps import Batch, Result, Row
from hexswarm.progress import Quiet
from hexswarm.records import Span
from hexswarm.store import ModelFolder, resolve

SMALL = {
    "model_type": "llama", "num_hidden_layers": 3, "hidden_size": 256, "intermediate_size": 768,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 32, "vocab_size": 1000,
    "max_position_embeddings": 512, "rope_theta": 10_000.0, "rms_norm_eps": 1e-5,
}  # fmt: skip
SEVERAL = 1 << 22
SESSIONS, TOKENS, REPEATS, SPELL = 8, 32, 40, 10
LOST_S = 30.0
Way = Callable[[Served], list[Result]]


def saved(home: Path, name: str, config: dict[str, Any], dtype: torch.dtype) -> ModelFolder:
    """A folder of a model with random weights, a file for each layer."""
    folder = home / name
    folder.mkdir()
    where: dict[str, str] = {}
    shapes = span_shapes(config, Span(0, config["num_hidden_layers"]))
    by_file: dict[str, list[str]] = {}
    for tensor in shapes:
        words = tensor.split(".")
        layer = f"layer-{words[2]}" if words[1] == "layers" else "ends"
        by_file.setdefault(f"{layer}.safetensors", []).append(tensor)
    generator = torch.Generator().manual_seed(7)
    for file, names in by_file.items():
        where |= dict.fromkeys(names, file)
        save_file({one: _random(shapes[one], generator, dtype) for one in names}, folder / file)
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    return resolve(str(folder), home=home)


def _random(shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=dtype)
    count = math.prod(shape)
    if count > SEVERAL:  # nobody looks at these numbers, and random ones take a minute
        some = torch.randn(SEVERAL, generator=generator) / shape[-1] ** 0.5
        return some.to(dtype).repeat(-(-count // SEVERAL))[:count].view(shape).contiguous()
    return (torch.randn(shape, generator=generator) / shape[-1] ** 0.5).to(dtype)


def served(
    folder: ModelFolder, degree: Degree, kv_tokens: int, given: argparse.Namespace
) -> Served:
    """The whole model, as a peer loads it."""
    device = given.device if given.device == "cpu" else "cuda"
    dtype = "float32" if given.device == "cpu" or "small" in folder.path.name else "bfloat16"
    config = PeerConfig(
        tensor_parallel=degree, device=device, dtype=dtype, kv_tokens=kv_tokens, threads=given.cores
    )
    span, hosting = Span(0, folder.spec.layers), Machine(config, RealClock())
    return load(config, folder, span, device, dtype, Quiet(), hosting)


def parity(folder: ModelFolder, together: Served, alone: Served) -> dict[str, Any]:
    texts = prompts(SESSIONS, folder.spec.vocabulary)
    routes = [Route([one.runner], TOKENS) for one in (together, alone)]
    answers = routes[1].greedy(texts, TOKENS)
    got, expected = (route.logits(answers, 4) for route in routes)
    return {
        "logits_error": float((got - expected).abs().max() / expected.abs().max()),
        "greedy_equal": sum(map(list.__eq__, routes[0].greedy(texts, TOKENS), answers)),
        "prompts": SESSIONS,
    }


def decode_batch(rows: int, ctx: int) -> Batch:
    """A decode step of so many sessions, at the end of a context of zeros."""
    each = -(-ctx // BLOCK)
    return Batch(
        tuple(
            Row(
                *(bytes([n]), ctx - 1, 1, [n + 1], True),
                tuple(range(n * each, (n + 1) * each)),
                policy=GREEDY,
            )
            for n in range(rows)
        )
    )


def steps(together: Served, alone: Served, given: argparse.Namespace) -> dict[str, Any]:
    """By turns."""
    found: dict[str, Any] = {}
    for rows in given.batch:
        batch = decode_batch(rows, given.ctx)
        ways: list[Way] = [partial(_one_by_one, batch)]
        if given.device != "cpu":  # there nothing is ever under way
            ways.append(Ahead(batch))
        (ranks_s, one_s), *ahead = [_by_turns((together, alone), way) for way in ways]
        found[str(rows)] = {
            "one_ms": round(one_s * 1e3, 3),
            "ranks_ms": round(ranks_s * 1e3, 3),
            "ratio": round(one_s / ranks_s, 3),
        }
        for ranks_s, one_s in ahead:
            found[str(rows)] |= {
                "one_ahead_ms": round(one_s * 1e3, 3),
                "ranks_ahead_ms": round(ranks_s * 1e3, 3),
                "ratio_ahead": round(one_s / ranks_s, 3),
            }
        print(f"product, decode batch {rows}: {found[str(rows)]}", flush=True)
    return found


def _one_by_one(batch: Batch, one: Served) -> list[Result]:
    return one.runner.run(batch)


def _by_turns(those: Sequence[Served], step: Way) -> list[float]:
    """Median seconds of each one's step, `SPELL` at a time, so that they follow each other."""
    times: list[list[float]] = [[] for _ in those]
    for _ in range(REPEATS // SPELL):
        for one, list_s in zip(those, times, strict=True):
            step(one)
            for _ in range(SPELL):
                began = time.perf_counter()
                results = step(one)
                list_s.append(time.perf_counter() - began)
                assert not any(result.error for result in results), results
    return [statistics.median(some) for some in times]


class Ahead:
    """Steps of which each is launched before the last one's results are read; all at one place."""

    def __init__(self, batch: Batch) -> None:
        self._batch = batch
        self._flights: dict[int, Flight] = {}

    def __call__(self, one: Served) -> list[Result]:
        before = self._flights.get(id(one)) or one.runner.launch(self._batch)
        rows = (replace(r, payload=before.chosen[n]) for n, r in enumerate(self._batch.rows))
        self._flights[id(one)] = one.runner.launch(Batch(tuple(rows)))
        return before.results()


def lost(together: Served) -> dict[str, Any]:
    """Kill the last rank amid decode steps, and see how long everything takes."""
    batch, host = decode_batch(2, 64), together.host
    child = list(host.children.values())[-1]  # type: ignore[attr-defined]
    together.runner.run(batch)
    killed_s = time.perf_counter()
    os.kill(child.pid, signal.SIGKILL)
    step_s, raised = 0.0, "nothing"
    while host.lost is None and time.perf_counter() - killed_s < LOST_S:
        began = time.perf_counter()
        try:
            together.runner.run(batch)
        except (HexswarmError, RuntimeError) as error:
            raised = type(error).__name__
        step_s = max(step_s, time.perf_counter() - began)
    return {
        "told_s": round(time.perf_counter() - killed_s, 2),
        "lost": str(host.lost),
        "longest_step_s": round(step_s, 2),
        "raised": raised,
    }


def main(given: argparse.Namespace, shape_config: dict[str, Any] | None = None) -> dict[str, Any]:
    """The report; `shape_config` is of the model whose step is timed."""
    given.cores = torch.get_num_threads()
    degree = Degree(2) if given.device == "cpu" else Degree(given.ranks or 0)
    report: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=given.scratch) as temporary, ExitStack() as stack:
        home = Path(temporary)
        os.environ["HEXSWARM_CACHE"] = str(home)  # speeds of these models are nobody else's concern
        small = saved(home, "small", SMALL, torch.float32)
        alone = served(small, Degree(), 4096, given)
        together = served(small, degree, 4096, given)
        with _closing(together):
            report["title"] = together.host.title
            report["backend"] = together.runner.shard.backend
            report["parity"] = parity(small, together, alone)
            print(f"product, parity: {report['parity']}", flush=True)
            report["lost"] = lost(together)
        began = time.perf_counter()
        with _closing(served(small, degree, 4096, given)) as again:
            report["lost"]["again_s"] = round(time.perf_counter() - began, 1)
            report["lost"]["parity_again"] = parity(small, again.thing, alone)
        print(f"product, lost: {report['lost']}", flush=True)
        del alone, together, again
        if shape_config is not None:
            dtype = torch.float32 if given.device == "cpu" else torch.bfloat16
            large = saved(home, "large", shape_config, dtype)
            room = max(given.batch) * given.ctx + BLOCK * len(given.batch)
            alone = served(large, Degree(), room, given)
            together = stack.enter_context(_closing(served(large, degree, room, given))).thing
            report["layers"] = shape_config["num_hidden_layers"]
            report["step"] = steps(together, alone, given)
    return report


class _closing:
    """Ends the host of what is served."""

    def __init__(self, thing: Served) -> None:
        self.thing = thing

    def __enter__(self) -> _closing:
        return self

    def __exit__(self, *_: object) -> None:
        self.thing.host.close()
