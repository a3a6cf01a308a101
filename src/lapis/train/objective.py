"""What a model is trained towards: the seam between the trainer and pretraining, fine-tuning and the others.

Dims: T tokens of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from lapis.data.loader import TokenBatch
from lapis.model.families import Decoder
from lapis.tokenizer.bpe import Tokenizer


class StepBatch(NamedTuple):
    """What one data-parallel rank works on in one optimizer step."""

    micros: tuple[TokenBatch, ...]  # each is one forward and backward pass
    weight: float  # sum of the weights of all tokens of the step: of all micro-batches of all ranks
    samples: tuple[int, ...]  # what names this rank's samples, so that a bad step can be looked into
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

    def begin(self, model: Decoder) -> None:
        """Called once with the weights that the run starts from, before a checkpoint replaces them."""

    def step(self, step: int, rank: int, ranks: int) -> StepBatch:
        """This data-parallel rank's share of a step (from 0 on); every rank has as many micro-batches."""

    def loss(self, model: Decoder, micro: TokenBatch, weight: float) -> Tensor:
        """Weighted losses of the micro-batch / weight, an fp32 scalar: the shares of a step add up to its loss."""

    def metrics(self) -> Mapping[str, float]:
        """What else the step event tells of the last step."""

    def heldout(self, model: Decoder) -> Mapping[str, float]:
        """How the model does on held-out examples; empty where there are none, or where others measure them."""
