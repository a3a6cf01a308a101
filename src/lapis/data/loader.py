"""Training batches as a pure function of (dataset, shape, seed, step).

Letters: T = batch x sequence tokens of one step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lapis.data.order import sample_at
from lapis.data.shards import Dataset
from lapis.errors import InputError


class TokenBatch(NamedTuple):
    """Windows of the stream laid one after the other; `lengths` are the spans between document borders."""

    ids_T: NDArray[np.int64]
    targets_T: NDArray[np.int64]
    lengths: tuple[int, ...]
    weights_T: NDArray[np.float32] | None = None  # what each target counts in the loss; None: all count 1
    facts_NT: NDArray[np.float32] | None = None  # what else an objective knows of each target

    def padded(self, step: int) -> TokenBatch:
        """The batch with a document of no weight at its end, so that its length divides by `step`."""
        missing = -len(self.ids_T) % step
        if not missing:
            return self
        return TokenBatch(
            np.pad(self.ids_T, (0, missing)),
            np.pad(self.targets_T, (0, missing), constant_values=-1),
            (*self.lengths, missing),
            None if self.weights_T is None else np.pad(self.weights_T, (0, missing)),
            None if self.facts_NT is None else np.pad(self.facts_NT, ((0, 0), (0, missing))),
        )


class TokenLoader:
    """Gives the batch of any step; steps need no order, and nothing is remembered between them."""

    def __init__(self, dataset: Dataset, *, sequence: int, batch: int, seed: int) -> None:
        self.samples = (dataset.tokens - 1) // sequence  # the last target is one token past the window
        if self.samples < 1:
            raise InputError(
                f"The dataset has {dataset.tokens:,} training tokens, less than a sequence of {sequence:,}.",
                hint="Add text, or train with a shorter sequence.",
            )
        self.dataset = dataset
        self.sequence, self.batch, self.seed = sequence, batch, seed

    def at(self, step: int) -> TokenBatch:
        """The batch of a step (from 0 on)."""
        return self.windows(self.samples_at(step * self.batch, self.batch))

    def samples_at(self, first: int, count: int) -> tuple[int, ...]:
        """The windows that stand at `count` places of the run's order from `first` on."""
        return tuple(sample_at(index, self.samples, self.seed) for index in range(first, first + count))

    def windows(self, samples: Sequence[int]) -> TokenBatch:
        """Windows of the stream by their number, laid one after the other."""
        windows = [self._window(sample) for sample in samples]
        ids_T = np.concatenate([window.ids_T for window in windows])
        targets_T = np.concatenate([window.targets_T for window in windows])
        return TokenBatch(ids_T, targets_T, tuple(length for window in windows for length in window.lengths))

    def _window(self, sample: int) -> TokenBatch:
        start = sample * self.sequence
        stream = self.dataset.read(start, self.sequence + 1).astype(np.int64)
        borders = self.dataset.document_starts
        low, high = np.searchsorted(borders, [start + 1, start + self.sequence])  # inside the window only
        edges = np.concatenate([[0], borders[low:high] - start, [self.sequence]])
        return TokenBatch(stream[:-1], stream[1:], tuple(np.diff(edges).tolist()))
