"""The controller: starts waiting jobs, watches running ones, settles what ended. It may be killed any time.

All it knows lies in the queue's table and with the executor: a new one takes over when the lease has run out.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from lapis.errors import ConflictError, LapisError, StorageError, UnavailableError
from lapis.jobs.budget import Budget, affordable, in_turn
from lapis.jobs.executor import Executor, Status
from lapis.jobs.fairshare import elsewhere, schedule
from lapis.jobs.job import ACTIVE, Job, Node, Priority, State
from lapis.jobs.policy import Policy
from lapis.jobs.queue import ABSENT_SECONDS, JobQueue, Lease
from lapis.jobs.shares import shares
from lapis.log import logger

NO_PLACE = 75  # EX_TEMPFAIL of sysexits.h: the job cannot go on where it is, and can elsewhere
GRACE = 10.0  # seconds between asking a cancelled job to end and ending it
SEEN_SECONDS = 5.0  # between two notes of what the executor has
AGAIN_SECONDS = 10.0  # between what failed for the moment, or unforeseen, and its next try


@dataclass(frozen=True)
class Decision:
    """What to do with a job next, and why."""

    act: Literal["wait", "terminate", "kill", "finish", "requeue", "preempt"]
    state: State | None = None  # of a job that is finished
    reason: str = ""


def decide(
    job: Job,
    status: Status,
    now: float,
    warned: bool,
    grace: float = GRACE,
    checkpoint_grace: float = Policy.grace,
) -> Decision:
    """What to do with a job whose process has this status. `warned`: it was asked to end already."""
    if status.kind == "waiting":
        # Asked again each time: whoever has it in a queue may not have answered.
        return Decision("wait" if job.cancel_at is None else "terminate")
    if status.kind == "running":
        limit = None if job.spec.time_limit is None else (job.started_at or now) + job.spec.time_limit
        reasons = ((job.cancel_at, grace), (limit, grace), (job.preempt_at, checkpoint_grace))
        patience = [at + given for at, given in reasons if at is not None and now >= at]
        if not patience:
            return Decision("wait")
        if now >= min(patience):
            return Decision("kill")
        return Decision("wait" if warned else "terminate")
    if job.cancel_at is not None:
        return Decision("finish", State.CANCELLED, "cancelled on request")
    if status.kind == "exited" and status.exit_code == 0:
        return Decision("finish", State.SUCCEEDED)
    if status.kind == "preempted":
        return Decision("requeue", reason=status.reason)
    if status.kind == "fenced":
        return Decision("requeue", reason=f"attempt {job.attempt} lost its controller before it began")
    if job.preempt_at is not None:
        return Decision("preempt", reason="stopped for another job; it goes on when there is room")
    if job.spec.time_limit is not None and now >= (job.started_at or now) + job.spec.time_limit:
        return Decision("finish", State.FAILED, f"it ran into its time limit of {job.spec.time_limit:g} s")
    if status.kind == "exited" and status.exit_code != NO_PLACE:
        return Decision("finish", State.FAILED, status.reason or f"exit status {status.exit_code}")
    lost = status.reason or "its process was lost"
    lost = f"{lost} in attempt {job.attempt}"
    if job.losses < job.spec.retries:
        return Decision("requeue", reason=lost)
    return Decision("finish", State.FAILED, lost)


class Controller:
    """Moves the jobs of one executor along, a step at each `tick`."""

    def __init__(
        self, queue: JobQueue, executor: Executor, grace: float = GRACE, policy: Policy | None = None
    ) -> None:
        self.queue = queue
        self.executor = executor
        self.grace = grace
        self.policy = policy or Policy()
        self._noted_at = -math.inf
        self._leases: dict[str, Lease] = {}
        self._warned: set[str] = set()
        # When the executor last refused a job for the moment, by what its limits may depend on.
        self._refused: dict[tuple[str, Priority], float] = {}

    def run(self, stop: threading.Event, seconds: float = 1.0) -> None:
        """Tick every so many seconds until `stop` is set. Jobs that run then go on without a controller."""
        while not stop.is_set():
            try:
                self.tick()
            except LapisError as error:  # a busy database or a full disk: the next tick may succeed
                logger.warning("jobs: %s", error)
            except Exception:  # noqa: BLE001
                # The last line of defence: what nobody foresaw is a defect, but the queue must not end with it.
                logger.exception(
                    "jobs: an error that nobody foresaw; the queue goes on in %g s", AGAIN_SECONDS
                )
                stop.wait(AGAIN_SECONDS)
            stop.wait(seconds)

    def tick(self) -> None:
        """Take over orphans, settle what ended, start what fits."""
        for job in self.queue.orphans(self.executor.name):
            self._apart(job.id, partial(self._take_over, job))
        for lease in list(self._leases.values()):
            self._apart(lease.job_id, partial(self._watch, lease))
        self._start_waiting()

    def _apart(self, job_id: str, step: Callable[[], None]) -> None:
        """Take a step of one job. An error that nobody foresaw holds up this job only, until its lease runs out."""
        try:
            step()
        except LapisError:
            raise
        except Exception:  # noqa: BLE001
            logger.exception("jobs: an error with %s that nobody foresaw", job_id)
            self._forget(job_id)

    def _take_over(self, job: Job) -> None:
        lease = self.queue.take_over(job)
        if lease is None:
            return
        # The silent holder may have died just before or just after the start: the fence decides which.
        if job.state is State.STARTING:
            self.executor.fence(job)
        self._leases[job.id] = lease
        logger.info("jobs: took over %s", job.id)

    def _watch(self, lease: Lease) -> None:
        try:
            job = self.queue.heartbeat(lease)
        except ConflictError as error:  # another controller has it now: it is no longer ours to touch
            logger.warning("jobs: %s", error)
            self._forget(lease.job_id)
            return
        try:
            status = self.executor.poll(job)
        except (
            UnavailableError
        ) as error:  # the executor does not answer: nothing is known, so nothing is done
            logger.warning("jobs: %s", error)
            return
        job = self._note(lease, job, status)
        now, warned = self.queue.clock(), job.id in self._warned
        decision = decide(job, status, now, warned, self.grace, self.policy.grace)
        self._apply(lease, job, status, decision)

    def _note(self, lease: Lease, job: Job, status: Status) -> Job:
        """Record what an executor with a queue of its own did with a job meanwhile."""
        if job.state is State.STARTING and status.kind == "waiting" and status.reason != job.reason:
            return self.queue.explain(lease, status.reason)
        if job.state is State.STARTING and status.kind not in ("waiting", "fenced"):
            return self.queue.started(lease)
        return job

    def _apply(self, lease: Lease, job: Job, status: Status, decision: Decision) -> None:
        if decision.act == "terminate":
            self._warned.add(job.id)
            self.executor.terminate(job)
        elif decision.act == "kill":
            self.executor.kill(job)
        elif decision.act != "wait":
            self.executor.kill(job)  # nothing it left behind may run on beside the next attempt
            if decision.act == "preempt":
                self.queue.preempted(lease, decision.reason, status.exit_code)
            elif decision.state is not None:
                self.queue.finish(lease, decision.state, decision.reason, status.exit_code, status.seconds)
            else:
                lost = status.kind in ("lost", "exited")
                self.queue.requeue(lease, decision.reason, job.losses + lost, status.seconds)
            self._forget(job.id)

    def _start_waiting(self) -> None:
        jobs = self.queue.list(State.QUEUED, State.PREEMPTED, *ACTIVE)
        if any(job.state is State.PREEMPTED for job in jobs):
            self.queue.queue_preempted()
            jobs = self.queue.list(State.QUEUED, *ACTIVE)
        waiting = [job for job in jobs if job.state is State.QUEUED and self._may_start(job)]
        self._note_nodes()
        if not waiting:
            return
        active = [job for job in jobs if job.state in ACTIVE]
        archived = self.queue.archived()
        budget = Budget(self.queue.ledger, active, self.queue.clock())
        waiting, _ = affordable([job for job in waiting if job.project_id not in archived], budget)
        if self.executor.nodes is None:
            for job in in_turn(waiting):
                self._start(budget, job, {})
            return
        mine = [job for job in active if job.executor == self.executor.name]
        self._carry_out(budget, waiting, mine, self.executor.nodes)

    def _carry_out(
        self, budget: Budget, waiting: Sequence[Job], active: Sequence[Job], nodes: Sequence[Node]
    ) -> None:
        now = self.queue.clock()
        decided = schedule(waiting, active, nodes, shares(self.queue.db, now), now, self.policy)
        by_id = {job.id: job for job in (*waiting, *active)}
        if decided.refused:
            self._refuse([by_id[job_id] for job_id in decided.refused], decided.refused)
        for job_id, ranks in decided.starts.items():
            self._start(budget, by_id[job_id], ranks, job_id in decided.firsts)
        for job_id, claimant in decided.preemptions.items():
            # Nobody stops for a job that cannot be paid for beside those that have just started.
            if budget.lack(by_id[claimant]) is None and self.queue.preempt(by_id[job_id], claimant):
                logger.info("jobs: %s is to stop for %s", job_id, claimant)

    def _note_nodes(self) -> None:
        now = self.queue.clock()
        if not 0 <= now - self._noted_at < SEEN_SECONDS:
            self.queue.note_executor(self.executor.name, self.executor.nodes)
            self._noted_at = now

    def _may_start(self, job: Job) -> bool:
        """Whether no job like this one was refused for the moment just now."""
        refused_at = self._refused.get(_kind(job))
        return refused_at is None or not 0 <= self.queue.clock() - refused_at < AGAIN_SECONDS

    def _start(self, budget: Budget, job: Job, ranks: Mapping[str, int], first: bool = False) -> None:
        if not self._may_start(job) or budget.lack(job) is not None:
            return
        lease = self.queue.claim(job, self.executor.name, ranks, self.executor.nodes or (), first)
        if lease is None:
            return
        budget.take(job)
        self._apart(job.id, partial(self._begin, lease))

    def _begin(self, lease: Lease) -> None:
        job = self.queue.get(lease.job_id)
        try:
            self.executor.start(job)
        except ConflictError as error:  # the lease was lost while it was about to start
            logger.warning("jobs: %s", error)
            return
        except (UnavailableError, StorageError) as error:
            self._not_started(lease, job, error)
            return
        self._leases[job.id] = lease
        if self.executor.nodes is not None:
            try:
                self.queue.started(lease)
            except ConflictError as error:
                logger.warning("jobs: %s", error)
                self._forget(job.id)

    def _not_started(self, lease: Lease, job: Job, error: UnavailableError | StorageError) -> None:
        """Settle a job that its executor refused: it waits again if that was for the moment only."""
        if isinstance(error, StorageError) or error.retry_after is not None:
            self.queue.requeue(lease, error.message, job.losses)
            self._refused[_kind(job)] = self.queue.clock()
        else:
            self.queue.finish(lease, State.FAILED, error.message)

    def _refuse(self, jobs: Sequence[Job], reasons: Mapping[str, str]) -> None:
        """Fail what no executor can hold; what another one can hold is left to it."""
        others = self.queue.executors(ABSENT_SECONDS)
        others.pop(self.executor.name, None)
        left = elsewhere(jobs, others)
        for job in jobs:
            lease = None if job.id in left else self.queue.claim(job, self.executor.name)
            if lease is not None:
                self.queue.finish(lease, State.FAILED, reasons[job.id])

    def _forget(self, job_id: str) -> None:
        self._leases.pop(job_id, None)
        self._warned.discard(job_id)


def _kind(job: Job) -> tuple[str, Priority]:
    """What an executor's limits on how many jobs it takes may depend on."""
    return job.project_id, job.spec.priority
