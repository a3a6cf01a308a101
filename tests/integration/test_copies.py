"""Fine-tuning by `lapis train` on several ranks: all together learn what one process learns."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from lapis.checkpoint.sharded import load
from lapis.cli.main import lapis
from lapis.errors import ConfigError
from lapis.home import Home
from lapis.train.export import last_checkpoint
from lapis.train.mesh import Mesh
from lapis.train.run import Run

from .test_finetuning_commands import place
from .test_parallel_run import alone, losses, start, stop

__all__ = ["place"]  # a fixture
FP32 = ("train.dtype=fp32", "checkpoint.steps=2")


def assert_same(many: Run, one: Run) -> None:
    assert many.id != one.id
    assert many.status() == one.status() == "finished"
    theirs = losses(one)
    assert losses(many)[max(theirs)] == pytest.approx(theirs[max(theirs)], rel=1e-5)
    expected = load(last_checkpoint(one)).groups["model"]
    for name, weights in load(last_checkpoint(many)).groups["model"].items():
        assert torch.allclose(weights, expected[name], rtol=1e-4, atol=1e-5), name


@pytest.mark.long
def test_preferences_train_an_adapter_on_two_ranks(place: Path, home: Home) -> None:
    outputs = [rank.communicate(timeout=100)[0] for rank in start(place / "dpo.toml", "", *FP32)]
    (many,) = Run.list(home)
    assert many.status() == "finished", outputs
    assert outputs[1] == "", "one rank tells"
    alone(place / "dpo.toml", *FP32, "name=alone")
    assert_same(many, Run.list(home)[-1])


@pytest.mark.long
def test_all_weights_are_tuned_in_two_layouts_and_then_by_one_process(place: Path, home: Home) -> None:
    path = place / "sft.toml"
    path.write_text(path.read_text().replace("[lora]\nrank = 4\nalpha = 8.0\n", ""))
    sets = (*FP32, "train.steps=80", "train.lr=0.00002")
    many = stop(start(path, "tp=2", *sets), home)
    stop(start(path, "", *sets), home)
    alone(path, *sets)
    assert len(many.events.read("resume")) == 2
    alone(path, *sets, "name=alone")
    assert_same(many, Run.list(home)[-1])


@pytest.mark.parametrize(
    ("recipe", "lora", "mesh", "said"),
    [
        ("sft", True, "fsdp=2", r"\[lora\] is not offered on the mesh fsdp=2: adapters are small"),
        (
            "dpo",
            False,
            "pp=2",
            "The objective dpo is not offered on the mesh pp=2: held-out text is measured",
        ),
        ("sft", False, "tp=2,fsdp=4", "train.batch = 2 does not divide by dp·ep·fsdp = 4"),
    ],
)
def test_other_meshes_are_refused_before_there_is_a_run(
    place: Path, home: Home, recipe: str, lora: bool, mesh: str, said: str
) -> None:
    path = place / f"{recipe}.toml"
    if not lora:
        path.write_text(path.read_text().replace("[lora]\nrank = 4\nalpha = 8.0\n", ""))
    ranks = str(Mesh.parse(mesh).size)
    arguments = ["train", str(path), "--ranks", ranks, "--set", f"train.mesh={mesh}"]
    with pytest.raises(ConfigError, match=said):
        CliRunner().invoke(lapis, arguments, catch_exceptions=False, standalone_mode=False)
    assert not Run.list(home)


def test_the_best_cannot_be_told_where_nothing_is_held_out(place: Path, home: Home) -> None:
    arguments = [
        "train",
        str(place / "sft.toml"),
        "--set",
        "checkpoint.best=1",
        "--set",
        "examples.heldout=0",
    ]
    with pytest.raises(ConfigError, match="goes by the loss on what is held out, and nothing is"):
        CliRunner().invoke(lapis, arguments, catch_exceptions=False, standalone_mode=False)
    assert not Run.list(home)
