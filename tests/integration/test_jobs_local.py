"""Jobs as real processes: they outlive their controller, run once, and end with all their children."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from lapis.db import open_database
from lapis.errors import ConflictError, StorageError
from lapis.jobs.controller import Controller
from lapis.jobs.executor import Status
from lapis.jobs.executors.local import LocalExecutor
from lapis.jobs.job import ENDED, Job, JobSpec, Resources, State
from lapis.jobs.policy import Policy
from lapis.jobs.queue import JobQueue
from lapis.tenants.tenant import Tenants

LEASE = 0.3

# Another process that controls jobs, until it is killed.
CONTROLLER = """
import sys, threading
from pathlib import Path
from lapis.db import connect
from lapis.jobs.controller import Controller
from lapis.jobs.executors.local import LocalExecutor
from lapis.jobs.queue import JobQueue
queue = JobQueue(connect(sys.argv[1]), lease_seconds=float(sys.argv[3]))
Controller(queue, LocalExecutor(Path(sys.argv[2]))).run(threading.Event(), seconds=0.02)
"""


@pytest.fixture
def url(database_url: str) -> str:
    return database_url


@pytest.fixture
def queue(url: str) -> Iterator[JobQueue]:
    db = open_database(url)
    yield JobQueue(db, lease_seconds=LEASE)
    db.dispose()


@pytest.fixture
def executor(tmp_path: Path) -> LocalExecutor:
    return LocalExecutor(tmp_path / "jobs", Resources(cpus=4))


@pytest.fixture
def controller(queue: JobQueue, executor: LocalExecutor) -> Controller:
    return Controller(queue, executor, grace=0.3)


def until(true: Callable[[], bool], controller: Controller | None = None) -> None:
    """Tick until it is true; the test's own time limit ends a wait for nothing."""
    give_up = time.monotonic() + 60
    while not true():
        assert time.monotonic() < give_up, "waited for nothing"
        if controller is not None:
            controller.tick()
        time.sleep(0.02)


def settled(queue: JobQueue, controller: Controller, job: Job) -> Job:
    until(lambda: queue.get(job.id).state in ENDED, controller)
    return queue.get(job.id)


def shell(script: str, retries: int = 1, cpus: float = 1, **env: str) -> JobSpec:
    return JobSpec("test", ("/bin/sh", "-c", script), Resources(cpus), env, retries)


def python(script: str) -> JobSpec:
    return JobSpec("test", (sys.executable, "-c", script))


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_job_runs_and_its_output_is_kept(
    queue: JobQueue, controller: Controller, executor: LocalExecutor
) -> None:
    job = queue.submit(shell("echo out $A; echo err >&2; pwd; cat", A="b c"), "os:ana")
    ended = settled(queue, controller, job)
    assert (ended.state, ended.exit_code, ended.attempt) == (State.SUCCEEDED, 0, 1)
    assert executor.log(ended).read_text() == f"out b c\nerr\n{executor.attempt(ended)}\n"


@pytest.mark.parametrize(("script", "code"), [("exit 7", 7), ("kill -KILL $$", 137)])
def test_a_job_that_fails_says_how(queue: JobQueue, controller: Controller, script: str, code: int) -> None:
    ended = settled(queue, controller, queue.submit(shell(script), "os:ana"))
    assert (ended.state, ended.exit_code, ended.reason) == (State.FAILED, code, f"exit status {code}")


def test_a_command_that_is_not_there_fails_and_is_named(
    queue: JobQueue, controller: Controller, executor: LocalExecutor
) -> None:
    ended = settled(queue, controller, queue.submit(JobSpec("test", ("no-such-command-here",)), "os:ana"))
    assert (ended.state, ended.exit_code) == (State.FAILED, 127)
    assert "no-such-command-here" in executor.log(ended).read_text()


def test_what_asks_for_more_than_there_is_fails_at_once(queue: JobQueue, controller: Controller) -> None:
    job = queue.submit(JobSpec("test", ("true",), Resources(cpus=1, gpus=8)), "os:ana")
    small = queue.submit(shell("exit 0"), "os:ana")
    assert settled(queue, controller, small).state is State.SUCCEEDED  # it stands in nobody's way
    assert queue.get(job.id).state is State.FAILED
    assert "asks for 1 CPU and 8 GPUs" in queue.get(job.id).reason


