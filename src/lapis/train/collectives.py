"""Differentiable exchanges of rows between the ranks of a group; the gradient of each is the other way round.

Dims: T rows of all ranks, R rows of one, N width. Every rank holds as many rows, in the order of the group's ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

# their names since torch 2.13, which warns of the old ones
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def gathered(x_RN: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The rows of all ranks, (T, N); the gradient of a row is summed over all who read it."""
    return cast(Tensor, _Gather.apply(x_RN, group))  # type: ignore[no-untyped-call]


def scattered(x_TN: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's rows (R, N) of the sum over all ranks; the gradient of a row goes to all who added to it."""
    return cast(Tensor, _Scatter.apply(x_TN, group))  # type: ignore[no-untyped-call]


def summed(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over all ranks, of which each uses its copy for something else: gradients are summed too."""
    return cast(Tensor, _Sum.apply(x, group))  # type: ignore[no-untyped-call]


def exchanged(x_RN: Tensor, send: Sequence[int], receive: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """So many rows to each rank, in order, and so many from each."""
    return cast(Tensor, _Exchange.apply(x_RN, list(send), list(receive), group))  # type: ignore[no-untyped-call]


def _gather(x_RN: Tensor, group: dist.ProcessGroup) -> Tensor:
    x_TN = x_RN.new_empty(x_RN.shape[0] * group.size(), *x_RN.shape[1:])
    _all_gather(x_TN, x_RN.contiguous(), group=group)
    return x_TN


def _scatter(x_TN: Tensor, group: dist.ProcessGroup) -> Tensor:
    x_RN = x_TN.new_empty(x_TN.shape[0] // group.size(), *x_TN.shape[1:])
    _reduce_scatter(x_RN, x_TN.contiguous(), group=group)
    return x_RN


def _exchange(x_RN: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
    found = x_RN.new_empty(sum(receive), *x_RN.shape[1:])
    dist.all_to_all_single(found, x_RN.contiguous(), receive, send, group=group)
    return found


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RN: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _gather(x_RN, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _scatter(grads[0], ctx.group), None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TN: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _scatter(x_TN, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _gather(grads[0], ctx.group), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        total = grads[0].clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_RN: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.send, ctx.receive, ctx.group = send, receive, group
        return _exchange(x_RN, send, receive, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _exchange(grads[0], ctx.receive, ctx.send, ctx.group), None, None, None
