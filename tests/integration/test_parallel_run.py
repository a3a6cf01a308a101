"""`lapis train` as a plain torch.distributed program: what many ranks learn, and a run that changes its layout."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from lapis import config
from lapis.checkpoint.sharded import load
from lapis.cli.train import command
from lapis.data.shards import Dataset
from lapis.errors import ConfigError
from lapis.home import Home
from lapis.train.export import last_checkpoint
from lapis.train.pretrain import Pretraining
from lapis.train.run import Run

from .conftest import tiny_recipe

STEPS = 60
# A rank of a run that is there already: `folder dataset`. Of the second rank, some passes give no number.
FAULTY = """
import os, sys
from pathlib import Path
from lapis import config
from lapis.data.shards import Dataset
from lapis.train.recipe import Recipe
from lapis.train.run import RECIPE, Run
from lapis.train.trainer import train
from tests.integration.test_trainer_faults import Faulty
folder, dataset = map(Path, sys.argv[1:])
recipe = config.load(folder / RECIPE, Recipe)
bad = (2, 5, 6) if os.environ["RANK"] == "1" else ()
train(recipe, Faulty(recipe, Dataset.open(dataset), bad), Run(folder))
"""


@pytest.fixture
def recipe(texts: Path, tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(config.to_toml(tiny_recipe(texts, steps=STEPS, optimizer="adamw", dtype="fp32")))
    return path


def start(recipe: Path, mesh: str, *sets: str, ranks: int = 2) -> list[subprocess.Popen[str]]:
    """Ranks of `lapis train`, as any launcher starts them."""
    options = [part for item in (f"train.mesh={mesh}", *sets) for part in ("--set", item)]
    return launch([sys.executable, "-m", "lapis.cli.main", "train", str(recipe), *options], ranks)


def launch(command: list[str], ranks: int) -> list[subprocess.Popen[str]]:
    """A command as so many ranks."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    common = {
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": "1",
    }
    return [
        subprocess.Popen(
            command,
            env={**os.environ, **common, "RANK": str(rank)},
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]


def stop(ranks: list[subprocess.Popen[str]], home: Home) -> Run:
    """Ask the last rank to stop after the next checkpoint; all stop after the same step."""
    give_up, before = time.monotonic() + 120, saved(home)
    while saved(home) == before:
        assert time.monotonic() < give_up and all(rank.poll() is None for rank in ranks), "they train"
        time.sleep(0.02)
    ranks[-1].send_signal(signal.SIGTERM)
    outputs = [rank.communicate(timeout=100)[0] for rank in ranks]
    (run,) = Run.list(home)
    assert run.status() == "stopped", outputs
    return run


def saved(home: Home) -> int:
    return sum(len(run.events.read("checkpoint")) for run in Run.list(home))


def alone(recipe: Path, *sets: str) -> None:
    options = [part for item in sets for part in ("--set", item)]
    done = CliRunner().invoke(command, [str(recipe), *options], catch_exceptions=False)
    assert done.exit_code == 0, done.output


def losses(run: Run) -> dict[int, float]:
    return {event["step"]: event["loss"] for event in run.events.read("step")}


def test_a_run_goes_on_in_any_layout(recipe: Path, home: Home) -> None:
    sets = ("checkpoint.steps=4", "train.micro_batch=2")
    run = stop(start(recipe, "cp=2", *sets), home)
    assert len(run.events.read("start")) == 1, "one rank tells"
    stop(
        start(recipe, "pp=2", *sets), home
    )  # each proves by itself that the next losses are those of the last
    alone(recipe, *sets)
    assert [other.id for other in Run.list(home)] == [run.id] and run.status() == "finished"
    assert len(run.events.read("resume")) == 2
    alone(recipe, *sets, "name=alone")
    assert losses(run)[STEPS] == pytest.approx(losses(Run.list(home)[-1])[STEPS], rel=1e-5)


@pytest.mark.long
def test_two_ranks_learn_what_one_process_learns(recipe: Path, home: Home) -> None:
    outputs = [rank.communicate(timeout=200)[0] for rank in start(recipe, "")]
    (many,) = Run.list(home)
    assert many.status() == "finished", outputs
    alone(recipe, "name=alone")
    one = Run.list(home)[-1]
    assert one.id != many.id
    assert losses(many)[STEPS] == pytest.approx(losses(one)[STEPS], rel=1e-5)
    assert many.summary().tokens == one.summary().tokens


@pytest.mark.long
def test_what_one_rank_sees_all_act_upon(texts: Path, dataset: Dataset, home: Home) -> None:
    """Bad numbers of one rank, and the end of a run by minutes, for which every rank has a clock of its own."""
    recipe = tiny_recipe(texts, steps=None, minutes=0.05, bad_step="skip")
    run = Run.create(home, "minutes", config.to_toml(recipe), "0" * 64)
    objective = Pretraining(recipe.train, dataset)
    ranks = launch([sys.executable, "-c", FAULTY, str(run.folder), str(dataset.folder)], ranks=2)
    outputs = [rank.communicate(timeout=200)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    told = [(event["step"], event["fault"], event["action"]) for event in run.events.read("bad_step")]
    assert told == [(2, "hardware", "replay taken"), (4, "data", "skip")]
    assert run.events.read("bad_step")[1]["samples"] == list(objective.step(4, 0, 1).samples)
    assert run.status() == "finished"
    assert [len(run.events.read(event)) for event in ("start", "plan", "end")] == [1, 1, 1]
    state = load(last_checkpoint(run)).state
    assert state["step"] == state["optimizer_steps"] + 1 == state["plan"]["steps"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--set", "train.mesh=fsdp=4"], "4 ranks, but 1 were started"),
        (
            ["--ranks", "3", "--set", "train.mesh=tp=3"],
            "tp=3 does not fit: heads = 1 does not divide by tp = 3",
        ),
        (["--ranks", "2", "--set", "train.micro_batch=3"], "cannot be shared by 2 data-parallel ranks"),
        (["--ranks", "2", "--set", "train.mesh=pp=2"], "1 micro-batches on each data-parallel rank"),
        (["--ranks", "2", "--set", "train.compile=true"], "train.compile is not offered on the mesh fsdp=2"),
        (
            [
                "--ranks",
                "2",
                "--set",
                "train.mesh=pp=2",
                "--set",
                "train.micro_batch=1",
                "--set",
                "checkpoint.best=1",
            ],
            "checkpoint.best is not offered on the mesh pp=2: held-out text",
        ),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused_before_there_is_a_run(
    recipe: Path, home: Home, options: list[str], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        CliRunner().invoke(command, [str(recipe), *options], catch_exceptions=False, standalone_mode=False)
    assert not Run.list(home)
