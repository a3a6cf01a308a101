"""The slow judge of products beside the plain linear: quantised weights, experts, adapters (contract.md).

Dims as in ops.py and quantized.py; I a group of K.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lapis.kernels.batch import AdapterPair
from lapis.kernels.quantized import GROUP, HALF, TILE, Quantized
from lapis.kernels.reference import LANES, Array, butterfly_sum, exp, linear, silu_mul

Levels = np.ndarray[tuple[int, ...], np.dtype[np.int64]]


def linear_quantized(
    x_TK: Tensor,
    w_NK: Quantized,
    residual_TN: Tensor | None = None,
    *,
    bias_N: Tensor | None = None,
    fp32: bool = False,
) -> Tensor:
    """Exact integer sums, one scale of weights and one of inputs per group, the fp32 sum over groups in order of K."""
    levels_TGI, scales_TG = quantized_inputs(_array(x_TK))
    columns, groups = w_NK.shape[0], scales_TG.shape[1]
    weights_NK = w_NK.levels().numpy()[:columns].astype(np.int64)
    weight_scales_NG = _array(w_NK.scales).transpose(0, 2, 1).reshape(-1, w_NK.scales.shape[1])[:columns]
    sums_TN = np.zeros((len(scales_TG), columns), np.float32)
    if w_NK.minimums is not None:
        sums_TN = _minimum_chain(levels_TGI, scales_TG, _array(w_NK.minimums))[:, :columns]
    step = GROUP if w_NK.kind == "int8" else HALF
    for g in range(groups):
        part_TN = np.zeros_like(sums_TN)
        for i in range(0, GROUP, step):
            at = (g * GROUP + i) // step
            dots_TN = levels_TGI[:, g, i : i + step] @ weights_NK[:, at * step : (at + 1) * step].T
            part_TN = part_TN + dots_TN.astype(np.float32) * weight_scales_NG[None, :, at]
        sums_TN = sums_TN + part_TN * scales_TG[:, g, None]
    if bias_N is not None:
        sums_TN = sums_TN + _array(bias_N)
    if residual_TN is not None:
        sums_TN = sums_TN + _array(residual_TN)
    return torch.from_numpy(sums_TN) if fp32 else _bf16(sums_TN)


def quantized_inputs(x_TK: Array) -> tuple[Levels, Array]:
    """Levels (T, G, I) in -127 … 127 and scales (T, G): most / 127; a group that nearly vanishes counts as zero."""
    c = np.float32
    x_TGI = np.pad(x_TK, ((0, 0), (0, -x_TK.shape[1] % GROUP))).reshape(len(x_TK), -1, GROUP)
    most_TG = np.abs(x_TGI).max(2)
    there_TG = most_TG > c(1e-30)
    divisor_TG = np.where(there_TG, most_TG, c(1))
    inverse_TG = np.where(there_TG, c(127) / divisor_TG, c(0))
    levels_TGI = (x_TGI * inverse_TG[:, :, None] + c(12582912)) - c(12582912)
    return levels_TGI.astype(np.int64), np.where(there_TG, divisor_TG / c(127), c(0))


def _minimum_chain(levels_TGI: Levels, scales_TG: Array, minimums_XGCP: Array) -> Array:
    """One chain over the half groups, the odd one of each pair first: bf16(scale · sum of levels) · minimum."""
    halves_TGP = levels_TGI.reshape(*scales_TG.shape, 2, HALF).sum(3).astype(np.float32)
    inputs_TGP = _array(_bf16(halves_TGP * scales_TG[:, :, None]))
    minimums_NGP = minimums_XGCP.transpose(0, 2, 1, 3).reshape(len(minimums_XGCP) * TILE, -1, 2)
    sums_TN = np.zeros((len(scales_TG), len(minimums_NGP)), np.float32)
    for g in range(scales_TG.shape[1]):
        for odd in (1, 0):
            sums_TN = sums_TN + inputs_TGP[:, g, odd, None] * minimums_NGP[None, :, g, odd]
    return sums_TN


def route(logits_TE: Tensor, top: int, normalise: bool) -> tuple[Tensor, Tensor]:
    """exp(x - max) / their sum (16 lanes, butterfly); the largest first, of equals the first; / their sum in order."""
    logits = logits_TE.numpy()
    padded = np.pad(logits, ((0, 0), (0, -logits.shape[1] % LANES)), constant_values=-np.inf)
    terms: Array = np.where(padded == -np.inf, np.float32(0), exp(padded - padded.max(1, keepdims=True)))
    lanes_TL = np.zeros((len(logits), LANES), np.float32)
    for i in range(0, terms.shape[1], LANES):
        lanes_TL = lanes_TL + terms[:, i : i + LANES]
    p: Array = terms / butterfly_sum(lanes_TL)[:, None]
    expert_TA = np.argsort(-p[:, : logits.shape[1]], axis=1, kind="stable")[:, :top]
    weight_TA: Array = np.take_along_axis(p, expert_TA, axis=1)
    if normalise:
        total_T: Array = np.zeros(len(logits), np.float32)
        for a in range(top):
            total_T = total_T + weight_TA[:, a]
        weight_TA = weight_TA / total_T[:, None]
    return torch.from_numpy(expert_TA.astype(np.int32)), torch.from_numpy(weight_TA)


def experts(
    x_TH: Tensor,
    expert_TA: Tensor,
    weight_TA: Tensor,
    gate_up_ENH: Tensor | Quantized,
    down_EHF: Tensor | Quantized,
    residual_TH: Tensor,
    tiles: bool = False,
) -> Tensor:
    """From +0 in the order of A: + weight · (fp32 chain of down); then the residual, then one rounding."""
    rows = []
    for t in range(len(x_TH)):
        sum_H: Array = np.zeros(x_TH.shape[1], np.float32)
        for e, weight in zip(expert_TA[t].tolist(), weight_TA[t].tolist(), strict=True):
            h = silu_mul(_linear_of(gate_up_ENH, e, x_TH[t : t + 1], tiles, fp32=False))
            z_H: Array = _linear_of(down_EHF, e, h, tiles, fp32=True)[0].numpy()
            sum_H = sum_H + z_H * np.float32(weight)
        rows.append(sum_H + _array(residual_TH[t]))
    return _bf16(np.stack(rows))


def _linear_of(w_ENK: Tensor | Quantized, e: int, x_TK: Tensor, tiles: bool, *, fp32: bool) -> Tensor:
    if isinstance(w_ENK, Quantized):
        return linear_quantized(x_TK, w_ENK.part(e), fp32=fp32)
    return linear(x_TK, w_ENK[e], fp32=fp32, tiles=tiles)


def lora(
    y_TN: Tensor, x_TK: Tensor, pairs: Sequence[AdapterPair], adapter_T: Tensor, tiles: bool = False
) -> Tensor:
    """Two linears with a rounding between; y is the residual of the second."""
    out_TN = y_TN.clone()
    for t, adapter in enumerate(adapter_T.tolist()):
        pair = pairs[adapter] if adapter >= 0 else None
        if pair is not None:
            inner_1R = linear(x_TK[t : t + 1], pair[0], tiles=tiles)
            out_TN[t] = linear(inner_1R, pair[1], y_TN[t : t + 1], tiles=tiles)[0]
    return out_TN


def _array(x: Tensor) -> Array:
    return x.detach().float().numpy()


def _bf16(x: Array) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(x, np.float32)).bfloat16()
