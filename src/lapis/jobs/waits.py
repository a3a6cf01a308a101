"""Why waiting jobs wait, for whoever asks: the fair queue's decision, made anew over what the tables say."""

from __future__ import annotations

from lapis.jobs.budget import Budget, affordable, in_turn
from lapis.jobs.fairshare import elsewhere, schedule
from lapis.jobs.forecast import Wait
from lapis.jobs.job import ACTIVE, Job, State
from lapis.jobs.queue import ABSENT_SECONDS, JobQueue
from lapis.jobs.shares import shares

NOBODY = "nothing starts jobs now: no controller has been heard of lately; `lapis serve` has one"
ARCHIVED = "its project is archived: nothing is begun in it; `lapis jobs cancel` takes it out of the queue"
ABSENT = "it waits for {}, which can hold it and has not been heard of lately"


def waits(queue: JobQueue) -> dict[str, Wait]:
    """A reason and a likely start for every waiting job, by its id. Changes nothing."""
    now = queue.clock()
    jobs = queue.list(State.QUEUED, State.PREEMPTED, *ACTIVE)
    waiting = [job for job in jobs if job.state not in ACTIVE]
    if not waiting:
        return {}
    found = {job.id: Wait(NOBODY) for job in waiting}
    all_active = [job for job in jobs if job.state in ACTIVE]
    archived, budget = queue.archived(), Budget(queue.ledger, all_active, now)
    closed = {job.id: ARCHIVED for job in waiting if job.project_id in archived}
    waiting, held = affordable([job for job in waiting if job.id not in closed], budget)
    held |= closed
    by_id = {job.id: job for job in waiting}
    refused: dict[str, Wait] = {}
    starts: dict[str, Wait] = {}
    for name, nodes in queue.executors().items():
        text, chosen = f"{name} gets it next", in_turn(waiting)
        if nodes is not None:
            active = [job for job in all_active if job.executor == name]
            decided = schedule(waiting, active, nodes, shares(queue.db, now), now)
            found |= decided.waits
            refused |= {job_id: Wait(reason) for job_id, reason in decided.refused.items()}
            text, chosen = "its turn has come", (by_id[job_id] for job_id in decided.starts)
        for job in chosen:
            if job.id not in starts and job.id not in held:
                held |= _taken(budget, job)
                starts[job.id] = _next(text, job, now)
    absent = elsewhere([by_id[job_id] for job_id in refused], queue.executors(ABSENT_SECONDS))
    refused |= {job_id: Wait(ABSENT.format(name)) for job_id, name in absent.items()}
    refused = {job_id: wait for job_id, wait in refused.items() if found[job_id].reason == NOBODY}
    return found | refused | starts | {job_id: Wait(reason) for job_id, reason in held.items()}


def _taken(budget: Budget, job: Job) -> dict[str, str]:
    """Take what a job that is to start may use; or, by its id, why it cannot be paid for beside those before it."""
    lack = budget.lack(job)
    if lack is not None:
        return {job.id: lack}
    budget.take(job)
    return {}


def _next(text: str, job: Job, now: float) -> Wait:
    """Of a job that is to start now, with what became of its last start."""
    return Wait(f"{text}; before: {job.reason}" if job.reason else text, now)