def test_jobs_wait_for_room(queue: JobQueue, controller: Controller, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    first = queue.submit(shell(f"while [ ! -e {gate} ]; do sleep 0.02; done", cpus=3), "os:ana")
    second = queue.submit(shell("exit 0", cpus=3), "os:ana")
    for _ in range(3):
        controller.tick()
    assert [queue.get(job.id).state for job in (first, second)] == [State.RUNNING, State.QUEUED]
    gate.touch()
    assert settled(queue, controller, second).state is State.SUCCEEDED


def test_cancelling_ends_the_whole_process_group(
    queue: JobQueue, controller: Controller, executor: LocalExecutor
) -> None:
    deaf = "trap '' TERM; sleep 600 & echo $!; sh -c 'trap \"\" TERM; sleep 600' & echo $!; echo ready; wait"
    job = queue.submit(shell(deaf), "os:ana")
    until(lambda: queue.get(job.id).state is State.RUNNING, controller)
    log = executor.log(queue.get(job.id))
    until(lambda: "ready" in log.read_text())
    children = [int(word) for word in log.read_text().split() if word.isdecimal()]
    assert all(alive(child) for child in children)
    queue.cancel(job.id, "os:ana")
    ended = settled(queue, controller, job)
    assert (ended.state, ended.reason) == (State.CANCELLED, "cancelled on request")
    until(lambda: not any(alive(child) for child in children))


def test_a_job_that_is_asked_to_end_may_finish_its_work(
    queue: JobQueue, controller: Controller, executor: LocalExecutor
) -> None:
    polite = (
        "import signal, sys, time\n"
        "def end(*_): print('saved', flush=True); sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, end); print('ready', flush=True); time.sleep(600)"
    )
    job = queue.submit(python(polite), "os:ana")
    until(lambda: queue.get(job.id).state is State.RUNNING, controller)
    log = executor.log(queue.get(job.id))
    until(lambda: "ready" in log.read_text())
    controller.grace = 60
    queue.cancel(job.id, "os:ana")
    assert settled(queue, controller, job).state is State.CANCELLED
    assert log.read_text() == "ready\nsaved\n"


def test_children_that_a_job_leaves_behind_end_with_it(
    queue: JobQueue, controller: Controller, executor: LocalExecutor
) -> None:
    ended = settled(queue, controller, queue.submit(shell("sleep 600 & echo $!"), "os:ana"))
    assert ended.state is State.SUCCEEDED
    child = int(executor.log(ended).read_text())
    until(lambda: not alive(child))


def lose(queue: JobQueue, controller: Controller, executor: LocalExecutor, job: Job, attempt: int) -> None:
    """Kill the shell before an attempt of a job, and nothing else: its child lives on, for a moment."""
    until(lambda: queue.get(job.id).state is State.RUNNING, controller)
    running = queue.get(job.id)
    assert running.attempt == attempt
    log = executor.log(running)
    until(lambda: log.read_text().endswith("\n"))
    os.kill(int((executor.attempt(running) / "pid").read_text().split()[0]), signal.SIGKILL)
    until(lambda: not alive(int(log.read_text())), controller)


def test_a_lost_job_is_started_once_more_and_then_fails(
    queue: JobQueue, controller: Controller, executor: LocalExecutor
) -> None:
    job = queue.submit(shell("sleep 600 & echo $!; wait"), "os:ana")
    lose(queue, controller, executor, job, attempt=1)
    lose(queue, controller, executor, job, attempt=2)
    ended = settled(queue, controller, job)
    assert (ended.state, ended.reason) == (State.FAILED, "its process was lost in attempt 2")


def test_a_new_controller_adopts_what_a_killed_one_left_running(
    queue: JobQueue, controller: Controller, executor: LocalExecutor, url: str, tmp_path: Path
) -> None:
    gate, runs = tmp_path / "gate", tmp_path / "runs"
    work = f"echo run >> {runs}; while [ ! -e {gate} ]; do sleep 0.02; done; exit 5"
    job = queue.submit(shell(work), "os:ana")
    first = subprocess.Popen([sys.executable, "-c", CONTROLLER, url, str(executor.folder), str(LEASE)])
    until(lambda: queue.get(job.id).state is State.RUNNING)
    first.kill()
    first.wait()
    until(lambda: bool(queue.orphans(executor.name)))
    controller.tick()
    adopted = queue.get(job.id)
    assert (adopted.state, adopted.attempt) == (State.RUNNING, 1)
    gate.touch()
    ended = settled(queue, controller, job)
    assert (ended.state, ended.exit_code) == (
        State.FAILED,
        5,
    )  # a child of another process, and still its code
    assert runs.read_text() == "run\n"


def test_controllers_killed_at_any_moment_lose_no_job_and_run_none_twice(
    queue: JobQueue, controller: Controller, executor: LocalExecutor, url: str, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    runs.touch()
    jobs = [queue.submit(shell(f"echo {n} >> {runs}; sleep 0.1", retries=0), "os:ana") for n in range(12)]
    command = [sys.executable, "-c", CONTROLLER, url, str(executor.folder), str(LEASE)]
    for begun in (0, 1, 4, 8):
        process = subprocess.Popen(command)
        until(lambda begun=begun: len(runs.read_text().split()) >= begun)  # type: ignore[misc]
        process.kill()
        process.wait()
    ended = [settled(queue, controller, job) for job in jobs]
    assert {job.state for job in ended} == {State.SUCCEEDED}
    assert sorted(runs.read_text().split(), key=int) == [str(n) for n in range(12)]


def test_two_controllers_share_the_work(
    queue: JobQueue, controller: Controller, executor: LocalExecutor, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    other = Controller(queue, executor)
    jobs = [queue.submit(shell(f"echo {n} >> {runs}"), "os:ana") for n in range(6)]
    until(lambda: other.tick() or all(queue.get(job.id).state in ENDED for job in jobs), controller)  # type: ignore[func-returns-value]
    assert sorted(runs.read_text().split()) == [str(n) for n in range(6)]


def test_a_fenced_attempt_never_starts(queue: JobQueue, executor: LocalExecutor, tmp_path: Path) -> None:
    job = queue.submit(shell(f"touch {tmp_path / 'ran'}"), "os:ana")
    queue.claim(job, executor.name)
    job = queue.get(job.id)
    assert executor.fence(job)
    assert executor.fence(job)  # also the next one who looks
    with pytest.raises(ConflictError, match="fenced"):
        executor.start(job)
    assert executor.poll(job).kind == "fenced"
    assert not (tmp_path / "ran").exists()


def test_a_controller_that_slept_too_long_starts_nothing(
    queue: JobQueue, controller: Controller, executor: LocalExecutor, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    job = queue.submit(shell(f"echo run >> {runs}"), "os:ana")
    queue.claim(job, executor.name)  # and then this controller sleeps, before the start
    asleep = queue.get(job.id)
    until(lambda: bool(queue.orphans(executor.name)))
    assert settled(queue, controller, job).attempt == 2
    with pytest.raises(ConflictError):
        executor.start(asleep)
    assert runs.read_text() == "run\n"


SAVES = """
import signal, sys, time
from pathlib import Path
saved = Path(sys.argv[1])
done = int(saved.read_text()) if saved.exists() else 0
def stop(*_):
    saved.write_text(str(done))
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
print("from", done, flush=True)
while not Path(sys.argv[2]).exists():
    time.sleep(0.01)
    done += 1
saved.write_text("all")
"""


def test_a_job_saves_stops_for_another_and_goes_on_where_it_was(
    queue: JobQueue, executor: LocalExecutor, tmp_path: Path
) -> None:
    controller = Controller(queue, executor, policy=Policy(minimum_run=0.0, grace=30.0))
    saved, gate = tmp_path / "saved", tmp_path / "gate"
    other = Tenants(queue.db).create_project("other", "os:ana").id
    argv = (sys.executable, "-c", SAVES, str(saved), str(gate))
    long = queue.submit(JobSpec("long", argv, Resources(4), preemptible=True), "os:ana")
    until(lambda: queue.get(long.id).state is State.RUNNING, controller)
    until(lambda: executor.log(queue.get(long.id)).read_text() == "from 0\n")
    wait = f"while [ ! -e {gate} ]; do sleep 0.02; done"
    short = queue.submit(shell(wait, cpus=2), "os:bo", project_id=other)
    until(lambda: queue.get(short.id).state is State.RUNNING, controller)
    stopped = queue.get(long.id)
    assert (stopped.state, stopped.attempt, stopped.exit_code) == (State.QUEUED, 1, 143)
    assert stopped.reason == "stopped for another job; it goes on when there is room"
    assert int(saved.read_text()) >= 0
    reached = saved.read_text()
    gate.touch()
    ended = settled(queue, controller, long)
    assert executor.log(ended).read_text() == f"from {reached}\n"
    assert (ended.state, ended.attempt, saved.read_text()) == (State.SUCCEEDED, 2, "all")


def test_a_job_ends_at_its_time_limit(queue: JobQueue, controller: Controller) -> None:
    job = queue.submit(replace(shell("sleep 600"), time_limit=0.2), "os:ana")
    ended = settled(queue, controller, job)
    assert (ended.state, ended.reason) == (State.FAILED, "it ran into its time limit of 0.2 s")


def test_a_short_job_that_ended_before_it_was_seen_to_begin_succeeded(
    queue: JobQueue, controller: Controller, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.waitpid

    def late(pid: int, options: int) -> tuple[int, int]:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # the job runs and ends between the two looks
        return real(pid, options)

    job = queue.submit(shell("exit 0"), "os:ana")
    monkeypatch.setattr(os, "waitpid", late)
    controller.tick()
    assert settled(queue, controller, job).state is State.SUCCEEDED


def test_a_command_that_is_too_long_fails_alone(queue: JobQueue, controller: Controller) -> None:
    long = queue.submit(shell("#" + "x" * 200_000), "os:ana")
    other = queue.submit(shell("exit 0"), "os:ana")
    assert settled(queue, controller, other).state is State.SUCCEEDED
    assert queue.get(long.id).state is State.FAILED
    assert "Argument list too long" in queue.get(long.id).reason


def test_what_a_job_writes_beside_its_own_files_stops_nobody(queue: JobQueue, controller: Controller) -> None:
    odd = queue.submit(shell("echo hello > exit; kill -KILL $PPID; sleep 60", retries=0), "os:ana")
    other = queue.submit(shell("exit 0"), "os:ana")
    assert settled(queue, controller, other).state is State.SUCCEEDED
    assert settled(queue, controller, odd).state is State.FAILED


class Failing(LocalExecutor):
    """As one with a defect in it, or in the file system: it fails with a job for a while."""

    error: Exception | None = None
    fails = "start"

    def start(self, job: Job) -> None:
        if self.error is not None and self.fails == "start" and job.spec.name == "odd":
            raise self.error
        super().start(job)

    def poll(self, job: Job) -> Status:
        if self.error is not None and self.fails == "poll" and job.spec.name == "odd":
            raise self.error
        return super().poll(job)


@pytest.mark.parametrize("fails", ["start", "poll"])
def test_an_error_that_nobody_foresaw_holds_up_one_job_and_only_for_a_while(
    queue: JobQueue, tmp_path: Path, fails: str
) -> None:
    executor = Failing(tmp_path / "jobs", Resources(cpus=4))
    executor.error, executor.fails = ZeroDivisionError("a defect"), fails
    controller = Controller(queue, executor)
    odd = queue.submit(replace(shell("exit 0", retries=0), name="odd"), "os:ana")
    other = queue.submit(shell("exit 0"), "os:ana")
    assert settled(queue, controller, other).state is State.SUCCEEDED
    executor.error = None
    assert settled(queue, controller, odd).state is State.SUCCEEDED


def test_a_job_that_cannot_start_for_the_moment_waits(
    queue: JobQueue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lapis.jobs.controller.AGAIN_SECONDS", 0.0)
    executor = Failing(tmp_path / "jobs", Resources(cpus=4))
    controller = Controller(queue, executor)
    job = queue.submit(replace(shell("exit 0", retries=0), name="odd"), "os:ana")
    executor.error = StorageError("No space left.")
    for _ in range(3):
        controller.tick()
    assert (queue.get(job.id).state, queue.get(job.id).reason) == (State.QUEUED, "No space left.")
    executor.error = None
    (tmp_path / "jobs" / job.id / "4" / "log").mkdir(
        parents=True
    )  # an error of the system that is none of the disk's
    controller.tick()
    assert "Is a directory" in queue.get(job.id).reason
    assert (settled(queue, controller, job).state, queue.get(job.id).losses) == (State.SUCCEEDED, 0)


def test_an_error_that_nobody_foresaw_does_not_end_the_controller(
    queue: JobQueue,
    executor: LocalExecutor,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("lapis.jobs.controller.AGAIN_SECONDS", 0.0)
    nodes, executor.nodes = executor.nodes, (None,)  # type: ignore[assignment]
    stop = threading.Event()
    thread = threading.Thread(target=Controller(queue, executor).run, args=(stop, 0.02))
    job = queue.submit(shell("exit 0"), "os:ana")
    with caplog.at_level("ERROR", "lapis"):
        thread.start()
        until(lambda: bool(caplog.records))
    assert caplog.records[0].exc_info is not None
    executor.nodes = nodes
    until(lambda: queue.get(job.id).state is State.SUCCEEDED)
    stop.set()
    thread.join()
