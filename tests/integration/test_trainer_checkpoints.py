"""A run in training and its checkpoints: beside the steps, falling back, a full disk."""

from __future__ import annotations

import resource
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from lapis import config
from lapis.checkpoint.folder import listing
from lapis.checkpoint.sharded import latest, load
from lapis.data.shards import Dataset
from lapis.errors import IntegrityError
from lapis.home import Home
from lapis.train.pretrain import Pretraining
from lapis.train.recipe import Recipe
from lapis.train.run import Run
from lapis.train.trainer import Trainer

from .conftest import tiny_recipe


@pytest.fixture(autouse=True)
def _every_step_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lapis.train.trainer.RECORD_EVERY_S", 0.0)


def loop(recipe: Recipe, dataset: Dataset, run: Run, at: Callable[[int, threading.Event], None]) -> None:
    """Train, calling `at` after every step."""
    stop = threading.Event()

    def progress(done: float, total: float | None = None, text: str = "") -> None:
        at(run.events.read("step")[-1]["step"], stop)

    with run.hold():
        Trainer(recipe, Pretraining(recipe.train, dataset), run).loop(progress, stop)


def nothing(step: int, stop: threading.Event) -> None:
    """Let it train."""


def losses(run: Run) -> dict[int, str]:
    return {event["step"]: float(event["loss"]).hex() for event in run.events.read("step")}


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 4
    path.write_bytes(data)


def test_a_damaged_checkpoint_makes_the_run_fall_back_and_say_so(
    home: Home, texts: Path, dataset: Dataset
) -> None:
    recipe = tiny_recipe(texts, steps=18, checkpoint={"steps": 5, "keep": 3, "best": 1})
    whole = Run.create(home, "whole", config.to_toml(recipe), "0" * 64)
    loop(recipe, dataset, whole, nothing)
    events = whole.events.read("checkpoint")
    assert [event["step"] for event in events] == [5, 10, 15, 18]
    assert all(event["stall"] >= 0 and event["score"] > 0 for event in events)
    kept = [checkpoint.step for checkpoint in listing(whole.checkpoints)[0]]
    assert kept == [10, 15, 18]

    hit = Run.create(home, "hit", config.to_toml(recipe), "1" * 64)
    with pytest.raises(KeyboardInterrupt):
        loop(recipe, dataset, hit, lambda step, stop: stop.set() if step == 13 else None)
    newest = latest(hit.checkpoints)
    assert newest is not None
    assert newest.step == 13
    flip(newest.folder / "optimizer.safetensors")
    loop(recipe, dataset, hit, nothing)
    assert [(event["checkpoint"], event["to"][:13]) for event in hit.events.read("fallback")] == [
        (newest.folder.name, "step-00000010")
    ]
    assert "in tensor second." in hit.events.read("fallback")[0]["why"]
    assert hit.events.read("resume")[0]["step"] == 10
    assert losses(hit) == losses(whole)

    for checkpoint in listing(hit.checkpoints)[0]:
        flip(checkpoint.folder / "model.safetensors")
    with pytest.raises(IntegrityError, match=r"No checkpoint of the run hit-.* is whole: .* in tensor "):
        loop(recipe, dataset, hit, nothing)
    assert len(listing(hit.checkpoints)[0]) == 3  # nothing was removed


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_disk_that_is_full_for_a_while_costs_only_the_checkpoints_of_that_while(
    home: Home, texts: Path, dataset: Dataset, asynchronous: bool, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = {"steps": 4, "keep": 9, "asynchronous": asynchronous}
    recipe = tiny_recipe(texts, steps=18, checkpoint=checkpoint)
    run = Run.create(home, "full", config.to_toml(recipe), "0" * 64)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def disk(step: int, stop: threading.Event) -> None:
        size = {6: 100_000, 14: soft}.get(step)  # events.jsonl still fits into the smaller one
        if size is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))

    try:
        loop(recipe, dataset, run, disk)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    failed = run.events.read("checkpoint_failed")
    assert [event["step"] for event in failed] == [8, 12]
    assert all("No space left" in event["why"] for event in failed)
    assert "the checkpoint of step 8 was not saved" in caplog.text
    assert [event["step"] for event in run.events.read("checkpoint")] == [4, 16, 18]
    last = latest(run.checkpoints)
    assert last is not None
    assert load(last).state["step"] == 18
    assert run.status() == "finished"
