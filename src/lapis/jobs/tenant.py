"""A project within one decision of the fair queue."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from lapis.jobs.shares import NOTHING, Amounts


@dataclass(slots=True)
class Tenant:
    """What a project is due, what it holds, and which of its jobs wait, in order."""

    name: str
    weight: float
    per: Amounts  # one over all that the nodes have
    past: Sequence[float]  # what it held on decayed average
    first_at: float | None  # when its first job of then was started last
    held: list[float]
    firm: list[float]  # held by jobs that cannot be stopped
    due: float  # the part of its dominant resource that it may take from others
    jobs: list[int]
    at: int = 0  # the next of its jobs
    blocked: int | None = None  # its first job that found no room
    average: float = field(init=False)  # the largest part of any resource that it holds, now and in the past
    score: float = field(init=False)  # the dominant share: the same per weight

    def __post_init__(self) -> None:
        self.hold(NOTHING)

    def hold(self, total: Sequence[float]) -> None:
        """Count what a job takes to what it holds; less than nothing when one stops."""
        add(self.held, total)
        self.average = self.part(self.past)
        self.score = self.average / self.weight

    def part(self, more: Sequence[float] = NOTHING) -> float:
        """The largest part of any resource that it holds now, with some more."""
        held, per = self.held, self.per
        # Written out, and without a call of max: this is asked more often than anything else.
        cpus, gpus = (held[0] + more[0]) * per[0], (held[1] + more[1]) * per[1]
        memory = (held[2] + more[2]) * per[2]
        most = gpus if gpus > cpus else cpus
        return memory if memory > most else most


def largest(amounts: Sequence[float], per: Amounts) -> float:
    """The largest part of any resource."""
    return max(amounts[0] * per[0], amounts[1] * per[1], amounts[2] * per[2])


def add(to: list[float], amounts: Sequence[float]) -> None:
    """Add to all three amounts."""
    to[0] += amounts[0]
    to[1] += amounts[1]
    to[2] += amounts[2]
