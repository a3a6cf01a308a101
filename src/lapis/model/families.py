"""The model definitions: one forward for training, scoring, prefill and decode.

Dims: T tokens of a batch, H width, F ffn, V vocabulary, R rows with logits, P positions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lapis.errors import UnavailableError
from lapis.kernels.batch import PAGE, Batch, LayerCache
from lapis.kernels.memory import LargePages
from lapis.kernels.ops import Ops, Rope, select
from lapis.kernels.quantized import Kind, Quantized, quantize
from lapis.model.attention import AttentionLayer
from lapis.model.config import ModelConfig
from lapis.model.layers import adapted, optional, weight
from lapis.model.moe import MixtureLayer
from lapis.model.shapes import shapes

INIT_STD = 0.02
LINEAR = frozenset(
    {"qkv", "out", "gate_up", "up", "down", "router", "head"}
)  # weights of linear and nothing else
# the large linear maps of a layer: what 8 or 4 bits are for
QUANTIZED = ("qkv", "out", "gate_up", "up", "down", "experts_gate_up", "experts_down")


def build(config: ModelConfig, ops: Ops | None = None, dtype: torch.dtype = torch.bfloat16) -> Decoder:
    """The model of a configuration; its weights are not set until `init_weights` or a load fills them."""
    model = (GPT2 if config.family == "gpt2" else Llama)(config, ops, dtype)
    return model.to(model.ops.device)


def skeleton(config: ModelConfig, ops: Ops, dtype: torch.dtype) -> Decoder:
    """The model of a configuration without memory for its weights: they lie on torch's meta device."""
    with torch.device("meta"):
        return (GPT2 if config.family == "gpt2" else Llama)(config, ops, dtype)


def initial_weights(config: ModelConfig, seed: int) -> Iterator[tuple[str, Tensor]]:
    """The weights that a seed gives, one by one in fp32: normal, std 0.02; layer outputs / √(2 · layers) (GPT-2)."""
    generator = torch.Generator().manual_seed(seed)
    scale = (2 * config.layers) ** -0.5
    for name, shape in shapes(config).items():
        if len(shape) == 1:
            yield name, torch.full(shape, 0.0 if name.endswith("_bias") else 1.0)
            continue
        std = INIT_STD * (scale if name.endswith((".out", "down")) else 1.0)
        yield name, torch.empty(shape).normal_(0.0, std, generator=generator)


