"""Jobs as columns of numbers: read once, so that a decision over ten thousand of them is arithmetic on arrays."""

from __future__ import annotations

import itertools
import math
import struct
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from lapis.jobs.job import Job, State
from lapis.jobs.shares import Amounts

Key = TypeVar("Key")
Matrix = npt.NDArray[np.float64]
Numbers = npt.NDArray[np.int64]
SPEC = 56  # bytes of a packed spec
SHAPE = 32  # of them those that say what each rank takes, and how many ranks there are


def numbering(of: Iterable[Key]) -> tuple[Numbers, list[Key]]:
    """A number for each of these, equal ones the same, and what the numbers stand for."""
    known: defaultdict[Key, int] = defaultdict(itertools.count().__next__)
    return integers([known[key] for key in of]), list(known)


def integers(values: Sequence[int]) -> Numbers:
    """The same as an array: np.array would look at each value twice, and take three times as long."""
    return np.frombuffer(struct.pack(f"{len(values)}q", *values), np.int64)


def floats(values: Sequence[float]) -> Matrix:
    """The same as an array."""
    return np.frombuffer(struct.pack(f"{len(values)}d", *values))


class Shape(NamedTuple):
    """What each rank of a job takes, how many there are, and what all of them take."""

    each: Amounts
    ranks: int
    total: Amounts


class Columns:
    """Facts of many jobs, by their index. Amounts are of CPUs, GPUs and bytes of memory."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.jobs = jobs
        self._packed = b"".join([job.spec.packed for job in jobs])
        table: Matrix = np.frombuffer(self._packed).reshape(-1, 7)
        self.project, self.projects = numbering([job.project_id for job in jobs])
        self.each: Matrix = table[:, :3]
        self.ranks: Matrix = table[:, 3]
        self.levels: Matrix = table[:, 4]
        self.limits: Matrix = table[:, 5]  # inf: none
        self.preemptible: Matrix = table[:, 6]
        self.totals: Matrix = self.each * self.ranks[:, None]

    def codes(self, names: Sequence[str]) -> Numbers:
        """The place of each job's project among these names."""
        places = {name: place for place, name in enumerate(names)}
        return np.array([places[project] for project in self.projects], np.int64)[self.project]


class Waiting(Columns):
    """Jobs that wait. Many have the same shape: what each rank takes, and how many there are."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        super().__init__(jobs)
        self.created: Matrix = floats([job.created_at for job in jobs])
        begins = range(0, len(self._packed), SPEC)
        self.shape_of, known = numbering([self._packed[at : at + SHAPE] for at in begins])
        shapes = [struct.unpack("4d", shape) for shape in known]
        self.shapes = [
            Shape((cpus, gpus, memory), int(ranks), (cpus * ranks, gpus * ranks, memory * ranks))
            for cpus, gpus, memory, ranks in shapes
        ]


class Running(Columns):
    """Active jobs: where they run, since when, and which of them have been asked to stop."""

    def __init__(self, jobs: Sequence[Job], names: Mapping[str, int]) -> None:
        super().__init__(jobs)
        running, now = State.RUNNING, math.nan
        # When it started; nan: it starts just now.
        started = [job.started_at if job.state is running else None for job in jobs]
        self.started: Matrix = floats([now if at is None else at for at in started])
        self.asked: Matrix = np.full(len(jobs), math.inf)  # when it was asked to stop; inf: never
        for index, job in enumerate(jobs):
            if job.cancel_at is not None or job.preempt_at is not None:
                self.asked[index] = min(at for at in (job.cancel_at, job.preempt_at) if at is not None)
        # Of each place: whose, where, and how many ranks; without those on nodes that are gone.
        places = [job.places for job in jobs]
        of = np.repeat(np.arange(len(jobs)), integers([len(held) for held in places]))
        each = list(itertools.chain.from_iterable(places))
        node = integers([names.get(place.node, -1) for place in each])
        ranks = integers([place.ranks for place in each])
        known = node >= 0
        self.of: Numbers = of[known]
        self.node: Numbers = node[known]
        self.given: Matrix = self.each[self.of] * ranks[known][:, None]
        ends: Numbers = np.searchsorted(self.of, np.arange(len(jobs) + 1))
        self.first: list[int] = ends.tolist()  # the places of job i: first[i] until first[i + 1]


def sums(codes: Numbers, totals: Matrix, groups: int) -> list[list[float]]:
    """The sum of the amounts of each group."""
    summed = [np.bincount(codes, totals[:, resource], groups) for resource in range(3)]
    rows: list[list[float]] = np.stack(summed, axis=1).tolist()
    return rows
