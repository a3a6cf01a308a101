"""Where the gradient of a weight goes: back to autograd, or at once into a buffer that a trainer keeps."""

from __future__ import annotations

import torch
from torch import Tensor

MARK = "_lapis_gradient_in_place"


def keep_gradient(weight: Tensor, buffer: Tensor) -> None:
    """Make `buffer` the weight's gradient, to which ops add in place from now on."""
    assert buffer.shape == weight.shape and buffer.is_contiguous()
    weight.grad = buffer
    setattr(weight, MARK, True)


def gradient_buffer(weight: Tensor) -> tuple[Tensor, Tensor | None]:
    """Where a weight's gradient is added: its kept buffer, or zeros that are returned to autograd."""
    if getattr(weight, MARK, False) and weight.grad is not None:
        return weight.grad, None
    zeros = torch.zeros_like(weight)
    return zeros, zeros
