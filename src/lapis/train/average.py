"""An exponential moving average of the weights (EMA), often a little better than the last ones."""

from __future__ import annotations

from collections.abc import Mapping

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
        self.mean.lerp_(self.flat.master, 1 - min(self.decay, (1 + step) / (10 + step)))

    def state(self) -> dict[str, Tensor]:
        """The averaged weights by parameter."""
        return self.flat.views(self.mean)

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a checkpoint's."""
        for name, view in self.state().items():
            view.copy_(state[name])
