"""The ops over Triton kernels on a GPU, with gradients by plain torch. Order of every sum: contract.md.

Dims as in ops.py; further R rows of a chunk.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from lapis.errors import UnavailableError
from lapis.kernels import stock_groups, triton_kernels
from lapis.kernels import triton_launch as launch
from lapis.kernels.batch import PAGE, AdapterPair, Batch, LayerCache
from lapis.kernels.cpu import exact_sum
from lapis.kernels.ops import Rope
from lapis.kernels.quantized import Quantized
from lapis.kernels.stock import StockOps
from lapis.kernels.torch_steps import TorchSteps
from lapis.kernels.triton_launch import BF16, FP32


@functools.cache
def load() -> TritonOps:
    """The ops of this process's GPU. Raises UnavailableError without one (Triton's interpreter runs on the CPU)."""
    if triton_kernels.INTERPRETED.value:
        return TritonOps(torch.device("cpu"))
    if not torch.cuda.is_available():
        raise UnavailableError(
            "The Triton kernels need a GPU, and torch sees none.", hint="Unset LAPIS_KERNELS."
        )
    return TritonOps(torch.device("cuda"))


class TritonOps(TorchSteps):
    """Triton kernels for bf16. Weights and activations lie on `device`; indices and batches are brought there.

    Pages are (pages, kv_heads, PAGE, head_size).
    """

    name = "cuda-triton"

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bit_exact = rows_are_alone(device)
        self.reason = "" if self.bit_exact else "on this GPU a row's product depends on the number of rows"
        self._stock = StockOps()

    def new_cache(self, pages: int, kv_heads: int, head_size: int, *, int8: bool = False) -> LayerCache:
        """Pages, not cleared. Raises UnavailableError for int8."""
        if int8:
            raise UnavailableError(
                "Keys and values in int8 are not offered on a GPU.", hint="Use bf16: --kv-cache bf16."
            )
        shape = (pages, kv_heads, PAGE, head_size)
        return LayerCache(*(torch.empty(shape, dtype=BF16, device=self.device) for _ in range(2)))

    def embedding(self, ids_T: Tensor, w_VH: Tensor, add: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Rows of the table, and of the second one."""
        y_TH = _run(launch.gather, F.embedding, ids_T.to(self.device), w_VH)
        return y_TH if add is None else y_TH + self.embedding(add[0].long(), add[1])

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
        assert isinstance(w_NK, Tensor), "a quantised model runs on the CPU"
        inputs = (x_TK.contiguous(), w_NK, residual_TN, bias_N)
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
            return cast(Tensor, _Linear.apply(*inputs, fp32))  # type: ignore[no-untyped-call]
        return launch.linear(inputs[0], w_NK, residual_TN, fp32, bias_N)

    def route(self, logits_TE: Tensor, top: int, normalise: bool) -> tuple[Tensor, Tensor]:
        """Softmax, the `top` best experts, the smaller index first among equals."""
        expert_TA, weight_TA = launch.route(logits_TE.detach(), top, normalise)
        if torch.is_grad_enabled() and logits_TE.requires_grad:
            weight_TA = _run(
                lambda logits: weight_TA,
                lambda logits: stock_groups.chosen(logits, expert_TA, normalise),
                logits_TE,
            )
        return expert_TA, weight_TA

    def experts(
        self,
        x_TH: Tensor,
        expert_TA: Tensor,
        weight_TA: Tensor,
        gate_up_ENH: Tensor | Quantized,
        down_EHF: Tensor | Quantized,
        residual_TH: Tensor,
    ) -> Tensor:
        """The rows of an expert in tiles of their own; the weighted sum in the order of A, the residual last."""
        assert isinstance(gate_up_ENH, Tensor) and isinstance(down_EHF, Tensor), (
            "a quantised model runs on the CPU"
        )
        tensors = (x_TH, expert_TA, weight_TA, gate_up_ENH, down_EHF, residual_TH)
        return _run(launch.experts, stock_groups.experts, *tensors)

    def lora(self, y_TN: Tensor, x_TK: Tensor, pairs: Sequence[AdapterPair], adapter_T: Tensor) -> Tensor:
        """Adapter by adapter, added to y before the one rounding."""
        flat = [weight for pair in pairs if pair is not None for weight in pair]

        def paired(weights: Sequence[Tensor]) -> list[AdapterPair]:
            left = iter(weights)
            return [None if pair is None else (next(left), next(left)) for pair in pairs]

        def kernel(y_TN: Tensor, x_TK: Tensor, adapter_T: Tensor, *weights: Tensor) -> Tensor:
            return launch.lora(y_TN, x_TK, paired(weights), adapter_T)

        def judge(y_TN: Tensor, x_TK: Tensor, adapter_T: Tensor, *weights: Tensor) -> Tensor:
            return stock_groups.lora(y_TN, x_TK, paired(weights), adapter_T)

        return _run(kernel, judge, y_TN, x_TK, adapter_T.to(self.device), *flat)

    def rms_norm(self, x_TH: Tensor, w_H: Tensor, eps: float) -> Tensor:
        """x · (1 / sqrt(mean(x²) + eps)) · w."""
        return _run(
            lambda x, w: launch.rms_norm(x, w, eps), lambda x, w: self._stock.rms_norm(x, w, eps), x_TH, w_H
        )

    def silu_mul(self, x_T2F: Tensor) -> Tensor:
        """silu(gate) · up."""
        return _run(launch.silu_mul, self._stock.silu_mul, x_T2F)

    def layer_norm(self, x_TH: Tensor, w_H: Tensor, b_H: Tensor, eps: float) -> Tensor:
        """((x - mean) · (1 / sqrt(mean of squares + eps))) · w + b."""
        return _run(
            lambda x, w, b: launch.layer_norm(x, w, b, eps),
            lambda x, w, b: self._stock.layer_norm(x, w, b, eps),
            x_TH,
            w_H,
            b_H,
        )

    def gelu(self, x_TF: Tensor) -> Tensor:
        """x / (1 + exp(-2u)), u = sqrt(2/pi) (x + 0.044715 x³)."""
        return _run(launch.gelu, self._stock.gelu, x_TF)

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
        sizes = (heads, kv_heads, head_size)
        return _run(
            lambda qkv, q, k: launch.head_norm(qkv, q, k, sizes, eps),
            lambda qkv, q, k: self._stock.head_norm(qkv, q, k, *sizes, eps),
            qkv_TW,
            q_norm,
            k_norm,
        )

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
        batch, sizes = batch.on(self.device), (heads, kv_heads, head_size)
        wanted = torch.is_grad_enabled() and qkv_TW.requires_grad
        assert batch.caches is None or not wanted, (
            "gradients need the keys of whole sequences: a packed batch without caches"
        )
        if batch.caches is not None:
            cache = batch.caches[layer]
        else:
            if "triton pages" not in batch.prepared:
                batch.prepared["triton pages"] = self.new_cache(batch.private_pages, kv_heads, head_size)
            cache = batch.prepared["triton pages"]
        return _run(
            lambda qkv: launch.attention(qkv, batch, cache, sizes, rope, window),
            lambda qkv: self._stock.attention(qkv, batch, layer, *sizes, rope, window=window),
            qkv_TW,
        )

    def logprobs(self, logits_TV: Tensor, ids_T: Tensor) -> Tensor:
        """Log softmax picked at ids."""
        return _run(launch.logprobs, self._stock.logprobs, logits_TV.to(self.device), ids_T.to(self.device))

    def argmax(self, logits_TV: Tensor, count: int | None = None) -> Tensor:
        """Index of the first maximum of each row, -1 where the row is not finite."""
        return launch.argmax(logits_TV, logits_TV.shape[1] if count is None else count)

    def linear_logprobs(self, x_TH: Tensor, w_VH: Tensor | Quantized, ids_T: Tensor) -> Tensor:
        """Chunk by chunk with the bits of linear and logprobs."""
        ids_T = ids_T.to(self.device)
        with torch.no_grad():
            parts = [
                launch.logprobs(self.linear(x_TH[rows], w_VH, fp32=True), ids_T[rows])
                for rows in launch.chunks(x_TH.shape[0], w_VH.shape[0])
            ]
        return torch.cat(parts)

    def linear_cross_entropy(
        self, x_TH: Tensor, w_VH: Tensor, targets_T: Tensor, weights_T: Tensor | None = None
    ) -> Tensor:
        """The exact sum of the tokens' losses, rounded once; a token's loss has the bits of -logprob · weight."""
        weights_T = torch.ones(len(x_TH)) if weights_T is None else weights_T
        tensors = (x_TH, w_VH, targets_T.to(self.device), weights_T.to(self.device, FP32))
        return cast(Tensor, _CrossEntropy.apply(*tensors))  # type: ignore[no-untyped-call]

    def squared_norm(self, grad: Tensor) -> float:
        """Blocks of fixed size in double, then all of them."""
        parts = [block.double().square().sum() for block in torch.split(grad.detach().flatten(), 1 << 22)]
        return float(torch.stack(parts).sum()) if parts else 0.0