class Decoder(nn.Module, ABC):
    """A decoder over `Ops`: embedding, layers, final norm, head. The families fill in what differs."""

    def __init__(
        self, config: ModelConfig, ops: Ops | None = None, dtype: torch.dtype = torch.bfloat16
    ) -> None:
        super().__init__()
        self.config = config
        widths = (config.width, config.ffn, *((config.expert_ffn,) if config.experts else ()))
        self.ops = ops if ops is not None else select(config.head_size, widths=widths, dtype=dtype)
        self.rope = (
            Rope.make(
                config.head_size,
                config.rope_base,
                config.context,
                config.rope_scaling,
                filled=0,
                device=self.ops.device,
            )
            if config.rotary
            else None
        )
        # adapters in training: called with a batch that has none, it gives the batch that has them
        self.lora: nn.Module | None = None
        self.embed = weight(dtype, config.vocab_size, config.width)
        self.layers = nn.ModuleList(self.new_layer(index, dtype) for index in range(config.layers))
        self.norm = weight(dtype, config.width)
        if not config.tied:
            self.head = weight(dtype, config.vocab_size, config.width)
        self._quantized_head: Quantized | None = None
        self.sealed = False

    @abstractmethod
    def new_layer(self, index: int, dtype: torch.dtype) -> AttentionLayer:
        """The weights of one layer, not set yet."""

    @property
    def head_weight(self) -> Tensor | Quantized:
        """The (V, H) matrix that makes logits: the embedding when tied; a copy in 8 bits when quantised."""
        if self._quantized_head is not None:
            return self._quantized_head
        return self.embed if self.config.tied else self.head

    @property
    def dtype(self) -> torch.dtype:
        """What rows, keys and values are computed in, and weights stored unless they are quantised."""
        return self.embed.dtype

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights as they are held now."""
        quantized = [value for layer in self.layers for value in vars(layer).values()] + [
            self._quantized_head
        ]
        held = sum(parameter.nbytes for parameter in self.parameters())
        return held + sum(value.nbytes for value in quantized if isinstance(value, Quantized))

    def forward(self, ids_T: Tensor, batch: Batch, rows: Tensor | None = None) -> Tensor:
        """Float32 logits (R, V) of the chosen rows, or of all T."""
        x_TH = self.hidden(ids_T, batch)
        return self.logits(x_TH if rows is None else self.ops.embedding(rows.to(x_TH.device), x_TH))

    def logits(self, x_RH: Tensor) -> Tensor:
        """Float32 logits (R, V) of hidden rows."""
        return self.ops.linear(x_RH, self.head_weight, fp32=True)

    def hidden(self, ids_T: Tensor, batch: Batch) -> Tensor:
        """Hidden rows (T, H) after the final norm; keys and values go into the batch's caches."""
        if self.rope is not None:
            self.rope.reach(batch.positions)
        if self.lora is not None and batch.adapters is None:
            batch = self.lora(batch)
        ids_T, batch = ids_T.to(self.ops.device), batch.on(self.ops.device)
        x_TH = self.embedded(ids_T, batch)
        for layer in self.layers:
            x_TH = layer(self.ops, x_TH, batch, self.rope)
        return self.normed(x_TH)

    def embedded(self, ids_T: Tensor, batch: Batch) -> Tensor:
        """The rows (T, H) that enter the first layer."""
        return self.ops.embedding(ids_T, self.embed)

    def normed(self, x_TH: Tensor) -> Tensor:
        """The final norm."""
        return self.ops.rms_norm(x_TH, self.norm, self.config.norm_eps)

    def new_caches(self, pages: int, *, int8: bool = False) -> list[LayerCache]:
        """Empty key and value pages, one pool a layer, in bf16 or int8."""
        if self.rope is not None:
            self.rope.reach(pages * PAGE)
        return [
            self.ops.new_cache(pages, self.config.kv_heads, self.config.head_size, int8=int8)
            for _ in range(self.config.layers)
        ]

    def quantize(self, kind: Kind) -> None:
        """Keep the linear maps of the layers in 8 or 4 bits and the head in 8, for inference only.

        The bf16 weights of these are dropped; embedding, routers, norms and biases stay. Raises
        UnavailableError on a GPU.
        """
        if self.ops.device.type != "cpu":
            raise UnavailableError(
                "Weights in 8 or 4 bits are not offered on a GPU.", hint="Use bf16: --weights bf16."
            )
        for layer in self.layers:
            for name in [name for name in QUANTIZED if name in layer._parameters]:
                small = quantize(getattr(layer, name), kind)
                delattr(layer, name)
                setattr(layer, name, small)
        head = self.head_weight
        if isinstance(head, Tensor):
            self._quantized_head = quantize(head, "int8")
            if not self.config.tied:
                del self.head

    @torch.no_grad()
    def seal(self) -> None:
        """Make it a model for serving only, whose weights will not change any more.

        Matrices that only `linear` uses exist in its layout alone.
        """
        self.sealed = True
        pages = LargePages()
        for module in self.modules():
            for name, value in list(vars(module).items()):
                if isinstance(value, Quantized):
                    setattr(module, name, value.in_large_pages(pages))
            for name, parameter in module.named_parameters(recurse=False):
                kept = parameter if parameter.ndim != 2 or name not in LINEAR else self.ops.sealed(parameter)
                if kept is parameter:  # no longer a part of the file that it came from
                    kept = nn.Parameter(parameter.detach().clone(), requires_grad=False)
                setattr(module, name, kept)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Fill all weights from a seed (`initial_weights`)."""
        for name, value in initial_weights(self.config, seed):
            self.get_parameter(name).copy_(value)


class LlamaLayer(AttentionLayer):
    """Attention, then a feed-forward part with joined gate and up (SwiGLU), each after an RMS norm."""

    def __init__(self, config: ModelConfig, index: int, dtype: torch.dtype) -> None:
        super().__init__(config, index, dtype)
        width, ffn = config.width, config.ffn
        self.ffn_norm = weight(dtype, width)
        self.gate_up = weight(dtype, 2 * ffn, width)
        self.down = weight(dtype, width, ffn)
        self.gate_up_bias = optional(config.ffn_bias, dtype, 2 * ffn)
        self.down_bias = optional(config.ffn_bias, dtype, width)

    def forward(self, ops: Ops, x_TH: Tensor, batch: Batch, rope: Rope | None) -> Tensor:
        """The rows after this layer."""
        eps = self.config.norm_eps
        x_TH = self.attend(ops, x_TH, ops.rms_norm(x_TH, self.attn_norm, eps), batch, rope)
        n_TH = ops.rms_norm(x_TH, self.ffn_norm, eps)
        gate_up_T2F = ops.linear(n_TH, self.gate_up, bias_N=self.gate_up_bias)
        a_TF = ops.silu_mul(adapted(ops, "gate_up", gate_up_T2F, n_TH, batch, self.index))
        y_TH = ops.linear(a_TF, self.down, x_TH, bias_N=self.down_bias)
        return adapted(ops, "down", y_TH, a_TF, batch, self.index)


class Llama(Decoder):
    """Llama and its kin (Mistral, Qwen; Mixtral, OLMoE, Qwen3-MoE): rotary positions, RMS norms, SwiGLU."""

    def new_layer(self, index: int, dtype: torch.dtype) -> AttentionLayer:
        """A layer, with experts where the config says so."""
        kind = MixtureLayer if self.config.is_mixture(index) else LlamaLayer
        return kind(self.config, index, dtype)


class GPT2Layer(AttentionLayer):
    """Attention, then a feed-forward part with GELU, each after a layer norm; biases everywhere."""

    def __init__(self, config: ModelConfig, index: int, dtype: torch.dtype) -> None:
        super().__init__(config, index, dtype)
        width, ffn = config.width, config.ffn
        self.attn_norm_bias = weight(dtype, width)
        self.ffn_norm = weight(dtype, width)
        self.ffn_norm_bias = weight(dtype, width)
        self.up = weight(dtype, ffn, width)
        self.up_bias = weight(dtype, ffn)
        self.down = weight(dtype, width, ffn)
        self.down_bias = weight(dtype, width)

    def forward(self, ops: Ops, x_TH: Tensor, batch: Batch, rope: Rope | None) -> Tensor:
        """The rows after this layer."""
        eps = self.config.norm_eps
        n_TH = ops.layer_norm(x_TH, self.attn_norm, self.attn_norm_bias, eps)
        x_TH = self.attend(ops, x_TH, n_TH, batch, rope)
        n_TH = ops.layer_norm(x_TH, self.ffn_norm, self.ffn_norm_bias, eps)
        up_TF = ops.linear(n_TH, self.up, bias_N=self.up_bias)
        a_TF = ops.gelu(adapted(ops, "up", up_TF, n_TH, batch, self.index))
        y_TH = ops.linear(a_TF, self.down, x_TH, bias_N=self.down_bias)
        return adapted(ops, "down", y_TH, a_TF, batch, self.index)


class GPT2(Decoder):
    """GPT-2 (Radford et al. 2019): a learned vector for each position, layer norms, GELU."""

    def __init__(
        self, config: ModelConfig, ops: Ops | None = None, dtype: torch.dtype = torch.bfloat16
    ) -> None:
        super().__init__(config, ops, dtype)
        self.positions = weight(dtype, config.context, config.width)
        self.norm_bias = weight(dtype, config.width)

    def new_layer(self, index: int, dtype: torch.dtype) -> AttentionLayer:
        """A layer."""
        return GPT2Layer(self.config, index, dtype)

    def embedded(self, ids_T: Tensor, batch: Batch) -> Tensor:
        """Token and position vector of each row, added with one rounding."""
        return self.ops.embedding(ids_T, self.embed, (batch.position_T, self.positions))

    def normed(self, x_TH: Tensor) -> Tensor:
        """The final layer norm."""
        return self.ops.layer_norm(x_TH, self.norm, self.norm_bias, self.config.norm_eps)
