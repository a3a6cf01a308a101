"""Direct preference optimisation (DPO, Rafailov et al. 2023): of two answers, the better one becomes likelier.

Dims: R trained tokens of a micro-batch, S its texts (chosen, rejected, chosen, …), P its pairs, H width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lapis.data.loader import TokenBatch
from lapis.data.samples import Samples, packed_batches
from lapis.model.families import Decoder
from lapis.tokenizer.bpe import Tokenizer
from lapis.train.objective import Measure, Sampled, StepBatch
from lapis.train.ops_around import counts, over_rows, row_by_row
from lapis.train.recipe import DpoSection, TrainSection
from lapis.train.reference import Reference, of_whole
from lapis.train.sft import Rows, facts_of, head_of, share_of_step, trained_rows


class Judged(NamedTuple):
    """The pairs of a micro-batch: their losses, margins, and the slope of the loss by each text's log probability."""

    losses_P: Tensor
    margin_P: Tensor
    slope_S: Tensor


class Preferences:
    """The objective over pairs of answers. The reference is the model as it was when the run began."""

    def __init__(
        self,
        section: TrainSection,
        dpo: DpoSection,
        samples: Samples,
        tokenizer: Tokenizer,
        origin: Mapping[str, Any] | None = None,
    ) -> None:
        self.section, self.dpo, self.samples, self.tokenizer = section, dpo, samples, tokenizer
        self.origin = origin or {}  # what the start event tells of the model
        self._reference: Reference | None = None
        self._known: dict[bytes, float] = {}  # the reference's log probability of each text, computed once
        self._margins: list[float] = []  # of the last step

    @property
    def digest(self) -> str:
        """That of the samples."""
        return self.samples.digest

    def facts(self) -> Mapping[str, Any]:
        """How many pairs there are, and for which model."""
        return {**facts_of(self.samples), **self.origin}

    def begin(self, model: Decoder, reference: Callable[[], Reference] | None = None) -> None:
        """Keep the first weights: with adapters the frozen base itself, else a second copy."""
        self._reference = of_whole(model) if reference is None else reference()

    def step(self, step: int, rank: int, ranks: int) -> StepBatch:
        """The rank's pairs of a step, packed; every pair counts the same."""
        self._margins = []
        return share_of_step(self.samples.trained, self.section, step, rank, ranks, lambda pair: 1)

    def loss(self, model: Decoder, micro: TokenBatch, weight: float) -> Tensor:
        """Sum of the pairs' losses over `weight`.

        The log probabilities are taken without a gradient; it then flows through every token's cross-entropy, times
        the slope of the loss: so logits are never whole.
        """
        rows = trained_rows(model, micro)
        judged = self._judge(model, micro, rows)
        weights_R = -judged.slope_S[rows.sequence_R] * rows.weights_R
        path = row_by_row(model.ops).linear_cross_entropy(
            rows.x_RH, head_of(model), rows.targets_R, weights_R
        )
        self._margins += judged.margin_P.tolist()
        own = judged.losses_P.sum() * counts(model.ops)
        return (own + path - path.detach()) / weight

    def metrics(self) -> Mapping[str, float]:
        """Of the last step: the part of pairs whose better answer gained more, and the mean margin, times beta."""
        return _told(self._margins)

    def answered(self) -> Sequence[Sampled]:
        """It asks the model nothing."""
        return ()

    def heldout(self, measure: Measure) -> Mapping[str, float]:
        """Mean loss, accuracy and margin over the held-out pairs."""
        section, held = self.section, self.samples.heldout
        if not held:
            return {}

        def figures(model: Decoder, micro: TokenBatch) -> Tensor:
            judged = self._judge(model, micro, trained_rows(model, micro))
            found = (judged.losses_P, judged.margin_P > 0, judged.margin_P)
            return torch.stack([part.double().sum() for part in found]) * counts(model.ops)

        micros = list(packed_batches(held, section.sequence * (section.micro_batch or 1)))
        loss, right, margin = (total / len(held) for total in measure(figures, micros))
        return {"loss": loss, "accuracy": right, "margin": margin}

    @torch.no_grad()
    def _judge(self, model: Decoder, micro: TokenBatch, rows: Rows) -> Judged:
        policy_S = _text_logprobs(model, micro, rows)
        reference_S = self._reference_logprobs(micro).to(policy_S.device)
        return judge(policy_S, reference_S, self.dpo.beta, self.dpo.label_smoothing, pairs=_texts(micro) // 2)

    def _reference_logprobs(self, micro: TokenBatch) -> Tensor:
        assert self._reference is not None, "the objective has begun"
        names = _names(micro)
        if self._reference.wanted(not self._known.keys() >= set(names)):
            found_S = self._reference.find(
                lambda model: _text_logprobs(model, micro, trained_rows(model, micro, adapted=False))
            )
            self._known.update(zip(names, found_S.tolist(), strict=True))
        return torch.tensor([self._known[name] for name in names])


def judge(policy_S: Tensor, reference_S: Tensor, beta: float, smoothing: float, pairs: int) -> Judged:
    """Losses of the first `pairs` from the log probabilities of texts (equation 7; label smoothing as in cDPO)."""
    gain_S, texts = policy_S - reference_S, 2 * pairs
    margin_P = beta * (gain_S[0:texts:2] - gain_S[1:texts:2])
    losses_P = (1 - smoothing) * F.softplus(-margin_P) + smoothing * F.softplus(margin_P)
    slope_P = smoothing - torch.sigmoid(-margin_P)
    slope_S = torch.zeros_like(gain_S)
    slope_S[0:texts:2], slope_S[1:texts:2] = beta * slope_P, -beta * slope_P
    return Judged(losses_P, margin_P, slope_S)


@torch.no_grad()
def _text_logprobs(model: Decoder, micro: TokenBatch, rows: Rows) -> Tensor:
    """Sum of the trained tokens' log probabilities of each text: fp32 (S,)."""
    logprob_R = row_by_row(model.ops).linear_logprobs(rows.x_RH.detach(), head_of(model), rows.targets_R)
    sums_S = torch.zeros(len(micro.lengths), device=logprob_R.device)
    return over_rows(model.ops, sums_S.index_add_(0, rows.sequence_R, logprob_R * rows.weights_R))


def _texts(micro: TokenBatch) -> int:
    """How many texts are trained on: those behind them only fill the micro-batch."""
    assert micro.weights_T is not None, "examples say what is trained on"
    ends = np.cumsum(micro.lengths)
    trained = np.flatnonzero(micro.weights_T)
    return int(np.searchsorted(ends, trained[-1], side="right")) + 1 if len(trained) else 0


def _names(micro: TokenBatch) -> list[bytes]:
    """What tells texts apart: their tokens, and where the trained part begins."""
    assert micro.weights_T is not None, "examples say what is trained on"
    names, start = [], 0
    for length in micro.lengths:
        part = slice(start, start + length)
        weights = micro.weights_T[part]
        names.append(micro.ids_T[part].tobytes() + micro.targets_T[part][-1:].tobytes() + weights.tobytes())
        start += length
    return names


def _told(margins: list[float]) -> dict[str, float]:
    if not margins:
        return {}
    right = sum(margin > 0 for margin in margins)
    return {"accuracy": right / len(margins), "margin": sum(margins) / len(margins)}
