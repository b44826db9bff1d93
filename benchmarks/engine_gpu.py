"""The layers alone on a GPU, beside their floor and eager Hugging Face: `engine.py --device cuda`.

Layers of the middle of a model of the wanted shape, random weights, bfloat16. The floor of a decode
step is bytes of weights and KV that it reads over the bandwidth measured here. Medians by CUDA
events, except what says "host": that is the clock, from rows with payloads to results with
payloads.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from hexswarm.architecture import span_shapes
from hexswarm.kernels.paged import PagedDecode, Plan
from hexswarm.kernels.ragged import Extent, Ragged, ragged
from hexswarm.peer.kv import KvPool
from hexswarm.peer.models.registry import architecture
from hexswarm.peer.runner import Runner
from hexswarm.peer.shard import Shard
from hexswarm.peer.steps import Activations, Batch, Row
from hexswarm.records import Span

try:
    from transformers import DynamicCache, LlamaConfig, LlamaModel
except ImportError:  # then there is nothing beside it
    LlamaModel = None

BLOCK, DTYPE, PROMPT, STEPS = 16, torch.bfloat16, 2048, 15


@dataclass(frozen=True, slots=True)
class Shape:
    """A model's layers."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int

    def config(self, layers: int) -> dict[str, Any]:
        """A config.json with one layer before and one behind."""
        return {
            "model_type": "llama",
            "num_hidden_layers": layers + 2,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": 1000,
            "max_position_embeddings": 1 << 17,
            "rope_theta": 500_000.0,
            "rms_norm_eps": 1e-5,
        }


SHAPES = {
    "8b": Shape(32, 4096, 14336, 32, 8, 128),
    "70b": Shape(16, 8192, 28672, 64, 8, 128),
    "tiny": Shape(2, 256, 512, 4, 2, 64),
}


class RandomTensors(dict[str, torch.Tensor]):
    """The tensors of a span, each made when it is taken."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], device: str) -> None:
        self._shapes, self._device = shapes, device

    def pop(self, name: str, *default: Any) -> torch.Tensor:
        shape = self._shapes[name]
        if len(shape) == 1:
            return torch.ones(shape, dtype=DTYPE, device=self._device)
        return torch.randn(shape, dtype=DTYPE, device=self._device) / shape[1] ** 0.5


def timed(run: Callable[[], Any], device: str, repeats: int = STEPS) -> float:
    """Median seconds on the device."""
    run()
    times = []
    for _ in range(repeats):
        if device == "cpu":
            began = time.perf_counter()
            run()
            times.append(time.perf_counter() - began)
            continue
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)


def clocked(run: Callable[[], Any], repeats: int = STEPS) -> float:
    """Median seconds by the clock."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def read_bandwidth(device: str) -> float:
    """Bytes per second, of the best of three ways to read."""
    x = torch.zeros(1 << (29 if device != "cpu" else 20), dtype=torch.float32, device=device)
    ways = (lambda: x.sum(), lambda: x.amax(), lambda: torch.linalg.vector_norm(x))
    return x.nbytes / min(timed(way, device) for way in ways)


