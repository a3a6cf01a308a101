"""Whether a step's numbers can be trusted, looked at before the weights move. Pure: numbers in, a verdict out."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from statistics import median
from typing import Literal, NamedTuple

WINDOW = 100  # good steps that a new one is compared with
ENOUGH = 20  # of them, before a step can be an outlier
MAD_TO_SIGMA = 1.4826  # the median absolute deviation of a normal distribution, as its standard deviation
LEAST_LOSS, LEAST_NORM = (
    0.02,
    0.1,
)  # relative spread that is always granted: of the loss, of the norm's logarithm

Fault = Literal["data", "hardware"]


class Numbers(NamedTuple):
    """What is known of a step before its update: loss in nats, and the norm of the whole gradient."""

    loss: float
    norm: float

    @property
    def finite(self) -> bool:
        """Whether both are."""
        return math.isfinite(self.loss) and math.isfinite(self.norm)

    def same(self, other: Numbers) -> bool:
        """Whether the bits are the same (a NaN is a NaN)."""
        return [value.hex() for value in self] == [value.hex() for value in other]


def complaint(numbers: Numbers, past: Collection[Numbers], outlier: float | None) -> str | None:
    """Why a step is bad, or None. `outlier`: the robust z-score from which it is, against the good steps before.

    z = (x - median) / (1.4826 · median absolute deviation), of the loss and of the norm's logarithm; only more is bad.
    """
    if not numbers.finite:
        return "not finite"
    if outlier is None or len(past) < ENOUGH:
        return None
    if z_score(numbers.loss, [one.loss for one in past], LEAST_LOSS) > outlier:
        return "loss far above the last ones"
    norms = [math.log(max(one.norm, 1e-30)) for one in past]
    if z_score(math.log(max(numbers.norm, 1e-30)), norms, 0.0, LEAST_NORM) > outlier:
        return "gradient far above the last ones"
    return None


def z_score(value: float, past: Sequence[float], least: float, floor: float = 0.0) -> float:
    """The robust z-score; the deviation is taken as at least `least` of the median, and at least `floor`."""
    middle = median(past)
    deviation = median(abs(other - middle) for other in past)
    return (value - middle) / (MAD_TO_SIGMA * max(deviation, least * abs(middle), floor, 1e-12))


def fault(first: Numbers, again: Numbers) -> Fault:
    """What a bad step's replay tells: the same bits come from the data, others from the machine."""
    return "data" if first.same(again) else "hardware"
