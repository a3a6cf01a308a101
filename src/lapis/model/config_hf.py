"""Hugging Face's config.json in and out, of transformers 4 and 5. No torch here.

Whatever changes the computation is either read or refused with its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lapis.errors import ConfigError
from lapis.kernels.rope import SCALINGS, RopeScaling, yarn_attention
from lapis.model.config import SUPPORTED, ModelConfig

GPT2 = "gpt2"
MIXTURES = ("mixtral", "olmoe", "qwen3_moe")
CLASSES = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "olmoe": "OlmoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}

# What transformers takes where a key is missing; None: as many as heads, or width / heads.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "mistral": {"context": 131072, "kv_heads": 8, "window": 4096},
    "qwen2": {"context": 32768, "kv_heads": 32},
    "qwen3": {"context": 32768, "kv_heads": 32, "head_size": 128},
    "mixtral": {"context": 131072, "kv_heads": 8, "eps": 1e-5, "base": 1e6, "experts": 8, "chosen": 2},
    "olmoe": {"context": 4096, "eps": 1e-5, "experts": 64, "chosen": 8},
    "qwen3_moe": {"context": 32768, "kv_heads": 4, "experts": 128, "chosen": 8, "expert_ffn": 768},
}

# Keys that change the computation; each must have one of these values, or be left out.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "partial_rotary_factor": (1, 1.0, None),
    "quantization_config": (None,),
    "no_rope_layers": (None,),
    "use_qk_norm": (None, False),
    "clip_qkv": (None,),
    "logit_scale": (None, 1, 1.0),
    "embedding_multiplier": (None, 1, 1.0),
}
_NO_EXPERTS = {"num_local_experts": (None, 0, 1), "num_experts": (None, 0, 1)}
_NO_BIAS = {"attention_bias": (False, None), "mlp_bias": (False, None)}
_NEUTRAL_OF: dict[str, dict[str, tuple[Any, ...]]] = {
    "llama": _NO_EXPERTS,
    "mistral": _NO_EXPERTS | _NO_BIAS,
    "qwen2": _NO_EXPERTS | {"attention_bias": (True,), "mlp_bias": (False, None)},
    "qwen3": _NO_EXPERTS | {"mlp_bias": (False, None)},
    "mixtral": _NO_BIAS,
    "olmoe": {"mlp_bias": (False, None)},
    "qwen3_moe": {"mlp_bias": (False, None)},
}
_NEUTRAL_GPT2: dict[str, tuple[Any, ...]] = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),  # one formula, two names
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "quantization_config": (None,),
}
_ROPE_KEYS = {
    "rope_type",
    "type",
    "rope_theta",
    "partial_rotary_factor",
    "factor",
    "original_max_position_embeddings",
    "low_freq_factor",
    "high_freq_factor",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "truncate",
    "finetuned",
}


def from_hf(values: Mapping[str, Any]) -> ModelConfig:
    """Read a Hugging Face config.json. Raises ConfigError for a model whose computation is not ours."""
    kind = values.get("model_type")
    if kind not in CLASSES:
        raise ConfigError(f"A model of type {kind!r} is not supported.", hint=f"Supported: {SUPPORTED}.")
    neutral = _NEUTRAL_GPT2 if kind == GPT2 else NEUTRAL | _NEUTRAL_OF[kind]
    for key, allowed in neutral.items():
        if key in values and values[key] not in allowed:
            raise _unsupported(f"{key} = {values[key]!r}")
    return _from_gpt2(values) if kind == GPT2 else _from_llama_like(kind, values)


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """The config.json with which transformers computes the same. Raises ConfigError if none of its models does."""
    kind = hf_kind(config)
    result = {"architectures": [CLASSES[kind]], "model_type": kind, "torch_dtype": "bfloat16"}
    result |= _to_gpt2(config) if kind == GPT2 else _to_llama_like(config, kind)
    if from_hf(result) != config:
        raise ConfigError(f"No model of transformers computes what this {config.family} model does.")
    return result


def _from_gpt2(values: Mapping[str, Any]) -> ModelConfig:
    width, heads = _whole(values, "n_embd", 768), _whole(values, "n_head", 12)
    if width % heads:
        raise ConfigError(f"config.json: n_embd = {width} cannot be shared by n_head = {heads} evenly.")
    return ModelConfig(
        family="gpt2",
        vocab_size=_whole(values, "vocab_size", 50257),
        layers=_whole(values, "n_layer", 12),
        width=width,
        heads=heads,
        kv_heads=heads,
        head_size=width // heads,
        ffn=_whole(values, "n_inner", 4 * width),
        context=_whole(values, "n_positions", 1024),
        rope_base=0.0,
        norm_eps=_number("layer_norm_epsilon", values.get("layer_norm_epsilon", 1e-5)),
        tied=_flag(values, "tie_word_embeddings", True),
        qkv_bias=True,
        out_bias=True,
        ffn_bias=True,
    )


def _to_gpt2(config: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "n_positions": config.context,
        "n_embd": config.width,
        "n_layer": config.layers,
        "n_head": config.heads,
        "n_inner": config.ffn,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tied,
    }


def _from_llama_like(kind: str, values: Mapping[str, Any]) -> ModelConfig:
    defaults = _DEFAULTS.get(kind, {})
    width, heads = _whole(values, "hidden_size"), _whole(values, "num_attention_heads")
    layers, ffn = _whole(values, "num_hidden_layers"), _whole(values, "intermediate_size")
    context = _whole(values, "max_position_embeddings", defaults.get("context", 2048))
    base, scaling = _rope(values, defaults.get("base", 10000.0), context)
    window, full_layers = _window(kind, values, layers, context)
    # an explicit null means as many as heads, for every model
    kv_default = heads if "num_key_value_heads" in values else defaults.get("kv_heads", heads)
    bias = _flag(values, "attention_bias", False)
    return ModelConfig(
        family="moe" if kind in MIXTURES else "llama",
        vocab_size=_whole(values, "vocab_size"),
        layers=layers,
        width=width,
        heads=heads,
        kv_heads=_whole(values, "num_key_value_heads", kv_default),
        head_size=_whole(values, "head_dim", defaults.get("head_size", width // heads)),
        ffn=ffn,
        context=context,
        rope_base=base,
        norm_eps=_number("rms_norm_eps", values.get("rms_norm_eps", defaults.get("eps", 1e-6))),
        tied=_flag(values, "tie_word_embeddings", False),
        rope_scaling=scaling,
        qkv_bias=bias or kind == "qwen2",
        out_bias=bias and kind != "qwen2",
        ffn_bias=_flag(values, "mlp_bias", False),
        head_norm={"qwen3": "head", "qwen3_moe": "head", "olmoe": "whole"}.get(kind, ""),
        window=window,
        full_layers=full_layers,
        **(_experts(kind, values, layers, ffn) if kind in MIXTURES else {}),
    )


def _experts(kind: str, values: Mapping[str, Any], layers: int, ffn: int) -> dict[str, Any]:
    defaults = _DEFAULTS[kind]
    key = "num_local_experts" if "num_local_experts" in values else "num_experts"
    dense: set[int] = set()
    if kind == "qwen3_moe":
        only = values.get("mlp_only_layers") or []
        step = _whole(values, "decoder_sparse_step", 1)
        dense = {layer for layer in range(layers) if layer in only or (layer + 1) % step}
    return {
        "experts": _whole(values, key, defaults["experts"]),
        "experts_per_token": _whole(values, "num_experts_per_tok", defaults["chosen"]),
        "expert_ffn": _whole(values, "moe_intermediate_size", defaults["expert_ffn"])
        if kind == "qwen3_moe"
        else ffn,
        "normalise_experts": kind == "mixtral" or _flag(values, "norm_topk_prob", False),
        "dense_layers": tuple(sorted(dense)),
    }


def _window(
    kind: str, values: Mapping[str, Any], layers: int, context: int
) -> tuple[int | None, tuple[int, ...]]:
    """The sliding window and the layers without it; a window as long as the context is none."""
    types = values.get("layer_types")
    if types is not None and (
        not isinstance(types, list)
        or len(types) != layers
        or not set(types) <= {"full_attention", "sliding_attention"}
    ):
        raise _unsupported(f"layer_types = {types!r}")
    window = values.get("sliding_window", _DEFAULTS.get(kind, {}).get("window"))
    if kind.startswith("qwen"):
        window = values.get("sliding_window", 4096) if values.get("use_sliding_window") else None
    if window is not None and (not isinstance(window, int) or isinstance(window, bool) or window < 1):
        raise _unsupported(f"sliding_window = {window!r}")
    if window is not None and window >= context:
        window = None
    if window is None:
        if types is not None and "sliding_attention" in types and context > 1:
            sees = values.get("sliding_window")
            if not (isinstance(sees, int) and sees >= context):
                raise _unsupported(f"layer_types with sliding attention, but sliding_window = {sees!r}")
        return None, ()
    if kind in ("llama", "olmoe"):
        raise _unsupported(f"sliding_window = {window!r} in a model of type {kind!r}")
    full: list[int] = []
    if kind in ("qwen2", "qwen3"):
        first = values.get("max_window_layers", 28)
        given = types or [
            "sliding_attention" if layer >= first else "full_attention" for layer in range(layers)
        ]
        full = [layer for layer, name in enumerate(given) if name == "full_attention"]
    elif types is not None and "full_attention" in types:
        raise _unsupported(f"layer_types = {types!r} in a model of type {kind!r}")
    return (None, ()) if len(full) == layers else (window, tuple(full))


def _rope(values: Mapping[str, Any], default_base: float, context: int) -> tuple[float, RopeScaling | None]:
    """Rotary base and scaling, from `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (4)."""
    base, found = values.get("rope_theta", default_base), {}
    for key in ("rope_parameters", "rope_scaling"):  # transformers prefers the latter
        rope = values.get(key)
        if rope is None:
            continue
        if not isinstance(rope, dict):
            raise ConfigError(f"config.json: {key} = {rope!r}: an object was expected.")
        odd = sorted(name for name in rope if name not in _ROPE_KEYS)
        if odd or rope.get("partial_rotary_factor") not in (None, 1, 1.0):
            raise _unsupported(f"{key} with {', '.join(odd) or 'partial_rotary_factor'} ({rope!r})")
        base, found = rope.get("rope_theta", base), rope
    kind = found.get("rope_type", found.get("type", "default"))
    if kind == "default":
        return _number("rope_theta", base), None
    if kind not in SCALINGS:
        raise _unsupported(f"rope scaling of type {kind!r} ({found!r})")
    return _number("rope_theta", base), _scaling(kind, found, values, context)


def _scaling(kind: str, rope: Mapping[str, Any], values: Mapping[str, Any], context: int) -> RopeScaling:
    factor = _number("factor", rope.get("factor"))
    if kind == "linear":
        return RopeScaling(kind, factor)
    original = values.get("original_max_position_embeddings") or _whole(
        rope, "original_max_position_embeddings", context
    )
    if kind == "llama3":
        low = _number("low_freq_factor", rope.get("low_freq_factor"))
        high = _number("high_freq_factor", rope.get("high_freq_factor"))
        return RopeScaling(kind, factor, original, low=low, high=high)
    attention, scale, whole = (rope.get(key) for key in ("attention_factor", "mscale", "mscale_all_dim"))
    if attention is None:
        attention = yarn_attention(factor)
        if scale and whole:
            attention = yarn_attention(factor, scale) / yarn_attention(factor, whole)
    return RopeScaling(
        kind,
        factor,
        original,
        beta_fast=_number("beta_fast", rope.get("beta_fast") or 32.0),
        beta_slow=_number("beta_slow", rope.get("beta_slow") or 1.0),
        attention=_number("attention_factor", attention),
        truncate=_flag(rope, "truncate", True),
    )


def hf_kind(config: ModelConfig) -> str:
    """Hugging Face's `model_type` of such a model."""
    if config.family == "gpt2":
        return GPT2
    if config.family == "moe":
        return {"": "mixtral", "head": "qwen3_moe", "whole": "olmoe"}[config.head_norm]
    if config.head_norm:
        return "qwen3"
    if config.qkv_bias and not config.out_bias:
        return "qwen2"
    return "mistral" if config.window else "llama"


def _to_llama_like(config: ModelConfig, kind: str) -> dict[str, Any]:
    result: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "intermediate_size": config.ffn,
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
        "hidden_act": "silu",
        "rope_theta": config.rope_base,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},
    }
    if config.rope_scaling is not None:
        scaling = _to_rope(config.rope_scaling)
        result |= {
            "rope_scaling": scaling | {"type": scaling["rope_type"]},
            "rope_parameters": scaling | {"rope_theta": config.rope_base},
        }
    if kind in ("llama", "qwen3", "qwen3_moe", "olmoe"):
        result["attention_bias"] = config.out_bias
    if kind == "llama":
        result["mlp_bias"] = config.ffn_bias
    if kind in ("mistral", "mixtral"):
        result["sliding_window"] = config.window
    if kind in ("qwen2", "qwen3"):
        names = [
            "sliding_attention" if config.window_of(i) else "full_attention" for i in range(config.layers)
        ]
        result |= {
            "use_sliding_window": config.window is not None,
            "sliding_window": config.window,
            "max_window_layers": next(
                (i for i in range(config.layers) if config.window_of(i)), config.layers
            ),
            "layer_types": names,
        }
    return result | _to_experts(config, kind)


def _to_experts(config: ModelConfig, kind: str) -> dict[str, Any]:
    if kind not in MIXTURES:
        return {}
    result: dict[str, Any] = {
        "num_local_experts" if kind == "mixtral" else "num_experts": config.experts,
        "num_experts_per_tok": config.experts_per_token,
    }
    if kind != "mixtral":
        result["norm_topk_prob"] = config.normalise_experts
    if kind == "qwen3_moe":
        result |= {
            "moe_intermediate_size": config.expert_ffn,
            "decoder_sparse_step": 1,
            "mlp_only_layers": list(config.dense_layers),
            "use_sliding_window": config.window is not None,
            "sliding_window": config.window,
        }
    return result


def _to_rope(scaling: RopeScaling) -> dict[str, Any]:
    result: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "linear":
        return result
    result["original_max_position_embeddings"] = scaling.original_context
    if scaling.kind == "llama3":
        return result | {"low_freq_factor": scaling.low, "high_freq_factor": scaling.high}
    return result | {
        "beta_fast": scaling.beta_fast,
        "beta_slow": scaling.beta_slow,
        "attention_factor": scaling.attention,
        "truncate": scaling.truncate,
    }


def _unsupported(what: str) -> ConfigError:
    return ConfigError(f"config.json: {what} is not supported.", hint=f"Supported: {SUPPORTED}.")


def _flag(values: Mapping[str, Any], key: str, default: bool) -> bool:
    value = values.get(key)
    if value is None:
        value = default
    if not isinstance(value, bool):
        raise ConfigError(f"config.json: {key} = {value!r}: true or false was expected.")
    return value


def _whole(values: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = values.get(key)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"config.json: {key} = {value!r}: a positive whole number was expected.")
    return value


def _number(key: str, value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ConfigError(f"config.json: {key} = {value!r}: a number was expected.")
    return float(value)
