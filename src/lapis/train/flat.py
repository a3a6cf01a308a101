"""A model's parameters in flat buffers: weights and gradients that they are views of, and fp32 master weights.

The order is hidden matrices, then the other matrices (embeddings, positions, head), then vectors (norms and biases).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lapis.kernels.gradient import keep_gradient
from lapis.kernels.ops import Matrix
from lapis.model.config import ModelConfig
from lapis.model.families import Decoder

ALIGN = 32  # elements: every parameter starts on a 64-byte line of bf16
HIDDEN, TABLE, VECTOR = 0, 1, 2  # what kinds of parameters there are, in the order of the buffers


class Place(NamedTuple):
    """Where a parameter lies in a flat buffer."""

    start: int
    shape: torch.Size

    def of(self, flat: Tensor) -> Tensor:
        """The parameter's part of a flat buffer."""
        return flat[self.start : self.start + self.shape.numel()].view(self.shape)


class FlatParameters:
    """Moves the parameters that want a gradient into flat buffers of the model's type.

    `matrices` elements at the front are hidden matrices, `decayed` those and the other matrices. In fp32 the master
    weights are the weights themselves.
    """

    def __init__(self, model: Decoder) -> None:
        self.packed = model.lora is None  # ops keep packed copies of a model's own weights, not of adapters
        named = [item for item in model.named_parameters() if item[1].requires_grad]
        named.sort(key=lambda item: kind_of(*item))
        sizes = [-(-parameter.numel() // ALIGN) * ALIGN for _, parameter in named]
        total = sum(sizes)
        device, dtype = model.ops.device, model.dtype
        self.weight = torch.zeros(total, dtype=dtype, device=device)
        self.grad = torch.zeros(total, dtype=dtype, device=device)
        self.master = self.weight if dtype is torch.float32 else torch.zeros(total, device=device)
        self.places: dict[str, Place] = {}
        self.blocks: list[Matrix] = []
        self.matrices = self.decayed = 0
        self._sum: Tensor | None = None
        self._aside = False  # whether there is something in it
        start = 0
        for (name, parameter), size in zip(named, sizes, strict=True):
            place = self.places[name] = Place(start, parameter.shape)
            for buffer in (self.master, self.weight):
                place.of(buffer).copy_(parameter.detach())
            parameter.data = place.of(self.weight)
            keep_gradient(parameter, place.of(self.grad))
            kind = kind_of(name, parameter)
            if kind == HIDDEN:
                self.blocks += _blocks(name, start, parameter, model.config)
                self.matrices = start + size
            if kind != VECTOR:
                self.decayed = start + size
            start += size

    def views(self, flat: Tensor, first: int = 0) -> dict[str, Tensor]:
        """A flat buffer's parts by parameter; the buffer begins at the element `first` of all."""
        return {
            name: Place(place.start - first, place.shape).of(flat)
            for name, place in self.places.items()
            if place.start >= first
        }

    def set_aside(self) -> None:
        """Add the gradient to an fp32 sum and zero it, so that micro-batches add up without rounding to bf16."""
        if self.grad.dtype is torch.float32:
            return
        if self._sum is None:
            self._sum = torch.zeros(len(self.grad), device=self.grad.device)
        self._sum += self.grad
        self._aside = True
        self.grad.zero_()

    def gather(self) -> None:
        """Add what was set aside to the gradient, rounded once."""
        if self._sum is not None and self._aside:
            self.grad.copy_(self._sum.add_(self.grad))
            self._sum.zero_()
            self._aside = False


def kind_of(name: str, parameter: Tensor) -> int:
    """A linear map of the layers (or one of every expert), another matrix, or a vector."""
    if parameter.ndim < 2:
        return VECTOR
    return HIDDEN if name.startswith("layers.") else TABLE


def _blocks(name: str, start: int, parameter: Tensor, config: ModelConfig) -> list[Matrix]:
    """The matrices inside one weight: joined query, key and value or gate and up are orthogonalised one by one."""
    rows, columns = parameter.shape[-2:]
    query, key = config.heads * config.head_size, config.kv_heads * config.head_size
    joined = {"qkv": (query, key, key), "gate_up": (rows // 2,) * 2, "experts_gate_up": (rows // 2,) * 2}
    blocks = []
    for part in joined.get(name.rsplit(".", 1)[-1], (rows,)) * (parameter.numel() // (rows * columns)):
        blocks.append(Matrix(start, part, columns))
        start += part * columns
    return blocks
