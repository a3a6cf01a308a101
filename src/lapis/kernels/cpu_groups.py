"""Each row by the weight of its group: experts of a mixture, low-rank adapters. With gradients.

Dims as in ops.py; further A experts of a token, E experts, R rank, S rows of one group.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from lapis.kernels.batch import AdapterPair
from lapis.kernels.cpu_kernels import BF16, FP32, Kernels, weight_version
from lapis.kernels.gradient import gradient_buffer
from lapis.kernels.quantized import GROUP, Quantized
from lapis.kernels.stock_groups import chosen

MOST_EXPERTS = 1024  # as in cpu_experts.c


@dataclass
class _Table:
    """Where the packed weights of all groups lie, and what tells whether they still do."""

    owners: list[weakref.ref[Tensor]]
    slices: list[Tensor]  # of a stack: the weight of each group
    rows_E3: Tensor  # int64: pointer, N, K
    state: object


class Groups:
    """Grouped products over one build's kernels."""

    def __init__(self, kernels: Kernels) -> None:
        self.kernels = kernels
        self._tables: dict[tuple[int, ...], _Table] = {}

    def experts(
        self,
        x_TH: Tensor,
        expert_TA: Tensor,
        weight_TA: Tensor,
        gate_up_ENH: Tensor | Quantized,
        down_EHF: Tensor | Quantized,
        residual_TH: Tensor,
    ) -> Tensor:
        """Gate and up, silu · mul and down of each token's experts, their weighted sum and the residual."""
        assert expert_TA.dtype is torch.int32 and expert_TA.is_contiguous() and residual_TH.dtype is BF16
        assert weight_TA.dtype is FP32 and weight_TA.is_contiguous() and residual_TH.is_contiguous()
        (tokens, top), width = expert_TA.shape, x_TH.shape[1]
        group_R = expert_TA.view(-1)
        h_RN = self._by_expert(x_TH, top, group_R, gate_up_ENH, fp32=False)
        s_RF = self.kernels.silu_mul(h_RN)
        z_RH = self._by_expert(s_RF, 1, group_R, down_EHF, fp32=True)
        y_TH = torch.empty_like(residual_TH)
        pointers = (tensor.data_ptr() for tensor in (z_RH, weight_TA, residual_TH, y_TH))
        self.kernels._c.weighted_sum(*pointers, tokens, top, width)
        return y_TH

    def lora(
        self, y_TN: Tensor, x_TK: Tensor, pairs: Sequence[AdapterPair], adapter_T: Tensor
    ) -> tuple[Tensor, Tensor]:
        """y + (x Aᵀ) Bᵀ of each row's adapter, and the inner rows, as wide as the largest rank."""
        assert adapter_T.dtype is torch.int32 and adapter_T.is_contiguous() and y_TN.is_contiguous()
        ranks = [0 if pair is None else pair[0].shape[0] for pair in pairs]
        assert not any(rank % 2 for rank in ranks), "ranks of adapters are even"
        first = self._list([None if pair is None else pair[0] for pair in pairs])
        second = self._list([None if pair is None else pair[1] for pair in pairs])
        h_TR = self._grouped(x_TK, 1, adapter_T, first, max(ranks, default=0))
        return self._grouped(h_TR, 1, adapter_T, second, y_TN.shape[1], residual_TN=y_TN), h_TR

    def route(self, logits_TE: Tensor, top: int, normalise: bool) -> tuple[Tensor, Tensor]:
        """The `top` likeliest experts of each row and their probabilities."""
        assert logits_TE.dtype is FP32 and logits_TE.is_contiguous() and logits_TE.shape[1] <= MOST_EXPERTS
        assert 0 < top <= logits_TE.shape[1]
        expert_TA = torch.empty(logits_TE.shape[0], top, dtype=torch.int32)
        weight_TA = torch.empty(logits_TE.shape[0], top, dtype=FP32)
        outputs = (expert_TA.data_ptr(), weight_TA.data_ptr())
        self.kernels._c.route(logits_TE.data_ptr(), *logits_TE.shape, top, normalise, *outputs)
        return expert_TA, weight_TA

    def slices(self, w_ENK: Tensor) -> list[Tensor]:
        """The weights of a stack one by one: always the same tensors, so that their packed copies are kept."""
        return self._stack(w_ENK).slices

    def _by_expert(
        self, x_TK: Tensor, shared: int, group_R: Tensor, w_ENK: Tensor | Quantized, *, fp32: bool
    ) -> Tensor:
        if isinstance(w_ENK, Tensor):
            return self._grouped(x_TK, shared, group_R, self._stack(w_ENK), w_ENK.shape[1], fp32=fp32)
        (groups, columns, inner), rows = w_ENK.shape, len(group_R)
        assert x_TK.dtype is BF16 and x_TK.is_contiguous() and x_TK.shape == (rows // shared, inner)
        y_RN = torch.empty(rows, columns, dtype=FP32 if fp32 else BF16)
        work = torch.empty(
            8 * (groups + 2) + rows * (8 + -(-inner // GROUP) * (GROUP + 8)), dtype=torch.uint8
        )
        minimums = None if w_ENK.minimums is None else w_ENK.minimums.data_ptr()
        weights = (w_ENK.values.data_ptr(), w_ENK.scales.data_ptr(), minimums)
        self.kernels._c.linear_quantized_stack(
            x_TK.data_ptr(),
            rows,
            shared,
            inner,
            group_R.data_ptr(),
            groups,
            *weights,
            columns,
            y_RN.data_ptr(),
            fp32,
            work.data_ptr(),
        )
        return y_RN

    def _grouped(
        self,
        x_TK: Tensor,
        shared: int,
        group_R: Tensor,
        table: _Table,
        columns: int,
        *,
        residual_TN: Tensor | None = None,
        fp32: bool = False,
    ) -> Tensor:
        rows, inner, groups = len(group_R), x_TK.shape[1], len(table.rows_E3)
        assert x_TK.dtype is BF16 and x_TK.is_contiguous() and rows == len(x_TK) * shared
        y_RN = torch.empty(rows, columns, dtype=FP32 if fp32 else BF16)
        work = torch.empty(rows + 1, 2 * inner + 40 + -(-8 * (groups + 8) // (rows + 1)), dtype=torch.uint8)
        residual = None if residual_TN is None else residual_TN.data_ptr()
        self.kernels._c.linear_grouped(
            x_TK.data_ptr(),
            rows,
            shared,
            inner,
            group_R.data_ptr(),
            table.rows_E3.data_ptr(),
            groups,
            columns,
            residual,
            y_RN.data_ptr(),
            fp32,
            work.data_ptr(),
        )
        return y_RN

    def _stack(self, w_ENK: Tensor) -> _Table:
        key, state = (id(w_ENK),), self._state([w_ENK])
        found = self._tables.get(key)
        if found is not None and found.state == state:
            return found
        assert w_ENK.dim() == 3 and w_ENK.is_contiguous()
        slices = found.slices if found is not None else []
        if not slices or slices[0].data_ptr() != w_ENK.data_ptr():
            slices = list(w_ENK.detach().unbind(0))
        return self._keep(key, [w_ENK], slices, slices, state)

    def _list(self, weights: Sequence[Tensor | None]) -> _Table:
        key, state = tuple(map(id, weights)), self._state(weights)
        found = self._tables.get(key)
        if found is not None and found.state == state:
            return found
        there = [weight for weight in weights if weight is not None]
        return self._keep(key, there, weights, [], state)

    def _keep(
        self,
        key: tuple[int, ...],
        owners: Sequence[Tensor],
        weights: Sequence[Tensor | None],
        slices: list[Tensor],
        state: object,
    ) -> _Table:
        rows = [(0, 0, 2) if w is None else (self.kernels._pack(w), *w.shape) for w in weights]
        rows_E3 = torch.tensor(rows, dtype=torch.int64).view(-1, 3)
        references = [weakref.ref(owner, lambda _: self._tables.pop(key, None)) for owner in owners]
        table = self._tables[key] = _Table(references, slices, rows_E3, state)
        return table

    def _state(self, weights: Sequence[Tensor | None]) -> object:
        seen = [None if w is None else (weight_version(w), w.data_ptr()) for w in weights]
        return seen, self.kernels._generation


class Fp32Groups(Groups):
    """Over kernels for fp32 rows: group by group, the rows of each in one product."""

    def experts(
        self,
        x_TH: Tensor,
        expert_TA: Tensor,
        weight_TA: Tensor,
        gate_up_ENH: Tensor | Quantized,
        down_EHF: Tensor | Quantized,
        residual_TH: Tensor,
    ) -> Tensor:
        """Gate and up, silu · mul and down of each token's experts, their weighted sum and the residual."""
        assert weight_TA.dtype is residual_TH.dtype is FP32
        assert isinstance(gate_up_ENH, Tensor) and isinstance(down_EHF, Tensor), (
            "no fp32 rows with 8 or 4 bits"
        )
        assert weight_TA.is_contiguous() and residual_TH.is_contiguous()
        (tokens, top), width = expert_TA.shape, x_TH.shape[1]
        z_TAH, kernels = torch.empty(tokens, top, width), self.kernels
        gate_up, down = self.slices(gate_up_ENH), self.slices(down_EHF)
        for e in sorted(set(expert_TA.flatten().tolist())):
            t_S, a_S = (expert_TA == e).nonzero(as_tuple=True)
            h_SF = kernels.silu_mul(kernels.linear(x_TH[t_S], gate_up[e], None, False))
            z_TAH[t_S, a_S] = kernels.linear(h_SF, down[e], None, False)
        y_TH = torch.empty_like(residual_TH)
        pointers = (tensor.data_ptr() for tensor in (z_TAH, weight_TA, residual_TH, y_TH))
        kernels._c.weighted_sum_fp32(*pointers, tokens, top, width)
        return y_TH

    def lora(
        self, y_TN: Tensor, x_TK: Tensor, pairs: Sequence[AdapterPair], adapter_T: Tensor
    ) -> tuple[Tensor, Tensor]:
        """y + (x Aᵀ) Bᵀ of each row's adapter, and the inner rows, as wide as the largest rank."""
        most = max((0 if pair is None else pair[0].shape[0] for pair in pairs), default=0)
        out_TN, h_TR = y_TN.clone(), torch.zeros(len(x_TK), most)
        for index, pair in enumerate(pairs):
            (rows_S,) = (adapter_T == index).nonzero(as_tuple=True)
            if pair is None or not len(rows_S):
                continue
            h_SR = self.kernels.linear(x_TK[rows_S], pair[0], None, False)
            out_TN[rows_S] = self.kernels.linear(h_SR, pair[1], y_TN[rows_S], False)
            h_TR[rows_S, : h_SR.shape[1]] = h_SR
        return out_TN, h_TR


class Experts(torch.autograd.Function):
    """Gradients expert by expert; what lies between the two products is computed again."""

    @staticmethod
    def forward(
        ctx: Any,
        groups: Groups,
        x_TH: Tensor,
        expert_TA: Tensor,
        weight_TA: Tensor,
        gate_up_ENH: Tensor,
        down_EHF: Tensor,
        residual_TH: Tensor,
    ) -> Tensor:
        ctx.groups, ctx.weights = groups, (gate_up_ENH, down_EHF)
        ctx.save_for_backward(x_TH, expert_TA, weight_TA)
        return groups.experts(x_TH, expert_TA, weight_TA, gate_up_ENH, down_EHF, residual_TH)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_TH, expert_TA, weight_TA = ctx.saved_tensors
        groups, g_TH = ctx.groups, grads[0].contiguous()
        kernels, (gate_up_ENH, down_EHF) = groups.kernels, ctx.weights
        dgate_up_ENH, dgate_up = gradient_buffer(gate_up_ENH)
        ddown_EHF, ddown = gradient_buffer(down_EHF)
        dx_TH, dweight_TA = torch.zeros(x_TH.shape), torch.zeros(weight_TA.shape)
        for e, (gate_up_NH, down_HF) in enumerate(
            zip(groups.slices(gate_up_ENH), groups.slices(down_EHF), strict=True)
        ):
            t_S, a_S = (expert_TA == e).nonzero(as_tuple=True)
            if not len(t_S):
                continue
            x_SH, g_SH = x_TH[t_S], g_TH[t_S].float()
            h_SN = kernels.linear(x_SH, gate_up_NH, None, False)
            s_SF = kernels.silu_mul(h_SN)
            dweight_TA[t_S, a_S] = (g_SH * kernels.linear(s_SF, down_HF, None, True)).sum(1)
            gz_SH = (g_SH * weight_TA[t_S, a_S, None]).to(x_TH.dtype)
            ds_SF, dx_SH = torch.empty_like(s_SF), torch.empty_like(x_SH)
            kernels.linear_backward(gz_SH, down_HF, ds_SF)
            kernels.add_weight_gradient(gz_SH, s_SF, ddown_EHF[e])
            dh_SN = kernels.silu_mul_backward(h_SN, ds_SF)
            kernels.linear_backward(dh_SN, gate_up_NH, dx_SH)
            kernels.add_weight_gradient(dh_SN, x_SH, dgate_up_ENH[e])
            dx_TH[t_S] += dx_SH  # an expert has a token once
        return None, dx_TH.to(x_TH.dtype), None, dweight_TA, dgate_up, ddown, g_TH


class Lora(torch.autograd.Function):
    """Gradients adapter by adapter; the pairs come flat: A, B, A, B, …"""

    @staticmethod
    def forward(
        ctx: Any, groups: Groups, y_TN: Tensor, x_TK: Tensor, adapter_T: Tensor, *flat: Tensor | None
    ) -> Tensor:
        pairs = cast(list[AdapterPair], list(zip(flat[::2], flat[1::2], strict=True)))
        pairs = [None if pair is not None and pair[0] is None else pair for pair in pairs]
        out_TN, h_TR = groups.lora(y_TN, x_TK, pairs, adapter_T)
        ctx.groups, ctx.pairs = groups, pairs
        ctx.save_for_backward(x_TK, h_TR, adapter_T)
        return out_TN

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_TK, h_TR, adapter_T = ctx.saved_tensors
        kernels, g_TN = ctx.groups.kernels, grads[0].contiguous()
        dx_TK = torch.zeros_like(x_TK)
        flat: list[Tensor | None] = []
        for index, pair in enumerate(ctx.pairs):
            if pair is None:
                flat += [None, None]
                continue
            (da_RK, da), (db_NR, db) = gradient_buffer(pair[0]), gradient_buffer(pair[1])
            flat += [da, db]
            (rows_S,) = (adapter_T == index).nonzero(as_tuple=True)
            if not len(rows_S):
                continue
            whole = len(rows_S) == len(x_TK)  # one adapter for all: nothing to pick
            x_SK, g_SN = (x_TK, g_TN) if whole else (x_TK[rows_S], g_TN[rows_S])
            h_SR = (h_TR if whole else h_TR[rows_S])[:, : len(da_RK)].contiguous()
            gh_SR, dx_SK = torch.empty_like(h_SR), dx_TK if whole else torch.empty_like(x_SK)
            kernels.add_weight_gradient(g_SN, h_SR, db_NR)
            kernels.linear_backward(g_SN, pair[1], gh_SR)
            kernels.add_weight_gradient(gh_SR, x_SK, da_RK)
            kernels.linear_backward(gh_SR, pair[0], dx_SK)
            if not whole:
                dx_TK[rows_S] = dx_SK  # a row has one adapter
        return None, g_TN, dx_TK, None, *flat


class Route(torch.autograd.Function):
    """The gradient of the chosen probabilities in plain torch."""

    @staticmethod
    def forward(
        ctx: Any, groups: Groups, logits_TE: Tensor, top: int, normalise: bool
    ) -> tuple[Tensor, Tensor]:
        expert_TA, weight_TA = groups.route(logits_TE, top, normalise)
        ctx.normalise = normalise
        ctx.save_for_backward(logits_TE, expert_TA)
        ctx.mark_non_differentiable(expert_TA)
        return expert_TA, weight_TA

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        logits_TE, expert_TA = ctx.saved_tensors
        with torch.enable_grad():
            leaf_TE = logits_TE.detach().requires_grad_()
            weight_TA = chosen(leaf_TE, expert_TA, ctx.normalise)
            (dlogits_TE,) = torch.autograd.grad(weight_TA, leaf_TE, grads[1])
        return None, dlogits_TE, None, None
