"""Which implementation of the operations a shard uses: chosen by name, never by a caught exception.

A backend is anything with the functions of `hexswarm.kernels.reference`. "native" is that reference
too, for long batches; short ones run as whole layers in `hexswarm.kernels.native`. "triton" are the
operations of `hexswarm.kernels.compiled`; decode steps run as whole layers in
`hexswarm.kernels.gpu`. Triton is imported by those who use it: it exists on Linux alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from hexswarm.kernels import choice, native
from hexswarm.kernels.quantise import Quantised
from hexswarm.kernels.ragged import Extent, Piece


class Operations(Protocol):
    """The operations of a decoder layer; see `hexswarm.kernels.reference` for their meaning."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor: ...

    def rope_tables(
        self, positions: Tensor, frequencies: Tensor, scaling: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]: ...

    def rope_append_(
        self,
        qkv: Tensor,
        rope: tuple[Tensor, Tensor],
        slots: Tensor,
        cache: Tensor,
        heads: int,
        norm: Tensor | None = None,
        eps: float = 0.0,
    ) -> None: ...

    def silu_mul(self, gate_up: Tensor) -> Tensor: ...

    def project(
        self, x: Tensor, weight: Tensor | Quantised, bias: Tensor | None = None
    ) -> Tensor: ...

    def add_projected_(
        self, x: Tensor, y: Tensor, weight: Tensor | Quantised, bias: Tensor | None = None
    ) -> Tensor: ...

    def route(self, scores: Tensor, chosen: int, normalised: bool) -> tuple[Tensor, Tensor]: ...

    def mix(
        self,
        x: Tensor,
        shares: Tensor,
        experts: Tensor,
        gate_up: Tensor | Sequence[Quantised],
        down: Tensor | Sequence[Quantised],
        first: int = 0,
    ) -> Tensor: ...

    def attend(self, q: Tensor, cache: Tensor, pieces: Sequence[Piece], scale: float) -> Tensor: ...


BACKENDS: dict[str, str] = {
    "torch": "hexswarm.kernels.reference",
    "native": "hexswarm.kernels.reference",
    "triton": "hexswarm.kernels.compiled",
}
"""The module of each backend's operations."""

Picker = Callable[[Tensor, Tensor], Tensor]

PREFILL = "several"
"""When prompts go through `hexswarm.kernels.prefill` on a GPU instead of PyTorch's attention: when
there are "several" sessions in the batch, or a prefix; "always"; or "never"."""

MIXTURES = "grouped"
"""How a mixture of experts is computed on a GPU: "grouped", by `hexswarm.kernels.experts`, in the
graph, or in a "loop" over experts, which takes 17 to 32 times as long for a decode step."""


def ragged_prefill(extents: Sequence[Extent], rule: str | None = None) -> bool:
    """Whether one launch for all these sessions is expected to be faster than one for each."""
    rule = rule or PREFILL
    if rule != "several":
        return rule == "always"
    return len(extents) > 1 or extents[0].position > 0


def choose(device: torch.device, dtype: torch.dtype, head_dim: int = 64) -> str:
    """The fastest backend for weights of this kind in this installation."""
    if device.type == "cpu":
        return "native" if dtype in native.DTYPES and native.available() else "torch"
    suitable = device.type == "cuda" and _tiles(head_dim) and _young(device)
    return "triton" if suitable and find_spec("triton") is not None else "torch"


def operations(backend: str) -> Operations:
    """The operations of a backend; KeyError for an unknown name."""
    return cast(Operations, import_module(BACKENDS[backend]))


def picker(device: torch.device) -> Picker:
    """The `hexswarm.kernels.choice.pick` for logits that lie there."""
    if device.type == "cuda" and _young(device) and find_spec("triton") is not None:
        return cast(Picker, import_module("hexswarm.kernels.sample").pick)
    return choice.pick


def gpu_layers(*args: Any, **options: Any) -> Any:
    """The `hexswarm.kernels.gpu.GpuLayers` of these arguments."""
    return import_module("hexswarm.kernels.gpu").GpuLayers(*args, **options)


def _tiles(head_dim: int) -> bool:
    """Whether a head is a tile of the matrix units."""
    return head_dim >= 16 and head_dim & (head_dim - 1) == 0


def _young(device: torch.device) -> bool:
    """Whether the device has the instructions (NVIDIA: Ampere and later)."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability(device) >= (8, 0)
