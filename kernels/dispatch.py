"""Which implementation of the operations a shard uses: chosen by name, never by a caught exception.

A backend is anything with the functions of `hexswarm.kernels.reference`. "native" is that reference
too, for long batches; short ones run as whole layers in `hexswarm.kernels.native`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, cast

import torch
from torch import Tensor

from hexswarm.kernels import native, reference
from hexswarm.kernels.ragged import Piece


class Operations(Protocol):
    """The operations of a decoder layer; see `hexswarm.kernels.reference` for their meaning."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor: ...

    def rope_tables(
        self, positions: Tensor, frequencies: Tensor, scaling: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]: ...

    def rotate_(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor: ...

    def silu_mul(self, gate_up: Tensor) -> Tensor: ...

    def append_(self, cache: Tensor, slots: Tensor, keys_values: Tensor) -> None: ...

    def attend(self, q: Tensor, cache: Tensor, pieces: Sequence[Piece], scale: float) -> Tensor: ...


BACKENDS: dict[str, Operations] = {
    "torch": cast(Operations, reference),
    "native": cast(Operations, reference),
}


def choose(device: torch.device, dtype: torch.dtype) -> str:
    """The fastest backend for weights of this kind in this installation."""
    suitable = device.type == "cpu" and dtype == torch.float32
    return "native" if suitable and native.available() else "torch"


def operations(backend: str) -> Operations:
    """The operations of a backend; KeyError for an unknown name."""
    return BACKENDS[backend]
