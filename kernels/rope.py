"""Between the fused projection and attention, in one kernel (Triton): q/k norm, rotation, append.

Reads queries, keys and values of a token once, as the projection left them, side by side; writes
rotated queries back to their place, and rotated keys and values into the token's slot of the paged
cache. As separate operations this is six launches and three passes over the same bytes.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rope_append(
    qkv_ptr, cos_ptr, sin_ptr, slots_ptr, norm_ptr, cache_ptr,
    stride_qkv, stride_rope, eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr,
    NORM: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * TILE + tl.arange(0, TILE)
    half = tl.arange(0, DIM // 2)
    real = (head < HEADS + 2 * KV_HEADS)[:, None]
    turns = (head < HEADS + KV_HEADS)[:, None]
    at = qkv_ptr + token * stride_qkv + head[:, None] * DIM + half[None, :]
    a = tl.load(at, mask=real, other=0.0).to(tl.float32)
    b = tl.load(at + DIM // 2, mask=real, other=0.0).to(tl.float32)
    if NORM:
        mean = (tl.sum(a * a, axis=1) + tl.sum(b * b, axis=1)) / DIM
        root = tl.rsqrt(mean + eps)[:, None]
        weight = norm_ptr + head[:, None] * DIM + half[None, :]
        a = tl.where(turns, a * root * tl.load(weight, mask=turns, other=0.0), a)
        b = tl.where(turns, b * root * tl.load(weight + DIM // 2, mask=turns, other=0.0), b)
    angle = token * stride_rope + half
    cos = tl.load(cos_ptr + angle).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + DIM // 2 + angle).to(tl.float32)[None, :]
    left = tl.where(turns, a * cos - b * sin, a)
    right = tl.where(turns, b * cos + a * sin, b)
    kind = qkv_ptr.dtype.element_ty
    query = real & (head < HEADS)[:, None]
    tl.store(at, left.to(kind), mask=query)
    tl.store(at + DIM // 2, right.to(kind), mask=query)
    slot = tl.load(slots_ptr + token).to(tl.int64)
    store = cache_ptr + slot * (2 * KV_HEADS * DIM) + (head - HEADS)[:, None] * DIM + half[None, :]
    kept = real & (head >= HEADS)[:, None] & (slot >= 0)
    tl.store(store, left.to(kind), mask=kept)
    tl.store(store + DIM // 2, right.to(kind), mask=kept)


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

    `rope` is that of `reference.rope_tables`, `norm` `[heads + kv heads, dim]` of `DecoderLayer`.
    A token whose slot is negative is appended nowhere.
    """
    _, _, kv_heads, dim = cache.shape
    cos, sin = rope
    tile = 1 if qkv.shape[0] <= 64 else 8
    grid = (qkv.shape[0], triton.cdiv(heads + 2 * kv_heads, tile))
    _rope_append[grid](
        *(qkv, cos, sin, slots, qkv if norm is None else norm, cache),
        *(qkv.stride(0), cos.stride(0), eps),
        HEADS=heads, KV_HEADS=kv_heads, DIM=dim, NORM=norm is not None, TILE=tile,
        num_warps=1 if tile == 1 else 4,
    )  # fmt: skip
