"""The few operations a model is made of, as a Protocol with two makers: compiled C and plain torch.

Dims: T tokens, K and N input and output width, H width of the residual stream, F width of the feed-forward
layer, V vocabulary, W joined width of query, key and value heads, P positions, D2 half a head.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lapis.clibrary import REBUILD
from lapis.kernels import variants
from lapis.kernels.batch import AdapterPair, Batch, LayerCache
from lapis.kernels.quantized import Quantized
from lapis.kernels.rope import RopeScaling, frequencies
from lapis.kernels.variants import KernelStatus, status

__all__ = ["KernelStatus", "Matrix", "Ops", "Rope", "select", "status"]

logger = logging.getLogger("lapis")

CPU = torch.device("cpu")
ROPE_BLOCK = 4096  # rotary rows computed at a time


@dataclass(eq=False)
class Rope:
    """Tables of the rotary position embedding (Su et al. 2021), rotate-half form, fp32.

    The first `filled` rows are computed; `reach` computes more of them, where they lie.
    """

    cos_PD2: Tensor
    sin_PD2: Tensor
    frequency_D2: Tensor  # fp64
    attention: float  # multiplies sines and cosines (YaRN)
    filled: int = 0

    @staticmethod
    def make(
        head_size: int,
        base: float,
        positions: int,
        scaling: RopeScaling | None = None,
        filled: int | None = None,
        device: torch.device = CPU,
    ) -> Rope:
        """Tables for so many positions, all or the first `filled` computed: in fp64, then one rounding to fp32.

        Rows that are not computed take no memory yet.
        """
        frequency_D2 = torch.tensor(frequencies(head_size, base, scaling), dtype=torch.float64, device=CPU)
        cos_PD2, sin_PD2 = (torch.empty(positions, head_size // 2, device=device) for _ in range(2))
        rope = Rope(cos_PD2, sin_PD2, frequency_D2, scaling.attention if scaling else 1.0)
        rope.reach(positions if filled is None else filled)
        return rope

    def reach(self, positions: int) -> None:
        """Compute the rows of all positions below this number."""
        for start in range(self.filled, min(positions, len(self.cos_PD2)), ROPE_BLOCK):
            end = min(start + ROPE_BLOCK, len(self.cos_PD2))
            angle_PD2 = torch.arange(start, end, dtype=torch.float64)[:, None] * self.frequency_D2
            self.cos_PD2[start:end] = angle_PD2.cos() * self.attention
            self.sin_PD2[start:end] = angle_PD2.sin() * self.attention
            self.filled = end


class Matrix(NamedTuple):
    """Where one matrix lies inside flat buffers, row after row."""

    start: int
    rows: int
    columns: int

    def of(self, flat: Tensor) -> Tensor:
        """The matrix as a view of a flat buffer."""
        return flat[self.start : self.start + self.rows * self.columns].view(self.rows, self.columns)


class Ops(Protocol):
    """All ops are differentiable in grad mode and give the same forward bits as without it.

    The gradient of a weight is added in place to a buffer that a trainer keeps (`gradient.keep_gradient`);
    otherwise it is returned to autograd as usual.
    """

    @property
    def name(self) -> str:
        """Which kernels these are, such as "cpu-avx512bf16" or "stock"."""

    @property
    def bit_exact(self) -> bool:
        """Whether a row's bits depend on the row alone: training equals serving, in any batch."""

    @property
    def reason(self) -> str:
        """Why these kernels and not faster ones; empty when there is nothing to say."""

    @property
    def device(self) -> torch.device:
        """Where weights, activations and pages lie."""

    def new_cache(self, pages: int, kv_heads: int, head_size: int, *, int8: bool = False) -> LayerCache:
        """Empty pages for the keys and values of one layer, in bf16 or in int8 with a scale per token and head."""

    def embedding(self, ids_T: Tensor, w_VH: Tensor, add: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Rows of the table, `add`ed to those of a second one at int32 places (T,), with one rounding.

        The gradient of a table sums equal ids in fp32, in the order of T.
        """

    def linear(
        self,
        x_TK: Tensor,
        w_NK: Tensor | Quantized,
        residual_TN: Tensor | None = None,
        *,
        bias_N: Tensor | None = None,
        fp32: bool = False,
    ) -> Tensor:
        """x Wᵀ (+ bias) (+ residual), rounded once; `fp32` keeps the unrounded sums (logits).

        A quantised weight (`quantized.quantize`) has no gradient, nor do the inputs of its product.
        """

    def route(self, logits_TE: Tensor, top: int, normalise: bool) -> tuple[Tensor, Tensor]:
        """Softmax over E experts: int32 the `top` likeliest, best first, and their fp32 probabilities, both (T, top).

        The smaller index comes first among equals; `normalise` divides by the sum of the chosen.
        """

    def experts(
        self,
        x_TH: Tensor,
        expert_TA: Tensor,
        weight_TA: Tensor,
        gate_up_ENH: Tensor | Quantized,
        down_EHF: Tensor | Quantized,
        residual_TH: Tensor,
    ) -> Tensor:
        """Residual + the weighted sum of what each token's A experts, SwiGLU layers all, make of it (Shazeer 2017).

        A token has an expert at most once. gate_up is (E, 2F, H), gate first; rounded once. Quantised stacks, both
        or none, have no gradient.
        """

    def lora(self, y_TN: Tensor, x_TK: Tensor, pairs: Sequence[AdapterPair], adapter_T: Tensor) -> Tensor:
        """y + (x Aᵀ) Bᵀ with the pair that adapter_T (int32) names for each row (Hu et al. 2021).

        A is (R, K), B (N, R), R even; a scale belongs into B. A row of adapter -1 or of a pair that is None
        stays as it is.
        """

    def rms_norm(self, x_TH: Tensor, w_H: Tensor, eps: float) -> Tensor:
        """x / sqrt(mean(x²) + eps) · w (Zhang & Sennrich 2019)."""

    def silu_mul(self, x_T2F: Tensor) -> Tensor:
        """silu(gate) · up of rows that hold gate and up side by side (SwiGLU, Shazeer 2020)."""

    def layer_norm(self, x_TH: Tensor, w_H: Tensor, b_H: Tensor, eps: float) -> Tensor:
        """(x - mean) / sqrt(variance + eps) · w + b (Ba et al. 2016)."""

    def gelu(self, x_TF: Tensor) -> Tensor:
        """x (1 + tanh(sqrt(2/pi) (x + 0.044715 x³))) / 2: the tanh form of GELU (Hendrycks & Gimpel 2016)."""

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
        """rms_norm of queries and keys, values untouched: (T, W).

        A weight of head_size elements norms every head alone (Qwen3), one of heads·head_size (for keys
        kv_heads·head_size) the whole part (OLMoE).
        """

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
        """Rotates, writes keys and values to their pages, attends causally: (T, heads·head_size).

        Without `rope` nothing is rotated (GPT-2); a query sees `window` keys, its own the last, or all.
        """

    def logprobs(self, logits_TV: Tensor, ids_T: Tensor) -> Tensor:
        """Log softmax of fp32 logits picked at ids: fp32 (T,)."""

    def argmax(self, logits_TV: Tensor, count: int | None = None) -> Tensor:
        """Index of the first maximum of each row (of its first `count` columns): int64 (T,).

        -1 where the row holds a NaN or its maximum is not finite.
        """

    def linear_logprobs(self, x_TH: Tensor, w_VH: Tensor | Quantized, ids_T: Tensor) -> Tensor:
        """logprobs(linear(x, w, fp32), ids), logits never whole, no gradient; 0 where the id is -1."""

    def linear_cross_entropy(
        self, x_TH: Tensor, w_VH: Tensor, targets_T: Tensor, weights_T: Tensor | None = None
    ) -> Tensor:
        """Sum of -logprob · weight over tokens, fp32 scalar, logits never whole; target -1 is left out."""

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
        """One AdamW step (Loshchilov & Hutter 2019) over flat buffers, in place; zeroes the gradient.

        weight and grad are bf16, master and both moments fp32; correction = 1 - beta^step; the gradient is
        multiplied by `clip` first. Call `weights_changed` when all buffers are done.
        """

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
        """One Muon step (Jordan et al. 2024) of matrices in flat buffers, in place; zeroes their gradients.

        Nesterov momentum, made nearly orthogonal by X <- aX + (bXXᵀ + c(XXᵀ)²)X in bf16, times
        lr · sqrt(max(1, rows / columns)). weight and grad are bf16, master and momentum fp32. Call
        `weights_changed` when all buffers are done.
        """

    def squared_norm(self, grad: Tensor) -> float:
        """Sum of squares of a flat bf16 buffer, in an order that does not depend on the number of threads."""

    def sealed(self, w_NK: Tensor) -> Tensor:
        """What `linear` takes instead of a weight that will never change, so that the weight itself can go."""

    def weights_changed(self) -> None:
        """Says that weights changed behind autograd's back (adamw, a flat buffer): packed copies are renewed."""


def select(head_size: int, *, widths: Sequence[int] = (), dtype: torch.dtype = torch.bfloat16) -> Ops:
    """The best ops for this machine and shape; `widths` are the model's row widths (residual, feed-forward).

    Triton's on a GPU, else those of the CPU. LAPIS_KERNELS names a CPU variant, "triton" or "stock". Raises
    ConfigError for an unknown name and UnavailableError for kernels that are not built, cannot run here or do not
    fit the shape.
    """
    from lapis.kernels import stock

    if variants.wants_triton(head_size, str(dtype).removeprefix("torch."), torch.cuda.is_available):
        from lapis.kernels import triton

        return triton.load()
    variant, reason = variants.choose(head_size, widths, str(dtype).removeprefix("torch."))
    if variant is None:
        hint = variants.status().hint
        rebuild = f". To build them: {hint}" if REBUILD in hint else ""
        text = "kernels: plain torch, since %s; results depend on batch and chunk sizes%s"
        logger.warning(text, reason, rebuild)
        return stock.StockOps(reason, dtype)
    from lapis.kernels import cpu

    return cpu.load(variant, dtype)
