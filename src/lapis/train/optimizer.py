"""AdamW and Muon over flat buffers, each one compiled pass where the kernels have it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lapis.kernels.ops import Ops
from lapis.train.flat import FlatParameters

EPS = 1e-8
MOMENTUM = 0.9  # Muon
# Coefficients of the quintic Newton-Schulz iteration, and how often it runs (Jordan et al. 2024, "Muon").
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
CLIP_EPS = 1e-6


class Optimizer:
    """Muon or AdamW for the hidden matrices, AdamW for all else. Matrices decay, embeddings too; vectors never do."""

    def __init__(
        self,
        flat: FlatParameters,
        ops: Ops,
        *,
        muon: bool,
        clip: float,
        weight_decay: float,
        betas: tuple[float, float],
    ) -> None:
        self.flat, self.ops, self.muon = flat, ops, muon
        self.clip, self.weight_decay, self.betas = clip, weight_decay, betas
        self.steps = 0
        self.first = torch.zeros_like(flat.master)
        self.unsquared = flat.matrices if muon else 0  # Muon has no second moment
        self.second = torch.zeros_like(flat.master[self.unsquared :])

    def norm(self) -> float:
        """The gradient's norm; not finite if one of its elements is not."""
        return math.sqrt(self.ops.squared_norm(self.flat.grad))

    def step(self, *, norm: float, lr: float, embed_lr: float) -> None:
        """Clip the gradient of that norm, update all weights, zero the gradient."""
        assert math.isfinite(norm), "whoever steps has looked at the norm"
        self.steps += 1
        scale = min(1.0, self.clip / (norm + CLIP_EPS))
        hidden, decayed, flat = self.flat.matrices, self.flat.decayed, self.flat
        if self.muon:
            self._muon(lr)  # its update has no scale, so it needs no clipping
        else:
            self._adamw(slice(0, hidden), lr, self.weight_decay, scale)
        self._adamw(slice(hidden, decayed), embed_lr, self.weight_decay, scale)
        self._adamw(slice(decayed, len(flat.master)), embed_lr, 0.0, scale)
        if self.flat.packed:
            self.ops.weights_changed()

    def drop(self) -> None:
        """Forget the gradient."""
        self.flat.grad.zero_()

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps beside the weights, by kind and parameter."""
        kinds = {"master": (self.flat.master, 0), "first": (self.first, 0)}
        kinds["second"] = (self.second, self.unsquared)
        return {
            f"{kind}.{name}": view
            for kind, (flat, first) in kinds.items()
            for name, view in self.flat.views(flat, first).items()
        }

    def resumed(self, steps: int) -> None:
        """Continue from what was read into `state`; the weights follow from the master weights."""
        self.flat.weight.copy_(self.flat.master)
        self.flat.grad.zero_()
        self.steps = steps
        if self.flat.packed:
            self.ops.weights_changed()

    def _adamw(self, part: slice, lr: float, weight_decay: float, scale: float) -> None:
        if part.start == part.stop:
            return
        flat, (beta1, beta2) = self.flat, self.betas
        self.ops.adamw(
            flat.weight[part],
            flat.grad[part],
            flat.master[part],
            self.first[part],
            self.second[part.start - self.unsquared : part.stop - self.unsquared],
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            eps=EPS,
            weight_decay=weight_decay,
            correction1=1 - beta1**self.steps,
            correction2=1 - beta2**self.steps,
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
