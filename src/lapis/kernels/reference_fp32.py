"""The slow judge of fp32 storage: products as chains of fused multiply-adds. Order of every sum: contract.md.

The operations on single rows are those of reference.py, which round to the type of their input. Dims as there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lapis.kernels.batch import PAGE, AdapterPair
from lapis.kernels.ops import Rope
from lapis.kernels.reference import LANES, Array, butterfly_sum, exp, lse, silu_mul


def fused(a: Array, b: Array, addend: Array) -> Array:
    """a · b + addend, rounded once to fp32.

    The product is exact in fp64; the sum is rounded to odd there, so that the second rounding does no harm
    (Boldo & Melquiond 2008).
    """
    product, c = a.astype(np.float64) * b.astype(np.float64), addend.astype(np.float64)
    total = product + c
    part = total - product
    error = (product - (total - part)) + (c - part)
    away = np.where((error > 0) == (total > 0), np.inf, 0.0)
    even = total.view(np.int64) % 2 == 0
    return np.where((error != 0) & even, np.nextafter(total, np.copysign(away, total)), total).astype(
        np.float32
    )


def linear(
    x_TK: Tensor, w_NK: Tensor, residual_TN: Tensor | None = None, *, bias_N: Tensor | None = None
) -> Tensor:
    """One fused chain over K from +0; then + bias, then + residual."""
    x, w = x_TK.numpy(), w_NK.numpy()
    sums_TN = np.zeros((x.shape[0], w.shape[0]), np.float32)
    for k in range(x.shape[1]):
        sums_TN = fused(x[:, k, None], w[None, :, k], sums_TN)
    if bias_N is not None:
        sums_TN = sums_TN + bias_N.numpy()
    if residual_TN is not None:
        sums_TN = sums_TN + residual_TN.numpy()
    return torch.from_numpy(sums_TN)


def experts(
    x_TH: Tensor,
    expert_TA: Tensor,
    weight_TA: Tensor,
    gate_up_ENH: Tensor,
    down_EHF: Tensor,
    residual_TH: Tensor,
) -> Tensor:
    """From +0 in the order of A: + weight · (chain of down), weight and sum apart; then the residual."""
    y_TH = torch.empty_like(residual_TH)
    for t in range(len(x_TH)):
        sum_1H = torch.zeros(1, x_TH.shape[1])
        for e, weight in zip(expert_TA[t].tolist(), weight_TA[t], strict=True):
            sum_1H = sum_1H + linear(silu_mul(linear(x_TH[t : t + 1], gate_up_ENH[e])), down_EHF[e]) * weight
        y_TH[t] = sum_1H[0] + residual_TH[t]
    return y_TH


def lora(y_TN: Tensor, x_TK: Tensor, pairs: Sequence[AdapterPair], adapter_T: Tensor) -> Tensor:
    """Two linears; y is the residual of the second."""
    out_TN = y_TN.clone()
    for t, adapter in enumerate(adapter_T.tolist()):
        pair = pairs[adapter] if adapter >= 0 else None
        if pair is not None:
            out_TN[t] = linear(linear(x_TK[t : t + 1], pair[0]), pair[1], y_TN[t : t + 1])[0]
    return out_TN


def attention(
    qkv_TW: Tensor,
    spans: Sequence[tuple[int, int]],
    heads: int,
    kv_heads: int,
    head_size: int,
    rope: Rope | None,
    *,
    window: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Whole sequences from position 0: output (T, heads·D) and log denominators (T, heads)."""
    qkv_THD = qkv_TW.numpy().reshape(len(qkv_TW), heads + 2 * kv_heads, head_size)
    o_THD = np.empty((len(qkv_TW), heads, head_size), np.float32)
    lse_TH = np.empty((len(qkv_TW), heads), np.float32)
    for start, end in spans:
        rotated = _rotate(qkv_THD[start:end, : heads + kv_heads], rope)
        for t in range(end - start):
            for h in range(heads):
                kv = heads + h // (heads // kv_heads)
                keys_SD, values_SD = rotated[: t + 1, kv], qkv_THD[start : start + t + 1, kv + kv_heads]
                first = max(0, t + 1 - (window or t + 1))
                o_THD[start + t, h], lse_TH[start + t, h] = _attend(rotated[t, h], keys_SD, values_SD, first)
    return torch.from_numpy(o_THD.reshape(len(qkv_TW), -1)), torch.from_numpy(lse_TH)


def _attend(q_D: Array, keys_SD: Array, values_SD: Array, start: int) -> tuple[Array, np.float32]:
    """One query over the pages with keys from `start`: online softmax with one step per page of 32 keys."""
    scale = np.float32(1.0 / math.sqrt(len(q_D)))
    highest, total, sums_D = np.float32(-np.inf), np.float32(0), np.zeros_like(q_D)
    for first in range(start // PAGE * PAGE, len(keys_SD), PAGE):
        rest = ((0, max(0, first + PAGE - len(keys_SD))), (0, 0))
        keys, values = (np.pad(part[first : first + PAGE], rest) for part in (keys_SD, values_SD))
        seen_P = (np.arange(PAGE) < len(keys_SD) - first) & (np.arange(PAGE) >= start - first)
        scores_P = np.zeros(PAGE, np.float32)
        for d in range(len(q_D)):
            scores_P = fused(q_D[d], keys[:, d], scores_P)
        scores_P = np.where(seen_P, scores_P * scale, np.float32(-np.inf))
        page_highest, factor = scores_P.max(), np.float32(1)
        if page_highest > highest:
            factor = exp(np.array([highest - page_highest], np.float32))[0]
            highest = page_highest
        p_P = np.where(seen_P, exp(scores_P - highest), np.float32(0))
        total = total * factor + butterfly_sum((p_P[:LANES] + p_P[LANES:])[None])[0]
        sums_D = sums_D * factor
        for j in range(PAGE):
            sums_D = fused(p_P[j], values[j], sums_D)
    return sums_D * (np.float32(1) / total), lse(highest, total)


def _rotate(x_THD: Array, rope: Rope | None) -> Array:
    if rope is None:
        return x_THD
    cos, sin = rope.cos_PD2.numpy()[: len(x_THD), None], rope.sin_PD2.numpy()[: len(x_THD), None]
    a, b = np.split(x_THD, 2, axis=2)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=2)
