"""Which source stands at which place of the training order, by weights: a pure function. No disk.

A place is a window of the run: step · batch + number in the batch. Places go by blocks, the smallest in which every
source comes at least once. How many windows of a source have come at a block's end is its weight times the places,
rounded by the largest remainder, so it is always less than 1 off; inside a block a keyed permutation shuffles. Each
source's windows come in an order of its own, another one each epoch, and go on across segments.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

from lapis.data.order import index_of, samples_from
from lapis.data.recipe import MixtureConfig
from lapis.errors import ConfigError, InputError, nearest
from lapis.hashing import digest_json

LAID = 512  # places that are laid out at once, or one block if that is more
DRAWN = 1 << 12  # windows of a source that are drawn at once

Counts = tuple[int, ...]  # of each source, in the order of their names


@dataclass(frozen=True)
class Segment:
    """From a step on, windows are drawn by these weights, each source at most so many epochs in the whole run."""

    from_step: int
    weights: Mapping[str, float]
    epochs: Mapping[str, float]

    @property
    def digest(self) -> str:
        """Names weights, epochs and the step they begin at."""
        return digest_json(self)

    def plain(self) -> dict[str, Any]:
        """As events and checkpoints keep it."""
        return {"from_step": self.from_step, "digest": self.digest}


def segments_of(config: MixtureConfig, *, steps: int | None, step_tokens: int) -> tuple[Segment, ...]:
    """The segments of a recipe's mixture. Raises ConfigError for shares of a run of unknown length."""
    if config.weights:
        return (Segment(0, config.weights, config.epochs),)
    first: list[int] = [0]
    done = Fraction(0)
    for segment in config.segments[:-1]:
        if segment.share is not None and steps is None:
            raise ConfigError(
                "The segments of data.mixture have shares, but a run by train.minutes does not know its steps.",
                hint="Give train.steps, or give the segments tokens.",
                param="data.mixture.segments",
            )
        if segment.share is not None:
            done += Fraction(str(segment.share)) * (steps or 0)
        else:
            done += Fraction(segment.tokens or 0, step_tokens)
        first.append(round(done))
    planned = [
        Segment(step, segment.weights, config.epochs)
        for step, segment in zip(first, config.segments, strict=True)
    ]
    return tuple(one for one, end in zip(planned, [*first[1:], math.inf], strict=True) if one.from_step < end)


def changed(before: Sequence[Segment], after: Sequence[Segment], step: int) -> tuple[Segment, ...]:
    """The segments of a run that goes on with another mixture from a step on: what came before it stays."""
    at = [segment for segment in after if segment.from_step <= step][-1]
    return (
        *(segment for segment in before if segment.from_step < step),
        Segment(step, at.weights, at.epochs),
        *(segment for segment in after if segment.from_step > step),
    )


def describe(config: MixtureConfig | None) -> str:
    """A mixture in one line: "web 70 %, code 30 % (at most 4 epochs)"."""
    if config is None:
        return "none"
    parts = []
    for number, segment in enumerate(config.segments):
        length = f"{segment.share:.4g} of the steps" if segment.share else f"{segment.tokens or 0:,} tokens"
        if segment.share is None and segment.tokens is None:
            length = "the rest"
        parts.append(
            f"{'then ' if number else ''}{length} {describe_weights(segment.weights, config.epochs)}"
        )
    return ", ".join(parts) or describe_weights(config.weights, config.epochs)


def describe_weights(weights: Mapping[str, float], epochs: Mapping[str, float]) -> str:
    """Weights in words, as parts of all."""
    total = sum(weights.values())
    return ", ".join(
        f"{name} {weight / total:.4g}" + (f" (at most {epochs[name]:g} epochs)" if name in epochs else "")
        for name, weight in weights.items()
    )


class Drawn(NamedTuple):
    """What stands at a place."""

    source: str
    window: int


