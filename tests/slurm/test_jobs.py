"""Jobs through the queue and its controller on a real Slurm: they start once, wait, end, are lost and come back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lapis.db import open_database
from lapis.errors import ConflictError
from lapis.jobs.cluster import SlurmSection
from lapis.jobs.controller import Controller
from lapis.jobs.executors.slurm import SlurmExecutor
from lapis.jobs.job import ENDED, Job, JobSpec, Resources, State
from lapis.jobs.queue import JobQueue
from lapis.jobs.slurm import account_commands, submission
from lapis.tenants.tenant import Tenants

from .cluster import SlurmCluster

SMALL = Resources(1, 0, 100 << 20)
NODE = Resources(4, 2, 1 << 30)  # a whole node of the cluster
SECTION = SlurmSection(partition="low", account="teama")

CONTROLLER = """
import sys, threading
from pathlib import Path
from lapis.db import connect
from lapis.jobs.cluster import SlurmSection
from lapis.jobs.controller import Controller
from lapis.jobs.executors.slurm import SlurmExecutor
from lapis.jobs.queue import JobQueue
queue = JobQueue(connect(sys.argv[1]), lease_seconds=2)
executor = SlurmExecutor(Path(sys.argv[2]), SlurmSection(partition="low", account="teama"))
Controller(queue, executor).run(threading.Event(), seconds=0.1)
"""


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'lapis.db'}"


@pytest.fixture
def queue(url: str) -> Iterator[JobQueue]:
    db = open_database(url)
    yield JobQueue(db, lease_seconds=2)
    db.dispose()


@pytest.fixture
def executor(cluster: SlurmCluster, tmp_path: Path) -> SlurmExecutor:
    return SlurmExecutor(tmp_path / "jobs", SECTION)


@pytest.fixture
def controller(queue: JobQueue, executor: SlurmExecutor) -> Controller:
    return Controller(queue, executor, grace=3)


def until(true: Callable[[], bool], *controllers: Controller, seconds: float = 90) -> None:
    give_up = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < give_up, "waited for nothing"
        for controller in controllers:
            controller.tick()
        time.sleep(0.1)


def settled(queue: JobQueue, controller: Controller, job: Job, seconds: float = 90) -> Job:
    until(lambda: queue.get(job.id).state in ENDED, controller, seconds=seconds)
    return queue.get(job.id)


def shell(script: str, resources: Resources = SMALL, ranks: int = 1, **more: object) -> JobSpec:
    return JobSpec("test", ("/bin/sh", "-c", script), resources, ranks=ranks, **more)  # type: ignore[arg-type]


def test_a_job_runs_with_its_environment_alone_and_its_use_is_read_back(
    queue: JobQueue, controller: Controller, executor: SlurmExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("A_SECRET", "of the server")
    team = Tenants(queue.db).create_project("team b", "os:ana").id
    executor.section = SlurmSection(account="teama", accounts={team: "teamb"})
    began = time.time() - 1
    script = 'echo "$A" "$CUDA_VISIBLE_DEVICES" "$SLURM_JOB_ACCOUNT"; env; sleep 2; echo err >&2'
    job = queue.submit(shell(script, Resources(2, 1, 1 << 28), env={"A": "it's `b` $c\n%j"}), "os:ana", team)
    ended = settled(queue, controller, job)
    assert (ended.state, ended.exit_code, ended.attempt) == (State.SUCCEEDED, 0, 1)
    log = executor.log(ended).read_text()
    assert log.startswith("it's `b` $c\n%j 0 teamb\n")
    assert log.endswith("err\n")
    assert "A_SECRET" not in log
    assert executor.attempt(ended).joinpath("settings").stat().st_mode & 0o777 == 0o600
    until(lambda: [use.state for use in executor.usage(began)] == ["COMPLETED"])
    (use,) = executor.usage(began)
    assert (use.job_id, use.attempt, use.account, use.nodes) == (job.id, 1, "teamb", 1)
    assert use.seconds >= 2 and use.cpu_seconds == 2 * use.seconds and use.gpu_seconds == use.seconds


@pytest.mark.parametrize(("script", "code"), [("exit 7", 7), ("kill -KILL $$", 137)])
def test_a_job_that_fails_says_how(queue: JobQueue, controller: Controller, script: str, code: int) -> None:
    ended = settled(queue, controller, queue.submit(shell(script), "os:ana"))
    assert (ended.state, ended.exit_code, ended.reason) == (State.FAILED, code, f"exit status {code}")


def test_what_slurm_refuses_fails_with_its_words(queue: JobQueue, controller: Controller) -> None:
    large = settled(queue, controller, queue.submit(shell("true", Resources(99)), "os:ana"))
    assert large.state is State.FAILED
    assert "More processors requested than permitted" in large.reason
    controller.executor.section = SlurmSection(account="nobody")  # type: ignore[attr-defined]
    stranger = settled(queue, controller, queue.submit(shell("true"), "os:ana"))
    assert "Invalid account" in stranger.reason


def test_what_waits_in_slurm_says_why_and_can_be_cancelled(queue: JobQueue, controller: Controller) -> None:
    first = queue.submit(shell("sleep 600", NODE, ranks=4, spread=True), "os:ana")
    until(lambda: queue.get(first.id).state is State.RUNNING, controller)
    second = queue.submit(shell("sleep 600", NODE), "os:ana")
    until(lambda: "Resources" in queue.get(second.id).reason, controller)
    assert queue.get(second.id).state is State.STARTING
    assert queue.get(second.id).started_at is None
    queue.cancel(second.id, "os:ana")
    assert settled(queue, controller, second).state is State.CANCELLED
    queue.cancel(first.id, "os:ana")
    assert settled(queue, controller, first).state is State.CANCELLED


def test_a_job_that_is_asked_to_end_may_finish_its_work(
    queue: JobQueue, controller: Controller, executor: SlurmExecutor
) -> None:
    polite = (
        "import signal, sys, time\n"
        "def end(*_): print('saved', flush=True); sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, end); print('ready', flush=True); time.sleep(600)"
    )
    deaf = "trap '' TERM; echo ready; sleep 600"
    jobs = [
        queue.submit(JobSpec("polite", (sys.executable, "-c", polite), SMALL), "os:ana"),
        queue.submit(shell(deaf), "os:ana"),
    ]
    for job in jobs:
        until(lambda job=job: queue.get(job.id).state is State.RUNNING, controller)  # type: ignore[misc]
        log = executor.log(queue.get(job.id))
        until(lambda log=log: "ready" in log.read_text())  # type: ignore[misc]
        queue.cancel(job.id, "os:ana")
    ended = [settled(queue, controller, job) for job in jobs]
    assert [job.state for job in ended] == [State.CANCELLED] * 2
    assert executor.log(ended[0]).read_text().endswith("saved\n")


def test_who_is_stopped_for_another_one_goes_on_later(
    queue: JobQueue, controller: Controller, tmp_path: Path, cluster: SlurmCluster
) -> None:
    gate = tmp_path / "gate"
    waits = f"while [ ! -e {gate} ]; do sleep 0.1; done"
    low = queue.submit(shell(waits, NODE, ranks=4, spread=True, retries=0), "os:ana")
    until(lambda: queue.get(low.id).state is State.RUNNING, controller)
    cluster.call(
        "sbatch", "-A", "teama", "-p", "high", "-N4", "--mem=100", "-o", "/dev/null", "--wrap", waits
    )
    until(lambda: "waits in Slurm" in queue.get(low.id).reason, controller)
    assert (queue.get(low.id).attempt, queue.get(low.id).losses) == (2, 0)
    gate.touch()
    ended = settled(queue, controller, low)
    assert (ended.state, ended.attempt, ended.losses) == (State.SUCCEEDED, 2, 0)


def test_an_attempt_starts_once_however_often_it_is_submitted(
    queue: JobQueue, executor: SlurmExecutor, cluster: SlurmCluster, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    job = queue.submit(shell(f"echo run >> {runs}; sleep 2"), "os:ana")
    queue.claim(job, executor.name)
    job = queue.get(job.id)
    executor.start(job)
    folder = executor.attempt(job)
    again = ["sbatch", *submission(job, SECTION, folder), str(folder / "script"), str(folder)]
    for _ in range(3):  # as controllers do that do not know of each other
        cluster.call(*again)
    assert not executor.fence(job)
    until(lambda: executor.poll(job).kind == "exited" and not cluster.call("squeue", "-h"))
    assert executor.poll(job).exit_code == 0
    assert runs.read_text() == "run\n"


def test_an_attempt_that_was_fenced_never_starts(
    queue: JobQueue, executor: SlurmExecutor, cluster: SlurmCluster, tmp_path: Path
) -> None:
    job = queue.submit(shell(f"touch {tmp_path / 'ran'}"), "os:ana")
    queue.claim(job, executor.name)
    job = queue.get(job.id)
    assert executor.fence(job)
    with pytest.raises(ConflictError, match="fenced"):
        executor.start(job)
    (executor.attempt(job) / "script").write_text("")  # the start that was on its way arrives now
    from lapis.jobs.executors.slurm import SCRIPT

    folder = executor.attempt(job)
    (folder / "script").write_text(SCRIPT)
    cluster.call("sbatch", *submission(job, SECTION, folder), str(folder / "script"), str(folder))
    cluster.until(lambda: not cluster.call("squeue", "-h"))
    assert executor.poll(job).kind == "fenced"
    assert not (tmp_path / "ran").exists()


def test_controllers_that_are_killed_lose_no_job_and_run_none_twice(
    queue: JobQueue, controller: Controller, url: str, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    jobs = [queue.submit(shell(f"sleep 0.{n}; echo {n} >> {runs}"), "os:ana") for n in range(12)]
    for number in range(12):
        process = subprocess.Popen([sys.executable, "-c", CONTROLLER, url, str(tmp_path / "jobs")])
        time.sleep(0.6 + 0.17 * number)
        process.send_signal(signal.SIGKILL)
        process.wait()
    until(lambda: all(queue.get(job.id).state in ENDED for job in jobs), controller)
    assert [queue.get(job.id).state for job in jobs] == [State.SUCCEEDED] * 12
    assert sorted(runs.read_text().split(), key=int) == [str(n) for n in range(12)]


def node_of(cluster: SlurmCluster, job: Job) -> str:
    return cluster.call("squeue", "-h", "-n", f"lapis-{job.id}.{job.attempt}", "-o", "%N")


def test_a_job_on_a_node_that_dies_is_started_on_another(
    queue: JobQueue, controller: Controller, cluster: SlurmCluster, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    job = queue.submit(shell(f"while [ ! -e {gate} ]; do sleep 0.1; done"), "os:ana")
    until(lambda: queue.get(job.id).state is State.RUNNING, controller)
    node = node_of(cluster, queue.get(job.id))
    cluster.kill_node(node)
    until(lambda: queue.get(job.id).attempt == 2 and queue.get(job.id).state is State.RUNNING, controller)
    assert node_of(cluster, queue.get(job.id)) != node
    gate.touch()
    ended = settled(queue, controller, job)
    assert (ended.state, ended.losses) == (State.SUCCEEDED, 1)


def test_what_a_half_dead_node_runs_on_ends_before_the_next_attempt(
    queue: JobQueue, controller: Controller, cluster: SlurmCluster, tmp_path: Path
) -> None:
    marks, gate = tmp_path / "marks", tmp_path / "gate"
    script = f'me=$LAPIS_JOB; while [ ! -e {gate} ]; do echo "$me" >> {marks}; sleep 0.05; done'
    job = queue.submit(shell(script), "os:ana")
    until(lambda: queue.get(job.id).state is State.RUNNING and marks.exists(), controller)
    cluster.kill_manager(node_of(cluster, queue.get(job.id)))
    until(lambda: f"{job.id}/2" in marks.read_text(), controller)
    until(lambda: marks.read_text().count(f"{job.id}/2") > 40)
    lines = marks.read_text().split()
    assert lines == sorted(lines)  # the first attempt wrote nothing any more once the second began
    gate.touch()
    assert settled(queue, controller, job).state is State.SUCCEEDED


def test_shares_are_rendered_into_accounts(cluster: SlurmCluster) -> None:
    section = SlurmSection(
        account="others", accounts={"proj_a": "teama", "proj_b": "teamb", "proj_c": "teamb"}
    )
    weights = {"proj_a": 3.0, "proj_b": 0.5, "proj_c": 1.0, "proj_d": 1.0}
    for _ in range(2):  # also where they are there already
        for command in account_commands(section, weights, "root"):
            subprocess.run(command, env=cluster.environment, check=False, capture_output=True)
    told = cluster.call("sacctmgr", "-n", "-P", "list", "associations", "format=account,user,share")
    shares = {
        line.split("|")[0]: line.split("|")[2] for line in told.splitlines() if line.split("|")[1] == ""
    }
    assert {name: shares[name] for name in ("teama", "teamb", "others")} == {
        "teama": "300", "teamb": "150", "others": "100",
    }  # fmt: skip
    assert "others|root|" in told
    assert os.environ["SLURM_CONF"] == str(cluster.conf)
