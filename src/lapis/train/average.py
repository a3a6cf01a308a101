"""An exponential moving average of the weights (EMA), often a little better than the last ones."""

from __future__ import annotations

from torch import Tensor

from lapis.train.flat import FlatParameters


class Average:
    """fp32 weights, average = decay · average + (1 - decay) · weights after each step.

    In the first steps the decay is (1 + step) / (10 + step) if that is less, so that the random start is forgotten.
    """

    def __init__(self, flat: FlatParameters, decay: float) -> None:
        self.flat, self.decay = flat, decay
        self.mean = flat.master.clone()

    def update(self, step: int) -> None:
        """Take in the weights after `step` steps."""
        self.mean.lerp_(self.flat.master, lerp_weight(self.decay, step))

    def state(self) -> dict[str, Tensor]:
        """The averaged weights by parameter."""
        return self.flat.views(self.mean)


def lerp_weight(decay: float, step: int) -> float:
    """How much of the weights after `step` steps goes into the average."""
    return 1 - min(decay, (1 + step) / (10 + step))
