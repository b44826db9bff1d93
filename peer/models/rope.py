"""Rotary frequencies from a configuration: which angle each pair of a head turns per position.

A position turns pair i of a head by `position * frequency[i]`. Models that were stretched to longer
contexts scale the frequencies: all alike (`linear`), only the slow ones (`llama3`), by a ramp
between slow and fast (`yarn`, which also sharpens attention by `scaling` on cosines and sines).
`dynamic` NTK depends on the longest sequence seen so far, which would make an answer depend on how
its prompt was cut; below the trained length it equals the default, so we serve it up to there.

Everything follows `transformers.modeling_rope_utils` of 5.23, which tests compare with.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hexswarm.errors import UnsupportedModel


@dataclass(frozen=True, slots=True)
class Rope:
    """A model's rotary embedding; `parameters` are those of Hugging Face, old spelling mended."""

    kind: str
    theta: float
    parameters: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UnsupportedModel(
                f"rotary scaling {self.kind!r} is not served", remedy=f"one of {', '.join(KINDS)}"
            )
        missing = set(KINDS[self.kind]) - {name for name, _ in self.parameters}
        if missing:
            raise UnsupportedModel(f"rotary scaling {self.kind!r} lacks {', '.join(missing)}")

    def frequencies(self, head_dim: int) -> tuple[Tensor, float]:
        """Radians per position, float32 `[head_dim / 2]`, and the scaling of cosines and sines."""
        given = dict(self.parameters)
        plain = 1.0 / (self.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float) / head_dim))
        if self.kind == "linear":
            return plain / given["factor"], 1.0
        if self.kind == "llama3":
            return _llama3(plain, given), 1.0
        if self.kind == "yarn":
            return _yarn(self.theta, head_dim, given)
        return plain, 1.0


KINDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": (),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
    "yarn": ("factor", "original_max_position_embeddings"),
}
"""The scalings served, with the parameters that each needs."""


def read_rope(config: Mapping[str, Any]) -> Rope:
    """The rotary embedding of a config.json, in the spelling of transformers 4 or 5."""
    given = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    kind = given.pop("rope_type", None) or given.pop("type", None) or "default"
    given.pop("type", None)
    theta = given.pop("rope_theta", None) or config.get("rope_theta") or 10_000.0
    partial = given.pop("partial_rotary_factor", None) or config.get("partial_rotary_factor")
    if partial not in (None, 1, 1.0):
        raise UnsupportedModel("partial rotary embeddings are not served")
    odd = [name for name, value in given.items() if not isinstance(value, int | float | None)]
    if odd:
        raise UnsupportedModel(f"rotary parameters {', '.join(odd)} are not single numbers")
    if kind in ("llama3", "yarn"):
        trained = config.get("original_max_position_embeddings")
        if trained is not None:
            given["original_max_position_embeddings"] = trained
        given.setdefault("original_max_position_embeddings", config.get("max_position_embeddings"))
    numbers = {name: float(value) for name, value in given.items() if value is not None}
    return Rope(str(kind), float(theta), tuple(sorted(numbers.items())))


def _llama3(plain: Tensor, given: Mapping[str, float]) -> Tensor:
    """Slow pairs are slowed by `factor`, fast ones kept, those between interpolated."""
    factor, low, high = given["factor"], given["low_freq_factor"], given["high_freq_factor"]
    trained = given["original_max_position_embeddings"]
    wavelength = 2 * math.pi / plain
    smooth = ((trained / wavelength - low) / (high - low)).clamp(0, 1)
    return (1 - smooth) * plain / factor + smooth * plain


def _yarn(theta: float, head_dim: int, given: Mapping[str, float]) -> tuple[Tensor, float]:
    """Interpolate slow pairs, extrapolate fast ones, with a linear ramp between."""
    factor, trained = given["factor"], given["original_max_position_embeddings"]

    def dimension(rotations: float) -> float:
        turns = math.log(trained / (rotations * 2 * math.pi))
        return head_dim * turns / (2 * math.log(theta))

    low, high = dimension(given.get("beta_fast") or 32), dimension(given.get("beta_slow") or 1)
    if given.get("truncate", 1.0):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    high = high + 0.001 if low == high else high
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float) - low) / (high - low)).clamp(0, 1)
    powers = theta ** (torch.arange(0, head_dim, 2, dtype=torch.float) / head_dim)
    frequencies = ramp / (factor * powers) + (1 - ramp) / powers
    return frequencies, _yarn_scaling(factor, given)


def _yarn_scaling(factor: float, given: Mapping[str, float]) -> float:
    def scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if "attention_factor" in given:
        return given["attention_factor"]
    if given.get("mscale") and given.get("mscale_all_dim"):
        return scale(given["mscale"]) / scale(given["mscale_all_dim"])
    return scale(1.0)
