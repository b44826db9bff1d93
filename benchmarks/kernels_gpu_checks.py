"""What `kernels_gpu.py` checks: each kernel, compiled, against float64 on fresh random inputs.

Outputs and cells of the cache that nobody wrote are not numbers before, so that what is not
written, or read where it should not be, shows. A check returns what it looked at, relative error,
and bound.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from hexswarm.kernels import choice, elementwise, experts, narrow, prefill, reference, sample
from hexswarm.kernels.choice import GREEDY, Draw
from hexswarm.kernels.linear import linear
from hexswarm.kernels.linear4 import linear4
from hexswarm.kernels.paged import PagedDecode, Plan
from hexswarm.kernels.product import product, widen
from hexswarm.kernels.quantise import dequantise, quantise
from hexswarm.kernels.ragged import Extent, ragged
from hexswarm.kernels.rope import rope_append_

Found = tuple[str, float, float]
BLOCK = 16


def bounds(device: str) -> dict[torch.dtype, float]:
    """Of the relative norm of an error; the interpreter cannot multiply bfloat16."""
    halves = {torch.bfloat16: 1e-2, torch.float16: 1e-2} if device != "cpu" else {torch.half: 1e-2}
    return {torch.float32: 1e-5, **halves}


def off(out: Tensor, wanted: Tensor) -> float:
    """Relative norm of the error; infinite if something is not a number."""
    error = float((out.double() - wanted.double()).norm() / wanted.double().norm())
    return error if error == error else float("inf")


def poisoned(*shape: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype, device=device)


def _finish(wanted: Tensor, bias: Tensor, out: Tensor, form: str) -> Tensor:
    if form == "bias":
        return wanted + bias.double()
    if form == "gated":
        gate, up = wanted.chunk(2, -1)
        return F.silu(gate) * up
    return wanted + out.double() if form == "add" else wanted


def products(device: str, bits: int, dtype: torch.dtype, form: str) -> list[Found]:
    """`linear`, both forms of `linear4`, and `product` with widening, in one form of call."""
    found, bound = list[Found](), bounds(device).get(dtype)
    if bound is None:
        return found
    sizes = ((72, 384),) if device == "cpu" else ((72, 384), (4096, 4096), (200, 2304))
    for outputs, inputs in sizes:
        weight = torch.randn(outputs, inputs, device=device).to(dtype)
        used = weight if bits == 16 else quantise(weight, bits)
        exact = weight.double() if bits == 16 else dequantise(used, torch.float64)
        found += _calls(device, used, exact, bits, dtype, form, bound)
    return found


def _calls(device, used, exact, bits, dtype, form, bound) -> Iterator[Found]:  # type: ignore[no-untyped-def]
    outputs, inputs = exact.shape
    bias = torch.randn(outputs, device=device).to(dtype)
    for tokens in (1,) if device == "cpu" else (1, 3, 16, 40):
        x = torch.randn(tokens, inputs, device=device).to(dtype)
        width = outputs // 2 if form == "gated" else outputs
        options = {
            "gated": form == "gated", "add": form == "add",
            "bias": bias if form == "bias" else None,
        }  # fmt: skip
        ways: list[tuple[str, Callable[..., Tensor]]] = []
        if tokens <= 16:
            ways.append(("linear", linear))
        if bits == 4 and tokens <= 16:
            ways.append(("vector", lambda *a, **o: linear4(*a, form="vector", **o)))
            if dtype != torch.float32 and inputs % 512 == 0:
                ways.append(("matrix 64", lambda *a, **o: linear4(*a, shape=(64, 64, 4, 3), **o)))
        if tokens > 16:
            ways.append(("product", product))
        for name, way in ways:
            out = poisoned(tokens, width, dtype=dtype, device=device)
            if form == "add":
                out = torch.randn(tokens, width, device=device).to(dtype)
            wanted = _finish(x.double() @ exact.T, bias, out, form)
            held = used.t() if name == "product" and bits == 16 else used
            way(x, held, out, **options)
            label = f"{name} {bits} bits {outputs}x{inputs} x{tokens} {form} {dtype}"
            yield label, off(out, wanted), bound


def widening(device: str) -> list[Found]:
    found = []
    for bits in (8, 4):
        weight = quantise(torch.randn(40, 2304, device=device), bits)
        error = off(widen(weight, torch.float32), dequantise(weight, torch.float32))
        found.append((f"{bits} bits", error, 0.0))
    return found


def passes(device: str) -> list[Found]:
    """Norm, SiLU, rotation with append."""
    found = []
    for dtype, bound in bounds(device).items():
        for rows, width in ((1, 64), (5, 576), (300, 4096))[: 2 if device == "cpu" else 3]:
            x, weight = (torch.randn(n, width, device=device).to(dtype) for n in (rows, 1))
            wide = x.double()
            root = torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)
            out = elementwise.rms_norm(x, weight[0], 1e-5)
            found.append(
                (f"rms_norm {rows}x{width} {dtype}", off(out, wide * root * weight), bound)
            )
            out = poisoned(rows, width // 2, dtype=dtype, device=device)
            gate, up = wide.chunk(2, -1)
            elementwise.silu_mul(x, out)
            found.append((f"silu_mul {rows}x{width} {dtype}", off(out, F.silu(gate) * up), bound))
        for tokens, norm in ((2, True), (70, False))[: 1 if device == "cpu" else 2]:
            found.append(_rope(device, tokens, norm, dtype, bound))
    return found


def _rope(device: str, tokens: int, norm: bool, dtype: torch.dtype, bound: float) -> Found:
    heads, kv_heads, dim = 6, 2, 64
    total, turned = heads + 2 * kv_heads, heads + kv_heads
    qkv = torch.randn(tokens, total * dim, device=device).to(dtype)
    weight = torch.randn(turned, dim, device=device).to(dtype) if norm else None
    angles = torch.rand(tokens, 1, dim // 2, device=device) * 6
    cos, sin = angles.cos(), angles.sin()
    rope = torch.cat((cos, cos), -1).to(dtype), torch.cat((-sin, sin), -1).to(dtype)
    cache = poisoned(tokens + 3, 2, kv_heads, dim, dtype=dtype, device=device)
    slots = torch.randperm(tokens + 3, device=device)[:tokens]
    wanted = qkv.double().view(tokens, total, dim).clone()
    part = wanted[:, :turned]
    if weight is not None:
        part = part * torch.rsqrt(part.square().mean(-1, keepdim=True) + 1e-5) * weight.double()
    wanted[:, :turned] = part * rope[0].double() + part.roll(dim // 2, -1) * rope[1].double()
    rope_append_(qkv, rope, slots, cache, heads, weight, 1e-5)
    kept = cache[slots].reshape(tokens, 2 * kv_heads, dim)
    out = torch.cat((qkv.view(tokens, total, dim)[:, :heads], kept), 1)
    rest = int(cache.isnan().all(-1).all(-1).all(-1).sum()) - 3
    return f"rope_append x{tokens} {dtype}", off(out, wanted) + abs(rest), bound


def sessions(
    device: str, given: Sequence[tuple[int, int]], kv_heads: int, dim: int, dtype: torch.dtype
) -> tuple[list[Extent], Tensor]:
    """Sessions (position, count) in blocks all over a cache that is poisoned but for their keys."""
    blocks = list(range(sum(-(-(p + c) // BLOCK) for p, c in given) + 5))
    random.shuffle(blocks)
    cache = poisoned(len(blocks) * BLOCK, 2, kv_heads, dim, dtype=dtype, device=device)
    extents = []
    for position, count in given:
        table = tuple(blocks.pop() for _ in range(-(-(position + count) // BLOCK)))
        extent = Extent(position, count, table, BLOCK)
        slots = [extent.slot(token) for token in range(extent.length)]
        cache[slots] = torch.randn(len(slots), 2, kv_heads, dim, device=device).to(dtype)
        extents.append(extent)
    return extents, cache


def attention(device: str) -> list[Found]:
    """Decode steps and prompts, with groups of 1, 3, 4 and 8 heads, with and without a window."""
    kinds = ((9, 3, 64), (4, 4, 32), (8, 1, 128), (16, 4, 128))
    mixes: tuple[list[tuple[int, int]], ...] = (
        [(0, 1), (15, 1), (16, 1), (299, 1)],
        [(0, 5), (33, 40), (16, 16), (70, 1)],
    )
    if device != "cpu":
        mixes = (*mixes, [(0, 700), (1000, 333), (128, 128)])
    else:
        kinds = kinds[:1]
    found = []
    for heads, kv_heads, dim in kinds:
        for dtype, bound in bounds(device).items():
            for mix in mixes:
                for window in (None, 40):
                    extents, cache = sessions(device, mix, kv_heads, dim, dtype)
                    batch = ragged(extents, torch.device(device))
                    every = torch.randn(batch.tokens, (heads + 2 * kv_heads) * dim, device=device)
                    every = every.to(dtype)
                    q = every[:, : heads * dim].view(-1, heads, dim)
                    pieces = batch.pieces(window, torch.float64)
                    wanted = reference.attend(q.double(), cache.double(), pieces, dim**-0.5)
                    out = poisoned(batch.tokens, heads * dim, dtype=dtype, device=device)
                    label = f"{heads}/{kv_heads}x{dim} {mix} window {window} {dtype}"
                    plan = prefill.tiles(extents, q.device, prefill.ROWS[q.element_size()])
                    prefill.attend(q, cache, plan, dim**-0.5, window, out=out)
                    found.append((f"prefill {label}", off(out, wanted), bound))
                    if all(count == 1 for _, count in mix):
                        out.fill_(float("nan"))
                        steps = Plan(8, 200, torch.device(device), parallel=6)
                        steps.set([e.length for e in extents], [e.blocks for e in extents])
                        paged = PagedDecode(steps, heads, kv_heads, dim, BLOCK)
                        paged.attend(every, cache, out, dim**-0.5, window)
                        found.append((f"paged {label}", off(out, wanted), bound))
    return found


def narrowing(device: str) -> list[Found]:
    """Bit for bit."""
    found = []
    for dtype in bounds(device):
        x = torch.randn(7, 1000, device=device).to(dtype) * 30
        x[1, :64] = 0
        values, scales = narrow.narrow(x)
        wanted, others = reference.narrow(x)
        same = torch.equal(values, wanted) and torch.equal(scales, others)
        back = narrow.widen(values, scales, dtype)
        same = same and torch.equal(back, reference.widen(values, scales, dtype))
        found.append((f"{dtype}", 0.0 if same else 1.0, 0.0))
        found.append((f"{dtype} there and back", off(back, x), 1e-2))
    return found


def choices(device: str) -> list[Found]:
    """The very token of the plain form, on the CPU, and the same one again."""
    found = []
    sizes = ((2, 300),) if device == "cpu" else ((8, 128256), (9, 49152), (5, 77), (16, 3000))
    for rows, vocabulary in sizes:
        for spread in (4.0,) if device == "cpu" else (6.0, 1.0):
            logits = torch.randn(rows, vocabulary, device=device) * spread
            logits = logits.to(torch.bfloat16).float() if random.random() < 0.5 else logits
            draws = [
                Draw(
                    random.choice((0.3, 0.8, 1.0, 2.5)),
                    random.choice((0, 0, 1, 50, 5000)),
                    random.choice((1.0, 0.95, 0.5)),
                    random.choice((0.0, 0.0, 0.05)),
                    random.random(),
                )
                for _ in range(rows - 1)
            ] + [GREEDY]
            made = choice.settings(draws)
            tokens = sample.pick(logits, made.to(device))
            wanted = choice.pick(logits.cpu(), made)
            wrong = int((tokens.cpu() != wanted).sum())
            again = int((sample.pick(logits, made.to(device)) != tokens).sum())
            found.append((f"{rows} x {vocabulary}, spread {spread}", wrong + again, 0.0))
    return found


def mixtures(device: str) -> list[Found]:
    """All experts, some of them, and tokens that no session has; small tiles and large ones."""
    found = []
    sizes = ((3, 6, 2, 64, 32),) if device == "cpu" else ((1, 128, 8, 2048, 768),
        (40, 128, 8, 512, 96), (300, 8, 2, 1024, 1000), (64, 8, 2, 200, 72))  # fmt: skip
    for tokens, count, chosen, hidden, width in sizes:
        for dtype, bound in bounds(device).items():
            x = torch.randn(tokens, hidden, device=device).to(dtype)
            into = (torch.randn(count, 2 * width, hidden, device=device) / hidden**0.5).to(dtype)
            out = (torch.randn(count, hidden, width, device=device) / width**0.5).to(dtype)
            weights = into.transpose(1, 2), out.transpose(1, 2)
            slots = torch.arange(tokens, device=device)
            slots[1::3] = -1
            scores = torch.randn(tokens, count, device=device)
            shares, numbers = experts.route(scores, chosen, True, slots)
            wide = [m.double() for m in weights]
            for first, end in ((0, count), (2, count - 1)):
                held = [m[first:end] for m in weights]
                exact = [m[first:end] for m in wide]
                given = shares, numbers.long()
                wanted = reference.mix(x.double(), given[0].double(), given[1], *exact, first)
                got = experts.mix(x, shares, numbers, *held, first)
                name = f"{tokens} by {chosen} of {count} x {width} from {first}, {dtype}"
                # Every row may have gone to others: then what is there must be nothing.
                some = bool(wanted.any())
                found.append((name, off(got, wanted) if some else float(got.abs().max()), bound))
    return found


CHECKS: dict[str, Callable[[str], list[Found]]] = {
    "sample": choices,
    "prefill, paged": attention,
    **{
        f"linear, int4, product: {bits} bits, {str(dtype)[6:]}, {form}": functools.partial(
            products, bits=bits, dtype=dtype, form=form
        )
        for bits in (16, 8, 4)
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
        for form in ("plain", "gated", "add", "bias")
    },
    "widen": widening,
    "rms_norm, silu, rope": passes,
    "experts": mixtures,
    "narrow": narrowing,
}
"""Many small ones: they compile at the same time."""
