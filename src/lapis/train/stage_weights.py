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
        assert world.dense is not None and world.expert is not None, "a pipeline has many ranks"
        self.wholes, self.placed, self.world = wholes, placed, world
        self.dense, self.expert, self.line = world.dense, world.expert, world.dense["pp"].get_group()
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
        if self.borrower is not None:
            dist.send(self.shards[EMBED], self.borrower, group=self.line)
        if self.lender is not None:
            dist.recv(self.shards[EMBED], self.lender, group=self.line)
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
        """Give every shard its part of the gradient of all data-parallel ranks, and the sums a new start.

        The gradient of a borrowed embedding goes to the rank that keeps it.
        """
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
            if self.world.mesh.dp > 1:
                dist.all_reduce(shard.grad, group=self.dense["dp"].get_group())
        table = self.shards[EMBED].grad if EMBED in self.shards else None
        if table is not None and self.lender is not None:
            dist.send(table, self.lender, group=self.line)
            self.shards[EMBED].grad = None
        if table is not None and self.borrower is not None:
            received = torch.empty_like(table)
            dist.recv(received, self.borrower, group=self.line)
            table += received

    def _sharers(self, placement: Placement) -> dist.ProcessGroup | None:
        """The ranks that share what tp and ep left of a weight; None where this rank has it all."""
        mesh = self.expert if placement.expert else self.dense
        return mesh["shard"].get_group() if mesh["shard"].size() > 1 else None


def _lengthened(rows: Tensor, count: int) -> Tensor:
    """Rows with zeros after them, so that every rank has as many."""
    missing = count - rows.shape[0]
    return functional.pad(rows, (0, 0) * (rows.ndim - 1) + (0, missing)) if missing else rows
