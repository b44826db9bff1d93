"""The operations of a decoder layer, each in a few lines of plain PyTorch.

They are the meaning of the faster versions, the tests' yardstick, and on a CPU the
product itself. So each is also the cheapest formulation that we measured there: at decode a layer's
arrays are so small that the number of operations counts, not their size. Functions that end in an
underscore change their first argument.

Shapes: `tokens` are those of a ragged batch (see `hexswarm.kernels.ragged`); a layer's cache is
`[slots, 2, kv heads, head dim]`, keys before values, so that one copy appends both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hexswarm.kernels.ragged import Piece


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, the root in float32 or wider."""
    half = x.dtype.itemsize < 4
    norm = torch.linalg.vector_norm(
        x, dim=-1, keepdim=True, dtype=torch.float32 if half else x.dtype
    )
    epsilon = _constant(eps, x.device)
    scale = torch.addcmul(epsilon, norm, norm, value=1 / x.shape[-1]).rsqrt_()
    if not half:
        return torch.mul(x, scale).mul_(weight)
    return torch.mul(x.float(), scale).to(x.dtype).mul_(weight)


@lru_cache(maxsize=64)
def _constant(value: float, device: torch.device) -> Tensor:
    """A number as a tensor: arithmetic with a plain number makes one each time."""
    return torch.full((1,), value, device=device)


