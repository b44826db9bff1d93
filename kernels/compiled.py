"""The operations of `hexswarm.kernels.reference` for prompts on a GPU: Triton where it is faster.

Attention of a prompt is PyTorch's own, and so are products with many rows.
"""

from hexswarm.kernels.elementwise import rms_norm, silu_mul
from hexswarm.kernels.product import add_projected_, project
from hexswarm.kernels.reference import attend, rope_tables
from hexswarm.kernels.rope import rope_append_

__all__ = [
    "add_projected_",
    "attend",
    "project",
    "rms_norm",
    "rope_append_",
    "rope_tables",
    "silu_mul",
]
