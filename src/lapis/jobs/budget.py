"""Which projects have used up their GPU time: their jobs that ask for GPUs wait until the month ends."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress

from lapis.errors import ConflictError
from lapis.jobs.job import Job, State
from lapis.tenants.usage import UsageLedger

SPENT = "its project's GPU time of this month is used up"


def without_spent(
    waiting: Iterable[Job], active: Iterable[Job], ledger: UsageLedger, now: float
) -> tuple[list[Job], list[Job]]:
    """The waiting jobs that their projects' GPU time allows to start, and the others.

    What runs is counted until now; it is entered in the ledger when it ends, and goes on if the time runs out.
    """
    allowed: list[Job] = []
    held: list[Job] = []
    running: dict[str, float] = {}
    for job in active:
        if job.state is State.RUNNING and job.started_at is not None:
            used = job.spec.total.gpus * (now - job.started_at)
            running[job.project_id] = running.get(job.project_id, 0.0) + used
    spent: dict[str, bool] = {}
    for job in waiting:
        project = job.project_id
        if job.spec.resources.gpus and project not in spent:
            left = None
            with suppress(ConflictError):  # an archived project's work is its owner's to cancel
                left = ledger.gpu_seconds_left(project)
            spent[project] = left is not None and left <= running.get(project, 0.0)
        (held if job.spec.resources.gpus and spent[project] else allowed).append(job)
    return allowed, held
