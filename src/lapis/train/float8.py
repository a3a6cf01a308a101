"""Linear maps in 8-bit floats, for GPUs whose tensor cores have them (Micikevicius et al. 2022).

Rows and weights are e4m3, gradients e5m2, each tensor divided by one scale that is computed when it is needed. Sums and
results are as before; so are weights, activations between the maps, and all that has no gradient.

Dims: T tokens, K and N input and output width; M, N, K of any product.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from lapis.errors import UnavailableError
from lapis.kernels.ops import Ops
from lapis.kernels.quantized import Quantized
from lapis.train.ops_around import OpsAround

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
CAPABILITY = (8, 9)  # Ada; Hopper and Blackwell come after
STEP = 16  # the sides of a product are multiples of it
SMALLEST = 256  # outputs of a map that is worth it; routers stay exact


def require_float8(device: torch.device) -> None:
    """Raise UnavailableError where no tensor core multiplies 8-bit floats."""
    has = "there is none here"
    if device.type == "cuda":
        found = torch.cuda.get_device_capability(device)
        if found >= CAPABILITY:
            return
        has = f"{torch.cuda.get_device_name(device)} has {found[0]}.{found[1]}"
    raise UnavailableError(
        f"train.fp8 needs a GPU of compute capability 8.9 or more (Ada, Hopper, Blackwell): {has}.",
        hint="Train in bf16: --set train.fp8=false",
    )


def around(ops: Ops) -> Ops:
    """The ops with linear maps in 8-bit floats. Raises UnavailableError where the hardware has none."""
    require_float8(ops.device)
    return cast(Ops, Float8Ops(ops))


class Float8Ops(OpsAround):
    """The large linear maps in 8-bit floats where gradients are wanted; all else is the inner ops' own."""

    bit_exact = False  # what is served is bf16

    @property
    def name(self) -> str:
        """The inner kernels', marked."""
        return f"{self.inner.name} fp8"

    def linear(
        self,
        x_TK: Tensor,
        w_NK: Tensor | Quantized,
        residual_TN: Tensor | None = None,
        *,
        bias_N: Tensor | None = None,
        fp32: bool = False,
    ) -> Tensor:
        """x Wᵀ (+ bias) (+ residual); the product is rounded before they are added."""
        if fp32 or isinstance(w_NK, Quantized) or not torch.is_grad_enabled() or not _fits(w_NK):
            return self.inner.linear(x_TK, w_NK, residual_TN, bias_N=bias_N, fp32=fp32)
        y_TN = cast(Tensor, _Float8Linear.apply(x_TK, w_NK))  # type: ignore[no-untyped-call]
        for added in (bias_N, residual_TN):
            y_TN = y_TN if added is None else y_TN + added
        return y_TN


class Scaled(NamedTuple):
    """A matrix in 8 bits, to be multiplied by its scale."""

    values: Tensor
    scale: Tensor  # fp32, one number

    @property
    def turned(self) -> Scaled:
        """The transposed matrix, row after row again."""
        return Scaled(self.values.t().contiguous(), self.scale)


def scaled(x: Tensor, dtype: torch.dtype) -> Scaled:
    """A matrix in 8 bits; its largest element becomes the type's largest."""
    most = torch.finfo(dtype).max
    scale = (x.abs().amax().float() / most).clamp(min=torch.finfo(torch.float32).tiny)
    return Scaled((x.float() / scale).clamp(-most, most).to(dtype).contiguous(), scale)


def product(a: Scaled, b: Scaled, out: torch.dtype, *, fast: bool = False) -> Tensor:
    """a (M, K) times bᵀ of b (N, K); `fast` sums with fewer bits on GPUs that can."""
    whole = F.ScalingType.TensorWise
    return F.scaled_mm(
        a.values, b.values.t(), a.scale, whole, b.scale, whole, output_dtype=out, use_fast_accum=fast
    )


class _Float8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TK: Tensor, w_NK: Tensor) -> Tensor:
        x = scaled(x_TK, E4M3)
        ctx.save_for_backward(*x, w_NK)  # the weight itself, which FSDP gathers again
        return product(x, scaled(w_NK, E4M3), x_TK.dtype, fast=True)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x8_TK, scale, w_NK = ctx.saved_tensors
        g, wanted = scaled(grads[0], E5M2), ctx.needs_input_grad
        dx_TK = product(g, scaled(w_NK, E4M3).turned, w_NK.dtype) if wanted[0] else None
        dw_NK = None
        if wanted[1]:  # a sum over T
            g8, x8 = (
                F.pad(m.view(torch.uint8), (0, 0, 0, -len(m) % STEP)).view(m.dtype) for m in (g.values, x8_TK)
            )
            dw_NK = product(Scaled(g8, g.scale).turned, Scaled(x8, scale).turned, w_NK.dtype)
        return dx_TK, dw_NK


def _fits(w_NK: Tensor) -> bool:
    return w_NK.shape[0] >= SMALLEST and not any(size % STEP for size in w_NK.shape)
