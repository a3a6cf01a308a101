"""The ops over the compiled C kernels, with their gradients. Order of every sum: contract.md.

Dims as in ops.py; further X heads times head size, Q query heads, R rows of a chunk.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from lapis.kernels import variants
from lapis.kernels.batch import AdapterPair, Batch, LayerCache
from lapis.kernels.cpu_fp32 import Fp32Kernels
from lapis.kernels.cpu_groups import Experts, Fp32Groups, Groups, Lora, Route
from lapis.kernels.cpu_kernels import BF16, FP32, Kernels, Sizes
from lapis.kernels.cpu_library import CAdamW, CMuon
from lapis.kernels.gradient import cheap, gradient_buffer, kept
from lapis.kernels.ops import CPU, Matrix, Rope
from lapis.kernels.quantized import NO_GRADIENT, Quantized
from lapis.kernels.torch_steps import muon_step

# about how many logits exist at a time in the chunked losses, and the fewest rows of a chunk
CHUNK_LOGITS, CHUNK_ROWS = 1 << 22, 256
MUON_STEP = 32  # both sides of a matrix are multiples of it


@functools.cache
def load(variant: str, dtype: torch.dtype = BF16) -> CpuOps:
    """The ops of one build for weights of bf16 or fp32, one object per process.

    Raises UnavailableError if the build cannot be used here.
    """
    kind = Fp32Kernels if dtype is FP32 else Kernels
    return CpuOps(f"cpu-{variant}", kind(variants.library(variant)))


class CpuOps:
    """Compiled kernels, bit-exact. Rows are contiguous, bf16 or fp32 as the kernels; widths are multiples of 16."""

    bit_exact = True
    reason = ""
    device = CPU

    def __init__(self, name: str, kernels: Kernels) -> None:
        self.name = name
        self.kernels = kernels
        self.groups = Fp32Groups(kernels) if kernels.dtype is FP32 else Groups(kernels)

    def new_cache(self, pages: int, kv_heads: int, head_size: int, *, int8: bool = False) -> LayerCache:
        """Pages in the layout of the kernels; what lies in them before they are written does not matter."""
        return self.kernels.new_cache(pages, kv_heads, head_size, int8)

    def embedding(self, ids_T: Tensor, w_VH: Tensor, add: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Rows of the table, and of the second one."""
        place_T, other_PH = (None, None) if add is None else add
        if torch.is_grad_enabled() and (w_VH.requires_grad or _wants_grad(other_PH)):
            apply = _Embedding.apply
            return cast(Tensor, apply(self.kernels, ids_T, w_VH, place_T, other_PH))  # type: ignore[no-untyped-call]
        if place_T is not None and other_PH is not None:
            return self.kernels.gather_add(ids_T.contiguous(), w_VH, place_T.contiguous(), other_PH)
        return self.kernels.gather(ids_T.contiguous(), w_VH)

    def linear(
        self,
        x_TK: Tensor,
        w_NK: Tensor | Quantized,
        residual_TN: Tensor | None = None,
        *,
        bias_N: Tensor | None = None,
        fp32: bool = False,
    ) -> Tensor:
        """One chain of products over K per output; bias, then residual, are added before the one rounding."""
        if isinstance(w_NK, Quantized):
            inputs = (x_TK, residual_TN, bias_N)
            assert not (torch.is_grad_enabled() and any(map(_wants_grad, inputs))), NO_GRADIENT
            return self.kernels.linear_quantized(x_TK, w_NK, residual_TN, fp32, bias_N)
        if torch.is_grad_enabled() and (x_TK.requires_grad or w_NK.requires_grad or _wants_grad(bias_N)):
            apply = _Linear.apply
            return cast(Tensor, apply(self.kernels, x_TK, w_NK, residual_TN, bias_N, fp32))  # type: ignore[no-untyped-call]
        return self.kernels.linear(x_TK, w_NK, residual_TN, fp32, bias_N)

    def route(self, logits_TE: Tensor, top: int, normalise: bool) -> tuple[Tensor, Tensor]:
        """Softmax, the `top` best experts, the smaller index first among equals."""
        if torch.is_grad_enabled() and logits_TE.requires_grad:
            apply = Route.apply
            return cast(tuple[Tensor, Tensor], apply(self.groups, logits_TE, top, normalise))  # type: ignore[no-untyped-call]
        return self.groups.route(logits_TE, top, normalise)

    def experts(
        self,
        x_TH: Tensor,
        expert_TA: Tensor,
        weight_TA: Tensor,
        gate_up_ENH: Tensor | Quantized,
        down_EHF: Tensor | Quantized,
        residual_TH: Tensor,
    ) -> Tensor:
        """The rows of an expert in one product; the weighted sum in the order of A, the residual last."""
        inputs = (x_TH, expert_TA, weight_TA, gate_up_ENH, down_EHF, residual_TH)
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
            assert isinstance(gate_up_ENH, Tensor), NO_GRADIENT
            return cast(Tensor, Experts.apply(self.groups, *inputs))  # type: ignore[no-untyped-call]
        return self.groups.experts(*inputs)

    def lora(self, y_TN: Tensor, x_TK: Tensor, pairs: Sequence[AdapterPair], adapter_T: Tensor) -> Tensor:
        """The rows of an adapter in one product, added to y before the one rounding."""
        flat = [weight for pair in pairs for weight in (pair or (None, None))]
        if torch.is_grad_enabled() and any(map(_wants_grad, (y_TN, x_TK, *flat))):
            return cast(Tensor, Lora.apply(self.groups, y_TN, x_TK, adapter_T, *flat))  # type: ignore[no-untyped-call]
        return self.groups.lora(y_TN, x_TK, pairs, adapter_T)[0]

    def rms_norm(self, x_TH: Tensor, w_H: Tensor, eps: float) -> Tensor:
        """x · (1 / sqrt(mean(x²) + eps)) · w."""
        if torch.is_grad_enabled() and (x_TH.requires_grad or w_H.requires_grad):
            return cast(Tensor, _RmsNorm.apply(self.kernels, x_TH, w_H, eps))  # type: ignore[no-untyped-call]
        return self.kernels.rms_norm(x_TH, w_H, eps)

    def silu_mul(self, x_T2F: Tensor) -> Tensor:
        """silu(gate) · up."""
        if torch.is_grad_enabled() and x_T2F.requires_grad:
            made = cast(Tensor, _SiluMul.apply(self.kernels, x_T2F))  # type: ignore[no-untyped-call]
            return cheap(made, self.kernels.silu_mul, x_T2F)
        return self.kernels.silu_mul(x_T2F)

    def layer_norm(self, x_TH: Tensor, w_H: Tensor, b_H: Tensor, eps: float) -> Tensor:
        """((x - mean) · (1 / sqrt(mean of squares + eps))) · w + b."""
        if torch.is_grad_enabled() and (x_TH.requires_grad or w_H.requires_grad or b_H.requires_grad):
            return cast(Tensor, _LayerNorm.apply(self.kernels, x_TH, w_H, b_H, eps))  # type: ignore[no-untyped-call]
        return self.kernels.layer_norm(x_TH, w_H, b_H, eps)

    def gelu(self, x_TF: Tensor) -> Tensor:
        """x / (1 + exp(-2u)), u = sqrt(2/pi) (x + 0.044715 x³)."""
        if torch.is_grad_enabled() and x_TF.requires_grad:
            made = cast(Tensor, _Gelu.apply(self.kernels, x_TF))  # type: ignore[no-untyped-call]
            return cheap(made, self.kernels.gelu, x_TF)
        return self.kernels.gelu(x_TF)

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
        """rms_norm of each query and key head, or of all of them together."""
        sizes, tensors = (heads, kv_heads, head_size), (qkv_TW, q_norm, k_norm)
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            return cast(Tensor, _HeadNorm.apply(self.kernels, *tensors, sizes, eps))  # type: ignore[no-untyped-call]
        return self.kernels.head_norm(*tensors, sizes, eps)

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
        """Rotates, writes keys and values to their pages, then every query walks the pages that it sees."""
        sizes = (heads, kv_heads, head_size)
        if torch.is_grad_enabled() and qkv_TW.requires_grad:
            apply = _Attention.apply
            return cast(Tensor, apply(self.kernels, qkv_TW, batch, layer, sizes, rope, window))  # type: ignore[no-untyped-call]
        return self.kernels.attention(qkv_TW, batch, layer, sizes, rope, window)[0]

    def logprobs(self, logits_TV: Tensor, ids_T: Tensor) -> Tensor:
        """Log softmax picked at ids."""
        if torch.is_grad_enabled() and logits_TV.requires_grad:
            return cast(Tensor, _Logprobs.apply(self.kernels, logits_TV, ids_T))  # type: ignore[no-untyped-call]
        return self.kernels.logprobs(logits_TV, ids_T)

    def argmax(self, logits_TV: Tensor, count: int | None = None) -> Tensor:
        """Index of the first maximum of each row, -1 where the row is not finite."""
        return self.kernels.argmax(logits_TV, logits_TV.shape[1] if count is None else count)

    def linear_logprobs(self, x_TH: Tensor, w_VH: Tensor | Quantized, ids_T: Tensor) -> Tensor:
        """Chunk by chunk with the bits of linear and logprobs."""
        out_T = torch.empty(ids_T.shape, dtype=FP32)
        for rows in _chunks(x_TH.shape[0], w_VH.shape[0]):
            with torch.no_grad():
                logits_RV = self.linear(x_TH[rows], w_VH, fp32=True)
            out_T[rows] = self.kernels.logprobs(logits_RV, ids_T[rows])
        return out_T

    def linear_cross_entropy(
        self, x_TH: Tensor, w_VH: Tensor, targets_T: Tensor, weights_T: Tensor | None = None
    ) -> Tensor:
        """The exact sum of the tokens' losses, rounded once; a token's loss has the bits of -logprob · weight."""
        if torch.is_grad_enabled() and (x_TH.requires_grad or w_VH.requires_grad):
            apply = _CrossEntropy.apply
            return cast(Tensor, apply(self.kernels, x_TH, w_VH, targets_T, weights_T))  # type: ignore[no-untyped-call]
        losses_T = -self.linear_logprobs(x_TH, w_VH, targets_T)
        return exact_sum(losses_T if weights_T is None else losses_T * weights_T)

    def adamw(
        self,
        weight: Tensor,
        grad: Tensor,
        master: Tensor,
        first: Tensor,
        second: Tensor,
        *,
        lr: float,
        beta1: float,
        beta2: float,
        eps: float,
        weight_decay: float,
        correction1: float,
        correction2: float,
        clip: float,
    ) -> None:
        """One pass over all five buffers."""
        numbers = CAdamW(lr, beta1, beta2, eps, weight_decay, correction1, correction2, clip)
        self.kernels.adamw((weight, grad, master, first, second), numbers)

    def muon(
        self,
        weight: Tensor,
        grad: Tensor,
        master: Tensor,
        momentum: Tensor,
        matrices: Sequence[Matrix],
        *,
        lr: float,
        beta: float,
        weight_decay: float,
        coefficients: tuple[float, float, float],
        iterations: int,
    ) -> None:
        """From gradient to weight matrix by matrix; those whose sides do not fit the kernel by plain torch."""
        buffers = (weight, grad, master, momentum)
        fitting = []
        for at in matrices:
            if at.rows % MUON_STEP == at.columns % MUON_STEP == 0:
                fitting.append(at)
            else:
                muon_step(buffers, at, lr, beta, weight_decay, coefficients, iterations)
        if fitting:
            self.kernels.muon(buffers, fitting, CMuon(lr, beta, weight_decay, *coefficients, iterations))

    def squared_norm(self, grad: Tensor) -> float:
        """Steps of fixed size in fp32 lanes, then in double in order."""
        return self.kernels.squared_norm(grad)

    def sealed(self, w_NK: Tensor) -> Tensor:
        """A stand-in for a weight whose values exist packed alone; no gradient, no other use than in linear."""
        return self.kernels.sealed(w_NK)

    def weights_changed(self) -> None:
        """Every packed copy is renewed, in place, when it is next used."""
        self.kernels.weights_changed()


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        kernels: Kernels,
        ids_T: Tensor,
        w_VH: Tensor,
        place_T: Tensor | None,
        other_PH: Tensor | None,
    ) -> Tensor:
        ctx.kernels, ctx.weight, ctx.other, ctx.place_T = kernels, w_VH, other_PH, place_T
        ctx.save_for_backward(ids_T.contiguous())
        if place_T is None or other_PH is None:
            return w_VH.index_select(0, ids_T)
        return kernels.gather_add(ids_T.contiguous(), w_VH, place_T.contiguous(), other_PH)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (ids_T,), g_TH, returned, other = ctx.saved_tensors, grads[0].contiguous(), None, None
        if ctx.needs_input_grad[2]:
            dw_VH, returned = gradient_buffer(ctx.weight)
            ctx.kernels.embedding_backward(ids_T, g_TH, dw_VH)
        if ctx.needs_input_grad[4]:
            dother_PH, other = gradient_buffer(ctx.other)
            ctx.kernels.embedding_backward(ctx.place_T.long(), g_TH, dother_PH)
        return None, None, returned, None, other


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        kernels: Kernels,
        x: Tensor,
        w: Tensor,
        residual: Tensor | None,
        bias: Tensor | None,
        fp32: bool,
    ) -> Tensor:
        ctx.kernels, ctx.weight, ctx.residual, ctx.bias = kernels, w, residual is not None, bias
        source, ctx.remake = kept(x)
        ctx.save_for_backward(
            source if w.requires_grad else None
        )  # a frozen weight's gradient needs no inputs
        y_TN = kernels.linear(x, w, residual, fp32, bias)
        if w.requires_grad:
            kernels.forget(w)
        return y_TN

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x_TK,) = ctx.saved_tensors
        g_TN, dx_TK, returned, dbias_N = grads[0].to(ctx.kernels.dtype).contiguous(), None, None, None
        if ctx.needs_input_grad[1]:
            dx_TK = torch.empty(len(g_TN), ctx.weight.shape[1], dtype=ctx.kernels.dtype)
            ctx.kernels.linear_backward(g_TN, ctx.weight, dx_TK)
        if ctx.needs_input_grad[2]:
            dw_NK, returned = gradient_buffer(ctx.weight)
            x_TK = x_TK if ctx.remake is None else ctx.remake(x_TK)
            ctx.kernels.add_weight_gradient(g_TN, x_TK, dw_NK)
        if ctx.needs_input_grad[4]:
            buffer_N, dbias_N = gradient_buffer(ctx.bias)
            ctx.kernels.add_bias_gradient(g_TN, buffer_N)
        return None, dx_TK, returned, (g_TN if ctx.residual else None), dbias_N, None


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernels: Kernels, x_TH: Tensor, w_H: Tensor, eps: float) -> Tensor:
        ctx.kernels, ctx.weight, ctx.eps = kernels, w_H, eps
        ctx.save_for_backward(x_TH)
        return kernels.rms_norm(x_TH, w_H, eps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x_TH,) = ctx.saved_tensors
        dw_H, returned = gradient_buffer(ctx.weight)
        dx_TH = ctx.kernels.rms_norm_backward(x_TH, ctx.weight, grads[0].contiguous(), dw_H, ctx.eps)
        return None, dx_TH, returned, None


