"""The seam between the queue and what runs jobs: this machine, Slurm, Kubernetes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from lapis.jobs.job import Job, Node


@dataclass(frozen=True)
class Status:
    """What became of an attempt: it waits in the executor's own queue, runs, exited with a code, vanished, was
    stopped for another one, or was fenced and never starts."""

    kind: Literal["waiting", "running", "exited", "lost", "preempted", "fenced"]
    exit_code: int | None = None
    reason: str = ""  # why it waits or ended, where the executor knows more
    seconds: float | None = None  # how long it ran, where the executor knows it better than its controller


class Executor(Protocol):
    """Where jobs run. An attempt is named by (job.id, job.attempt), and starts at most once whoever asks."""

    name: str  # also says on which host, where that matters: only the same executor can find its processes
    nodes: (
        tuple[Node, ...] | None
    )  # where jobs are placed; None: it has a queue of its own, and gets every job

    def start(self, job: Job) -> None:
        """Start the attempt. Raises ConflictError if it was fenced, UnavailableError if it cannot start.

        With `retry_after`, or as StorageError, that is so for the moment only, and nothing was started.
        """

    def fence(self, job: Job) -> bool:
        """Make sure that the attempt never starts; False if it has started."""

    def poll(self, job: Job) -> Status:
        """What became of the attempt. Raises UnavailableError if that cannot be known now."""

    def terminate(self, job: Job) -> None:
        """Ask all processes of the attempt to end."""

    def kill(self, job: Job) -> None:
        """End all processes of the attempt, also those that outlived its first one."""
