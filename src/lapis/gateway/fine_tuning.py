"""Fine-tuning jobs of projects: asked for, watched, stopped. What trains is a job of the queue (see `attempt`)."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Row
from sqlalchemy.engine import Engine as Database

from lapis.audit import AuditLog
from lapis.db import write
from lapis.errors import ConflictError, NotFoundError
from lapis.gateway.files import FileStore
from lapis.gateway.hyperparameters import Kind
from lapis.gateway.paging import Page, page
from lapis.hashing import canonical_json, digest_json
from lapis.home import Home
from lapis.jobs.job import JobSpec, Resources
from lapis.jobs.queue import JobQueue
from lapis.storage import storage_errors
from lapis.tables.fine_tuning import fine_tuning_checkpoints, fine_tuning_events, fine_tuning_jobs

Status = Literal["validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"]
Step = Literal["check", "train"]
WORKING = ("validating_files", "queued", "running")
ENDED = ("succeeded", "failed", "cancelled")
FILES = ("training_file", "validation_file")  # of a request
NO_METADATA = "null"  # a filter for the jobs that have none
LOSSES = 5  # how often the queue starts the work anew when its process vanished
CHECK = Resources(cpus=0)  # a moment of one CPU: it waits for nobody


@dataclass(frozen=True)
class Request:
    """What was asked for. `hyperparameters` are as they were given, a missing one is "auto"."""

    organization_id: str
    model: str
    base: str  # the servable that is trained on: of a release its exact version
    base_digest: str
    training_file: str
    validation_file: str | None
    kind: Kind
    hyperparameters: Mapping[str, Any]
    seed: int
    suffix: str | None = None
    grader: Mapping[str, Any] | None = None
    legacy: bool = False  # without a method, by the older top-level hyperparameters


@dataclass(frozen=True)
class FineTuningJob:
    """A fine-tuning job. `progress` holds what became of it so far, by name."""

    id: str
    project_id: str
    created_at: float
    created_by: str
    status: Status
    queue_job_id: str | None
    left_job_id: str | None
    paused_at: float | None
    finished_at: float | None
    metadata: Mapping[str, str] | None
    request: Request
    progress: Mapping[str, Any]

    @property
    def model(self) -> str:
        """The name of the model that it makes."""
        request = self.request
        own = self.id.removeprefix("ftjob-")[:8]
        return f"ft:{request.model}:{request.organization_id}:{request.suffix or ''}:{own}"

    def checkpoint_model(self, step: int) -> str:
        """The name of the model of one of its checkpoints."""
        return f"{self.model}:ckpt-step-{step}"


@dataclass(frozen=True)
class Event:
    """Something that a job tells, once for each `cause`."""

    cause: str
    message: str
    level: Literal["info", "warn", "error"] = "info"
    at: float | None = None
    metrics: Mapping[str, Any] | None = None  # of a step
    data: Mapping[str, Any] = field(default_factory=dict)


class FineTuning:
    """The fine-tuning jobs of an installation. All methods block; call them in a thread."""

    def __init__(
        self,
        home: Home,
        db: Database,
        queue: JobQueue,
        files: FileStore,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.home = home
        self.db = db
        self.queue = queue
        self.files = files
        self.clock = clock
        self.audit = AuditLog(db, clock)

    def create(
        self, project_id: str, actor: str, request: Request, metadata: Mapping[str, str] | None
    ) -> FineTuningJob:
        """Take a job in, and queue the check of its files. Raises NotFoundError for a file that is not there."""
        id = f"ftjob-{secrets.token_hex(12)}"
        self._keep_examples(project_id, id, request)
        row = {
            "id": id,
            "project_id": project_id,
            "created_at": self.clock(),
            "created_by": actor,
            "status": "validating_files",
            "metadata": canonical_json(dict(metadata)) if metadata else None,
            "request": canonical_json(asdict(request)),
            "progress": "{}",
        }
        with write(self.db) as connection:
            connection.execute(fine_tuning_jobs.insert().values(**row))
            job = find(connection, id)
            told = [
                Event("created", f"Created fine-tuning job: {job.id}"),
                Event("validating", "Validating files."),
            ]
            tell(connection, job.id, told, self.clock())
            facts = {"model": request.model, "training_file": request.training_file, "method": request.kind}
            facts |= {"project_id": project_id}
            self.audit.append_in(connection, actor, "fine_tuning.create", job.id, facts)
            return work_in(connection, self.queue, self.home, job, "check", actor)

    def get(self, project_id: str, id: str) -> FineTuningJob:
        """A project's job. Raises NotFoundError."""
        with self.db.connect() as connection:
            return _of(connection, project_id, id)

    def list(
        self,
        project_id: str,
        *,
        after: str | None = None,
        limit: int = 20,
        metadata: Mapping[str, str] | Literal["null"] | None = None,
    ) -> tuple[list[FineTuningJob], bool]:
        """A page of a project's jobs, the newest first, and whether more follow. Raises InputError for `after`."""
        query = sa.select(fine_tuning_jobs).where(fine_tuning_jobs.c.project_id == project_id)
        text = fine_tuning_jobs.c.metadata
        if isinstance(metadata, str):
            query = query.where(text.is_(None))
        elif metadata:
            query = query.where(*(_has(text, key, value) for key, value in metadata.items()))
        with self.db.connect() as connection:
            found = page(connection, query, fine_tuning_jobs, after=after, limit=limit)
        return [_job(row) for row in found.rows], found.has_more

    def events(self, project_id: str, id: str, after: str | None, limit: int) -> Page:
        """A page of what a job told, the newest first. Raises NotFoundError, InputError for `after`."""
        return self._told(project_id, id, fine_tuning_events, "sequence", after, limit)

    def checkpoints(self, project_id: str, id: str, after: str | None, limit: int) -> Page:
        """A page of a job's checkpoints, the newest first. Raises NotFoundError, InputError for `after`."""
        return self._told(project_id, id, fine_tuning_checkpoints, "step", after, limit)

    def cancel(self, project_id: str, id: str, actor: str) -> FineTuningJob:
        """End a job for good; its checkpoints stay. Raises NotFoundError, ConflictError if it has ended."""
        with write(self.db, lock=f"fine_tuning:{id}") as connection:
            job = _of(connection, project_id, id)
            if job.status in ENDED:
                raise _wrong_state(job, "cancelled")
            told = Event(f"cancelled:{job.queue_job_id}", "The job has been cancelled.")
            self._leave(connection, job, "cancelled", told, actor, finished_at=self.clock())
        return self._stop(job)

    def pause(self, project_id: str, id: str, actor: str) -> FineTuningJob:
        """Stop a job at a checkpoint, until it is resumed. Raises NotFoundError, ConflictError if it cannot be."""
        with write(self.db, lock=f"fine_tuning:{id}") as connection:
            job = _of(connection, project_id, id)
            if job.status not in WORKING:
                raise _wrong_state(job, "paused")
            told = Event(f"paused:{job.queue_job_id}", "The job has been paused.")
            self._leave(connection, job, "paused", told, actor, paused_at=self.clock())
        return self._stop(job)

    def resume(self, project_id: str, id: str, actor: str) -> FineTuningJob:
        """Let a paused job go on from its checkpoint. Raises NotFoundError, ConflictError if it is not paused."""
        with write(self.db, lock=f"fine_tuning:{id}") as connection:
            job = _of(connection, project_id, id)
            if job.status != "paused":
                raise _wrong_state(job, "resumed")
            status = "queued" if "examples" in job.progress else "validating_files"
            change(connection, id, status=status, paused_at=None)
            tell(
                connection,
                id,
                [Event(f"resumed:{job.left_job_id}", "The job has been resumed.")],
                self.clock(),
            )
            self.audit.append_in(connection, actor, "fine_tuning.resume", id, {"project_id": project_id})
            return find(connection, id)

    def _keep_examples(self, project_id: str, id: str, request: Request) -> None:
        """Put a job's files beside it, by second names for the same bytes: their owner may delete them now."""
        folder = examples_folder(self.home, id)
        with storage_errors(folder):
            folder.mkdir(parents=True)
            for param in FILES:
                file = getattr(request, param)
                if file is not None:
                    os.link(self.files.path(project_id, file), folder / param)

    def _leave(
        self,
        connection: Connection,
        job: FineTuningJob,
        status: Status,
        told: Event,
        actor: str,
        **times: float,
    ) -> None:
        left = job.queue_job_id or job.left_job_id
        change(connection, job.id, status=status, queue_job_id=None, left_job_id=left, **times)
        tell(connection, job.id, [told], self.clock())
        facts = {"status": job.status, "project_id": job.project_id}
        self.audit.append_in(connection, actor, f"fine_tuning.{_VERBS[status]}", job.id, facts)

    def _stop(self, job: FineTuningJob) -> FineTuningJob:
        """Have what works on a job stopped. If this process dies before that, `settle` sees to it."""
        if job.queue_job_id is not None:
            with suppress(ConflictError):  # it has ended meanwhile
                self.queue.cancel(job.queue_job_id, "server")
        return self.get(job.project_id, job.id)

    def _told(
        self, project_id: str, id: str, table: sa.Table, by: str, after: str | None, limit: int
    ) -> Page:
        with self.db.connect() as connection:
            job = _of(connection, project_id, id)
            query = sa.select(table).where(table.c.job_id == job.id)
            return page(connection, query, table, after=after, limit=limit, by=by)


