"""What the layers of every family share: their weights."""

from __future__ import annotations

import torch
from torch import nn


def weight(dtype: torch.dtype, *shape: int) -> nn.Parameter:
    """A parameter whose values are not set yet."""
    return nn.Parameter(torch.empty(*shape, dtype=dtype))


def optional(present: bool, dtype: torch.dtype, *shape: int) -> nn.Parameter | None:
    """A parameter that only some models of a family have."""
    return weight(dtype, *shape) if present else None
