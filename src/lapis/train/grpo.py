"""Group relative policy optimisation (GRPO, Shao et al. 2024): of several answers, those above the mean are likelier.

A step samples its answers by the weights as they are, grades them and learns from them once. Where kernels are
bit-exact, the sampler's log probabilities are the trainer's, so the ratio of the two is exactly 1; elsewhere the
clipped ratio corrects for the difference.

Dims: R answer tokens of a micro-batch, N facts of a token (log probability when sampled, advantage), H width.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lapis.data.loader import TokenBatch
from lapis.data.prompts import Asked, Prompts
from lapis.data.samples import of_step
from lapis.kernels.ops import Ops
from lapis.model.families import Decoder
from lapis.model.manifest import Manifest
from lapis.model.weights import DTYPES, LoadedModel
from lapis.tokenizer.bpe import Tokenizer
from lapis.train.objective import Measure, Sampled, StepBatch
from lapis.train.recipe import GrpoSection, TrainSection
from lapis.train.reference import Reference, first_weights
from lapis.train.reward import Reward
from lapis.train.rollout import Answer, answers, gather, sampled_from, seed_of
from lapis.train.sft import Rows, head_of, trained_rows

TOLD = 4  # answers that are told at a time, for people to read
LEAST_STD = 1e-4  # added to a group's deviation, so that differences of rounding are not blown up
CHUNK = 256  # rows whose logits exist at a time where the temperature is not 1


@dataclass(frozen=True)
class Graded:
    """An answer, its reward, and how far that is above its group's mean, in deviations."""

    answer: Answer
    reward: float
    advantage: float


class Judged(NamedTuple):
    """Of each answer token: its loss, the slope of it by the token's log probability, the ratio, the divergence."""

    loss_R: Tensor
    slope_R: Tensor
    ratio_R: Tensor
    kl_R: Tensor