class _SiluMul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernels: Kernels, x_T2F: Tensor) -> Tensor:
        ctx.kernels = kernels
        ctx.save_for_backward(x_T2F)
        return kernels.silu_mul(x_T2F)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, ctx.kernels.silu_mul_backward(ctx.saved_tensors[0], grads[0].contiguous())


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernels: Kernels, x_TH: Tensor, w_H: Tensor, b_H: Tensor, eps: float) -> Tensor:
        ctx.kernels, ctx.weight, ctx.bias, ctx.eps = kernels, w_H, b_H, eps
        ctx.save_for_backward(x_TH)
        return kernels.layer_norm(x_TH, w_H, b_H, eps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x_TH,) = ctx.saved_tensors
        (dw_H, dw), (db_H, db) = gradient_buffer(ctx.weight), gradient_buffer(ctx.bias)
        g_TH = grads[0].contiguous()
        dx_TH = ctx.kernels.layer_norm_backward(x_TH, ctx.weight, g_TH, dw_H, db_H, ctx.eps)
        return None, dx_TH, dw, db, None


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernels: Kernels, x_TF: Tensor) -> Tensor:
        ctx.kernels = kernels
        ctx.save_for_backward(x_TF)
        return kernels.gelu(x_TF)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, ctx.kernels.gelu_backward(ctx.saved_tensors[0], grads[0].contiguous())


