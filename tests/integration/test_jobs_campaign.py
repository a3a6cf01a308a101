"""Controllers are killed 50 times while jobs, gangs and preemptions are under way: nothing is lost or done twice."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import sqlalchemy as sa

from lapis.db import open_database
from lapis.jobs.controller import Controller
from lapis.jobs.executors.local import LocalExecutor
from lapis.jobs.job import ENDED, JobSpec, Priority, Resources, State
from lapis.jobs.policy import Policy
from lapis.jobs.queue import JobQueue
from lapis.tables.jobs import executors
from lapis.tenants.tenant import Tenants

KILLS = 50
BUSY = 30  # jobs that wait or run at each kill, or more
LEASE = 0.3
ROOM = Resources(6, 4)

CONTROLLER = """
import sys, threading
from pathlib import Path
from lapis.db import connect
from lapis.jobs.controller import Controller
from lapis.jobs.executors.local import LocalExecutor
from lapis.jobs.job import Resources
from lapis.jobs.policy import Policy
from lapis.jobs.queue import JobQueue
queue = JobQueue(connect(sys.argv[1]), lease_seconds=float(sys.argv[3]))
executor = LocalExecutor(Path(sys.argv[2]), Resources(6, 4))
policy = Policy(minimum_run=0.0, grace=5.0)
Controller(queue, executor, policy=policy).run(threading.Event(), seconds=0.02)
"""

# A job of so many steps. It holds its GPUs by files that nobody else may have, notes each step once, and saves when
# it is told to stop. Written so that a second run at the same time, a step done twice, or a GPU shared would show.
WORK = """
import os, signal, sys, time
from pathlib import Path
folder, name, steps = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
gpus = [gpu for gpu in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if gpu]
stopping = []
signal.signal(signal.SIGTERM, lambda *_: stopping.append(1))
def hold(path):
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        with (folder / "wrong").open("a") as wrong:
            wrong.write(f"{name}: {path} was held\\n")
held = [folder / f"gpu-{gpu}" for gpu in gpus] + [folder / f"running-{name}"]
for path in held:
    hold(path)
notes = folder / f"steps-{name}"
done = len(notes.read_text()) if notes.exists() else 0
while done < steps and not stopping:
    time.sleep(0.02)
    with notes.open("a") as file:
        file.write(".")
    done += 1
for path in held:
    path.unlink()
sys.exit(0 if done == steps else 143)
"""


def wait_for_ticks(queue: JobQueue) -> None:
    """Until a controller that was begun just now has looked at the queue: it then notes what it has."""
    begun, give_up = time.time(), time.monotonic() + 60
    seen = sa.select(executors.c.seen_at)
    while True:
        with queue.db.connect() as connection:
            if (connection.execute(seen).scalar() or 0.0) > begun:
                return
        assert time.monotonic() < give_up
        time.sleep(0.02)


@pytest.mark.long
@pytest.mark.timeout(1500)
def test_fifty_killed_controllers_under_load(tmp_path: Path) -> None:
    rng = random.Random(1)
    url, folder = f"sqlite:///{tmp_path / 'lapis.db'}", tmp_path / "work"
    folder.mkdir()
    (folder / "work.py").write_text(WORK)
    db = open_database(url)
    queue = JobQueue(db, lease_seconds=LEASE)
    executor = LocalExecutor(tmp_path / "jobs", ROOM)
    projects = ["default", *(Tenants(db).create_project(name, "os:ana").id for name in ("a", "b"))]
    steps: dict[str, int] = {}

    def submit(count: int) -> None:
        for _ in range(count):
            number, ranks, gpus = len(steps), rng.choice([1, 1, 1, 2, 3]), rng.choice([0, 1, 1])
            argv = (sys.executable, "-S", str(folder / "work.py"), str(folder), str(number), "")
            length = rng.choice([3, 10, 40])
            spec = JobSpec(
                f"job {number}", (*argv[:-1], str(length)), Resources(1, gpus), {}, 0, ranks,
                rng.choice(list(Priority)), rng.choice([None, 600.0]), rng.random() < 0.6,
            )  # fmt: skip
            steps[queue.submit(spec, "os:ana", rng.choices(projects, (6, 2, 1))[0]).id] = length

    submit(2 * BUSY)
    command = [sys.executable, "-c", CONTROLLER, url, str(executor.folder), str(LEASE)]
    for _ in range(KILLS):
        with subprocess.Popen(command) as process:
            try:
                if rng.random() < 0.9:  # the others die before their first tick
                    wait_for_ticks(queue)
                time.sleep(rng.uniform(0.0, 0.7))
            finally:
                process.kill()
        if sum(job.state not in ENDED for job in queue.list()) < BUSY:
            submit(BUSY)
    controller = Controller(queue, executor, policy=Policy(minimum_run=0.0, grace=5.0))
    give_up = time.monotonic() + 200
    while any(job.state not in ENDED for job in queue.list()):
        assert time.monotonic() < give_up, [job for job in queue.list() if job.state not in ENDED]
        controller.tick()
        time.sleep(0.02)
    jobs = queue.list()
    assert {job.state for job in jobs} == {State.SUCCEEDED}, [job for job in jobs if job.state != "succeeded"]
    assert not (folder / "wrong").exists(), (folder / "wrong").read_text()
    for number, job in enumerate(sorted(jobs, key=lambda job: int(job.spec.name.split()[1]))):
        assert len((folder / f"steps-{number}").read_text()) == steps[job.id]
    stopped = sum(job.attempt - 1 for job in jobs)
    print(f"{len(jobs)} jobs, {KILLS} kills, {stopped} further attempts")
    assert stopped > 0  # preemptions and fenced starts did happen
    db.dispose()
