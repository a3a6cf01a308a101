"""Which part of every weight a rank holds: first split by tp, ep and pp, then dealt in shards. No torch here.

Every question about who holds what is answered here: the first weights, checkpoints, the optimizer that needs whole
matrices, and the dry run all ask the same functions.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import NamedTuple

from lapis.checkpoint.piece import Box
from lapis.model.config import ModelConfig
from lapis.model.shapes import Shape, shapes
from lapis.train.mesh import Mesh

EXPERTS = ("experts_gate_up", "experts_down")
# by the name of a weight in its layer, the dim along which tp splits it; all others are whole on every tp rank
TP_DIM = {
    "qkv": 0, "qkv_bias": 0, "gate_up": 0, "gate_up_bias": 0, "up": 0, "up_bias": 0, "out": 1, "down": 1,
    "experts_gate_up": 1, "experts_down": 2,
}  # fmt: skip


class Run(NamedTuple):
    """Neighbouring indices along one dim: where they begin in the whole weight and in this rank's, and how many."""

    whole: int
    local: int
    size: int


class Piece(NamedTuple):
    """A box of a whole weight, and the box that its elements fill in the shard that a rank keeps."""

    whole: Box
    local: Box


@dataclass(frozen=True)
class Placement:
    """How one weight lies on a mesh. `tp_dim` is None where all tp ranks hold the same."""

    shape: Shape
    parts: tuple[int, ...]  # sizes along tp_dim of what is joined in one weight; each is split evenly
    tp_dim: int | None
    expert: bool  # dim 0 counts experts, which ep splits
    layer: int | None

    def shard_axes(self) -> tuple[str, ...]:
        """The axes along which one dim of what tp and ep left is dealt."""
        return ("fsdp", "cp") if self.expert else ("ep", "fsdp", "cp")

    def copies(self) -> tuple[str, ...]:
        """The axes on which every rank holds the same elements."""
        return ("dp",) if self.tp_dim is not None else ("dp", "tp")

    def split(self, mesh: Mesh, rank: int) -> tuple[tuple[Run, ...], ...]:
        """For each dim what tp and ep leave to a rank: what its model computes with."""
        place = mesh.place(rank)
        dims: list[tuple[Run, ...]] = [(Run(0, 0, size),) for size in self.shape]
        if self.expert:
            count = self.shape[0] // mesh.ep
            dims[0] = (Run(place.ep * count, 0, count),)
        if self.tp_dim is not None:
            runs, whole, local = [], 0, 0
            for size in self.parts:
                count = size // mesh.tp
                runs.append(Run(whole + place.tp * count, local, count))
                whole, local = whole + size, local + count
            dims[self.tp_dim] = tuple(runs)
        return tuple(dims)

    def computed_shape(self, mesh: Mesh) -> Shape:
        """The shape that a rank computes with."""
        return tuple(sum(run.size for run in runs) for runs in self.split(mesh, 0))

    def shard_ranks(self, mesh: Mesh) -> int:
        """How many ranks share what tp and ep left."""
        return prod(getattr(mesh, axis) for axis in self.shard_axes())

    def shard_dim(self, mesh: Mesh) -> int:
        """The dim that is dealt: the first; experts that do not divide by the ranks are cut through instead."""
        first, second, *_ = (*self.computed_shape(mesh), 1)
        ranks = self.shard_ranks(mesh)
        return 1 if self.expert and first % ranks and second % ranks == 0 else 0

    def shard(self, mesh: Mesh, rank: int) -> range:
        """Which indices of that dim a rank keeps: chunks of equal size, the last shorter."""
        total, place, at = self.computed_shape(mesh)[self.shard_dim(mesh)], mesh.place(rank), 0
        for axis in self.shard_axes():
            at = at * getattr(mesh, axis) + getattr(place, axis)
        chunk = -(-total // self.shard_ranks(mesh))
        return range(min(at * chunk, total), min((at + 1) * chunk, total))

    def held_shape(self, mesh: Mesh, rank: int) -> Shape:
        """The shape of the shard that a rank keeps."""
        shape = list(self.computed_shape(mesh))
        shape[self.shard_dim(mesh)] = len(self.shard(mesh, rank))
        return tuple(shape)

    def held(self, mesh: Mesh, rank: int) -> list[Piece]:
        """The boxes of the whole weight that a rank keeps; their corners count from those of its shard."""
        dims, dim, kept = list(self.split(mesh, rank)), self.shard_dim(mesh), self.shard(mesh, rank)
        clipped = []
        for run in dims[dim]:
            low, high = max(run.local, kept.start), min(run.local + run.size, kept.stop)
            if low < high:
                clipped.append(Run(run.whole + low - run.local, low - kept.start, high - low))
        dims[dim] = tuple(clipped)
        return [
            Piece(
                Box(tuple(run.whole for run in runs), tuple(run.size for run in runs)),
                Box(tuple(run.local for run in runs), tuple(run.size for run in runs)),
            )
            for runs in itertools.product(*dims)
        ]


def placements(config: ModelConfig) -> dict[str, Placement]:
    """The placement of every weight of a model, by its name."""
    return {name: _placement(config, name, shape) for name, shape in shapes(config).items()}


def _placement(config: ModelConfig, name: str, shape: Shape) -> Placement:
    short = name.rsplit(".", 1)[-1]
    layer = int(name.split(".")[1]) if name.startswith("layers.") else None
    dim = TP_DIM.get(short)
    if short in ("q_norm", "k_norm") and config.head_norm == "whole":
        dim = 0
    parts = (shape[dim],) if dim is not None else ()
    return Placement(shape, joined(config, short, parts), dim, short in EXPERTS, layer)


def joined(config: ModelConfig, short: str, parts: tuple[int, ...]) -> tuple[int, ...]:
    """The sizes of what is joined in one weight, `parts` where nothing is: query, key and value; gate and up."""
    query, key = config.heads * config.head_size, config.kv_heads * config.head_size
    if short in ("qkv", "qkv_bias"):
        return (query, key, key)
    if short in ("gate_up", "gate_up_bias", "experts_gate_up"):
        return (parts[0] // 2,) * 2
    return parts


def local_config(config: ModelConfig, mesh: Mesh) -> ModelConfig:
    """The configuration that a rank's layers compute with: its heads and its part of the feed-forward width."""
    return replace(
        config,
        heads=config.heads // mesh.tp,
        kv_heads=config.kv_heads // mesh.tp,
        ffn=config.ffn // mesh.tp if config.ffn % mesh.tp == 0 else config.ffn,
        expert_ffn=config.expert_ffn // mesh.tp,
    )


def elements(pieces: Sequence[Piece]) -> int:
    """Number of elements in pieces."""
    return sum(piece.whole.volume for piece in pieces)
