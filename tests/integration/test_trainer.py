"""Training: it learns, it resumes to the same bits, it survives being killed, it serves what it trained."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lapis import config
from lapis.checkpoint.sharded import latest, load
from lapis.data.loader import TokenLoader
from lapis.data.shards import Dataset
from lapis.errors import ConflictError, TrainingError
from lapis.hashing import digest_bytes, digest_json
from lapis.home import Home
from lapis.inference.engine import LocalEngine
from lapis.kernels.batch import packed
from lapis.model.weights import read_model
from lapis.train.export import exported_run
from lapis.train.pretrain import Pretraining, trained_tokens
from lapis.train.recipe import Recipe
from lapis.train.run import Run
from lapis.train.schedule import Plan
from lapis.train.trainer import Trainer, find_or_create, train

from .conftest import tiny_recipe

CHILD = """
import sys
from pathlib import Path
from lapis import config
from lapis.data.shards import Dataset
from lapis.home import Home
from lapis.train.pretrain import Pretraining
from lapis.train.recipe import Recipe
from lapis.train.run import Run
from lapis.train.trainer import train
home, run, recipe, dataset = sys.argv[1:]
print("ready", flush=True)
recipe = config.load(Path(recipe), Recipe)
objective = Pretraining(recipe.train, Dataset.open(Path(dataset)))
train(recipe, objective, Run.open(Home(Path(home)), run))
"""


def begin(home: Home, recipe: Recipe, dataset: Dataset) -> Run:
    return find_or_create(home, recipe, config.to_toml(recipe), Pretraining(recipe.train, dataset))


def losses(run: Run) -> dict[int, str]:
    return {event["step"]: float(event["loss"]).hex() for event in run.events.read("step")}


def weights_digest(run: Run) -> str:
    checkpoint = latest(run.checkpoints)
    assert checkpoint is not None
    tensors = {
        f"{group}.{name}": digest_bytes(tensor.contiguous().view(torch.uint8).numpy().data)
        for group, members in load(checkpoint).groups.items()
        for name, tensor in members.items()
    }
    return digest_json(tensors)


@pytest.fixture(autouse=True)
def _every_step_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lapis.train.trainer.RECORD_EVERY_S", 0.0)


def start_child(home: Home, run: Run, dataset: Dataset) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-c",
        CHILD,
        str(home.root),
        run.id,
        str(run.folder / "recipe.toml"),
        str(dataset.folder),
    ]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_run_learns_and_tells_what_happened(home: Home, texts: Path, dataset: Dataset) -> None:
    recipe = tiny_recipe(texts, steps=60)
    run = train(recipe, Pretraining(recipe.train, dataset), begin(home, recipe, dataset))
    steps = run.steps()
    assert steps[-1]["loss"] < steps[0]["loss"] - 1.0
    assert run.status() == "finished"
    assert {"loss", "lr", "tokens", "tokens_per_s", "mfu", "grad_norm", "seconds"} <= set(steps[-1])
    start = run.events.read("start")[0]
    assert start["dataset_digest"] == dataset.digest
    assert begin(home, recipe, dataset).id == run.id  # the same recipe on the same data is the same run
    before = run.events.read()
    train(recipe, Pretraining(recipe.train, dataset), run)
    assert run.events.read() == before  # and what is finished is not done again


def test_a_stopped_run_goes_on_bit_for_bit(home: Home, texts: Path, dataset: Dataset) -> None:
    recipe = tiny_recipe(texts)
    whole = train(recipe, Pretraining(recipe.train, dataset), begin(home, recipe, dataset))

    halves = Run.create(home, "halves", config.to_toml(recipe), "0" * 64)

    class After:
        """A stop that comes after 13 steps."""

        def is_set(self) -> bool:
            return len(halves.events.read("step")) >= 13

    with pytest.raises(KeyboardInterrupt):
        Trainer(recipe, Pretraining(recipe.train, dataset), halves).loop(lambda *_, **__: None, After())  # type: ignore[arg-type]
    assert halves.status() == "stopped"
    train(recipe, Pretraining(recipe.train, dataset), halves)
    assert halves.events.read("resume")[0]["step"] == 13
    assert losses(halves) == losses(whole)
    assert weights_digest(halves) == weights_digest(whole)


def test_a_killed_run_ends_with_the_same_weights(home: Home, texts: Path, dataset: Dataset) -> None:
    recipe = tiny_recipe(texts, steps=120, checkpoint={"seconds": 0.1})
    whole = train(recipe, Pretraining(recipe.train, dataset), begin(home, recipe, dataset))
    run = Run.create(home, "killed", config.to_toml(recipe), "1" * 64)
    for _ in range(2):
        child = start_child(home, run, dataset)
        saved = len(run.events.read("checkpoint"))
        while len(run.events.read("checkpoint")) == saved and child.poll() is None:
            time.sleep(0.01)
        child.kill()
        child.communicate()
    train(recipe, Pretraining(recipe.train, dataset), run)
    assert len(run.events.read("resume")) >= 2
    assert weights_digest(run) == weights_digest(whole)


def test_an_interrupt_saves_and_ends_at_once(home: Home, texts: Path, dataset: Dataset) -> None:
    recipe = tiny_recipe(texts, steps=100_000)
    run = begin(home, recipe, dataset)
    child = start_child(home, run, dataset)
    while len(run.events.read("step")) < 3:
        assert child.poll() is None, child.communicate()
        time.sleep(0.02)
    with pytest.raises(ConflictError, match="in use by process"):
        train(recipe, Pretraining(recipe.train, dataset), run)
    os.kill(child.pid, signal.SIGINT)
    _, stderr = child.communicate(timeout=30)
    assert "KeyboardInterrupt" in stderr
    step = run.events.read("end")[-1]["step"]
    checkpoint = latest(run.checkpoints)
    assert checkpoint is not None
    assert load(checkpoint).state["step"] == step  # nothing is lost
    assert run.status() == "stopped"


def test_an_interrupt_in_the_last_step_ends_what_comes_after_the_run(
    home: Home, texts: Path, dataset: Dataset
) -> None:
    recipe = tiny_recipe(texts, steps=3)
    run = begin(home, recipe, dataset)

    def interrupt(done: float, *_: object, **__: object) -> None:
        if len(run.events.read("step")) == 3 or done >= 3:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(recipe, Pretraining(recipe.train, dataset), run, interrupt)
    assert run.status() == "finished"


def test_a_run_by_minutes_ends_in_time_and_resumes_with_its_plan(
    home: Home, texts: Path, dataset: Dataset
) -> None:
    recipe = tiny_recipe(texts, steps=None, minutes=0.03)
    run = train(recipe, Pretraining(recipe.train, dataset), begin(home, recipe, dataset))
    plan = run.events.read("plan")[0]
    end = run.events.read("end")[0]
    assert end["step"] == plan["steps"]
    planned = Plan(plan["warmup"], plan["decay_from"], plan["steps"])
    last = run.steps()[-1]
    assert last["lr"] == recipe.train.lr * planned.scale(last["step"] - 1)


def test_numbers_that_explode_end_the_run_with_a_clear_error(
    home: Home, texts: Path, dataset: Dataset
) -> None:
    recipe = tiny_recipe(texts, optimizer="adamw", lr=1e30, embed_lr=1e30)
    run = begin(home, recipe, dataset)
    with pytest.raises(TrainingError, match="not finite.*same bits") as caught:
        train(recipe, Pretraining(recipe.train, dataset), run)
    assert "lower rate" in caught.value.hint
    assert run.status() == "failed"


def test_the_5_gram_gets_exactly_the_trained_windows(texts: Path, dataset: Dataset) -> None:
    recipe = tiny_recipe(texts)
    tokens = trained_tokens(recipe.train, dataset, 3)
    assert tokens.shape == (12, 64)
    loader = TokenLoader(dataset, sequence=64, batch=4, seed=0)
    for step in range(3):
        assert tokens[4 * step : 4 * step + 4].flatten().tolist() == loader.at(step).ids_T.tolist()


def test_a_checkpoint_of_another_dataset_is_refused(home: Home, texts: Path, dataset: Dataset) -> None:
    recipe = tiny_recipe(texts, steps=3)
    run = train(recipe, Pretraining(recipe.train, dataset), begin(home, recipe, dataset))
    other = Run.create(home, "other", config.to_toml(recipe), "2" * 64)
    other.checkpoints.parent.mkdir(exist_ok=True)
    run.checkpoints.rename(other.checkpoints)
    wider = config.parse(
        {**recipe.model_dump(mode="json", exclude_none=True), "model": {"name": "tiny", "ffn": 256}}, Recipe
    )
    with pytest.raises(ConflictError, match="another model"):
        train(wider, Pretraining(wider.train, dataset), other)


def test_what_is_trained_is_what_is_served_bit_for_bit(home: Home, texts: Path, dataset: Dataset) -> None:
    recipe = tiny_recipe(texts, steps=20)
    run = train(recipe, Pretraining(recipe.train, dataset), begin(home, recipe, dataset))
    with exported_run(home, run.id) as exported:
        loaded = read_model(exported.folder)
    if not loaded.model.ops.bit_exact:
        pytest.skip("no compiled kernels here: plain torch makes no such promise")
    documents = [loaded.tokenizer.encode(text.text)[:90] for text in dataset.heldout()[:4]]
    sequences = [[loaded.tokenizer.end_id, *ids] for ids in documents]
    trained = Trainer(recipe, Pretraining(recipe.train, dataset), run)
    checkpoint = latest(run.checkpoints)
    assert checkpoint is not None
    trained._resume(checkpoint)
    ids = torch.tensor([token for ids in sequences for token in ids])
    logits = trained.model(ids, packed([len(ids) for ids in sequences]))  # grad mode: the training forward
    assert logits.requires_grad
    engine = LocalEngine(loaded, "tiny")
    try:
        start = 0
        for sequence in sequences:
            rows = logits[start : start + len(sequence) - 1].detach()
            expected = loaded.model.ops.logprobs(rows, torch.tensor(sequence[1:]))
            assert [value.hex() for value in engine.score(sequence)] == [
                value.hex() for value in expected.tolist()
            ]
            start += len(sequence)
    finally:
        engine.close()
