"""A decoder layer whose MLP is a mixture of experts (Mixtral, Qwen3-MoE), and its loading.

The tokens of a batch are sorted by the expert that each was sent to, and the experts that got any
run one after another on theirs: a product of a few rows, its weights read once for all sessions of
the batch. For one session that is what there is to do; a batch of many gains as soon as two of its
tokens meet. Results go back in the order of the experts, so a batch gives the same answer each
time.

Rejected: a product over all experts with masks (reads every weight for every token), and padding
each expert's share to one size (a popular expert makes all others as long as itself). A grouped
product in one launch is what a GPU wants; until there is one, mixtures leave the CUDA graph and run
layer by layer (see `hexswarm.peer.shard`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from hexswarm.errors import UnsupportedModel
from hexswarm.experts import Experts
from hexswarm.kernels.dispatch import Operations
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
    gate_up: tuple[Tensor | Quantised, ...]
    down: tuple[Tensor | Quantised, ...]
    first: int = field(default=0, kw_only=True)
    """The first expert held here; tokens that were sent to another rank's add nothing."""

    def forward(self, x: Tensor, batch: Pass, cache: Tensor) -> Tensor:
        """Change `x` `[tokens, hidden]` in place; append to and read the layer's `cache`."""
        y = self.attend_(x, batch, cache)
        shares, experts = route(torch.mm(y, self.router), self.chosen, self.normalised)
        return batch.add_(x, self._mix(y, shares, experts, batch.operations))

    def _mix(self, y: Tensor, shares: Tensor, experts: Tensor, ops: Operations) -> Tensor:
        """The sum of what the chosen experts make of each token, by shares."""
        mixed = torch.zeros_like(y)
        order = experts.flatten().argsort(stable=True)
        tokens, weights = order // self.chosen, shares.flatten()[order].unsqueeze(1)
        counts = experts.flatten().bincount(minlength=self.first + len(self.down)).tolist()
        first = sum(counts[: self.first])
        for expert, count in enumerate(counts[self.first : self.first + len(self.down)]):
            if not count:
                continue
            own = slice(first, first + count)
            first += count
            inner = ops.silu_mul(ops.project(y[tokens[own]], self.gate_up[expert]))
            out = ops.project(inner, self.down[expert]) * weights[own]
            mixed.index_add_(0, tokens[own], out.to(y.dtype))
        return mixed


def route(scores: Tensor, chosen: int, normalised: bool) -> tuple[Tensor, Tensor]:
    """The `chosen` experts of each token `[tokens, experts]`, and their shares in float32."""
    shares, experts = scores.softmax(-1, dtype=torch.float32).topk(chosen, dim=-1)
    return (shares / shares.sum(-1, keepdim=True) if normalised else shares), experts


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
    gates, downs = [], []
    for expert in held:
        name = f"{prefix}.experts.{expert}"
        parts = [(f"{name}.{part}.weight", width) for part in (gate, up)]
        gates.append(source.take_rounded(parts, a.hidden))
        downs.append(source.take_rounded([(f"{name}.{down}.weight", a.hidden)], width))
    return MixtureLayer(
        **llama.attention(a, index, source),
        router=source.take(f"{prefix}.gate.weight", experts.count, a.hidden).t(),
        chosen=experts.chosen,
        normalised=experts.normalised,
        gate_up=tuple(gates),
        down=tuple(downs),
        first=held.start,
    )


def _experts(a: Architecture) -> Experts:
    if a.experts is None:
        raise UnsupportedModel(f"{a.family} without experts")
    return a.experts
