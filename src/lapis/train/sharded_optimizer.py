"""AdamW and Muon over sharded fp32 weights: the mathematics of optimizer.py where a rank holds parts alone.

A weight's shard, its gradient and its moments are elementwise, so AdamW needs no talk. Muon needs whole matrices: the
ranks that hold the parts of a matrix send them to one of them, by turns, and get the parts of its update back.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lapis.checkpoint.piece import Box, Part, Sharded
from lapis.kernels import torch_steps
from lapis.train.flat import HIDDEN, TABLE, VECTOR
from lapis.train.optimizer import CLIP_EPS, EPS, ITERATIONS, MOMENTUM, NEWTON_SCHULZ
from lapis.train.placement import Piece, Placement
from lapis.train.world import World


class ShardedOptimizer:
    """One step over this rank's shards, with the numbers of `Optimizer`."""

    def __init__(
        self,
        named: Mapping[str, nn.Parameter],
        placements: Mapping[str, Placement],
        world: World,
        dtype: torch.dtype,
        *,
        muon: bool,
        clip: float,
        weight_decay: float,
        betas: tuple[float, float],
    ) -> None:
        self.named, self.placements, self.world = dict(named), placements, world
        self.dtype = dtype  # that is computed with: Muon's matrices are made orthogonal in it
        self.muon, self.clip, self.weight_decay, self.betas = muon, clip, weight_decay, betas
        self.steps = 0
        self.master = {name: local(parameter.detach()) for name, parameter in self.named.items()}
        self.first = {name: torch.zeros_like(shard) for name, shard in self.master.items()}
        self.second = {
            name: torch.zeros_like(shard)
            for name, shard in self.master.items()
            if not (muon and kind_of(placements[name]) == HIDDEN)
        }

    def state(self) -> dict[str, Sharded[Tensor]]:
        """What a checkpoint keeps beside the weights, by kind and parameter: views of this rank's shards."""
        kinds = {"master": self.master, "first": self.first, "second": self.second}
        return {
            f"{kind}.{name}": self.pieces(name, shard)
            for kind, shards in kinds.items()
            for name, shard in shards.items()
        }

    def pieces(self, name: str, shard: Tensor) -> Sharded[Tensor]:
        """A shard that lies as this weight does, as the boxes of the whole that it holds."""
        placement, mesh, rank = self.placements[name], self.world.mesh, self.world.rank
        owned = self._counts(placement)
        return Sharded(
            placement.shape,
            tuple(Part(piece.whole, inside(shard, piece), owned) for piece in placement.held(mesh, rank)),
        )

    def _counts(self, placement: Placement) -> bool:
        """Whether this rank is the first of those that hold the same elements."""
        place = self.world.mesh.place(self.world.rank)
        return all(getattr(place, axis) == 0 for axis in placement.copies())

    @torch.no_grad()
    def finish(self) -> float:
        """Complete the gradients, once a step: what tp ranks found for a weight that all hold is summed.

        Returns the norm of the whole gradient, the same on all ranks: every element counts once.
        """
        grads = self.gradients()
        group = self.world.group("tp")
        shared = [grads[name] for name in grads if self.placements[name].tp_dim is None]
        if group is not None and shared:
            flat = torch.cat([grad.flatten() for grad in shared])
            dist.all_reduce(flat, group=group)
            for grad, total in zip(shared, cut(flat, [grad.numel() for grad in shared]), strict=True):
                grad.copy_(total.view_as(grad))
        squares = torch.zeros((), dtype=torch.float64, device=self.world.device)
        for name, grad in grads.items():
            if self._counts(self.placements[name]):
                squares += grad.double().square().sum()
        return math.sqrt(self.world.sum(squares))

    @torch.no_grad()
    def update(self, norm: float, *, lr: float, embed_lr: float) -> None:
        """Move the weights along the finished gradients, clipped by their finite norm, and forget these."""
        assert math.isfinite(norm), "whoever steps has looked at the norm"
        self.steps += 1
        scale, grads = min(1.0, self.clip / (norm + CLIP_EPS)), self.gradients()
        kinds: dict[int, list[str]] = {HIDDEN: [], TABLE: [], VECTOR: []}
        for name in self.named:
            kinds[kind_of(self.placements[name])].append(name)
        if self.muon:
            self._muon(kinds[HIDDEN], grads, lr)  # its update has no scale, so it needs no clipping
        else:
            self._adamw(kinds[HIDDEN], grads, lr, self.weight_decay, scale)
        self._adamw(kinds[TABLE], grads, embed_lr, self.weight_decay, scale)
        self._adamw(kinds[VECTOR], grads, embed_lr, 0.0, scale)
        self.drop_gradients()

    def gradients(self) -> dict[str, Tensor]:
        """This rank's shard of every gradient."""
        grads = {}
        for name, parameter in self.named.items():
            assert parameter.grad is not None, f"{name} has no gradient"
            grads[name] = local(parameter.grad)
        return grads

    def drop_gradients(self) -> None:
        """Forget the gradients, so that the next step starts from none."""
        for parameter in self.named.values():
            parameter.grad = None

    def _adamw(
        self,
        names: Sequence[str],
        grads: Mapping[str, Tensor],
        lr: float,
        weight_decay: float,
        scale: float,
    ) -> None:
        beta1, beta2 = self.betas
        correction1, correction2 = 1 - beta1**self.steps, 1 - beta2**self.steps
        for name in names:
            first, second, scaled = self.first[name], self.second[name], grads[name] * scale
            first.lerp_(scaled, 1 - beta1)
            second.mul_(beta2).addcmul_(scaled, scaled, value=1 - beta2)
            denominator = second.sqrt().div_(math.sqrt(correction2)).add_(EPS)
            self.master[name].mul_(1 - lr * weight_decay).addcdiv_(
                first, denominator, value=-lr / correction1
            )

    def _muon(self, names: Sequence[str], grads: Mapping[str, Tensor], lr: float) -> None:
        updates = {}
        for name in names:
            self.first[name].lerp_(grads[name], 1 - MOMENTUM)
            updates[name] = grads[name].lerp(self.first[name], MOMENTUM).to(self.dtype)
        for batch, holders in self._turns(names):
            steps = self._orthogonal(batch, holders, updates)
            for name, step in steps.items():
                master, placement = self.master[name], self.placements[name]
                master.mul_(1 - lr * self.weight_decay)
                for piece in placement.held(self.world.mesh, self.world.rank):
                    factor = max(1.0, block_rows(placement, piece) / placement.shape[-1]) ** 0.5
                    inside(master, piece).add_(inside(step, piece).float(), alpha=-lr * factor)

    def _turns(self, names: Sequence[str]) -> Iterator[tuple[list[str], tuple[str, ...]]]:
        """Weights with the axes along which they are held, as many at a time as there are holders."""
        for expert in (False, True):
            chosen = [name for name in names if self.placements[name].expert is expert]
            if not chosen:
                continue
            axes = (*self.placements[chosen[0]].shard_axes(), "tp")
            holders = len(self.world.mesh.peers(self.world.rank, *axes))
            for start in range(0, len(chosen), holders):
                yield chosen[start : start + holders], axes

    def _orthogonal(
        self, names: Sequence[str], axes: tuple[str, ...], updates: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """This rank's shards of the orthogonal updates of some weights; each holder makes one whole update."""
        world, group = self.world, self.world.group(*axes)
        if group is None:
            return {name: orthogonal(updates[name], self.placements[name]) for name in names}
        holders = world.mesh.peers(world.rank, *axes)
        turn = holders.index(world.rank)
        mine = self.placements[names[turn]] if turn < len(names) else None
        shapes = [() if mine is None else mine.held_shape(world.mesh, rank) for rank in holders]
        receive = [0 if mine is None else prod(shape) for shape in shapes]
        send = [updates[name].numel() for name in names] + [0] * (len(holders) - len(names))
        sent = torch.cat([updates[name].flatten() for name in names])
        received = sent.new_empty(sum(receive))
        dist.all_to_all_single(received, sent, receive, send, group=group)
        if mine is not None:
            shards = [flat.view(shape) for flat, shape in zip(cut(received, receive), shapes, strict=True)]
            pieces = [
                (inside(shard, piece), piece)
                for rank, shard in zip(holders, shards, strict=True)
                for piece in mine.held(world.mesh, rank)
            ]
            whole = received.new_empty(mine.shape)
            for view, piece in pieces:
                outside(whole, piece).copy_(view)
            here = mine.split(world.mesh, world.rank)[0][0]  # of a stack, the experts that these ranks own
            owned = whole[here.whole : here.whole + here.size] if mine.expert else whole
            owned.copy_(orthogonal(owned, mine))
            for view, piece in pieces:
                view.copy_(outside(whole, piece))
        dist.all_to_all_single(sent, received, send, receive, group=group)
        found = cut(sent, send)[: len(names)]
        return {name: flat.view_as(updates[name]) for name, flat in zip(names, found, strict=True)}


def cut(tensor: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """Pieces of these sizes along dim 0, as views."""
    return torch.split(tensor, list(sizes))


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def kind_of(placement: Placement) -> int:
    """A linear map of the layers (or one of every expert), another matrix, or a vector: as in flat.py."""
    if len(placement.shape) < 2:
        return VECTOR
    return TABLE if placement.layer is None else HIDDEN


def inside(shard: Tensor, piece: Piece) -> Tensor:
    """A piece of a whole tensor as a view of a rank's shard."""
    return shard[piece.local.inside(Box.whole(shard.shape))]


def outside(whole: Tensor, piece: Piece) -> Tensor:
    """The same piece as a view of the whole tensor."""
    return whole[piece.whole.inside(Box.whole(whole.shape))]


def block_rows(placement: Placement, piece: Piece) -> int:
    """Rows of the matrix, one of those joined in a weight, that a piece belongs to."""
    dim = len(placement.shape) - 2
    if placement.tp_dim != dim:
        return placement.shape[dim]
    end = 0
    for size in placement.parts:
        end += size
        if piece.whole.offset[dim] < end:
            return size
    raise AssertionError("a piece lies inside its weight")


def orthogonal(whole: Tensor, placement: Placement) -> Tensor:
    """The orthogonal updates of all matrices that are joined in a weight, or in some experts of it."""
    dim = len(placement.shape) - 2
    sizes = placement.parts if placement.tp_dim == dim else (placement.shape[dim],)
    matrices = whole.view(-1, *placement.shape[-2:])
    done = [
        torch.cat([torch_steps.orthogonal(block, NEWTON_SCHULZ, ITERATIONS) for block in cut(matrix, sizes)])
        for matrix in matrices
    ]
    return torch.stack(done).view(whole.shape)
