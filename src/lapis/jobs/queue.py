"""The job queue: a table. Who starts a job holds its lease; who lost the lease changes nothing any more."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine, Row

from lapis.audit import AuditLog
from lapis.db import write
from lapis.errors import ConflictError, NotFoundError
from lapis.hashing import canonical_json
from lapis.jobs.job import (
    ACTIVE,
    ENDED,
    Job,
    JobSpec,
    Node,
    Place,
    Priority,
    Resources,
    State,
    check_move,
)
from lapis.jobs.placement import assign
from lapis.jobs.shares import add_use_in, note_first_in
from lapis.tables.jobs import executors, jobs
from lapis.tenants.tenant import DEFAULT, archived_in
from lapis.tenants.usage import UsageLedger, Work

LEASE = 15.0  # seconds that a holder may be silent before another one may take its jobs over
ABSENT_SECONDS = 86_400.0  # so long a silent executor may come back: what only it can hold waits for it

# What an attempt has, and gives back when it ends.
_FREE: dict[str, Any] = dict.fromkeys(
    ("lease_token", "lease_until", "places", "preempt_at", "preempt_for"),
)
_AGAIN: dict[str, Any] = {
    **_FREE,
    "executor": None,
    "started_at": None,
}  # and what one that waits again loses


@dataclass(frozen=True)
class Lease:
    """The right to change one job, as long as its token is the one in the table."""

    job_id: str
    token: str


class JobQueue:
    """The jobs of an installation. Every change is one guarded transaction, for any number of controllers."""

    def __init__(
        self,
        db: Engine,
        clock: Callable[[], float] = time.time,
        lease_seconds: float = LEASE,
        ledger: UsageLedger | None = None,
    ) -> None:
        """`ledger`: where the time of attempts is entered as they end; it knows the prices."""
        self.db = db
        self.clock = clock
        self.lease_seconds = lease_seconds
        self.audit = AuditLog(db, clock)
        self.ledger = ledger or UsageLedger(db, clock)

    def submit(self, spec: JobSpec, actor: str, project_id: str = DEFAULT) -> Job:
        """Put a job at the end of the queue. Raises ConflictError for an archived project."""
        with write(self.db) as connection:
            return self.submit_in(connection, spec, actor, project_id)

    def submit_in(self, connection: Connection, spec: JobSpec, actor: str, project_id: str = DEFAULT) -> Job:
        """The same, in the caller's `db.write` transaction."""
        if project_id in archived_in(connection, project_id):
            raise ConflictError(f"The project {project_id} is archived: nothing is begun in it.")
        job_id = f"job_{secrets.token_hex(10)}"
        row = {"id": job_id, "project_id": project_id, "name": spec.name, "spec": canonical_json(spec)}
        row |= {"state": State.QUEUED, "reason": "", "created_by": actor}
        connection.execute(jobs.insert().values(**row, attempt=0, losses=0, created_at=self.clock()))
        facts = {"name": spec.name, "argv": spec.argv, "project_id": project_id}
        self.audit.append_in(connection, actor, "job.submit", job_id, facts)
        return _get(connection, job_id)

    def get(self, job_id: str) -> Job:
        """A job by its id. Raises NotFoundError."""
        with self.db.connect() as connection:
            return _get(connection, job_id)

    def list(self, *states: State, project_id: str | None = None) -> list[Job]:
        """Jobs, oldest first: all of them, or those in some states, or of one project."""
        query = sa.select(jobs).order_by(jobs.c.created_at, jobs.c.id)
        if states:
            query = query.where(jobs.c.state.in_(states))
        if project_id is not None:
            query = query.where(jobs.c.project_id == project_id)
        with self.db.connect() as connection:
            return [_job(row) for row in connection.execute(query)]

    def archived(self) -> frozenset[str]:
        """The projects that are archived: what waits there is not started any more."""
        with self.db.connect() as connection:
            return archived_in(connection)

    def cancel(self, job_id: str, actor: str) -> Job:
        """End a waiting job now; have a running one stopped by its holder. Raises ConflictError if ended."""
        with write(self.db) as connection:
            job, now = _get(connection, job_id, to_change=True), self.clock()
            if job.state in ENDED:
                raise ConflictError(f"The job {job_id} has ended already: it is {job.state}.")
            if job.state in ACTIVE:
                _set(connection, job_id, cancel_at=now if job.cancel_at is None else job.cancel_at)
            else:
                check_move(job_id, job.state, State.CANCELLED)
                _set(connection, job_id, state=State.CANCELLED, reason=f"cancelled by {actor}", ended_at=now)
            facts = {"state": job.state, "project_id": job.project_id}
            self.audit.append_in(connection, actor, "job.cancel", job_id, facts)
            return _get(connection, job_id)

    def claim(
        self,
        job: Job,
        executor: str,
        ranks: Mapping[str, int] | None = None,
        nodes: Sequence[Node] = (),
        first: bool = False,
    ) -> Lease | None:
        """Take a queued job in order to start its next attempt, with so many ranks on each of the nodes.

        None if another one was faster: for the job, or for the room. Without `ranks` no room is looked for.
        `first`: it was the first of its project's jobs.
        """
        with write(self.db, lock=f"executor:{executor}") as connection:
            current = _get(connection, job.id, to_change=True)
            if current.state is not State.QUEUED or current.attempt != job.attempt:
                return None
            places = assign(job.spec, ranks, nodes, _active(connection, executor)) if ranks else ()
            if places is None:
                return None
            if first:
                note_first_in(connection, job.project_id, self.clock())
            begun = replace(current, attempt=job.attempt + 1, started_at=0.0)
            self.ledger.hold_in(connection, _work(begun, job.spec.time_limit or 0.0))
            return self._grant(
                connection,
                job.id,
                state=State.STARTING,
                attempt=job.attempt + 1,
                executor=executor,
                places=canonical_json(places) if places else None,
                reason="",
            )

    def preempt(self, job: Job, for_id: str) -> bool:
        """Have an attempt stopped by its holder, for another job; False if it ended or was asked before."""
        with write(self.db) as connection:
            current = _get(connection, job.id, to_change=True)
            running = current.state is State.RUNNING and current.attempt == job.attempt
            if not running or current.preempt_at is not None or current.cancel_at is not None:
                return False
            _set(connection, job.id, preempt_at=self.clock(), preempt_for=for_id)
            return True

    def note_executor(self, name: str, nodes: Sequence[Node] | None) -> None:
        """Say that a controller of this executor lives, and what there is; None: it has a queue of its own."""
        row = {"nodes": None if nodes is None else canonical_json(list(nodes)), "seen_at": self.clock()}
        mine = executors.c.name == name
        with write(self.db, lock=f"executor:{name}") as connection:
            if not connection.execute(executors.update().where(mine).values(**row)).rowcount:
                connection.execute(executors.insert().values(name=name, **row))

    def executors(self, seconds: float = LEASE) -> dict[str, tuple[Node, ...] | None]:
        """The executors whose controllers were heard of within so many seconds, with their nodes."""
        since = self.clock() - max(self.lease_seconds, seconds)
        with self.db.connect() as connection:
            rows = connection.execute(sa.select(executors).where(executors.c.seen_at >= since)).all()
        return {row.name: None if row.nodes is None else _nodes(row.nodes) for row in rows}

    def orphans(self, executor: str) -> Sequence[Job]:
        """Jobs that this executor started and whose holder has been silent for longer than its lease."""
        return [job for job in self.list(*ACTIVE) if job.executor == executor and self._is_silent(job)]

    def take_over(self, job: Job) -> Lease | None:
        """Take an orphan's lease from its silent holder; None if it spoke again or another was faster."""
        with write(self.db) as connection:
            current = _get(connection, job.id, to_change=True)
            if current.state not in ACTIVE or current.attempt != job.attempt or not self._is_silent(current):
                return None
            return self._grant(connection, job.id)

    def _is_silent(self, job: Job) -> bool:
        """Whether a job's lease has run out, or ends later than one can: then the clock was set back since."""
        now, until = self.clock(), job.lease_until or 0.0
        # Twice as long: the clocks of two hosts differ a little.
        return until <= now or until > now + 2 * max(self.lease_seconds, LEASE)

    def heartbeat(self, lease: Lease) -> Job:
        """Prolong a lease; returns the job as it is now. Raises ConflictError if the lease is lost."""
        with write(self.db) as connection:
            self._held(connection, lease)
            _set(connection, lease.job_id, lease_until=self.clock() + self.lease_seconds)
            return _get(connection, lease.job_id)

    def started(self, lease: Lease) -> Job:
        """Record that the job's process runs. Raises ConflictError if the lease is lost."""
        return self._move(lease, State.RUNNING, started_at=self.clock(), reason="")

    def explain(self, lease: Lease, reason: str) -> Job:
        """Say why a job that is about to start still waits. Raises ConflictError if the lease is lost."""
        with write(self.db) as connection:
            self._held(connection, lease)
            _set(connection, lease.job_id, reason=reason)
            return _get(connection, lease.job_id)

    def finish(
        self,
        lease: Lease,
        state: State,
        reason: str = "",
        exit_code: int | None = None,
        seconds: float | None = None,
    ) -> Job:
        """End a job that ran so long (None: until now). Raises ConflictError if the lease is lost."""
        assert state in ENDED
        ended: dict[str, Any] = {"reason": reason, "exit_code": exit_code, "ended_at": self.clock()}
        return self._move(lease, state, seconds, **ended, **_FREE)

    def requeue(self, lease: Lease, reason: str, losses: int, seconds: float | None = None) -> Job:
        """Put a job, lost so often, back to its place in the queue. Raises ConflictError: lease lost."""
        return self._move(lease, State.QUEUED, seconds, reason=reason, losses=losses, **_AGAIN)

    def preempted(self, lease: Lease, reason: str, exit_code: int | None) -> Job:
        """Record that a job stopped for another one. Raises ConflictError if the lease is lost."""
        return self._move(lease, State.PREEMPTED, reason=reason, exit_code=exit_code, **_AGAIN)

    def queue_preempted(self) -> None:
        """Give the jobs that stopped for others their old places in the queue back."""
        stopped = jobs.c.state == State.PREEMPTED
        with write(self.db) as connection:
            connection.execute(jobs.update().where(stopped).values(state=State.QUEUED))

    def _move(self, lease: Lease, to: State, seconds: float | None = None, **values: Any) -> Job:
        with write(self.db) as connection:
            job, now = self._held(connection, lease), self.clock()
            check_move(lease.job_id, job.state, to)
            _set(connection, lease.job_id, state=to, **values)
            if to not in ACTIVE:
                self.ledger.let_go_in(connection, f"{job.id}:{job.attempt}")
            if job.state is State.RUNNING:
                ran = job if seconds is None else replace(job, started_at=now - seconds)
                add_use_in(connection, ran, now)
                self.ledger.book_in(connection, _work(ran, now))
            return _get(connection, lease.job_id)

    def _grant(self, connection: Connection, job_id: str, **values: Any) -> Lease:
        lease = Lease(job_id, secrets.token_hex(16))
        until = self.clock() + self.lease_seconds
        _set(connection, job_id, lease_token=lease.token, lease_until=until, **values)
        return lease

    def _held(self, connection: Connection, lease: Lease) -> Job:
        mine = sa.select(jobs).where(jobs.c.id == lease.job_id).with_for_update()
        row = connection.execute(mine).one_or_none()
        if row is None or row.lease_token != lease.token:
            raise ConflictError(f"The lease of {lease.job_id} is lost: another holder has the job now.")
        return _job(row)


