"""Jobs as columns of numbers: read once, so that a decision over ten thousand of them is arithmetic on arrays."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from lapis.jobs.job import Job, State
from lapis.jobs.shares import Amounts

Matrix = npt.NDArray[np.float64]
Numbers = npt.NDArray[np.int64]
Shape = tuple[float, ...]  # CPUs, GPUs and bytes of a rank; ranks


class Columns:
    """Facts of many jobs, by their index. Amounts are of CPUs, GPUs and bytes of memory."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.jobs = jobs
        rows = [job.spec.numbers for job in jobs]
        table: Matrix = np.array(rows, float).reshape(-1, 7)
        self.projects = [job.project_id for job in jobs]
        self.created: Matrix = np.array([job.created_at for job in jobs], float)
        self.each: Matrix = table[:, :3]
        self.ranks: Matrix = table[:, 3]
        self.levels: Matrix = table[:, 4]
        self.limits: Matrix = table[:, 5]  # inf: none
        self.preemptible: Matrix = table[:, 6]
        self.totals: Matrix = self.each * self.ranks[:, None]
        known: dict[Shape, int] = {}
        self.shape_of = [known.setdefault(row[:4], len(known)) for row in rows]
        self.shapes: list[tuple[Amounts, int]] = [(shape[:3], int(shape[3])) for shape in known]  # type: ignore[misc]

    def codes(self, names: Sequence[str]) -> Numbers:
        """The place of each job's project among these names."""
        places = {name: place for place, name in enumerate(names)}
        return np.array([places[project] for project in self.projects], np.int64)

    def shape(self, index: int) -> tuple[Amounts, int]:
        """What each rank of a job takes, and how many ranks there are."""
        return self.shapes[self.shape_of[index]]


class Running(Columns):
    """Active jobs: where they run, since when, and which of them have been asked to stop."""

    def __init__(self, jobs: Sequence[Job], names: dict[str, int]) -> None:
        super().__init__(jobs)
        started = [job.started_at if job.state is State.RUNNING else None for job in jobs]
        self.started: Matrix = np.array([math.nan if at is None else at for at in started], float)
        asked = [
            math.inf if job.preempt_at is None and job.cancel_at is None else _asked(job) for job in jobs
        ]
        self.asked: Matrix = np.array(asked, float)  # when to stop; inf: never
        places = [
            (index, names[place.node], place.ranks)
            for index, job in enumerate(jobs)
            for place in job.places
            if place.node in names
        ]
        found: Numbers = np.array(places, np.int64).reshape(-1, 3)
        self.of, self.node, self.there = found[:, 0], found[:, 1], found[:, 2]  # of each place
        self.given: Matrix = self.each[self.of] * self.there[:, None]
        ends: Numbers = np.searchsorted(self.of, np.arange(len(jobs) + 1))
        self.first: list[int] = ends.tolist()  # the places of job i: first[i] until first[i + 1]


def _asked(job: Job) -> float:
    return min(at for at in (job.cancel_at, job.preempt_at) if at is not None)


def sums(codes: Numbers, totals: Matrix, groups: int) -> list[list[float]]:
    """The sum of the amounts of each group."""
    summed = [np.bincount(codes, totals[:, resource], groups) for resource in range(3)]
    rows: list[list[float]] = np.stack(summed, axis=1).tolist()
    return rows
