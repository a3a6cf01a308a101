"""When the learning rate rises and falls, and how a run of so many minutes becomes a number of steps. Pure.

wsd      rises, stays, falls in a straight line at the end (warm-up, stable, decay: Hägele et al. 2024)
linear   rises, then falls in a straight line to the end
cosine   rises, then falls by half a cosine to the end (Loshchilov & Hutter 2017)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

Shape = Literal["linear", "cosine"]
Schedule = Literal["wsd", "linear", "cosine"]


@dataclass(frozen=True)
class Plan:
    """The steps of a run: all of them, and those of warm-up and decay. `steps` is None until it is known."""

    warmup: int
    decay_from: int | None
    steps: int | None
    shape: Shape = "linear"
    final: float = 0.0  # what the rate falls to, as a part of the peak

    def scale(self, step: int) -> float:
        """Factor of the peak learning rate at a step, from 0: a rise, a flat stretch, a fall."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.decay_from is None or self.steps is None or step < self.decay_from:
            return 1.0
        left = max(0.0, (self.steps - step) / max(1, self.steps - self.decay_from))
        if self.shape == "cosine":
            left = (1 - math.cos(math.pi * left)) / 2
        return self.final + (1 - self.final) * left

    def done(self, step: int) -> bool:
        """Whether `step` steps are all."""
        return self.steps is not None and step >= self.steps


def by_steps(steps: int, warmup: int, decay: float, schedule: Schedule = "wsd", final: float = 0.0) -> Plan:
    """The plan of a run whose number of steps is given; `decay` is the fraction of them in which "wsd" falls."""
    decay_from = steps - round(decay * steps) if schedule == "wsd" else warmup
    return Plan(warmup, decay_from, steps, "cosine" if schedule == "cosine" else "linear", final)


def by_minutes(warmup: int, final: float = 0.0) -> Plan:
    """The open plan of a run by minutes: `close` fixes its end when the time of the flat stretch is over."""
    return Plan(warmup, None, None, final=final)


def close(plan: Plan, step: int, trained_s: float, minutes: float) -> Plan:
    """Fix the end of a run by minutes at the moment its decay begins, by the speed so far.

    `trained_s` are the seconds spent on the `step` steps done. The result is kept in events and checkpoints, so
    that a resumed run has the same schedule.
    """
    remaining_s = max(0.0, minutes * 60 - trained_s)
    per_step_s = trained_s / max(1, step)
    return replace(plan, decay_from=step, steps=step + max(1, round(remaining_s / per_step_s)))


def decay_is_due(plan: Plan, trained_s: float, minutes: float, decay: float) -> bool:
    """Whether the flat stretch of a run by minutes is over."""
    return plan.steps is None and trained_s >= (1 - decay) * minutes * 60
