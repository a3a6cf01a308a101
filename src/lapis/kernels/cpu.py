"""The ops over the compiled C kernels. Order of every sum: contract.md; gradients: cpu_train.c.

Dims as in ops.py; further D head size, R rows of a chunk.
"""

from __future__ import annotations

import ctypes
import functools
import math
import threading
import weakref
from collections.abc import Iterator
from ctypes import byref
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from lapis.kernels import variants
from lapis.kernels.batch import PAGE, Batch, LayerCache
from lapis.kernels.cpu_library import COLUMNS, NORM_STEP, PANEL_ROWS, SUM_ROWS, CAdamW, CBatch, bind
from lapis.kernels.ops import Rope

BF16, FP32 = torch.bfloat16, torch.float32
CHUNK_LOGITS, CHUNK_ROWS = (
    1 << 22,
    256,
)  # about how many logits exist at a time in the chunked losses, and least rows


@dataclass
class _Packed:
    """A weight in the linear kernel's layout, and what tells whether it still is that weight."""

    owner: weakref.ref[Tensor]
    data: Tensor
    pointer: int  # of data
    version: int = -1
    source: int = 0  # pointer of the weight
    generation: int = -1


@dataclass
class _Descriptor:
    """What C needs to know of a Batch, made once per batch."""

    tokens: CBatch
    reference: Any  # byref(tokens)
    spans: Tensor  # int64 [spans][2]
    private: LayerCache | None = None


@functools.cache
def load(variant: str) -> CpuOps:
    """The ops of one build, one object per process. Raises UnavailableError if the build cannot be used here."""
    return CpuOps(variant, variants.library(variant))


