"""What Slurm is told of a job, and what follows from what it says. The real one is in tests/slurm."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from lapis.cli.cluster import group
from lapis.db import open_database
from lapis.home import Home
from lapis.jobs.cluster import SlurmSection
from lapis.jobs.controller import Controller, decide
from lapis.jobs.executor import Status
from lapis.jobs.executors.slurm import SlurmExecutor
from lapis.jobs.job import Job, JobSpec, Priority, Resources, State
from lapis.jobs.queue import JobQueue
from lapis.jobs.shares import set_weight
from lapis.jobs.slurm import (
    Row,
    best_row,
    node_names,
    queue_rows,
    refuses_for_the_moment,
    settings,
    status,
    submission,
    usages,
)
from lapis.jobs.waits import waits
from lapis.tenants.tenant import Tenants

SPEC = JobSpec("train", ("lapis", "train"), Resources(3.5, 2, 5 << 30), retries=1)
JOB = Job(
    "job_1", "proj_a", SPEC, State.RUNNING, "", 1, 0, "slurm", None, 10.0, None, 0.0, "os:ana", 1.0, None
)
TAKEN = "slurm 7"


def row(state: str, **more: object) -> Row:
    return replace(Row(7, "lapis-job_1.1", state), **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("place", "code", "said", "kind", "exit_code"),
    [
        ("fenced", "", None, "fenced", None),
        ("", "", row("PENDING"), "waiting", None),
        (TAKEN, "", row("RUNNING"), "running", None),
        ("slurm 7 n1", "", row("RUNNING", nodes="n[1-3]"), "running", None),
        ("slurm 7 n1", "", row("RUNNING", nodes="n[2-3]"), "lost", None),
        (TAKEN, "0", row("COMPLETING"), "exited", 0),
        (TAKEN, "143", row("COMPLETING"), "running", None),  # Slurm may have stopped it: it will say so
        (TAKEN, "143", row("PREEMPTED"), "preempted", None),
        (TAKEN, "0", row("PREEMPTED"), "exited", 0),
        (TAKEN, "3", row("FAILED"), "exited", 3),
        (TAKEN, "3", None, "exited", 3),
        (TAKEN, "", row("NODE_FAIL"), "lost", None),
        (TAKEN, "", row("FAILED"), "lost", None),
        (TAKEN, "", None, "lost", None),
        (TAKEN, "", row("OUT_OF_MEMORY"), "exited", None),
        ("", "", row("CANCELLED"), "exited", None),
        (TAKEN, "", row("TIMEOUT"), "exited", None),
    ],
)
def test_files_and_slurm_s_word_make_a_status(
    place: str, code: str, said: Row | None, kind: str, exit_code: int | None
) -> None:
    found = status(place, code, said)
    assert (found.kind, found.exit_code) == (kind, exit_code)


def test_why_it_waits_and_how_long_it_ran_are_told() -> None:
    (waits,) = queue_rows("9|lapis-job_1.1|PENDING|AssocGrpGRES|2026-11-29T18:00:00|N/A|\n")
    assert status("", "", waits).reason == "it waits in Slurm: AssocGrpGRES; likely from 2026-11-29 18:00:00"
    assert status(TAKEN, "0", row("COMPLETED", start=100.0, end=160.0)).seconds == 60
    told = usages(
        "lapis-job_1.2|teama|COMPLETED|60|billing=4,cpu=4,gres/gpu=2,node=2\nvi|x|RUNNING|9|cpu=1\n"
    )
    assert [(use.job_id, use.attempt, use.cpu_seconds, use.gpu_seconds, use.nodes) for use in told] == [
        ("job_1", 2, 240, 120, 2)
    ]


def test_slurm_s_lists_of_nodes_are_read() -> None:
    assert node_names("n[1-3,7],gpu-a[08-10],login") == {
        "n1", "n2", "n3", "n7", "gpu-a08", "gpu-a09", "gpu-a10", "login",
    }  # fmt: skip
    assert node_names("rack[1-2]n[1-4]") is None
    assert node_names("") == set()


def test_of_two_submissions_the_one_that_took_the_place_counts() -> None:
    other = Row(8, "lapis-job_1.1", "FAILED")
    assert best_row([row("RUNNING"), other], TAKEN) == row("RUNNING")
    assert best_row([other, row("PENDING")], "") == row("PENDING")
    assert best_row([], TAKEN) is None


def test_a_job_asks_slurm_for_what_it_needs() -> None:
    section = SlurmSection(
        partition="gpu", account="rest", accounts={"proj_a": "teama"}, qos={Priority.HIGH: "urgent"},
        options=("--constraint=h200",),
    )  # fmt: skip
    gang = replace(JOB, spec=replace(SPEC, ranks=3, spread=True, time_limit=600, priority=Priority.HIGH))
    told = set(submission(gang, section, Path("/home/100%j")))
    assert told >= {
        "--no-requeue", "--no-kill", "--nodes=3", "--ntasks=3", "--ntasks-per-node=1", "--cpus-per-task=4",
        "--gres=gpu:2", "--mem=5120", "--time=13", "--account=teama", "--qos=urgent", "--partition=gpu",
        "--constraint=h200", "--output=/home/100%%j/log", "--job-name=lapis-job_1.1",
    }  # fmt: skip
    packed = set(
        submission(replace(JOB, project_id="proj_b", spec=replace(SPEC, ranks=3)), section, Path("/h"))
    )
    assert packed >= {"--ntasks=3", "--gpus-per-task=2", "--mem-per-cpu=1280", "--account=rest"}
    assert not packed & {"--no-kill", "--nodes=3"}


@pytest.mark.parametrize("folder", [None, "/srv/a 'b'"])
def test_a_shell_reads_the_settings_as_they_were_meant(tmp_path: Path, folder: str | None) -> None:
    argv = ("printf", "%s\n", "a 'b' $c `d`", "", "*", "é\nf")
    job = replace(JOB, spec=replace(SPEC, argv=argv, folder=folder))
    (tmp_path / "settings").write_text(settings(job, {"A": "x 'y' $z\nlast"}))
    script = '. ./settings; echo "$1"; shift; "$@"; printf "%s" "$A"'
    done = subprocess.run(["/bin/sh", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == f"{folder or '.'}\na 'b' $c `d`\n\n*\né\nf\nx 'y' $z\nlast"


def test_what_an_executor_with_its_own_queue_says_is_settled() -> None:
    waiting, cancelled = Status("waiting", reason="…"), replace(JOB, cancel_at=5.0)
    assert decide(JOB, waiting, 1e9, warned=False).act == "wait"
    for warned in (False, True):  # scancel may have failed
        assert decide(cancelled, waiting, 6.0, warned).act == "terminate"
    stopped = decide(replace(JOB, losses=1), Status("preempted", reason="for another"), 1.0, warned=False)
    assert (stopped.act, stopped.reason) == ("requeue", "for another")
    moved = decide(JOB, Status("exited", 75), 1.0, warned=False)
    assert moved.act == "requeue"
    assert decide(replace(JOB, losses=1), Status("exited", 75), 1.0, warned=False).state is State.FAILED
    ended = decide(JOB, Status("exited", None, "it was cancelled in Slurm"), 1.0, warned=False)
    assert (ended.state, ended.reason) == (State.FAILED, "it was cancelled in Slurm")


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Slurm that says what a test lets it say: each command prints its file, or fails with `NAME.error`."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("sbatch", "squeue", "scancel", "sacct"):
        script = f"#!/bin/sh\n[ -e {folder}/{name}.error ] && {{ cat {folder}/{name}.error >&2; exit 1; }}\n"
        (folder / name).write_text(f"{script}[ ! -e {folder}/{name}.out ] || cat {folder}/{name}.out\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return folder


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_submission_without_an_answer_is_settled_by_a_fence(commands: Path, home: Home) -> None:
    clock = Clock()
    queue = JobQueue(open_database(home.database_url), clock, lease_seconds=10)
    executor = SlurmExecutor(home.jobs, SlurmSection())
    controller = Controller(queue, executor)
    job = queue.submit(SPEC, "os:ana")
    (commands / "sbatch.error").write_text("sbatch: error: Socket timed out on send/recv operation\n")
    controller.tick()
    assert queue.get(job.id).state is State.STARTING  # Slurm may have it, or not
    (commands / "sbatch.error").unlink()
    clock.now += 10
    controller.tick()  # it is nowhere: fenced, queued and submitted again
    assert (executor.attempt(replace(job, attempt=1)) / "pid").read_text() == "fenced"
    second = queue.get(job.id)
    assert (second.state, second.attempt, second.losses) == (State.STARTING, 2, 0)
    queue.db.dispose()


def test_while_slurm_does_not_answer_nothing_is_lost(commands: Path, home: Home) -> None:
    clock = Clock()
    queue = JobQueue(open_database(home.database_url), clock, lease_seconds=10)
    executor = SlurmExecutor(home.jobs, SlurmSection())
    controller = Controller(queue, executor)
    job = queue.submit(SPEC, "os:ana")
    controller.tick()
    (commands / "squeue.error").write_text("slurm_load_jobs error: Unable to contact slurm controller\n")
    for _ in range(5):
        clock.now += 5
        executor._asked_at = float("-inf")
        controller.tick()
    assert (queue.get(job.id).state, queue.get(job.id).attempt) == (State.STARTING, 1)
    (commands / "squeue.error").unlink()
    (commands / "squeue.out").write_text(f"7|lapis-{job.id}.1|RUNNING|None|N/A|N/A|n1\n")
    controller.tick()
    assert queue.get(job.id).state is State.RUNNING
    (commands / "squeue.out").write_text("")  # it forgot the job, and sacct has it
    (commands / "sacct.out").write_text(f"7|lapis-{job.id}.1|CANCELLED by 0|Unknown|Unknown\n")
    executor._asked_at = float("-inf")
    controller.tick()
    assert (queue.get(job.id).state, queue.get(job.id).reason) == (State.FAILED, "it was cancelled in Slurm")
    queue.db.dispose()


POLICY = (
    "Batch job submission failed: Job violates accounting/QOS policy (job submit limit, user's size and/or "
    "time limits)"
)


def test_what_slurm_refuses_for_the_moment_waits_and_stands_in_nobody_s_way(
    commands: Path, home: Home
) -> None:
    clock = Clock()
    queue = JobQueue(open_database(home.database_url), clock, lease_seconds=10)
    controller = Controller(queue, SlurmExecutor(home.jobs, SlurmSection()))
    other = Tenants(queue.db).create_project("other", "os:ana").id
    mine = [queue.submit(SPEC, "os:ana") for _ in range(3)]
    limit = f"sbatch: error: AssocMaxSubmitJobLimit\nsbatch: error: {POLICY}\n"
    (commands / "sbatch.error").write_text(limit)
    controller.tick()
    assert {queue.get(job.id).state for job in mine} == {State.QUEUED}
    assert sum(queue.get(job.id).attempt for job in mine) == 1  # one was refused: the others are not tried
    assert any("AssocMaxSubmitJobLimit" in why.reason for why in waits(queue).values())
    (commands / "sbatch.error").unlink()
    theirs = queue.submit(SPEC, "os:bo", other)
    controller.tick()
    assert queue.get(theirs.id).state is State.STARTING
    clock.now += 10
    controller.tick()
    assert {queue.get(job.id).state for job in mine} == {State.STARTING}
    assert {queue.get(job.id).losses for job in mine} == {0}
    queue.db.dispose()


@pytest.mark.parametrize(
    ("said", "passes"),
    [
        (POLICY, True),
        (f"sbatch: error: QOSMaxSubmitJobPerUserLimit\nsbatch: error: {POLICY}", True),
        (f"sbatch: error: QOSMaxWallDurationPerJobLimit\nsbatch: error: {POLICY}", False),
        ("sbatch: error: Slurm temporarily unable to accept job, sleeping and retrying", True),
        ("sbatch: error: Batch job submission failed: Resource temporarily unavailable", True),
        ("sbatch: error: invalid partition specified: nowhere", False),
        ("sbatch: error: Batch job submission failed: Requested node configuration is not available", False),
    ],
)
def test_what_passes_is_told_from_what_does_not(said: str, passes: bool) -> None:
    assert refuses_for_the_moment(said) == passes


def test_accounts_are_printed_as_commands(home: Home) -> None:
    db = open_database(home.database_url)
    team = Tenants(db).create_project("team", "os:ana").id
    set_weight(db, team, 2.5, "os:ana", 0.0)
    db.dispose()
    home.root.joinpath("cluster.toml").write_text(
        f'[slurm]\naccount = "rest"\naccounts = {{{team} = "team-a"}}\n'
    )
    told = CliRunner().invoke(group, ["accounts"], catch_exceptions=False, standalone_mode=False).stdout
    assert "sacctmgr -i add account name=team-a fairshare=250\n" in told
    assert "sacctmgr -i modify account where name=rest set fairshare=100\n" in told
    assert "account=team-a\n" in told
