"""Pipeline parallel: every rank computes some stages of layers, micro-batches travel through them as hidden rows.

The schedules are torch's (GPipe; 1F1B; Interleaved 1F1B, Narayanan et al. 2021; zero bubble and its V, Qi et al. 2023).
Every rank knows the micro-batches of a step, so a stage is told the number of one and looks up ids and documents.

Dims: T tokens of a micro-batch, H width, R rows of it between the layers of this rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)

from lapis.data.loader import TokenBatch
from lapis.kernels.batch import packed
from lapis.model.families import Decoder
from lapis.train.placement import Placement
from lapis.train.stage_weights import StageWeights
from lapis.train.stages import PER_RANK, Stages
from lapis.train.world import World

Loss = Callable[[Decoder, TokenBatch], Tensor]
SCHEDULES: Mapping[str, Any] = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved": ScheduleInterleaved1F1B,
    "zero-bubble": ScheduleInterleavedZeroBubble,
    "zero-bubble-v": ScheduleZBVZeroBubble,
}


class Stage(nn.Module):
    """A decoder that lost what other stages have: it begins with the rows that came, or ends with those that go."""

    def __init__(self, model: Decoder, stages: Stages, index: int) -> None:
        super().__init__()
        self.is_first, self.is_last = index == 0, index == len(stages.spans) - 1
        self.rows: Tensor | None = None  # of the micro-batch that is computed now
        self.micros: Sequence[TokenBatch] = ()
        self.loss: Loss | None = None
        for name, _ in list(model.named_parameters(recurse=False)):
            if not stages.uses(index, name):
                delattr(model, name)
        layers = nn.ModuleList()
        for layer in stages.spans[index]:
            layers.add_module(str(layer), model.layers[layer])  # by its name in the whole model
        model.layers = layers
        if not self.is_first:
            setattr(model, "embedded", self._came)  # noqa: B010
        if not self.is_last:
            setattr(model, "normed", _unchanged)  # noqa: B010
        self.model = model

    def forward(self, *rows: Tensor, number: Tensor) -> Tensor:
        """Rows (R, H) for the next stage; from the last one the micro-batch's part of the loss, (1,)."""
        (self.rows,), micro = rows or (None,), self.micros[int(number)]
        if self.is_last:
            assert self.loss is not None, "a step has a loss"
            return self.loss(self.model, micro).reshape(1)
        return self.model.hidden(torch.from_numpy(micro.ids_T), packed(micro.lengths))

    def _came(self, *_: object) -> Tensor:
        assert self.rows is not None, "the stage before sent them"
        return self.rows


class Pipeline:
    """This rank's stages; each of `models` is a whole skeleton that becomes one of them."""

    def __init__(
        self,
        models: Sequence[Decoder],
        dtype: torch.dtype,
        stages: Stages,
        placed: Mapping[str, Placement],
        world: World,
    ) -> None:
        self.world, self.stages, self.dtype = world, stages, dtype
        self.rank = world.mesh.place(world.rank).pp
        self.local = [
            Stage(model, stages, index) for model, index in zip(models, stages.of(self.rank), strict=True)
        ]
        wholes: dict[str, nn.Parameter] = {}
        for stage in self.local:
            for name, parameter in list(stage.model.named_parameters()):
                if name not in wholes:
                    wholes[name] = nn.Parameter(torch.empty_like(parameter, device=world.device))
                owner, _, short = name.rpartition(".")
                setattr(stage.model.get_submodule(owner), short, wholes[name])
        self.weights = StageWeights(wholes, placed, world, stages)
        self._made: tuple[tuple[int, int], Any] | None = None  # the schedule of the last step's shape

    @property
    def model(self) -> Decoder:
        """The model of this rank's first stage."""
        return self.local[0].model

    def backward(self, loss: Loss, micros: Sequence[TokenBatch]) -> float:
        """Pass micro-batches of equal length through all stages and back; on the last stage their loss, else 0."""
        self.weights.gather()
        self.model.ops.weights_changed()
        for stage in self.local:
            stage.micros, stage.loss = micros, loss
        numbers = torch.arange(len(micros))
        losses: list[Tensor] = []
        given = {"target": numbers, "losses": losses} if any(stage.is_last for stage in self.local) else {}
        self._schedule(len(micros[0].ids_T), len(micros)).step(number=numbers, return_outputs=False, **given)
        return math.fsum(value.item() for value in losses)

    def finish(self) -> None:
        """Give this rank's shards the gradients of the step."""
        self.weights.reduce()

    def _schedule(self, tokens: int, micros: int) -> Any:
        if self._made is None or self._made[0] != (tokens, micros):
            stages = [
                _Scheduled(stage, index, tokens, self)
                for stage, index in zip(self.local, self.stages.of(self.rank), strict=True)
            ]
            schedule = self.stages.schedule
            self._made = (
                (tokens, micros),
                SCHEDULES[schedule](
                    stages if PER_RANK[schedule] > 1 else stages[0], micros, loss_fn=_sum, scale_grads=False
                ),
            )
        return self._made[1]


class _Scheduled(PipelineStage):
    """A stage as torch's schedules see it. They ask for gradients of inputs and of weights, together or apart."""

    def __init__(self, stage: Stage, index: int, tokens: int, pipeline: Pipeline) -> None:
        mesh, width = pipeline.world.mesh, stage.model.config.width
        rows_RH = torch.empty(
            tokens // (mesh.cp * mesh.tp), width, dtype=pipeline.dtype, device="meta", requires_grad=True
        )
        loss = torch.empty(1, device="meta", requires_grad=True)
        assert pipeline.world.dense is not None
        super().__init__(
            stage,
            index,
            len(pipeline.stages.spans),
            pipeline.world.device,
            input_args=() if stage.is_first else (rows_RH,),
            output_args=(loss if stage.is_last else rows_RH,),
            group=pipeline.world.dense["pp"].get_group(),
        )
        self.weights = pipeline.weights
        self.names = [name for name, _ in stage.model.named_parameters()]

    def backward_one_chunk(self, *args: Any, **kwargs: Any) -> None:
        super().backward_one_chunk(*args, **kwargs)
        self.weights.fold(self.names)

    def backward_weight_one_chunk(self, *args: Any, **kwargs: Any) -> None:
        super().backward_weight_one_chunk(*args, **kwargs)
        self.weights.fold(self.names)


def _unchanged(x_TH: Tensor) -> Tensor:
    return x_TH


def _sum(loss: Tensor, number: Tensor) -> Tensor:
    return loss.sum()
