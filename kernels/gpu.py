"""The layers of a stage for a batch of decode steps on a GPU: nine launches a layer, one graph.

    norm - product - rotate and append - attend - join - product + residual -
    norm - product with SiLU behind it - product + residual

(A mixture of experts has six in place of the last two: scores, and those of
`hexswarm.kernels.experts`.)

A decode step reads the weights and the keys once; an H100 does that for a layer of an 8B model in
150 us, in which a CPU launches thirty kernels. So the step is a CUDA graph for each bucket of batch
sizes and each part of the span that sessions use, and replayed. What changes from step to step
(lengths, block tables, slots) lies in device memory (`hexswarm.kernels.paged.Plan`).

A bucket of a part is run as it is when it is met first: that compiles what it needs, and a part
that one session used once costs no graph. The second time it is captured. The `GRAPHS` used last
are kept; what they need in between they share, since one runs at a time.

Rows that one tile of tokens holds (`hexswarm.kernels.product.FEW`) are computed alike in every
bucket, so there a row does not depend on its neighbours, bit for bit.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from hexswarm.kernels import elementwise, experts, reference
from hexswarm.kernels.linked import Linked
from hexswarm.kernels.paged import PagedDecode, Plan
from hexswarm.kernels.product import product, project
from hexswarm.kernels.quantise import Quantised
from hexswarm.kernels.ragged import Ragged
from hexswarm.kernels.rope import rope_append_

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64)
"""Rows of the captured graphs."""
GRAPHS = 64
"""Captured graphs that are kept."""


class GpuLayers:
    """The layers of a shard on one GPU, `DecoderLayer`s and mixtures, for batches of decode steps.

    Matrices lie `[out, in]` and are named `[in, out]`, or are `Quantised`. One thread owns it, with
    the layers' device as the current one.
    """

    def __init__(
        self,
        layers: Sequence[Any],
        frequencies: Tensor,
        scaling: float,
        blocks: int,
        block: int,
        *,
        graphs: bool = True,
        total: Callable[[Tensor], Tensor] | None = None,
        linked: Linked | None = None,
    ) -> None:
        """`blocks` of `block` tokens are in the pool; the rotation has `frequencies`, `scaling`.

        `total`, if given, sums over the ranks of a tensor-parallel group what each computed;
        `linked` does so in one launch where the ranks' memory is linked.

        Without `graphs` the layers may lie on a CPU, where Triton interprets its kernels.
        """
        first = layers[0]
        device, dtype = first.input_norm.device, first.input_norm.dtype
        most = BUCKETS[-1]
        self._layers = tuple(layers)
        self._frequencies, self._scaling, self._graphs_on = frequencies, scaling, graphs
        self._total, self._linked = total, linked
        parallel = max(4 * _processors(device) // first.kv_heads, 1)
        self._plan = Plan(most, most * blocks, device, parallel)
        self._paged = PagedDecode(self._plan, first.heads, first.kv_heads, first.head_dim, block)
        width = (first.heads + 2 * first.kv_heads) * first.head_dim

        def room(columns: int) -> Tensor:
            return torch.zeros(most, columns, dtype=dtype, device=device)

        self.x = room(first.input_norm.shape[0])
        """The batch: hidden states in, hidden states out."""
        self._qkv, self._attended = room(width), room(first.heads * first.head_dim)
        dense = [_inputs(layer.down) for layer in layers if not _mixed(layer)]
        self._middle = room(max(dense, default=0))
        self._places = torch.full((2, most), -1, dtype=torch.int64, device=device)
        """Positions and slots."""
        self._met: set[tuple[int, int, int]] = set()
        self._graphs: OrderedDict[tuple[int, int, int], Any] = OrderedDict()
        self._memory = torch.cuda.graph_pool_handle() if graphs else None

    def decode(self, x: Tensor, batch: Ragged, caches: Sequence[Tensor], first: int) -> Tensor:
        """Run layers [first, first + len(caches)) on `x` `[rows, hidden]`, one token a session.

        The caches of a layer are the same each time: the graphs know their addresses.
        """
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

    def warm(self, caches: Sequence[Tensor], buckets: Iterable[int]) -> None:
        """Compile and capture all layers for these buckets; the cache stays as it is."""
        for bucket in buckets:
            self._plan.set([1] * bucket, [[0]] * bucket)
            self._places.fill_(-1)
            self.x.zero_()
            for _ in range(2):
                self.step(bucket, caches, 0)

    def step(self, bucket: int, caches: Sequence[Tensor], first: int) -> None:
        """The layers on what lies in the buffers."""
        key = (bucket, first, len(caches))
        if not self._graphs_on or key not in self._met:
            self._met.add(key)
            self._run(bucket, caches, first)
            return
        if key not in self._graphs:
            self._graphs[key] = self._capture(bucket, caches, first)
        self._graphs.move_to_end(key)
        self._graphs[key].replay()

    def _capture(self, bucket: int, caches: Sequence[Tensor], first: int) -> Any:
        """Capturing runs nothing."""
        if len(self._graphs) >= GRAPHS:
            torch.cuda.synchronize()
            self._graphs.popitem(last=False)
        graph = torch.cuda.CUDAGraph()
        # What other threads ask of the device meanwhile is none of this graph's.
        with torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local"):
            self._run(bucket, caches, first)
        return graph

    def _run(self, rows: int, caches: Sequence[Tensor], first: int) -> None:
        positions, slots = self._places[0, :rows], self._places[1, :rows]
        dtype = self.x.dtype
        rope = reference.rope_tables(positions, self._frequencies, self._scaling, dtype)
        for layer, cache in zip(self._layers[first : first + len(caches)], caches, strict=True):
            self._layer(layer, self.x[:rows], rope, slots, cache)

    def _layer(
        self, layer: Any, x: Tensor, rope: tuple[Tensor, Tensor], slots: Tensor, cache: Tensor
    ) -> None:
        rows = x.shape[0]
        qkv, attended = self._qkv[:rows], self._attended[:rows]
        y = elementwise.rms_norm(x, layer.input_norm, layer.eps)
        product(y, layer.qkv, qkv, bias=layer.qkv_bias)
        rope_append_(qkv, rope, slots, cache, layer.heads, layer.qk_norm, layer.eps)
        self._paged.attend(qkv, cache, attended, layer.head_dim**-0.5, layer.window)
        self._add(x, attended, layer.o, layer.o_bias, 0)
        y = elementwise.rms_norm(x, layer.post_norm, layer.eps)
        if _mixed(layer):
            self._add_mixture(x, y, layer, slots)
            return
        middle = self._middle[:rows, : _inputs(layer.down)]
        product(y, layer.gate_up, middle, bias=layer.gate_up_bias, gated=True)
        self._add(x, middle, layer.down, layer.down_bias, 1)

    def _add_mixture(self, x: Tensor, y: Tensor, layer: Any, slots: Tensor) -> None:
        """x += what the chosen experts of all ranks make of y; rows without a session choose none.

        Room in between is the graph's, of the same size each time.
        """
        scores = project(y, layer.router)
        chosen = experts.route(scores, layer.chosen, layer.normalised, slots)
        given = (y, *chosen, layer.gate_up, layer.down, layer.first)
        if self._linked is not None:
            experts.mix(*given, out=self._linked.place(1, x.shape[0]))
            self._linked.add_(x, 1)
        elif self._total is not None:
            x.add_(self._total(experts.mix(*given)))
        else:
            experts.mix(*given, out=x, add=True)

    def _add(
        self,
        x: Tensor,
        y: Tensor,
        weight: Tensor | Quantised,
        bias: Tensor | None,
        turn: int,
    ) -> None:
        """x += y @ weight + bias, of all ranks."""
        if self._linked is not None:
            product(y, weight, self._linked.place(turn, x.shape[0]), bias=bias)
            self._linked.add_(x, turn)
        elif self._total is not None:
            x.add_(self._total(project(y, weight, bias)))
        else:
            product(y, weight, x, bias=bias, add=True)


def _mixed(layer: Any) -> bool:
    """Whether the layer is a mixture of experts."""
    return hasattr(layer, "router")


def _inputs(weight: Tensor | Quantised) -> int:
    return weight.shape[1] if isinstance(weight, Quantised) else weight.shape[0]


def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
