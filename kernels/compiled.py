"""The operations of `hexswarm.kernels.reference` for prompts on a GPU: Triton where it is faster.

Attention of a single prompt from its beginning is PyTorch's own, and so are products with many
rows. Several sessions, or one with a prefix, go through `hexswarm.kernels.prefill`.
Mixtures go through `hexswarm.kernels.experts`; experts in few bits one after another.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hexswarm.kernels import dispatch, prefill, reference
from hexswarm.kernels import experts as grouped
from hexswarm.kernels.elementwise import rms_norm, silu_mul
from hexswarm.kernels.product import add_projected_, project
from hexswarm.kernels.quantise import Quantised
from hexswarm.kernels.ragged import Piece, Pieces
from hexswarm.kernels.reference import rope_tables
from hexswarm.kernels.rope import rope_append_

__all__ = [
    "add_projected_",
    "attend",
    "mix",
    "project",
    "rms_norm",
    "rope_append_",
    "rope_tables",
    "route",
    "silu_mul",
]


def attend(q: Tensor, cache: Tensor, pieces: Sequence[Piece], scale: float) -> Tensor:
    """As `hexswarm.kernels.reference.attend`, by the rule of `hexswarm.kernels.dispatch`."""
    if not isinstance(pieces, Pieces) or not dispatch.ragged_prefill(pieces.batch.extents):
        return reference.attend(q, cache, pieces, scale)
    if pieces.plan is None:
        rows = prefill.ROWS[2 if q.dtype != torch.float32 else 4]
        pieces.plan = prefill.tiles(pieces.batch.extents, q.device, rows)
    return prefill.attend(q, cache, pieces.plan, scale, pieces.window)


def route(scores: Tensor, chosen: int, normalised: bool) -> tuple[Tensor, Tensor]:
    """As `hexswarm.kernels.reference.route`."""
    way = grouped if dispatch.MIXTURES == "grouped" else reference
    return way.route(scores, chosen, normalised)


def mix(
    x: Tensor,
    shares: Tensor,
    experts: Tensor,
    gate_up: Tensor | Sequence[Quantised],
    down: Tensor | Sequence[Quantised],
    first: int = 0,
) -> Tensor:
    """As `hexswarm.kernels.reference.mix`: in one launch a matrix, if the weights have all bits."""
    if isinstance(gate_up, Tensor) and isinstance(down, Tensor):
        if dispatch.MIXTURES == "grouped":
            return grouped.mix(x, shares, experts, gate_up, down, first)
        return reference.mix(x, shares, experts, gate_up, down, first)
    return reference.mix(x, shares, experts, gate_up, down, first, expert=_expert)


def _expert(x: Tensor, gate_up: Quantised, down: Quantised) -> Tensor:
    return project(silu_mul(project(x, gate_up)), down)
