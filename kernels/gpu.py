"""The layers of a stage for a batch of decode steps on a GPU: nine launches a layer, one graph.

    norm - product - rotate and append - attend - join - product + residual -
    norm - product with SiLU behind it - product + residual

A decode step reads the weights and the keys once; an H100 does that for a layer of an 8B model in
150 us, in which a CPU launches thirty kernels. So the step is a CUDA graph, captured once for each
bucket of batch sizes and each part of the span that sessions use, and replayed. What changes from
step to step (lengths, block tables, slots) lies in device memory (`hexswarm.kernels.paged.Plan`).

More rows than `linear.ROWS` go through the library's matrix products, with norm and SiLU beside
them. A row's result depends on the bucket then, not below.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hexswarm.kernels import elementwise, reference
from hexswarm.kernels.linear import ROWS, Quantised, linear
from hexswarm.kernels.paged import PagedDecode, Plan
from hexswarm.kernels.ragged import Ragged
from hexswarm.kernels.rope import rope_append_

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64)
"""Rows of the captured graphs."""


class GpuLayers:
    """The layers of a shard (`DecoderLayer`s) on one GPU, for batches of decode steps."""

    def __init__(
        self,
        layers: Sequence[Any],
        frequencies: Tensor,
        scaling: float,
        blocks: int,
        block: int,
        *,
        graphs: bool = True,
    ) -> None:
        """`blocks` of `block` tokens are in the pool; the rotation has `frequencies`, `scaling`."""
        first = layers[0]
        device, dtype = first.input_norm.device, first.input_norm.dtype
        most = BUCKETS[-1]
        processors = torch.cuda.get_device_properties(device).multi_processor_count
        self._layers = tuple(layers)
        self._frequencies, self._scaling, self._graphs_on = frequencies, scaling, graphs
        self._plan = Plan(most, blocks, device, max(4 * processors // first.kv_heads, 1))
        self._paged = PagedDecode(self._plan, first.heads, first.kv_heads, first.head_dim, block)
        width = (first.heads + 2 * first.kv_heads) * first.head_dim
        hidden, middle = first.input_norm.shape[0], _weight(first.down).shape[1]

        def room(columns: int) -> Tensor:
            return torch.zeros(most, columns, dtype=dtype, device=device)

        self.x = room(hidden)
        """The batch: hidden states in, hidden states out."""
        self._qkv, self._attended, self._middle = (
            room(width),
            room(first.heads * first.head_dim),
            room(middle),
        )
        self._places = torch.full((2, most), -1, dtype=torch.int64, device=device)
        """Positions and slots."""
        self._captured: dict[tuple[int, int, int], Any] = {}
        self._memory = torch.cuda.graph_pool_handle() if graphs else None

    def decode(self, x: Tensor, batch: Ragged, caches: Sequence[Tensor], first: int) -> Tensor:
        """Run layers [first, first + len(caches)) on `x` `[rows, hidden]`, one token a session."""
        rows = batch.tokens
        bucket = next(size for size in BUCKETS if size >= rows)
        self._places[0, :rows].copy_(batch.positions)
        self._places[1, :rows].copy_(batch.slots)
        self._places[:, rows:bucket] = -1
        extents = batch.extents
        self._plan.set([e.length for e in extents], [e.blocks for e in extents])
        self.x[:rows].copy_(x)
        self.step(bucket, caches, first)
        return x.copy_(self.x[:rows])

    def step(self, bucket: int, caches: Sequence[Tensor], first: int) -> None:
        """The layers on what lies in the buffers."""
        if not self._graphs_on:
            self._run(bucket, caches, first)
            return
        key = (bucket, first, len(caches))
        graph = self._captured.get(key)
        if graph is None:
            graph = self._captured[key] = self._capture(bucket, caches, first)
        graph.replay()

    def _capture(self, bucket: int, caches: Sequence[Tensor], first: int) -> Any:
        """Capturing runs nothing, but kernels must be compiled before: one layer does that."""
        kept = self.x.clone()
        places = self._places.clone()
        self._places[1].fill_(-1)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._run(bucket, caches[:1], first)
        torch.cuda.current_stream().wait_stream(stream)
        self.x.copy_(kept)
        self._places.copy_(places)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory):
            self._run(bucket, caches, first)
        return graph

    def _run(self, rows: int, caches: Sequence[Tensor], first: int) -> None:
        positions, slots = self._places[0, :rows], self._places[1, :rows]
        dtype = self.x.dtype
        rope = reference.rope_tables(positions, self._frequencies, self._scaling, dtype)
        run = self._few if rows <= ROWS else self._many
        for layer, cache in zip(self._layers[first : first + len(caches)], caches, strict=True):
            run(layer, self.x[:rows], rope, slots, cache)

    def _few(self, layer: Any, x: Tensor, rope: Any, slots: Tensor, cache: Tensor) -> None:
        rows = x.shape[0]
        qkv, attended, middle = self._qkv[:rows], self._attended[:rows], self._middle[:rows]
        linear(elementwise.rms_norm(x, layer.input_norm, layer.eps), _weight(layer.qkv), qkv)
        rope_append_(qkv, rope, slots, cache, layer.heads, layer.qk_norm, layer.eps)
        self._paged.attend(qkv, cache, attended, layer.head_dim**-0.5, layer.window)
        linear(attended, _weight(layer.o), x, add=True)
        y = elementwise.rms_norm(x, layer.post_norm, layer.eps)
        linear(y, _weight(layer.gate_up), middle, gated=True)
        linear(middle, _weight(layer.down), x, add=True)

    def _many(self, layer: Any, x: Tensor, rope: Any, slots: Tensor, cache: Tensor) -> None:
        rows = x.shape[0]
        qkv, attended = self._qkv[:rows], self._attended[:rows]
        torch.mm(elementwise.rms_norm(x, layer.input_norm, layer.eps), layer.qkv, out=qkv)
        rope_append_(qkv, rope, slots, cache, layer.heads, layer.qk_norm, layer.eps)
        self._paged.attend(qkv, cache, attended, layer.head_dim**-0.5, layer.window)
        x.addmm_(attended, layer.o)
        y = elementwise.rms_norm(x, layer.post_norm, layer.eps)
        x.addmm_(elementwise.silu_mul(torch.mm(y, layer.gate_up)), layer.down)


def _weight(weight: Tensor | Quantised) -> Tensor | Quantised:
    """`[out, in]`, as it lies in memory; layers name matrices `[in, out]`."""
    return weight if isinstance(weight, Quantised) else weight.t()
