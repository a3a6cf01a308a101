"""The attention half of a layer, the same for every family.

Dims: T tokens of a batch, H width, W joined query/key/value rows.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lapis.kernels.batch import Batch
from lapis.kernels.ops import Ops, Rope
from lapis.model.config import ModelConfig
from lapis.model.layers import adapted, optional, weight


class AttentionLayer(nn.Module):
    """Weights of one layer's attention: query, key and value joined; biases and norms where the config has them."""

    def __init__(self, config: ModelConfig, index: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.config, self.index = config, index
        size = config.head_size
        query, key = config.heads * size, config.kv_heads * size
        self.attn_norm = weight(dtype, config.width)
        self.qkv = weight(dtype, query + 2 * key, config.width)
        self.out = weight(dtype, config.width, query)
        whole = config.head_norm == "whole"
        self.qkv_bias = optional(config.qkv_bias, dtype, query + 2 * key)
        self.out_bias = optional(config.out_bias, dtype, config.width)
        self.q_norm = optional(bool(config.head_norm), dtype, query if whole else size)
        self.k_norm = optional(bool(config.head_norm), dtype, key if whole else size)

    def attend(self, ops: Ops, x_TH: Tensor, n_TH: Tensor, batch: Batch, rope: Rope | None) -> Tensor:
        """The residual x plus the attention over its normed rows n."""
        config, index = self.config, self.index
        sizes = (config.heads, config.kv_heads, config.head_size)
        qkv_TW = ops.linear(n_TH, self.qkv, bias_N=self.qkv_bias)
        qkv_TW = adapted(ops, "qkv", qkv_TW, n_TH, batch, index)
        if self.q_norm is not None and self.k_norm is not None:
            qkv_TW = ops.head_norm(qkv_TW, self.q_norm, self.k_norm, *sizes, config.norm_eps)
        o_TW = ops.attention(qkv_TW, batch, index, *sizes, rope, window=config.window_of(index))
        y_TH = ops.linear(o_TW, self.out, x_TH, bias_N=self.out_bias)
        return adapted(ops, "out", y_TH, o_TW, batch, index)
