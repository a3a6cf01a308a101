"""A layer with a mixture of experts in place of the feed-forward part (Shazeer et al. 2017).

Dims: T tokens of a batch, H width, E experts, A experts that a token uses.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lapis.kernels.batch import Batch
from lapis.kernels.ops import Ops, Rope
from lapis.model.attention import AttentionLayer
from lapis.model.config import ModelConfig
from lapis.model.layers import weight


class MixtureLayer(AttentionLayer):
    """A Llama-like layer whose feed-forward part is the weighted sum of the best experts of each token."""

    def __init__(self, config: ModelConfig, index: int, dtype: torch.dtype) -> None:
        super().__init__(config, index, dtype)
        count, width, ffn = config.experts, config.width, config.expert_ffn
        self.ffn_norm = weight(dtype, width)
        self.router = weight(dtype, count, width)
        self.experts_gate_up = weight(dtype, count, 2 * ffn, width)
        self.experts_down = weight(dtype, count, width, ffn)

    def forward(self, ops: Ops, x_TH: Tensor, batch: Batch, rope: Rope | None) -> Tensor:
        """The rows after this layer."""
        config = self.config
        x_TH = self.attend(ops, x_TH, ops.rms_norm(x_TH, self.attn_norm, config.norm_eps), batch, rope)
        n_TH = ops.rms_norm(x_TH, self.ffn_norm, config.norm_eps)
        logits_TE = ops.linear(n_TH, self.router, fp32=True)
        expert_TA, weight_TA = ops.route(logits_TE, config.experts_per_token, config.normalise_experts)
        return ops.experts(n_TH, expert_TA, weight_TA, self.experts_gate_up, self.experts_down, x_TH)
