"""Tiny models for tests: folders as transformers saves them, GGUF as llama.cpp writes it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
MIXTURES = ("mixtral", "qwen3_moe")
LAYERS = 3
WORDS = ["<end>", "<start>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġa", "th"]
TEMPLATE = (
    "{% for m in messages %}{{ '<start>' + m['role'] + ' ' + m['content'] + '<end>' }}{% endfor %}"
    "{% if add_generation_prompt %}<start>assistant {% endif %}"
)


def model(family: str, *, tied: bool = False, **changes: Any) -> transformers.PreTrainedModel:
    """A random model of `family`, the same at each call."""
    torch.set_num_threads(1)
    torch.manual_seed(7)
    config = transformers.AutoConfig.for_model(
        family,
        **{
            "num_hidden_layers": LAYERS, "hidden_size": 32, "intermediate_size": 64,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
            "vocab_size": len(WORDS) + 2, "max_position_embeddings": 64, "sliding_window": None,
            "tie_word_embeddings": tied, "bos_token_id": 1, "eos_token_id": 0, "pad_token_id": None,
            **changes,
        },
    )  # fmt: skip
    built = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in built.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return built


def checkpoint(built: transformers.PreTrainedModel) -> dict[str, torch.Tensor]:
    """The tensors of `built` as its checkpoint names them: experts one by one."""
    mixtral = built.config.model_type == "mixtral"
    block = "block_sparse_moe" if mixtral else "mlp"
    gate, up, down = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    found = {}
    for name, tensor in built.state_dict().items():
        layer, experts, kind = name.partition(".mlp.experts.")
        if not experts:
            found[name.replace(".mlp.gate.", f".{block}.gate.")] = tensor.detach()
            continue
        for number, expert in enumerate(tensor.detach()):
            prefix = f"{layer}.{block}.experts.{number}"
            if kind == "gate_up_proj":
                first, second = expert.chunk(2)
                found |= {f"{prefix}.{gate}.weight": first, f"{prefix}.{up}.weight": second}
            else:
                found[f"{prefix}.{down}.weight"] = expert
    return found


def save_folder(folder: Path, built: transformers.PreTrainedModel, shard: str = "20KB") -> Path:
    """Save `built` with several weight files and a byte-level tokenizer."""
    built.save_pretrained(folder, max_shard_size=shard)
    save_tokenizer(folder)
    return folder


def save_tokenizer(folder: Path, template: str | None = TEMPLATE) -> None:
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("Ġ", "a"), ("t", "h")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>", "<start>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<end>",
        "chat_template": template,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def save_gguf(
    path: Path,
    built: transformers.PreTrainedModel,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    kinds: Mapping[str, gguf.GGMLQuantizationType] | None = None,
    **metadata: Any,
) -> Path:
    """Write `built` as llama.cpp's converter would: Mistral as llama, q and k interleaved there.

    Matrices are stored as `kind`, those with a part of their name in `kinds` as that says.
    """
    config = built.config
    architecture = {"mistral": "llama"}.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name(f"tiny {config.model_type}")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    words = [*WORDS, "<pad1>", "<pad2>"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(words)
    writer.add_token_types([3, 3] + [1] * (len(words) - 2))
    writer.add_token_merges(["Ġ a", "t h"])
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_chat_template(TEMPLATE)
    for key, value in metadata.items():
        writer.add_string(key, value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], LAYERS)
    for name, tensor in built.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = tensor.float().numpy()
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            array = interleave(array, array.shape[0] // config.head_dim)
        own = next((kinds[part] for part in kinds or () if part in name), kind)
        stored = own if array.ndim == 2 else gguf.GGMLQuantizationType.F32
        data = gguf.quantize(np.ascontiguousarray(array), stored)
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), data, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def interleave(array: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to the rows of q and k for its rotation of pairs."""
    halves = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
    return halves.swapaxes(1, 2).reshape(array.shape)
