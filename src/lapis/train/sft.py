"""Supervised fine-tuning: loss on what the assistant says in chats, or on completions, and on nothing else.

Dims: T tokens of a micro-batch, R of them trained on, H width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lapis.data.loader import TokenBatch
from lapis.data.samples import Sample, Samples, of_step, packed_batches
from lapis.errors import ConfigError
from lapis.kernels.batch import packed
from lapis.model.families import Decoder
from lapis.tokenizer.bpe import Tokenizer
from lapis.train.lora import bare
from lapis.train.objective import Measure, Sampled, StepBatch
from lapis.train.ops_around import own_rows, row_by_row
from lapis.train.recipe import TrainSection
from lapis.train.reference import Reference


class Supervised:
    """The objective over examples: a step is `train.batch` of them, every trained token counts the same."""

    def __init__(
        self,
        section: TrainSection,
        samples: Samples,
        tokenizer: Tokenizer,
        origin: Mapping[str, Any] | None = None,
    ) -> None:
        self.section, self.samples, self.tokenizer = section, samples, tokenizer
        self.origin = origin or {}  # what the start event tells of the model

    @property
    def digest(self) -> str:
        """That of the samples."""
        return self.samples.digest

    def facts(self) -> Mapping[str, Any]:
        """How many examples there are, and for which model."""
        return {**facts_of(self.samples), **self.origin}

    def begin(self, model: Decoder, reference: Callable[[], Reference] | None = None) -> None:
        """Nothing is needed of the first weights."""

    def step(self, step: int, rank: int, ranks: int) -> StepBatch:
        """The rank's examples of a step, packed."""
        return share_of_step(self.samples.trained, self.section, step, rank, ranks, _trained_tokens)

    def loss(self, model: Decoder, micro: TokenBatch, weight: float) -> Tensor:
        """Sum of the trained tokens' cross-entropies in nats over `weight`, logits of those tokens only."""
        rows, ops = trained_rows(model, micro), row_by_row(model.ops)
        return ops.linear_cross_entropy(rows.x_RH, head_of(model), rows.targets_R, rows.weights_R) / weight

    def metrics(self) -> Mapping[str, float]:
        """Nothing but the loss."""
        return {}

    def answered(self) -> Sequence[Sampled]:
        """It asks the model nothing."""
        return ()

    def heldout(self, measure: Measure) -> Mapping[str, float]:
        """Mean loss in nats per trained token of the held-out examples."""
        section, held = self.section, self.samples.heldout
        if not held:
            return {}
        micros = list(packed_batches(held, section.sequence * (section.micro_batch or 1)))
        (total,) = measure(lambda model, micro: self.loss(model, micro, 1.0).reshape(1), micros)
        return {"loss": total / sum(map(_trained_tokens, held))}


class Rows(NamedTuple):
    """The rows of a micro-batch that this rank trains on. At least one, of weight 0 where there is none."""

    x_RH: Tensor  # final hidden rows
    targets_R: Tensor
    weights_R: Tensor
    sequence_R: Tensor  # which of the micro-batch's texts each row belongs to
    place_R: Tensor  # where in the micro-batch


def trained_rows(model: Decoder, micro: TokenBatch, *, adapted: bool = True) -> Rows:
    """Run the model over a micro-batch and pick the rows whose next token is trained on, of those that this rank has.

    `adapted` says whether adapters in training take part.
    """
    assert micro.weights_T is not None, "examples say what is trained on"
    batch = packed(micro.lengths)
    x_TH = model.hidden(torch.from_numpy(micro.ids_T), batch if adapted else bare(batch, model.config.layers))
    own = own_rows(model.ops, torch.arange(len(micro.ids_T))).numpy()
    chosen = np.flatnonzero(micro.weights_T[own])
    chosen = chosen if len(chosen) else np.zeros(1, dtype=np.int64)
    place, sequence_T = own[chosen], np.repeat(np.arange(len(micro.lengths)), micro.lengths)
    arrays = (chosen, micro.targets_T[place], micro.weights_T[place], sequence_T[place], place)
    chosen_R, *facts = (torch.from_numpy(array).to(x_TH.device) for array in arrays)
    return Rows(row_by_row(model.ops).embedding(chosen_R, x_TH), *facts)


def share_of_step(
    samples: Sequence[Sample], section: TrainSection, step: int, rank: int, ranks: int, weigh: Any
) -> StepBatch:
    """A rank's part of a step: every `ranks`-th sample; every rank has as many micro-batches. Raises ConfigError.

    A micro-batch has at most train.micro_batch × train.sequence tokens (by default as many as the whole share).
    """
    if section.batch < ranks:
        raise ConfigError(
            f"train.batch = {section.batch} examples cannot be shared by {ranks} data-parallel ranks.",
            param="train.batch",
        )
    chosen = of_step(samples, step, section.batch, section.seed)
    longest = (section.micro_batch or -(-section.batch // ranks)) * section.sequence
    shares = [
        tuple(packed_batches([samples[n] for n in chosen[other::ranks]], longest)) for other in range(ranks)
    ]
    tokens = sum(len(micro.ids_T) for share in shares for micro in share)
    most = max(map(len, shares))
    micros = shares[rank] + (shares[rank][0].nothing(),) * (most - len(shares[rank]))
    return StepBatch(micros, float(sum(weigh(samples[n]) for n in chosen)), chosen[rank::ranks], tokens)


def facts_of(samples: Samples) -> dict[str, Any]:
    """What the start event tells of a fine-tuning set."""
    return {
        "tokens": samples.tokens,
        "dataset_digest": samples.digest,
        "examples": len(samples.trained),
        "heldout_examples": len(samples.heldout),
        "dropped_examples": samples.dropped,
    }


def _trained_tokens(sample: Sample) -> int:
    return sum(text.targets for text in sample)


def head_of(model: Decoder) -> Tensor:
    """The (V, H) matrix that makes logits, in training."""
    head = model.head_weight
    assert isinstance(head, Tensor), "a quantised model is not trained"
    return head
