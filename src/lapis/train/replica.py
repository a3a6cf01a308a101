"""What takes a step: a model with its gradients and its optimizer, in this process or spread over many."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from lapis.checkpoint.piece import Sharded
from lapis.data.loader import TokenBatch
from lapis.model.families import Decoder
from lapis.train.average import Average
from lapis.train.bad_step import Numbers
from lapis.train.flat import FlatParameters
from lapis.train.objective import Figures, of_model
from lapis.train.optimizer import Optimizer
from lapis.train.recipe import TrainSection
from lapis.train.recompute import recompute_layers

Groups = Mapping[str, Mapping[str, Tensor | Sharded[Tensor]]]


class Replica(Protocol):
    """One copy of the weights in training, whole or in parts. A step is backward …, finish, update."""

    @property
    def model(self) -> Decoder:
        """The model; its weights may be parts of the whole."""

    @property
    def updates(self) -> int:
        """Updates done: steps that were skipped do not count."""

    @property
    def share(self) -> tuple[int, int]:
        """Which share of the samples this process works on, and how many there are."""

    def backward(self, loss: Callable[[Decoder, TokenBatch], Tensor], micros: Sequence[TokenBatch]) -> float:
        """Add the gradients of a step's micro-batches; this process's part of their loss."""

    def finish(self, loss: float) -> Numbers:
        """Complete the gradients of a step, of which `loss` is this process's part.

        Loss and gradient norm of the whole step, the same on all ranks; not finite if anything anywhere is not.
        """

    def update(self, norm: float, *, lr: float, embed_lr: float) -> None:
        """Move the weights along the finished gradients, clipped by their finite norm, and forget these."""

    def drop_gradients(self) -> None:
        """Forget the gradients without a step."""

    def measure(self, figures: Figures, micros: Sequence[TokenBatch]) -> list[float]:
        """Sums of what the model finds in micro-batches, without a gradient; on all ranks together (see `Measure`)."""

    def whole(self) -> Decoder | None:
        """The whole model as it is now, to be read, on the first rank alone; all ranks ask together."""

    def finite(self) -> bool:
        """Whether all weights are, on all ranks, which ask together; a pass over the weights, so not for every step."""

    def groups(self) -> Groups:
        """What a checkpoint keeps of it: the groups model and optimizer, and ema if an average is kept."""

    def resumed(self, updates: int) -> None:
        """Continue after so many updates, when a checkpoint was read into `groups`."""


class Alone:
    """A whole model in one process: flat buffers and compiled optimizers."""

    def __init__(self, model: Decoder, section: TrainSection) -> None:
        self.model = model
        self.flat = FlatParameters(model)
        self.optimizer = Optimizer(
            self.flat,
            model.ops,
            muon=section.optimizer == "muon",
            clip=section.clip,
            weight_decay=section.weight_decay,
            betas=section.betas,
        )
        self.average = None if section.ema is None else Average(self.flat, section.ema)
        self._waiting = False  # whether there is a gradient that the next micro-batch must not round away
        recompute_layers(model, section.recompute)

    @property
    def updates(self) -> int:
        """Updates done."""
        return self.optimizer.steps

    @property
    def share(self) -> tuple[int, int]:
        """All samples are this process's."""
        return 0, 1

    def backward(self, loss: Callable[[Decoder, TokenBatch], Tensor], micros: Sequence[TokenBatch]) -> float:
        """Add the gradients of micro-batches, one after the other."""
        values = []
        for micro in micros:
            if self._waiting:
                self.flat.set_aside()
            self._waiting = True
            value = loss(self.model, micro)
            torch.autograd.backward(value)
            values.append(value.detach())
        return math.fsum(value.item() for value in values)

    def gathered(self) -> Tensor:
        """Add up the micro-batches' gradients: one flat tensor, which may be changed before `finish`."""
        self.flat.gather()
        self._waiting = False
        return self.flat.grad

    def finish(self, loss: float) -> Numbers:
        """Add up the micro-batches' gradients; the loss as it is, and their norm."""
        self.gathered()
        return Numbers(loss, self.optimizer.norm())

    def update(self, norm: float, *, lr: float, embed_lr: float) -> None:
        """One step of the optimizer, and of the average."""
        self.optimizer.step(norm=norm, lr=lr, embed_lr=embed_lr)
        if self.average is not None:
            self.average.update(self.updates)

    def drop_gradients(self) -> None:
        """Zero them."""
        self.gathered().zero_()

    def measure(self, figures: Figures, micros: Sequence[TokenBatch]) -> list[float]:
        """One micro-batch after the other."""
        return of_model(self.model)(figures, micros)

    def whole(self) -> Decoder:
        """The model itself."""
        return self.model

    def finite(self) -> bool:
        """Whether the master weights are."""
        return bool(all_finite([self.flat.master]))

    def groups(self) -> Mapping[str, Mapping[str, Tensor]]:
        """The trained weights, the optimizer's state and the average, as views."""
        trained = [item for item in self.model.named_parameters() if item[1].requires_grad]
        weights = {name: parameter.detach() for name, parameter in trained}
        groups: dict[str, Mapping[str, Tensor]] = {"model": weights, "optimizer": self.optimizer.state()}
        return groups if self.average is None else {**groups, "ema": self.average.state()}

    def resumed(self, updates: int) -> None:
        """Continue from what was read into `groups`; the trained weights follow from the master weights."""
        self.optimizer.resumed(updates)


def all_finite(tensors: Iterable[Tensor]) -> Tensor:
    """Whether no element of some tensors is a NaN or an infinity, as one boolean; nothing of their size is made."""
    ends = [end for tensor in tensors if tensor.numel() for end in torch.aminmax(tensor)]
    return torch.stack(ends).isfinite().all() if ends else torch.tensor(True)
