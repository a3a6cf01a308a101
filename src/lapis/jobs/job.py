"""A job: an argv plus resources. Its states, and the legal moves between them, in one table."""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property

from lapis.errors import ConflictError, InputError

VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class State(StrEnum):
    """How far a job has come."""

    QUEUED = "queued"
    STARTING = "starting"  # a controller holds its lease and is about to start it
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    PREEMPTED = "preempted"  # stopped for another one; it will be queued again


class Priority(StrEnum):
    """Which of a project's own jobs goes first. Between projects it says nothing: there, shares decide."""

    LOW = "low"
    NORMAL = "normal"
    HIGH = "high"

    @property
    def level(self) -> int:
        """0 for low, 1 for normal, 2 for high."""
        return tuple(Priority).index(self)


MOVES = {
    State.QUEUED: (State.STARTING, State.FAILED, State.CANCELLED),
    State.STARTING: (State.RUNNING, State.QUEUED, State.FAILED, State.CANCELLED),
    State.RUNNING: (State.SUCCEEDED, State.FAILED, State.CANCELLED, State.PREEMPTED, State.QUEUED),
    State.PREEMPTED: (State.QUEUED, State.CANCELLED),
    State.SUCCEEDED: (),
    State.FAILED: (),
    State.CANCELLED: (),
}
ACTIVE = (State.STARTING, State.RUNNING)
ENDED = tuple(state for state, moves in MOVES.items() if not moves)


@dataclass(frozen=True)
class Resources:
    """What a job occupies while it runs, or what a machine has. CPUs may be fractions; `memory` is in bytes.

    A job that names no memory is not counted or limited by it.
    """

    cpus: float = 1.0
    gpus: int = 0
    memory: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.cpus) and self.cpus >= 0 and self.gpus >= 0 and self.memory >= 0):
            raise InputError(f"{self} cannot be asked for.", param="resources")

    def __add__(self, other: Resources) -> Resources:
        return Resources(self.cpus + other.cpus, self.gpus + other.gpus, self.memory + other.memory)

    def __mul__(self, times: int) -> Resources:
        return Resources(self.cpus * times, self.gpus * times, self.memory * times)

    def fits(self, room: Resources) -> bool:
        """Whether all of it fits into `room`."""
        return self.cpus <= room.cpus and self.gpus <= room.gpus and self.memory <= room.memory

    def __str__(self) -> str:
        cpus, gpus = "CPU" if self.cpus == 1 else "CPUs", "GPU" if self.gpus == 1 else "GPUs"
        text = f"{self.cpus:g} {cpus} and {self.gpus} {gpus}"
        return f"{text} and {self.memory / 2**30:.3g} GiB" if self.memory else text


@dataclass(frozen=True)
class Node:
    """A machine that jobs run on, and what it has for them."""

    name: str
    resources: Resources


@dataclass(frozen=True, slots=True)
class Place:
    """What a job has of one node: how many of its ranks run there, and the numbers of their GPUs."""

    node: str
    ranks: int
    gpus: tuple[int, ...] = ()


@dataclass(frozen=True)
class JobSpec:
    """What to run. `resources` are those of each rank; all ranks start together or none does.

    `retries` is how often it is started anew after it was lost (not after it failed). `time_limit` is in
    seconds, of each attempt. A `preemptible` job may be stopped for another one: it gets SIGTERM, has time to
    write a checkpoint, and is started again later with the same argv. `spread`: on a cluster each rank has a node of
    its own, and the job outlives the loss of one (`lapis train --nodes`). The command starts in `folder`, by default in
    that of the attempt, where its log is.

    Raises InputError for what no process can have.
    """

    name: str
    argv: tuple[str, ...]
    resources: Resources = Resources()
    env: Mapping[str, str] = field(default_factory=dict)
    retries: int = 1
    ranks: int = 1
    priority: Priority = Priority.NORMAL
    time_limit: float | None = None
    preemptible: bool = False
    spread: bool = False
    folder: str | None = None

    def __post_init__(self) -> None:
        if not self.argv or not self.argv[0]:
            raise InputError(f"The job {self.name!r} has no command.", param="argv")
        if any("\0" in text for text in (*self.argv, *self.env.values(), self.folder or "")):
            raise InputError(f"The job {self.name!r} has a zero byte in its command.", param="argv")
        for name in self.env:
            if not VARIABLE.fullmatch(name):
                raise InputError(f"{name!r} cannot be the name of a variable.", param="env")
        if self.retries < 0:
            raise InputError("retries cannot be negative.", param="retries")
        if self.ranks < 1:
            raise InputError("A job has at least one rank.", param="ranks")
        if self.time_limit is not None and not 0 < self.time_limit < math.inf:  # NaN fails too
            raise InputError("A time limit is a positive number of seconds.", param="time_limit")

    @property
    def total(self) -> Resources:
        """What all ranks occupy together."""
        return self.resources * self.ranks

    @cached_property
    def packed(self) -> bytes:
        """Seven doubles: CPUs, GPUs, bytes of each rank; ranks, level, time limit (inf: none), 1 if preemptible.

        For whoever reads very many jobs at once.
        """
        each, limit = self.resources, math.inf if self.time_limit is None else self.time_limit
        level, preemptible = self.priority.level, self.preemptible
        return struct.pack("7d", each.cpus, each.gpus, each.memory, self.ranks, level, limit, preemptible)


@dataclass(frozen=True, slots=True)
class Job:
    """A job as the queue knows it. `reason` says why it is in its state.

    `attempt` numbers its starts; `losses` counts those whose process vanished. `places` are those of an
    attempt that runs; `preempt_for` names the job for which it was asked to stop, at `preempt_at`.
    """

    id: str
    project_id: str
    spec: JobSpec
    state: State
    reason: str
    attempt: int
    losses: int
    executor: str | None
    exit_code: int | None
    lease_until: float | None
    cancel_at: float | None
    created_at: float
    created_by: str
    started_at: float | None
    ended_at: float | None
    places: tuple[Place, ...] = ()
    preempt_at: float | None = None
    preempt_for: str | None = None


def check_move(job_id: str, state: State, to: State) -> None:
    """Raises ConflictError naming the legal moves if a job cannot go from one state to the other."""
    if to not in MOVES[state]:
        legal = ", ".join(MOVES[state]) or "none, it has ended"
        raise ConflictError(f"The job {job_id} is {state} and cannot become {to}. Legal: {legal}.")
