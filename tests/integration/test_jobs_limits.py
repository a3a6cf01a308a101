"""Jobs of one machine share its GPUs and memory: each sees its own GPUs, and none takes more memory than it named."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lapis.db import open_database
from lapis.jobs.controller import Controller
from lapis.jobs.executors.limits import parent_group
from lapis.jobs.executors.local import LocalExecutor
from lapis.jobs.job import ENDED, Job, JobSpec, Resources, State
from lapis.jobs.queue import JobQueue

MIB = 2**20
ROOM = Resources(8, 4, 4096 * MIB)


@pytest.fixture
def queue(tmp_path: Path) -> Iterator[JobQueue]:
    db = open_database(f"sqlite:///{tmp_path / 'lapis.db'}")
    yield JobQueue(db)
    db.dispose()


def settle(queue: JobQueue, executor: LocalExecutor, *jobs: Job) -> list[Job]:
    """Run the queue until the jobs have ended."""
    controller, give_up = Controller(queue, executor), time.monotonic() + 60
    while any(queue.get(job.id).state not in ENDED for job in jobs):
        assert time.monotonic() < give_up
        controller.tick()
        time.sleep(0.02)
    return [queue.get(job.id) for job in jobs]


def test_jobs_that_run_together_see_different_gpus(
    queue: JobQueue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    executor = LocalExecutor(tmp_path / "jobs", ROOM)  # it says that it has four
    meet = f"touch {tmp_path}/$0; while [ $(ls {tmp_path} | grep -c meet) -lt 3 ]; do sleep 0.02; done"
    script = f'{meet}; echo "[$CUDA_VISIBLE_DEVICES]"'
    asked = (Resources(1, 2), Resources(1, 1), Resources(1, 0))
    jobs = [
        queue.submit(
            JobSpec("job", ("/bin/sh", "-c", script, f"meet{i}"), each, {"CUDA_VISIBLE_DEVICES": "7"}),
            "os:ana",
        )
        for i, each in enumerate(asked)
    ]
    ended = settle(queue, executor, *jobs)
    said = [executor.log(job).read_text().strip() for job in ended]
    assert said == ["[0,1]", "[2]", "[]"]


def test_only_the_gpus_that_were_given_to_lapis_are_given_on(
    queue: JobQueue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-1b2c")
    executor = LocalExecutor(tmp_path / "jobs")
    assert executor.nodes is not None
    assert executor.nodes[0].resources.gpus == 2
    job = queue.submit(
        JobSpec("job", ("/bin/sh", "-c", "echo $CUDA_VISIBLE_DEVICES"), Resources(1, 2)), "os:ana"
    )
    (ended,) = settle(queue, executor, job)
    assert executor.log(ended).read_text() == "5,GPU-1b2c\n"


@pytest.mark.parametrize(("mib", "state"), [(80, State.FAILED), (800, State.SUCCEEDED)])
def test_without_control_groups_each_process_is_held_to_the_memory(
    queue: JobQueue, tmp_path: Path, mib: int, state: State
) -> None:
    executor = LocalExecutor(tmp_path / "jobs", ROOM)
    executor.groups = None
    take = (sys.executable, "-c", "bytearray(300 << 20); print('had it')")
    job = queue.submit(JobSpec("job", take, Resources(1, 0, mib * MIB), retries=0), "os:ana")
    (ended,) = settle(queue, executor, job)
    assert ended.state is state
    assert ("MemoryError" in executor.log(ended).read_text()) is (state is State.FAILED)


def test_where_a_control_group_can_be_made_the_job_is_in_it(queue: JobQueue, tmp_path: Path) -> None:
    """A pretended one: what is written is what the kernel would read."""
    groups = tmp_path / "groups"
    groups.mkdir()
    executor = LocalExecutor(tmp_path / "jobs", ROOM, groups)
    job = queue.submit(JobSpec("job", ("true",), Resources(1, 0, 100 * MIB), ranks=2), "os:ana")
    (ended,) = settle(queue, executor, job)
    group = groups / f"lapis-{job.id}-1"
    assert (group / "memory.max").read_text() == str(200 * MIB)
    shell = (executor.attempt(ended) / "pid").read_text().split()[0]
    assert (group / "cgroup.procs").read_text().split() == [shell]


@pytest.mark.parametrize(
    ("own", "hands_on", "found"),
    [
        ("0::/user/lapis", {"user": "cpu memory"}, "user"),
        ("0::/user/lapis", {"user": "cpu", "user/lapis": "memory"}, "user/lapis"),
        ("0::/user/lapis", {"user": "cpu"}, None),
        ("4:memory:/\n0::/", {"": "memory"}, ""),
        ("4:memory:/", {"": "memory"}, None),  # version 1
    ],
)
def test_a_control_group_is_looked_for_where_one_can_be_made(
    tmp_path: Path, own: str, hands_on: dict[str, str], found: str | None
) -> None:
    (tmp_path / "own").write_text(own + "\n")
    groups = tmp_path / "fs"
    for name, controllers in hands_on.items():
        (groups / name).mkdir(parents=True, exist_ok=True)
        (groups / name / "cgroup.subtree_control").write_text(controllers)
    expected = None if found is None else groups / found
    assert parent_group(groups, tmp_path / "own") == expected


def test_a_job_that_asks_for_more_memory_than_there_is_is_refused(queue: JobQueue, tmp_path: Path) -> None:
    executor = LocalExecutor(tmp_path / "jobs", ROOM)
    job = queue.submit(JobSpec("job", ("true",), Resources(1, 0, 5000 * MIB)), "os:ana")
    (ended,) = settle(queue, executor, job)
    assert ended.state is State.FAILED
    assert (
        "asks for 1 CPU and 0 GPUs and 4.88 GiB; there are 8 CPUs, 4 GPUs and 4 GiB on 1 node" in ended.reason
    )
