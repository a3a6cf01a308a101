"""A training on two nodes with a spare one, as a job on a real Slurm: nodes are lost, and it goes on to its end."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lapis import config
from lapis.db import open_database
from lapis.home import Home
from lapis.jobs.controller import Controller
from lapis.jobs.executors.slurm import SlurmExecutor
from lapis.jobs.job import Job, JobSpec, Resources, State
from lapis.jobs.queue import JobQueue
from lapis.train.run import Run
from tests.corpus import write_corpus
from tests.integration.conftest import tiny_recipe

from .cluster import SlurmCluster
from .test_jobs import SECTION, settled, until

STEPS = 150


class Training:
    """A job that trains on two nodes of three, and what its run tells."""

    def __init__(self, queue: JobQueue, controller: Controller, recipe: Path, home: Home) -> None:
        self.queue, self.controller, self.home = queue, controller, home
        argv = (sys.executable, "-m", "lapis.cli.main", "train", str(recipe), "--ranks", "2", "--nodes", "2")
        spec = JobSpec("train", argv, Resources(2, 1, 3 << 30), ranks=3, spread=True)
        self.job = queue.submit(spec, "os:ana")

    def until(self, true: Callable[[], bool]) -> None:
        until(true, self.controller, seconds=500)

    def told(self, event: str) -> list[dict[str, Any]]:
        runs = Run.list(self.home)
        return runs[0].events.read(event) if runs else []

    def at_work(self) -> None:
        """Wait until it has a checkpoint to go on from."""
        self.until(lambda: any(event["step"] > 0 for event in self.told("checkpoint")))

    def nodes(self) -> list[str]:
        return list(self.told("placed")[-1]["nodes"])

    def finish(self, attempts: int = 1) -> Job:
        ended = settled(self.queue, self.controller, self.job, seconds=500)
        log = self.controller.executor.log(ended).read_text()  # type: ignore[attr-defined]
        assert (ended.state, ended.attempt) == (State.SUCCEEDED, attempts), log[-3000:]
        assert Run.list(self.home)[0].summary().step == STEPS
        return ended

    def report(self, what: str, killed: float) -> None:
        """Say how long nothing was trained: from the loss, and from the last step before, to the first step after."""
        restart = (
            self.told("restart")[-1]["time"] if self.told("restart") else self.told("resume")[-1]["time"]
        )
        steps = [event["time"] for event in self.told("step")]
        first = min(at for at in steps if at > restart)
        last = max(at for at in steps if at < first)
        print(f"\n{what}: loss to first new step {first - killed:.1f} s; without a step {first - last:.1f} s")


@pytest.fixture
def training(
    request: pytest.FixtureRequest, cluster: SlurmCluster, tmp_path: Path, home: Home
) -> Iterator[Training]:
    texts = write_corpus(tmp_path / "texts", ("email", "json", "logging", "http"))
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(
        config.to_toml(
            tiny_recipe(texts, steps=getattr(request, "param", STEPS), checkpoint={"seconds": 0.5})
        )
    )
    queue = JobQueue(open_database(home.database_url))
    executor = SlurmExecutor(home.jobs, SECTION)
    yield Training(queue, Controller(queue, executor, grace=30), recipe, home)
    queue.db.dispose()


def not_first(nodes: list[str]) -> str:
    """A node with a rank, and without the batch script, which is on the first one of the job."""
    return max(nodes)


def test_a_node_that_dies_is_replaced_within_the_job(training: Training, cluster: SlurmCluster) -> None:
    training.at_work()
    lost, killed = not_first(training.nodes()), time.time()
    cluster.kill_node(lost)
    training.finish()
    assert lost not in training.nodes()
    assert len(training.told("restart")) == 1
    training.report("a node killed", killed)


def test_a_node_that_falls_silent_is_replaced(training: Training, cluster: SlurmCluster) -> None:
    training.at_work()
    lost, frozen = not_first(training.nodes()), time.time()
    cluster.freeze_node(lost)
    training.finish()
    assert [event["node"] for event in training.told("node_lost")] == [lost]
    training.report("a node frozen", frozen)
    cluster.thaw_node(lost)


@pytest.mark.parametrize("training", [1_000_000], indirect=True)
def test_a_half_dead_node_is_left_and_a_cancelled_training_saves(
    training: Training, cluster: SlurmCluster
) -> None:
    training.at_work()
    lost, killed = not_first(training.nodes()), time.time()
    cluster.kill_manager(lost)
    training.until(lambda: len(training.told("placed")) == 2)
    placed = training.told("placed")[-1]
    training.until(lambda: training.told("step")[-1]["time"] > placed["time"])
    assert lost not in placed["nodes"]
    assert "down" in training.told("node_lost")[0]["cause"]
    training.report("slurmd alone killed", killed)
    training.queue.cancel(training.job.id, "os:ana")
    ended = settled(training.queue, training.controller, training.job)
    assert ended.state is State.CANCELLED
    assert Run.list(training.home)[0].status() == "stopped"
    last = training.told("end")[-1]
    assert (last["reason"], last["step"]) == ("stopped", training.told("checkpoint")[-1]["step"])


def test_when_the_node_of_the_supervisor_dies_the_next_attempt_goes_on(
    training: Training, cluster: SlurmCluster
) -> None:
    training.at_work()
    name = f"lapis-{training.job.id}.1"
    batch, killed = cluster.call("squeue", "-h", "-n", name, "-o", "%B"), time.time()
    cluster.kill_node(batch)
    ended = training.finish(attempts=2)
    assert ended.losses == 1
    assert training.told("resume")[-1]["step"] > 0
    training.report("the supervisor's node killed", killed)
