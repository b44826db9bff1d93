"""The layers of one span on one device: embedding at the head, LM head at the tail.

A shard is weights and arithmetic only; sessions, batches and payloads are the runner's. A session
may enter and leave inside the span (partial entry), so `forward` takes the sub-span to run.
`embed` and `head` exist where the span touches the model's ends. With tied embeddings one tensor
serves both, stored as the LM head likes it: `[hidden, vocabulary]`.

Backend "native" runs batches of few tokens in C (`hexswarm.kernels.native`), in float32 on a CPU,
and longer ones as "torch" does. "triton" runs batches of decode steps as one graph on a GPU
(`hexswarm.kernels.gpu`), and prompts of the same batch after them: the weights are read once more,
which is little beside what a prompt computes. "auto" is the fastest that can be.

`quant` rounds the layers' matrices to few bits as they are loaded. Triton keeps them so; elsewhere
they are widened again, which saves no memory, but computes with the same weights.
"""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from hexswarm.errors import OutOfMemory, UnsupportedModel, UsageError
from hexswarm.kernels.dispatch import choose, gpu_layers, operations
from hexswarm.kernels.native import ROWS, NativeLayers
from hexswarm.kernels.quantise import Quantised
from hexswarm.kernels.ragged import Ragged
from hexswarm.peer.kv import KvPool
from hexswarm.peer.models.architecture import Architecture
from hexswarm.peer.models.layers import DecoderLayer, start_pass
from hexswarm.peer.models.llama import Source
from hexswarm.peer.models.registry import family
from hexswarm.records import DTYPES, Span

EMBEDDING, NORM, LM_HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"

BITS = {"none": 16, "int8": 8, "int4": 4}
"""Of a weight in the layers' matrices, by the name of the rounding."""
DECODE_ROWS = 64
"""Most sessions of a batch that runs as one graph; of more, one graph after another."""
COMMON = (1, 2, 4, 8)
"""Batch sizes for which that graph is made when the peer starts."""


def required_tensors(architecture: Architecture, span: Span) -> tuple[str, ...]:
    """Names of all checkpoint tensors that a shard of this span takes."""
    layer_tensors = family(architecture.family).tensors
    names = [
        name for index in range(span.first, span.end) for name in layer_tensors(architecture, index)
    ]
    tail = span.end == architecture.layers
    if span.first == 0 or (tail and architecture.tied):
        names.append(EMBEDDING)
    if tail:
        names += [NORM] if architecture.tied else [NORM, LM_HEAD]
    return tuple(names)


