"""What keeps fine-tuning jobs and the queue in step: it runs beside the requests of every server."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import sqlalchemy as sa

from lapis.db import write
from lapis.errors import ConflictError, NotFoundError
from lapis.gateway.attempt import fail_in
from lapis.gateway.fine_tuning import (
    ENDED,
    WORKING,
    Event,
    FineTuning,
    FineTuningJob,
    Status,
    change,
    find,
    forget_examples,
    tell,
    work_in,
)
from lapis.jobs import job as queued
from lapis.jobs.job import Job, State
from lapis.tables.fine_tuning import fine_tuning_jobs

SECONDS = 0.5
RESTARTS = 3  # of work that was ended by a signal, without a step of progress in between
SIGNALS = 128  # exit statuses above it: ended by a signal, or after one, at a checkpoint (130)


@dataclass(frozen=True)
class Settlement:
    """What to do with a job, and why."""

    act: Literal["wait", "work", "again", "queue", "fail", "cancel", "stop"]
    reason: str = ""


def decide(job: FineTuningJob, working: Job | None, left: Job | None) -> Settlement:
    """What to do with a job: `working` is the queue's job that works on it, `left` the one before it."""
    if job.status not in WORKING:
        stray = left is not None and left.state not in queued.ENDED and left.cancel_at is None
        return Settlement("stop" if stray else "wait")
    if working is None:
        over = left is None or left.state in queued.ENDED
        return Settlement("work" if over else "wait")
    if working.state in (State.QUEUED, State.PREEMPTED):
        return Settlement("queue" if job.status == "running" else "wait")
    if working.state not in queued.ENDED:
        return Settlement("wait")
    if working.state is State.CANCELLED:
        return Settlement("cancel", working.reason)
    if working.state is State.FAILED and (working.exit_code or 0) > SIGNALS and _restarts(job) < RESTARTS:
        return Settlement("again", working.reason)
    return Settlement("fail", working.reason or "its process ended without a result")


class FineTuningLoop:
    """Moves fine-tuning jobs along where their own processes cannot: they died, or are to be stopped."""

    def __init__(self, jobs: FineTuning) -> None:
        self.jobs = jobs

    async def run(self) -> None:
        """Settle, again and again, as long as the server runs."""
        while True:
            await asyncio.to_thread(self.settle)
            await asyncio.sleep(SECONDS)

    def settle(self) -> None:
        """Look at every job once that is not at rest."""
        table = fine_tuning_jobs
        restless = table.c.status.in_(WORKING) | table.c.left_job_id.is_not(None)
        with self.jobs.db.connect() as connection:
            ids = connection.execute(sa.select(table.c.id).where(restless)).scalars().all()
        for id in ids:
            self._settle(id)

    def _settle(self, id: str) -> None:
        with self.jobs.db.connect() as connection:
            job = find(connection, id)
        settlement = decide(job, self._queued(job.queue_job_id), self._queued(job.left_job_id))
        if settlement.act == "stop" and job.left_job_id is not None:
            self._cancel(job.left_job_id)
        elif settlement.act == "wait":
            self._forget(job)
        else:
            with write(self.jobs.db, lock=f"fine_tuning:{id}") as connection:
                if find(connection, id) == job:  # else another server was faster, or its process spoke
                    self._apply(connection, job, settlement)

    def _apply(self, connection: sa.Connection, job: FineTuningJob, settlement: Settlement) -> None:
        jobs, now = self.jobs, self.jobs.clock()
        if settlement.act in ("work", "again"):
            progress = dict(job.progress)
            if settlement.act == "again":
                progress |= {"restarts": _restarts(job) + 1, "restart_step": job.progress.get("step", 0)}
                told = Event(
                    f"again:{job.queue_job_id}", f"The work starts again: {settlement.reason}.", "warn"
                )
                tell(connection, job.id, [told], now)
            step = "train" if "examples" in job.progress else "check"
            status: Status = "queued" if step == "train" else "validating_files"
            change(connection, job.id, status=status, progress=progress)
            work_in(connection, jobs.queue, jobs.home, job, step, "server")  # type: ignore[arg-type]
        elif settlement.act == "queue":
            told = Event(
                f"queued:{job.queue_job_id}:{job.progress.get('step', 0)}", "The job waits in the queue."
            )
            tell(connection, job.id, [told], now)
            change(connection, job.id, status="queued")
        elif settlement.act == "fail":
            fail_in(
                connection, job, jobs.audit, now, "training_failed", f"The work ended: {settlement.reason}."
            )
        elif settlement.act == "cancel":
            tell(connection, job.id, [Event("cancelled", f"The job has been {settlement.reason}.")], now)
            change(connection, job.id, status="cancelled", finished_at=now)
            facts = {"status": job.status, "project_id": job.project_id}
            jobs.audit.append_in(connection, "server", "fine_tuning.cancel", job.id, facts)

    def _forget(self, job: FineTuningJob) -> None:
        """Once what worked on it has ended, a job at rest is looked at no more."""
        if job.left_job_id is None or job.status not in ENDED:
            return
        left = self._queued(job.left_job_id)
        if left is None or left.state in queued.ENDED:
            forget_examples(self.jobs.home, job.id)
            with write(self.jobs.db, lock=f"fine_tuning:{job.id}") as connection:
                change(connection, job.id, left_job_id=None)

    def _queued(self, id: str | None) -> Job | None:
        if id is None:
            return None
        try:
            return self.jobs.queue.get(id)
        except NotFoundError:
            return None

    def _cancel(self, id: str) -> None:
        with suppress(ConflictError):  # it has ended meanwhile
            self.jobs.queue.cancel(id, "server")


def _restarts(job: FineTuningJob) -> int:
    """How often the work began anew since its last step of progress."""
    progress: Any = job.progress
    return progress.get("restarts", 0) if progress.get("step", 0) <= progress.get("restart_step", -1) else 0
