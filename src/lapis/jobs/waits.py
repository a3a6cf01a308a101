"""Why waiting jobs wait, for whoever asks: the fair queue's decision, made anew over what the tables say."""

from __future__ import annotations

from lapis.jobs.budget import affordable
from lapis.jobs.fairshare import schedule
from lapis.jobs.forecast import Wait
from lapis.jobs.job import ACTIVE, Job, State
from lapis.jobs.queue import JobQueue
from lapis.jobs.shares import shares

NOBODY = "nothing starts jobs now: no controller has been heard of lately; `lapis serve` has one"


def waits(queue: JobQueue) -> dict[str, Wait]:
    """A reason and a likely start for every waiting job, by its id. Changes nothing."""
    now = queue.clock()
    jobs = queue.list(State.QUEUED, State.PREEMPTED, *ACTIVE)
    waiting = [job for job in jobs if job.state not in ACTIVE]
    if not waiting:
        return {}
    found = {job.id: Wait(NOBODY) for job in waiting}
    all_active = [job for job in jobs if job.state in ACTIVE]
    waiting, held = affordable(waiting, all_active, queue.ledger, now)
    for name, nodes in queue.executors().items():
        if nodes is None:
            found |= {job.id: _next(f"{name} gets it next", job, now) for job in waiting}
            continue
        active = [job for job in all_active if job.executor == name]
        decided = schedule(waiting, active, nodes, shares(queue.db, now), now)
        found |= decided.waits
        by_id = {job.id: job for job in waiting}
        found |= {job_id: _next("its turn has come", by_id[job_id], now) for job_id in decided.starts}
        found |= {job_id: Wait(reason) for job_id, reason in decided.refused.items()}
    return found | {job_id: Wait(reason) for job_id, reason in held.items()}


def _next(text: str, job: Job, now: float) -> Wait:
    """Of a job that is to start now, with what became of its last start."""
    return Wait(f"{text}; before: {job.reason}" if job.reason else text, now)
