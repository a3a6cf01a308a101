"""`lapis train --ranks`: the same run as without, and as a job it ends with all its processes."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from lapis import config
from lapis.cli.runs import group as runs_group
from lapis.cli.train import command as train_command
from lapis.data.shards import Dataset
from lapis.db import open_database
from lapis.home import Home
from lapis.jobs.controller import Controller
from lapis.jobs.executors.local import LocalExecutor
from lapis.jobs.job import ENDED, JobSpec, Resources, State
from lapis.jobs.queue import JobQueue
from lapis.train.pretrain import Pretraining
from lapis.train.rank import program
from lapis.train.recipe import Recipe
from lapis.train.run import RECIPE, Run
from lapis.train.trainer import find_or_create

from .conftest import tiny_recipe
from .test_supervisor import alive


def call(command: Any, *arguments: str) -> str:
    result = CliRunner().invoke(command, list(arguments), catch_exceptions=False, standalone_mode=False)
    assert result.exception is None
    return str(result.stdout)


@pytest.fixture
def recipe(texts: Path, tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(config.to_toml(tiny_recipe(texts, steps=20)))
    return path


def until(true: Callable[[], bool], controller: Controller) -> None:
    give_up = time.monotonic() + 150
    while not true():
        assert time.monotonic() < give_up, "waited for nothing"
        controller.tick()
        time.sleep(0.02)


def test_a_supervised_run_is_the_same_run(recipe: Path, home: Home) -> None:
    supervised = json.loads(call(train_command, str(recipe), "--ranks", "1", "--json"))
    assert (supervised["status"], supervised["step"]) == ("finished", 20)
    alone = json.loads(call(train_command, str(recipe), "--set", "name=alone", "--json"))
    assert alone["loss"].hex() == supervised["loss"].hex()
    events = Run.open(home, supervised["id"]).events.read()
    call(train_command, str(recipe), "--ranks", "1", "--json")  # what is finished is not done again
    assert Run.open(home, supervised["id"]).events.read() == events


@pytest.mark.long
def test_the_ranks_take_what_may_change_on_the_way(texts: Path, dataset: Dataset, home: Home) -> None:
    begun, now = (tiny_recipe(texts, pipeline=name) for name in ("1f1b", "gpipe"))
    objective = Pretraining(begun.train, dataset)
    run = find_or_create(home, begun, config.to_toml(begun), objective)
    assert find_or_create(home, now, config.to_toml(now), objective).id == run.id
    _, _, _, *sets = program(home, run, objective, now.train).arguments
    assert config.load(run.folder / RECIPE, Recipe, sets).train == now.train


def test_as_a_job_it_restarts_and_ends_with_all_its_processes(
    recipe: Path, home: Home, tmp_path: Path
) -> None:
    queue = JobQueue(open_database(home.database_url))
    controller = Controller(queue, LocalExecutor(tmp_path / "jobs", Resources(cpus=2)), grace=60)
    endless = ("--set", "train.steps=1000000", "--set", "checkpoint.seconds=0.2")
    argv = (sys.executable, "-m", "lapis.cli.main", "train", str(recipe), "--ranks", "2", *endless)
    job = queue.submit(JobSpec("train", argv, Resources(cpus=2)), "os:ana")
    until(lambda: bool(Run.list(home)) and bool(Run.list(home)[0].events.read("checkpoint")), controller)
    run = Run.list(home)[0]
    holder = run.folder / ".lock"
    first = int(holder.read_text())
    os.kill(first, signal.SIGKILL)
    until(lambda: bool(run.events.read("resume")) and holder.read_text() != str(first), controller)
    assert run.status() == "running"
    second, supervisor = int(holder.read_text()), int((run.folder / ".watch").read_text())
    queue.cancel(job.id, "os:ana")
    until(lambda: queue.get(job.id).state in ENDED, controller)
    assert queue.get(job.id).state is State.CANCELLED
    assert not [pid for pid in (first, second, supervisor) if alive(pid)]
    assert run.status() == "stopped"
    assert run.events.read("end")[-1]["reason"] == "stopped"  # its last step is in a checkpoint
    assert "restart      from step" in call(runs_group, "show", run.id)
    queue.db.dispose()
