"""What a config.json says of a model: is it one we serve, what must a router know, which numbers.

`numerics` picks the fields that change the model's output and writes them in one form, whichever
version of transformers saved the file (rotary parameters moved, defaults became explicit), because
the digest covers them: two peers with equal weights but another rotary base compute other answers.
"""

from __future__ import annotations

from typing import Any

from hexswarm.errors import CorruptWeights, UnsupportedModel, UsageError
from hexswarm.experts import MIXTURES, read_experts
from hexswarm.records import ModelSpec, Span

DENSE = ("llama", "mistral", "qwen2", "qwen3")
ARCHITECTURES = (*DENSE, *MIXTURES)
"""`model_type` of the families that peers compute."""

EMBEDDING, LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"

_SIZES = {
    "num_hidden_layers": 1 << 12,
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 22,
    "vocab_size": 1 << 24,
    "max_position_embeddings": 1 << 28,
    "num_attention_heads": 1 << 14,
    "num_key_value_heads": 1 << 14,
    "head_dim": 1 << 14,
}
"""Fields that every config has once normalised, with the largest value that makes sense."""

_KV_HEADS = {"mixtral": 8, "qwen3_moe": 4}
"""What these families assume if the field is absent."""

_EXTRAS = (
    "hidden_act", "rms_norm_eps", "attention_bias", "mlp_bias", "tie_word_embeddings",
    "sliding_window", "use_sliding_window", "max_window_layers", "layer_types",
)  # fmt: skip


def check_config(config: Any, source: str) -> dict[str, Any]:
    """`config` itself if it describes a model that we serve; raises a ModelError otherwise."""
    if not isinstance(config, dict):
        raise CorruptWeights(f"the config.json of {source} is not an object")
    family = config.get("model_type")
    if family not in ARCHITECTURES:
        raise UnsupportedModel(
            f"{source} is a {str(family)[:40]!r} model",
            remedy=f"these architectures are served: {', '.join(ARCHITECTURES)}",
        )
    if config.get("quantization_config"):
        raise UnsupportedModel(
            f"{source} has quantised safetensors",
            remedy="use the unquantised weights or a GGUF file",
        )
    sizes = _sizes(config)
    for name, most in _SIZES.items():
        value = sizes[name]
        if type(value) is not int or not 0 < value <= most:
            raise CorruptWeights(f"{name} = {str(value)[:40]} in the config.json of {source}")
    if sizes["num_attention_heads"] % sizes["num_key_value_heads"]:
        raise CorruptWeights(f"{source} has key-value heads that do not divide its heads")
    read_experts(config, sizes["num_hidden_layers"])
    return config


def model_spec(name: str, config: dict[str, Any], digest: str) -> ModelSpec:
    """The router's view of a checked config."""
    sizes = _sizes(config)
    return ModelSpec(
        digest=digest,
        name=name,
        architecture=config["model_type"],
        layers=sizes["num_hidden_layers"],
        hidden=sizes["hidden_size"],
        vocabulary=sizes["vocab_size"],
        context=sizes["max_position_embeddings"],
        kv_bytes_per_token_layer=2 * sizes["num_key_value_heads"] * sizes["head_dim"] * 2,
    )


def numerics(config: dict[str, Any]) -> dict[str, Any]:
    """The fields that change the output, in canonical form; absent, None and False are one."""
    extras = {name: config[name] for name in _EXTRAS if config.get(name)}
    if not config.get("sliding_window") or config.get("use_sliding_window") is False:
        for name in ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types"):
            extras.pop(name, None)
    sizes = _sizes(config)
    experts = read_experts(config, sizes["num_hidden_layers"])
    return {
        "model_type": config["model_type"],
        **sizes,
        **extras,
        **({} if experts is None else {"experts": experts.numerics()}),
        "rope": _rope(config),
    }


def span_shapes(config: dict[str, Any], span: Span) -> dict[str, tuple[int, ...]]:
    """Name and shape of each tensor that a peer of `span` needs, by the config alone."""
    layers = _sizes(config)["num_hidden_layers"]
    if span.end > layers:
        raise UsageError(f"span {span} reaches beyond the model's {layers} layers")
    shapes = end_shapes(config, span)
    for layer in range(span.first, span.end):
        shapes |= layer_shapes(config, layer)
    return shapes


