"""What a model is made of, as arithmetic: shapes, parameters, FLOPs and bytes. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lapis.errors import ConfigError

SUPPORTED = (
    "Llama-like models: Llama without rope scaling, SmolLM and SmolLM2, Mistral without sliding window"
)
BYTES_PER_VALUE = 2  # weights and KV cache are stored as bfloat16
MAX_CONTEXT = 1 << 20  # the rotary tables hold a row for every position

# model_type of a Hugging Face config.json -> family here
FAMILIES = {"llama": "llama", "mistral": "llama"}

# Keys of a config.json that change the computation; each must have one of these values, or be left out.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "partial_rotary_factor": (1, 1.0),
    "num_local_experts": (None, 0, 1),
    "num_experts": (None, 0, 1),
    "quantization_config": (None,),
    "no_rope_layers": (None,),
    "use_qk_norm": (None, False),
    "logit_scale": (None, 1, 1.0),
    "embedding_multiplier": (None, 1, 1.0),
}


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder-only transformer. Raises ConfigError when the values do not fit together."""

    family: str
    vocab_size: int
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_size: int
    ffn: int
    context: int
    rope_base: float
    norm_eps: float
    tied: bool

    def __post_init__(self) -> None:
        if self.family not in set(FAMILIES.values()):
            raise ConfigError(
                f"The model family {self.family!r} is not supported.", hint=f"Supported: {SUPPORTED}."
            )
        for name in ("vocab_size", "layers", "width", "heads", "kv_heads", "head_size", "ffn", "context"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(
                    f"model: {name} = {value!r}: a positive whole number was expected.", param=name
                )
        if self.heads % self.kv_heads:
            raise ConfigError(
                f"model: {self.heads} heads cannot share {self.kv_heads} kv_heads evenly.", param="kv_heads"
            )
        if self.head_size % 2:
            raise ConfigError(
                f"model: head_size = {self.head_size}: rotary embeddings need an even number.",
                param="head_size",
            )
        if self.context > MAX_CONTEXT:
            raise ConfigError(
                f"model: context = {self.context}: at most {MAX_CONTEXT} is offered.", param="context"
            )
        if not (self.rope_base > 0 and self.norm_eps > 0):
            raise ConfigError("model: rope_base and norm_eps must be greater than zero.")

    @property
    def layer_parameters(self) -> int:
        """Weights of the linear maps of one layer, norms not counted."""
        attention = self.width * self.head_size * (2 * self.heads + 2 * self.kv_heads)
        return attention + 3 * self.width * self.ffn

    @property
    def parameters(self) -> int:
        """All weights; a tied embedding counts once."""
        embeddings = self.vocab_size * self.width * (1 if self.tied else 2)
        return embeddings + self.layers * (self.layer_parameters + 2 * self.width) + self.width

    @property
    def matmul_parameters(self) -> int:
        """Weights that are multiplied for every token: the linear maps of the layers and the head."""
        return self.layers * self.layer_parameters + self.vocab_size * self.width

    def flops_per_token(self, context: int) -> int:
        """FLOPs of forward and backward for one token that sees `context` tokens (PaLM, appendix B)."""
        return 6 * self.matmul_parameters + 12 * self.layers * self.heads * self.head_size * context

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights in bfloat16."""
        return BYTES_PER_VALUE * self.parameters

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values that one token keeps in the cache, all layers."""
        return BYTES_PER_VALUE * 2 * self.layers * self.kv_heads * self.head_size

    def to_hf(self) -> dict[str, Any]:
        """The config.json of Hugging Face's `LlamaForCausalLM` (both the old and the new rope keys)."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocab_size,
            "hidden_size": self.width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_size,
            "intermediate_size": self.ffn,
            "max_position_embeddings": self.context,
            "rope_theta": self.rope_base,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_base},
            "rms_norm_eps": self.norm_eps,
            "tie_word_embeddings": self.tied,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "torch_dtype": "bfloat16",
        }


def from_hf(values: Mapping[str, Any]) -> ModelConfig:
    """Read a Hugging Face config.json. Raises ConfigError for a model whose computation is not ours."""
    kind = values.get("model_type")
    if kind not in FAMILIES:
        raise ConfigError(f"A model of type {kind!r} is not supported.", hint=f"Supported: {SUPPORTED}.")
    for key, allowed in NEUTRAL.items():
        if key in values and values[key] not in allowed:
            raise _unsupported(f"{key} = {values[key]!r}")
    context = _whole(values, "max_position_embeddings", 2048)
    _check_window(values, context)
    width, heads = _whole(values, "hidden_size"), _whole(values, "num_attention_heads")
    tied = values.get("tie_word_embeddings", False)
    if not isinstance(tied, bool):
        raise ConfigError(f"config.json: tie_word_embeddings = {tied!r}: true or false was expected.")
    return ModelConfig(
        family=FAMILIES[kind],
        vocab_size=_whole(values, "vocab_size"),
        layers=_whole(values, "num_hidden_layers"),
        width=width,
        heads=heads,
        kv_heads=_whole(values, "num_key_value_heads", heads),
        head_size=_whole(values, "head_dim", width // heads),
        ffn=_whole(values, "intermediate_size"),
        context=context,
        rope_base=_rope_base(values),
        norm_eps=_number("rms_norm_eps", values.get("rms_norm_eps", 1e-6)),
        tied=tied,
    )


def as_facts(config: ModelConfig) -> dict[str, Any]:
    """The configuration with its derived numbers, as `lapis models show` prints it."""
    return {
        **asdict(config),
        "parameters": config.parameters,
        "weight_bytes": config.weight_bytes,
        "kv_bytes_per_token": config.kv_bytes_per_token,
        "flops_per_token": config.flops_per_token(config.context),
    }


def _unsupported(what: str) -> ConfigError:
    return ConfigError(f"config.json: {what} is not supported.", hint=f"Supported: {SUPPORTED}.")


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


def _check_window(values: Mapping[str, Any], context: int) -> None:
    """A sliding window matters only when it is in use and shorter than the context."""
    window = values.get("sliding_window")
    if window is None or values.get("use_sliding_window") is False:
        return
    if not isinstance(window, int) or window < context:
        raise _unsupported(f"sliding_window = {window!r} with a context of {context}")


def _rope_base(values: Mapping[str, Any]) -> float:
    """The rotary base, from `rope_parameters` (new) or `rope_theta` (old); refuses every kind of scaling."""
    base = values.get("rope_theta", 10000.0)
    for key in ("rope_scaling", "rope_parameters"):
        rope = values.get(key)
        if rope is None:
            continue
        if not isinstance(rope, dict):
            raise ConfigError(f"config.json: {key} = {rope!r}: an object was expected.")
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise _unsupported(f"{key} of type {kind!r} ({rope!r})")
        base = rope.get("rope_theta", base)
    return _number("rope_theta", base)


NAMED: dict[str, ModelConfig] = {
    "laptop": ModelConfig(
        family="llama",
        vocab_size=8192,
        layers=6,
        width=384,
        heads=6,
        kv_heads=6,
        head_size=64,
        ffn=1024,
        context=512,
        rope_base=10000.0,
        norm_eps=1e-5,
        tied=True,
    ),
    "tiny": ModelConfig(
        family="llama",
        vocab_size=512,
        layers=2,
        width=64,
        heads=1,
        kv_heads=1,
        head_size=64,
        ffn=128,
        context=128,
        rope_base=10000.0,
        norm_eps=1e-5,
        tied=True,
    ),
}
