"""AdamW and Muon over flat buffers: bf16 weights and gradients that the model's parameters are views of.

All parameters of a model lie one after the other in one bf16 buffer, their gradients in a second one; the fp32
master weights and the moments lie beside them in the same order. Hidden matrices come first, then all others.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lapis.kernels.ops import Matrix, Ops
from lapis.model.config import ModelConfig
from lapis.model.families import Decoder

ALIGN = 32  # elements: every parameter starts on a 64-byte line of bf16

BETA1, BETA2, EPS = 0.8, 0.95, 1e-8
MATRIX_BETA1 = 0.9
MOMENTUM = 0.9  # Muon
# Coefficients of the quintic Newton-Schulz iteration, and how often it runs (Jordan et al. 2024, "Muon").
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


class FlatParameters:
    """Moves a model's parameters into flat buffers. `matrices` elements at the front are hidden matrices."""

    def __init__(self, model: Decoder) -> None:
        named = sorted(model.named_parameters(), key=lambda item: not is_hidden_matrix(*item))
        sizes = [-(-parameter.numel() // ALIGN) * ALIGN for _, parameter in named]
        total = sum(sizes)
        device = model.ops.device
        self.weight = torch.zeros(total, dtype=torch.bfloat16, device=device)
        self.grad = torch.zeros(total, dtype=torch.bfloat16, device=device)
        self.master = torch.zeros(total, device=device)
        self.blocks: list[Matrix] = []
        self.places: dict[str, tuple[int, torch.Size]] = {}  # where each parameter starts, and its shape
        self.matrices = 0
        start = 0
        for (name, parameter), size in zip(named, sizes, strict=True):
            end = start + parameter.numel()
            self.master[start:end] = parameter.detach().flatten()
            self.weight[start:end] = parameter.detach().flatten()
            self.places[name] = start, parameter.shape
            parameter.data = self.weight[start:end].view(parameter.shape)
            parameter.grad = self.grad[start:end].view(parameter.shape)
            if is_hidden_matrix(name, parameter):
                self.blocks += _blocks(name, start, parameter, model.config)
                self.matrices = start + size
            start += size

    def views(self, buffer: Tensor) -> dict[str, Tensor]:
        """A buffer beside the weights, as one view per parameter. A shorter one has no hidden matrices."""
        cut = len(self.weight) - len(buffer)
        return {
            name: buffer[start - cut : start - cut + shape.numel()].view(shape)
            for name, (start, shape) in self.places.items()
            if start >= cut
        }


class Optimizer:
    """One step over flat buffers: Muon or AdamW for the hidden matrices, AdamW for embeddings, head and norms."""

    def __init__(
        self, flat: FlatParameters, ops: Ops, *, muon: bool, clip: float, weight_decay: float
    ) -> None:
        self.flat, self.ops, self.muon = flat, ops, muon
        self.clip, self.weight_decay = clip, weight_decay
        self.steps = 0
        self.first = torch.zeros_like(flat.master)
        self.second = torch.zeros_like(flat.master[flat.matrices if muon else 0 :])

    def step(self, *, lr: float, embed_lr: float) -> float:
        """Clip, update, zero the gradients. Returns the gradient's norm; a non-finite one changes nothing."""
        norm = math.sqrt(self.ops.squared_norm(self.flat.grad))
        if not math.isfinite(norm):
            return norm
        self.steps += 1
        scale = min(1.0, self.clip / (norm + 1e-6))
        cut = self.flat.matrices
        if self.muon:
            self._muon(lr)  # its update has no scale, so it needs no clipping
        else:
            self._adamw(slice(0, cut), self.second[:cut], lr, MATRIX_BETA1, self.weight_decay, scale)
        self._adamw(
            slice(cut, None), self.second[-(len(self.flat.master) - cut) :], embed_lr, BETA1, 0.0, scale
        )
        self.ops.weights_changed()
        return norm

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps beside the bf16 weights, by parameter: `master.layers.0.qkv`, `first.…`, `second.…`.

        The tensors are views: what is written into them is the optimizer's state.
        """
        buffers = {"master": self.flat.master, "first": self.first, "second": self.second}
        return {
            f"{kind}.{name}": view
            for kind, buffer in buffers.items()
            for name, view in self.flat.views(buffer).items()
        }

    def load(self, state: dict[str, Tensor], steps: int) -> None:
        """Continue from a checkpoint's state; the bf16 weights follow from the master weights."""
        for name, view in self.state().items():
            view.copy_(state[name])
        self.flat.weight.copy_(self.flat.master)
        self.flat.grad.zero_()
        self.steps = steps
        self.ops.weights_changed()

    def _adamw(
        self, part: slice, second: Tensor, lr: float, beta1: float, weight_decay: float, scale: float
    ) -> None:
        flat = self.flat
        self.ops.adamw(
            flat.weight[part],
            flat.grad[part],
            flat.master[part],
            self.first[part],
            second,
            lr=lr,
            beta1=beta1,
            beta2=BETA2,
            eps=EPS,
            weight_decay=weight_decay,
            correction1=1 - beta1**self.steps,
            correction2=1 - BETA2**self.steps,
            clip=scale,
        )

    def _muon(self, lr: float) -> None:
        flat = self.flat
        self.ops.muon(
            flat.weight,
            flat.grad,
            flat.master,
            self.first,
            flat.blocks,
            lr=lr,
            beta=MOMENTUM,
            weight_decay=self.weight_decay,
            coefficients=NEWTON_SCHULZ,
            iterations=ITERATIONS,
        )


def is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    """Whether a parameter is one of the linear maps of the layers, or one of every expert."""
    return parameter.ndim >= 2 and name.startswith("layers.")


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
