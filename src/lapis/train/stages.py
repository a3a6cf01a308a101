"""How a pipeline cuts a model into stages, and which rank holds which of them. No torch here.

A stage is a run of neighbouring layers; the first has the embedding, the last the final norm and the head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from lapis.errors import ConfigError
from lapis.model.config import ModelConfig

Pipelining = Literal["gpipe", "1f1b", "interleaved", "zero-bubble", "zero-bubble-v"]
PER_RANK = {"gpipe": 1, "1f1b": 1, "interleaved": 2, "zero-bubble": 2, "zero-bubble-v": 2}


@dataclass(frozen=True)
class Stages:
    """A model cut for some ranks: `spans` are the layers of each stage, `of` says who holds which."""

    spans: tuple[range, ...]
    ranks: int
    schedule: Pipelining
    tied: bool  # the head is the embedding's table, so the last stage computes with a copy of it

    @staticmethod
    def cut(config: ModelConfig, ranks: int, schedule: Pipelining, sequence: int) -> Stages:
        """As even as can be, by the products that a layer (and the head, in the last stage) takes for a token.

        Raises ConfigError if there are more stages than layers.
        """
        count = 1 if ranks == 1 else ranks * PER_RANK[schedule]
        if count > config.layers:
            raise ConfigError(
                f"pp = {ranks} makes {count} stages with train.pipeline = {schedule!r}, but there are only "
                f"{config.layers} layers.",
                hint='Use fewer ranks along pp, or train.pipeline = "1f1b" with one stage a rank.',
                param="train.mesh",
            )
        attention = (
            sequence * config.heads * config.head_size
        )  # a token sees half a window, by key and by value
        costs = [config.layer_parameters(layer, active=True) + attention for layer in range(config.layers)]
        costs[-1] += config.vocab_size * config.width
        return Stages(even(costs, count), ranks, schedule, config.tied)

    def of(self, rank: int) -> tuple[int, ...]:
        """The stages of a rank along pp: every `ranks`-th one, or in a V down the ranks and up again."""
        last = len(self.spans) - 1
        if self.schedule == "zero-bubble-v" and self.ranks > 1:
            return rank, last - rank
        return tuple(range(rank, last + 1, self.ranks))

    def layers(self, rank: int) -> tuple[range, ...]:
        """The layers of a rank, stage by stage."""
        return tuple(self.spans[stage] for stage in self.of(rank))

    def uses(self, stage: int, name: str) -> bool:
        """Whether a stage computes with a weight."""
        if name.startswith("layers."):
            return int(name.split(".")[1]) in self.spans[stage]
        first, last = stage == 0, stage == len(self.spans) - 1
        if name == "embed":
            return first or (self.tied and last)
        return first if name == "positions" else last

    def keeps(self, rank: int, name: str) -> bool:
        """Whether a rank keeps a weight with its optimizer's state: each weight has one such rank along pp."""
        if name == "embed":
            return rank == 0
        return any(self.uses(stage, name) for stage in self.of(rank))

    def borrower(self) -> int | None:
        """The rank whose last stage computes with a copy of the first rank's embedding, if there is one."""
        last = len(self.spans) - 1
        rank = next(rank for rank in range(self.ranks) if last in self.of(rank))
        return rank if self.tied and rank > 0 else None

    def check(self, micros: int) -> None:
        """Raise ConfigError for a number of micro-batches that does not keep the ranks at work."""
        several = PER_RANK[self.schedule] > 1
        if micros >= self.ranks and not (several and micros % self.ranks):
            return
        needs = f"a multiple of {self.ranks}" if several else f"at least {self.ranks}"
        raise ConfigError(
            f"A step has {micros} micro-batches on each data-parallel rank; the pipeline {self.schedule!r} of "
            f"{self.ranks} ranks needs {needs}.",
            hint="Set train.micro_batch to a part of train.batch / (dp · ep · fsdp).",
            param="train.micro_batch",
        )

    def in_flight(self, rank: int, micros: int) -> float:
        """How many micro-batches a rank keeps the activations of at most."""
        if self.ranks == 1:
            return 1
        if self.schedule == "gpipe":
            return micros
        if self.schedule == "1f1b":
            return min(micros, self.ranks - rank)
        if self.schedule == "zero-bubble-v":
            return min(micros, self.ranks)
        passes = 2 * (self.ranks - 1 - rank) + self.ranks * (PER_RANK[self.schedule] - 1) + 1
        return min(micros, passes / PER_RANK[self.schedule])


def even(costs: Sequence[int], count: int) -> tuple[range, ...]:
    """Neighbours in so many runs, none empty, whose dearest is as cheap as can be, then the sum of squares."""
    sums = [0, *accumulate(costs)]
    # for each end: the dearest run, the sum of squares and the borders of the best cut into `runs` runs
    best: dict[int, tuple[int, int, tuple[int, ...]]]
    best = {end: (sums[end], sums[end] ** 2, (end,)) for end in range(1, len(sums))}
    for runs in range(2, count + 1):
        best = {
            end: min(
                (
                    max(best[start][0], sums[end] - sums[start]),
                    best[start][1] + (sums[end] - sums[start]) ** 2,
                    (*best[start][2], end),
                )
                for start in range(runs - 1, end)
            )
            for end in range(runs, len(sums))
        }
    borders = best[len(costs)][2]
    return tuple(range(start, end) for start, end in zip((0, *borders[:-1]), borders, strict=True))