def tables(sessions: int, tokens: int) -> list[tuple[int, ...]]:
    """Block tables all over the pool."""
    each = -(-tokens // BLOCK)
    order = torch.randperm(sessions * each, generator=torch.Generator().manual_seed(1)).tolist()
    return [tuple(order[i * each : (i + 1) * each]) for i in range(sessions)]


class Bench:
    """One shape on one device."""

    def __init__(self, name: str, layers: int | None, ctx: int, most: int, device: str) -> None:
        self.shape, self.ctx, self.device = SHAPES[name], ctx, device
        self.layers = layers or self.shape.layers
        self.blocks = most * -(-(ctx + 1) // BLOCK)
        self.blocks = max(self.blocks, -(-PROMPT // BLOCK))

    def shard(self, quant: str = "none") -> tuple[Shard, KvPool]:
        """Layers with random weights, and KV of random numbers."""
        config, span = self.shape.config(self.layers), Span(1, 1 + self.layers)
        shapes = span_shapes(config, span)
        shard = Shard(
            *(architecture(config), span, self.layers + 2, RandomTensors(shapes, self.device)),
            *("bfloat16", self.device),
            backend="auto" if self.device != "cpu" else "torch",
            quant=quant,
        )
        pool = shard.make_pool(self.blocks, BLOCK)
        pool.data.normal_()
        return shard, pool

    def extents(self, batch: int) -> list[Extent]:
        length = self.ctx + 1
        return [Extent(self.ctx, 1, table, BLOCK) for table in tables(batch, length)]

    def floor(self, weight_bytes: int, pool: KvPool, batch: int, bandwidth: float) -> float:
        return (weight_bytes + batch * (self.ctx + 1) * pool.bytes_per_token) / bandwidth

    def decode(self, shard: Shard, pool: KvPool, batch: int) -> tuple[float, float, float]:
        """Seconds of the layers' step, and of the runner's with payloads on either side: one after
        the other, and with the next one launched before the last is read."""
        extents = self.extents(batch)
        runner = Runner(shard, pool)
        payload = Activations(bytes(2 * self.shape.hidden), "bfloat16")
        rows = tuple(
            Row(bytes([i]), self.ctx, 1, payload, False, extent.blocks)
            for i, extent in enumerate(extents)
        )
        for _ in range(3):
            results = runner.run(Batch(rows))
        assert all(result.error is None for result in results)
        host = clocked(lambda: runner.run(Batch(rows)))
        flights = [runner.launch(Batch(rows))]

        def overlapped() -> None:
            flights.append(runner.launch(Batch(rows)))
            flights.pop(0).results()

        both = clocked(overlapped)
        flights.pop().results()
        caches = [pool.layer(i) for i in range(pool.layers)]
        with torch.inference_mode():
            run = self._step(shard, pool, ragged(extents, shard.device), caches)
            return timed(run, self.device), host, both

    def _step(
        self, shard: Shard, pool: KvPool, batch: Ragged, caches: list[torch.Tensor]
    ) -> Callable[[], Any]:
        if shard.backend != "triton":
            x = torch.zeros(batch.tokens, self.shape.hidden, dtype=DTYPE, device=shard.device)
            return lambda: shard.forward(x, batch, pool)
        layers = shard._graphs(pool)
        return lambda: layers.step(batch.tokens, caches, 0)

    def prefill(self, shard: Shard, pool: KvPool) -> float:
        """Operations per second of the matrices, for one prompt."""
        batch = ragged(
            [Extent(0, PROMPT, tuple(range(PROMPT // BLOCK)), BLOCK)], shard.device
        )  # as an admission gives them: one after another
        x = torch.randn(PROMPT, self.shape.hidden, dtype=DTYPE, device=shard.device)
        with torch.inference_mode():
            took_s = timed(lambda: shard.forward(x, batch, pool), self.device, 7)
        return shard.weight_bytes / 2 * 2 * PROMPT / took_s


def attention(shape: Shape, sessions: int, tokens: int, bandwidth: float, device: str) -> float:
    """Share of the bandwidth with which paged attention reads keys and values, under a graph."""
    heads, kv_heads, dim = shape.heads, shape.kv_heads, shape.head_dim
    named = tables(sessions, tokens)
    blocks = sum(map(len, named))
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    plan = Plan(64, blocks, torch.device(device), max(4 * processors // kv_heads, 1))
    plan.set([tokens] * sessions, named)
    paged = PagedDecode(plan, heads, kv_heads, dim, BLOCK)
    cache = torch.randn(blocks * BLOCK, 2, kv_heads, dim, dtype=DTYPE, device=device)
    q = torch.randn(sessions, (heads + 2 * kv_heads) * dim, dtype=DTYPE, device=device)
    out = torch.empty(sessions, heads * dim, dtype=DTYPE, device=device)
    paged.attend(q, cache, out, dim**-0.5)
    graph, times = torch.cuda.CUDAGraph(), 8
    with torch.cuda.graph(graph):
        for _ in range(times):
            paged.attend(q, cache, out, dim**-0.5)
    read = times * sessions * tokens * 2 * kv_heads * dim * 2
    return read / timed(graph.replay, device) / bandwidth


class Eager:
    """The same layers of Hugging Face."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        config = LlamaConfig(
            **{**bench.shape.config(0), "num_hidden_layers": bench.layers}, dtype="bfloat16"
        )
        with torch.device("meta"):
            model = LlamaModel(config).to(DTYPE)
        self.model = model.to_empty(device=bench.device).eval()
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.normal_(0, 0.02)
            self.model.rotary_emb.inv_freq.copy_(
                1 / 5e5 ** (torch.arange(0, bench.shape.head_dim, 2) / bench.shape.head_dim)
            )

    def _run(self, batch: int, count: int, cache: Any) -> None:
        x = torch.randn(batch, count, self.bench.shape.hidden, device=self.bench.device)
        self.model(inputs_embeds=x.to(DTYPE), past_key_values=cache, use_cache=True)

    def decode(self, batch: int) -> float:
        with torch.inference_mode():
            cache = DynamicCache()
            for _ in range(0, self.bench.ctx, 128):
                self._run(batch, 128, cache)
            return timed(lambda: self._run(batch, 1, cache), self.bench.device)

    def prefill(self, weight_bytes: int) -> float:
        with torch.inference_mode():
            took_s = timed(lambda: self._run(1, PROMPT, DynamicCache()), self.bench.device, 7)
        return weight_bytes / 2 * 2 * PROMPT / took_s


def measure(given: argparse.Namespace, name: str, report: dict[str, Any]) -> None:
    """All figures of one shape, into `report` and on the screen."""
    device, bandwidth = given.device, report["read_tb_s"] * 1e12
    bench = Bench(name, given.layers, given.ctx, max(given.batch), device)
    eager: dict[int, float] = {}
    eager_prefill = 0.0
    if LlamaModel is not None and not given.no_eager:
        theirs = Eager(bench)
        eager = {batch: theirs.decode(batch) for batch in given.batch}
        weights = sum(p.nbytes for p in theirs.model.layers.parameters())
        eager_prefill = theirs.prefill(weights)
        del theirs
        free()
    began = time.perf_counter()
    shard, pool = bench.shard()
    shard.warm(pool)
    say(f"{name}: {bench.layers} layers, {shard.weight_bytes / 1e9:.1f} GB, backend "
        f"{shard.backend}, loaded and warm in {time.perf_counter() - began:.1f} s")  # fmt: skip
    decode: dict[str, float] = {}
    first_s = 0.0
    for batch in given.batch:
        step_s, host_s, both_s = bench.decode(shard, pool, batch)
        floor_s = bench.floor(shard.weight_bytes, pool, batch, bandwidth)
        first_s = first_s or step_s
        decode[str(batch)] = round(step_s / floor_s, 3)
        beside = f", eager {eager[batch] / floor_s:.2f} x" if eager else ""
        say(f"{name}: decode batch {batch}: {step_s * 1e3:.3f} ms = {step_s / floor_s:.3f} x floor "
            f"({floor_s * 1e3:.3f} ms){beside}; runner {host_s * 1e3:.3f} ms, "
            f"overlapped {both_s * 1e3:.3f} ms, host")  # fmt: skip
        report["overlapped_ms"].setdefault(name, {})[str(batch)] = round(both_s * 1e3, 3)
        report["runner_ms"].setdefault(name, {})[str(batch)] = round(host_s * 1e3, 3)
        report["step_ms"].setdefault(name, {})[str(batch)] = round(step_s * 1e3, 3)
        if eager:
            eager_x = report["eager_x_floor"].setdefault(name, {})
            eager_x[str(batch)] = round(eager[batch] / floor_s, 3)
    report["decode_x_floor"][name] = decode
    flops = bench.prefill(shard, pool)
    report["prefill_tflops"][name] = round(flops / 1e12, 1)
    report["eager_prefill_tflops"][name] = round(eager_prefill / 1e12, 1)
    say(
        f"{name}: prefill of {PROMPT}: {flops / 1e12:.0f} TFLOP/s, eager {eager_prefill / 1e12:.0f}"
    )
    del shard, pool
    free()
    for quant in given.quant:
        began = time.perf_counter()
        shard, pool = bench.shard(quant)
        loaded_s = time.perf_counter() - began
        step_s, *_ = bench.decode(shard, pool, given.batch[0])
        found = report["quantised_x_bf16"].setdefault(name, {})
        found[quant] = round(step_s / first_s, 3)
        say(f"{name}: {quant}, batch {given.batch[0]}: {step_s * 1e3:.3f} ms = {found[quant]} x "
            f"bfloat16, {shard.weight_bytes / 1e9:.1f} GB, loaded in {loaded_s:.1f} s")  # fmt: skip
        del shard, pool
        free()


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def say(text: str) -> None:
    print(text, flush=True)


def main(given: argparse.Namespace) -> None:
    """Print the figures as they come, and one JSON object last."""
    on_gpu = given.device != "cpu"
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name(given.device) if on_gpu else "cpu",
        "torch": torch.__version__,
        "ctx": given.ctx,
        "read_tb_s": round(read_bandwidth(given.device) / 1e12, 4),
        **{
            key: {}
            for key in (
                *("decode_x_floor", "eager_x_floor", "step_ms", "runner_ms", "prefill_tflops"),
                "overlapped_ms",
                *("eager_prefill_tflops", "attention_of_bandwidth", "quantised_x_bf16"),
            )
        },
    }
    say(f"{report['device']}: reads {report['read_tb_s']} TB/s")
    if on_gpu:
        for sessions, tokens in ((32, 4096), (1, 32768)):
            share = attention(
                SHAPES["8b"], sessions, tokens, report["read_tb_s"] * 1e12, given.device
            )
            report["attention_of_bandwidth"][f"{sessions}x{tokens}"] = round(share, 3)
            say(f"paged attention {sessions} x {tokens}: {share:.1%} of the bandwidth")
    for name in given.shape:
        if name == "moe":
            import engine_moe  # needs a transformers that knows it

            engine_moe.measure(given, report)
        else:
            measure(given, name, report)
    print(json.dumps(report))
