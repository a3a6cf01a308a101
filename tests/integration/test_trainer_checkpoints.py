"""A run in training and its checkpoints: beside the steps, falling back, a full disk."""

from __future__ import annotations

import resource
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner

from lapis import config
from lapis.checkpoint.folder import listing
from lapis.checkpoint.sharded import latest, load
from lapis.cli.main import lapis
from lapis.data.shards import Dataset
from lapis.errors import IntegrityError, StorageError
from lapis.home import Home
from lapis.kernels.batch import packed
from lapis.model.families import build
from lapis.model.weights import read_model
from lapis.train.export import exported_run
from lapis.train.objective import of_model
from lapis.train.pretrain import HELDOUT_TOKENS, Pretraining
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
    trainer = Trainer(recipe, Pretraining(recipe.train, dataset), run)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def disk(*_: object, **__: object) -> None:
        size = {6: 100_000, 14: soft}.get(trainer.step)  # events.jsonl still fits into the smaller one
        if size is not None:
            while trainer.checkpoints.saver.busy:
                time.sleep(0.01)  # the checkpoint of step 4 or 12 is still being written
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))

    try:
        trainer.loop(disk, threading.Event())
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


def test_a_disk_without_room_for_an_event_does_not_end_the_run(
    home: Home, texts: Path, dataset: Dataset, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = tiny_recipe(texts, steps=18, checkpoint={"steps": 4, "keep": 9, "asynchronous": False})
    run = Run.create(home, "full", config.to_toml(recipe), "0" * 64)
    trainer = Trainer(recipe, Pretraining(recipe.train, dataset), run)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def disk(*_: object, **__: object) -> None:
        size = {6: run.events.path.stat().st_size + 20, 14: soft}.get(trainer.step)
        if size is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))

    try:
        trainer.loop(disk, threading.Event())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caplog.text.count("what happens is not written down: No space left") == 1
    assert caplog.text.count("was not saved") == 2
    assert [event["step"] for event in run.events.read("step")] == [*range(1, 7), *range(15, 19)]
    assert [event["step"] for event in run.events.read("checkpoint")] == [4, 16, 18]
    assert run.status() == "finished"


def test_a_disk_that_is_full_at_the_end_costs_no_step(home: Home, texts: Path, dataset: Dataset) -> None:
    """The last checkpoint has to succeed: without it the run is not finished, and goes on once there is room."""
    recipe = tiny_recipe(texts, steps=10, checkpoint={"steps": 4, "keep": 9, "asynchronous": False})
    whole, full = (Run.create(home, name, config.to_toml(recipe), "0" * 64) for name in ("whole", "full"))
    loop(recipe, dataset, whole, nothing)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fills(step: int, stop: threading.Event) -> None:
        if step == 9:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))

    try:
        with pytest.raises(StorageError, match="No space left"):
            loop(recipe, dataset, full, fills)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [checkpoint.step for checkpoint in listing(full.checkpoints)[0]] == [4, 8]
    assert full.status() == "stopped"
    loop(recipe, dataset, full, nothing)
    assert full.status() == "finished"
    assert losses(full) == losses(whole)


def test_the_best_checkpoint_stays_and_is_exported(home: Home, texts: Path, dataset: Dataset) -> None:
    """Weights go wrong after half of the run: the best checkpoint is neither among the newest nor of an nth step."""
    recipe = tiny_recipe(
        texts,
        steps=16,
        warmup=1,
        lr=0.01,
        embed_lr=0.01,
        clip=100.0,
        checkpoint={"steps": 2, "keep": 1, "best": 1},
    )
    run = Run.create(home, "best", config.to_toml(recipe), "0" * 64)

    def spoil(trainer: Trainer, step: int) -> None:
        if step > 8:
            with torch.no_grad():
                trainer.replica.optimizer.flat.master.mul_(1.3)  # type: ignore[attr-defined]

    trainer = Trainer(recipe, Pretraining(recipe.train, dataset), run)
    with run.hold():
        trainer.loop(lambda *_, **__: spoil(trainer, trainer.step), threading.Event())
    measured = {event["step"]: event["loss"] for event in run.events.read("heldout")}
    assert list(measured) == [0, *range(2, 17, 2)]
    best = min(measured, key=lambda step: measured[step])
    assert best == 8
    found = {checkpoint.step: checkpoint for checkpoint in listing(run.checkpoints)[0]}
    assert list(found) == [8, 16]
    assert found[8].manifest.score == measured[8]
    shown = CliRunner().invoke(lapis, ["runs", "show", run.id], catch_exceptions=False).output
    assert f"held-out loss {measured[8]:.4f}, the best" in shown
    assert shown.count("the best") == 1
    with exported_run(home, run.id, best=True) as exported:
        assert exported.lineage["step"] == 8
        weights = read_model(exported.folder).model
    expected = load(found[8]).groups["model"]
    assert all(torch.equal(weight, expected[name]) for name, weight in weights.named_parameters())
    again = Pretraining(recipe.train, dataset).heldout(of_model(weights))
    assert again["loss"] == measured[8]
    flip(found[8].folder / "model.safetensors")
    with exported_run(home, run.id, best=True) as exported:
        assert exported.lineage["step"] == 16  # the next best


def test_the_held_out_loss_is_that_of_the_documents_alone(texts: Path, dataset: Dataset) -> None:
    recipe = tiny_recipe(texts)
    goal = Pretraining(recipe.train, dataset)
    model = build(recipe.model.resolve(dataset.tokenizer.vocab_size), dtype=torch.float32)
    model.init_weights(1)
    nats = count = 0.0
    for document in dataset.heldout():
        ids = torch.tensor(
            [goal.tokenizer.end_id, *goal.tokenizer.encode(document.text), goal.tokenizer.end_id]
        )
        for start in range(0, len(ids) - 1, 64):
            part = ids[start : start + 65]
            with torch.no_grad():
                logits = model(part[:-1], packed([len(part) - 1]))
            nats += float(F.cross_entropy(logits, part[1:], reduction="sum"))
            count += len(part) - 1
    assert count < HELDOUT_TOKENS
    assert goal.heldout(of_model(model))["loss"] == pytest.approx(nats / count, rel=1e-5)
