"""Tensor parallel with sequence parallel (Shoeybi et al. 2019, Korthikanti et al. 2022), as ops around ops.

Between the linear maps a rank holds R of the T rows; before a map that starts a branch it gathers all rows, after the
map that ends it (the one that adds to the residual) the ranks' partial sums are scattered back to their rows. The
weights of a branch are split by heads and by feed-forward columns; all others are whole on every rank, and since each
rank uses them for its own rows, their gradients are parts of a sum that the caller makes (`Parallel`).

Dims: T rows of all tp ranks, R rows of one; H, N, K, V, W as in kernels/ops.py.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor

from lapis.kernels.ops import Ops
from lapis.kernels.quantized import Quantized
from lapis.train.collectives import gathered, scattered, summed
from lapis.train.ops_around import OpsAround


class TensorParallelOps(OpsAround):
    """Ops of a model whose heads and feed-forward widths are one rank's share. T divides by the ranks."""

    def __init__(self, inner: Ops, group: dist.ProcessGroup) -> None:
        super().__init__(inner)
        self.group, self.rank, self.ranks = group, group.rank(), group.size()

    @property
    def sharers(self) -> dist.ProcessGroup | None:
        """All ranks of the group."""
        return self.group

    def own(self, x_T: Tensor) -> Tensor:
        """The rows of this rank: the R-th part."""
        return x_T.chunk(self.ranks)[self.rank].contiguous()

    def embedding(self, ids_T: Tensor, w_VH: Tensor, add: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """The table's rows of this rank's ids: (R, H)."""
        own = None if add is None else (self.own(add[0]), add[1])
        return self.inner.embedding(self.own(ids_T), w_VH, own)

    def linear(
        self,
        x_TK: Tensor,
        w_NK: Tensor | Quantized,
        residual_TN: Tensor | None = None,
        *,
        bias_N: Tensor | None = None,
        fp32: bool = False,
    ) -> Tensor:
        """The end of a branch with a residual, its start without; `fp32` (routers, logits) is row by row."""
        if fp32:
            return self.inner.linear(x_TK, w_NK, residual_TN, bias_N=bias_N, fp32=True)
        if residual_TN is None:
            return self.inner.linear(gathered(x_TK, self.group), w_NK, bias_N=bias_N)
        y_RN = scattered(self.inner.linear(x_TK, w_NK), self.group)
        return residual_TN + (y_RN if bias_N is None else y_RN + bias_N)

    def experts(
        self,
        x_TH: Tensor,
        expert_TA: Tensor,
        weight_TA: Tensor,
        gate_up_ENH: Tensor | Quantized,
        down_EHF: Tensor | Quantized,
        residual_TH: Tensor,
    ) -> Tensor:
        """A branch of its own: all rows through this rank's part of every expert."""
        x_all, weight_all = gathered(x_TH, self.group), gathered(weight_TA, self.group)
        expert_all = gathered(expert_TA, self.group)
        nothing = torch.zeros_like(x_all)
        y_TH = self.inner.experts(x_all, expert_all, weight_all, gate_up_ENH, down_EHF, nothing)
        return residual_TH + scattered(y_TH, self.group)

    def head_norm(
        self,
        qkv_TW: Tensor,
        q_norm: Tensor,
        k_norm: Tensor,
        heads: int,
        kv_heads: int,
        head_size: int,
        eps: float,
    ) -> Tensor:
        """Head by head as it is; a norm across all heads needs the squares of those on other ranks."""
        if q_norm.shape[0] == head_size:
            return self.inner.head_norm(qkv_TW, q_norm, k_norm, heads, kv_heads, head_size, eps)
        widths = (heads * head_size, kv_heads * head_size)
        q_TX, k_TX, v_TX = torch.split(qkv_TW, [*widths, widths[1]], dim=1)
        squares_T2 = torch.stack([part.float().square().sum(1) for part in (q_TX, k_TX)], dim=1)
        squares_T2 = summed(squares_T2, self.group)
        scale_T2 = (
            squares_T2 / squares_T2.new_tensor([width * self.ranks for width in widths]) + eps
        ).rsqrt()
        normed = (
            (part.float() * scale_T2[:, i, None]).to(part.dtype) * weight
            for i, (part, weight) in enumerate(((q_TX, q_norm), (k_TX, k_norm)))
        )
        return torch.cat([*normed, v_TX], dim=1)

    def linear_cross_entropy(
        self, x_TH: Tensor, w_VH: Tensor, targets_T: Tensor, weights_T: Tensor | None = None
    ) -> Tensor:
        """The loss of this rank's rows: a part of the sum."""
        weights = None if weights_T is None else self.own(weights_T)
        return self.inner.linear_cross_entropy(x_TH, w_VH, self.own(targets_T), weights)


def around(inner: Ops, group: dist.ProcessGroup) -> Ops:
    """Ops for one rank of a tensor-parallel group."""
    return cast(Ops, TensorParallelOps(inner, group))
