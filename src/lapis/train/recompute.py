"""Activation checkpointing (Chen et al. 2016): layers keep their input alone and are computed again later."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lapis.kernels.batch import Batch
from lapis.kernels.ops import Ops, Rope
from lapis.model.families import Decoder

Recompute = Literal["none", "selective", "full"]
EVERY = {"selective": 2, "full": 1}


def recompute_layers(model: Decoder, kind: Recompute) -> None:
    """Compute every layer ("full") or every second one ("selective") again in the backward pass.

    The gradients are the same bits: the ops give the same forward, and no random number is drawn.
    """
    if kind == "none":
        return
    for layer in list(model.layers)[:: EVERY[kind]]:
        layer.forward = _again(layer.forward)


Forward = Callable[[Ops, Tensor, Batch, Rope | None], Tensor]


def _again(forward: Forward) -> Forward:
    def run(ops: Ops, x_TH: Tensor, batch: Batch, rope: Rope | None) -> Tensor:
        kept: Tensor = checkpoint(
            forward, ops, x_TH, batch, rope, use_reentrant=False, preserve_rng_state=False
        )
        return kept

    return run
