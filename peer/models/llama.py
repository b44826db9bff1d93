"""Turns Hugging Face tensors into decoder layers for Llama, Mistral, Qwen2 and Qwen3.

Each source tensor is taken out of the caller's mapping as it is copied into its place in a fused
matrix, so that loading needs room for the span plus little more than one layer. Rounding to few
bits goes tensor by tensor, too; what a file has in few bits comes so, and stays.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hexswarm.errors import CorruptWeights
from hexswarm.kernels.quantise import Quantised, dequantise, join, quantise
from hexswarm.peer.cuts import Part, attention_runs
from hexswarm.peer.models.architecture import Architecture
from hexswarm.peer.models.layers import DecoderLayer


class Source:
    """The tensors of a checkpoint, taken out one by one, checked and moved to their place.

    `by_rows`: matrices lie `[out, in]` in memory, as Triton's products read them. `bits` below 16
    rounds the layers' matrices; they are kept so `by_rows`, and widened again otherwise. Of each
    tensor the caller has what belongs to `part` (see `hexswarm.peer.slices`).
    """

    def __init__(
        self,
        tensors: MutableMapping[str, Tensor] | MutableMapping[str, Tensor | Quantised],
        dtype: torch.dtype,
        device: torch.device,
        *,
        by_rows: bool = False,
        bits: int = 16,
        part: Part,
    ) -> None:
        self.tensors, self.dtype, self.device = tensors, dtype, device
        self.by_rows, self.bits, self.part = by_rows, bits, part

    def take(self, name: str, *shape: int) -> Tensor:
        """A tensor in the shard's dtype, on its device, owned by us."""
        out = torch.empty(shape, dtype=self.dtype, device=self.device)
        return out.copy_(self._wide(name, shape))

    def take_transposed(self, parts: Sequence[tuple[str, int]], inputs: int) -> Tensor:
        """Fuse `[out, in]` matrices into one `[in, sum of out]`."""
        return self._fill(self._room(inputs, _outputs(parts)), parts, inputs, 16)

    def take_rounded(self, parts: Sequence[tuple[str, int]], inputs: int) -> Tensor | Quantised:
        """The same of a layer: in as few bits as are wanted."""
        if self.bits == 16:
            return self.take_transposed(parts, inputs)
        if self.by_rows:
            return join([self._round(name, out, inputs) for name, out in parts])
        return self._fill(self._room(inputs, _outputs(parts)), parts, inputs, self.bits)

    def take_stacked(
        self, matrices: Sequence[Sequence[tuple[str, int]]], inputs: int
    ) -> Tensor | tuple[Quantised, ...]:
        """One such matrix for each of several, of one shape: `[number, in, out]`."""
        if self.bits < 16 and self.by_rows:
            return tuple(
                join([self._round(name, out, inputs) for name, out in parts]) for parts in matrices
            )
        outputs = _outputs(matrices[0]) if matrices else 0
        room = self._room(inputs, outputs, len(matrices))
        for matrix, parts in zip(room, matrices, strict=True):
            self._fill(matrix, parts, inputs, self.bits)
        return room

    def _fill(
        self, fused: Tensor, parts: Sequence[tuple[str, int]], inputs: int, bits: int
    ) -> Tensor:
        """Side by side into `fused` `[in, sum of out]`; few bits are rounded and widened again."""
        column = 0
        for name, out in parts:
            here = fused[:, column : column + out]
            if bits == 16:
                here.copy_(self._wide(name, (out, inputs)).t())
            else:
                here.copy_(dequantise(self._round(name, out, inputs), self.dtype).t())
            column += out
        return fused

    def _round(self, name: str, outputs: int, inputs: int) -> Quantised:
        found = self._pop(name, (outputs, inputs))
        if isinstance(found, Quantised):
            return found.to(self.device)
        return quantise(found.to(self.device, self.dtype), self.bits)

    def _room(self, inputs: int, outputs: int, *count: int) -> Tensor:
        """For a matrix `[in, out]`, or for `count` of them."""
        shape = (outputs, inputs) if self.by_rows else (inputs, outputs)
        room = torch.empty((*count, *shape), dtype=self.dtype, device=self.device)
        return room.transpose(-1, -2) if self.by_rows else room

    def take_joined(self, parts: Sequence[tuple[str, int]]) -> Tensor:
        """Fuse vectors end to end."""
        return torch.cat([self.take(name, size) for name, size in parts])

    def _wide(self, name: str, shape: tuple[int, ...]) -> Tensor:
        found = self._pop(name, shape)
        return dequantise(found, self.dtype) if isinstance(found, Quantised) else found

    def _pop(self, name: str, shape: tuple[int, ...]) -> Tensor | Quantised:
        try:
            tensor = self.tensors.pop(name)
        except KeyError:
            raise CorruptWeights(f"the weights lack {name}") from None
        if tuple(tensor.shape) != shape:
            raise CorruptWeights(f"{name} has shape {tuple(tensor.shape)} instead of {shape}")
        return tensor