class CpuOps:
    """Compiled kernels. Rows are contiguous bf16, their widths multiples of 16 (inputs of linear: of 2)."""

    bit_exact = True
    reason = ""

    def __init__(self, variant: str, library: ctypes.CDLL) -> None:
        self.name = f"cpu-{variant}"
        self.c = bind(library)
        self._packed: dict[tuple[int, bool], _Packed] = {}
        self._generation = 0
        self._lock = threading.Lock()

    # ---- the cache

    def new_cache(self, pages: int, kv_heads: int, head_size: int) -> LayerCache:
        """Keys as [page][head][dim pair][key][2], values as [page][head][key pair][dim][2]; no content matters."""
        keys = torch.zeros(pages, kv_heads, head_size // 2, PAGE, 2, dtype=BF16)
        return LayerCache(keys, torch.zeros(pages, kv_heads, PAGE // 2, head_size, 2, dtype=BF16))

    # ---- forward ops

    def embedding(self, ids_T: Tensor, w_VH: Tensor) -> Tensor:
        """Rows of the table."""
        if torch.is_grad_enabled() and w_VH.requires_grad:
            return cast(Tensor, _Embedding.apply(self, ids_T, w_VH))  # type: ignore[no-untyped-call]
        return w_VH.index_select(0, ids_T)

    def linear(
        self, x_TK: Tensor, w_NK: Tensor, residual_TN: Tensor | None = None, *, fp32: bool = False
    ) -> Tensor:
        """One chain of products over K per output, the residual added before the one rounding."""
        if torch.is_grad_enabled() and (x_TK.requires_grad or w_NK.requires_grad):
            return cast(Tensor, _Linear.apply(self, x_TK, w_NK, residual_TN, fp32))  # type: ignore[no-untyped-call]
        return self.linear_forward(x_TK, w_NK, residual_TN, fp32)

    def linear_forward(self, x_TK: Tensor, w_NK: Tensor, residual_TN: Tensor | None, fp32: bool) -> Tensor:
        """linear without autograd."""
        tokens, inner = x_TK.shape
        columns = w_NK.shape[0]
        assert x_TK.dtype is BF16 and x_TK.is_contiguous() and w_NK.shape[1] == inner and inner % 2 == 0
        y_TN = torch.empty(tokens, columns, dtype=FP32 if fp32 else BF16)
        residual = None
        if residual_TN is not None:
            assert (
                residual_TN.dtype is BF16 and residual_TN.is_contiguous() and residual_TN.shape == y_TN.shape
            )
            residual = residual_TN.data_ptr()
        self.c.linear(
            x_TK.data_ptr(), tokens, inner, self._pack(w_NK), columns, residual, y_TN.data_ptr(), fp32
        )
        return y_TN

    def linear_backward(self, g_TN: Tensor, w_NK: Tensor, dx_TK: Tensor) -> None:
        """Fills dx = g W."""
        tokens, columns = g_TN.shape
        if columns % 2:  # the kernel takes its inner width in pairs
            torch.mm(g_TN, w_NK.detach(), out=dx_TK)
            return
        assert g_TN.dtype is BF16 and g_TN.is_contiguous() and dx_TK.is_contiguous()
        packed = self._pack(w_NK, transposed=True)
        self.c.linear(g_TN.data_ptr(), tokens, columns, packed, w_NK.shape[1], None, dx_TK.data_ptr(), False)

    def add_weight_gradient(self, g_TN: Tensor, x_TK: Tensor, dw_NK: Tensor) -> None:
        """dw += gᵀ x."""
        (tokens, columns), inner = g_TN.shape, x_TK.shape[1]
        assert g_TN.dtype is BF16 and g_TN.is_contiguous() and x_TK.is_contiguous() and dw_NK.is_contiguous()
        work = torch.empty((tokens + 1) // 2 * 2 * (columns + PANEL_ROWS + inner + COLUMNS), dtype=BF16)
        pointers = (tensor.data_ptr() for tensor in (g_TN, x_TK, dw_NK, work))
        self.c.linear_weight_gradient(*pointers, tokens, columns, inner)

    def rms_norm(self, x_TH: Tensor, w_H: Tensor, eps: float) -> Tensor:
        """x · (1 / sqrt(mean(x²) + eps)) · w."""
        if torch.is_grad_enabled() and (x_TH.requires_grad or w_H.requires_grad):
            return cast(Tensor, _RmsNorm.apply(self, x_TH, w_H, eps))  # type: ignore[no-untyped-call]
        return self.rms_norm_forward(x_TH, w_H, eps)

    def rms_norm_forward(self, x_TH: Tensor, w_H: Tensor, eps: float) -> Tensor:
        """rms_norm without autograd."""
        assert x_TH.dtype is BF16 and x_TH.is_contiguous() and w_H.dtype is BF16 and x_TH.shape[1] % 16 == 0
        y_TH = torch.empty_like(x_TH)
        self.c.rms_norm(x_TH.data_ptr(), w_H.data_ptr(), y_TH.data_ptr(), *x_TH.shape, eps)
        return y_TH

    def silu_mul(self, x_T2F: Tensor) -> Tensor:
        """silu(gate) · up."""
        if torch.is_grad_enabled() and x_T2F.requires_grad:
            return cast(Tensor, _SiluMul.apply(self, x_T2F))  # type: ignore[no-untyped-call]
        return self.silu_mul_forward(x_T2F)

    def silu_mul_forward(self, x_T2F: Tensor) -> Tensor:
        """silu_mul without autograd."""
        tokens, width = x_T2F.shape[0], x_T2F.shape[1] // 2
        assert x_T2F.dtype is BF16 and x_T2F.is_contiguous() and width % 16 == 0
        y_TF = torch.empty(tokens, width, dtype=BF16)
        self.c.silu_mul(x_T2F.data_ptr(), y_TF.data_ptr(), tokens, width)
        return y_TF

    def attention(
        self, qkv_TW: Tensor, batch: Batch, layer: int, heads: int, kv_heads: int, head_size: int, rope: Rope
    ) -> Tensor:
        """Rotates, writes keys and values to their pages, then every query walks its pages from position 0."""
        sizes = (heads, kv_heads, head_size)
        if torch.is_grad_enabled() and qkv_TW.requires_grad:
            return cast(Tensor, _Attention.apply(self, qkv_TW, batch, layer, sizes, rope))  # type: ignore[no-untyped-call]
        return self.attention_forward(qkv_TW, batch, layer, sizes, rope, None, None)[0]

    def attention_forward(
        self,
        qkv_TW: Tensor,
        batch: Batch,
        layer: int,
        sizes: tuple[int, int, int],
        rope: Rope,
        k_TX: Tensor | None,
        lse_TQ: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """attention without autograd: output and rotated queries; k and lse are filled if given."""
        heads, kv_heads, head_size = sizes
        assert qkv_TW.dtype is BF16 and qkv_TW.is_contiguous()
        assert qkv_TW.shape == (batch.tokens, (heads + 2 * kv_heads) * head_size)
        descriptor = batch.prepared.get(self.name) or _describe(self.name, batch, rope)
        if batch.caches is not None:
            cache = batch.caches[layer]
        else:
            if descriptor.private is None:
                descriptor.private = self.new_cache(batch.private_pages, kv_heads, head_size)
            cache = descriptor.private
        o_TX = torch.empty(batch.tokens, heads * head_size, dtype=BF16)
        q_TX = torch.empty(batch.tokens, heads * head_size, dtype=BF16)
        self.c.attention(
            descriptor.reference,
            qkv_TW.data_ptr(),
            heads,
            kv_heads,
            head_size,
            rope.cos_PD2.data_ptr(),
            rope.sin_PD2.data_ptr(),
            cache.keys.data_ptr(),
            cache.values.data_ptr(),
            q_TX.data_ptr(),
            None if k_TX is None else k_TX.data_ptr(),
            o_TX.data_ptr(),
            None if lse_TQ is None else lse_TQ.data_ptr(),
        )
        return o_TX, q_TX

    def logprobs(self, logits_TV: Tensor, ids_T: Tensor) -> Tensor:
        """Log softmax picked at ids; differentiable by torch's formula."""
        if torch.is_grad_enabled() and logits_TV.requires_grad:
            return cast(Tensor, _Logprobs.apply(self, logits_TV, ids_T))  # type: ignore[no-untyped-call]
        return self.logprobs_forward(logits_TV, ids_T)

    def logprobs_forward(self, logits_TV: Tensor, ids_T: Tensor) -> Tensor:
        """logprobs without autograd."""
        assert logits_TV.dtype is FP32 and logits_TV.is_contiguous() and ids_T.dtype is torch.int64
        ids_T = ids_T.contiguous()
        out_T = torch.empty(ids_T.shape, dtype=FP32)
        self.c.logprobs(logits_TV.data_ptr(), *logits_TV.shape, ids_T.data_ptr(), out_T.data_ptr(), None)
        return out_T

    def argmax(self, logits_TV: Tensor) -> Tensor:
        """Index of the first maximum of each row."""
        assert logits_TV.dtype is FP32 and logits_TV.is_contiguous()
        out_T = torch.empty(logits_TV.shape[0], dtype=torch.int64)
        self.c.logprobs(logits_TV.data_ptr(), *logits_TV.shape, None, None, out_T.data_ptr())
        return out_T

    # ---- losses

    def linear_logprobs(self, x_TH: Tensor, w_VH: Tensor, ids_T: Tensor) -> Tensor:
        """Chunk by chunk with the bits of linear and logprobs."""
        out_T = torch.empty(ids_T.shape, dtype=FP32)
        for rows in _chunks(x_TH.shape[0], w_VH.shape[0]):
            logits_RV = self.linear_forward(x_TH[rows], w_VH, None, True)
            out_T[rows] = self.logprobs_forward(logits_RV, ids_T[rows])
        return out_T

    def linear_cross_entropy(
        self, x_TH: Tensor, w_VH: Tensor, targets_T: Tensor, weights_T: Tensor | None = None
    ) -> Tensor:
        """The exact sum of the tokens' losses, rounded once; a token's loss has the bits of -logprob · weight."""
        if torch.is_grad_enabled() and (x_TH.requires_grad or w_VH.requires_grad):
            return cast(Tensor, _CrossEntropy.apply(self, x_TH, w_VH, targets_T, weights_T))  # type: ignore[no-untyped-call]
        losses_T = -self.linear_logprobs(x_TH, w_VH, targets_T)
        return exact_sum(losses_T if weights_T is None else losses_T * weights_T)

    # ---- training

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
        buffers = (weight, grad, master, first, second)
        for buffer, dtype in zip(buffers, (BF16, BF16, FP32, FP32, FP32), strict=True):
            assert buffer.dtype is dtype and buffer.is_contiguous() and buffer.numel() == weight.numel()
        numbers = CAdamW(lr, beta1, beta2, eps, weight_decay, correction1, correction2, clip)
        self.c.adamw(*(buffer.data_ptr() for buffer in buffers), weight.numel(), byref(numbers))

    def squared_norm(self, grad: Tensor) -> float:
        """Steps of fixed size in fp32 lanes, then in double in order."""
        assert grad.dtype is BF16 and grad.is_contiguous()
        partial = torch.empty(-(-grad.numel() // NORM_STEP), dtype=torch.float64)
        return float(self.c.squared_norm(grad.data_ptr(), grad.numel(), partial.data_ptr()))

    def weights_changed(self) -> None:
        """Every packed copy is renewed, in place, when it is next used."""
        self._generation += 1

    # ---- packed weights

    def _pack(self, w_NK: Tensor, transposed: bool = False) -> int:
        """Pointer to a weight, or its transpose, in tiles of the linear kernel; renewed if the weight changed."""
        packed = self._packed.get((id(w_NK), transposed))
        if (
            packed is not None
            and packed.version == _version(w_NK)
            and packed.source == w_NK.data_ptr()
            and packed.generation == self._generation
        ):
            return packed.pointer
        with self._lock:
            return self._repack(w_NK, transposed)

    def _repack(self, w_NK: Tensor, transposed: bool) -> int:
        assert w_NK.dtype is BF16 and w_NK.is_contiguous()
        key = (id(w_NK), transposed)
        columns, inner = w_NK.shape[::-1] if transposed else w_NK.shape
        size = -(-columns // COLUMNS) * COLUMNS * inner
        packed = self._packed.get(key)
        if packed is None or packed.data.numel() != size:
            data = torch.empty(size, dtype=BF16)
            owner = weakref.ref(w_NK, lambda _: self._packed.pop(key, None))
            packed = self._packed[key] = _Packed(owner, data, data.data_ptr())
        version, source, generation = _version(w_NK), w_NK.data_ptr(), self._generation
        if transposed:
            self.c.pack_rows(source, packed.pointer, inner, columns)
        else:
            self.c.pack(source, packed.pointer, columns, inner)
        packed.version, packed.source, packed.generation = version, source, generation
        return packed.pointer


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ops: CpuOps, ids_T: Tensor, w_VH: Tensor) -> Tensor:
        ctx.ops, ctx.weight = ops, w_VH
        ctx.save_for_backward(ids_T)
        return w_VH.index_select(0, ids_T)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (ids_T,) = ctx.saved_tensors
        g_TH = grads[0].contiguous()
        order_T = ids_T.argsort(stable=True)
        dw_VH, returned = _gradient_buffer(ctx.weight)
        ctx.ops.c.embedding_backward(
            ids_T.data_ptr(), order_T.data_ptr(), g_TH.data_ptr(), dw_VH.data_ptr(), *g_TH.shape
        )
        return None, None, returned


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ops: CpuOps, x: Tensor, w: Tensor, residual: Tensor | None, fp32: bool) -> Tensor:
        ctx.ops, ctx.weight, ctx.residual = ops, w, residual is not None
        ctx.save_for_backward(x)
        return ops.linear_forward(x, w, residual, fp32)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x_TK,) = ctx.saved_tensors
        g_TN, dx_TK, dw_NK = grads[0].to(BF16).contiguous(), None, None
        if ctx.needs_input_grad[1]:
            dx_TK = torch.empty_like(x_TK)
            ctx.ops.linear_backward(g_TN, ctx.weight, dx_TK)
        if ctx.needs_input_grad[2]:
            buffer_NK, dw_NK = _gradient_buffer(ctx.weight)
            ctx.ops.add_weight_gradient(g_TN, x_TK, buffer_NK)
        return None, dx_TK, dw_NK, (g_TN if ctx.residual else None), None


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ops: CpuOps, x_TH: Tensor, w_H: Tensor, eps: float) -> Tensor:
        ctx.ops, ctx.weight, ctx.eps = ops, w_H, eps
        ctx.save_for_backward(x_TH)
        return ops.rms_norm_forward(x_TH, w_H, eps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x_TH,) = ctx.saved_tensors
        g_TH = grads[0].contiguous()
        tokens, width = x_TH.shape
        dx_TH = torch.empty_like(x_TH)
        dw_H, returned = _gradient_buffer(ctx.weight)
        partial = torch.empty(-(-tokens // SUM_ROWS), width, dtype=FP32)
        pointers = (tensor.data_ptr() for tensor in (x_TH, ctx.weight, g_TH, dx_TH, dw_H, partial))
        ctx.ops.c.rms_norm_backward(*pointers, tokens, width, ctx.eps)
        return None, dx_TH, returned, None


class _SiluMul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ops: CpuOps, x_T2F: Tensor) -> Tensor:
        ctx.ops = ops
        ctx.save_for_backward(x_T2F)
        return ops.silu_mul_forward(x_T2F)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x_T2F,) = ctx.saved_tensors
        g_TF = grads[0].contiguous()
        dx_T2F = torch.empty_like(x_T2F)
        ctx.ops.c.silu_mul_backward(x_T2F.data_ptr(), g_TF.data_ptr(), dx_T2F.data_ptr(), *g_TF.shape)
        return None, dx_T2F


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        ops: CpuOps,
        qkv_TW: Tensor,
        batch: Batch,
        layer: int,
        sizes: tuple[int, int, int],
        rope: Rope,
    ) -> Tensor:
        heads, kv_heads, head_size = sizes
        assert batch.caches is None, (
            "gradients need the keys of whole sequences: a packed batch without caches"
        )
        k_TX = torch.empty(batch.tokens, kv_heads * head_size, dtype=BF16)
        lse_TQ = torch.empty(batch.tokens, heads, dtype=FP32)
        o_TX, q_TX = ops.attention_forward(qkv_TW, batch, layer, sizes, rope, k_TX, lse_TQ)
        ctx.ops, ctx.batch, ctx.sizes, ctx.rope = ops, batch, sizes, rope
        ctx.save_for_backward(q_TX, k_TX, qkv_TW, o_TX, lse_TQ)
        return o_TX

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # q, k, qkv, o, lse
        g_TX = grads[0].contiguous()
        spans = ctx.batch.prepared[ctx.ops.name].spans
        dqkv_TW = torch.empty_like(saved[2])
        ctx.ops.c.attention_backward(
            spans.data_ptr(),
            spans.shape[0],
            ctx.batch.position_T.data_ptr(),
            *(tensor.data_ptr() for tensor in saved),
            g_TX.data_ptr(),
            ctx.rope.cos_PD2.data_ptr(),
            ctx.rope.sin_PD2.data_ptr(),
            dqkv_TW.data_ptr(),
            *ctx.sizes,
        )
        return None, dqkv_TW, None, None, None, None


class _Logprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ops: CpuOps, logits_TV: Tensor, ids_T: Tensor) -> Tensor:
        ctx.save_for_backward(logits_TV, ids_T)
        return ops.logprobs_forward(logits_TV, ids_T)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        logits_TV, ids_T = ctx.saved_tensors
        g_T1 = grads[0][:, None]
        dlogits_TV = logits_TV.softmax(-1).mul_(-g_T1)
        return None, dlogits_TV.scatter_add_(1, ids_T[:, None], g_T1), None


class _CrossEntropy(torch.autograd.Function):
    """Liger-style (Hsu et al. 2024): gradients of a chunk are made at once, while its logits are there."""

    @staticmethod
    def forward(
        ctx: Any, ops: CpuOps, x_TH: Tensor, w_VH: Tensor, targets_T: Tensor, weights_T: Tensor | None
    ) -> Tensor:
        targets_T = targets_T.contiguous()
        weights_T = torch.ones(targets_T.shape) if weights_T is None else weights_T.float().contiguous()
        losses_T, dx_TH = torch.empty(targets_T.shape), torch.empty_like(x_TH)
        dw_VH = torch.zeros_like(w_VH)
        for rows in _chunks(x_TH.shape[0], w_VH.shape[0]):
            logits_RV = ops.linear_forward(x_TH[rows], w_VH, None, True)
            grad_RV = torch.empty(logits_RV.shape, dtype=BF16)
            pointers = (part[rows].data_ptr() for part in (targets_T, weights_T))
            ops.c.cross_entropy(
                logits_RV.data_ptr(),
                *logits_RV.shape,
                *pointers,
                grad_RV.data_ptr(),
                losses_T[rows].data_ptr(),
            )
            ops.linear_backward(grad_RV, w_VH, dx_TH[rows])
            ops.add_weight_gradient(grad_RV, x_TH[rows], dw_VH)
        ctx.weight = w_VH
        ctx.save_for_backward(dx_TH, dw_VH)
        return exact_sum(losses_T)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dx_TH, dw_VH = ctx.saved_tensors
        factor = float(grads[0])
        if ctx.weight.grad is None:
            return None, dx_TH * factor, dw_VH * factor, None, None
        ctx.weight.grad.add_(dw_VH, alpha=factor)
        return None, dx_TH * factor, None, None, None


def exact_sum(x_T: Tensor) -> Tensor:
    """The exactly rounded sum of fp32 numbers, whatever their order; NaN if one is not finite."""
    if not bool(x_T.isfinite().all()):
        return torch.tensor(math.nan)
    return torch.tensor(math.fsum(x_T.tolist()), dtype=FP32)


def _version(weight: Tensor) -> int:
    """How often autograd saw the weight change; weights made in inference mode have no count."""
    return 0 if weight.is_inference() else weight._version


def _gradient_buffer(weight: Tensor) -> tuple[Tensor, Tensor | None]:
    """Where C adds a weight's gradient: weight.grad itself, or zeros that are returned to autograd."""
    if weight.grad is not None and weight.grad.is_contiguous():
        return weight.grad, None
    zeros = torch.zeros_like(weight)
    return zeros, zeros


def _chunks(tokens: int, vocabulary: int) -> Iterator[slice]:
    rows = max(CHUNK_ROWS, CHUNK_LOGITS // vocabulary)
    return (slice(start, min(start + rows, tokens)) for start in range(0, tokens, rows))


def _describe(name: str, batch: Batch, rope: Rope) -> _Descriptor:
    if batch.tokens:
        last, pages = int(batch.position_T.max()), batch.page_table_SP.shape[1]
        assert last < rope.cos_PD2.shape[0], (
            f"position {last} lies beyond the {rope.cos_PD2.shape[0]} rotary rows"
        )
        assert last < pages * PAGE, f"position {last} lies beyond the {pages} pages of the page table"
    tokens = CBatch(
        batch.sequence_T.data_ptr(),
        batch.position_T.data_ptr(),
        batch.page_table_SP.data_ptr(),
        batch.tokens,
        batch.page_table_SP.shape[1],
    )
    spans = torch.tensor(batch.spans, dtype=torch.int64).reshape(-1, 2)
    descriptor = _Descriptor(tokens, byref(tokens), spans)
    batch.prepared[name] = descriptor
    return descriptor