_VERBS = {"cancelled": "cancel", "paused": "pause"}


def find(connection: Connection, id: str) -> FineTuningJob:
    """A job of any project. Raises NotFoundError."""
    query = sa.select(fine_tuning_jobs).where(fine_tuning_jobs.c.id == id)
    row = connection.execute(query).one_or_none()
    if row is None:
        raise _missing(id)
    return _job(row)


def change(connection: Connection, id: str, **values: Any) -> None:
    """Set columns of a job."""
    if "progress" in values:
        values["progress"] = canonical_json(values["progress"])
    connection.execute(fine_tuning_jobs.update().where(fine_tuning_jobs.c.id == id).values(**values))


def tell(connection: Connection, id: str, events: Sequence[Event], now: float) -> None:
    """Add to a job's events those of causes that were not told before."""
    named = {f"ftevent-{digest_json([id, event.cause])[:24]}": event for event in events}
    mine = fine_tuning_events.c.job_id == id
    known = sa.select(fine_tuning_events.c.id).where(mine, fine_tuning_events.c.id.in_(named))
    told = set(connection.execute(known).scalars())
    last = connection.execute(sa.select(sa.func.max(fine_tuning_events.c.sequence)).where(mine)).scalar() or 0
    rows = [
        {
            "id": name,
            "job_id": id,
            "created_at": now if event.at is None else event.at,
            "level": event.level,
            "type": "message" if event.metrics is None else "metrics",
            "message": event.message,
            "data": canonical_json(dict(event.data if event.metrics is None else event.metrics)),
        }
        for name, event in named.items()
        if name not in told
    ]
    if rows:
        connection.execute(
            fine_tuning_events.insert(), [{**row, "sequence": last + n} for n, row in enumerate(rows, 1)]
        )


