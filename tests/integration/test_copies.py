"""Fine-tuning on several ranks: each has a whole copy, and all together learn what one process learns."""

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


def test_preferences_train_an_adapter_on_two_ranks(place: Path, home: Home) -> None:
    outputs = [rank.communicate(timeout=100)[0] for rank in start(place / "dpo.toml", "", *FP32)]
    (many,) = Run.list(home)
    assert many.status() == "finished", outputs
    assert outputs[1] == "", "one rank tells"
    alone(place / "dpo.toml", *FP32, "name=alone")
    assert_same(many, Run.list(home)[-1])


def test_all_weights_are_tuned_on_two_ranks_and_then_by_one(place: Path, home: Home) -> None:
    path = place / "sft.toml"
    path.write_text(path.read_text().replace("[lora]\nrank = 4\nalpha = 8.0\n", ""))
    sets = (*FP32, "train.steps=150", "train.lr=0.001")
    many = stop(start(path, "dp=2", *sets), home)
    stop(start(path, "dp=2", *sets), home)
    alone(path, *sets)
    assert len(many.events.read("resume")) == 2
    alone(path, *sets, "name=alone")
    assert_same(many, Run.list(home)[-1])


@pytest.mark.parametrize(("recipe", "what"), [("sft", "lora"), ("dpo", "lora"), ("dpo", "The objective dpo")])
def test_other_meshes_are_refused_by_name(place: Path, home: Home, recipe: str, what: str) -> None:
    path = place / f"{recipe}.toml"
    if what != "lora":
        path.write_text(path.read_text().replace("[lora]\nrank = 4\nalpha = 8.0\n", ""))
    arguments = ["train", str(path), "--ranks", "2", "--set", "train.mesh=fsdp=2"]
    with pytest.raises(ConfigError, match=what) as caught:
        CliRunner().invoke(lapis, arguments, catch_exceptions=False, standalone_mode=False)
    assert 'train.mesh = "dp=2"' in str(caught.value)
    assert not Run.list(home)
