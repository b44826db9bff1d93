"""Which matrices of a span are loaded in few bits at once, because their file has them so.

Weights are usually read in the peer's dtype, and the model code rounds them (`--quant`). A GGUF in
Q4_0 is rounded already, in the very form of our int4 (`hexswarm.kernels.quantise`): to widen it and
round it again would lose twice. So with `--quant int4` its matrices are given packed, and those
that it has in other types are rounded in groups as small as its own, since several matrices become
one: query, key and value, gate and up.

Peers that say "bfloat16+int4" of such a file compute with the file's numbers; of the same model
from safetensors they round bfloat16, with other groups. A route cannot mix the two, since they are
two models: the digest, which announcements and routes go by, is that of the file
(`hexswarm.manifest`).

A cut by tensor parallelism may take columns that are no eight groups of whole blocks (`kept_group`
is None). Those are widened, and rounded slice by slice as all cuts are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hexswarm.architecture import span_shapes
from hexswarm.kernels.quantise import FILE_GROUPS, GROUPS, Quantised, kept_group, quantise, repack
from hexswarm.peer.slices import Slice
from hexswarm.records import Span
from hexswarm.store import ModelFolder


def roundable(name: str, shape: Sequence[int]) -> bool:
    """Whether a tensor is a matrix of a layer; the router of a mixture is never rounded."""
    matrix = len(shape) == 2 and name.startswith("model.layers.")
    return matrix and not name.endswith(".gate.weight")


def groups_of(folder: ModelFolder) -> tuple[int, ...]:
    """Inputs that may share a scale in int4, largest first."""
    return FILE_GROUPS if folder.packed else GROUPS


def kept(folder: ModelFolder, name: str, wanted: Slice) -> bool:
    """Whether what is `wanted` of a tensor can be used in the 4 bits that the file has."""
    return name in folder.packed and kept_group(columns_of(wanted)) is not None


def kept_of(folder: ModelFolder, span: Span) -> tuple[int, int]:
    """How many of the span's matrices that is true of, and how many there are."""
    shapes = span_shapes(folder.config, span)
    matrices = {name: shape for name, shape in shapes.items() if roundable(name, shape)}
    held = [kept(folder, name, Slice(shape, range(shape[0]))) for name, shape in matrices.items()]
    return sum(held), len(held)


def columns_of(wanted: Slice) -> range:
    return range(wanted.whole[1]) if wanted.columns is None else wanted.columns


def in_few_bits(
    value: Tensor, packed: bool, wanted: Slice, dtype: torch.dtype, device: torch.device
) -> Quantised:
    """A matrix in int4: of `packed` blocks the same numbers, else rounded beside them."""
    if packed:
        return repack(value.to(device), columns_of(wanted))
    return quantise(value.to(device=device, dtype=dtype), 4, FILE_GROUPS)
