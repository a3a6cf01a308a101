"""Training batches as a pure function of (dataset, shape, seed, segments of the mixture, step).

Letters: T = batch x sequence tokens of one step.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lapis.data.mixture import MixedOrder, Segment
from lapis.data.order import index_of, sample_at, samples_from
from lapis.data.shards import Dataset
from lapis.data.streams import Piece, SourceStream, source_streams, source_tokens
from lapis.errors import InputError

BLOCK = 1 << 13  # places of the order that are drawn at once


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

    def nothing(self) -> TokenBatch:
        """A batch that costs next to nothing and counts nothing: for a rank that has fewer than another one."""
        facts_NT = None if self.facts_NT is None else np.zeros_like(self.facts_NT[:, :1])
        return TokenBatch(self.ids_T[:1], self.targets_T[:1], (1,), np.zeros(1, dtype=np.float32), facts_NT)


class TokenLoader:
    """Gives the batch of any step; steps need no order, and nothing is remembered between them.

    Windows are numbered: first those of the stream as it lies, then, for a mixture, those of each source's stream.
    """

    def __init__(
        self, dataset: Dataset, *, sequence: int, batch: int, seed: int, segments: Sequence[Segment] = ()
    ) -> None:
        self.samples = (dataset.tokens - 1) // sequence  # the last target is one token past the window
        if self.samples < 1:
            raise InputError(
                f"The dataset has {dataset.tokens:,} training tokens, less than a sequence of {sequence:,}.",
                hint="Add text, or train with a shorter sequence.",
            )
        self.dataset = dataset
        self.sequence, self.batch, self.seed = sequence, batch, seed
        self._block = lru_cache(maxsize=2)(self._drawn)
        self.mixed: MixedOrder | None = None  # what the order is from its first segment on
        self.streams: Mapping[str, SourceStream] = {}
        if segments:
            self._mix(segments)

    def _mix(self, segments: Sequence[Segment]) -> None:
        windows = {name: max(0, n - 1) // self.sequence for name, n in source_tokens(self.dataset).items()}
        self.mixed = MixedOrder(windows, segments, batch=self.batch, seed=self.seed)
        self.streams = source_streams(self.dataset)
        ends = accumulate((windows[name] for name in self.mixed.names), initial=self.samples)
        self._firsts = list(ends)[:-1]  # the number of the first window of each source

    def at(self, step: int) -> TokenBatch:
        """The batch of a step (from 0 on)."""
        return self.windows(self.samples_at(step * self.batch, self.batch))

    def samples_at(self, first: int, count: int) -> tuple[int, ...]:
        """The windows that stand at `count` places of the run's order from `first` on."""
        last = first + count
        if self.mixed is not None and last > self.mixed.first:
            return tuple(self._sample_at(place) for place in range(first, last))
        found: list[int] = []
        while first < last:  # drawn by blocks, a place costs a tenth
            number, offset = divmod(first, BLOCK)
            found += self._block(number)[offset : offset + last - first]
            first = (number + 1) * BLOCK
        return tuple(found)

    def windows(self, samples: Sequence[int]) -> TokenBatch:
        """Windows by their number, laid one after the other."""
        T = self.sequence
        # a target is the next token, so a window reads one more than it has
        stream_NT = np.empty((len(samples), T + 1), dtype=self.dataset.manifest["token_type"])
        starts = np.array(samples, dtype=np.int64) * T
        borders = self.dataset.document_starts
        inside = np.searchsorted(borders, starts[:, None] + [1, T]).tolist()
        lengths: list[int] = []
        for row, sample, (low, high) in zip(stream_NT, samples, inside, strict=True):
            if sample >= self.samples:
                lengths += self._fill_mixed(sample, row)
                continue
            start = sample * T
            self.dataset.fill(start, row)
            if low == high:
                lengths.append(T)
            else:
                lengths += _spans([edge - start for edge in borders[low:high].tolist()], T)
        ids_NT, targets_NT = stream_NT[:, :-1].astype(np.int64), stream_NT[:, 1:].astype(np.int64)
        return TokenBatch(ids_NT.reshape(-1), targets_NT.reshape(-1), tuple(lengths))

    def pieces(self, sample: int, count: int | None = None) -> Sequence[Piece]:
        """Where the first `count` tokens of a window lie in the dataset, by default all that are read in it."""
        count = self.sequence if count is None else count
        if sample < self.samples:
            return (Piece(sample * self.sequence, count),)
        assert self.mixed is not None, "a window of a source, but there is no mixture"
        n = bisect_right(self._firsts, sample) - 1
        return tuple(
            self.streams[self.mixed.names[n]].pieces((sample - self._firsts[n]) * self.sequence, count)
        )

    def first_use(self, pieces: Mapping[str, Sequence[Piece]]) -> int | None:
        """The first place of the order at which one of these tokens is read; None if that never comes.

        `pieces` are parts of documents, by their source.
        """
        T = self.sequence
        end = math.inf if self.mixed is None else self.mixed.first
        plain = {
            sample
            for parts in pieces.values()
            for start, count in parts
            for sample in range(start // T, min(self.samples - 1, (start + count - 1) // T) + 1)
        }
        places = [index_of(sample, 0, self.samples, self.seed) for sample in plain] if end else []
        places = [place for place in places if place < end]
        for source, parts in pieces.items() if self.mixed is not None else ():
            firsts = [(self.streams[source].place_of(start), count) for start, count in parts]
            windows = {n for start, count in firsts for n in range(start // T, (start + count - 1) // T + 1)}
            place = self.mixed.first_use(source, windows) if self.mixed is not None else None
            places.extend([] if place is None else [place])
        return min(places, default=None)

    def _drawn(self, number: int) -> list[int]:
        """A block of the order of the stream as it lies."""
        drawn: list[int] = samples_from(number * BLOCK, BLOCK, self.samples, self.seed).tolist()
        return drawn

    def _sample_at(self, place: int) -> int:
        if self.mixed is None or place < self.mixed.first:
            return sample_at(place, self.samples, self.seed)
        drawn = self.mixed.at(place)
        return self._firsts[self.mixed.names.index(drawn.source)] + drawn.window

    def _fill_mixed(self, sample: int, out: NDArray[Any]) -> list[int]:
        """Read a window of one source; its spans. Each piece but the first begins a document."""
        edges = [0]
        for start, count in self.pieces(sample, self.sequence + 1):
            self.dataset.fill(start, out[edges[-1] : edges[-1] + count])
            edges.append(edges[-1] + count)
        return _spans([edge for edge in edges[1:-1] if edge < self.sequence], self.sequence)


def _spans(borders: Sequence[int], end: int) -> list[int]:
    """The lengths between borders inside of a window that ends at `end`."""
    return [stop - begin for begin, stop in pairwise([0, *borders, end])]
