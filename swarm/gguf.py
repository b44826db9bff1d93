"""Reading GGUF: llama.cpp's single-file format, header first, tensors one at a time.

The header is parsed here and not by `gguf.GGUFReader`, for two reasons: that reader trusts counts
(a damaged file makes it loop for hours) and builds a numpy array per vocabulary entry (4 s for
49k words; this takes 0.1 s). Its tables and its dequantisers are used, since these are the
format's reference. Every length is checked against the file before it is followed, so a truncated
or hostile file raises `CorruptWeights` and nothing else.

Two things differ from Hugging Face's layout and are undone while reading:

* Dimensions are listed innermost first.
* llama.cpp rotates neighbouring pairs (x0, x1), Hugging Face rotates halves (x0, x[d/2]). For the
  `llama` architecture the converter therefore interleaved the rows of the q and k projections; for
  Qwen, whose GGML graph rotates halves, it did not. Mistral is `llama` in GGUF.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hexswarm.architecture import DENSE
from hexswarm.errors import CorruptWeights, UnsupportedModel

if TYPE_CHECKING:
    import numpy as np

MAX_ITEMS = 1 << 22
"""Metadata entries, words of a vocabulary or tensors that a file may list."""

Q4_0 = 2
"""Number of the type of 4 bits that products can read as it is: 32 weights, one scale."""

_SCALARS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9

_ROOT_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_IGNORED = re.compile(r"rope_freqs\.weight|blk\.\d+\.(rope_freqs|attn_rot_embd)\.weight")


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Where a tensor lies; `shape` is in Hugging Face's order."""

    name: str
    shape: tuple[int, ...]
    kind: int
    """GGML type number."""
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class GgufFile:
    """A parsed header; `tensors` by their GGUF name."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]

    @property
    def architecture(self) -> str:
        """The Hugging Face family: GGUF's `llama` is also Mistral."""
        declared = self.metadata.get("general.architecture")
        if declared != "llama":
            return str(declared)
        name = f"{self.metadata.get('general.basename')} {self.metadata.get('general.name')}"
        slides = "llama.attention.sliding_window" in self.metadata
        return "mistral" if slides or "mistral" in name.lower() else "llama"

    def hf_tensors(self) -> dict[str, GgufTensor]:
        """The model's tensors by their Hugging Face name; raises for one that we do not know."""
        named = {}
        for tensor in self.tensors.values():
            if not _IGNORED.fullmatch(tensor.name):
                named[_hf_name(self.path, tensor.name)] = tensor
        return named

    def array(self, tensor: GgufTensor, rows: range | None = None) -> np.ndarray:
        """The tensor as float32 in Hugging Face's layout (read and dequantised now).

        With `rows` those alone are read; of projections to heads they are whole heads.
        """
        import numpy as np
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize

        kind = GGMLQuantizationType(tensor.kind)
        rows = range(tensor.shape[0]) if rows is None else rows
        raw = self._read(tensor, rows)
        shape = (len(rows), *tensor.shape[1:])
        try:
            flat = dequantize(raw.reshape(math.prod(shape[:-1]), -1), kind)
        except NotImplementedError:
            raise UnsupportedModel(
                f"{self.path.name} stores {tensor.name} as {kind.name}, which we cannot read",
                remedy="use a file quantised as Q4_0, Q4_K, Q5_K, Q6_K, Q8_0, F16 or BF16",
            ) from None
        return np.ascontiguousarray(self._in_order(tensor, flat.reshape(shape)), dtype="<f4")

    def blocks(self, tensor: GgufTensor, rows: range) -> np.ndarray:
        """Rows of a matrix in Hugging Face's order, each as the file has it: `[rows, bytes]`."""
        raw = self._read(tensor, rows).reshape(len(rows), -1)
        return self._in_order(tensor, raw)

    def packed(self) -> frozenset[str]:
        """Matrices of layers in Q4_0, by their Hugging Face names."""
        return frozenset(
            name
            for name, tensor in self.hf_tensors().items()
            if tensor.kind == Q4_0 and len(tensor.shape) == 2 and name.startswith("model.layers.")
        )

    def _read(self, tensor: GgufTensor, rows: range) -> np.ndarray:
        """Bytes of `rows`."""
        import numpy as np

        size, all_rows = tensor.end - tensor.start, tensor.shape[0]
        first, wanted = (size * count // all_rows for count in (rows.start, len(rows)))
        with self.path.open("rb") as file:
            file.seek(tensor.start + first)
            raw = np.fromfile(file, np.uint8, wanted)
        if raw.size != wanted:
            raise corrupt(self.path, f"{tensor.name} is cut off")
        return raw

    def _in_order(self, tensor: GgufTensor, array: np.ndarray) -> np.ndarray:
        """The rows of `array`, which are the tensor's or some heads', as Hugging Face has them."""
        heads = self._interleaved_heads(tensor.name)
        if not heads:
            return array
        pairs = array.reshape(-1, tensor.shape[0] // heads // 2, 2, *array.shape[1:])
        return pairs.swapaxes(1, 2).reshape(array.shape)

    def _interleaved_heads(self, name: str) -> int:
        """Number of heads whose rows are to be reordered, 0 for other tensors."""
        if self.metadata.get("general.architecture") != "llama":
            return 0
        heads = int(self.metadata["llama.attention.head_count"])
        if re.fullmatch(r"blk\.\d+\.attn_q\.(weight|bias)", name):
            return heads
        if re.fullmatch(r"blk\.\d+\.attn_k\.(weight|bias)", name):
            return int(self.metadata.get("llama.attention.head_count_kv", heads))
        return 0


def read_gguf(path: Path) -> GgufFile:
    """Parse and check the header of the file at `path`; no tensor is read."""
    try:
        with path.open("rb") as file:
            view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise CorruptWeights(f"cannot read {path}: {error}") from error
    with view:
        try:
            return _parse(path, _Cursor(view))
        except struct.error as error:
            why = f"it ends after {len(view)} bytes, in the midst of its header"
            raise corrupt(path, why) from error
        except (UnicodeDecodeError, _BadHeader) as error:
            raise corrupt(path, str(error)) from error


class _BadHeader(Exception):
    """What is wrong with a header, before the file's name is added."""


class _Cursor:
    """Reads little-endian values off a mapped file and never runs beyond its end."""

    def __init__(self, view: mmap.mmap) -> None:
        self._view, self.at, self.size = view, 0, len(view)

    def scalars(self, code: str, count: int = 1) -> tuple[Any, ...]:
        form = f"<{count}{code}"
        values = struct.unpack_from(form, self._view, self.at)
        self.at += struct.calcsize(form)
        return values

    def count(self, width: int = 4) -> int:
        (number,) = self.scalars("I" if width == 4 else "Q")
        if number > MAX_ITEMS:
            raise _BadHeader(f"it claims {number} items")
        return int(number)

    def string(self) -> str:
        (length,) = self.scalars("Q")
        if length > self.size - self.at:
            raise _BadHeader("a string reaches beyond the file")
        start, self.at = self.at, self.at + length
        return str(self._view[start : self.at], "utf-8")

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.scalars(_SCALARS[kind])[0]
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise _BadHeader(f"metadata of unknown type {kind}")
        (element,) = self.scalars("I")
        count = self.count(8)
        if element in _SCALARS:
            return list(self.scalars(_SCALARS[element], count))
        if element != _STRING:
            raise _BadHeader("metadata is nested")
        return [self.string() for _ in range(count)]


def _parse(path: Path, cursor: _Cursor) -> GgufFile:
    magic, version = cursor.scalars("I", 2)
    if magic != 0x46554747:
        raise _BadHeader("it does not begin with GGUF")
    if version not in (2, 3):
        raise _BadHeader(f"it has version {version}, not 2 or 3")
    tensor_count, entries = cursor.count(8), cursor.count(8)
    metadata: dict[str, Any] = {}
    for _ in range(entries):
        key = cursor.string()
        if key in metadata:
            raise _BadHeader(f"{key!r} occurs twice")
        metadata[key] = cursor.value(cursor.scalars("I")[0])
    listed = [_tensor_entry(cursor) for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise _BadHeader("its alignment is not a power of two")
    data = -(-cursor.at // alignment) * alignment
    return GgufFile(path, metadata, _place(listed, data, cursor.size))


def _tensor_entry(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """Name, shape, type and offset as the header lists them."""
    name, dimensions = cursor.string(), cursor.count()
    if not 1 <= dimensions <= 4:
        raise _BadHeader(f"{name!r} has {dimensions} dimensions")
    shape = tuple(reversed(cursor.scalars("Q", dimensions)))
    kind, offset = *cursor.scalars("I"), *cursor.scalars("Q")
    return name, shape, kind, offset


def _place(
    listed: list[tuple[str, tuple[int, ...], int, int]], data: int, size: int
) -> dict[str, GgufTensor]:
    """The tensors with their absolute place, inside the file and apart from each other."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    blocks = {int(kind): GGML_QUANT_SIZES[kind] for kind in GGMLQuantizationType}
    tensors, reached = {}, data
    for name, shape, kind, offset in sorted(listed, key=lambda entry: entry[3]):
        if kind not in blocks:
            raise _BadHeader(f"{name!r} has unknown type {kind}")
        elements, width = blocks[kind]
        if 0 in shape or shape[-1] % elements:
            raise _BadHeader(f"the shape of {name!r} does not fit its type")
        start = data + offset
        end = start + math.prod(shape) // elements * width
        if start < reached or end > size:
            raise _BadHeader(f"{name!r} overlaps another tensor or lies beyond the file's end")
        if name in tensors:
            raise _BadHeader(f"{name!r} occurs twice")
        tensors[name], reached = GgufTensor(name, shape, kind, start, end), end
    return tensors


def _hf_name(path: Path, name: str) -> str:
    stem, _, suffix = name.rpartition(".")
    if suffix in ("weight", "bias"):
        if stem in _ROOT_NAMES:
            return f"{_ROOT_NAMES[stem]}.{suffix}"
        match = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
        if match and match[2] in _LAYER_NAMES:
            return f"model.layers.{match[1]}.{_LAYER_NAMES[match[2]]}.{suffix}"
    raise UnsupportedModel(
        f"{path.name} has a tensor {name[:80]!r} that we do not serve",
        remedy=f"dense models of {', '.join(DENSE)} are served",
    )


def corrupt(path: Path, why: str) -> CorruptWeights:
    """The error for a damaged file, to be raised."""
    return CorruptWeights(f"{path} is damaged: {why}", remedy="fetch it again")
