"""`lapis jobs`: submit, list, show, cancel and follow jobs of the queue, and say what a project is due."""

from __future__ import annotations

import re
import shlex
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lapis.cli.output import amount, fact, json_option, print_json, print_table, say
from lapis.errors import NotFoundError

if TYPE_CHECKING:
    from lapis.jobs.forecast import Wait
    from lapis.jobs.job import Job, Place
    from lapis.jobs.queue import JobQueue

UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
LOOK_SECONDS = 0.2  # between two looks at a log that is followed


class Measure(click.ParamType):  # type: ignore[type-arg]
    """A number with a unit, such as 16GiB or 90m, up to the most that makes sense."""

    def __init__(self, name: str, pattern: str, units: dict[str, int], most: float) -> None:
        self.name = name
        self._pattern = re.compile(pattern, re.IGNORECASE)
        self._units = units
        self._most = most

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        match = self._pattern.fullmatch(str(value).strip())
        if match is None:
            self.fail(f"{value!r} is no {self.name}.", param, ctx)
        measure = float(match[1]) * self._units[match[2].lower()]
        if measure > self._most:
            self.fail(f"{str(value)[:40]!r} is more than there can be.", param, ctx)
        return measure


MEMORY = Measure("amount of memory (8GiB, 500M)", r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", UNITS, 2.0**53)
COUNT = click.IntRange(max=1_000_000)  # so that sums stay numbers
DURATION = Measure(
    "duration (90s, 30m, 12h, 2d)", r"(\d+(?:\.\d+)?)([smhd])", SECONDS, 36_500.0 * SECONDS["d"]
)


@click.group()
def group() -> None:
    """Submit, list, show, cancel and follow jobs; `lapis serve` starts them."""


@group.command(context_settings={"allow_interspersed_args": False})
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@click.option("--name", help="What lists call it. [default: the command's first word]")
@click.option("--project", default="default", show_default=True, help="Whose job it is.")
@click.option("--cpus", type=click.FloatRange(max=1e6), default=1.0, show_default=True, help="Of each rank.")
@click.option("--gpus", type=COUNT, default=0, show_default=True, help="Of each rank.")
@click.option(
    "--memory", type=MEMORY, metavar="MEMORY", help="Of each rank, such as 8GiB: counted, and enforced."
)
@click.option("--ranks", type=COUNT, default=1, show_default=True, help="All of them start together.")
@click.option(
    "--priority",
    type=click.Choice(["low", "normal", "high"]),
    default="normal",
    help="Among the project's own.",
)
@click.option(
    "--time-limit",
    type=DURATION,
    metavar="DURATION",
    help="Ended after so long, such as 12h; with one it can fill gaps.",
)
@click.option(
    "--preemptible", is_flag=True, help="May be stopped (SIGTERM, a minute to save) and started again."
)
@click.option("--spread", is_flag=True, help="On a cluster, each rank has a node of its own.")
@click.option(
    "--retries", type=COUNT, default=1, show_default=True, help="Starts anew if its process vanishes."
)
@json_option
def submit(
    command: tuple[str, ...],
    name: str | None,
    project: str,
    cpus: float,
    gpus: int,
    memory: float | None,
    ranks: int,
    priority: str,
    time_limit: float | None,
    preemptible: bool,
    spread: bool,
    retries: int,
    as_json: bool,
) -> None:
    """Queue a COMMAND: `lapis jobs submit --cpus 4 -- lapis train RECIPE.toml`.

    It starts in the folder in which this is called.
    """
    from lapis.audit import os_user
    from lapis.jobs.job import JobSpec, Priority, Resources
    from lapis.tenants.tenant import Tenants

    queue = _queue()
    spec = JobSpec(
        name or Path(command[0]).name, command, Resources(cpus, gpus, int(memory or 0)), {}, retries, ranks,
        Priority(priority), time_limit, preemptible, spread, str(Path.cwd()),
    )  # fmt: skip
    job = queue.submit(spec, os_user(), Tenants(queue.db).project(project).id)
    if as_json:
        print_json(_facts(job, None))
    else:
        say(f"{job.id} waits in the queue. Follow it with: lapis jobs log --follow {job.id}")


@group.command("list")
@click.option("--project", help="Only this project's.")
@click.option("--all", "everything", is_flag=True, help="Also those that have ended.")
@json_option
def list_jobs(project: str | None, everything: bool, as_json: bool) -> None:
    """Jobs that wait or run, the oldest first: why they wait, and when they will likely start."""
    from lapis.jobs.job import ENDED
    from lapis.jobs.waits import waits
    from lapis.tenants.tenant import Tenants

    queue = _queue()
    project_id = None if project is None else Tenants(queue.db).project(project).id
    jobs = [job for job in queue.list(project_id=project_id) if everything or job.state not in ENDED]
    why = waits(queue)
    if as_json:
        print_json([_facts(job, why.get(job.id)) for job in jobs])
        return
    if not jobs:
        say("No job waits or runs. `lapis jobs submit -- COMMAND` queues one.")
        return
    now = time.time()
    rows = [
        (
            job.id,
            job.spec.name,
            job.project_id,
            job.state,
            str(job.spec.total),
            _when(job.started_at or job.created_at),
            _reason(job, why.get(job.id), now),
        )
        for job in jobs
    ]
    print_table(("job", "name", "project", "state", "asks for", "since (UTC)", "why"), rows)


@group.command()
@click.argument("job_id")
@json_option
def show(job_id: str, as_json: bool) -> None:
    """What is known of a job."""
    from lapis.jobs.waits import waits

    queue = _queue()
    job = queue.get(job_id)
    facts = _facts(job, waits(queue).get(job_id))
    if as_json:
        print_json(facts)
        return
    facts |= {name: _when(facts[name]) for name in facts if name.endswith(("_at", "_start"))}
    facts |= {"asks_for": str(job.spec.total), "command": shlex.join(job.spec.argv)}
    facts["reason"] = _with_log(job, facts["reason"])
    facts["places"] = [_place(place) for place in job.places]
    del facts["argv"]  # it is the command
    width = max(map(len, facts))
    for name, value in facts.items():
        if value not in (None, "", [], False, "-"):
            say(f"{name.replace('_', ' '):{width}}  {fact(value)}")


@group.command()
@click.argument("job_id")
@json_option
def cancel(job_id: str, as_json: bool) -> None:
    """End a waiting job now; ask a running one to end (SIGTERM, and SIGKILL after 10 seconds)."""
    from lapis.audit import os_user
    from lapis.jobs.job import ENDED

    job = _queue().cancel(job_id, os_user())
    if as_json:
        print_json(_facts(job, None))
    else:
        say(f"{job.id} is cancelled." if job.state in ENDED else f"{job.id} is being asked to end.")


@group.command()
@click.argument("job_id")
@click.option("--attempt", type=int, help="Of which start. [default: the last one]")
@click.option("--follow", is_flag=True, help="Go on printing until the job has ended.")
def log(job_id: str, attempt: int | None, follow: bool) -> None:
    """Print what a job wrote."""
    from lapis.home import Home
    from lapis.jobs.job import ENDED

    queue, folder = _queue(), Home.default().jobs

    def path() -> tuple[Path, bool]:
        job = queue.get(job_id)
        if attempt is not None and not 1 <= attempt <= job.attempt:
            raise NotFoundError(f"The job {job.id} has {amount(job.attempt, 'attempt')}.")
        over = job.state in ENDED or attempt is not None
        return folder / job.id / str(attempt or job.attempt) / "log", over

    _print_log(path, follow)


@group.command()
@click.argument("project")
@click.option(
    "--weight", type=float, required=True, help="Against the others' weights, which are 1 by default."
)
@json_option
def share(project: str, weight: float, as_json: bool) -> None:
    """Say how much of the nodes a PROJECT is due, against the others."""
    from lapis.audit import os_user
    from lapis.jobs.shares import set_weight
    from lapis.tenants.tenant import Tenants

    queue = _queue()
    found = Tenants(queue.db).project(project)
    set_weight(queue.db, found.id, weight, os_user(), time.time())
    if as_json:
        print_json({"project_id": found.id, "name": found.name, "weight": weight})
    else:
        say(f"The project {found.name} has the weight {weight:g}.")


def _print_log(path: Callable[[], tuple[Path, bool]], follow: bool) -> None:
    """Print a log file as it is, or as it grows; a job that was started again goes on in another file."""
    printed: dict[Path, int] = {}
    while True:
        file, over = path()
        if file.exists():
            with file.open("rb") as opened:
                opened.seek(printed.get(file, 0))
                text = opened.read()
            printed[file] = printed.get(file, 0) + len(text)
            click.echo(text, nl=False)
        if over or not follow:
            break
        time.sleep(LOOK_SECONDS)
    if not any(printed.values()):
        say("It has written nothing." if over else "It has written nothing yet.")


def _queue() -> JobQueue:
    from lapis.db import open_database
    from lapis.home import Home
    from lapis.jobs.queue import JobQueue
    from lapis.tenants.prices import Prices
    from lapis.tenants.usage import UsageLedger

    home = Home.default()
    db = open_database(home.database_url)
    return JobQueue(db, ledger=UsageLedger(db, prices=Prices(home.prices)))


def _facts(job: Job, wait: Wait | None) -> dict[str, Any]:
    spec = job.spec
    return {
        "id": job.id, "name": spec.name, "project_id": job.project_id, "state": job.state,
        "reason": wait.reason if wait else job.reason, "last_reason": job.reason if wait else "",
        "likely_start": wait.likely_start if wait else None,
        "argv": list(spec.argv), "folder": spec.folder, "cpus": spec.resources.cpus, "gpus": spec.resources.gpus,
        "memory": spec.resources.memory, "ranks": spec.ranks, "priority": spec.priority,
        "time_limit": spec.time_limit, "preemptible": spec.preemptible, "spread": spec.spread,
        "attempt": job.attempt, "losses": job.losses, "executor": job.executor,
        "places": [asdict(place) for place in job.places], "exit_code": job.exit_code,
        "created_at": job.created_at, "created_by": job.created_by,
        "started_at": job.started_at, "ended_at": job.ended_at,
        "cancel_at": job.cancel_at, "preempt_at": job.preempt_at, "preempt_for": job.preempt_for,
    }  # fmt: skip


def _reason(job: Job, wait: Wait | None, now: float) -> str:
    if wait is None:
        stops = f"is to stop for {job.preempt_for}" if job.preempt_for else _with_log(job, job.reason)
        return "is being cancelled" if job.cancel_at is not None and job.ended_at is None else stops
    if wait.likely_start is None:
        return wait.reason
    return f"{wait.reason}; likely in {_in(wait.likely_start - now)}"


def _place(place: Place) -> str:
    gpus = f", GPUs {' '.join(map(str, place.gpus))}" if place.gpus else ""
    return f"{place.node} ({amount(place.ranks, 'rank')}{gpus})"


def _with_log(job: Job, reason: str) -> str:
    """The reason of a job, and where to look further if what it started has failed."""
    return f"{reason}; see lapis jobs log {job.id}" if job.state == "failed" and job.attempt else reason


def _in(seconds: float) -> str:
    """A duration in the unit that fits it."""
    for unit in ("d", "h", "m"):
        if seconds >= 2 * SECONDS[unit]:
            return f"{seconds / SECONDS[unit]:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def _when(at: float | None) -> str:
    return "-" if at is None else datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M:%S")
