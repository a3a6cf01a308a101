"""Experts and low-rank adapters in plain torch. Dims as in ops.py; further A experts of a token, E experts, S rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lapis.kernels.batch import AdapterPair


def experts(
    x_TH: Tensor,
    expert_TA: Tensor,
    weight_TA: Tensor,
    gate_up_ENH: Tensor,
    down_EHF: Tensor,
    residual_TH: Tensor,
) -> Tensor:
    """Expert by expert, summed in fp32."""
    sum_TH = residual_TH.float()
    for e in range(len(gate_up_ENH)):
        t_S, a_S = (expert_TA == e).nonzero(as_tuple=True)
        gate_SF, up_SF = F.linear(x_TH[t_S], gate_up_ENH[e]).chunk(2, dim=-1)
        y_SH = F.linear(F.silu(gate_SF) * up_SF, down_EHF[e]).float()
        sum_TH = sum_TH.index_add(0, t_S, y_SH * weight_TA[t_S, a_S, None])
    return sum_TH.to(residual_TH.dtype)


def route(logits_TE: Tensor, top: int, normalise: bool) -> tuple[Tensor, Tensor]:
    """Softmax, then a stable sort: the smaller index first among equals."""
    order_TE = logits_TE.detach().softmax(-1).sort(stable=True, dim=-1, descending=True).indices
    expert_TA = order_TE[:, :top].to(torch.int32).contiguous()
    return expert_TA, chosen(logits_TE, expert_TA, normalise)


def chosen(logits_TE: Tensor, expert_TA: Tensor, normalise: bool) -> Tensor:
    """The probabilities of chosen experts, divided by their sum if asked."""
    weight_TA = logits_TE.softmax(-1).gather(1, expert_TA.long())
    return weight_TA / weight_TA.sum(1, keepdim=True) if normalise else weight_TA


def lora(y_TN: Tensor, x_TK: Tensor, pairs: Sequence[AdapterPair], adapter_T: Tensor) -> Tensor:
    """Adapter by adapter."""
    for index, pair in enumerate(pairs):
        if pair is not None:
            (rows_S,) = (adapter_T == index).nonzero(as_tuple=True)
            added_SN = F.linear(F.linear(x_TK[rows_S], pair[0]), pair[1])
            y_TN = y_TN.index_add(0, rows_S, added_SN)
    return y_TN
