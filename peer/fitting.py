"""Which layers fit: bytes of weights as they are kept, KV, and the longest run from each layer on.

What is planned here is what loading holds later, byte for byte, on one device or over several
(`hexswarm.peer.division`). Pure but for asking which backend a device would have.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from functools import partial

import torch

from hexswarm.architecture import end_shapes, layer_shapes, span_shapes
from hexswarm.config import PeerConfig
from hexswarm.degree import Degree
from hexswarm.errors import OutOfMemory
from hexswarm.kernels.dispatch import choose
from hexswarm.kernels.quantise import rounded_bytes
from hexswarm.peer.division import Load, Places, Spans
from hexswarm.peer.models.architecture import read_architecture
from hexswarm.peer.packing import groups_of, roundable
from hexswarm.peer.shard import BITS
from hexswarm.records import DTYPES, Span
from hexswarm.store import ModelFolder

MEMORY_SHARE = 0.8
"""Of the free memory, for weights and KV; the rest is the machine's."""


def kept_bits(config: PeerConfig, folder: ModelFolder, device: str, dtype: str) -> int:
    """Bits of a weight in the layers' matrices as they are kept on `device`; 16: as `dtype` has."""
    head_dim = read_architecture(folder.config).head_dim
    backend = choose(torch.device(device), getattr(torch, dtype), head_dim)
    return BITS[config.quant] if backend == "triton" else 16


def held_bytes(folder: ModelFolder, span: Span, dtype: str, bits: int = 16) -> int:
    """Bytes of the weights of `span`, matrices of layers in `bits` if those are below 16."""
    return sum(
        _tensor_bytes(folder, name, shape, dtype, bits)
        for name, shape in span_shapes(folder.config, span).items()
    )


def _tensor_bytes(
    folder: ModelFolder, name: str, shape: tuple[int, ...], dtype: str, bits: int
) -> int:
    if bits < 16 and roundable(name, shape):
        rows, columns = shape
        return rounded_bytes(rows, columns, bits, groups_of(folder))
    return math.prod(shape) * DTYPES[dtype]


def _layers_bytes(folder: ModelFolder, dtype: str, bits: int) -> list[int]:
    """Bytes of all layers before each one: counted once, a mixture has hundreds of tensors."""
    totals = [0]
    for layer in range(folder.spec.layers):
        shapes = layer_shapes(folder.config, layer)
        own = sum(_tensor_bytes(folder, *one, dtype, bits) for one in shapes.items())
        totals.append(totals[-1] + own)
    return totals


def longest_runs(
    folder: ModelFolder,
    kv_tokens: int,
    dtype: str,
    budget: int,
    bits: int = 16,
    ranks: tuple[Degree, Places] | None = None,
) -> tuple[int, ...]:
    """For each layer, how many from there on fit `budget` bytes with their KV; `bits` as kept.

    `ranks`, if the layers are cut over several: then each part has to fit where it goes, too.
    Raises OutOfMemory if not even one layer fits, UsageError if there are too many ranks.
    """
    layers = folder.spec.layers
    kv_layer = kv_bytes(folder, dtype, kv_tokens)
    held = _layers_bytes(folder, dtype, bits)

    def needed(first: int, end: int) -> int:
        # The ends depend on the span as a whole: tied, they are one tensor.
        ends = end_shapes(folder.config, Span(first, end)).items()
        ends_bytes = sum(_tensor_bytes(folder, *one, dtype, bits) for one in ends)
        return held[end] - held[first] + ends_bytes + kv_layer * (end - first)

    found = []
    for first in range(layers):
        ends = range(first + 1, layers + 1)
        found.append(bisect_right(ends, budget, key=partial(needed, first)))
    if ranks is not None:
        found = _divided(folder, found, kv_layer, dtype, bits, *ranks)
    if max(found) == 0:
        raise OutOfMemory(
            f"not one layer with KV for {kv_tokens} tokens fits {budget >> 20} MiB",
            remedy="lower --kv-tokens or free memory",
        )
    return tuple(found)


def kv_bytes(folder: ModelFolder, dtype: str, tokens: int) -> int:
    """Bytes of KV of one layer for so many tokens."""
    return folder.spec.kv_bytes_per_token_layer // 2 * DTYPES[dtype] * tokens


def shrink(folder: ModelFolder, span: Span, dtype: str, bits: int) -> float:
    """Bytes of the weights of `span` as they are kept, over those of their dtype."""
    return held_bytes(folder, span, dtype, bits) / held_bytes(folder, span, dtype)


def _divided(
    folder: ModelFolder,
    longest: list[int],
    kv_layer: int,
    dtype: str,
    bits: int,
    degree: Degree,
    places: Places,
) -> list[int]:
    """Of runs that fit the memory of all together, those whose parts fit each."""
    spans = Spans(folder.config, folder.spec.layers, DTYPES[dtype])
    kept = 1.0 if bits == 16 else shrink(folder, Span(0, 1), dtype, bits)

    def too_long(first: int, count: int) -> bool:
        span, load = Span(first, first + count), Load(kv_layer * count, kept)
        return not spans.fits(span, degree, places, load)

    return [
        bisect_left(range(1, most + 1), True, key=partial(too_long, first))
        for first, most in enumerate(longest)
    ]