class _HeadNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, kernels: Kernels, qkv_TW: Tensor, q_norm: Tensor, k_norm: Tensor, sizes: Sizes, eps: float
    ) -> Tensor:
        ctx.kernels, ctx.weights, ctx.sizes, ctx.eps = kernels, (q_norm, k_norm), sizes, eps
        ctx.save_for_backward(qkv_TW)
        return kernels.head_norm(qkv_TW, q_norm, k_norm, sizes, eps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved = (*ctx.saved_tensors, *ctx.weights)
        (dq, returned_q), (dk, returned_k) = (gradient_buffer(weight) for weight in ctx.weights)
        g_TW = grads[0].contiguous()
        dqkv_TW = ctx.kernels.head_norm_backward(saved, g_TW, dq, dk, ctx.sizes, ctx.eps)
        return None, dqkv_TW, returned_q, returned_k, None, None


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        kernels: Kernels,
        qkv_TW: Tensor,
        batch: Batch,
        layer: int,
        sizes: Sizes,
        rope: Rope | None,
        window: int | None,
    ) -> Tensor:
        heads, kv_heads, head_size = sizes
        assert batch.caches is None, (
            "gradients need the keys of whole sequences: a packed batch without caches"
        )
        k_TX = torch.empty(batch.tokens, kv_heads * head_size, dtype=kernels.dtype)
        lse_TQ = torch.empty(batch.tokens, heads, dtype=FP32)
        o_TX, q_TX = kernels.attention(qkv_TW, batch, layer, sizes, rope, window, k_TX, lse_TQ)
        ctx.kernels, ctx.batch, ctx.sizes, ctx.rope, ctx.window = kernels, batch, sizes, rope, window
        ctx.save_for_backward(q_TX, k_TX, qkv_TW, o_TX, lse_TQ)
        return o_TX

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        g_TX = grads[0].contiguous()
        shapes = (ctx.sizes, ctx.rope, ctx.window)
        dqkv_TW = ctx.kernels.attention_backward(ctx.batch, ctx.saved_tensors, g_TX, *shapes)
        return None, dqkv_TW, None, None, None, None, None


