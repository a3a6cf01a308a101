"""The controller: starts waiting jobs, watches running ones, settles what ended. It may be killed any time.

All it knows lies in the queue's table and with the executor: a new one takes over when the lease has run out.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from lapis.errors import ConflictError, LapisError, StorageError, UnavailableError
from lapis.jobs.executor import Executor, Status
from lapis.jobs.job import ACTIVE, Job, Resources, State
from lapis.jobs.queue import JobQueue, Lease
from lapis.log import logger

GRACE = 10.0  # seconds between asking a cancelled job to end and ending it


@dataclass(frozen=True)
class Decision:
    """What to do with a job next, and why."""

    act: Literal["wait", "terminate", "kill", "finish", "requeue"]
    state: State | None = None  # of a job that is finished
    reason: str = ""


def decide(job: Job, status: Status, now: float, warned: bool, grace: float = GRACE) -> Decision:
    """What to do with a job whose process has this status. `warned`: it was asked to end already."""
    if status.kind == "running":
        if job.cancel_at is None:
            return Decision("wait")
        if now >= job.cancel_at + grace:
            return Decision("kill")
        return Decision("wait" if warned else "terminate")
    if job.cancel_at is not None:
        return Decision("finish", State.CANCELLED, "cancelled on request")
    if status.kind == "exited":
        if status.exit_code == 0:
            return Decision("finish", State.SUCCEEDED)
        return Decision("finish", State.FAILED, f"exit status {status.exit_code}")
    if status.kind == "fenced":
        return Decision("requeue", reason=f"attempt {job.attempt} lost its controller before it began")
    lost = f"its process was lost in attempt {job.attempt}"
    if job.losses < job.spec.retries:
        return Decision("requeue", reason=lost)
    return Decision("finish", State.FAILED, lost)


def choose(waiting: Sequence[Job], running: Iterable[Job], capacity: Resources) -> list[Job]:
    """Which waiting jobs to start now: first come, first served; nobody overtakes one that must wait."""
    used = sum((job.spec.total for job in running), Resources(0, 0))
    chosen = []
    for job in waiting:
        if not (used + job.spec.total).fits(capacity):
            break
        used += job.spec.total
        chosen.append(job)
    return chosen


class Controller:
    """Moves the jobs of one executor along, a step at each `tick`."""

    def __init__(self, queue: JobQueue, executor: Executor, grace: float = GRACE) -> None:
        self.queue = queue
        self.executor = executor
        self.grace = grace
        self._leases: dict[str, Lease] = {}
        self._warned: set[str] = set()

    def run(self, stop: threading.Event, seconds: float = 1.0) -> None:
        """Tick every so many seconds until `stop` is set. Jobs that run then go on without a controller."""
        while not stop.is_set():
            try:
                self.tick()
            except LapisError as error:  # a busy database or a full disk: the next tick may succeed
                logger.warning("jobs: %s", error)
            stop.wait(seconds)

    def tick(self) -> None:
        """Take over orphans, settle what ended, start what fits."""
        for job in self.queue.orphans(self.executor.name):
            self._take_over(job)
        for lease in list(self._leases.values()):
            self._watch(lease)
        self._start_waiting()

    def _take_over(self, job: Job) -> None:
        lease = self.queue.take_over(job)
        if lease is None:
            return
        self._leases[job.id] = lease
        # The silent holder may have died just before or just after the start: the fence decides which.
        if job.state is State.STARTING and not self.executor.fence(job):
            self.queue.started(lease)
        logger.info("jobs: took over %s", job.id)

    def _watch(self, lease: Lease) -> None:
        try:
            job = self.queue.heartbeat(lease)
        except ConflictError as error:  # another controller has it now: it is no longer ours to touch
            logger.warning("jobs: %s", error)
            self._forget(lease.job_id)
            return
        status = self.executor.poll(job)
        decision = decide(job, status, self.queue.clock(), job.id in self._warned, self.grace)
        self._apply(lease, job, status, decision)

    def _apply(self, lease: Lease, job: Job, status: Status, decision: Decision) -> None:
        if decision.act == "terminate":
            self._warned.add(job.id)
            self.executor.terminate(job)
        elif decision.act == "kill":
            self.executor.kill(job)
        elif decision.act in ("finish", "requeue"):
            self.executor.kill(job)  # nothing it left behind may run on beside the next attempt
            if decision.state is not None:
                self.queue.finish(lease, decision.state, decision.reason, status.exit_code)
            else:
                self.queue.requeue(lease, decision.reason, job.losses + (status.kind == "lost"))
            self._forget(job.id)

    def _start_waiting(self) -> None:
        waiting, nodes = self.queue.list(State.QUEUED), self.executor.nodes
        if nodes is None:
            for job in waiting:
                self._start(job, {})
            return
        capacity = sum((node.resources for node in nodes), Resources(0, 0))
        for job in waiting:
            if not job.spec.total.fits(capacity):
                self._refuse(job, capacity)
        active = [job for job in self.queue.list(*ACTIVE) if job.executor == self.executor.name]
        possible = [job for job in waiting if job.spec.total.fits(capacity)]
        for job in choose(possible, active, capacity):
            self._start(job, {nodes[0].name: job.spec.ranks})

    def _start(self, job: Job, ranks: Mapping[str, int]) -> None:
        lease = self.queue.claim(job, self.executor.name, ranks, self.executor.nodes or ())
        if lease is None:
            return
        self._leases[job.id] = lease
        try:
            self.executor.start(self.queue.get(job.id))
            self.queue.started(lease)
        except ConflictError as error:  # the lease was lost while it was about to start
            logger.warning("jobs: %s", error)
            self._forget(job.id)
        except (UnavailableError, StorageError) as error:
            self.queue.finish(lease, State.FAILED, error.message)
            self._forget(job.id)

    def _refuse(self, job: Job, room: Resources) -> None:
        lease = self.queue.claim(job, self.executor.name)
        if lease is not None:
            asked = job.spec.total
            self.queue.finish(lease, State.FAILED, f"it asks for {asked}; {self.executor.name} has {room}")

    def _forget(self, job_id: str) -> None:
        self._leases.pop(job_id, None)
        self._warned.discard(job_id)
