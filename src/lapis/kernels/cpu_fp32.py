"""The compiled kernels for models stored in fp32: exact forwards in C, gradients by torch.

Dims as in ops.py and cpu_kernels.py. Gradients are not under the contract, so torch makes them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lapis.errors import UnavailableError
from lapis.kernels.batch import PAGE, Batch, LayerCache
from lapis.kernels.cpu_kernels import FP32, Kernels, Sizes, addend, parts_of
from lapis.kernels.cpu_library import CAdamW, CMuon
from lapis.kernels.ops import Matrix, Rope
from lapis.kernels.quantized import Quantized
from lapis.kernels.stock import StockOps
from lapis.kernels.torch_steps import muon_step

STOCK = StockOps(dtype=FP32)


class Fp32Kernels(Kernels):
    """One build's kernels for fp32 rows, with the methods of those for bf16; widths are multiples of 16."""

    dtype = FP32
    _pack_name = "pack_fp32"
    _gather_add_name = "gather_add_fp32"

    # ---- linear

    def linear(
        self,
        x_TK: Tensor,
        w_NK: Tensor,
        residual_TN: Tensor | None,
        fp32: bool,
        bias_N: Tensor | None = None,
    ) -> Tensor:
        """x Wᵀ (+ bias) (+ residual); nothing is rounded to a shorter type, `fp32` or not."""
        tokens, inner = x_TK.shape
        columns = w_NK.shape[0]
        assert x_TK.dtype is FP32 and x_TK.is_contiguous() and w_NK.shape[1] == inner
        y_TN = torch.empty(tokens, columns, dtype=FP32)
        bias, residual = addend(bias_N, (columns,), FP32), addend(residual_TN, y_TN.shape, FP32)
        packed = self._pack(w_NK)
        self._c.linear_fp32(x_TK.data_ptr(), tokens, inner, packed, columns, bias, residual, y_TN.data_ptr())
        return y_TN

    def linear_quantized(
        self,
        x_TK: Tensor,
        w_NK: Quantized,
        residual_TN: Tensor | None,
        fp32: bool,
        bias_N: Tensor | None = None,
    ) -> Tensor:
        """Not offered: raises UnavailableError."""
        raise UnavailableError("weights in 8 or 4 bits are multiplied with rows of bf16, not of fp32")

    def transposed(self, w_NK: Tensor) -> Tensor:
        """The weight as it is: torch reads it in any order."""
        return w_NK.detach()

    def linear_backward(
        self, g_TN: Tensor, w_NK: Tensor, dx_TK: Tensor, transposed: Tensor | None = None
    ) -> None:
        """Fills dx = g W."""
        torch.mm(g_TN, w_NK.detach(), out=dx_TK)

    def add_weight_gradient(self, g_TN: Tensor, x_TK: Tensor, dw_NK: Tensor) -> None:
        """dw += gᵀ x."""
        dw_NK.addmm_(g_TN.T, x_TK)

    def add_bias_gradient(self, g_TN: Tensor, db_N: Tensor) -> None:
        """db += the sum of the rows of g."""
        db_N += g_TN.sum(0)

    # ---- single rows

    def rms_norm(self, x_TH: Tensor, w_H: Tensor, eps: float) -> Tensor:
        """x · (1 / sqrt(mean(x²) + eps)) · w."""
        _check(x_TH, w_H)
        y_TH = torch.empty_like(x_TH)
        self._c.rms_norm_fp32(x_TH.data_ptr(), w_H.data_ptr(), y_TH.data_ptr(), *x_TH.shape, eps)
        return y_TH

    def rms_norm_backward(self, x_TH: Tensor, w_H: Tensor, g_TH: Tensor, dw_H: Tensor, eps: float) -> Tensor:
        """Returns dx and adds to dw."""
        dx_TH, dw = _gradients(lambda x, w: STOCK.rms_norm(x, w, eps), (x_TH, w_H), g_TH)
        dw_H += dw
        return dx_TH

    def silu_mul(self, x_T2F: Tensor) -> Tensor:
        """silu(gate) · up."""
        tokens, width = x_T2F.shape[0], x_T2F.shape[1] // 2
        _check(x_T2F, step=32)
        y_TF = torch.empty(tokens, width, dtype=FP32)
        self._c.silu_mul_fp32(x_T2F.data_ptr(), y_TF.data_ptr(), tokens, width)
        return y_TF

    def silu_mul_backward(self, x_T2F: Tensor, g_TF: Tensor) -> Tensor:
        """Gradient of gate and up, joined as they came."""
        return _gradients(STOCK.silu_mul, (x_T2F,), g_TF)[0]

    def layer_norm(self, x_TH: Tensor, w_H: Tensor, b_H: Tensor, eps: float) -> Tensor:
        """((x - mean) · (1 / sqrt(mean of squares + eps))) · w + b."""
        _check(x_TH, w_H, b_H)
        y_TH = torch.empty_like(x_TH)
        pointers = (tensor.data_ptr() for tensor in (x_TH, w_H, b_H, y_TH))
        self._c.layer_norm_fp32(*pointers, *x_TH.shape, eps)
        return y_TH

    def layer_norm_backward(
        self, x_TH: Tensor, w_H: Tensor, g_TH: Tensor, dw_H: Tensor, db_H: Tensor, eps: float
    ) -> Tensor:
        """Returns dx and adds to dw and db."""
        ones_H = torch.ones_like(w_H)  # of the bias the gradient needs no value
        dx_TH, dw, db = _gradients(lambda x, w, b: STOCK.layer_norm(x, w, b, eps), (x_TH, w_H, ones_H), g_TH)
        dw_H += dw
        db_H += db
        return dx_TH

    def gelu(self, x_TF: Tensor) -> Tensor:
        """x / (1 + exp(-2u)), u = sqrt(2/pi) (x + 0.044715 x³)."""
        _check(x_TF)
        y_TF = torch.empty_like(x_TF)
        self._c.gelu_fp32(x_TF.data_ptr(), y_TF.data_ptr(), *x_TF.shape)
        return y_TF

    def gelu_backward(self, x_TF: Tensor, g_TF: Tensor) -> Tensor:
        """Gradient of x."""
        return _gradients(STOCK.gelu, (x_TF,), g_TF)[0]

    def head_norm(self, qkv_TW: Tensor, q_norm: Tensor, k_norm: Tensor, sizes: Sizes, eps: float) -> Tensor:
        """rms_norm of each query and key part; a part is as wide as its weight."""
        _check(qkv_TW, q_norm, k_norm)
        y_TW = torch.empty_like(qkv_TW)
        pointers = (tensor.data_ptr() for tensor in (qkv_TW, q_norm, k_norm, y_TW))
        self._c.head_norm_fp32(*pointers, len(qkv_TW), *parts_of(q_norm, k_norm, sizes), eps)
        return y_TW

    def head_norm_backward(
        self,
        saved: tuple[Tensor, Tensor, Tensor],
        g_TW: Tensor,
        dq: Tensor,
        dk: Tensor,
        sizes: Sizes,
        eps: float,
    ) -> Tensor:
        """Returns the gradient of the rows and adds to those of the weights; `saved` holds rows and weights."""
        dqkv_TW, dq_norm, dk_norm = _gradients(
            lambda x, q, k: STOCK.head_norm(x, q, k, *sizes, eps), saved, g_TW
        )
        dq += dq_norm
        dk += dk_norm
        return dqkv_TW

    def embedding_backward(self, ids_T: Tensor, g_TH: Tensor, dw_VH: Tensor) -> None:
        """Adds to dw: for each id the sum of its rows of g."""
        dw_VH.index_add_(0, ids_T, g_TH)

    def cross_entropy(
        self, logits_TV: Tensor, targets_T: Tensor, weights_T: Tensor, losses_T: Tensor
    ) -> Tensor:
        """Fills the losses and returns the gradient of logits, which are overwritten."""
        torch.mul(-self.logprobs(logits_TV, targets_T), weights_T, out=losses_T)
        counted_T1 = torch.where(targets_T >= 0, weights_T, 0.0)[:, None]
        grad_TV = logits_TV.softmax(-1).mul_(counted_T1)
        return grad_TV.scatter_add_(1, targets_T.clamp(min=0)[:, None], -counted_T1)

    # ---- attention

    def new_cache(self, pages: int, kv_heads: int, head_size: int, int8: bool = False) -> LayerCache:
        """Keys as [page][head][dim][key], values as [page][head][key][dim].

        Raises UnavailableError for int8.
        """
        if int8:
            raise UnavailableError(
                "keys and values in int8 go with weights in bf16, not in fp32",
                hint="Leave the key/value cache as it is, or the weights.",
            )
        # not zeroed: a page is cleared with its first key, and takes no memory before
        keys = torch.empty(pages, kv_heads, head_size, PAGE, dtype=FP32)
        return LayerCache(keys, torch.empty(pages, kv_heads, PAGE, head_size, dtype=FP32))

    def _attend(self, inputs: Sequence[Any], cache: LayerCache, outputs: Sequence[int | None]) -> None:
        assert cache.keys.dtype is FP32
        self._c.attention_fp32(*inputs, cache.keys.data_ptr(), cache.values.data_ptr(), *outputs)

    def attention_backward(
        self,
        batch: Batch,
        saved: tuple[Tensor, ...],
        g_TX: Tensor,
        sizes: Sizes,
        rope: Rope | None,
        window: int | None = None,
    ) -> Tensor:
        """Gradient of the joined rows, which are the third of `saved`; the forward is made again by torch."""

        def forward(qkv_TW: Tensor) -> Tensor:
            return STOCK.attention(qkv_TW, batch, 0, *sizes, rope, window=window)

        return _gradients(forward, (saved[2],), g_TX)[0]

    # ---- optimizer

    def adamw(self, buffers: tuple[Tensor, ...], numbers: CAdamW) -> None:
        """The step in torch calls."""
        STOCK.adamw(*buffers, **{name: getattr(numbers, name) for name, *_ in CAdamW._fields_})

    def muon(self, buffers: tuple[Tensor, ...], matrices: Sequence[Matrix], numbers: CMuon) -> None:
        """The step in torch calls, matrix by matrix."""
        coefficients = (numbers.a, numbers.b, numbers.c)
        for at in matrices:
            muon_step(
                buffers, at, numbers.lr, numbers.beta, numbers.weight_decay, coefficients, numbers.iterations
            )

    def squared_norm(self, grad: Tensor) -> float:
        """Blocks of fixed size summed by torch, then exactly."""
        return STOCK.squared_norm(grad)


def _check(x_TH: Tensor, *weights: Tensor, step: int = 16) -> None:
    assert x_TH.is_contiguous() and x_TH.shape[1] % step == 0
    assert all(tensor.dtype is FP32 for tensor in (x_TH, *weights))


def _gradients(forward: Callable[..., Tensor], inputs: Sequence[Tensor], g: Tensor) -> tuple[Tensor, ...]:
    """Gradients of all inputs of a forward in plain torch."""
    with torch.enable_grad():
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        return torch.autograd.grad(forward(*leaves), leaves, g)
