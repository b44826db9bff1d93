"""What a config.json says about a decoder, as one frozen record without defaults left to guess.

The families served (Llama, Mistral, Qwen2, Qwen3, Mixtral, Qwen3-MoE) are one network with
switches: biases, a norm on queries and keys, a sliding window on some layers, experts. Reading
follows transformers 5.23 to the letter, because a peer that reads a switch otherwise computes
plausible nonsense that nobody notices; what we do not compute is refused here, before any weight is
read.

- Llama knows `attention_bias` (all four projections) and `mlp_bias`, and no window.
- Mistral applies `sliding_window`, if set, to every layer.
- Qwen2 has biases on q, k and v; Qwen3 norms q and k per head, and has `attention_bias`. Both
  window a layer if `use_sliding_window` and its `layer_types` entry is "sliding_attention", by
  default the layers from `max_window_layers` on.
- Mixtral is Mistral with experts (`hexswarm.experts`), Qwen3-MoE is Qwen3 with them; both know one
  window for all layers, and no `layer_types`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hexswarm.errors import UnsupportedModel
from hexswarm.experts import MIXTURES, Experts, read_experts
from hexswarm.peer.cuts import Part
from hexswarm.peer.models.rope import Rope, read_rope


@dataclass(frozen=True, slots=True)
class Architecture:
    """A decoder of the Llama line."""

    family: str
    """`model_type` of the configuration."""
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    context: int
    """Most positions that the rotary embedding is meant for."""
    norm_eps: float
    rope: Rope
    windows: tuple[int | None, ...]
    """Per layer: how many last tokens a query sees, itself included; None for all."""
    tied: bool
    """The LM head is the embedding."""
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    experts: Experts | None = None
    """The mixtures that some layers or all have instead of one MLP."""

    @property
    def whole(self) -> Part:
        """The part of a rank that is alone."""
        experts, width = (self.experts.count, self.experts.width) if self.experts else (0, 0)
        heads, kv_heads = range(self.heads), range(self.kv_heads)
        inner, words = range(self.intermediate), range(self.vocabulary)
        return Part(0, 1, heads, kv_heads, inner, words, range(experts), range(width))

    def __post_init__(self) -> None:
        sizes = (self.layers, self.hidden, self.intermediate, self.heads, self.kv_heads)
        if min(*sizes, self.head_dim, self.vocabulary, self.context) < 1:
            raise UnsupportedModel("a size in the model's configuration is not positive")
        if self.heads % self.kv_heads:
            raise UnsupportedModel(f"{self.heads} heads do not share {self.kv_heads} KV heads")
        if self.head_dim % 2:
            raise UnsupportedModel("rotary embedding needs an even head dimension")
        if len(self.windows) != self.layers:
            raise UnsupportedModel("layer_types does not have one entry per layer")
        if any(window is not None and window < 1 for window in self.windows):
            raise UnsupportedModel("a sliding window has at least one token")


_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"max_position_embeddings": 131_072, "kv_heads": 8},
    "qwen2": {"max_position_embeddings": 32_768, "kv_heads": 32},
    "qwen3": {"max_position_embeddings": 32_768, "kv_heads": 32, "head_dim": 128},
    "mixtral": {
        "max_position_embeddings": 131_072,
        "kv_heads": 8,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-5,
    },
    "qwen3_moe": {"max_position_embeddings": 32_768, "kv_heads": 4},
}
"""What transformers assumes for a key that a configuration lacks, where families differ."""


def read_architecture(config: Mapping[str, Any]) -> Architecture:
    """Read the config.json of a model of the families above."""
    family = config.get("model_type")
    if family not in _DEFAULTS:
        raise UnsupportedModel(
            f"models of type {family!r} are not served", remedy=f"one of {', '.join(_DEFAULTS)}"
        )
    _refuse_foreign_features(config)
    defaults = _DEFAULTS[family]
    hidden, heads = _integer(config, "hidden_size"), _integer(config, "num_attention_heads")
    layers = _integer(config, "num_hidden_layers")
    kv_heads = config.get("num_key_value_heads", defaults.get("kv_heads")) or heads
    head_dim = config.get("head_dim", defaults.get("head_dim")) or hidden // heads
    rope = read_rope({**_rope_defaults(defaults), **config})
    biased = family in ("llama", "qwen3", "qwen3_moe")
    attention_bias = biased and bool(config.get("attention_bias", False))
    return Architecture(
        family=family,
        layers=layers,
        hidden=hidden,
        intermediate=_integer(config, "intermediate_size"),
        heads=heads,
        kv_heads=int(kv_heads),
        head_dim=int(head_dim),
        vocabulary=_integer(config, "vocab_size"),
        context=_context(config, rope, defaults["max_position_embeddings"]),
        norm_eps=float(config.get("rms_norm_eps", defaults.get("rms_norm_eps", 1e-6))),
        rope=rope,
        windows=_windows(config, family, layers),
        tied=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=attention_bias or family == "qwen2",
        o_bias=attention_bias,
        mlp_bias=family == "llama" and bool(config.get("mlp_bias", False)),
        qk_norm=family in ("qwen3", "qwen3_moe"),
        experts=read_experts(config, layers),
    )


def _rope_defaults(defaults: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: defaults[key] for key in ("max_position_embeddings", "rope_theta") if key in defaults
    }


def _integer(config: Mapping[str, Any], name: str) -> int:
    value = config.get(name)
    if not isinstance(value, int) or isinstance(value, bool):
        raise UnsupportedModel(f"the model's configuration lacks {name}")
    return value


def _refuse_foreign_features(config: Mapping[str, Any]) -> None:
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise UnsupportedModel(f"activation {config['hidden_act']!r} is not served")
    if config.get("quantization_config"):
        raise UnsupportedModel(
            "quantised checkpoints are not served", remedy="name the unquantised model"
        )
    classes = config.get("architectures") or []
    if classes and not any(str(name).endswith("ForCausalLM") for name in classes):
        raise UnsupportedModel(f"{classes[0]} is not a language model with an LM head")


def _context(config: Mapping[str, Any], rope: Rope, default: int) -> int:
    """Yarn's configurations may still name the length before stretching."""
    context = int(config.get("max_position_embeddings", default))
    if rope.kind == "yarn":
        given = dict(rope.parameters)
        context = max(context, int(given["factor"] * given["original_max_position_embeddings"]))
    return context


def _windows(config: Mapping[str, Any], family: str, layers: int) -> tuple[int | None, ...]:
    """The sliding window of each layer."""
    if family == "llama":
        return (None,) * layers
    window = config.get("sliding_window", None if family == "mixtral" else 4096)
    if family in MIXTURES:
        slides = family == "mixtral" or config.get("use_sliding_window", False)
        return (window if slides else None,) * layers
    types = config.get("layer_types")
    if family == "mistral":
        if types and set(types) != {"full_attention" if window is None else "sliding_attention"}:
            raise UnsupportedModel("Mistral with layers of several kinds is not served")
        return (window,) * layers
    if not config.get("use_sliding_window", False):
        window = None
    if types is None:
        first = layers if window is None else config.get("max_window_layers", 28)
        types = ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
    unknown = set(types) - {"sliding_attention", "full_attention"}
    if unknown or (window is None and "sliding_attention" in types):
        raise UnsupportedModel(f"layer_types {sorted(set(types))} with sliding_window {window}")
    return tuple(window if kind == "sliding_attention" else None for kind in types)
