"""The weights of a pipeline's rank: fp32 shards between the steps, whole in the computing type during one.

A stage works on many micro-batches in a step. So its weights are gathered once, the gradients of the micro-batches
are added up in fp32 where they arise, and the shards get their sums once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from lapis.train.collectives import gathered, scattered
from lapis.train.placement import Placement
from lapis.train.stages import Stages
from lapis.train.world import World

EMBED = "embed"


class StageWeights:
    """What a rank holds: `wholes` are the parameters of its stages, `shards` its fp32 parts of them."""

    def __init__(
        self,
        wholes: Mapping[str, nn.Parameter],
        placed: Mapping[str, Placement],
        world: World,
        stages: Stages,
    ) -> None:
        self.wholes, self.placed, self.world = wholes, placed, world
        self.shards = {
            name: nn.Parameter(
                torch.zeros(placed[name].held_shape(world.mesh, world.rank), device=world.device)
            )
            for name in wholes
        }
        self.sums = {name: torch.zeros(whole.shape, device=world.device) for name, whole in wholes.items()}
        place, borrower = world.mesh.place(world.rank), stages.borrower()
        self.kept = {name: shard for name, shard in self.shards.items() if stages.keeps(place.pp, name)}
        self.lender = world.mesh.rank(place._replace(pp=0)) if place.pp == borrower else None
        self.borrower = (
            None if borrower is None or place.pp > 0 else world.mesh.rank(place._replace(pp=borrower))
        )

    @torch.no_grad()
    def gather(self) -> None:
        """Make the whole weights from the shards of all ranks that hold parts of them."""
        self._send_embedding(self.shards.get(EMBED), self.lender, self.borrower)
        for name, whole in self.wholes.items():
            placement, shard = self.placed[name], self.shards[name].to(whole.dtype)
            group = self._sharers(placement)
            if group is not None:
                dim = placement.shard_dim(self.world.mesh)
                rows = shard.movedim(dim, 0)
                rows = _lengthened(rows, -(-whole.shape[dim] // group.size()))
                shard = gathered(rows, group)[: whole.shape[dim]].movedim(0, dim)
            whole.copy_(shard)

    @torch.no_grad()
    def fold(self, names: Iterable[str]) -> None:
        """Add the gradients of a micro-batch to the sums; those of bf16 weights would be rounded away."""
        for name in names:
            whole = self.wholes[name]
            if whole.grad is not None:
                self.sums[name] += whole.grad
                whole.grad = None

    @torch.no_grad()
    def reduce(self) -> None:
        """Give every shard its part of the gradient of all data-parallel ranks, and the sums a new start."""
        mesh = self.world.dense
        copies = None if mesh is None or mesh["dp"].size() == 1 else mesh["dp"].get_group()
        for name, total in self.sums.items():
            placement, grad, shard = self.placed[name], total, self.shards[name]
            group = self._sharers(placement)
            if group is not None:
                dim = placement.shard_dim(self.world.mesh)
                rows = total.movedim(dim, 0)
                rows = _lengthened(rows, -(-rows.shape[0] // group.size()) * group.size())
                grad = scattered(rows, group)[: shard.shape[dim]].movedim(0, dim)
            shard.grad = grad.clone(memory_format=torch.contiguous_format)
            total.zero_()
            if copies is not None:
                dist.all_reduce(shard.grad, group=copies)
        self._return_embedding()

    def _sharers(self, placement: Placement) -> dist.ProcessGroup | None:
        """The ranks that share what tp and ep left of a weight; None where this rank has it all."""
        mesh = self.world.expert if placement.expert else self.world.dense
        assert mesh is not None, "a pipeline has many ranks"
        return mesh["shard"].get_group() if mesh["shard"].size() > 1 else None

    def _return_embedding(self) -> None:
        """The last stage's gradient of the table goes to the rank that keeps it."""
        if self.lender is not None:
            self._send_embedding(self.shards[EMBED].grad, None, self.lender)
            self.shards[EMBED].grad = None
        if self.borrower is not None:
            grad = self.shards[EMBED].grad
            assert grad is not None, "it was reduced"
            received = torch.empty_like(grad)
            self._send_embedding(received, self.borrower, None)
            grad += received

    def _send_embedding(self, tensor: Tensor | None, source: int | None, target: int | None) -> None:
        assert self.world.dense is not None
        group = self.world.dense["pp"].get_group()
        if source is not None:
            assert tensor is not None
            dist.recv(tensor, source, group=group)
        if target is not None:
            assert tensor is not None
            dist.send(tensor, target, group=group)


def _lengthened(rows: Tensor, count: int) -> Tensor:
    """Rows with zeros after them, so that every rank has as many."""
    missing = count - rows.shape[0]
    return functional.pad(rows, (0, 0) * (rows.ndim - 1) + (0, missing)) if missing else rows
