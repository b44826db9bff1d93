"""A model with random weights on disk, of the shape of a real one: for what needs no sense.

    python benchmarks/random_model.py FOLDER --shape 8b --layers 15 [--device cuda]

A checkpoint as Hugging Face has them (config, safetensors in several files with their index), and a
tokenizer of letters and numbered words, without one that ends an answer. Drawn on the device,
as drawing gigabytes by one processor takes minutes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

VOCABULARY = {"8b": 32768, "tiny": 512}
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
FILE_BYTES = 4 << 30


def write_model(folder: Path, shape: str, layers: int, dtype: str, device: str) -> int:
    """Random weights, one file for each few layers; bytes written. `folder` must not exist."""
    import torch
    from engine_gpu import SHAPES
    from safetensors.torch import save_file

    from hexswarm.architecture import span_shapes
    from hexswarm.records import Span

    kind = getattr(torch, dtype)
    config = SHAPES[shape].config(layers - 2)
    config |= {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": VOCABULARY[shape],
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
    }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    _write_tokenizer(folder, VOCABULARY[shape])
    tensors, places, written = dict[str, Any](), dict[str, str](), 0
    shapes = span_shapes(config, Span(0, layers))
    names = list(shapes)
    for name in names:
        size = shapes[name]
        if len(size) == 1:
            made = torch.ones(size, dtype=kind)
        else:
            made = torch.randn(size, dtype=kind, device=device) / size[1] ** 0.5
        tensors[name] = made.cpu()
        written += tensors[name].nbytes
        if sum(t.nbytes for t in tensors.values()) > FILE_BYTES or name == names[-1]:
            file = f"model-{len(set(places.values())):05d}.safetensors"
            save_file(tensors, folder / file, metadata={"format": "pt"})
            places |= dict.fromkeys(tensors, file)
            tensors = {}
    index = {"metadata": {"total_size": written}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return written


def _write_tokenizer(folder: Path, vocabulary: int) -> None:
    """ASCII, numbered words behind it, and no word that ends an answer: each token is some text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = [letter for letter in pre_tokenizers.ByteLevel.alphabet() if letter.isascii()]
    words = [*sorted(words), "\u0120", "\u010a"]  # space and newline, as this alphabet writes them
    words += [f"\u0120w{number}" for number in range(len(words), vocabulary)]
    tokenizer = Tokenizer(models.BPE({word: n for n, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=sorted(VOCABULARY), default="8b")
    parser.add_argument("--layers", type=int, default=15)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    if given.folder.exists():
        parser.error(f"{given.folder} is there already: name a folder that is not")
    written = write_model(given.folder, given.shape, given.layers, given.dtype, given.device)
    print(f"wrote {written / 1e9:.1f} GB")


if __name__ == "__main__":
    main()
