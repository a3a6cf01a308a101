"""The optimizers' steps in torch calls, on any device, for ops that keep nothing beside the weights."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lapis.kernels.ops import Matrix


class TorchSteps:
    """What the ops of plain torch and those in Triton share."""

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
        """The AdamW step in torch calls over the flat buffers."""
        with torch.no_grad():
            scaled = grad.float().mul_(clip)
            first.lerp_(scaled, 1 - beta1)
            second.mul_(beta2).addcmul_(scaled, scaled, value=1 - beta2)
            denominator = second.sqrt().div_(math.sqrt(correction2)).add_(eps)
            master.mul_(1 - lr * weight_decay).addcdiv_(first, denominator, value=-lr / correction1)
            weight.copy_(master)
            grad.zero_()

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
        """The Muon step in torch calls, matrix by matrix."""
        for at in matrices:
            buffers = (weight, grad, master, momentum)
            muon_step(buffers, at, lr, beta, weight_decay, coefficients, iterations)

    def sealed(self, w_NK: Tensor) -> Tensor:
        """The weight itself: nothing is packed."""
        return w_NK

    def weights_changed(self) -> None:
        """Nothing is kept beside the weights."""


def muon_step(
    buffers: tuple[Tensor, ...],
    at: Matrix,
    lr: float,
    beta: float,
    weight_decay: float,
    coefficients: tuple[float, float, float],
    iterations: int,
) -> None:
    """One Muon step of one matrix of the flat weight, gradient, master weight and momentum, in the weight's type."""
    with torch.no_grad():
        weight, grad, master, momentum = (at.of(buffer) for buffer in buffers)
        update = grad.float()
        momentum.lerp_(update, 1 - beta)
        step = orthogonal(update.lerp_(momentum, beta).to(weight.dtype), coefficients, iterations).float()
        master.mul_(1 - lr * weight_decay).add_(step, alpha=-lr * max(1.0, at.rows / at.columns) ** 0.5)
        weight.copy_(master)
        grad.zero_()


def orthogonal(matrix_RC: Tensor, coefficients: tuple[float, float, float], iterations: int) -> Tensor:
    """The nearest half-orthogonal matrix, roughly, by Newton-Schulz iterations in the matrix's own type."""
    a, b, c = coefficients
    tall = matrix_RC.shape[0] > matrix_RC.shape[1]
    x: Tensor = matrix_RC.mT if tall else matrix_RC
    x = x / (x.float().norm() + 1e-7).to(x.dtype)
    for _ in range(iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x
