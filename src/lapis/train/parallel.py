"""One model on many ranks, applied from outside in one visible order; the model's own files know nothing of it.

1. ops around ops: expert, tensor (with sequence) and context parallel;  2. activations computed again;
3. FSDP2 over dp, ep, fsdp and cp; or stages of a pipeline, which shard over the same ranks by themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_common import (  # the one way to give experts a mesh of their own
    HSDPMeshInfo,
    ShardPlacementResult,
)
from torch.distributed.tensor import Shard

from lapis.checkpoint.piece import Box, Sharded
from lapis.data.loader import TokenBatch
from lapis.kernels.ops import Ops, select
from lapis.model.config import ModelConfig
from lapis.model.families import Decoder, build, initial_weights, skeleton
from lapis.model.weights import DTYPES
from lapis.train import context_parallel, expert_parallel, float8, tensor_parallel
from lapis.train.average import lerp_weight
from lapis.train.bad_step import Numbers
from lapis.train.objective import Figures, shared
from lapis.train.pipeline import Loss, Pipeline
from lapis.train.placement import Placement, local_config, placements
from lapis.train.recipe import TrainSection
from lapis.train.recompute import recompute_layers
from lapis.train.reference import Reference
from lapis.train.replica import Groups, all_finite
from lapis.train.sharded_optimizer import ShardedOptimizer, inside, local, outside
from lapis.train.stages import Stages
from lapis.train.world import World


class Whole(nn.Module):
    """What FSDP gathers the outer weights for: all that happens between a micro-batch and its loss."""

    def __init__(self, model: Decoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, loss: Callable[[Decoder], Tensor]) -> Tensor:
        """The loss that a function makes with the model."""
        return loss(self.model)

    def backward(self, loss: Loss, micros: Sequence[TokenBatch]) -> float:
        """Add the gradients of micro-batches, one after the other."""
        values = []
        for micro in micros:
            value: Tensor = self(lambda model, micro=micro: loss(model, micro))
            torch.autograd.backward(value)
            values.append(value.detach())
        return math.fsum(value.item() for value in values)

    def finish(self) -> None:
        """Nothing: FSDP reduces the gradients of a layer when they are there."""

    @torch.no_grad()
    def find(self, function: Callable[[Decoder], Tensor]) -> Tensor:
        """What a function finds with the model, without a gradient; all ranks together."""
        found: Tensor = self(function)
        assert isinstance(self, FSDPModule), "it is sharded before it is used"
        self.reshard()  # without a backward pass the outer weights would stay whole, and grow old
        return found


class Passes(Protocol):
    """How micro-batches go through a model that many ranks hold: `Whole` or `Pipeline`."""

    @property
    def model(self) -> Decoder:
        """What this rank holds of it."""

    def backward(self, loss: Loss, micros: Sequence[TokenBatch]) -> float:
        """Add the gradients of a step's micro-batches; this rank's part of their loss."""

    def finish(self) -> None:
        """Give the shards of this rank the whole gradients of the step."""


class Parallel:
    """This rank's part of a model and its optimizer: a `Replica` over many processes."""

    def __init__(
        self,
        config: ModelConfig,
        passes: Passes,
        another: Callable[[], Whole],
        optimizer: ShardedOptimizer,
        dtype: torch.dtype,
        ema: float | None,
    ) -> None:
        self.config = config  # of the whole model
        self.passes, self.optimizer, self.dtype, self.ema = passes, optimizer, dtype, ema
        self.another = another  # makes such a model again, its weights not set yet
        self.mean = {} if ema is None else {name: x.clone() for name, x in optimizer.master.items()}

    @property
    def world(self) -> World:
        """This rank and its mesh."""
        return self.optimizer.world

    @property
    def model(self) -> Decoder:
        """The model, of which this rank holds shards; whole layers exist while they are computed."""
        return self.passes.model

    @property
    def updates(self) -> int:
        """Updates done."""
        return self.optimizer.steps

    def backward(self, loss: Loss, micros: Sequence[TokenBatch]) -> float:
        """Add the gradients of micro-batches; this rank's part of their loss, which the ranks' parts add up to."""
        step = self.world.mesh.row_step
        if self.world.mesh.pp > 1:  # stages exchange micro-batches of one length
            step *= -(-max(len(micro.ids_T) for micro in micros) // step)
        return self.passes.backward(loss, [micro.padded(step) for micro in micros])

    def measure(self, figures: Figures, micros: Sequence[TokenBatch]) -> list[float]:
        """Every data rank measures its part of the micro-batches."""
        passes, step = self._whole(), self.world.mesh.row_step

        def found(micro: TokenBatch) -> Tensor:
            return passes.find(lambda model: figures(model, micro)).double()

        parts = [found(micro.padded(step)) for micro in shared(micros, *self.share)]
        total: list[float] = self.world.sum(torch.stack(parts).sum(0)).tolist()
        return total

    def reference(self) -> Reference:
        """The model as it is now, frozen, in shards beside those that learn."""
        own, copy = self._whole(), self.another()
        copy.requires_grad_(False)
        with torch.no_grad():
            for mine, theirs in zip(own.parameters(), copy.parameters(), strict=True):
                local(theirs).copy_(local(mine))

        def wanted(here: bool) -> bool:
            return bool(self.world.max(torch.tensor(float(here), device=self.world.device)))

        return Reference(copy.find, wanted)

    def _whole(self) -> Whole:
        assert isinstance(self.passes, Whole), "the recipe does not offer it with stages"
        return self.passes

    @property
    def share(self) -> tuple[int, int]:
        """Which share of the samples this rank works on; ranks that compute together have the same."""
        return self.world.data_rank, self.world.data_ranks

    def finish(self, loss: float) -> Numbers:
        """Complete the gradients, once a step; loss and gradient norm of the whole step, the same on all ranks."""
        self.passes.finish()
        total = torch.tensor(loss, dtype=torch.float64, device=self.world.device)
        return Numbers(float(self.world.sum(total)), self.optimizer.finish())

    @torch.no_grad()
    def update(self, norm: float, *, lr: float, embed_lr: float) -> None:
        """One step of the optimizer, and of the average."""
        self.optimizer.update(norm, lr=lr, embed_lr=embed_lr)
        if self.ema is not None:
            weight = lerp_weight(self.ema, self.updates)
            for name, mean in self.mean.items():
                mean.lerp_(self.optimizer.master[name], weight)
        self.model.ops.weights_changed()

    def drop_gradients(self) -> None:
        """Forget the gradients without a step."""
        self.optimizer.drop_gradients()

    @torch.no_grad()
    def whole(self) -> Decoder | None:
        """A copy of all weights as they are now, on the first rank; one weight at a time is whole on the others."""
        copy = build(self.config, dtype=self.dtype).requires_grad_(False) if self.world.is_main else None
        for name, placement in self.placements.items():
            total = torch.zeros(placement.shape, device=self.world.device)
            held = self.optimizer.master.get(name)
            parts = () if held is None else self.optimizer.pieces(name, held).parts
            for part in parts:
                if part.owned:
                    total[part.box.inside(Box.whole(placement.shape))] = part.data
            self.world.sum(total)  # each element has one owner
            if copy is not None:
                copy.get_parameter(name).copy_(total)
        return copy

    def finite(self) -> bool:
        """Whether the shards of all ranks are."""
        return self.world.all(bool(all_finite(self.optimizer.master.values())))

    def groups(self) -> Groups:
        """The weights in the model's type, the optimizer's state and the average: this rank's pieces of each."""
        pieces, master = self.optimizer.pieces, self.optimizer.master
        weights = {name: pieces(name, shard.to(self.dtype)) for name, shard in master.items()}
        groups: dict[str, Mapping[str, Tensor | Sharded[Tensor]]] = {
            "model": weights,
            "optimizer": self.optimizer.state(),
        }
        if self.ema is not None:
            groups["ema"] = {name: pieces(name, mean) for name, mean in self.mean.items()}
        return groups

    def resumed(self, updates: int) -> None:
        """Continue from what was read into `groups`; the weights that are computed with follow from the master's."""
        self.optimizer.steps = updates
        self.optimizer.drop_gradients()
        self.model.ops.weights_changed()

    @torch.no_grad()
    def fill(self, whole: Iterable[tuple[str, Tensor]]) -> None:
        """Set weights, and their average, from whole ones; every rank takes its own part."""
        for name, value in whole:
            for shards in (self.optimizer.master, self.mean):
                for piece in self.placements[name].held(self.world.mesh, self.world.rank):
                    if name in shards:
                        inside(shards[name], piece).copy_(outside(value, piece))
        self.model.ops.weights_changed()

    @property
    def placements(self) -> Mapping[str, Placement]:
        """How every weight of the model lies on the mesh."""
        return self.optimizer.placements


def parallelize(config: ModelConfig, world: World, section: TrainSection) -> Parallel:
    """The model of a configuration on the mesh of a world, with the first weights of the section's seed.

    Weights are kept in fp32 and computed with in the section's type, gradients are summed in fp32.
    """
    own, dtype = local_config(config, world.mesh), DTYPES[section.dtype]
    widths = (own.width, own.ffn, *((own.expert_ffn,) if own.experts else ()))
    alone = select(own.head_size, widths=widths, dtype=dtype)
    ops = _ops_around(float8.around(alone) if section.fp8 else alone, world)
    placed = placements(config)

    def on_meta(kind: torch.dtype) -> Decoder:
        model = skeleton(own, ops, kind)
        _own_experts(model, placed, world)
        recompute_layers(model, section.recompute)
        return model

    def sharded(kind: torch.dtype) -> Whole:
        whole = Whole(on_meta(kind))
        _shard(whole, placed, world, dtype)
        whole.to_empty(device=world.device)
        return whole

    passes: Passes
    if world.mesh.pp > 1:
        stages = Stages.cut(config, world.mesh.pp, section.pipeline, section.sequence)
        stages.check(section.micros(world.data_ranks))
        models = [on_meta(dtype) for _ in stages.of(world.mesh.place(world.rank).pp)]
        passes = Pipeline(models, dtype, stages, placed, world)
        named = passes.weights.kept
    else:
        passes = sharded(torch.float32)
        named = dict(passes.model.named_parameters())
    optimizer = ShardedOptimizer(
        named,
        placed,
        world,
        dtype,
        muon=section.optimizer == "muon",
        clip=section.clip,
        weight_decay=section.weight_decay,
        betas=section.betas,
    )
    made = Parallel(config, passes, lambda: sharded(dtype), optimizer, dtype, section.ema)
    made.fill((name, value.to(dtype)) for name, value in initial_weights(config, section.seed))
    return made


def _ops_around(ops: Ops, world: World) -> Ops:
    """The local ops inside those that talk: experts innermost, then heads and columns, then rows."""
    around = {"ep": expert_parallel.around, "tp": tensor_parallel.around, "cp": context_parallel.around}
    for axis, wrap in around.items():
        group = world.group(axis)
        if group is not None:
            ops = wrap(ops, group)
    return ops


def _own_experts(model: Decoder, placed: Mapping[str, Placement], world: World) -> None:
    """Leave each layer the stacks of this rank's experts."""
    for name, placement in placed.items():
        if placement.expert and world.mesh.ep > 1:
            layer, _, short = name.rpartition(".")
            shape = placement.computed_shape(world.mesh)
            setattr(model.get_submodule(layer), short, nn.Parameter(torch.empty(shape, device="meta")))


def _shard(root: Whole, placed: Mapping[str, Placement], world: World, dtype: torch.dtype) -> None:
    """FSDP2 layer by layer and around the whole; gradients are summed, since losses are parts of a sum."""
    assert world.dense is not None and world.expert is not None, "a world with a mesh"
    dense, expert = (mesh["dp", "shard"] for mesh in (world.dense, world.expert))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    info = HSDPMeshInfo(expert, shard_mesh_dim=1, replicate_mesh_dim=0)
    experts = {
        id(root.model.get_parameter(name)): ShardPlacementResult(Shard(placement.shard_dim(world.mesh)), info)
        for name, placement in placed.items()
        if placement.expert
    }

    def of_expert(parameter: nn.Parameter) -> ShardPlacementResult | None:
        return experts.get(id(parameter))

    for layer in root.model.layers:
        fully_shard(layer, mesh=dense, mp_policy=policy, shard_placement_fn=of_expert)
    fully_shard(root, mesh=dense, mp_policy=policy)
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
