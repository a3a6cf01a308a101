"""The ops in plain torch: the fallback without compiled kernels, and the negative control of the bit tests.

Dims as in ops.py; further S keys of a sequence, D head size, G query heads per key/value head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from lapis.kernels import stock_groups
from lapis.kernels.batch import PAGE, AdapterPair, Batch, LayerCache
from lapis.kernels.ops import CPU, Rope
from lapis.kernels.quantized import Quantized
from lapis.kernels.torch_steps import TorchSteps

CHUNK = 1024  # tokens whose logits exist at a time
NORM_BLOCK = 1 << 14  # elements that torch sums in one thread


class StockOps(TorchSteps):
    """Plain torch. Pages are (pages, PAGE, kv_heads, head_size)."""

    name = "stock"
    bit_exact = False
    device = CPU

    def __init__(self, reason: str = "", dtype: torch.dtype = torch.bfloat16) -> None:
        self.reason = reason
        self.dtype = dtype  # of keys and values

    def new_cache(self, pages: int, kv_heads: int, head_size: int, *, int8: bool = False) -> LayerCache:
        """Zeroed pages; in int8 a row ends with the four bytes of its scale."""
        shape = (pages, PAGE, kv_heads, head_size + (4 if int8 else 0))
        dtype = torch.int8 if int8 else self.dtype
        return LayerCache(torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype))

    def embedding(self, ids_T: Tensor, w_VH: Tensor, add: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Rows of the table, and of the second one."""
        y_TH = F.embedding(ids_T, w_VH)
        return y_TH if add is None else y_TH + F.embedding(add[0].long(), add[1])

    def linear(
        self,
        x_TK: Tensor,
        w_NK: Tensor | Quantized,
        residual_TN: Tensor | None = None,
        *,
        bias_N: Tensor | None = None,
        fp32: bool = False,
    ) -> Tensor:
        """x Wᵀ (+ bias) (+ residual). `fp32` without gradients is computed in fp32: rounded logits would tie."""
        if isinstance(w_NK, Quantized):
            w_NK = w_NK.dequantize().to(x_TK.dtype)
        if fp32 and not torch.is_grad_enabled():
            x_TK, w_NK = x_TK.float(), w_NK.float()
            bias_N = None if bias_N is None else bias_N.float()
        y_TN = F.linear(x_TK, w_NK, bias_N)
        if residual_TN is not None:
            y_TN = y_TN + residual_TN
        return y_TN.float() if fp32 else y_TN

    def route(self, logits_TE: Tensor, top: int, normalise: bool) -> tuple[Tensor, Tensor]:
        """Softmax and the `top` best experts."""
        return stock_groups.route(logits_TE, top, normalise)

    def experts(
        self,
        x_TH: Tensor,
        expert_TA: Tensor,
        weight_TA: Tensor,
        gate_up_ENH: Tensor | Quantized,
        down_EHF: Tensor | Quantized,
        residual_TH: Tensor,
    ) -> Tensor:
        """Expert by expert."""
        if isinstance(gate_up_ENH, Quantized):
            gate_up_ENH = gate_up_ENH.dequantize().to(x_TH.dtype)
        if isinstance(down_EHF, Quantized):
            down_EHF = down_EHF.dequantize().to(x_TH.dtype)
        return stock_groups.experts(x_TH, expert_TA, weight_TA, gate_up_ENH, down_EHF, residual_TH)

    def lora(self, y_TN: Tensor, x_TK: Tensor, pairs: Sequence[AdapterPair], adapter_T: Tensor) -> Tensor:
        """Adapter by adapter."""
        return stock_groups.lora(y_TN, x_TK, pairs, adapter_T)

    def rms_norm(self, x_TH: Tensor, w_H: Tensor, eps: float) -> Tensor:
        """RMSNorm by torch."""
        return F.rms_norm(x_TH, (x_TH.shape[-1],), w_H, eps)

    def silu_mul(self, x_T2F: Tensor) -> Tensor:
        """silu(gate) · up."""
        gate_TF, up_TF = x_T2F.chunk(2, dim=-1)
        return F.silu(gate_TF) * up_TF

    def layer_norm(self, x_TH: Tensor, w_H: Tensor, b_H: Tensor, eps: float) -> Tensor:
        """LayerNorm by torch."""
        return F.layer_norm(x_TH, (x_TH.shape[-1],), w_H, b_H, eps)

    def gelu(self, x_TF: Tensor) -> Tensor:
        """The tanh form by torch."""
        return F.gelu(x_TF, approximate="tanh")

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
        """RMSNorm of each query and key part; a part is as wide as its weight."""
        parts = torch.split(qkv_TW, [heads * head_size, *[kv_heads * head_size] * 2], dim=1)
        query, key = (
            F.rms_norm(part.reshape(len(part), -1, w.numel()), (w.numel(),), w, eps).flatten(1)
            for part, w in zip(parts, (q_norm, k_norm), strict=False)
        )
        return torch.cat([query, key, parts[2]], dim=1)

    def attention(
        self,
        qkv_TW: Tensor,
        batch: Batch,
        layer: int,
        heads: int,
        kv_heads: int,
        head_size: int,
        rope: Rope | None,
        *,
        window: int | None = None,
    ) -> Tensor:
        """Causal attention span by span; keys of earlier passes come from the pages."""
        qkv_THD = qkv_TW.view(batch.tokens, heads + 2 * kv_heads, head_size)
        rotated_THD = rotate(qkv_THD[:, : heads + kv_heads], rope, batch.position_T)
        q_THD, k_THD, v_THD = rotated_THD[:, :heads], rotated_THD[:, heads:], qkv_THD[:, heads + kv_heads :]
        if batch.caches is not None:
            _write(batch.caches[layer], batch, k_THD, v_THD)
        outputs = []
        for start, end in batch.spans:
            k_SHD, v_SHD, past = k_THD[start:end], v_THD[start:end], 0
            if batch.caches is not None:
                past = int(batch.position_T[start])
                stored = _read(batch.caches[layer], batch, start, past + end - start)
                k_SHD, v_SHD = (part.to(qkv_TW.dtype) for part in stored)
            outputs.append(attend(q_THD[start:end], k_SHD, v_SHD, past, window))
        return torch.cat(outputs).reshape(batch.tokens, heads * head_size)

    def logprobs(self, logits_TV: Tensor, ids_T: Tensor) -> Tensor:
        """Log softmax picked at ids."""
        return logits_TV.log_softmax(-1).gather(-1, ids_T[:, None])[:, 0]

    def argmax(self, logits_TV: Tensor, count: int | None = None) -> Tensor:
        """Index of the maximum of each row, -1 where the row is not finite (a NaN counts as the largest)."""
        best = logits_TV[:, :count].max(-1)
        return torch.where(best.values.isfinite(), best.indices, -1)

    def linear_logprobs(self, x_TH: Tensor, w_VH: Tensor | Quantized, ids_T: Tensor) -> Tensor:
        """Chunk by chunk; 0 where the id is -1."""
        with torch.no_grad():
            picked = [
                self.logprobs(self.linear(x_TH[rows], w_VH, fp32=True), ids_T[rows].clamp(min=0))
                for rows in _chunks(x_TH.shape[0])
            ]
        return torch.cat(picked).where(ids_T >= 0, 0.0)

    def linear_cross_entropy(
        self, x_TH: Tensor, w_VH: Tensor, targets_T: Tensor, weights_T: Tensor | None = None
    ) -> Tensor:
        """Summed loss; forward and backward hold one chunk of logits."""
        weights_T = torch.ones(x_TH.shape[0], device=x_TH.device) if weights_T is None else weights_T
        return cast(Tensor, _CrossEntropy.apply(x_TH, w_VH, targets_T, weights_T))  # type: ignore[no-untyped-call]

    def squared_norm(self, grad: Tensor) -> float:
        """Blocks of fixed size summed by torch, then exactly."""
        blocks = torch.split(grad.detach().flatten(), NORM_BLOCK)
        return math.fsum(float(block.double().square().sum()) for block in blocks)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, w_VH: Tensor, targets_T: Tensor, weights_T: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for part in _chunks(x_TH.shape[0]):
            total += _chunk_loss(x_TH[part], w_VH, targets_T[part], weights_T[part]).double()
        ctx.save_for_backward(x_TH, w_VH, targets_T, weights_T)
        return total.float()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_TH, w_VH, targets_T, weights_T = ctx.saved_tensors
        dx_TH, dw_VH = torch.empty_like(x_TH), torch.zeros(w_VH.shape)
        w_leaf = w_VH.detach().requires_grad_()
        for part in _chunks(x_TH.shape[0]):
            with torch.enable_grad():
                x_leaf = x_TH[part].detach().requires_grad_()
                loss = _chunk_loss(x_leaf, w_leaf, targets_T[part], weights_T[part])
                dx_TH[part], dw = torch.autograd.grad(loss, (x_leaf, w_leaf), grads[0])
            dw_VH += dw
        return dx_TH, dw_VH.to(w_VH.dtype), None, None


