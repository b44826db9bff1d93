"""What `kernels_gpu.py` times: kernels, shapes, and the bytes and operations of their floors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hexswarm.kernels import elementwise, experts, narrow, prefill, sample
from hexswarm.kernels.choice import Draw, settings
from hexswarm.kernels.linear import linear
from hexswarm.kernels.linear4 import linear4
from hexswarm.kernels.paged import PagedDecode, Plan
from hexswarm.kernels.product import widen
from hexswarm.kernels.quantise import Quantised
from hexswarm.kernels.ragged import Extent, ragged
from hexswarm.kernels.reference import attend
from hexswarm.kernels.rope import rope_append_

BLOCK, HALF = 16, torch.bfloat16
MATRICES = {
    "8b qkv": (6144, 4096, False),
    "8b o": (4096, 4096, False),
    "8b gate-up": (28672, 4096, True),
    "8b down": (4096, 14336, False),
    "70b qkv": (10240, 8192, False),
    "70b o": (8192, 8192, False),
    "70b gate-up": (57344, 8192, True),
    "70b down": (8192, 28672, False),
}
"""Outputs, inputs, and whether they are gate and up."""
INT4_SHAPES = (
    *((32, 64, 2, 3), (32, 64, 2, 4), (64, 64, 4, 3), (16, 64, 1, 3)),
    *((32, 32, 2, 4), (64, 32, 4, 4)),
)
PREFILL_SHAPES = ((64, 8, 3), (128, 8, 2), (64, 8, 2), (32, 8, 4))


@dataclass(frozen=True, slots=True)
class Case:
    """One row of the table."""

    kernel: str
    shape: str
    make: Callable[[], Callable[[], Any]]
    """A launch with inputs of its own."""
    read_bytes: int
    """Least bytes to read and write."""
    operations: int = 0


def cases(device: str, tiny: bool = False) -> Iterator[Case]:
    """All of them; `tiny` ones only show that they run."""
    yield from int4(device, tiny)
    yield from products(device, tiny)
    yield from sampling(device, tiny)
    yield from prompts(device, tiny)
    yield from decoding(device, tiny)
    yield from mixtures(device, tiny)
    yield from passes(device, tiny)


def rounded(outputs: int, inputs: int, bits: int, device: str) -> Quantised:
    """Random bits: what they mean does not matter to the time."""
    wide = inputs if bits == 8 else inputs // 8
    kind = torch.int8 if bits == 8 else torch.int32
    info = torch.iinfo(kind)
    values = torch.randint(info.min, info.max, (outputs, wide), dtype=kind, device=device)
    if bits == 8:
        return Quantised(values, torch.rand(outputs, device=device) / 100, 8)
    scales = torch.rand(outputs, inputs // 128, device=device) / 10
    return Quantised(values, scales.half(), 4)


def _product(
    run: Callable[..., Any], tokens: int, name: str, weight: Callable[[], Any], device: str,
    shrink: int, **options: Any,
) -> Callable[[], Callable[[], Any]]:  # fmt: skip
    outputs, inputs, gated = MATRICES[name]
    outputs, inputs = outputs // shrink, inputs // shrink

    def make() -> Callable[[], Any]:
        x = torch.randn(tokens, inputs, device=device).to(HALF)
        held = weight()
        out = torch.empty(tokens, outputs // 2 if gated else outputs, dtype=HALF, device=device)
        return lambda: run(x, held, out, gated=gated, **options)

    return make


def int4(device: str, tiny: bool) -> Iterator[Case]:
    """Variants side by side at one token, then the default at more."""
    shrink = 16 if tiny else 1
    for name, (outputs, inputs, _) in MATRICES.items():
        if tiny and name != "8b o":
            continue
        outputs, inputs = outputs // shrink, inputs // shrink
        size = outputs * inputs // 2 + outputs * inputs // 128 * 2

        def weight(outputs: int = outputs, inputs: int = inputs) -> Quantised:
            return rounded(outputs, inputs, 4, device)

        if not tiny:  # the interpreter has no pairs of bfloat16
            forms: Sequence[tuple[str, dict[str, Any]]] = [
                ("vector", {"form": "vector"}),
                *((f"matrix {shape}", {"shape": shape}) for shape in INT4_SHAPES),
            ]
            for label, options in forms:
                made = _product(linear4, 1, name, weight, device, shrink, **options)
                yield Case("int4", f"{name} x1 {label}", made, size)
        for tokens in (1,) if tiny else (4, 16):
            made = _product(linear4, tokens, name, weight, device, shrink)
            yield Case("int4", f"{name} x{tokens}", made, size)


def products(device: str, tiny: bool) -> Iterator[Case]:
    """16 and 8 bits a weight, and widening."""
    shrink = 16 if tiny else 1
    for name in ("8b o",) if tiny else ("8b o", "8b gate-up", "70b o", "70b gate-up", "70b down"):
        outputs, inputs = (size // shrink for size in MATRICES[name][:2])
        for bits in (16, 8):

            def weight(outputs: int = outputs, inputs: int = inputs, bits: int = bits) -> Any:
                if bits == 8:
                    return rounded(outputs, inputs, 8, device)
                return torch.randn(outputs, inputs, dtype=HALF, device=device)

            for tokens in (1,) if tiny else (1, 16):
                made = _product(linear, tokens, name, weight, device, shrink)
                yield Case(
                    f"linear {bits}", f"{name} x{tokens}", made, outputs * inputs * bits // 8
                )
    for bits in (8, 4):
        side = 512 if tiny else 8192

        def make(bits: int = bits, side: int = side) -> Callable[[], Any]:
            held = rounded(side, side, bits, device)
            return lambda: widen(held, HALF)

        yield Case("widen", f"{bits} bits {side} x {side}", make, side * side * (16 + bits) // 8)


def sampling(device: str, tiny: bool) -> Iterator[Case]:
    """As of a model (peaked), and flat, where the whole rows are searched."""
    plans = {
        "peaked, top-p 0.95": (4.0, Draw(0.8, 0, 0.95, 0.0, 0.6)),
        "peaked, top-k 50, top-p, min-p": (4.0, Draw(1.0, 50, 0.9, 0.02, 0.6)),
        "peaked, no filter": (4.0, Draw(1.0, 0, 1.0, 0.0, 0.6)),
        "flat, top-p 0.95": (1.0, Draw(1.0, 0, 0.95, 0.0, 0.6)),
    }
    for rows, vocabulary in ((2, 500),) if tiny else ((64, 128256), (1, 128256), (64, 32000)):
        for name, (spread, draw) in plans.items():

            def make(
                rows: int = rows, words: int = vocabulary, spread: float = spread, draw: Draw = draw
            ) -> Callable[[], Any]:
                logits = (torch.randn(rows, words, device=device) * spread).to(HALF).float()
                chosen = settings([draw] * rows).to(device)
                return lambda: sample.pick(logits, chosen)

            yield Case("sample", f"{rows} x {vocabulary} {name}", make, rows * vocabulary * 4)


def _blocks(extents: Sequence[tuple[int, int]]) -> list[Extent]:
    """Sessions (position, count) in blocks all over the pool."""
    needed = [-(-(position + count) // BLOCK) for position, count in extents]
    order = iter(torch.randperm(sum(needed)).tolist())
    return [
        Extent(position, count, tuple(next(order) for _ in range(n)), BLOCK)
        for (position, count), n in zip(extents, needed, strict=True)
    ]


def prompts(device: str, tiny: bool) -> Iterator[Case]:
    """Ragged prefill beside PyTorch's attention, one session at a time with a mask."""
    mixes = {
        "chunk 2k behind 6k": [(6144, 2048)],
        "chunk 2k behind 8k": [(8192, 2048)],
        "prompt 2k": [(0, 2048)],
        "prompt 8k": [(0, 8192)],
        "4 prompts of 512": [(0, 512)] * 4,
        "8 chunks of 256 behind 1k..8k": [(1024 * i, 256) for i in range(1, 9)],
        "32 prompts of 64": [(0, 64)] * 32,
    }
    if tiny:
        mixes = {"two": [(0, 5), (16, 3)]}
    for heads, kv_heads, dim in (
        ((4, 2, 16),) if tiny else ((32, 8, 128), (64, 8, 128), (32, 8, 64))
    ):
        for name, extents in mixes.items():
            if dim == 64 and not name.startswith("chunk 2k behind 6k"):
                continue
            seen = sum(c * p + c * (c + 1) // 2 for p, c in extents)
            work = 4 * seen * dim * heads
            size = sum(
                2 * (p + c) * kv_heads * dim * 2 + 2 * c * heads * dim * 2 for p, c in extents
            )
            shapes = PREFILL_SHAPES if name.startswith("chunk 2k behind 6k") else (None,)
            for shape in (*shapes, "torch"):
                made = _prompt(extents, heads, kv_heads, dim, shape, device)
                label = f"{heads}/{kv_heads}x{dim} {name} {shape or ''}"
                yield Case("prefill", label, made, size, work)


def _prompt(
    given: list[tuple[int, int]], heads: int, kv_heads: int, dim: int, shape: Any, device: str
) -> Callable[[], Callable[[], Any]]:
    def make() -> Callable[[], Any]:
        kind = HALF if device != "cpu" else torch.float32
        extents = _blocks(given)
        slots = BLOCK * sum(len(extent.blocks) for extent in extents)
        cache = torch.randn(slots, 2, kv_heads, dim, device=device).to(kind)
        batch = ragged(extents, torch.device(device))
        q = torch.randn(batch.tokens, (heads + 2 * kv_heads) * dim, device=device).to(kind)
        q = q[:, : heads * dim].view(-1, heads, dim)
        if shape == "torch":
            pieces = batch.pieces(None, kind)
            len(pieces[0:])  # made before the clock runs, as for all layers but the first
            return lambda: attend(q, cache, pieces, dim**-0.5)
        plan = prefill.tiles(extents, q.device, prefill.ROWS[q.element_size()])
        return lambda: prefill.attend(q, cache, plan, dim**-0.5, shape=shape)

    return make


def decoding(device: str, tiny: bool) -> Iterator[Case]:
    """Paged decode attention."""
    mixes = ((2, 40),) if tiny else ((32, 4096), (1, 32768), (64, 1024))
    for sessions, tokens in mixes:
        heads, kv_heads, dim = (4, 2, 16) if tiny else (32, 8, 128)

        def make(
            sessions: int = sessions, tokens: int = tokens, heads: int = heads,
            kv_heads: int = kv_heads, dim: int = dim,
        ) -> Callable[[], Any]:  # fmt: skip
            kind = HALF if device != "cpu" else torch.float32
            extents = _blocks([(tokens - 1, 1)] * sessions)
            blocks = sum(len(extent.blocks) for extent in extents)
            processors = 8
            if device != "cpu":
                processors = torch.cuda.get_device_properties(device).multi_processor_count
            plan = Plan(64, blocks, torch.device(device), max(4 * processors // kv_heads, 1))
            plan.set([tokens] * sessions, [extent.blocks for extent in extents])
            paged = PagedDecode(plan, heads, kv_heads, dim, BLOCK)
            cache = torch.randn(blocks * BLOCK, 2, kv_heads, dim, device=device).to(kind)
            q = torch.randn(sessions, (heads + 2 * kv_heads) * dim, device=device).to(kind)
            out = torch.empty(sessions, heads * dim, dtype=kind, device=device)
            return lambda: paged.attend(q, cache, out, dim**-0.5)

        size = sessions * tokens * 2 * kv_heads * dim * 2
        yield Case("paged", f"{heads}/{kv_heads}x{dim} {sessions} x {tokens}", make, size)


def mixtures(device: str, tiny: bool) -> Iterator[Case]:
    """A layer's experts as Qwen3-30B-A3B and Mixtral have them, and what comes before them."""
    kind = HALF if device != "cpu" else torch.float32
    shapes = ((6, 2, 64, 32),) if tiny else ((128, 8, 2048, 768), (8, 2, 4096, 14336))
    for count, chosen, hidden, width in shapes:
        for tokens in (3,) if tiny else (1, 16, 64, 2048):

            def route(tokens: int = tokens, count: int = count, k: int = chosen) -> Any:
                scores = torch.randn(tokens, count, device=device).to(kind)
                return lambda: experts.sort(experts.route(scores, k, True)[1], 0, count, 16)

            def mix(tokens: int = tokens, of: Any = (count, chosen, hidden, width)) -> Any:
                count, chosen, hidden, width = of
                x = torch.randn(tokens, hidden, device=device).to(kind)
                into = torch.randn(count, 2 * width, hidden, device=device, dtype=kind)
                out = torch.randn(count, hidden, width, device=device, dtype=kind)
                found = experts.route(torch.randn(tokens, count, device=device), chosen, True)
                weights = into.transpose(1, 2), out.transpose(1, 2)
                return lambda: experts.mix(x, *found, *weights)

            used = count * (1 - (1 - chosen / count) ** tokens)
            size = int(3 * used * hidden * width + 2 * tokens * hidden) * kind.itemsize
            shape = f"{chosen} of {count} x {width}, {tokens}"
            yield Case("experts route, sort", shape, route, tokens * count * kind.itemsize)
            work = 6 * tokens * chosen * hidden * width
            yield Case("experts mix", shape, mix, size, work)


def passes(device: str, tiny: bool) -> Iterator[Case]:
    """What reads and writes activations once."""
    kind = HALF if device != "cpu" else torch.float32

    def rows_of(count: int, width: int) -> Tensor:
        return torch.randn(count, width, device=device).to(kind)

    for count in (3,) if tiny else (1, 64, 2048):
        wide = 256 if tiny else 4096

        def norm(count: int = count, wide: int = wide) -> Callable[[], Any]:
            x, weight = rows_of(count, wide), rows_of(1, wide)[0]
            return lambda: elementwise.rms_norm(x, weight, 1e-5)

        def silu(count: int = count, wide: int = wide) -> Callable[[], Any]:
            x = rows_of(count, 7 * wide)
            return lambda: elementwise.silu_mul(x)

        def rope(count: int = count, dim: int = 16 if tiny else 128) -> Callable[[], Any]:
            qkv = rows_of(count, 48 * dim)
            cache = torch.zeros(count + 5, 2, 8, dim, dtype=kind, device=device)
            tables = torch.randn(2, count, 1, dim, device=device).to(kind)
            slots = torch.randperm(count + 5, device=device)[:count]
            return lambda: rope_append_(qkv, (tables[0], tables[1]), slots, cache, 32)

        def narrowed(count: int = count, wide: int = wide) -> Callable[[], Any]:
            x = rows_of(count, wide)
            return lambda: narrow.narrow(x)

        def widened(count: int = count, wide: int = wide) -> Callable[[], Any]:
            values, scales = narrow.narrow(rows_of(count, wide))
            return lambda: narrow.widen(values, scales, kind)

        size = count * wide * 2
        yield Case("rms_norm", f"{count} x {wide}", norm, 2 * size)
        yield Case("silu_mul", f"{count} x {7 * wide}", silu, size * 7 * 3 // 2)
        yield Case("rope_append", f"{count} x 48 x 128", rope, count * 48 * 128 * 2 * 2)
        yield Case("narrow", f"{count} x {wide}", narrowed, size * 3 // 2 + size // 64)
        yield Case("widen activations", f"{count} x {wide}", widened, size * 3 // 2 + size // 64)