def _set(connection: Connection, job_id: str, **values: Any) -> None:
    connection.execute(jobs.update().where(jobs.c.id == job_id).values(**values))


def _get(connection: Connection, job_id: str, to_change: bool = False) -> Job:
    query = sa.select(jobs).where(jobs.c.id == job_id)
    row = connection.execute(query.with_for_update() if to_change else query).one_or_none()
    if row is None:
        raise NotFoundError(f"There is no job {job_id[:60]!r}.", hint="lapis jobs list --all")
    return _job(row)


def _active(connection: Connection, executor: str) -> list[Job]:
    query = sa.select(jobs).where(jobs.c.state.in_(ACTIVE), jobs.c.executor == executor)
    return [_job(row) for row in connection.execute(query)]


def _job(row: Row[Any]) -> Job:
    places = json.loads(row.places) if row.places else ()
    return Job(
        row.id, row.project_id, _spec(row.spec), State(row.state), row.reason, row.attempt, row.losses,
        row.executor, row.exit_code,
        row.lease_until, row.cancel_at, row.created_at, row.created_by, row.started_at, row.ended_at,
        tuple(Place(place["node"], place["ranks"], tuple(place["gpus"])) for place in places),
        row.preempt_at, row.preempt_for,
    )  # fmt: skip


def _work(job: Job, now: float) -> Work:
    """What an attempt that ends now occupied: that is what it is billed for, busy or not."""
    total, seconds = job.spec.total, max(0.0, now - (now if job.started_at is None else job.started_at))
    name = f"{job.id}:{job.attempt}"
    kind, _, who = job.created_by.partition(":")
    return Work(
        job.project_id, name, job.spec.name, total.cpus * seconds, total.gpus * seconds,
        key_id=who if kind == "key" else None, user_id=who if kind == "user" else None,
    )  # fmt: skip


@lru_cache(maxsize=32_768)
def _spec(text: str) -> JobSpec:
    """A spec by its JSON. It never changes, and a controller reads all that wait every second."""
    facts = json.loads(text)
    facts |= {"argv": tuple(facts["argv"]), "resources": Resources(**facts["resources"])}
    facts["priority"] = Priority(facts.get("priority", Priority.NORMAL))
    return JobSpec(**facts)


def _nodes(text: str) -> tuple[Node, ...]:
    return tuple(Node(node["name"], Resources(**node["resources"])) for node in json.loads(text))