def _chunks(tokens: int) -> list[slice]:
    return [slice(start, min(start + CHUNK, tokens)) for start in range(0, tokens, CHUNK)]


def _chunk_loss(x_TH: Tensor, w_VH: Tensor, targets_T: Tensor, weights_T: Tensor) -> Tensor:
    losses_T = F.cross_entropy(F.linear(x_TH, w_VH).float(), targets_T, ignore_index=-1, reduction="none")
    return (losses_T * weights_T).sum()


def rotate(x_THD: Tensor, rope: Rope | None, position_T: Tensor) -> Tensor:
    """Queries or keys turned by their positions; as they are without `rope`."""
    if rope is None:
        return x_THD
    cos_T1D, sin_T1D = rope.cos_PD2[position_T][:, None], rope.sin_PD2[position_T][:, None]
    a, b = x_THD.float().chunk(2, dim=-1)
    return torch.cat([a * cos_T1D - b * sin_T1D, b * cos_T1D + a * sin_T1D], dim=-1).to(x_THD.dtype)


def _write(cache: LayerCache, batch: Batch, k_THD: Tensor, v_THD: Tensor) -> None:
    position_T = batch.position_T.long()
    page_T = batch.page_table_SP[batch.sequence_T.long(), position_T // PAGE].long()
    with torch.no_grad():
        for pages, rows_THD in zip(cache, (k_THD, v_THD), strict=True):
            stored = _quantized(rows_THD) if pages.dtype is torch.int8 else rows_THD
            pages[page_T, position_T % PAGE] = stored


def _read(cache: LayerCache, batch: Batch, token: int, length: int) -> tuple[Tensor, Tensor]:
    pages = batch.page_table_SP[int(batch.sequence_T[token]), : -(-length // PAGE)].long()
    k_SHD, v_SHD = (part[pages].flatten(0, 1)[:length] for part in cache)
    return (_dequantized(k_SHD), _dequantized(v_SHD)) if k_SHD.dtype is torch.int8 else (k_SHD, v_SHD)


def _quantized(x_THD: Tensor) -> Tensor:
    """Whole numbers of up to 127, and their fp32 scale as four more of them."""
    x = x_THD.float()
    scale_TH1 = x.abs().amax(-1, keepdim=True) / 127
    whole = (x / scale_TH1.clamp(min=1e-30)).round().to(torch.int8)
    return torch.cat([whole, scale_TH1.contiguous().view(torch.int8)], dim=-1)


def _dequantized(x_SHD: Tensor) -> Tensor:
    return x_SHD[..., :-4].float() * x_SHD[..., -4:].contiguous().view(torch.float32)


def attend(q_THD: Tensor, k_SHD: Tensor, v_SHD: Tensor, past: int, window: int | None) -> Tensor:
    """Causal attention of adjacent queries over the keys (S, heads, D) of one sequence, `past` of them before."""
    group = q_THD.shape[1] // k_SHD.shape[1]
    q, k, v = (x.transpose(0, 1)[None] for x in (q_THD, k_SHD, v_SHD))
    if group > 1:
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    if past == 0 and window is None:
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    else:
        mask_TS = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(past)
        if window is not None:
            mask_TS = mask_TS.triu(past - window + 1)
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_TS)
    return o[0].transpose(0, 1)
