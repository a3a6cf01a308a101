"""What a model is trained towards: the seam between the trainer and pretraining, fine-tuning and the others.

Dims: T tokens of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from lapis.data.loader import TokenBatch
from lapis.model.families import Decoder
from lapis.tokenizer.bpe import Tokenizer
from lapis.train.reference import Reference


class Sampled(NamedTuple):
    """What a model in training wrote to a prompt, and what it was worth where that is graded."""

    prompt: str
    text: str
    reward: float | None = None

    def facts(self) -> dict[str, Any]:
        """For an event."""
        return {name: value for name, value in self._asdict().items() if value is not None}


# what a model finds in a micro-batch: some numbers, this rank's part of a sum
Figures = Callable[[Decoder, TokenBatch], Tensor]
# the sums of such numbers over micro-batches, which all ranks name alike and share, without a gradient
Measure = Callable[[Figures, Sequence[TokenBatch]], list[float]]


class StepBatch(NamedTuple):
    """What one data-parallel rank works on in one optimizer step."""

    micros: tuple[TokenBatch, ...]  # each is one forward and backward pass
    weight: float  # sum of the weights of all tokens of the step: of all micro-batches of all ranks
    samples: tuple[int, ...]  # what names this rank's samples, so that a bad step can be looked into
    tokens: int  # of the step, on all ranks together
    worked_s: float = 0.0  # seconds of making it that were work of the model: answers that it gave


class Objective(Protocol):
    """A step is a pure function of (data, seed, step); its loss is sum(weight · nll) / sum(weight) over all ranks."""

    @property
    def digest(self) -> str:
        """Names the data: a checkpoint of other data is refused."""

    @property
    def tokenizer(self) -> Tokenizer:
        """What made the token ids."""

    def facts(self) -> Mapping[str, Any]:
        """What the start event tells of the data, in plain JSON."""

    def begin(self, model: Decoder, reference: Callable[[], Reference] | None = None) -> None:
        """Called once with the weights that the run starts from, before a checkpoint replaces them.

        `reference` makes what stays as the model is now, where ranks hold parts of it.
        """

    def step(self, step: int, rank: int, ranks: int) -> StepBatch:
        """This data-parallel rank's share of a step (from 0 on); every rank has as many micro-batches."""

    def loss(self, model: Decoder, micro: TokenBatch, weight: float) -> Tensor:
        """Weighted losses of the micro-batch / weight, an fp32 scalar: the shares of a step add up to its loss."""

    def metrics(self) -> Mapping[str, float]:
        """What else the step event tells of the last step."""

    def answered(self) -> Sequence[Sampled]:
        """Some of what the model was asked in the last step or measurement, where it is asked anything."""

    def heldout(self, measure: Measure) -> Mapping[str, float]:
        """How the model does on held-out examples, with a `loss` where it has one; empty where there are none."""


def shared(micros: Sequence[TokenBatch], rank: int, ranks: int) -> list[TokenBatch]:
    """A rank's part of micro-batches; every rank has as many."""
    own = list(micros[rank::ranks])
    return own + [micros[0].nothing()] * (-(-len(micros) // ranks) - len(own))


def of_model(model: Decoder) -> Measure:
    """Measure by a model that this process has all of."""

    @torch.no_grad()
    def measure(figures: Figures, micros: Sequence[TokenBatch]) -> list[float]:
        found = [figures(model, micro).double() for micro in micros]
        total: list[float] = torch.stack(found).sum(0).tolist()
        return total

    return measure
