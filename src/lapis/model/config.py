"""What a model is made of, as arithmetic: shapes, parameters, FLOPs and bytes. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from lapis.errors import ConfigError
from lapis.kernels.rope import RopeScaling

SUPPORTED = (
    "GPT-2; Llama-like models: Llama 2 and 3, SmolLM, Mistral, Qwen 2, 2.5 and 3; mixtures of experts: Mixtral, "
    "OLMoE, Qwen3-MoE"
)
BYTES_PER_VALUE = 2  # weights and KV cache are stored as bfloat16
MAX_CONTEXT = 1 << 20  # the rotary tables hold a row for every position
FAMILIES = ("llama", "moe", "gpt2")
HEAD_NORMS = ("", "head", "whole")
COUNTS = ("vocab_size", "layers", "width", "heads", "kv_heads", "head_size", "ffn", "context")


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder-only transformer. Raises ConfigError when the values do not fit together.

    `llama` has rotary positions, RMS norms and SwiGLU; `moe` is the same with experts in its layers; `gpt2` has
    learned positions, layer norms, GELU and biases everywhere.
    """

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
    rope_scaling: RopeScaling | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    ffn_bias: bool = False  # of gate, up and down
    head_norm: str = ""  # RMS norm of queries and keys: "head" one by one, "whole" across all heads
    window: int | None = None  # a query sees so many keys, its own counted
    full_layers: tuple[int, ...] = ()  # layers without the window
    experts: int = 0
    experts_per_token: int = 0
    expert_ffn: int = 0
    normalise_experts: bool = False  # the weights of the chosen experts sum to 1
    dense_layers: tuple[int, ...] = ()  # layers of a mixture that have a plain feed-forward part

    def __post_init__(self) -> None:
        # a configuration that went through JSON comes back with lists and objects
        if isinstance(self.rope_scaling, Mapping):
            object.__setattr__(self, "rope_scaling", RopeScaling(**self.rope_scaling))
        for name in ("full_layers", "dense_layers"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.family not in FAMILIES:
            raise ConfigError(
                f"The model family {self.family!r} is not supported.", hint=f"Supported: {SUPPORTED}."
            )
        experts = ("experts", "experts_per_token", "expert_ffn") if self.family == "moe" else ()
        for name in (*COUNTS, *experts, *(("window",) if self.window is not None else ())):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(
                    f"model: {name} = {value!r}: a positive whole number was expected.", param=name
                )
        self._check_sizes()
        self._check_layers()

    def _check_sizes(self) -> None:
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
        if not ((self.rope_base > 0 or not self.rotary) and self.norm_eps > 0):
            raise ConfigError("model: rope_base and norm_eps must be greater than zero.")
        if self.head_norm not in HEAD_NORMS:
            raise ConfigError(
                f"model: head_norm = {self.head_norm!r}: known: head, whole.", param="head_norm"
            )
        if self.experts_per_token > self.experts:
            raise ConfigError(
                f"model: {self.experts_per_token} of {self.experts} experts cannot be chosen.",
                param="experts_per_token",
            )

    def _check_layers(self) -> None:
        for name in ("full_layers", "dense_layers"):
            layers = getattr(self, name)
            if list(layers) != sorted(set(layers)) or not set(layers) <= set(range(self.layers)):
                raise ConfigError(
                    f"model: {name} = {layers}: not layers of a model of {self.layers}.", param=name
                )
        if self.family == "gpt2" and (
            not (self.qkv_bias and self.out_bias and self.ffn_bias) or self.head_norm or self.window
        ):
            raise ConfigError(
                "model: GPT-2 has biases everywhere, no norm of queries and keys, and no window."
            )
        if self.family == "moe" and self.ffn_bias:
            raise ConfigError("model: experts have no biases.", param="ffn_bias")

    @property
    def rotary(self) -> bool:
        """Whether positions are rotations of queries and keys; else each position has a learned vector."""
        return self.family != "gpt2"

    def window_of(self, layer: int) -> int | None:
        """How many keys a query of this layer sees, its own counted; None: all."""
        return None if layer in self.full_layers else self.window

    def is_mixture(self, layer: int) -> bool:
        """Whether this layer has experts."""
        return self.family == "moe" and layer not in self.dense_layers

    @property
    def attention_parameters(self) -> int:
        """Weights of the linear maps of one layer's attention, biases and norms not counted."""
        return self.width * self.head_size * (2 * self.heads + 2 * self.kv_heads)

    @property
    def expert_parameters(self) -> int:
        """Weights of one expert."""
        return 3 * self.width * self.expert_ffn

    def layer_parameters(self, layer: int, *, active: bool = False) -> int:
        """Weights of the linear maps of a layer; `active`: of the experts only those that a token uses."""
        if self.is_mixture(layer):
            experts = self.experts_per_token if active else self.experts
            return self.attention_parameters + experts * self.expert_parameters + self.experts * self.width
        maps = 2 if self.family == "gpt2" else 3
        return self.attention_parameters + maps * self.width * self.ffn

    def _vectors(self, layer: int) -> int:
        """Norms and biases of a layer."""
        query, key = self.heads * self.head_size, self.kv_heads * self.head_size
        count = 2 * self.width * self._norm_vectors
        count += (query + 2 * key) * self.qkv_bias + self.width * self.out_bias
        count += {"": 0, "head": 2 * self.head_size, "whole": query + key}[self.head_norm]
        if self.ffn_bias and not self.is_mixture(layer):
            count += self.width + self.ffn * (1 if self.family == "gpt2" else 2)
        return count

    @property
    def _norm_vectors(self) -> int:
        return 2 if self.family == "gpt2" else 1  # a layer norm has a bias too

    @property
    def parameters(self) -> int:
        """All weights; a tied embedding counts once."""
        embeddings = self.vocab_size * self.width * (1 if self.tied else 2)
        positions = 0 if self.rotary else self.context * self.width
        layers = sum(self.layer_parameters(layer) + self._vectors(layer) for layer in range(self.layers))
        return embeddings + positions + layers + self.width * self._norm_vectors

    @property
    def active_parameters(self) -> int:
        """Weights that one token uses: all of them without experts."""
        idle = (self.experts - self.experts_per_token) * self.expert_parameters
        return self.parameters - idle * sum(self.is_mixture(layer) for layer in range(self.layers))

    @property
    def matmul_parameters(self) -> int:
        """Weights that are multiplied for every token: the linear maps of the layers and the head."""
        layers = sum(self.layer_parameters(layer, active=True) for layer in range(self.layers))
        return layers + self.vocab_size * self.width

    def flops_per_token(self, context: int) -> int:
        """FLOPs of forward and backward for one token that sees `context` tokens (PaLM, appendix B)."""
        seen = sum(min(context, self.window_of(layer) or context) for layer in range(self.layers))
        return 6 * self.matmul_parameters + 12 * self.heads * self.head_size * seen

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights in bfloat16."""
        return BYTES_PER_VALUE * self.parameters

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values that one token keeps in the cache, all layers."""
        return BYTES_PER_VALUE * 2 * self.layers * self.kv_heads * self.head_size


def as_facts(config: ModelConfig) -> dict[str, Any]:
    """The configuration with its derived numbers, as `lapis models show` prints it."""
    return {
        **asdict(config),
        "parameters": config.parameters,
        "active_parameters": config.active_parameters,
        "weight_bytes": config.weight_bytes,
        "kv_bytes_per_token": config.kv_bytes_per_token,
        "flops_per_token": config.flops_per_token(config.context),
    }


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

# the laptop's size as GPT-2, and as a mixture with the same work for a token
NAMED["laptop-gpt2"] = replace(
    NAMED["laptop"], family="gpt2", ffn=1536, rope_base=0.0, qkv_bias=True, out_bias=True, ffn_bias=True
)
NAMED["laptop-moe"] = replace(
    NAMED["laptop"],
    family="moe",
    ffn=512,
    experts=8,
    experts_per_token=2,
    expert_ffn=512,
    normalise_experts=True,
)

# the sizes of GPT-2 (Radford et al. 2019) and of Llama 3.2 1B, and that one with eight experts in each layer
NAMED["gpt2-124m"] = replace(
    NAMED["laptop-gpt2"],
    vocab_size=50_304,
    layers=12,
    width=768,
    heads=12,
    kv_heads=12,
    ffn=3072,
    context=1024,
)
NAMED["llama-1b"] = replace(
    NAMED["laptop"],
    vocab_size=128_256,
    layers=16,
    width=2048,
    heads=32,
    kv_heads=8,
    ffn=8192,
    context=8192,
    rope_base=500_000.0,
)
NAMED["moe-8x1b"] = replace(
    NAMED["llama-1b"], family="moe", experts=8, experts_per_token=2, expert_ffn=8192, normalise_experts=True
)
