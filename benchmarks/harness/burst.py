"""What one measurement of an engine gives, whichever engine it was, and the figures that are read from it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Burst:
    """Requests sent together. `times` has, for each request, the seconds from the start to each new token.

    `times` is empty for an engine that tells nothing before everything is finished.
    """

    seconds: float
    tokens: int
    times: Sequence[Sequence[float]] = ()

    def throughput(self) -> float:
        """New tokens a second over the whole time, prefill included."""
        return self.tokens / self.seconds

    def first(self, quantile: float) -> float:
        """Seconds to the first token: of the requests, that of the given quantile."""
        firsts = sorted(times[0] for times in self.times)
        return firsts[min(len(firsts) - 1, int(quantile * len(firsts)))]

    def median_first(self) -> float:
        """Median seconds to the first token."""
        return statistics.median(times[0] for times in self.times)

    def prefill(self, prompt: int) -> float:
        """Prompt tokens a second until every request has its first token."""
        return prompt * len(self.times) / max(times[0] for times in self.times)

    def decode(self) -> float:
        """New tokens a second while all requests decode: from the last first token to the first last one."""
        begin = max(times[0] for times in self.times)
        end = min(times[-1] for times in self.times)
        count = sum(begin < time <= end for times in self.times for time in times)
        return count / (end - begin)