def _outputs(parts: Sequence[tuple[str, int]]) -> int:
    return sum(out for _, out in parts)


def attention_tensors(a: Architecture) -> list[str]:
    """Names of the tensors that `attention` takes, without the name of their layer."""
    attention = [f"{kind}_proj.weight" for kind in "qkvo"]
    attention += [f"{kind}_proj.bias" for kind in "qkv"] if a.qkv_bias else []
    attention += ["o_proj.bias"] if a.o_bias else []
    attention += ["q_norm.weight", "k_norm.weight"] if a.qk_norm else []
    names = ["input_layernorm.weight", "post_attention_layernorm.weight"]
    return names + [f"self_attn.{name}" for name in attention]


def layer_tensors(a: Architecture, index: int) -> tuple[str, ...]:
    """Names of the tensors that `build_layer` takes."""
    ends = ("weight", "bias") if a.mlp_bias else ("weight",)
    mlp = [f"mlp.{kind}_proj.{end}" for kind in ("gate", "up", "down") for end in ends]
    names = [*attention_tensors(a), *mlp]
    return tuple(f"model.layers.{index}.{name}" for name in names)


def attention(a: Architecture, index: int, source: Source) -> dict[str, Any]:
    """The fields of an `AttendingLayer`, from the tensors of layer `index`."""
    prefix = f"model.layers.{index}"
    name = f"{prefix}.self_attn"
    part = source.part
    heads, kv_heads = len(part.heads), len(part.kv_heads)
    q, kv = heads * a.head_dim, kv_heads * a.head_dim
    qkv = ((f"{name}.q_proj", q), (f"{name}.k_proj", kv), (f"{name}.v_proj", kv))
    o = ((f"{name}.o_proj", a.hidden),)
    return {
        "heads": heads,
        "kv_heads": kv_heads,
        "runs": attention_runs(part.heads, a.heads // a.kv_heads),
        "head_dim": a.head_dim,
        "eps": a.norm_eps,
        "window": a.windows[index],
        "input_norm": source.take(f"{prefix}.input_layernorm.weight", a.hidden),
        "qkv": _matrix(source, qkv, a.hidden),
        "qkv_bias": _bias(source, qkv, a.qkv_bias),
        "qk_norm": _qk_norm(a.head_dim, name, source) if a.qk_norm else None,
        "o": _matrix(source, o, q),
        "o_bias": _bias(source, o, a.o_bias and part.rank == 0),
        "post_norm": source.take(f"{prefix}.post_attention_layernorm.weight", a.hidden),
    }


def build_layer(a: Architecture, index: int, source: Source) -> DecoderLayer:
    """Fuse the tensors of layer `index`."""
    mlp = f"model.layers.{index}.mlp"
    columns = len(source.part.columns)
    gate_up = ((f"{mlp}.gate_proj", columns), (f"{mlp}.up_proj", columns))
    down = ((f"{mlp}.down_proj", a.hidden),)
    return DecoderLayer(
        **attention(a, index, source),
        gate_up=_matrix(source, gate_up, a.hidden),
        gate_up_bias=_bias(source, gate_up, a.mlp_bias),
        down=_matrix(source, down, columns),
        down_bias=_bias(source, down, a.mlp_bias and source.part.rank == 0),
    )


def _matrix(source: Source, parts: Sequence[tuple[str, int]], inputs: int) -> Tensor | Quantised:
    return source.take_rounded([(f"{name}.weight", n) for name, n in parts], inputs)


def _bias(source: Source, parts: Sequence[tuple[str, int]], present: bool) -> Tensor | None:
    return source.take_joined([(f"{name}.bias", n) for name, n in parts]) if present else None


def _qk_norm(head_dim: int, attention: str, source: Source) -> Tensor:
    part = source.part
    q = source.take(f"{attention}.q_norm.weight", head_dim).expand(len(part.heads), -1)
    k = source.take(f"{attention}.k_norm.weight", head_dim).expand(len(part.kv_heads), -1)
    return torch.cat((q, k))
