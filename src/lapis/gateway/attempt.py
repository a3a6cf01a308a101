"""The work on a fine-tuning job as a job of the queue sees it: two commands, and what each may write.

`lapis finetuning check` reads the files and queues the second; `lapis finetuning train` trains. A process may write
only while the queue's attempt that it is has the job: one that was cancelled, paused or lost changes nothing.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection
from sqlalchemy.engine import Engine as Database

from lapis.audit import AuditLog
from lapis.db import write
from lapis.errors import ConflictError
from lapis.gateway import fine_tuning
from lapis.gateway.fine_tuning import WORKING, Event, FineTuningJob, change, find, tell
from lapis.hashing import canonical_json
from lapis.home import Home
from lapis.jobs.executors.local import MARK
from lapis.jobs.job import ACTIVE, State
from lapis.jobs.queue import JobQueue
from lapis.tables.fine_tuning import fine_tuned_models, fine_tuning_checkpoints
from lapis.tables.jobs import jobs


@dataclass(frozen=True)
class Made:
    """A model that a job has made: its name, its adapter's folder below the home and digest."""

    name: str
    folder: str
    digest: str


class Attempt:
    """One attempt of the queue to work on a fine-tuning job. Every method raises ConflictError once it is over."""

    def __init__(
        self,
        home: Home,
        db: Database,
        job_id: str,
        name: str | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`name` is the attempt's, "job_…/1", by default of the environment."""
        self.home = home
        self.db = db
        self.job_id = job_id
        self.clock = clock
        self.audit = AuditLog(db, clock)
        self._queue_job, _, number = (name or os.environ.get(MARK, "")).partition("/")
        self._number = int(number) if number.isdecimal() else 0

    @property
    def name(self) -> str:
        """The queue's job and the number of the attempt."""
        return f"{self._queue_job}/{self._number}"

    def job(self) -> FineTuningJob:
        """The job as it is now."""
        with self.db.connect() as connection:
            return self._held(connection)

    def tell(
        self, *events: Event, status: fine_tuning.Status | None = None, **progress: Any
    ) -> FineTuningJob:
        """Add events, the job's status and its progress."""
        with write(self.db, lock=f"fine_tuning:{self.job_id}") as connection:
            job = self._held(connection)
            return self._note(connection, job, events, status, progress)

    def checked(self, **progress: Any) -> FineTuningJob:
        """Record that the files are sound, and queue the training."""
        with write(self.db, lock=f"fine_tuning:{self.job_id}") as connection:
            job = self._held(connection)
            told = [Event("validated", "Files validated, moving job to queued state.")]
            job = self._note(connection, job, told, "queued", progress)
            queue = JobQueue(self.db, self.clock)
            return fine_tuning.work_in(connection, queue, self.home, job, "train", job.created_by)

    def has_checkpoint(self, step: int) -> bool:
        """Whether the checkpoint of a step is recorded."""
        table = fine_tuning_checkpoints
        with self.db.connect() as connection:
            which = (table.c.job_id == self.job_id) & (table.c.step == step)
            return connection.execute(sa.select(table.c.id).where(which)).first() is not None

    def checkpoint(
        self, step: int, metrics: Mapping[str, Any], made: Made, at: float, *events: Event
    ) -> None:
        """Record a checkpoint and its model, once."""
        with write(self.db, lock=f"fine_tuning:{self.job_id}") as connection:
            job, table = self._held(connection), fine_tuning_checkpoints
            which = (table.c.job_id == job.id) & (table.c.step == step)
            if connection.execute(sa.select(table.c.id).where(which)).first() is None:
                row = {
                    "id": f"ftckpt_{job.id.removeprefix('ftjob-')}{step:08d}",
                    "job_id": job.id,
                    "step": step,
                }
                row |= {"created_at": at, "model": made.name, "metrics": canonical_json(dict(metrics))}
                connection.execute(table.insert().values(**row))
                self._register(connection, job, made)
            tell(connection, job.id, events, self.clock())

    def succeed(self, made: Made, *events: Event, **progress: Any) -> None:
        """End the job with its model, which is registered in the same transaction."""
        with write(self.db, lock=f"fine_tuning:{self.job_id}") as connection:
            job = self._held(connection)
            self._register(connection, job, made)
            self._end(connection, job, "succeeded", events, {**progress, "fine_tuned_model": made.name})

    def fail(self, code: str, message: str, param: str | None = None) -> None:
        """End the job with what was wrong."""
        with write(self.db, lock=f"fine_tuning:{self.job_id}") as connection:
            fail_in(connection, self._held(connection), self.audit, self.clock(), code, message, param)

    def _note(
        self,
        connection: Connection,
        job: FineTuningJob,
        events: Sequence[Event],
        status: fine_tuning.Status | None,
        progress: Mapping[str, Any],
    ) -> FineTuningJob:
        tell(connection, job.id, events, self.clock())
        change(connection, job.id, status=status or job.status, progress={**job.progress, **progress})
        return find(connection, job.id)

    def _end(
        self,
        connection: Connection,
        job: FineTuningJob,
        status: fine_tuning.Status,
        events: Sequence[Event],
        progress: Mapping[str, Any],
    ) -> None:
        self._note(connection, job, events, status, progress)
        change(connection, job.id, finished_at=self.clock())
        facts = {"model": progress["fine_tuned_model"], "trained_tokens": progress.get("trained_tokens")}
        facts |= {"project_id": job.project_id}
        self.audit.append_in(connection, "server", "fine_tuning.succeed", job.id, facts)

    def _register(self, connection: Connection, job: FineTuningJob, made: Made) -> None:
        request = job.request
        row = {
            **vars(made),
            "project_id": job.project_id,
            "job_id": job.id,
            "created_at": self.clock(),
            "base": request.base,
            "base_digest": request.base_digest,
            "licence": job.progress.get("licence", "unknown"),
        }
        connection.execute(fine_tuned_models.insert().values(**row))
        facts = {"job": job.id, "digest": made.digest, "base": request.base, "project_id": job.project_id}
        self.audit.append_in(connection, "server", "model.create", made.name, facts)

    def _held(self, connection: Connection) -> FineTuningJob:
        job = find(connection, self.job_id)
        mine = (jobs.c.id == self._queue_job) & (jobs.c.attempt == self._number)
        state = connection.execute(sa.select(jobs.c.state).where(mine)).scalar_one_or_none()
        working = state is not None and State(state) in ACTIVE
        if job.queue_job_id != self._queue_job or job.status not in WORKING or not working:
            raise ConflictError(
                f"The fine-tuning job {self.job_id} is {job.status}, and not this process's to work on.",
                hint="The server's queue starts this command; it is not for the command line.",
            )
        return job


def fail_in(
    connection: Connection,
    job: FineTuningJob,
    audit: AuditLog,
    now: float,
    code: str,
    message: str,
    param: str | None = None,
) -> None:
    """End a job with what was wrong, in the caller's transaction."""
    error = {"code": code, "message": message, "param": param}
    tell(
        connection,
        job.id,
        [Event("failed", f"The job failed: {message}", "error", data={"error": error})],
        now,
    )
    progress = {**job.progress, "error": error}
    change(connection, job.id, status="failed", finished_at=now, progress=progress)
    facts = {"code": code, "message": message, "project_id": job.project_id}
    audit.append_in(connection, "server", "fine_tuning.fail", job.id, facts)
