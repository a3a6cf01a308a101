"""Histograms as Prometheus reads them: how many values were at most each bound."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator

SECONDS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0, 300.0,
)  # fmt: skip


class Histogram:
    """Values, counted by size. Written from one thread."""

    def __init__(self, bounds: tuple[float, ...] = SECONDS) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Count a value, or several equal ones."""
        self._counts[bisect_left(self._bounds, value)] += times
        self.sum += value * times

    @property
    def count(self) -> int:
        """How many values there were."""
        return sum(self._counts)

    def lines(self, name: str, labels: str) -> Iterator[str]:
        """Prometheus' lines; `labels` is `name="value",…` or empty."""
        below = 0
        joined = f"{labels}," if labels else ""
        for bound, count in zip((*self._bounds, float("inf")), self._counts, strict=True):
            below += count
            shown = "+Inf" if bound == float("inf") else f"{bound:g}"
            yield f'{name}_bucket{{{joined}le="{shown}"}} {below}'
        plain = f"{{{labels}}}" if labels else ""
        yield f"{name}_sum{plain} {self.sum:.6f}"
        yield f"{name}_count{plain} {below}"
