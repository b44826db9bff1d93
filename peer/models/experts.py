"""A decoder layer whose MLP is a mixture of experts (Mixtral, Qwen3-MoE), and its loading.

The tokens of a batch are sorted by the expert that each was sent to, so that an expert's weights
are read once for all sessions of the batch. On a CPU the experts that got any run one after
another on theirs: a product of a few rows (`hexswarm.kernels.reference.mix`). For one session that
is what there is to do; a batch of many gains as soon as two of its tokens meet. On a GPU the
experts of a layer are one matrix after another in memory and one launch
(`hexswarm.kernels.experts`), which waits for nothing and so is part of the CUDA graph; those in few
bits are not, and take the span out of it. Results are added in one order, so a batch gives the same
answer each time.

Rejected: a product over all experts with masks (reads every weight for every token), and padding
each expert's share to one size (a popular expert makes all others as long as itself).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from hexswarm.errors import UnsupportedModel
from hexswarm.experts import Experts
from hexswarm.kernels.quantise import Quantised
from hexswarm.peer.models import llama
from hexswarm.peer.models.architecture import Architecture
from hexswarm.peer.models.layers import AttendingLayer, Pass


@dataclass(frozen=True, slots=True)
class MixtureLayer(AttendingLayer):
    """Weights of one layer; an expert's gate and up projection are one matrix."""

    router: Tensor
    """`[hidden, experts]`, never rounded."""
    chosen: int
    normalised: bool
    gate_up: Tensor | tuple[Quantised, ...]
    """`[experts, hidden, 2 * columns]`, or each in few bits."""
    down: Tensor | tuple[Quantised, ...]
    first: int = field(default=0, kw_only=True)
    """The first expert held here; tokens that were sent to another rank's add nothing."""

    @property
    def whole(self) -> bool:
        """Whether the experts have all bits, and are one tensor."""
        return isinstance(self.gate_up, Tensor)

    def forward(self, x: Tensor, batch: Pass, cache: Tensor) -> Tensor:
        """Change `x` `[tokens, hidden]` in place; append to and read the layer's `cache`."""
        ops, y = batch.operations, self.attend_(x, batch, cache)
        chosen = ops.route(ops.project(y, self.router), self.chosen, self.normalised)
        return batch.add_(x, ops.mix(y, *chosen, self.gate_up, self.down, self.first))


def layer_tensors(a: Architecture, index: int) -> tuple[str, ...]:
    """Names of the tensors that `build_layer` takes."""
    experts = _experts(a)
    if not experts.layers[index]:
        return llama.layer_tensors(a, index)
    names = [*llama.attention_tensors(a), *experts.shapes(a.hidden)]
    return tuple(f"model.layers.{index}.{name}" for name in names)


def build_layer(a: Architecture, index: int, source: llama.Source) -> AttendingLayer:
    """The layer `index`, a mixture or not."""
    experts = _experts(a)
    if not experts.layers[index]:
        return llama.build_layer(a, index, source)
    prefix = f"model.layers.{index}.{experts.block}"
    gate, up, down = experts.projections
    held, width = source.part.experts, len(source.part.expert_columns)
    names = [f"{prefix}.experts.{expert}" for expert in held]
    into = [[(f"{name}.{part}.weight", width) for part in (gate, up)] for name in names]
    out = [[(f"{name}.{down}.weight", a.hidden)] for name in names]
    return MixtureLayer(
        **llama.attention(a, index, source),
        router=source.take(f"{prefix}.gate.weight", experts.count, a.hidden).t(),
        chosen=experts.chosen,
        normalised=experts.normalised,
        gate_up=source.take_stacked(into, a.hidden),
        down=source.take_stacked(out, width),
        first=held.start,
    )


def _experts(a: Architecture) -> Experts:
    if a.experts is None:
        raise UnsupportedModel(f"{a.family} without experts")
    return a.experts