class GroupRelative:
    """The objective over prompts: a step is `train.batch` of them, each answered `grpo.group` times."""

    def __init__(
        self,
        section: TrainSection,
        grpo: GrpoSection,
        prompts: Prompts,
        reward: Reward,
        tokenizer: Tokenizer,
        manifest: Manifest,
        origin: Mapping[str, Any] | None = None,
    ) -> None:
        self.section, self.grpo, self.prompts, self.reward = section, grpo, prompts, reward
        self.tokenizer, self.manifest = tokenizer, manifest
        self.origin = origin or {}  # what the start event tells of the model
        self._trained: Decoder | None = None
        self._loaded: LoadedModel | None = None  # what answers are sampled from
        self._reference: Decoder | None = None
        # of the last step: what its answers tell; by micro-batch the largest |ratio - 1|, divergences, answers
        self._told: dict[str, float] = {}
        self._noted: list[tuple[float, float, float]] = []
        self._read: list[tuple[Answer, float]] = []  # some answers, with their rewards

    @property
    def digest(self) -> str:
        """That of the prompts. Not of the reward's file: a run goes on when it was mended."""
        return self.prompts.digest

    def facts(self) -> Mapping[str, Any]:
        """How many prompts there are, for which model, and what grades its answers."""
        prompts = self.prompts
        return {
            "tokens": prompts.tokens,
            "dataset_digest": prompts.digest,
            "examples": len(prompts.trained),
            "heldout_examples": len(prompts.heldout),
            "dropped_examples": prompts.dropped,
            "reward": self.reward.name,
            "reward_digest": self.reward.digest,
            **self.origin,
        }

    def begin(self, model: Decoder, reference: Callable[[], Reference] | None = None) -> None:
        """Answers come from this model. With `beta` its first weights are the reference."""
        whole = sampled_from(model, DTYPES[self.section.dtype])
        gather(whole, model)
        self._trained = model
        self._loaded = LoadedModel(whole, model.config, self.tokenizer, None, self.manifest)
        self._reference = first_weights(whole) if self.grpo.beta else None

    def step(self, step: int, rank: int, ranks: int) -> StepBatch:
        """The rank's prompts of a step, answered and graded. Raises InputError if the reward fails, TrainingError."""
        section, group = self.section, self.grpo.group
        _, micro = section.shares(ranks, group)
        begun = time.monotonic()
        graded = self.graded(step, rank, ranks)
        seconds = time.monotonic() - begun
        micros = tuple(joined(graded[start : start + micro]) for start in range(0, len(graded), micro))
        own = sum(len(one.ids_T) for one in micros)
        figures = averaged({**told(graded, group), "tokens": own}, ranks)
        tokens = round(figures.pop("tokens") * ranks)
        self._told, self._noted = figures, []
        if not self.prompts.heldout:
            self._read = [(one.answer, one.reward) for one in graded[::group]][:TOLD]
        samples = self._chosen(step)[rank::ranks]
        return StepBatch(micros, float(section.batch * group), samples, tokens, seconds)

    def prompts_of(self, step: int) -> list[Asked]:
        """The prompts of a step."""
        return [self.prompts.trained[number] for number in self._chosen(step)]

    def graded(self, step: int, rank: int = 0, ranks: int = 1, most: int | None = None) -> list[Graded]:
        """The answers of a rank to its (at most so many) prompts of a step, group by group, with rewards."""
        group, section = self.grpo.group, self.section
        wanted = [
            (asked, seed_of(section.seed, step, place * group + number))
            for place, asked in list(enumerate(self.prompts_of(step)))[rank::ranks][:most]
            for number in range(group)
        ]
        found = self._answers(wanted, self.grpo.temperature)
        rewards = [self.reward(answer.asked, answer.text) for answer in found]
        values = [
            value for start in range(0, len(rewards), group) for value in advantages(rewards[start:][:group])
        ]
        return [Graded(*item) for item in zip(found, rewards, values, strict=True)]

    def loss(self, model: Decoder, micro: TokenBatch, weight: float) -> Tensor:
        """Sum of the answers' mean losses over `weight` (equation 3 of the paper, its sign turned).

        The log probabilities are taken without a gradient; it then flows through every token's cross-entropy, times
        the slope of the loss: so logits are never whole.
        """
        rows = trained_rows(model, micro)
        judged = self._judge(model, micro, rows)
        path = self._nll(model, rows, -judged.slope_R * rows.weights_R)
        self._note(judged, rows)
        return ((judged.loss_R * rows.weights_R).sum() + path - path.detach()) / weight

    def metrics(self) -> Mapping[str, float]:
        """Of the last step: what `told` tells; of this rank the largest |ratio - 1|, an answer's mean divergence."""
        if not self._noted:
            return self._told
        offs, divergences, counts = zip(*self._noted, strict=True)
        kl = {"kl": sum(divergences) / sum(counts)} if self._reference is not None else {}
        return {**self._told, "ratio_off": max(offs), **kl}

    def answered(self) -> Sequence[Sampled]:
        """Answers to the first held-out prompts; where there are none, to some of this rank's last step."""
        return [
            Sampled(self.tokenizer.decode(answer.asked.ids, special=True), answer.text, reward)
            for answer, reward in self._read
        ]

    def heldout(self, measure: Measure) -> Mapping[str, float]:
        """Mean reward and length over the held-out prompts, answered with the likeliest tokens by every rank."""
        found = self._answers([(asked, 0) for asked in self.prompts.heldout], 0.0)
        if not found:
            return {}
        rewards = [self.reward(answer.asked, answer.text) for answer in found]
        lengths = [len(answer.ids) for answer in found]
        self._read = list(zip(found, rewards, strict=True))[:TOLD]
        return {"reward": statistics.fmean(rewards), "length": statistics.fmean(lengths)}

    def _chosen(self, step: int) -> tuple[int, ...]:
        return of_step(self.prompts.trained, step, self.section.batch, self.section.seed)

    def _answers(self, wanted: Sequence[tuple[Asked, int]], temperature: float) -> list[Answer]:
        assert self._loaded is not None and self._trained is not None, "the objective has begun"
        if not wanted:
            return []
        gather(self._loaded.model, self._trained)
        return answers(self._loaded, wanted, max_tokens=self.grpo.max_tokens, temperature=temperature)

    @torch.no_grad()
    def _judge(self, model: Decoder, micro: TokenBatch, rows: Rows) -> Judged:
        assert micro.facts_NT is not None, "a batch of this objective"
        old_R, advantage_R = torch.from_numpy(micro.facts_NT).to(rows.x_RH.device)[:, rows.place_R]
        policy_R, reference_R = self._logprobs(model, rows), None
        if self._reference is not None:
            reference_R = self._logprobs(self._reference, trained_rows(self._reference, micro, adapted=False))
        return judge(policy_R, old_R, advantage_R, reference_R, self.grpo.clip, self.grpo.beta)

    @torch.no_grad()
    def _logprobs(self, model: Decoder, rows: Rows) -> Tensor:
        x_RH, head = rows.x_RH.detach(), head_of(model)
        if self.grpo.temperature == 1:
            return model.ops.linear_logprobs(x_RH, head, rows.targets_R)
        parts = [
            tempered(model.ops, x_RH[part], head, rows.targets_R[part], self.grpo.temperature)
            for part in chunks(len(x_RH))
        ]
        return torch.cat(parts)

    def _nll(self, model: Decoder, rows: Rows, weights_R: Tensor) -> Tensor:
        """Sum of weight · negative log probability, chunk by chunk."""
        head = head_of(model)
        if self.grpo.temperature == 1:
            return model.ops.linear_cross_entropy(rows.x_RH, head, rows.targets_R, weights_R)
        total = rows.x_RH.new_zeros((), dtype=torch.float32)
        for part in chunks(len(rows.x_RH)):
            given = (model.ops, rows.x_RH[part], head, rows.targets_R[part], self.grpo.temperature)
            logprob_R: Tensor = checkpoint(tempered, *given, use_reentrant=False, preserve_rng_state=False)
            total = total - (logprob_R * weights_R[part]).sum()
        return total

    def _note(self, judged: Judged, rows: Rows) -> None:
        off = (judged.ratio_R - 1).abs().max()
        kl = (judged.kl_R * rows.weights_R).sum()
        self._noted.append((float(off), float(kl), float(rows.weights_R.sum())))


