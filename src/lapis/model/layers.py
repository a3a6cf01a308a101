"""What the layers of every family share: weights, low-rank adapters, feed-forward parts.

Dims: T tokens of a batch, H width, K and N inputs and outputs of a linear map, F ffn.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lapis.kernels.batch import Batch
from lapis.kernels.ops import Ops


def weight(dtype: torch.dtype, *shape: int) -> nn.Parameter:
    """A parameter whose values are not set yet."""
    return nn.Parameter(torch.empty(*shape, dtype=dtype))


def optional(present: bool, dtype: torch.dtype, *shape: int) -> nn.Parameter | None:
    """A parameter that only some models of a family have."""
    return weight(dtype, *shape) if present else None


def adapted(ops: Ops, name: str, y_TN: Tensor, x_TK: Tensor, batch: Batch, layer: int) -> Tensor:
    """The result of a linear map with the low-rank adapters that the batch's tokens ask for."""
    if batch.adapters is None:
        return y_TN
    pairs = batch.adapters[layer].get(name)
    if not pairs:
        return y_TN
    assert batch.adapter_T is not None, "a batch with adapters says which token has which"
    return ops.lora(y_TN, x_TK, pairs, batch.adapter_T)
