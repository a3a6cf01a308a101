"""Whole copies of a model on many ranks, which add up their gradients: plain data parallel, for adapters above all.

What is frozen is never sent. All ranks make the same update from the same bits, so that the copies stay equal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lapis.checkpoint.piece import Box, Part, Sharded
from lapis.data.loader import TokenBatch
from lapis.model.families import Decoder
from lapis.train.bad_step import Numbers
from lapis.train.objective import Figures, shared
from lapis.train.replica import Alone, Groups
from lapis.train.world import World


class Copies:
    """This rank's copy of a model: a `Replica` over many processes."""

    def __init__(self, own: Alone, world: World) -> None:
        self.own, self.world = own, world

    @property
    def model(self) -> Decoder:
        """The whole model."""
        return self.own.model

    @property
    def updates(self) -> int:
        """Updates done."""
        return self.own.updates

    @property
    def share(self) -> tuple[int, int]:
        """Every rank works on other samples."""
        return self.world.data_rank, self.world.data_ranks

    def backward(self, loss: Callable[[Decoder, TokenBatch], Tensor], micros: Sequence[TokenBatch]) -> float:
        """Add the gradients of this rank's micro-batches; its part of their loss."""
        return self.own.backward(loss, micros)

    def finish(self, loss: float) -> Numbers:
        """Add up the ranks' gradients in fp32; loss and gradient norm of the whole step, the same on all ranks."""
        total = torch.tensor(loss, dtype=torch.float64, device=self.world.device)
        flat = self.own.gathered()
        flat.copy_(self.world.sum(flat.float()))
        return self.own.finish(float(self.world.sum(total)))

    def update(self, norm: float, *, lr: float, embed_lr: float) -> None:
        """One step of the optimizer, and of the average."""
        self.own.update(norm, lr=lr, embed_lr=embed_lr)

    def drop_gradients(self) -> None:
        """Forget the gradients without a step."""
        self.own.drop_gradients()

    def measure(self, figures: Figures, micros: Sequence[TokenBatch]) -> list[float]:
        """Every rank measures its part of the micro-batches."""
        found = self.own.measure(figures, shared(micros, *self.share))
        return self.world.sum(torch.tensor(found, dtype=torch.float64, device=self.world.device)).tolist()

    def whole(self) -> Decoder | None:
        """The first rank's copy."""
        return self.model if self.world.is_main else None

    def finite(self) -> bool:
        """Whether the weights of every copy are."""
        return self.world.all(self.own.finite())

    def groups(self) -> Groups:
        """What a checkpoint keeps: the first rank saves it, all read it."""
        return {
            group: {name: self._saved_by_first(tensor) for name, tensor in tensors.items()}
            for group, tensors in self.own.groups().items()
        }

    def resumed(self, updates: int) -> None:
        """Continue from what was read into `groups`."""
        self.own.resumed(updates)

    def _saved_by_first(self, tensor: Tensor) -> Sharded[Tensor]:
        shape = tuple(tensor.shape)
        return Sharded(shape, (Part(Box.whole(shape), tensor, owned=self.world.is_main),))