def judge(
    policy_R: Tensor, old_R: Tensor, advantage_R: Tensor, reference_R: Tensor | None, clip: float, beta: float
) -> Judged:
    """What each token costs: the clipped surrogate, and `beta` times an unbiased estimate of the divergence.

    The estimate is Schulman's, e^d - d - 1 with d the reference's log probability over the model's.
    """
    ratio_R = (policy_R - old_R).exp()
    free_R, bound_R = ratio_R * advantage_R, ratio_R.clamp(1 - clip, 1 + clip) * advantage_R
    loss_R, slope_R = -torch.minimum(free_R, bound_R), torch.where(free_R <= bound_R, -free_R, 0.0)
    if reference_R is None:
        return Judged(loss_R, slope_R, ratio_R, torch.zeros_like(loss_R))
    gap_R = reference_R - policy_R
    kl_R = gap_R.exp() - gap_R - 1
    return Judged(loss_R + beta * kl_R, slope_R + beta * (1 - gap_R.exp()), ratio_R, kl_R)


def advantages(rewards: Sequence[float]) -> list[float]:
    """How far each reward of a group is above their mean, in standard deviations."""
    spread = statistics.pstdev(rewards) + LEAST_STD
    middle = statistics.fmean(rewards)
    return [(reward - middle) / spread for reward in rewards]


def joined(graded: Sequence[Graded]) -> TokenBatch:
    """Prompts with their answers laid one after the other; each answer's tokens count 1 together."""
    parts = [_part(one) for one in graded]
    ids_T, targets_T, weights_T, facts_NT = (
        np.concatenate(column, axis=-1) for column in zip(*parts, strict=True)
    )
    return TokenBatch(ids_T, targets_T, tuple(len(part[0]) for part in parts), weights_T, facts_NT)


def _part(graded: Graded) -> tuple[NDArray[Any], ...]:
    answer = graded.answer
    ids = np.array([*answer.asked.ids, *answer.ids], dtype=np.int64)
    count = len(answer.ids)
    weights_T = np.zeros(len(ids) - 1, dtype=np.float32)
    facts_NT = np.zeros((2, len(ids) - 1), dtype=np.float32)
    weights_T[-count:] = 1 / count
    facts_NT[0, -count:], facts_NT[1, -count:] = answer.logprobs, graded.advantage
    return ids[:-1], ids[1:], weights_T, facts_NT


def told(graded: Sequence[Graded], group: int) -> dict[str, float]:
    """Mean reward, mean deviation inside a group, share of groups whose rewards are equal, lengths, share cut off."""
    groups = [[one.reward for one in graded[start : start + group]] for start in range(0, len(graded), group)]
    return {
        "reward": statistics.fmean(one.reward for one in graded),
        "reward_std": statistics.fmean(map(statistics.pstdev, groups)),
        "silent_groups": statistics.fmean(float(min(rewards) == max(rewards)) for rewards in groups),
        "length": statistics.fmean(len(one.answer.ids) for one in graded),
        "cut": statistics.fmean(float(one.answer.cut) for one in graded),
    }


def averaged(figures: Mapping[str, float], ranks: int) -> dict[str, float]:
    """The mean over the shares of all ranks, which are of one size."""
    if ranks == 1 or not dist.is_initialized():
        return dict(figures)
    total = torch.tensor(list(figures.values()), dtype=torch.float64)
    dist.all_reduce(total)
    return dict(zip(figures, (total / ranks).tolist(), strict=True))


def tempered(ops: Ops, x_RH: Tensor, head: Tensor, targets_R: Tensor, temperature: float) -> Tensor:
    """Log probabilities of the logits over a temperature: the bits that the engine tells."""
    return ops.logprobs(ops.linear(x_RH, head, fp32=True) / temperature, targets_R)


def chunks(rows: int) -> Iterator[slice]:
    """Rows whose logits exist at a time."""
    return (slice(start, start + CHUNK) for start in range(0, rows, CHUNK))
