"""Jobs: the queue with its reasons, live logs, cancel."""

from __future__ import annotations

import asyncio
import shlex
import time
from pathlib import Path

from nicegui import ui

from lapis.console.parts import Facts, Text, button, confirm, panel
from lapis.console.table import Act, Cell, Column, Row, Table, Tone
from lapis.console.view import PATH, View, duration, when
from lapis.errors import NotFoundError
from lapis.jobs.forecast import Wait
from lapis.jobs.job import ENDED, Job, State
from lapis.jobs.waits import waits
from lapis.tenants.keys import Identity
from lapis.tenants.tenant import Scope

SHOWN = 200  # jobs that have ended
TAIL = 20_000  # bytes of a log
QUEUE = (
    Column("name", "Job"),
    Column("state", "State"),
    Column("reason", "Why"),
    Column("needs", "Needs"),
    Column("project", "Project"),
    Column("since", "Since (UTC)", "time"),
    Column("time", "Time", "number"),
)
TONES: dict[State, Tone] = {
    State.QUEUED: "idle",
    State.STARTING: "busy",
    State.RUNNING: "busy",
    State.SUCCEEDED: "good",
    State.FAILED: "bad",
    State.CANCELLED: "idle",
    State.PREEMPTED: "warn",
}
CANCEL = Act("cancel", "Cancel", danger=True)


async def show(view: View) -> None:
    """Draw the page of the queue."""

    def act(_: str, job_id: str) -> None:
        _ask_to_cancel(view, job_id)

    going = Table("Waiting and running", QUEUE, "Nothing waits and nothing runs.", on_act=act)
    ended = Table("Ended", QUEUE, "No job has ended yet.")

    async def look() -> None:
        queue = view.services.queue
        found = await asyncio.to_thread(queue.list, project_id=view.only)
        why = await asyncio.to_thread(waits, queue)
        may = view.may(Scope.WORK_WRITE)
        going.fill([_row(job, why.get(job.id), may) for job in found if job.state not in ENDED])
        ended.fill([_row(job, None, False) for job in reversed(found) if job.state in ENDED][:SHOWN])

    await view.repeat(look)


async def show_job(view: View, job_id: str) -> None:
    """Draw the page of one job."""
    first = await asyncio.to_thread(visible_job, view, job_id)
    with ui.element("div").classes("head"):
        Text(first.spec.name, "h2")
        with ui.element("div").classes("row"):
            status = Text("").classes("tone")
            cancel = button("Cancel", lambda: _ask_to_cancel(view, job_id), "danger")
    facts = Facts()
    with panel("Log"):
        log = Text("", "pre").classes("log").props('tabindex="0" aria-label="Log"')

    async def look() -> None:
        job = await asyncio.to_thread(visible_job, view, job_id)
        status.text = job.state
        status.classes(replace=f"tone {TONES[job.state]}")
        cancel.set_visibility(job.state not in ENDED and view.may(Scope.WORK_WRITE))
        why = (await asyncio.to_thread(waits, view.services.queue)).get(job_id)
        facts.fill(_facts(job, why))
        text = await asyncio.to_thread(log_tail, view.services.home.jobs, job)
        if text != log.text:
            log.text = text or "Nothing was written yet."
            ui.run_javascript(f"getHtmlElement({log.id}).scrollTop = 1e9")

    await view.repeat(look)


def visible_job(view: View, job_id: str) -> Job:
    """A job of the session's project, or any for an administrator. Raises NotFoundError, the same for both."""
    missing = NotFoundError(f"There is no job {job_id[:60]!r}.", hint=f"All jobs are at {PATH}/jobs.")
    try:
        job = view.services.queue.get(job_id)
    except NotFoundError as error:
        raise missing from error
    if view.only not in (None, job.project_id):
        raise missing
    return job


def log_tail(folder: Path, job: Job) -> str:
    """The end of what the job's current attempt wrote; empty where it runs on another machine."""
    path = folder / job.id / str(job.attempt) / "log"
    if not path.exists():
        return ""
    with path.open("rb") as file:
        start = max(0, path.stat().st_size - TAIL)
        file.seek(start)
        text = file.read(TAIL).decode("utf-8", "replace")
    return text.partition("\n")[2] if start else text


def _row(job: Job, wait: Wait | None, may_cancel: bool) -> Row:
    cells = {
        "name": Cell(job.spec.name, href=f"{PATH}/jobs/{job.id}", hint=job.id),
        "state": Cell(job.state, tone=TONES[job.state]),
        "reason": _reason(job, wait),
        "needs": _needs(job),
        "project": job.project_id,
        "since": when(job.ended_at or job.started_at or job.created_at),
        "time": _time(job),
    }
    return Row(job.id, cells, (CANCEL,) if may_cancel and job.cancel_at is None else ())


def _reason(job: Job, wait: Wait | None) -> str:
    """Why a job is as it is; of one that waits, also when it will likely start."""
    if job.cancel_at is not None and job.state not in ENDED:
        return "is being cancelled"
    if wait is None or job.state not in (State.QUEUED, State.PREEMPTED):
        return job.reason
    likely = "" if wait.likely_start is None else f"; likely starts at {when(wait.likely_start)}"
    return f"{wait.reason}{likely}"


def _needs(job: Job) -> str:
    spec = job.spec
    return str(spec.resources) if spec.ranks == 1 else f"{spec.ranks} ranks, each {spec.resources}"


def _time(job: Job) -> Cell:
    begun = job.started_at or job.created_at
    seconds = (job.ended_at or time.time()) - begun
    return Cell(duration(seconds), value=seconds)


def _facts(job: Job, wait: Wait | None) -> dict[str, str]:
    return {
        "Id": job.id,
        "Why": _reason(job, wait),
        "Command": shlex.join(job.spec.argv),
        "Needs": _needs(job),
        "Priority": f"{job.spec.priority.value}{', may be stopped for others' if job.spec.preemptible else ''}",
        "Time limit": duration(job.spec.time_limit),
        "Runs on": ", ".join(f"{place.node} ({place.ranks})" for place in job.places),
        "Project": job.project_id,
        "Submitted": f"{when(job.created_at)} UTC by {job.created_by}",
        "Started": f"{when(job.started_at)} UTC on {job.executor}" if job.started_at else "",
        "Ended": f"{when(job.ended_at)} UTC" if job.ended_at else "",
        "Attempt": f"{job.attempt}" if job.attempt > 1 else "",
        "Exit status": "" if job.exit_code is None else str(job.exit_code),
    }


def _ask_to_cancel(view: View, job_id: str) -> None:
    def work(identity: Identity) -> Job:
        visible_job(view, job_id)
        return view.services.queue.cancel(job_id, view.session.actor())

    confirm(
        "Cancel this job?",
        "A waiting job ends now; a running one is asked to end, and ended after a few seconds.",
        "Cancel the job",
        lambda: view.act(Scope.WORK_WRITE, work, "The job is being cancelled."),
    )
