"""Where the gradient of a weight goes: back to autograd, or at once into a buffer that a trainer keeps.

And what is kept for a gradient: a result that is cheap to make again is not.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

MARK = "_lapis_gradient_in_place"
SOURCE = "_lapis_made_from"
Remake = Callable[[Tensor], Tensor]


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


def cheap(y: Tensor, remake: Remake, x: Tensor) -> Tensor:
    """Note on y = remake(x) that whoever needs it for a gradient may keep x alone, which is kept anyway."""
    setattr(y, SOURCE, (remake, x))
    return y


def kept(y: Tensor) -> tuple[Tensor, Remake | None]:
    """What to keep of y for a gradient, and what makes y of that again, if it is something else."""
    remake, x = getattr(y, SOURCE, (None, y))
    return x, remake
