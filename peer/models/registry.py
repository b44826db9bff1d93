"""Which families of models we serve, and how each is read and built."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hexswarm.errors import UnsupportedModel
from hexswarm.peer.models import experts, llama
from hexswarm.peer.models.architecture import Architecture, read_architecture
from hexswarm.peer.models.layers import AttendingLayer


@dataclass(frozen=True, slots=True)
class Family:
    """How models of one `model_type` are read and built."""

    read: Callable[[Mapping[str, Any]], Architecture]
    tensors: Callable[[Architecture, int], tuple[str, ...]]
    """Names of a layer's tensors in the checkpoint."""
    build: Callable[[Architecture, int, llama.Source], AttendingLayer]


_LLAMA = Family(read_architecture, llama.layer_tensors, llama.build_layer)
_MIXTURE = Family(read_architecture, experts.layer_tensors, experts.build_layer)

FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "mixtral": _MIXTURE,
    "qwen3_moe": _MIXTURE,
}


def family(model_type: object) -> Family:
    """The family of a `model_type`."""
    found = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if found is None:
        raise UnsupportedModel(
            f"models of type {model_type!r} are not served", remedy=f"one of {', '.join(FAMILIES)}"
        )
    return found


def architecture(config: Mapping[str, Any]) -> Architecture:
    """Read a config.json; UnsupportedModel if we would not compute it as transformers does."""
    return family(config.get("model_type")).read(config)
