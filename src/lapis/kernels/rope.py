"""Frequencies of the rotary position embedding and how they are stretched for long contexts. No torch here."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lapis.errors import ConfigError

SCALINGS = ("linear", "llama3", "yarn")


@dataclass(frozen=True)
class RopeScaling:
    """How frequencies are stretched by `factor`. Raises ConfigError for numbers that make no sense.

    `linear` divides them all (Chen et al. 2023). `llama3` and `yarn` keep those that turn often within
    `original_context`, divide those that turn seldom and blend between: Llama 3.1 between `low` and `high`
    turns, YaRN (Peng et al. 2023) over the dims between `beta_slow` and `beta_fast` turns, rounded outwards
    with `truncate`; YaRN multiplies sines and cosines by `attention`.
    """

    kind: str
    factor: float
    original_context: int = 0
    low: float = 1.0
    high: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention: float = 1.0
    truncate: bool = True

    def __post_init__(self) -> None:
        if self.kind not in SCALINGS:
            raise ConfigError(
                f"The rope scaling {self.kind!r} is not supported.",
                hint=f"Supported: {', '.join(SCALINGS)}. A model scaled 'dynamic' or 'longrope' depends on the "
                "length of the text, so it cannot be served in pieces.",
            )
        numbers = (self.factor, self.high - self.low, self.beta_fast, self.beta_slow, self.attention)
        if not all(number > 0 for number in numbers) or (self.kind != "linear" and self.original_context < 1):
            raise ConfigError(f"Rope scaling of type {self.kind!r} with senseless numbers: {self}.")


def yarn_attention(factor: float, scale: float = 1.0) -> float:
    """YaRN's own factor of sines and cosines for a stretch by `factor`."""
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


def frequencies(head_size: int, base: float, scaling: RopeScaling | None = None) -> list[float]:
    """Radians per position of each pair of dims, head_size / 2 of them, in fp64."""
    plain = [base ** -(dim / head_size) for dim in range(0, head_size, 2)]
    if scaling is None:
        return plain
    if scaling.kind == "linear":
        return [frequency / scaling.factor for frequency in plain]
    kept = _kept_llama3(plain, scaling) if scaling.kind == "llama3" else _kept_yarn(head_size, base, scaling)
    return [
        frequency * (share + (1 - share) / scaling.factor)
        for frequency, share in zip(plain, kept, strict=True)
    ]


def _kept_llama3(plain: list[float], scaling: RopeScaling) -> list[float]:
    """Which share of each frequency stays: 1 from `high` turns on, 0 up to `low` turns."""
    turns = [scaling.original_context * frequency / (2 * math.pi) for frequency in plain]
    return [min(1.0, max(0.0, (turn - scaling.low) / (scaling.high - scaling.low))) for turn in turns]


def _kept_yarn(head_size: int, base: float, scaling: RopeScaling) -> list[float]:
    def dim_of(turns: float) -> float:
        """The dim that turns so often within the original context."""
        span = math.log(scaling.original_context / (turns * 2 * math.pi))
        return head_size * span / (2 * math.log(base))

    first, last = dim_of(scaling.beta_fast), dim_of(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_size - 1)
    width = last - first or 0.001
    return [1 - min(1.0, max(0.0, (pair - first) / width)) for pair in range(head_size // 2)]
