"""The layers of one span on one device: embedding at the head, LM head at the tail.

A shard is weights and arithmetic only; sessions, batches and payloads are the runner's. A session
may enter and leave inside the span (partial entry), so `forward` takes the sub-span to run.
`embed` and `head` exist where the span touches the model's ends. With tied embeddings one tensor
serves both, stored as the LM head likes it: `[hidden, vocabulary]`.

Backend "native" runs batches of few tokens in C (`hexswarm.kernels.native`) on a CPU, in float32 or
with weights in bfloat16. Of longer batches it runs the decode steps, `ROWS` at a time, so that what
a session decodes does not depend on who else is there, bit for bit; prompts go as "torch" has them,
in bfloat16 with float32 between the matrices (`hexswarm.kernels.native_prompts`).
"triton" runs decode steps as one graph on a GPU (`hexswarm.kernels.gpu`), and prompts of the same
batch after them. Either way the weights are then read once more, which is little beside what a
prompt computes. "auto" is the fastest that can be.

Mixtures of experts run as "torch" does on a CPU, layer by layer among the others; on a GPU they are
part of the graph, unless they are in few bits: those keep the whole span out of it, with the
operations of "triton".

A shard may be one *part* of its layers (`hexswarm.peer.cuts`): it is given the slices of the
tensors that belong to the part, has fewer heads, columns and words, and adds up with the other
ranks through `sums`, which all call alike. `embed` and `forward` give every rank the same, bit for
bit, `head` the logits of all words. On a CPU parts run layer by layer as "torch" does, since what
runs in C adds to the hidden states itself; on a GPU sums are in the graph if they can be and if all
KV heads have equally many queries. Few-bit weights are rounded slice by slice: as exact as those of
the whole matrix, but not the same numbers.

`quant` rounds the layers' matrices to few bits as they are loaded. Triton keeps them so; elsewhere
they are widened again, which saves no memory, but computes with the same weights. Matrices that the
file has in 4 bits already come so (`hexswarm.peer.packing`), and are not rounded again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, MutableMapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from itertools import groupby
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from hexswarm.errors import OutOfMemory, UnsupportedModel, UsageError
from hexswarm.kernels import dispatch
from hexswarm.kernels.dispatch import Operations, choose, gpu_layers, operations
from hexswarm.kernels.native import ROWS, NativeLayers
from hexswarm.kernels.native_prompts import WideOperations
from hexswarm.kernels.quantise import Quantised
from hexswarm.kernels.ragged import Ragged
from hexswarm.peer.cuts import Part
from hexswarm.peer.kv import KvPool
from hexswarm.peer.models.architecture import Architecture
from hexswarm.peer.models.experts import MixtureLayer
from hexswarm.peer.models.layers import AttendingLayer, start_pass
from hexswarm.peer.models.llama import Source
from hexswarm.peer.models.registry import family
from hexswarm.peer.sums import Sums
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


Layers = Callable[[Tensor, Ragged], Tensor]
"""Runs some layers on a batch, whose hidden states it may change in place."""


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
        tensors: MutableMapping[str, Tensor] | MutableMapping[str, Tensor | Quantised],
        dtype: str | torch.dtype = "float32",
        device: str | torch.device = "cpu",
        *,
        backend: str = "auto",
        quant: str = "none",
        part: Part | None = None,
        sums: Sums | None = None,
    ) -> None:
        """`sums` are needed for a `part` of several."""
        if total_layers != architecture.layers or span.end > total_layers:
            raise UsageError(f"span {span} of {total_layers} layers in {architecture.layers}")
        self.architecture, self.span, self.total_layers = architecture, span, total_layers
        self.part, self.sums = part or architecture.whole, sums
        if self.part.whole == (sums is not None):
            raise UsageError("parts of a cut have sums, and only they")
        self.dtype, self.device = torch_dtype(dtype), torch.device(device)
        self.dtype_name = str(self.dtype).removeprefix("torch.")
        self.backend = backend
        if backend == "auto":
            self.backend = choose(self.device, self.dtype, architecture.head_dim)
        if self.backend == "native" and not self.part.whole:
            self.backend = "torch"
        by_rows, bits = self.backend == "triton", BITS[quant]
        self.operations = operations(self.backend)
        frequencies, self._rope_scaling = architecture.rope.frequencies(architecture.head_dim)
        self._frequencies = frequencies.to(self.device)
        try:
            self._load(
                Source(
                    *(tensors, self.dtype, self.device),
                    by_rows=by_rows,
                    bits=bits,
                    part=self.part,
                )
            )
        except torch.OutOfMemoryError as error:
            raise OutOfMemory(
                f"layers {span} do not fit {self.device}", remedy="choose a shorter span"
            ) from error
        self._native: NativeLayers | None = None
        dense = [layer for layer in self.layers if not isinstance(layer, MixtureLayer)]
        self._mixed = len(dense) < len(self.layers)
        if self.backend == "native" and dense:
            self._native = NativeLayers(dense, torch.get_num_threads())
        self._wide: WideOperations | None = None
        if self._native is not None and not self._mixed and self.dtype == torch.bfloat16:
            self._wide = WideOperations(torch.get_num_threads())
        self._graphed: WeakKeyDictionary[KvPool, Any] = WeakKeyDictionary()
        """Of each pool: a graph holds the addresses of what it reads and writes."""

    def _load(self, source: Source) -> None:
        a, span, words = self.architecture, self.span, len(self.part.words)
        build = family(a.family).build
        with torch.inference_mode():
            self.layers = [build(a, index, source) for index in range(span.first, span.end)]
            self._embedding = self._norm = self._lm_head = None
            if self.is_tail:
                self._norm = source.take(NORM, a.hidden)
                name = EMBEDDING if a.tied else LM_HEAD
                self._lm_head = source.take_transposed([(name, words)], a.hidden)
            if self.is_head and not (self.is_tail and a.tied):
                self._embedding = source.take(EMBEDDING, words, a.hidden)

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
            for field in fields(layer):
                value = getattr(layer, field.name)
                held += value if isinstance(value, tuple) else [value]
        return sum(t.nbytes for t in held if isinstance(t, Tensor | Quantised))

    @property
    def threads(self) -> int:
        """Of decode steps on a CPU; settable if the backend is "native"."""
        return torch.get_num_threads() if self._native is None else self._native.threads

    @threads.setter
    def threads(self, count: int) -> None:
        if self._native is not None:
            self._native.resize(count)

    def make_pool(self, blocks: int, block_size: int = 16) -> KvPool:
        """A KV pool for this shard's layers, in its dtype, on its device."""
        a = self.architecture
        return KvPool(
            len(self.span),
            blocks,
            kv_heads=len(self.part.kv_heads),
            head_dim=a.head_dim,
            dtype=self.dtype,
            device=self.device,
            block_size=block_size,
        )

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids `[tokens]` to hidden states, at the head only."""
        if self.sums is None:
            return self._embed(ids)
        words = self.part.words
        foreign = (ids < words.start) | (ids >= words.stop)
        x = self._embed((ids - words.start).masked_fill_(foreign, 0))
        return self.sums.total(x.masked_fill_(foreign[:, None], 0)).to(self.dtype)

    def _embed(self, ids: Tensor) -> Tensor:
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
        first = span.first - offset

        def eager(x: Tensor, batch: Ragged) -> Tensor:
            return self._eager(layers, x, batch, caches)

        def in_c(x: Tensor, batch: Ragged) -> Tensor:
            return self._in_c(layers, x, batch, caches, first)

        def graphed(x: Tensor, batch: Ragged) -> Tensor:
            out: Tensor = self._graphs(pool).decode(x, batch, caches, first)
            return out

        with self._here():
            if self._native is not None:
                return (
                    in_c(x, batch) if batch.tokens <= ROWS else _split(x, batch, in_c, ROWS, eager)
                )
            if self._as_graph:
                return _split(x, batch, graphed, DECODE_ROWS, eager)
            return eager(x, batch)

    def _in_c(
        self,
        layers: list[AttendingLayer],
        x: Tensor,
        batch: Ragged,
        caches: list[Tensor],
        first: int,
    ) -> Tensor:
        """Runs of layers that are no mixtures in C, the others as `_eager` does."""
        assert self._native is not None
        rope = self.operations.rope_tables(
            batch.positions, self._frequencies, self._rope_scaling, torch.float32
        )
        if not self._mixed:
            return self._native.decode(x, batch, rope, caches, first)
        before = sum(not isinstance(layer, MixtureLayer) for layer in self.layers[:first])
        pairs = list(zip(layers, caches, strict=True))
        for mixed, run in groupby(pairs, key=lambda pair: isinstance(pair[0], MixtureLayer)):
            some, theirs = map(list, zip(*run, strict=True))
            if mixed:
                self._eager(some, x, batch, theirs)
            else:
                self._native.decode(x, batch, rope, theirs, before)
                before += len(some)
        return x

    def _eager(
        self, layers: list[AttendingLayer], x: Tensor, batch: Ragged, caches: list[Tensor]
    ) -> Tensor:
        dtype = self.dtype if self._wide is None else torch.float32
        run = start_pass(
            batch,
            {layer.window for layer in layers},
            self._frequencies,
            self._rope_scaling,
            dtype,
            cast(Operations, self._wide or self.operations),  # those have no mixtures
            self.sums,
        )
        wide = x.to(dtype)  # x itself if that is what it is
        for layer, cache in zip(layers, caches, strict=True):
            layer.forward(wide, run, cache)
        return x if wide is x else x.copy_(wide)

    def warm(self, pool: KvPool, buckets: Iterable[int] = COMMON) -> None:
        """Compile and capture what decode steps of the whole span need; `pool` stays as it is."""
        if self._as_graph:
            caches = [pool.layer(i) for i in range(pool.layers)]
            with torch.inference_mode(), self._here():
                self._graphs(pool).warm(caches, buckets)

    @property
    def _as_graph(self) -> bool:
        """Whether decode steps run as one."""
        even = all(len(layer.runs) < 2 for layer in self.layers)
        mixtures = [layer for layer in self.layers if isinstance(layer, MixtureLayer)]
        whole = all(layer.whole and dispatch.MIXTURES == "grouped" for layer in mixtures)
        joined = self.sums is None or self.sums.capturable
        return self.backend == "triton" and whole and even and joined

    def _graphs(self, pool: KvPool) -> Any:
        """The layers for decode steps on this pool."""
        found = self._graphed.get(pool)
        if found is None:
            found = self._graphed[pool] = gpu_layers(
                *(self.layers, self._frequencies, self._rope_scaling),
                *(pool.blocks, pool.block_size),
                graphs=self.device.type == "cuda",
                total=self.sums.total if self.sums else None,
                linked=getattr(self.sums, "linked", None),
            )
        return found

    def _here(self) -> AbstractContextManager[Any]:
        """Triton launches on the current device."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def head(self, x: Tensor) -> Tensor:
        """Final norm and LM head of the rows to sample: float32 logits `[rows, vocabulary]`."""
        if self._norm is None or self._lm_head is None:
            raise UsageError(f"span {self.span} does not hold the LM head")
        if self._native is not None:
            parts = (self._norm, self._lm_head, self.architecture.norm_eps)
            firsts = range(0, len(x), ROWS)
            return torch.cat([self._native.head(x[at : at + ROWS], *parts) for at in firsts])
        with self._here():
            y = self.operations.rms_norm(x, self._norm, self.architecture.norm_eps)
            logits = self.operations.project(y, self._lm_head).float()
        if self.sums is None:
            return logits
        return self.sums.beside(logits, self.part.words, self.architecture.vocabulary)


def _split(x: Tensor, batch: Ragged, few: Layers, most: int, eager: Layers) -> Tensor:
    """Decode steps by `few`, up to `most` at a time; prompts by `eager`, all together."""
    steps = [i for i, extent in enumerate(batch.extents) if extent.count == 1]
    prompts = [i for i, extent in enumerate(batch.extents) if extent.count > 1]
    if not prompts and len(steps) <= most:
        return few(x, batch)
    for at in range(0, len(steps), most):
        part, rows = batch.part(steps[at : at + most])
        x[rows] = few(x[rows], part)
    if prompts:
        part, rows = batch.part(prompts)
        x[rows] = eager(x[rows], part)
    return x


def torch_dtype(name: str | torch.dtype) -> torch.dtype:
    """The torch dtype of a wire name."""
    plain = str(name).removeprefix("torch.")
    if plain not in DTYPES:
        raise UnsupportedModel(f"dtype {plain} is not served", remedy=f"one of {', '.join(DTYPES)}")
    found: torch.dtype = getattr(torch, plain)
    return found
