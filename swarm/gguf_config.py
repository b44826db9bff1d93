"""From GGUF metadata to a Hugging Face config.json.

Numbers are stored as float32 and written as the shortest decimal that reads back as the same
float32, so 1e-05 stays 1e-05. Llama 3.1's frequency scaling is stored as a table
(`rope_freqs.weight`); we recognise the published parameters that give this table and put them into
the config, else refuse the file: serving other numbers silently would be worse.
"""

from __future__ import annotations

import math
import struct
from typing import Any

from hexswarm.architecture import DENSE
from hexswarm.errors import ModelError, UnsupportedModel
from hexswarm.gguf import GgufFile, GgufTensor, corrupt


def gguf_config(file: GgufFile) -> dict[str, Any]:
    """A Hugging Face config.json for the model in `file`."""
    family, meta = file.architecture, file.metadata
    if family not in DENSE:
        raise UnsupportedModel(
            f"{file.path.name} holds a {family} model", remedy=f"use {', '.join(DENSE)}"
        )
    if meta.get("split.count", 1) not in (0, 1):
        raise UnsupportedModel(
            f"{file.path.name} is one part of several",
            remedy="merge them with `llama-gguf-split --merge`",
        )
    try:
        config = _hyperparameters(file, family, str(meta["general.architecture"]))
    except ModelError:
        raise
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise corrupt(file.path, f"its metadata lacks or garbles {error}") from error
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("padding", "pad")):
        if (token := meta.get(f"tokenizer.ggml.{ours}_token_id")) is not None:
            config[f"{theirs}_token_id"] = token
    return config


def _hyperparameters(file: GgufFile, family: str, prefix: str) -> dict[str, Any]:
    """The part of the config that shapes the numbers."""

    def get(key: str, *default: Any) -> Any:
        key = f"{prefix}.{key}"
        return file.metadata.get(key, *default) if default else file.metadata[key]

    hidden, heads = int(get("embedding_length")), int(get("attention.head_count"))
    head_dim = int(get("attention.key_length", get("rope.dimension_count", hidden // heads)))
    embeddings = file.tensors.get("token_embd.weight")
    words = len(file.metadata.get("tokenizer.ggml.tokens", ()))
    kind = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}[family]
    config: dict[str, Any] = {
        "architectures": [f"{kind}ForCausalLM"],
        "model_type": family,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": int(get("feed_forward_length")),
        "num_hidden_layers": int(get("block_count")),
        "num_attention_heads": heads,
        "num_key_value_heads": int(get("attention.head_count_kv", heads)),
        "head_dim": head_dim,
        "max_position_embeddings": int(get("context_length")),
        "rms_norm_eps": _shortest(get("attention.layer_norm_rms_epsilon")),
        "rope_theta": _shortest(get("rope.freq_base", 10000.0)),
        "vocab_size": embeddings.shape[0] if embeddings else words,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "dtype": "float32",
        "torch_dtype": "float32",
    }
    if family == "mistral":
        config["sliding_window"] = get("attention.sliding_window", None)
    if family == "llama":
        config["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
        config["mlp_bias"] = "blk.0.ffn_up.bias" in file.tensors
    if scaling := _rope_scaling(file, prefix, head_dim, config["rope_theta"]):
        config["rope_scaling"] = scaling
    return config


def _rope_scaling(
    file: GgufFile, prefix: str, head_dim: int, theta: float
) -> dict[str, Any] | None:
    """The `rope_scaling` of the config, from metadata or from Llama 3.1's table of factors."""
    kind = file.metadata.get(f"{prefix}.rope.scaling.type") or "none"
    if kind not in ("none", "linear", "yarn"):
        raise UnsupportedModel(f"{file.path.name} scales its rotary positions by {kind!r}")
    if kind != "none":
        factor = _shortest(file.metadata[f"{prefix}.rope.scaling.factor"])
        scaling: dict[str, Any] = {"rope_type": kind, "factor": factor}
        if kind == "yarn":
            original = file.metadata[f"{prefix}.rope.scaling.original_context_length"]
            scaling["original_max_position_embeddings"] = int(original)
        return scaling
    table = file.tensors.get("rope_freqs.weight")
    return _recognise(file, table, head_dim, theta) if table else None


def _recognise(
    file: GgufFile, table: GgufTensor, head_dim: int, theta: float
) -> dict[str, Any] | None:
    """The published Llama 3 parameters that give `table`; None if it scales nothing."""
    factors = [float(factor) for factor in file.array(table)]
    most = _shortest(max(factors))
    expected = _llama3_factors(most, head_dim, theta)
    if len(expected) != len(factors) or not all(map(_close, expected, factors)):
        raise UnsupportedModel(f"{file.path.name} scales its rotary positions in an unknown way")
    if most == 1:
        return None
    return {
        "rope_type": "llama3",
        "factor": most,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def _close(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=1e-4)


def _llama3_factors(factor: float, head_dim: int, theta: float) -> list[float]:
    """By what Llama 3.1 divides each rotary frequency (8192 original positions, band 1-4)."""
    factors = []
    for index in range(0, head_dim, 2):
        turns = 8192 / (2 * math.pi * theta ** (index / head_dim))
        blend = (turns - 1.0) / (4.0 - 1.0)
        smooth = 1 / ((1 - blend) / factor + blend) if 0 <= blend <= 1 else 0.0
        factors.append(factor if turns < 1 else 1.0 if turns > 4 else smooth)
    return factors


def _shortest(value: Any) -> float:
    """The shortest decimal that is the same float32: 1e-05 instead of 9.999999747378752e-06."""
    number = struct.pack("<f", float(value))
    for digits in range(1, 10):
        text = f"{float(value):.{digits}g}"
        if struct.pack("<f", float(text)) == number:
            return float(text)
    return float(value)
