"""The model definition: one forward for training, scoring, prefill and decode.

Dims: T tokens of a batch, H width, W joined query/key/value rows, F ffn, V vocabulary, R rows with logits.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn

from lapis.kernels.batch import Batch, LayerCache
from lapis.kernels.ops import Ops, Rope, select
from lapis.model.config import ModelConfig

INIT_STD = 0.02


class LlamaLayer(nn.Module):
    """Weights of one layer: attention with joined query/key/value, feed-forward with joined gate/up."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        width, rows = config.width, config.heads * config.head_size
        joined = (config.heads + 2 * config.kv_heads) * config.head_size
        self.attn_norm = _weight(dtype, width)
        self.qkv = _weight(dtype, joined, width)
        self.out = _weight(dtype, width, rows)
        self.ffn_norm = _weight(dtype, width)
        self.gate_up = _weight(dtype, 2 * config.ffn, width)
        self.down = _weight(dtype, width, config.ffn)


class Llama(nn.Module):
    """A Llama-like decoder over `Ops`; its weights are not set until `init_weights` or a load fills them."""

    def __init__(
        self, config: ModelConfig, ops: Ops | None = None, dtype: torch.dtype = torch.bfloat16
    ) -> None:
        super().__init__()
        self.config = config
        widths = (config.width, config.ffn)
        self.ops = ops if ops is not None else select(config.head_size, widths=widths, dtype=dtype)
        self.rope = Rope.make(config.head_size, config.rope_base, config.context)
        self.embed = _weight(dtype, config.vocab_size, config.width)
        self.layers = nn.ModuleList(LlamaLayer(config, dtype) for _ in range(config.layers))
        self.norm = _weight(dtype, config.width)
        if not config.tied:
            self.head = _weight(dtype, config.vocab_size, config.width)

    @property
    def head_weight(self) -> Tensor:
        """The (V, H) matrix that makes logits: the embedding when tied."""
        return self.embed if self.config.tied else self.head

    def forward(self, ids_T: Tensor, batch: Batch, rows: Tensor | None = None) -> Tensor:
        """Float32 logits (R, V) of the chosen rows, or of all T."""
        x_TH = self.hidden(ids_T, batch)
        return self.logits(x_TH if rows is None else self.ops.embedding(rows, x_TH))

    def logits(self, x_RH: Tensor) -> Tensor:
        """Float32 logits (R, V) of hidden rows."""
        return self.ops.linear(x_RH, self.head_weight, fp32=True)

    def hidden(self, ids_T: Tensor, batch: Batch) -> Tensor:
        """Hidden rows (T, H) after the final norm; keys and values go into the batch's caches."""
        ops, config = self.ops, self.config
        x_TH = ops.embedding(ids_T, self.embed)
        for index, layer in enumerate(cast(Iterable[LlamaLayer], self.layers)):
            qkv_TW = ops.linear(ops.rms_norm(x_TH, layer.attn_norm, config.norm_eps), layer.qkv)
            o_T = ops.attention(
                qkv_TW, batch, index, config.heads, config.kv_heads, config.head_size, self.rope
            )
            x_TH = ops.linear(o_T, layer.out, x_TH)
            gate_up_T2F = ops.linear(ops.rms_norm(x_TH, layer.ffn_norm, config.norm_eps), layer.gate_up)
            x_TH = ops.linear(ops.silu_mul(gate_up_T2F), layer.down, x_TH)
        return ops.rms_norm(x_TH, self.norm, config.norm_eps)

    def new_caches(self, pages: int) -> list[LayerCache]:
        """Empty key and value pages, one pool a layer."""
        return [
            self.ops.new_cache(pages, self.config.kv_heads, self.config.head_size)
            for _ in range(self.config.layers)
        ]

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Fill all weights from a seed: normal, std 0.02; layer outputs / √(2 · layers) (GPT-2)."""
        generator = torch.Generator().manual_seed(seed)
        scale = (2 * self.config.layers) ** -0.5
        for name, weight in self.named_parameters():
            if weight.ndim == 1:
                weight.fill_(1.0)
                continue
            std = INIT_STD * (scale if name.endswith((".out", ".down")) else 1.0)
            weight.copy_(torch.empty(weight.shape).normal_(0.0, std, generator=generator))


def _weight(dtype: torch.dtype, *shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape, dtype=dtype))
