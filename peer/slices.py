"""Which rows and columns of each tensor of a checkpoint a part of a cut has.

One rule for each kind of tensor, by its name: it says what a member reads from disk, what its
memory is planned for, and what the model code expects to be given. Names and shapes come from the
config (`hexswarm.architecture`), so a file is never asked.

- Projections into heads or columns (q, k, v, gate, up) are cut by rows, those out of them (o, down)
  by columns, embedding and LM head by rows.
- Biases of the first kind are cut like their rows. Those of the second are added once to the
  group's sum, by rank 0, and nobody else has them.
- Norms and routers are whole everywhere. A mixture cut by experts has the tensors of its own.

Pure.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hexswarm.architecture import EMBEDDING, LM_HEAD, end_shapes, layer_shapes, span_shapes
from hexswarm.peer.cuts import Part, Sizes
from hexswarm.records import Span

_ATTENTION = re.compile(r".*\.self_attn\.([qkvo])_proj\.(weight|bias)")
_EXPERT = re.compile(r".*\.experts\.(\d+)\.(\w+)\.weight")
_MLP = re.compile(r".*\.mlp\.(gate|up|down)_proj\.(weight|bias)")
_INTO = ("gate_proj", "up_proj", "w1", "w3")
"""An expert's projections into its columns, as families call them."""


@dataclass(frozen=True, slots=True)
class Slice:
    """A rectangle of a matrix `[out, in]`, or a run of a vector."""

    whole: tuple[int, ...]
    """Shape of the tensor in the checkpoint."""
    rows: range
    columns: range | None = None
    """None: all of them."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the slice itself."""
        if self.columns is None:
            return (len(self.rows), *self.whole[1:])
        return (len(self.rows), len(self.columns))

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


def part_slices(config: dict[str, Any], span: Span, part: Part | None) -> dict[str, Slice]:
    """Of each tensor of `span` that `part` has something of (None: all), what that is."""
    shapes = span_shapes(config, span)
    if part is None or part.whole:
        return {name: Slice(shape, range(shape[0])) for name, shape in shapes.items()}
    head_dim = read_sizes(config, span).head_dim
    found = ((name, _slice(name, shape, part, head_dim)) for name, shape in shapes.items())
    return {name: slice_ for name, slice_ in found if slice_ is not None}


def read_sizes(config: Mapping[str, Any], span: Span, weight_bytes: int = 4) -> Sizes:
    """What of `span` can be cut, by a checked config. Raises UsageError for no span of it."""
    config = dict(config)
    layers = [layer_shapes(config, index) for index in range(span.first, span.end)]
    ends = end_shapes(config, span)
    experts = [_experts(shapes) for shapes in layers]
    dense = next(
        (shapes for shapes, (count, _) in zip(layers, experts, strict=True) if not count), {}
    )
    mixture = max(experts)
    by_kind = {match[1]: shape for name, shape in layers[0].items() if (match := _weight(name))}
    heads = int(config["num_attention_heads"])
    head_dim = by_kind["q"][0] // heads
    return Sizes(
        hidden=by_kind["q"][1],
        heads=heads,
        kv_heads=by_kind["k"][0] // head_dim,
        head_dim=head_dim,
        columns=next((shape[0] for name, shape in dense.items() if "gate_proj.w" in name), 0),
        vocabulary=int(config["vocab_size"]),
        dense_layers=sum(not count for count, _ in experts),
        mixed_layers=sum(bool(count) for count, _ in experts),
        experts=mixture[0],
        expert_columns=mixture[1],
        word_matrices=sum(name in (EMBEDDING, LM_HEAD) for name in ends),
        weight_bytes=weight_bytes,
    )


def _weight(name: str) -> re.Match[str] | None:
    match = _ATTENTION.fullmatch(name)
    return match if match and match[2] == "weight" else None


def _experts(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
    """How many experts a layer has, and the columns of each; zeros for no mixture."""
    matches = [(_EXPERT.fullmatch(name), shape) for name, shape in shapes.items()]
    into = [(int(match[1]), shape) for match, shape in matches if match and match[2] in _INTO]
    return (max(number for number, _ in into) + 1, into[0][1][0]) if into else (0, 0)


def _slice(name: str, shape: tuple[int, ...], part: Part, head_dim: int) -> Slice | None:
    """What `part` has of one tensor, None for nothing."""
    if name in (EMBEDDING, LM_HEAD):
        return Slice(shape, part.words)
    if match := _ATTENTION.fullmatch(name):
        heads = part.heads if match[1] in "qo" else part.kv_heads
        into, cut = match[1] != "o", range(heads.start * head_dim, heads.stop * head_dim)
    elif match := _EXPERT.fullmatch(name):
        into, cut = match[2] in _INTO, part.expert_columns
        if int(match[1]) not in part.experts:
            return None
    elif match := _MLP.fullmatch(name):
        into, cut = match[1] != "down", part.columns
    else:
        return Slice(shape, range(shape[0]))
    if into:
        return Slice(shape, cut)
    if len(shape) == 1:
        return Slice(shape, range(shape[0])) if part.rank == 0 else None
    return Slice(shape, range(shape[0]), cut)