def spec(home: Home, job: FineTuningJob, step: Step) -> JobSpec:
    """The command of one step of the work on a job."""
    command = (sys.executable, "-m", "lapis.cli.main", "finetuning", step, job.id)
    resources = CHECK if step == "check" else Resources(cpus=float(max(1, (os.cpu_count() or 1) // 2)))
    return JobSpec(
        f"fine-tuning {step}", command, resources, {"LAPIS_HOME": str(home.root)}, LOSSES, preemptible=step == "train"
    )  # fmt: skip


def examples_folder(home: Home, id: str) -> Path:
    """Where a job's files lie while it is worked on."""
    return home.fine_tuning / id / "examples"


def forget_examples(home: Home, id: str) -> None:
    """Remove the copies of a job's files: it needs them no more."""
    shutil.rmtree(examples_folder(home, id), ignore_errors=True)


def work_in(
    connection: Connection, queue: JobQueue, home: Home, job: FineTuningJob, step: Step, actor: str
) -> FineTuningJob:
    """Put the work on a job into the queue, in the caller's transaction."""
    queued = queue.submit_in(connection, spec(home, job, step), actor, job.project_id)
    change(connection, job.id, queue_job_id=queued.id, left_job_id=None)
    return find(connection, job.id)


def _of(connection: Connection, project_id: str, id: str) -> FineTuningJob:
    mine = (fine_tuning_jobs.c.id == id) & (fine_tuning_jobs.c.project_id == project_id)
    row = connection.execute(sa.select(fine_tuning_jobs).where(mine)).one_or_none()
    if row is None:
        raise _missing(id)
    return _job(row)


def _has(text: sa.ColumnElement[Any], key: str, value: str) -> sa.ColumnElement[bool]:
    """Whether canonical JSON of texts has this pair: quotes inside of texts are escaped, so it is exact."""
    pair = canonical_json({key: value})[1:-1]
    return sa.or_(*(sa.func.replace(text, before + pair, "") != text for before in ("{", ",")))


def _job(row: Row[Any]) -> FineTuningJob:
    facts = dict(row._mapping)
    facts["metadata"] = None if row.metadata is None else json.loads(row.metadata)
    facts["request"] = Request(**json.loads(row.request))
    facts["progress"] = json.loads(row.progress)
    return FineTuningJob(**facts)


def _missing(id: str) -> NotFoundError:
    return NotFoundError(f"There is no fine-tuning job {id[:80]!r} here.", param="fine_tuning_job_id")


def _wrong_state(job: FineTuningJob, wanted: str) -> ConflictError:
    return ConflictError(f"The fine-tuning job {job.id} is {job.status}: it cannot be {wanted}.")