class _Logprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernels: Kernels, logits_TV: Tensor, ids_T: Tensor) -> Tensor:
        ctx.save_for_backward(logits_TV, ids_T)
        return kernels.logprobs(logits_TV, ids_T)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        logits_TV, ids_T = ctx.saved_tensors
        g_T1 = grads[0][:, None]
        dlogits_TV = logits_TV.softmax(-1).mul_(-g_T1)
        return None, dlogits_TV.scatter_add_(1, ids_T[:, None], g_T1), None


class _CrossEntropy(torch.autograd.Function):
    """The gradients of a chunk are made at once, while its logits are there (Hsu et al. 2024)."""

    @staticmethod
    def forward(
        ctx: Any, kernels: Kernels, x_TH: Tensor, w_VH: Tensor, targets_T: Tensor, weights_T: Tensor | None
    ) -> Tensor:
        targets_T = targets_T.contiguous()
        weights_T = torch.ones(targets_T.shape) if weights_T is None else weights_T.float().contiguous()
        losses_T, dx_TH = torch.empty(targets_T.shape), torch.empty_like(x_TH)
        dw_VH = torch.zeros_like(w_VH) if w_VH.requires_grad else None
        transposed = kernels.transposed(w_VH)
        for rows in _chunks(x_TH.shape[0], w_VH.shape[0]):
            logits_RV = kernels.linear(x_TH[rows], w_VH, None, True)
            grad_RV = kernels.cross_entropy(logits_RV, targets_T[rows], weights_T[rows], losses_T[rows])
            kernels.linear_backward(grad_RV, w_VH, dx_TH[rows], transposed)
            if dw_VH is not None:
                kernels.add_weight_gradient(grad_RV, x_TH[rows], dw_VH)
        if dw_VH is not None:
            kernels.forget(w_VH)
        ctx.weight = w_VH
        ctx.save_for_backward(dx_TH, dw_VH)
        return exact_sum(losses_T)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dx_TH, dw_VH = ctx.saved_tensors
        factor = float(grads[0])
        if dw_VH is None:
            return None, dx_TH * factor, None, None, None
        buffer_VH, returned = gradient_buffer(ctx.weight)
        buffer_VH.add_(dw_VH, alpha=factor)
        return None, dx_TH * factor, returned, None, None


def exact_sum(x_T: Tensor) -> Tensor:
    """The exactly rounded sum of fp32 numbers, whatever their order; NaN if one is not finite."""
    if not bool(x_T.isfinite().all()):
        return torch.tensor(math.nan)
    return torch.tensor(math.fsum(x_T.tolist()), dtype=FP32)


def _wants_grad(x: Tensor | None) -> bool:
    return x is not None and x.requires_grad


def _chunks(tokens: int, vocabulary: int) -> Iterator[slice]:
    rows = max(CHUNK_ROWS, CHUNK_LOGITS // vocabulary)
    return (slice(start, min(start + rows, tokens)) for start in range(0, tokens, rows))