@dataclass(frozen=True)
class _Leg:
    """Places from `first` on whose weights stay the same; `before` has come of each source until there."""

    first: int
    weights: Counts
    before: Counts
    key: int

    @cached_property
    def total(self) -> int:
        return sum(self.weights)

    @cached_property
    def block(self) -> int:
        return -(-self.total // min(weight for weight in self.weights if weight))

    @cached_property
    def stretch(self) -> int:
        """Places that are laid out at once: whole blocks."""
        return self.block * max(1, LAID // self.block)

    def counts(self, places: int) -> Counts:
        """How many of each source there are in so many places, a multiple of the block."""
        whole = [places * weight // self.total for weight in self.weights]
        rest = [places * weight % self.total for weight in self.weights]
        by_rest = sorted(range(len(rest)), key=lambda n: (-rest[n], n))
        for n in by_rest[: places - sum(whole)]:
            whole[n] += 1
        return tuple(whole)


class MixedOrder:
    """The order of a run: O(1) to any place, the same for any number of ranks, workers and resumes."""

    def __init__(
        self, windows: Mapping[str, int], segments: Sequence[Segment], *, batch: int, seed: int
    ) -> None:
        self.names = tuple(sorted(windows))
        self.windows = tuple(windows[name] for name in self.names)
        self.seed, self.batch, self.segments = seed, batch, tuple(segments)
        self._keys = tuple(_key(seed, "source", name) for name in self.names)
        for segment in segments:
            check_sources(segment, windows)
        self.end: int | None = None  # the place at which every source has come as often as it may
        self._legs: list[_Leg] = []
        self._firsts: list[int] = []  # their first places
        self._layout = lru_cache(maxsize=8)(self._laid_out)
        self._windows = lru_cache(maxsize=2 * len(windows))(self._drawn)
        self._lay()

    @property
    def first(self) -> int:
        """The place of the first segment."""
        return self.segments[0].from_step * self.batch

    def at(self, place: int) -> Drawn:
        """What stands at a place. Raises InputError if every source has come as often as it may before it."""
        if self.end is not None and place >= self.end:
            raise InputError(
                f"The mixture ends at step {self.end // self.batch:,}: every source of it has come as often as "
                "data.mixture.epochs lets it.",
                hint="Train for fewer steps, allow more epochs, or add text.",
                param="data.mixture.epochs",
            )
        number, stretch, offset = self._find(place)
        source, ordinal = self._layout(number, stretch)[offset]
        return Drawn(self.names[source], self._windows(source, ordinal // DRAWN)[ordinal % DRAWN])

    def consumed(self, place: int) -> dict[str, int]:
        """How many windows of each source come before a place."""
        place = place if self.end is None else min(place, self.end)
        counts = self._counts(*self._find(place))
        return dict(zip(self.names, counts, strict=True))

    def first_use(self, source: str, windows: Iterable[int]) -> int | None:
        """The first place at which one of a source's windows stands; None if none ever does.

        What is left at the end of a stream is no whole window: it is never drawn.
        """
        n = self.names.index(source)
        size, key = self.windows[n], self._keys[n]
        ordinals = (index_of(window, 0, size, key) for window in windows if window < size)
        ordinal = min(ordinals, default=None)
        return None if ordinal is None else self._place(n, ordinal)

    def _find(self, place: int) -> tuple[int, int, int]:
        """Leg, stretch of the leg, and place in the stretch."""
        number = bisect_right(self._firsts, place) - 1
        assert number >= 0, "a place before the first segment"
        leg = self._legs[number]
        return number, *divmod(place - leg.first, leg.stretch)

    def _laid_out(self, number: int, stretch: int) -> list[tuple[int, int]]:
        """For each place of a stretch its source, and how many of that source come before it in the run."""
        leg = self._legs[number]
        first = stretch * leg.stretch
        shuffled = samples_from(first, leg.stretch, leg.block, leg.key).tolist()
        low = leg.counts(first)
        ordinals = [a + b for a, b in zip(leg.before, low, strict=True)]
        found = []
        for begin in range(0, leg.stretch, leg.block):
            high = leg.counts(first + begin + leg.block)
            edges = list(accumulate(b - a for a, b in zip(low, high, strict=True)))
            low = high
            for value in shuffled[begin : begin + leg.block]:
                source = bisect_right(edges, value)
                found.append((source, ordinals[source]))
                ordinals[source] += 1
        return found

    def _drawn(self, source: int, number: int) -> list[int]:
        """Some of a source's windows, in the order of that source."""
        size, key = self.windows[source], self._keys[source]
        drawn: list[int] = samples_from(number * DRAWN, DRAWN, size, key).tolist()
        return drawn

    def _counts(self, number: int, stretch: int, offset: int) -> Counts:
        leg = self._legs[number]
        counts = [a + b for a, b in zip(leg.before, leg.counts(stretch * leg.stretch), strict=True)]
        for source, _ in self._layout(number, stretch)[:offset] if offset else ():
            counts[source] += 1
        return tuple(counts)

    def _place(self, source: int, ordinal: int) -> int | None:
        """The place of a source's window by its number in the order of that source."""
        for number, leg in enumerate(self._legs):
            if not leg.weights[source] or ordinal < leg.before[source]:
                continue
            place = self._place_in(number, source, ordinal)
            end = self._legs[number + 1].first if number + 1 < len(self._legs) else self.end
            if end is None or place < end:
                return place
        return None

    def _place_in(self, number: int, source: int, ordinal: int) -> int:
        """The same, as if the leg never ended."""
        leg = self._legs[number]
        rank = ordinal - leg.before[source]
        block = rank * leg.total // leg.weights[source] // leg.block
        if leg.counts((block + 1) * leg.block)[source] <= rank:
            block += 1  # counts are up to 1 off
        stretch = block * leg.block // leg.stretch
        return leg.first + stretch * leg.stretch + self._layout(number, stretch).index((source, ordinal))

    def _lay(self) -> None:
        """Cut the segments where a source has come as often as it may: the others share its part from there on."""
        before: Counts = (0,) * len(self.names)
        ends = [segment.from_step * self.batch for segment in self.segments[1:]]
        for segment, end in zip(self.segments, [*ends, None], strict=True):
            place: int | None = segment.from_step * self.batch
            caps = [
                math.floor(segment.epochs[name] * count) if name in segment.epochs else None
                for name, count in zip(self.names, self.windows, strict=True)
            ]
            while place is not None and (end is None or place < end):
                may = [cap is None or n < cap for cap, n in zip(caps, before, strict=True)]
                weights = _integers(
                    [segment.weights[name] * one for name, one in zip(self.names, may, strict=True)]
                )
                if not any(weights):
                    self.end = place
                    return
                self._legs.append(_Leg(place, weights, before, _key(self.seed, "blocks", place)))
                self._firsts.append(place)
                stop = self._runs_out(caps)
                place = end if stop is None or (end is not None and end < stop) else stop
                if place is not None:
                    before = self._counts(len(self._legs) - 1, *self._find(place)[1:])

    def _runs_out(self, caps: Sequence[int | None]) -> int | None:
        """The place of the last leg at which a source would come more often than it may."""
        number = len(self._legs) - 1
        weights = self._legs[number].weights
        found = [
            self._place_in(number, source, cap)
            for source, cap in enumerate(caps)
            if cap is not None and weights[source]
        ]
        return min(found, default=None)


def check_sources(segment: Segment, windows: Mapping[str, int]) -> None:
    """Raise ConfigError unless the weights name the dataset's sources, each with a window of text."""
    for name in {**segment.weights, **segment.epochs}:
        if name not in windows and segment.weights.get(name) != 0:
            raise ConfigError(
                f"data.mixture names the source {name!r}, but the dataset has no text of it. "
                f"{nearest(name, windows)}".rstrip(),
                hint=f"Its sources are {', '.join(sorted(windows))}; one that has no text left takes the weight 0.",
                param="data.mixture.weights",
            )
    for name, count in windows.items():
        if name not in segment.weights:
            raise ConfigError(
                f"data.mixture does not name the source {name!r} of the dataset.",
                hint="Give it a weight; 0 leaves it out.",
                param="data.mixture.weights",
            )
        if segment.weights[name] and not count:
            raise ConfigError(
                f"The source {name!r} has less text than one window of train.sequence tokens.",
                hint="Give it the weight 0, add text, or train with a shorter sequence.",
                param="data.mixture.weights",
            )
        if segment.weights[name] and segment.epochs.get(name, math.inf) * count < 1:
            raise ConfigError(
                f"data.mixture.epochs allows less than one window of the source {name!r}.",
                hint="Allow more, or give it the weight 0.",
                param="data.mixture.epochs",
            )


def _integers(weights: Sequence[float]) -> Counts:
    """The same weights as whole numbers; each as its shortest decimal text says."""
    parts = [Fraction(str(weight)) for weight in weights]
    common = math.lcm(*(part.denominator for part in parts))
    numbers = [int(part * common) for part in parts]
    shared = math.gcd(*numbers) or 1
    return tuple(number // shared for number in numbers)


def _key(*facts: Any) -> int:
    return int(digest_json(facts)[:16], 16)
