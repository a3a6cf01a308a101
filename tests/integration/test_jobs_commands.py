"""`lapis jobs`: what somebody does at a terminal, over a real database and a controller that runs beside it."""

from __future__ import annotations

import json
import platform
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from lapis.cli.main import lapis
from lapis.db import open_database
from lapis.errors import LapisError, NotFoundError
from lapis.home import Home
from lapis.jobs.controller import Controller
from lapis.jobs.executors.local import LocalExecutor
from lapis.jobs.job import JobSpec, Resources, State
from lapis.jobs.queue import JobQueue
from lapis.tenants.quota import Quota
from lapis.tenants.tenant import Tenants


@pytest.fixture
def queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[JobQueue]:
    monkeypatch.setenv("LAPIS_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("LAPIS_DATABASE_URL", raising=False)
    db = open_database(Home.default().database_url)
    yield JobQueue(db)
    db.dispose()


@pytest.fixture
def controller(queue: JobQueue) -> Iterator[Controller]:
    """One that ticks beside the commands."""
    stop = threading.Event()
    made = Controller(queue, LocalExecutor(Home.default().jobs, Resources(2, 0, 2**30)))
    thread = threading.Thread(target=made.run, args=(stop, 0.02))
    thread.start()
    yield made
    stop.set()
    thread.join()


def run(*arguments: str) -> str:
    return CliRunner().invoke(lapis, ["jobs", *arguments], catch_exceptions=False).output


def facts(*arguments: str) -> Any:
    command, *rest = arguments
    return json.loads(run(command, "--json", *rest))


def until(queue: JobQueue, job_id: str, state: State) -> None:
    give_up = time.monotonic() + 60
    while queue.get(job_id).state is not state:
        assert time.monotonic() < give_up
        time.sleep(0.02)


def test_a_job_is_submitted_followed_and_shown(queue: JobQueue, controller: Controller) -> None:
    submitted = facts(
        "submit", "--cpus", "2", "--time-limit", "90m", "/bin/sh", "-c", "echo one; sleep 0.3; echo two"
    )
    assert (submitted["state"], submitted["time_limit"], submitted["name"]) == ("queued", 5400.0, "sh")
    assert run("log", "--follow", submitted["id"]) == "one\ntwo\n"
    shown = run("show", submitted["id"])
    assert "succeeded" in shown and "/bin/sh -c 'echo one; sleep 0.3; echo two'" in shown
    assert submitted["id"] not in run("list")
    assert submitted["id"] in run("list", "--all")


def test_a_command_starts_where_it_was_submitted_and_finds_lapis(
    queue: JobQueue, controller: Controller, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.toml").write_text("steps = 1\n")
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    cat = facts("submit", "--", "/bin/sh", "-c", "cat recipe.toml; pwd; command -v lapis")["id"]
    lapis_at = Path(sys.executable).with_name("lapis")
    assert run("log", "--follow", cat) == f"steps = 1\n{tmp_path}\n{lapis_at}\n"
    assert sorted(path.name for path in Home.default().jobs.joinpath(cat, "1").iterdir()) == [
        "exit", "log", "pid",
    ]  # fmt: skip


def test_a_job_that_failed_names_its_log(queue: JobQueue, controller: Controller) -> None:
    job = queue.submit(JobSpec("true", ("true",), folder="/no/such/folder"), "os:ana")
    until(queue, job.id, State.FAILED)
    assert "/no/such/folder" in run("log", job.id)
    reason = f"exit status 126; see lapis jobs log {job.id}"
    assert reason in run("show", job.id) and reason in run("list", "--all")


def test_an_attempt_that_was_not_made_is_not_shown(queue: JobQueue, controller: Controller) -> None:
    quiet = facts("submit", "--", "true")["id"]
    until(queue, quiet, State.SUCCEEDED)
    assert run("log", quiet) == run("log", "--attempt", "1", quiet) == "It has written nothing.\n"
    for attempt in ("0", "5"):
        with pytest.raises(NotFoundError, match="has 1 attempt"):
            run("log", "--attempt", attempt, quiet)


def test_facts_are_told_in_words(queue: JobQueue) -> None:
    name = platform.node()
    executor = LocalExecutor(Home.default().jobs, Resources(2, 1, 2**30))
    job = queue.submit(JobSpec("greet", ("echo", "hi"), Resources(1, 1)), "os:ana")
    Controller(queue, executor).tick()
    shown = run("show", job.id)
    assert f"{name} (1 rank, GPUs 0)" in shown and "echo hi" in shown
    assert "argv" not in shown and "[" not in shown and "'" not in shown


def test_the_help_names_measures_shortly() -> None:
    text = run("submit", "--help")
    assert "--memory MEMORY" in text and "--time-limit DURATION" in text


def test_who_waits_is_told_why_and_when(queue: JobQueue, controller: Controller) -> None:
    first = facts("submit", "--cpus", "2", "--time-limit", "1h", "--", "sleep", "600")
    until(queue, first["id"], State.RUNNING)
    second, third = (facts("submit", "--cpus", "2", "--memory", "64M", "--", "true") for _ in range(2))
    listed = {job["id"]: job for job in facts("list")}
    assert listed[first["id"]]["reason"] == ""
    assert "goes next, as soon as 2 CPUs" in listed[second["id"]]["reason"]
    assert listed[second["id"]]["likely_start"] == pytest.approx(listed[first["id"]]["started_at"] + 3600)
    assert "1 waiting jobs go first" in listed[third["id"]]["reason"]
    assert listed[third["id"]]["likely_start"] >= listed[second["id"]]["likely_start"]
    assert "likely in 60 m" in run("list")
    assert "is being asked to end" in run("cancel", first["id"])
    assert run("cancel", third["id"]) == f"{third['id']} is cancelled.\n"
    until(queue, second["id"], State.SUCCEEDED)


def test_without_a_controller_that_is_the_reason(queue: JobQueue) -> None:
    facts("submit", "--", "true")
    assert "`lapis serve` has one" in facts("list")[0]["reason"]
    assert "`lapis serve` has one" in run("list")


def test_the_limit_on_money_that_a_job_waits_for_is_named(queue: JobQueue) -> None:
    home = Home.default()
    home.root.mkdir(parents=True, exist_ok=True)
    home.prices.write_text("compute = { cpu_hour = 1.0 }\n")
    Tenants(queue.db).set_quota("default", Quota(spend_per_month=100), "os:ana")
    job = facts("submit", "--time-limit", "2h", "--", "true")
    assert "2 USD until its time limit, of its project's money" in facts("list")[0]["reason"]
    assert "2 USD until its time limit" in facts("show", job["id"])["reason"]


def test_a_project_s_jobs_and_weight(queue: JobQueue) -> None:
    Tenants(queue.db).create_project("vision", "os:ana")
    mine = facts("submit", "--project", "vision", "--priority", "high", "--preemptible", "--", "true")
    facts("submit", "--", "true")
    assert [job["id"] for job in facts("list", "--project", "vision")] == [mine["id"]]
    assert "weight 3" in run("share", "vision", "--weight", "3")
    assert facts("share", "vision", "--weight", "2")["weight"] == 2.0


@pytest.mark.parametrize(
    "arguments",
    [
        ("submit", "--memory", "lots", "--", "true"),
        ("submit", "--time-limit", "5", "--", "true"),
        ("submit",),
    ],
)
def test_what_cannot_be_read_is_refused(queue: JobQueue, arguments: tuple[str, ...]) -> None:
    assert CliRunner().invoke(lapis, ["jobs", *arguments]).exit_code == 2


def test_an_unknown_job_is_named_with_the_next_command(queue: JobQueue) -> None:
    with pytest.raises(LapisError, match="job_none") as caught:
        run("show", "job_none")
    assert caught.value.hint == "lapis jobs list --all"
