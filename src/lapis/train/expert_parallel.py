"""Expert parallel, as ops around ops: a rank owns some experts, and rows travel to the owners and back.

Dims: T tokens, A experts of a token, P = T·A pairs of token and expert, S rows that arrived, H width, E experts.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor

from lapis.kernels.ops import Ops
from lapis.kernels.quantized import Quantized
from lapis.train.collectives import exchanged
from lapis.train.ops_around import OpsAround


class ExpertParallelOps(OpsAround):
    """Ops whose expert stacks hold this rank's experts alone, while tokens choose among those of all ranks."""

    def __init__(self, inner: Ops, group: dist.ProcessGroup) -> None:
        super().__init__(inner)
        self.group, self.rank, self.ranks = group, group.rank(), group.size()

    def experts(
        self,
        x_TH: Tensor,
        expert_TA: Tensor,
        weight_TA: Tensor,
        gate_up_ENH: Tensor | Quantized,
        down_EHF: Tensor | Quantized,
        residual_TH: Tensor,
    ) -> Tensor:
        """Each pair of token and expert as a row of its own at the expert's owner; summed where it came from."""
        owned, top = gate_up_ENH.shape[0], expert_TA.shape[1]
        expert_P = expert_TA.flatten().long()
        order_P = expert_P.argsort(stable=True)
        send = torch.bincount(expert_P // owned, minlength=self.ranks)
        receive = torch.empty_like(send)
        dist.all_to_all_single(receive, send, group=self.group)
        out, back = send.tolist(), receive.tolist()
        x_SH = exchanged(x_TH[order_P // top], out, back, self.group)
        expert_S = exchanged(expert_P[order_P], out, back, self.group) - self.rank * owned
        y_SH = self._one_each(x_SH, expert_S, gate_up_ENH, down_EHF)
        y_PH = exchanged(y_SH, back, out, self.group)
        y_PH = torch.zeros_like(y_PH).index_copy(0, order_P, y_PH)
        y_TAH = y_PH.view(*expert_TA.shape, -1).float() * weight_TA[..., None]
        return (residual_TH.float() + y_TAH.sum(1)).to(residual_TH.dtype)

    def _one_each(
        self, x_SH: Tensor, expert_S: Tensor, gate_up_ENH: Tensor | Quantized, down_EHF: Tensor | Quantized
    ) -> Tensor:
        """Every row through its own expert. Where none arrived, a row of zeros keeps the gradients complete."""
        rows = len(x_SH)
        if rows == 0:
            x_SH = torch.cat([x_SH, x_SH.new_zeros(1, x_SH.shape[1])])
            expert_S = expert_S.new_zeros(1)
        expert_S1 = expert_S[:, None].to(torch.int32)
        one_S1 = torch.ones(expert_S1.shape, device=x_SH.device)
        y_SH = self.inner.experts(x_SH, expert_S1, one_S1, gate_up_ENH, down_EHF, torch.zeros_like(x_SH))
        return y_SH[:rows]


def around(inner: Ops, group: dist.ProcessGroup) -> Ops:
    """Ops for one rank of an expert-parallel group."""
    return cast(Ops, ExpertParallelOps(inner, group))
