"""Pretraining: every token predicts the next one of its own document. Attention never crosses a document's border.

Dims: T tokens of a micro-batch, H width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lapis.data.loader import TokenBatch, TokenLoader
from lapis.data.mixture import Segment, segments_of
from lapis.data.recipe import MixtureConfig
from lapis.data.samples import Tokens, packed_batches
from lapis.data.shards import Dataset
from lapis.errors import InputError
from lapis.kernels.batch import packed
from lapis.model.families import Decoder
from lapis.tokenizer.bpe import Tokenizer
from lapis.train.objective import Measure, Sampled, StepBatch
from lapis.train.recipe import TrainSection
from lapis.train.reference import Reference

HELDOUT_TOKENS = 1 << 15  # that are measured at a checkpoint: enough to tell checkpoints apart, soon done


class Pretraining:
    """The objective over a dataset's training stream, cut into windows of equal length."""

    def __init__(self, section: TrainSection, dataset: Dataset, mixture: MixtureConfig | None = None) -> None:
        self.section, self.dataset = section, dataset
        self.segments = planned(mixture, section)
        self.loader = token_loader(section, dataset, self.segments)
        self.vocabulary = dataset.tokenizer.vocab_size

    def follow(self, segments: Sequence[Segment]) -> None:
        """Take the windows in the order of these segments. Raises ConfigError if the dataset's sources are others."""
        if tuple(segments) != self.segments:
            self.segments = tuple(segments)
            self.loader = token_loader(self.section, self.dataset, segments)

    @property
    def digest(self) -> str:
        """The dataset's."""
        return self.dataset.digest

    @property
    def tokenizer(self) -> Tokenizer:
        """The dataset's."""
        return self.dataset.tokenizer

    def facts(self) -> Mapping[str, Any]:
        """Where the dataset lies and how large it is; of a mixture, how many windows each source has."""
        facts = {
            "tokens": self.dataset.tokens,
            "dataset_digest": self.dataset.digest,
            "dataset": str(self.dataset.folder),
            "heldout_documents": self.dataset.manifest["heldout"]["documents"],
        }
        mixed = self.loader.mixed
        return (
            facts
            if mixed is None
            else {**facts, "windows": dict(zip(mixed.names, mixed.windows, strict=True))}
        )

    def begin(self, model: Decoder, reference: Callable[[], Reference] | None = None) -> None:
        """Token ids must lie below the model's vocabulary from now on."""
        self.vocabulary = model.config.vocab_size

    def step(self, step: int, rank: int, ranks: int) -> StepBatch:
        """The rank's adjacent part of the step's windows. Raises ConfigError if the ranks cannot share them evenly."""
        section = self.section
        share, micro = section.shares(ranks)
        first = step * section.batch + rank * share
        samples = self.loader.samples_at(first, share)
        micros = tuple(
            self.loader.windows(samples[start : start + micro]) for start in range(0, share, micro)
        )
        for number, tokens in enumerate(micros):
            self._check(tokens, samples[number * micro :])
        whole = section.batch * section.sequence
        return StepBatch(micros, float(whole), samples, whole)

    def _check(self, tokens: TokenBatch, samples: Sequence[int]) -> None:
        (beyond,) = np.nonzero(np.maximum(tokens.ids_T, tokens.targets_T) >= self.vocabulary)
        if not len(beyond):
            return
        window, offset = divmod(int(beyond[0]), self.section.sequence)
        offset += int(tokens.ids_T[beyond[0]] < self.vocabulary)  # the target, then
        last = self.loader.pieces(samples[window], offset + 1)[-1]
        place = last.start + last.tokens - 1
        token = int(self.dataset.read(place, 1)[0])
        document = self.dataset.document_of(place)
        raise InputError(
            f"Token {place:,} of {self.dataset.folder} is {token}, beyond the model's vocabulary of "
            f"{self.vocabulary:,}: in {document.path}.",
            hint="Prepare the data with the model's tokenizer: lapis data prepare RECIPE.toml",
        )

    def loss(self, model: Decoder, micro: TokenBatch, weight: float) -> Tensor:
        """Sum of the tokens' cross-entropies in nats, times their weights, over `weight`."""
        return token_loss(model, micro, weight)

    def metrics(self) -> Mapping[str, float]:
        """Nothing but the loss."""
        return {}

    def answered(self) -> Sequence[Sampled]:
        """It asks the model nothing."""
        return ()

    def heldout(self, measure: Measure) -> Mapping[str, float]:
        """Mean loss in nats per token of the first held-out documents; all of them are for `lapis evaluate`."""
        micros, tokens = self._heldout
        if not micros:
            return {}
        (total,) = measure(lambda model, micro: token_loss(model, micro, 1.0).reshape(1), micros)
        return {"loss": total / tokens}

    @cached_property
    def _heldout(self) -> tuple[list[TokenBatch], int]:
        """Held-out text as micro-batches, each document cut to windows, and how many tokens it has."""
        section, end = self.section, self.tokenizer.end_id
        texts = [document.text for document in self.dataset.heldout() if document.text]
        windows: list[Tokens] = []
        left = HELDOUT_TOKENS
        for text in texts:
            ids = np.array([end, *self.tokenizer.encode(text), end], dtype=np.int64)[: left + 1]
            for start in range(0, len(ids) - 1, section.sequence):
                piece = ids[start : start + section.sequence + 1]
                windows.append(Tokens(piece, np.ones(len(piece), dtype=np.bool_)))
            left -= len(ids) - 1
            if left <= 0:
                break
        longest = section.sequence * (section.micro_batch or section.batch)
        return list(packed_batches([(window,) for window in windows], longest)), HELDOUT_TOKENS - left


def token_loss(model: Decoder, micro: TokenBatch, weight: float) -> Tensor:
    """Sum of weight · cross-entropy over the tokens of a micro-batch / `weight`, logits never whole."""
    ids_T, targets_T = torch.from_numpy(micro.ids_T), torch.from_numpy(micro.targets_T)
    weights_T = None if micro.weights_T is None else torch.from_numpy(micro.weights_T)
    head = model.head_weight
    assert isinstance(head, Tensor), "a quantised model is not trained"
    x_TH = model.hidden(ids_T, packed(micro.lengths))
    return model.ops.linear_cross_entropy(x_TH, head, targets_T, weights_T) / weight


def planned(mixture: MixtureConfig | None, section: TrainSection) -> tuple[Segment, ...]:
    """The segments that a recipe's mixture has in a training; none without a mixture."""
    if mixture is None:
        return ()
    return segments_of(mixture, steps=section.steps, step_tokens=section.batch * section.sequence)


def token_loader(section: TrainSection, dataset: Dataset, segments: Sequence[Segment] = ()) -> TokenLoader:
    """The loader of a run's data order."""
    return TokenLoader(
        dataset, sequence=section.sequence, batch=section.batch, seed=section.seed, segments=segments
    )


def trained_tokens(
    section: TrainSection, dataset: Dataset, steps: int, segments: Sequence[Segment] = ()
) -> NDArray[np.int64]:
    """The tokens that the first `steps` steps of a run see, in order: one training window a row."""
    loader = token_loader(section, dataset, segments)
    return np.concatenate([loader.at(step).ids_T for step in range(steps)]).reshape(-1, section.sequence)
