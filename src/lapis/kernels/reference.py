"""The slow judge: the forward ops in numpy, sum by sum in the order that contract.md fixes. No gradients.

Dims as in ops.py; further L the 16 lanes, D head size, S keys. All arithmetic is fp32 unless said.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lapis.kernels.batch import PAGE
from lapis.kernels.ops import Rope

Array = npt.NDArray[np.float32]
LANES = 16
TILE_K = 32  # elements of K in a tile product


def linear(
    x_TK: Tensor,
    w_NK: Tensor,
    residual_TN: Tensor | None = None,
    *,
    bias_N: Tensor | None = None,
    fp32: bool = False,
    tiles: bool = False,
) -> Tensor:
    """The chain of K, or its tiles; then + bias, then + residual; one rounding."""
    x, w = _array(x_TK), _array(w_NK)
    sums = _in_tiles(x, w) if tiles else _chain(x, w)
    if bias_N is not None:
        sums = sums + _array(bias_N)
    if residual_TN is not None:
        sums = sums + _array(residual_TN)
    return torch.from_numpy(sums) if fp32 else _bf16(sums)


def _chain(x_TK: Array, w_NK: Array) -> Array:
    """One chain over K from +0; in each pair the odd element first."""
    sums_TN: Array = np.zeros((len(x_TK), len(w_NK)), np.float32)
    for k in range(0, x_TK.shape[1], 2):
        sums_TN = sums_TN + x_TK[:, k + 1, None] * w_NK[None, :, k + 1]
        sums_TN = sums_TN + x_TK[:, k, None] * w_NK[None, :, k]
    return sums_TN


def _in_tiles(x_TK: Array, w_NK: Array) -> Array:
    """Blocks of 32 of K in order; in each the chain of its even elements + that of its odd ones."""
    sums_TN: Array = np.zeros((len(x_TK), len(w_NK)), np.float32)
    for block in range(0, x_TK.shape[1], TILE_K):
        chains = []
        for first in (block, block + 1):
            chain_TN: Array = np.zeros_like(sums_TN)
            for k in range(first, min(block + TILE_K, x_TK.shape[1]), 2):
                chain_TN = chain_TN + x_TK[:, k, None] * w_NK[None, :, k]
            chains.append(chain_TN)
        sums_TN = sums_TN + (chains[0] + chains[1])
    return sums_TN


def rms_norm(x_TH: Tensor, w_H: Tensor, eps: float) -> Tensor:
    """16 lane sums of squares, butterfly, then (x · (1 / sqrt(sum / H + eps))) · w."""
    x, w = _array(x_TH), _array(w_H)
    mean_T = _row_sums(x * x) / np.float32(x.shape[1])
    scale_T = np.float32(1) / np.sqrt(mean_T + np.float32(eps))
    return _stored_as(x_TH, (x * scale_T[:, None]) * w)


def silu_mul(x_T2F: Tensor) -> Tensor:
    """(g / (1 + exp(-g))) · u."""
    gate, up = np.split(_array(x_T2F), 2, axis=1)
    return _stored_as(x_T2F, (gate / (np.float32(1) + exp(-gate))) * up)


def layer_norm(x_TH: Tensor, w_H: Tensor, b_H: Tensor, eps: float) -> Tensor:
    """Lane sums of x, butterfly; then of the centred squares; (((x - mean) · scale) · w) + b."""
    x, width = _array(x_TH), np.float32(x_TH.shape[1])
    centred = x - (_row_sums(x) / width)[:, None]
    scale_T = np.float32(1) / np.sqrt(_row_sums(centred * centred) / width + np.float32(eps))
    return _stored_as(x_TH, (centred * scale_T[:, None]) * _array(w_H) + _array(b_H))


def gelu(x_TF: Tensor) -> Tensor:
    """x / (1 + exp(-(x · (c1 + c3 · (x · x)))))."""
    x = _array(x_TF)
    c1, c3 = np.float32(1.5957691216057308), np.float32(0.0713548162726009)
    return _stored_as(x_TF, x / (np.float32(1) + exp(-(x * (c1 + c3 * (x * x))))))


def head_norm(
    qkv_TW: Tensor,
    q_norm: Tensor,
    k_norm: Tensor,
    heads: int,
    kv_heads: int,
    head_size: int,
    eps: float,
) -> Tensor:
    """rms_norm of each query and key part, a part as wide as its weight."""
    joined = qkv_TW.clone()
    start = 0
    for w, width in ((q_norm, heads * head_size), (k_norm, kv_heads * head_size)):
        for at in range(start, start + width, w.numel()):
            joined[:, at : at + w.numel()] = rms_norm(qkv_TW[:, at : at + w.numel()], w, eps)
        start += width
    return joined


def logprobs(logits_TV: Tensor, ids_T: Tensor) -> Tensor:
    """x[id] - (float)(max + log(sum of 16 lane sums of exp(x - max)))."""
    logits = logits_TV.numpy()
    rest = -logits.shape[1] % LANES
    padded = np.pad(logits, ((0, 0), (0, rest)), constant_values=-np.inf)
    out = np.empty(len(logits), np.float32)
    for t, row in enumerate(padded):
        highest = row.max()
        terms = np.where(row == -np.inf, np.float32(0), exp(row - highest)).reshape(-1, LANES)
        lanes_L = np.zeros(LANES, np.float32)
        for part_L in terms:
            lanes_L = lanes_L + part_L
        out[t] = row[int(ids_T[t])] - lse(highest, butterfly_sum(lanes_L[None])[0])
    return torch.from_numpy(out)


def attention(
    qkv_TW: Tensor,
    spans: Sequence[tuple[int, int]],
    heads: int,
    kv_heads: int,
    head_size: int,
    rope: Rope | None,
    *,
    window: int | None = None,
    int8: bool = False,
) -> tuple[Tensor, Tensor]:
    """Whole sequences from position 0: output (T, heads·D) and log denominators (T, heads).

    `int8`: keys and values as they stand in an int8 cache.
    """
    qkv_THD = _array(qkv_TW).reshape(len(qkv_TW), heads + 2 * kv_heads, head_size)
    o_THD = np.empty((len(qkv_TW), heads, head_size), np.float32)
    lse_TH = np.empty((len(qkv_TW), heads), np.float32)
    for start, end in spans:
        rotated = _rotate(qkv_THD[start:end, : heads + kv_heads], rope)
        for t in range(end - start):
            for h in range(heads):
                kv = heads + h // (heads // kv_heads)
                keys_SD, values_SD = rotated[: t + 1, kv], qkv_THD[start : start + t + 1, kv + kv_heads]
                seen = (_stored(keys_SD, int8), _stored(values_SD, int8), max(0, t + 1 - (window or t + 1)))
                o_THD[start + t, h], lse_TH[start + t, h] = _attend(rotated[t, h], *seen)
    return _bf16(o_THD.reshape(len(qkv_TW), -1)), torch.from_numpy(lse_TH)


def exp(x: Array) -> Array:
    """Cephes polynomial after reduction by ln 2 in two parts; multiplies and adds apart, nothing fused."""
    c = np.float32
    x = np.clip(x, c(-87), c(88))
    n = (x * c(1.44269504) + c(12582912)) - c(12582912)
    x = x - n * c(0.693359375)
    x = x - n * c(-2.12194440e-4)
    p = np.full_like(x, c(1.9875691500e-4))
    for coefficient in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = p * x + c(coefficient)
    p = p * (x * x) + x + c(1)
    return p * ((n.astype(np.int32) + 127) << 23).view(np.float32)


def log(x: float) -> float:
    """In fp64: frexp to [sqrt(1/2), sqrt(2)), then 2 artanh((m - 1) / (m + 1)) as an odd series to the 25th power."""
    m, exponent = math.frexp(x)
    if m < 0.70710678118654752:
        m, exponent = m * 2, exponent - 1
    s = (m - 1) / (m + 1)
    z, series = s * s, 0.0
    for k in range(25, 0, -2):
        series = series * z + 1.0 / k
    return 2 * s * series + exponent * 0.69314718055994531


def _stored(rows_SD: Array, int8: bool) -> tuple[Array, Array | None]:
    """Rows as a cache holds them; in int8 whole numbers of up to 127, and the step of each row."""
    if not int8:
        return rows_SD, None
    scale_S = np.abs(rows_SD).max(1) / np.float32(127)
    scale_S = np.where(scale_S < np.finfo(np.float32).tiny, np.float32(0), scale_S)
    inverse_S = np.divide(np.float32(1), scale_S, out=np.zeros_like(scale_S), where=scale_S > 0)
    return np.rint(rows_SD * inverse_S[:, None]), scale_S


def _attend(
    q_D: Array, stored_keys: tuple[Array, Array | None], stored_values: tuple[Array, Array | None], start: int
) -> tuple[Array, np.float32]:
    """One query over the pages with keys from `start`: online softmax with one step per page of 32 keys."""
    (keys_SD, key_scale_S), (values_SD, value_scale_S) = stored_keys, stored_values
    scale = np.float32(1.0 / math.sqrt(len(q_D)))
    highest, total, sums_D = np.float32(-np.inf), np.float32(0), np.zeros_like(q_D)
    for first in range(start // PAGE * PAGE, len(keys_SD), PAGE):
        keys = _whole_page(keys_SD[first : first + PAGE])
        values = _whole_page(values_SD[first : first + PAGE])
        seen_P = (np.arange(PAGE) < len(keys_SD) - first) & (np.arange(PAGE) >= start - first)
        scores_P = np.zeros(PAGE, np.float32)
        for d in range(0, len(q_D), 2):
            scores_P = scores_P + q_D[d + 1] * keys[:, d + 1]
            scores_P = scores_P + q_D[d] * keys[:, d]
        scores_P = scores_P * scale
        if key_scale_S is not None:
            scores_P = scores_P * _whole_page(key_scale_S[first : first + PAGE, None])[:, 0]
        scores_P = np.where(seen_P, scores_P, np.float32(-np.inf))
        page_highest, factor = scores_P.max(), np.float32(1)
        if page_highest > highest:
            factor = exp(np.array([highest - page_highest], np.float32))[0]
            highest = page_highest
        p_P = np.where(seen_P, exp(scores_P - highest), np.float32(0))
        total = total * factor + butterfly_sum((p_P[:LANES] + p_P[LANES:])[None])[0]
        sums_D = sums_D * factor
        if value_scale_S is not None:
            p_P = p_P * _whole_page(value_scale_S[first : first + PAGE, None])[:, 0]
        p_P = _array(_bf16(p_P))
        for j in range(0, PAGE, 2):
            sums_D = sums_D + p_P[j + 1] * values[j + 1]
            sums_D = sums_D + p_P[j] * values[j]
    return sums_D * (np.float32(1) / total), lse(highest, total)


def _rotate(x_THD: Array, rope: Rope | None) -> Array:
    if rope is None:
        return x_THD
    cos, sin = rope.cos_PD2.numpy()[: len(x_THD), None], rope.sin_PD2.numpy()[: len(x_THD), None]
    a, b = np.split(x_THD, 2, axis=2)
    return _array(_bf16(np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=2)))


def _whole_page(rows: Array) -> Array:
    return np.pad(rows, ((0, PAGE - len(rows)), (0, 0)))


def _row_sums(x_TH: Array) -> Array:
    """16 lane sums at stride 16, then the butterfly."""
    lanes_TL = np.zeros((x_TH.shape[0], LANES), np.float32)
    for i in range(0, x_TH.shape[1], LANES):
        lanes_TL = lanes_TL + x_TH[:, i : i + LANES]
    return butterfly_sum(lanes_TL)


def butterfly_sum(lanes_TL: Array) -> Array:
    """Lane i adds lane i xor 8, then 4, 2, 1; lane 0 is the sum."""
    lane_L = np.arange(LANES)
    for distance in (8, 4, 2, 1):
        lanes_TL = lanes_TL + lanes_TL[:, lane_L ^ distance]
    return lanes_TL[:, 0]


def lse(highest: np.float32, total: np.float32) -> np.float32:
    """(float)(highest + log total), the sum in fp64."""
    return np.float32(float(highest) + log(float(total)))


def _array(x: Tensor) -> Array:
    return x.detach().float().numpy()


def _stored_as(like: Tensor, x: Array) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(x, np.float32)).to(like.dtype)


def _bf16(x: Array) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(x, np.float32)).bfloat16()