class Shard:
    """Layers [span.first, span.end) of a model, ready to run.

    `tensors` maps Hugging Face names to tensors on the CPU; what the span needs is taken out of it
    (see `required_tensors`), so that the sources are freed while the fused matrices grow.
    """

    def __init__(
        self,
        architecture: Architecture,
        span: Span,
        total_layers: int,
        tensors: MutableMapping[str, Tensor],
        dtype: str | torch.dtype = "float32",
        device: str | torch.device = "cpu",
        *,
        backend: str = "auto",
        quant: str = "none",
    ) -> None:
        if total_layers != architecture.layers or span.end > total_layers:
            raise UsageError(f"span {span} of {total_layers} layers in {architecture.layers}")
        self.architecture, self.span, self.total_layers = architecture, span, total_layers
        self.dtype, self.device = torch_dtype(dtype), torch.device(device)
        self.dtype_name = str(self.dtype).removeprefix("torch.")
        self.backend = backend
        if backend == "auto":
            self.backend = choose(self.device, self.dtype, architecture.head_dim)
        by_rows, bits = self.backend == "triton", BITS[quant]
        self.operations = operations(self.backend)
        frequencies, self._rope_scaling = architecture.rope.frequencies(architecture.head_dim)
        self._frequencies = frequencies.to(self.device)
        try:
            self._load(Source(tensors, self.dtype, self.device, by_rows=by_rows, bits=bits))
        except torch.OutOfMemoryError as error:
            raise OutOfMemory(
                f"layers {span} do not fit {self.device}", remedy="choose a shorter span"
            ) from error
        self._native: NativeLayers | None = None
        if self.backend == "native":
            self._native = NativeLayers(self.layers, torch.get_num_threads())
        self._graphed: WeakKeyDictionary[KvPool, Any] = WeakKeyDictionary()
        """Of each pool: a graph holds the addresses of what it reads and writes."""

    def _load(self, source: Source) -> None:
        a, span = self.architecture, self.span
        build = family(a.family).build
        with torch.inference_mode():
            self.layers = [build(a, index, source) for index in range(span.first, span.end)]
            self._embedding = self._norm = self._lm_head = None
            if self.is_tail:
                self._norm = source.take(NORM, a.hidden)
                name = EMBEDDING if a.tied else LM_HEAD
                self._lm_head = source.take_transposed([(name, a.vocabulary)], a.hidden)
            if self.is_head and not (self.is_tail and a.tied):
                self._embedding = source.take(EMBEDDING, a.vocabulary, a.hidden)

    @property
    def is_head(self) -> bool:
        return self.span.first == 0

    @property
    def is_tail(self) -> bool:
        return self.span.end == self.total_layers

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights held."""
        held = [self._embedding, self._norm, self._lm_head]
        for layer in self.layers:
            held += [getattr(layer, name) for name in layer.__slots__]
        return sum(t.nbytes for t in held if isinstance(t, Tensor | Quantised))

    def make_pool(self, blocks: int, block_size: int = 16) -> KvPool:
        """A KV pool for this shard's layers, in its dtype, on its device."""
        a = self.architecture
        return KvPool(
            len(self.span),
            blocks,
            kv_heads=a.kv_heads,
            head_dim=a.head_dim,
            dtype=self.dtype,
            device=self.device,
            block_size=block_size,
        )

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids `[tokens]` to hidden states, at the head only."""
        if self._embedding is not None:
            return self._embedding.index_select(0, ids)
        if not (self.is_head and self._lm_head is not None):
            raise UsageError(f"span {self.span} does not hold the embedding")
        return self._lm_head.index_select(1, ids).t().contiguous()

    def forward(self, x: Tensor, batch: Ragged, pool: KvPool, span: Span | None = None) -> Tensor:
        """Run the layers of `span` (default: all) on `[tokens, hidden]`, changing `x` in place."""
        span = span or self.span
        if not self.span.covers(span):
            raise UsageError(f"span {span} is not inside {self.span}")
        offset = self.span.first
        layers = self.layers[span.first - offset : span.end - offset]
        caches = [pool.layer(i) for i in range(span.first - offset, span.end - offset)]
        if self._native is not None and batch.tokens <= ROWS:
            rope = self.operations.rope_tables(
                batch.positions, self._frequencies, self._rope_scaling, self.dtype
            )
            return self._native.decode(x, batch, rope, caches, span.first - offset)
        with self._here():
            if self.backend != "triton":
                return self._eager(layers, x, batch, caches)
            steps = [i for i, extent in enumerate(batch.extents) if extent.count == 1]
            prompts = [i for i, extent in enumerate(batch.extents) if extent.count > 1]
            graphed = self._graphs(pool) if steps else None
            if not prompts and len(steps) <= DECODE_ROWS:
                return graphed.decode(x, batch, caches, span.first - offset)
            for at in range(0, len(steps), DECODE_ROWS):
                part, rows = batch.part(steps[at : at + DECODE_ROWS])
                x[rows] = graphed.decode(x[rows], part, caches, span.first - offset)
            if prompts:
                part, rows = batch.part(prompts)
                x[rows] = self._eager(layers, x[rows], part, caches)
            return x

    def _eager(
        self, layers: list[DecoderLayer], x: Tensor, batch: Ragged, caches: list[Tensor]
    ) -> Tensor:
        run = start_pass(
            batch,
            {layer.window for layer in layers},
            self._frequencies,
            self._rope_scaling,
            self.dtype,
            self.operations,
        )
        for layer, cache in zip(layers, caches, strict=True):
            layer.forward(x, run, cache)
        return x

    def warm(self, pool: KvPool, buckets: Iterable[int] = COMMON) -> None:
        """Compile and capture what decode steps of the whole span need; `pool` stays as it is."""
        if self.backend == "triton":
            caches = [pool.layer(i) for i in range(pool.layers)]
            with torch.inference_mode(), self._here():
                self._graphs(pool).warm(caches, buckets)

    def _graphs(self, pool: KvPool) -> Any:
        """The layers for decode steps on this pool."""
        found = self._graphed.get(pool)
        if found is None:
            found = self._graphed[pool] = gpu_layers(
                *(self.layers, self._frequencies, self._rope_scaling),
                *(pool.blocks, pool.block_size),
                graphs=self.device.type == "cuda",
            )
        return found

    def _here(self) -> AbstractContextManager[Any]:
        """Triton launches on the current device."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def head(self, x: Tensor) -> Tensor:
        """Final norm and LM head of the rows to sample: float32 logits `[rows, vocabulary]`."""
        if self._norm is None or self._lm_head is None:
            raise UsageError(f"span {self.span} does not hold the LM head")
        if self._native is not None and len(x) <= ROWS:
            return self._native.head(x, self._norm, self._lm_head, self.architecture.norm_eps)
        with self._here():
            y = self.operations.rms_norm(x, self._norm, self.architecture.norm_eps)
            return self.operations.project(y, self._lm_head).float()


def torch_dtype(name: str | torch.dtype) -> torch.dtype:
    """The torch dtype of a wire name."""
    plain = str(name).removeprefix("torch.")
    if plain not in DTYPES:
        raise UnsupportedModel(f"dtype {plain} is not served", remedy=f"one of {', '.join(DTYPES)}")
    found: torch.dtype = getattr(torch, plain)
    return found