def rows_are_alone(device: torch.device) -> bool:
    """Whether a row's product has the same bits alone and in every kind of tile, tried on this device.

    The tiles for few and for many rows rely on the tensor cores adding in one order; another kind might not.
    """
    generator = torch.Generator().manual_seed(0)
    x_TK, w_NK = (
        torch.randn(rows, 192, generator=generator).to(device, BF16) for rows in (launch.FEW_ROWS + 44, 80)
    )
    many_TN = launch.linear(x_TK, w_NK, fp32=True)
    few_TN = torch.cat([launch.linear(x_TK[t : t + 1], w_NK, fp32=True) for t in (0, 17, 130)])
    return torch.equal(many_TN[[0, 17, 130]], few_TN) and torch.equal(
        many_TN[: launch.FEW_ROWS], launch.linear(x_TK[: launch.FEW_ROWS], w_NK, fp32=True)
    )


def _run(kernel: Callable[..., Tensor], judge: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """The kernel's result; where gradients are wanted, with those of the same op in plain torch."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return cast(Tensor, _ByStock.apply(kernel, judge, *tensors))  # type: ignore[no-untyped-call]
    return kernel(*tensors)


class _ByStock(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, kernel: Callable[..., Tensor], judge: Callable[..., Tensor], *tensors: Tensor
    ) -> Tensor:
        ctx.judge = judge
        ctx.save_for_backward(*tensors)
        return kernel(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[2:]
        inputs = [
            x.detach().requires_grad_() if want else x
            for x, want in zip(ctx.saved_tensors, wanted, strict=True)
        ]
        with torch.enable_grad():
            y = ctx.judge(*inputs)
        leaves = [x for x, want in zip(inputs, wanted, strict=True) if want]
        found = iter(torch.autograd.grad(y, leaves, grads[0].to(y.dtype)))
        return None, None, *(next(found) if want else None for want in wanted)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, residual: Tensor | None, bias: Tensor | None, fp32: bool
    ) -> Tensor:
        ctx.save_for_backward(x, w)
        return launch.linear(x, w, residual, fp32, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_TK, w_NK = ctx.saved_tensors
        g_TN, wanted = grads[0].to(BF16), ctx.needs_input_grad
        return (
            g_TN @ w_NK if wanted[0] else None,
            g_TN.T @ x_TK if wanted[1] else None,
            g_TN if wanted[2] else None,
            g_TN.float().sum(0).to(BF16) if wanted[3] else None,
            None,
        )


class _CrossEntropy(torch.autograd.Function):
    """The gradients of a chunk are made at once, while its logits are there (Hsu et al. 2024)."""

    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, w_VH: Tensor, targets_T: Tensor, weights_T: Tensor) -> Tensor:
        losses_T, dx_TH = torch.empty_like(weights_T), torch.zeros_like(x_TH)
        wanted = any(ctx.needs_input_grad[:2])
        dw_VH = torch.zeros(w_VH.shape if wanted else (0,), device=w_VH.device)
        for rows in launch.chunks(x_TH.shape[0], w_VH.shape[0]):
            logits_RV, targets_R = launch.linear(x_TH[rows], w_VH, fp32=True), targets_T[rows]
            losses_T[rows] = -launch.logprobs(logits_RV, targets_R) * weights_T[rows]
            if wanted:
                grad_RV = logits_RV.softmax(-1)
                known_R = (targets_R >= 0).float()
                grad_RV.scatter_add_(1, targets_R.clamp(min=0)[:, None], -torch.ones_like(known_R)[:, None])
                small_RV = grad_RV.mul_((known_R * weights_T[rows])[:, None]).to(BF16)
                dx_TH[rows] = small_RV @ w_VH
                dw_VH += small_RV.T @ x_TH[rows]
        ctx.save_for_backward(dx_TH, dw_VH.to(w_VH.dtype))
        return exact_sum(losses_T.cpu()).to(x_TH.device)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dx_TH, dw_VH = ctx.saved_tensors
        return dx_TH * grads[0].to(BF16), dw_VH * grads[0].to(BF16), None, None