def rope_tables(
    positions: Tensor, frequencies: Tensor, scaling: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosines and sines `[tokens, 1, head dim]`; the sines of the first half are negated."""
    angles = positions[:, None, None].float() * frequencies
    cos, sin = angles.cos().mul_(scaling), angles.sin().mul_(scaling)
    return torch.cat((cos, cos), -1).to(dtype), torch.cat((-sin, sin), -1).to(dtype)


def rotate_(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of `[tokens, heads, head dim]`, halves against each other as in HF Llama."""
    turned = x.roll(x.shape[-1] // 2, -1)
    return x.mul_(cos).addcmul_(turned, sin)


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of `[tokens, 2 * width]`, gate first."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate).mul_(up)


def append_(cache: Tensor, slots: Tensor, keys_values: Tensor) -> None:
    """Write `[tokens, 2, kv heads, head dim]` into their slots of one layer's cache."""
    cache.index_copy_(0, slots, keys_values)


def rope_append_(
    qkv: Tensor,
    rope: tuple[Tensor, Tensor],
    slots: Tensor,
    cache: Tensor,
    heads: int,
    norm: Tensor | None = None,
    eps: float = 0.0,
) -> None:
    """Rotate queries of `qkv` `[tokens, (heads + 2 kv heads) * dim]` in place, append the rest.

    `rope` is that of `rope_tables`; `norm`, if given, weighs queries and keys, head by head.
    """
    _, _, kv_heads, dim = cache.shape
    every = qkv.view(-1, heads + 2 * kv_heads, dim)
    turned = every[:, : heads + kv_heads]
    if norm is not None:
        every[:, : heads + kv_heads] = rms_norm(turned, norm, eps)
    rotate_(turned, *rope)
    append_(cache, slots, every[:, heads:].view(-1, 2, kv_heads, dim))


def project(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight + bias, for a weight `[in, out]`."""
    return torch.mm(x, weight) if bias is None else torch.addmm(bias, x, weight)


def add_projected_(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x += y @ weight + bias, the sum inside the matrix product."""
    x.addmm_(y, weight)
    return x if bias is None else x.add_(bias)


def route(scores: Tensor, chosen: int, normalised: bool) -> tuple[Tensor, Tensor]:
    """Shares in float32, and numbers, of the `chosen` experts of each token `[tokens, experts]`.

    Shares are those of a softmax over all experts; `normalised`: those of the chosen add up to one.
    """
    shares, experts = scores.softmax(-1, dtype=torch.float32).topk(chosen, dim=-1)
    return (shares / shares.sum(-1, keepdim=True) if normalised else shares), experts


Expert = Callable[[Tensor, Any, Any], Tensor]
"""What one expert makes of its tokens, given its gate-up and its down."""


def _expert(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    return project(silu_mul(project(x, gate_up)), down)


def mix(
    x: Tensor,
    shares: Tensor,
    experts: Tensor,
    gate_up: Any,
    down: Any,
    first: int = 0,
    *,
    expert: Expert = _expert,
) -> Tensor:
    """The sum of what its chosen `experts` make of each token, by `shares` (both of `route`).

    `gate_up` `[experts, in, 2 * width]` and `down` `[experts, width, in]` are those of the experts
    from `first` on; the others add nothing. Tokens are sorted by expert, and the experts that got
    any run one after another: each weight is read once for all of them.
    """
    mixed = torch.zeros_like(x)
    order = experts.flatten().argsort(stable=True)
    tokens, weights = order // experts.shape[1], shares.flatten()[order].unsqueeze(1)
    counts = experts.flatten().bincount(minlength=first + len(down)).tolist()
    begin = sum(counts[:first])
    for number, count in enumerate(counts[first : first + len(down)]):
        own = slice(begin, begin + count)
        begin += count
        if count:
            out = expert(x[tokens[own]], gate_up[number], down[number]) * weights[own]
            mixed.index_add_(0, tokens[own], out.to(x.dtype))
    return mixed


SHARE = 64
"""Numbers of a row that have one scale in `narrow`."""
STEP = 1 / 127
"""Of the largest; a product, since a GPU may divide by a plain number in another way."""


def narrow(x: Tensor) -> tuple[Tensor, Tensor]:
    """Activations `[tokens, width]` in 8 bits, int8 and bfloat16 scales `[tokens, width / 64]`.

    A scale is the 127th part of the largest of its numbers, so they are off by half of it at most.
    A last scale may have fewer.
    """
    tokens, width = x.shape
    shares = F.pad(x.float(), (0, -width % SHARE)).view(tokens, -1, SHARE)
    scales = (shares.abs().amax(-1) * STEP).bfloat16()
    divisor = scales.float()[..., None]
    steps = torch.where(divisor > 0, shares / divisor, 0.0).round_().clamp_(-127, 127)
    return steps.to(torch.int8).view(tokens, -1)[:, :width].contiguous(), scales


def widen(values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The activations that `narrow` made these of."""
    width = values.shape[1]
    every = scales.float().repeat_interleave(SHARE, 1)[:, :width]
    return (values.float() * every).to(dtype)


def attend(q: Tensor, cache: Tensor, pieces: Sequence[Piece], scale: float) -> Tensor:
    """Causal attention of `[tokens, heads, head dim]` over the paged cache of one layer.

    Returns `[tokens, heads * head dim]`. The cache already holds the batch's own keys and values.
    """
    if len(pieces) == 1:
        return _attend_one(q, cache, pieces[0], scale)
    parts = [_attend_one(q[p.first : p.end], cache, p, scale) for p in pieces]
    return torch.cat(parts)


def _attend_one(q: Tensor, cache: Tensor, piece: Piece, scale: float) -> Tensor:
    tokens, heads, head_dim = q.shape
    keys_values = cache[piece.keys]  # a view for a slice, a copy for an index
    k, v = keys_values.transpose(0, 2).unsqueeze(0).unbind(2)
    if tokens == 1:  # the heads of a group as its queries: no mask, and no copy of the keys
        grouped = q.reshape(1, k.shape[1], -1, head_dim)
        out = F.scaled_dot_product_attention(grouped, k, v, scale=scale)
        return out.reshape(1, heads * head_dim)
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1).unsqueeze(0),
        k,
        v,
        attn_mask=piece.mask,
        is_causal=piece.causal,
        scale=scale,
        enable_gqa=heads != k.shape[1],
    )
    return out.transpose(1, 2).reshape(tokens, heads * head_dim)
