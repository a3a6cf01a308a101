"""From what is asked of a fine-tuning to what is trained: "auto" decided, epochs as steps. Pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lapis.errors import InputError

Kind = Literal["supervised", "dpo", "reinforcement"]

EPOCHS = 3  # by default, for sets of a usual size
SEEN = (100, 25_000)  # examples: small sets are gone through more often, large ones less
MOST_EPOCHS = 25  # that "auto" chooses
MOST_BATCH = 8  # that "auto" chooses
PROMPTS = 4  # in a step of reinforcement, by default
GROUP = 8  # answers to a prompt
GROUPS = (2, 64)
ANSWER = 128  # tokens of an answer, where the context has room for them
LEAST_ANSWER = 8
RATES = {"supervised": 1e-3, "dpo": 2e-4, "reinforcement": 3e-4}  # of AdamW, for adapters
BETAS = {"supervised": 0.0, "dpo": 0.1, "reinforcement": 0.04}
BETWEEN = 64  # most steps between two checkpoints
PASS = 2048  # tokens of a forward pass
ROUND = 32  # a sequence's length is a multiple of this


@dataclass(frozen=True)
class Hyperparameters:
    """What a request may say of a fine-tuning; None stands for "auto"."""

    n_epochs: int | None = None
    batch_size: int | None = None
    learning_rate_multiplier: float | None = None
    beta: float | None = None
    compute_multiplier: float | None = None
    eval_interval: int | None = None


@dataclass(frozen=True)
class Plan:
    """What is trained. A checkpoint every `interval` steps; those of every `kept` steps, and the last, are served."""

    n_epochs: int
    batch_size: int
    learning_rate_multiplier: float
    lr: float
    beta: float
    steps: int
    interval: int
    kept: int
    sequence: int
    micro_batch: int
    group: int  # answers to a prompt; 1 where there are none
    max_tokens: int  # of an answer; 0 where there are none

    def is_kept(self, step: int) -> bool:
        """Whether the checkpoint of a step is one that can be served."""
        return step == self.steps or (step > 0 and step % self.kept == 0)


def make_plan(kind: Kind, asked: Hyperparameters, examples: int, longest: int, context: int) -> Plan:
    """Decide what was left open, for so many examples of which the longest has so many tokens.

    Raises InputError where a prompt leaves no room for an answer in the model's context.
    """
    batch = asked.batch_size or _batch(kind, examples)
    batch = min(batch, examples)
    epochs = asked.n_epochs or _epochs(examples)
    group = _group(asked.compute_multiplier) if kind == "reinforcement" else 1
    answer = _answer(longest, context) if kind == "reinforcement" else 0
    sequence = min(context, -(-(longest + answer) // ROUND) * ROUND)
    interval, kept = _pace(-(-examples // batch), asked.eval_interval)
    steps = epochs * -(-examples // batch) if asked.eval_interval else epochs * kept
    multiplier = asked.learning_rate_multiplier or 1.0
    return Plan(
        n_epochs=epochs,
        batch_size=batch,
        learning_rate_multiplier=multiplier,
        lr=RATES[kind] * multiplier,
        beta=BETAS[kind] if asked.beta is None else asked.beta,
        steps=steps,
        interval=min(interval, steps),
        kept=min(kept, steps),
        sequence=sequence,
        micro_batch=_divisor(batch * group, PASS // sequence)
        if group > 1
        else max(1, min(batch, PASS // sequence)),
        group=group,
        max_tokens=answer,
    )


def _batch(kind: Kind, examples: int) -> int:
    return PROMPTS if kind == "reinforcement" else max(1, min(MOST_BATCH, examples // 16))


def _epochs(examples: int) -> int:
    least, most = SEEN
    if examples * EPOCHS < least:
        return min(MOST_EPOCHS, max(EPOCHS, least // examples))
    return max(1, min(EPOCHS, most // examples))


def _group(multiplier: float | None) -> int:
    least, most = GROUPS
    return max(least, min(most, round(GROUP * (multiplier or 1.0))))


def _answer(longest: int, context: int) -> int:
    room = context - longest
    if room < LEAST_ANSWER:
        raise InputError(
            f"The longest prompt has {longest:,} tokens; the model's context of {context:,} leaves no room for an "
            "answer."
        )
    return min(ANSWER, room)


def _pace(epoch: int, interval: int | None) -> tuple[int, int]:
    """Steps between two checkpoints, and between two that are kept: an epoch, lengthened to a multiple."""
    if interval is not None:
        return interval, interval
    parts = -(-epoch // BETWEEN)
    between = -(-epoch // parts)
    return between, between * parts


def _divisor(whole: int, most: int) -> int:
    """The largest divisor of a number that is not above `most`, or 1."""
    return next(part for part in range(max(1, min(whole, most)), 0, -1) if whole % part == 0)