def end_shapes(config: dict[str, Any], span: Span) -> dict[str, tuple[int, ...]]:
    """Those of them that belong to no layer.

    The head's holder needs the embedding, the tail's the last norm and the LM head; with tied
    embeddings the latter is the embedding, under the name that it has in the checkpoint.
    """
    sizes = _sizes(config)
    words = (sizes["vocab_size"], sizes["hidden_size"])
    shapes: dict[str, tuple[int, ...]] = {}
    if span.first == 0:
        shapes[EMBEDDING] = words
    if span.end == sizes["num_hidden_layers"]:
        shapes["model.norm.weight"] = words[1:]
        shapes[EMBEDDING if config.get("tie_word_embeddings") else LM_HEAD] = words
    return shapes


def layer_shapes(config: dict[str, Any], layer: int) -> dict[str, tuple[int, ...]]:
    """Those of one layer."""
    sizes = _sizes(config)
    experts = read_experts(config, sizes["num_hidden_layers"])
    if experts is not None and experts.layers[layer]:
        mlp = experts.shapes(sizes["hidden_size"])
    else:
        mlp = _mlp_shapes(config, sizes)
    shapes = {**_common_shapes(config, sizes), **mlp}
    return {f"model.layers.{layer}.{name}": shape for name, shape in shapes.items()}


def _common_shapes(config: dict[str, Any], sizes: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """What layers have beside their MLP, without the `model.layers.N.` before the names."""
    family, head_dim, hidden = config["model_type"], sizes["head_dim"], sizes["hidden_size"]
    queries = sizes["num_attention_heads"] * head_dim
    keys = sizes["num_key_value_heads"] * head_dim
    attention = {"q": (queries, hidden), "k": (keys, hidden), "v": (keys, hidden)}
    attention["o"] = (hidden, queries)
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        **{f"self_attn.{name}_proj.weight": shape for name, shape in attention.items()},
    }
    biased = (
        "qkvo" if family in ("llama", "qwen3", "qwen3_moe") and config.get("attention_bias") else ""
    )
    for name in "qkv" if family == "qwen2" else biased:
        shapes[f"self_attn.{name}_proj.bias"] = attention[name][:1]
    if family in ("qwen3", "qwen3_moe"):
        shapes |= {f"self_attn.{name}_norm.weight": (head_dim,) for name in "qk"}
    return shapes


def _mlp_shapes(config: dict[str, Any], sizes: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The MLP of a layer that is no mixture, likewise."""
    inner, hidden = sizes["intermediate_size"], sizes["hidden_size"]
    mlp = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
    shapes: dict[str, tuple[int, ...]] = {
        f"mlp.{name}_proj.weight": shape for name, shape in mlp.items()
    }
    if config["model_type"] == "llama" and config.get("mlp_bias"):
        shapes.update({f"mlp.{name}_proj.bias": shape[:1] for name, shape in mlp.items()})
    return shapes


def _sizes(config: dict[str, Any]) -> dict[str, Any]:
    """The whole-numbered fields, the two optional ones derived."""
    sizes = {name: config.get(name) for name in _SIZES}
    heads, hidden = sizes["num_attention_heads"], sizes["hidden_size"]
    if "num_key_value_heads" not in config and config.get("model_type") in _KV_HEADS:
        sizes["num_key_value_heads"] = _KV_HEADS[config["model_type"]]
    if sizes["num_key_value_heads"] is None:
        sizes["num_key_value_heads"] = heads
    if sizes["head_dim"] is None and config.get("model_type") == "qwen3":
        sizes["head_dim"] = 128  # this family's default does not follow from the width
    if sizes["head_dim"] is None and type(heads) is int and type(hidden) is int and heads > 0:
        sizes["head_dim"] = hidden // heads
    return sizes


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """Rotary parameters; transformers 5 keeps in `rope_parameters` what 4 had in two fields."""
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope = {key: value for key, value in given.items() if value is not None}
    if "type" in rope:
        rope.setdefault("rope_type", rope.pop("type"))
    rope.setdefault("rope_type", "default")
    default = 1e6 if config.get("model_type") == "mixtral" else 10_000.0
    rope.setdefault("rope_theta", config.get("rope_theta", default))
    return {key: float(v) if type(v) is int else v for key, v in rope.items()}
