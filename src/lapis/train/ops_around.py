"""What all ops around other ops share: every operation that they leave alone is the inner ops' own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from torch import Tensor

from lapis.kernels.ops import Ops


class OpsAround:
    """Ops over other ops. A subclass defines those that need other ranks; the model sees no difference."""

    def __init__(self, inner: Ops) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["inner"], name)

    @property
    def sharers(self) -> dist.ProcessGroup | None:
        """The ranks that hold other rows of the same batch, where these ops split rows."""
        return None

    def own(self, x_T: Tensor) -> Tensor:
        """Of something about every row, what is about the rows that these ops leave to this rank."""
        return x_T


def own_rows(ops: Ops, x_T: Tensor) -> Tensor:
    """Of something about every row of a batch, what is about the rows that this rank's model ends with."""
    for around in _layers(ops):
        x_T = around.own(x_T)
    return x_T


def row_by_row(ops: Ops) -> Ops:
    """The ops of this rank alone: for what is done with rows that it holds already."""
    while isinstance(ops, OpsAround):
        ops = ops.inner
    return ops


def over_rows(ops: Ops, sums: Tensor) -> Tensor:
    """Sums over this rank's rows, as sums over all rows of the batch: the same on all ranks that share them."""
    for around in _layers(ops):
        if around.sharers is not None:
            dist.all_reduce(sums, group=around.sharers)
    return sums


def counts(ops: Ops) -> bool:
    """Whether this rank is the one, of those that share the rows of a batch, to count what all of them know."""
    return not any(around.sharers is not None and around.sharers.rank() for around in _layers(ops))


def _layers(ops: Ops) -> Iterator[OpsAround]:
    while isinstance(ops, OpsAround):
        yield ops
        ops = ops.inner
