"""From a config to something that can run: device, span, weights, KV pool and measured speed."""

from __future__ import annotations

import math
import platform
from bisect import bisect_right
from dataclasses import dataclass
from functools import partial

import torch

from hexswarm.architecture import end_shapes, layer_shapes, span_shapes
from hexswarm.config import PeerConfig
from hexswarm.errors import OutOfMemory, UsageError
from hexswarm.kernels.dispatch import choose
from hexswarm.kernels.quantise import rounded_bytes
from hexswarm.peer.cache import BLOCK_TOKENS
from hexswarm.peer.models.architecture import read_architecture
from hexswarm.peer.probe import Measured, cached, measure, try_threads
from hexswarm.peer.runner import Runner
from hexswarm.peer.shard import BITS, Shard
from hexswarm.peer.threads import fewest_threads
from hexswarm.peer.weights import load_span
from hexswarm.progress import Progress
from hexswarm.records import DTYPES, Span
from hexswarm.store import ModelFolder
from hexswarm.version import __version__

MEMORY_SHARE = 0.8
"""Of the free memory, for weights and KV; the rest is the machine's."""


@dataclass(frozen=True, slots=True)
class Served:
    """What was loaded, ready to run."""

    folder: ModelFolder
    span: Span
    runner: Runner
    blocks: int
    dtype: str
    device: str
    measured: Measured
    quant: str = "none"

    @property
    def numerics(self) -> str:
        """With which numbers the layers compute: answers are alike among peers that say the same.

        "bfloat16" for weights as they are, "bfloat16+int8" for rounded ones.
        """
        return self.dtype if self.quant == "none" else f"{self.dtype}+{self.quant}"


def choose_device(config: PeerConfig) -> tuple[str, str]:
    """Device and dtype for `auto`: the first CUDA device in bfloat16, else the CPU in float32."""
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device).type
        if kind == "cuda" and not torch.cuda.is_available():
            raise UsageError(f"no CUDA device for {device!r}", remedy="use --device cpu")
    except RuntimeError as error:
        raise UsageError(f"unknown device {device!r}", remedy="use cpu, cuda or cuda:N") from error
    dtype = config.dtype
    if dtype == "auto":
        dtype = "float32" if kind == "cpu" else "bfloat16"
    return device, dtype


def check_span(span: Span, layers: int) -> Span:
    """`span` if the model has it. Raises UsageError."""
    if span.end > layers:
        raise UsageError(
            f"span {span} reaches beyond the model's {layers} layers",
            remedy=f"give a span inside 0:{layers}",
        )
    return span


def kept_bits(config: PeerConfig, folder: ModelFolder, device: str, dtype: str) -> int:
    """Bits of a weight in the layers' matrices as they are kept on `device`; 16: as `dtype` has."""
    head_dim = read_architecture(folder.config).head_dim
    backend = choose(torch.device(device), getattr(torch, dtype), head_dim)
    return BITS[config.quant] if backend == "triton" else 16


def held_bytes(folder: ModelFolder, span: Span, dtype: str, bits: int = 16) -> int:
    """Bytes of the weights of `span`, matrices of layers in `bits` if those are below 16."""
    return sum(
        _tensor_bytes(name, shape, dtype, bits)
        for name, shape in span_shapes(folder.config, span).items()
    )


def _tensor_bytes(name: str, shape: tuple[int, ...], dtype: str, bits: int) -> int:
    """The router of a mixture of experts is never rounded."""
    matrix = len(shape) == 2 and name.startswith("model.layers.")
    if bits < 16 and matrix and not name.endswith(".gate.weight"):
        rows, columns = shape
        return rounded_bytes(rows, columns, bits)
    return math.prod(shape) * DTYPES[dtype]


def _layers_bytes(folder: ModelFolder, dtype: str, bits: int) -> list[int]:
    """Bytes of all layers before each one: counted once, a mixture has hundreds of tensors."""
    totals = [0]
    for layer in range(folder.spec.layers):
        shapes = layer_shapes(folder.config, layer)
        own = sum(_tensor_bytes(name, shape, dtype, bits) for name, shape in shapes.items())
        totals.append(totals[-1] + own)
    return totals


def longest_runs(
    folder: ModelFolder, kv_tokens: int, dtype: str, budget: int, bits: int = 16
) -> tuple[int, ...]:
    """For each layer, how many from there on fit `budget` bytes with their KV; `bits` as kept.

    Raises OutOfMemory if not even one layer fits.
    """
    layers = folder.spec.layers
    kv_layer = folder.spec.kv_bytes_per_token_layer // 2 * DTYPES[dtype] * kv_tokens
    held = _layers_bytes(folder, dtype, bits)

    def needed(first: int, end: int) -> int:
        # The ends depend on the span as a whole: tied, they are one tensor.
        ends = end_shapes(folder.config, Span(first, end)).items()
        ends_bytes = sum(_tensor_bytes(name, shape, dtype, bits) for name, shape in ends)
        return held[end] - held[first] + ends_bytes + kv_layer * (end - first)

    found = []
    for first in range(layers):
        ends = range(first + 1, layers + 1)
        found.append(bisect_right(ends, budget, key=partial(needed, first)))
    if max(found) == 0:
        raise OutOfMemory(
            f"not one layer with KV for {kv_tokens} tokens fits {budget >> 20} MiB",
            remedy="lower --kv-tokens or free memory",
        )
    return tuple(found)


def load(
    config: PeerConfig, folder: ModelFolder, span: Span, device: str, dtype: str, progress: Progress
) -> Served:
    """Weights, KV pool and measured speed of one span. Raises OutOfMemory, CorruptWeights."""
    if config.threads:
        torch.set_num_threads(config.threads)
    torch_dtype = getattr(torch, dtype)
    tensors = load_span(folder, span, dtype=torch_dtype, device="cpu", progress=progress)
    architecture = read_architecture(folder.config)
    shard = Shard(
        architecture, span, folder.spec.layers, tensors, dtype, device, quant=config.quant
    )
    blocks = -(-config.kv_tokens // BLOCK_TOKENS)
    try:
        pool = shard.make_pool(blocks)
    except (torch.OutOfMemoryError, RuntimeError) as error:
        raise OutOfMemory(
            f"KV for {config.kv_tokens} tokens does not fit {device}",
            remedy="lower --kv-tokens",
        ) from error
    if shard.backend == "triton":
        progress.note(f"compiling for layers {span} on {device}")
        shard.warm(pool)
    runner = Runner(shard, pool)
    shape = (span, folder.spec.layers, folder.spec.hidden, dtype)
    if shard.backend == "native" and not config.threads:

        def resize(count: int) -> None:
            shard.threads = count

        most = torch.get_num_threads()
        shard.threads = fewest_threads(try_threads(runner.run, resize, *shape), most)
    parts = (
        *(folder.spec.digest, span, dtype, config.quant, device, shard.backend),
        *(torch.get_num_threads(), shard.threads),
        *(__version__, torch.__version__, platform.processor(), platform.node()),
    )
    progress.note(f"measuring the speed of layers {span} on {device}")
    measured = cached(
        config.cache / "speed.json",
        parts,
        lambda: measure(runner.run, *shape),
    )
    return Served(folder, span, runner, blocks, dtype, device, measured, config.quant)
