"""What a config.json says about mixtures of experts: how many, who is asked, in which layers.

In a mixture the MLP of a layer is many MLPs, the *experts*. A router, one matrix, scores them for
each token; a softmax over all makes shares of the scores, and the token goes through the few with
the largest. Families differ in names, in whether the shares of the chosen are scaled to sum to one,
and in which layers are mixtures at all. Reading follows transformers 5.23: Mixtral mixes in every
layer and always scales; Qwen3-MoE mixes in each `decoder_sparse_step`-th layer that is not in
`mlp_only_layers`, scales if `norm_topk_prob`, and gives experts a width of their own.

This stands on the ground floor because the digest of a model, the sizes of a span's tensors and the
layers themselves must agree on it. Rejected: reading the fused tensors that transformers holds in
memory; it writes checkpoints expert by expert, as everybody does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hexswarm.errors import UnsupportedModel

MIXTURES = ("mixtral", "qwen3_moe")
"""`model_type` of the families that have experts."""

_MOST = {"experts": 1 << 12, "width": 1 << 22}
_BLOCKS = {"mixtral": "block_sparse_moe", "qwen3_moe": "mlp"}
_PROJECTIONS = {"mixtral": ("w1", "w3", "w2"), "qwen3_moe": ("gate_proj", "up_proj", "down_proj")}
_DEFAULTS = {
    "mixtral": {"count": 8, "chosen": 2, "width": 14_336},
    "qwen3_moe": {"count": 128, "chosen": 8, "width": 768},
}
"""What transformers assumes for a key that a configuration lacks."""


@dataclass(frozen=True, slots=True)
class Experts:
    """The mixtures of one model."""

    count: int
    chosen: int
    """Experts that each token goes through."""
    width: int
    """Of an expert's hidden layer."""
    normalised: bool
    """The shares of the chosen are scaled to sum to one."""
    layers: tuple[bool, ...]
    """Whether each layer is a mixture; the others have one MLP."""
    block: str
    """What the checkpoint calls the mixture of a layer."""
    projections: tuple[str, str, str]
    """What it calls an expert's gate, up and down projection."""

    def __post_init__(self) -> None:
        if not 0 < self.count <= _MOST["experts"] or not 0 < self.width <= _MOST["width"]:
            raise UnsupportedModel(f"{self.count} experts of width {self.width}")
        if not 0 < self.chosen <= self.count:
            raise UnsupportedModel(f"{self.chosen} of {self.count} experts for a token")

    def shapes(self, hidden: int) -> dict[str, tuple[int, ...]]:
        """The tensors of a mixture, without the name of their layer."""
        gate, up, down = self.projections
        found: dict[str, tuple[int, ...]] = {f"{self.block}.gate.weight": (self.count, hidden)}
        for expert in range(self.count):
            prefix = f"{self.block}.experts.{expert}"
            for name in (gate, up):
                found[f"{prefix}.{name}.weight"] = (self.width, hidden)
            found[f"{prefix}.{down}.weight"] = (hidden, self.width)
        return found

    def numerics(self) -> list[int]:
        """What changes the model's output, in one form."""
        dense = [index for index, mixed in enumerate(self.layers) if not mixed]
        return [self.count, self.chosen, self.width, int(self.normalised), *dense]


def read_experts(config: Mapping[str, Any], layers: int) -> Experts | None:
    """The mixtures of a model with `layers` layers, None for one without; or UnsupportedModel."""
    family = str(config.get("model_type"))
    if family not in MIXTURES:
        return None
    qwen, defaults = family == "qwen3_moe", _DEFAULTS[family]
    # Either spelling of the count may stand in a file: transformers 5 writes the second.
    counts = {name: config[name] for name in ("num_experts", "num_local_experts") if name in config}
    mixed = _mixed_layers(config, layers) if qwen else (True,) * layers
    return Experts(
        count=_whole(counts or {"num_experts": defaults["count"]}),
        chosen=_whole({"k": config.get("num_experts_per_tok", defaults["chosen"])}),
        width=_whole(_width(config, qwen, defaults["width"])),
        normalised=bool(config.get("norm_topk_prob", False)) if qwen else True,
        layers=mixed,
        block=_BLOCKS[family],
        projections=_PROJECTIONS[family],
    )


def _width(config: Mapping[str, Any], qwen: bool, default: int) -> dict[str, Any]:
    name = "moe_intermediate_size" if qwen else "intermediate_size"
    return {name: config.get(name, default)}


def _mixed_layers(config: Mapping[str, Any], layers: int) -> tuple[bool, ...]:
    step = _whole({"decoder_sparse_step": config.get("decoder_sparse_step", 1)})
    dense = config.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(type(index) is int for index in dense):
        raise UnsupportedModel("mlp_only_layers is not a list of numbers")
    return tuple(index not in dense and (index + 1) % step == 0 for index in range(layers))


def _whole(spellings: Mapping[str, Any]) -> int:
    """The positive number that all `spellings` of a field agree on."""
    (name, value), *others = spellings.items()
    if type(value) is not int or value < 1 or any(other != value for _, other in others):
        raise UnsupportedModel(f"{name} = {str(value)[:40]} in the model's configuration")
    return value
