"""Jobs as columns of numbers: read once, so that a decision over ten thousand of them is arithmetic on arrays."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from lapis.jobs.job import Job, State
from lapis.jobs.shares import Amounts

Matrix = npt.NDArray[np.float64]
Numbers = npt.NDArray[np.int64]
SHAPE = 32  # bytes of a packed spec that say what each rank takes, and how many ranks there are


class Columns:
    """Facts of many jobs, by their index. Amounts are of CPUs, GPUs and bytes of memory."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.jobs = jobs
        self._specs = [job.spec.packed for job in jobs]
        table: Matrix = np.frombuffer(b"".join(self._specs)).reshape(-1, 7)
        self._table = table
        self.projects = [job.project_id for job in jobs]
        self.created: Matrix = np.array([job.created_at for job in jobs], float)
        self.each: Matrix = table[:, :3]
        self.ranks: Matrix = table[:, 3]
        self.levels: Matrix = table[:, 4]
        self.limits: Matrix = table[:, 5]  # inf: none
        self.preemptible: Matrix = table[:, 6]
        self.totals: Matrix = self.each * self.ranks[:, None]

    def codes(self, names: Sequence[str]) -> Numbers:
        """The place of each job's project among these names."""
        places = {name: place for place, name in enumerate(names)}
        return np.array([places[project] for project in self.projects], np.int64)

    def shape(self, index: int) -> tuple[Amounts, int]:
        """What each rank of a job takes, and how many ranks there are."""
        cpus, gpus, memory, ranks = self._table[index, :4].tolist()
        return (cpus, gpus, memory), int(ranks)


class Waiting(Columns):
    """Jobs that wait. Many have the same shape: what each rank takes, and how many there are."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        super().__init__(jobs)
        known: dict[bytes, int] = {}
        self.shape_of = [known.setdefault(spec[:SHAPE], len(known)) for spec in self._specs]
        shapes = [struct.unpack("4d", shape) for shape in known]
        self.shapes: list[tuple[Amounts, int]] = [(shape[:3], int(shape[3])) for shape in shapes]

    def shape(self, index: int) -> tuple[Amounts, int]:
        """What each rank of a job takes, and how many ranks there are."""
        return self.shapes[self.shape_of[index]]


class Running(Columns):
    """Active jobs: where they run, since when, and which of them have been asked to stop."""

    def __init__(self, jobs: Sequence[Job], names: dict[str, int]) -> None:
        super().__init__(jobs)
        started = [job.started_at if job.state is State.RUNNING else None for job in jobs]
        self.started: Matrix = np.array(started, float)  # nan: it starts just now
        cancelled: Matrix = np.array([job.cancel_at for job in jobs], float)
        preempted: Matrix = np.array([job.preempt_at for job in jobs], float)
        # When it was asked to stop; inf: never.
        self.asked: Matrix = np.nan_to_num(np.fmin(cancelled, preempted), nan=math.inf, posinf=math.inf)
        # Of each place: whose, where, and how many ranks; without those on nodes that are gone.
        of = np.repeat(np.arange(len(jobs)), [len(job.places) for job in jobs])
        node = np.array([names.get(place.node, -1) for job in jobs for place in job.places], np.int64)
        there = np.array([place.ranks for job in jobs for place in job.places], np.int64)
        known = node >= 0
        self.of: Numbers = of[known]
        self.node: Numbers = node[known]
        self.there: Numbers = there[known]
        self.given: Matrix = self.each[self.of] * self.there[:, None]
        ends: Numbers = np.searchsorted(self.of, np.arange(len(jobs) + 1))
        self.first: list[int] = ends.tolist()  # the places of job i: first[i] until first[i + 1]


def sums(codes: Numbers, totals: Matrix, groups: int) -> list[list[float]]:
    """The sum of the amounts of each group."""
    summed = [np.bincount(codes, totals[:, resource], groups) for resource in range(3)]
    rows: list[list[float]] = np.stack(summed, axis=1).tolist()
    return rows
