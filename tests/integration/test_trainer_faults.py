"""What goes wrong in training: bad steps, resumes that are not what they were, clocks that jump, foreign tokens."""

from __future__ import annotations

import json
import math
import shutil
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from lapis import config
from lapis.checkpoint.folder import listing
from lapis.checkpoint.manifest import FORMAT
from lapis.checkpoint.sharded import latest, load
from lapis.cli.main import lapis
from lapis.data.loader import TokenBatch
from lapis.data.pipeline import prepare
from lapis.data.shards import Dataset
from lapis.errors import ConfigError, ConflictError, InputError, TrainingError
from lapis.hashing import digest_file, digest_json
from lapis.home import Home
from lapis.model.families import Decoder
from lapis.model.manifest import Source
from lapis.model.weights import read_model, write_model
from lapis.train.export import exported_run
from lapis.train.goodput import account
from lapis.train.objective import Measure
from lapis.train.pretrain import Pretraining
from lapis.train.recipe import Recipe
from lapis.train.run import Run
from lapis.train.start import with_own_tokenizer
from lapis.train.trainer import Trainer, find_or_create, train
from tests import small_models

from .conftest import tiny_recipe


class Faulty(Pretraining):
    """Pretraining with a loss that is not a number in some passes, and with noise that is drawn."""

    def __init__(
        self, recipe: Recipe, dataset: Dataset, bad: tuple[int, ...] = (), noise: float = 0.0
    ) -> None:
        super().__init__(recipe.train, dataset)
        self.bad, self.noise, self.passes = bad, noise, 0

    def loss(self, model: Decoder, micro: TokenBatch, weight: float) -> Tensor:
        """The loss of pass number `bad` (counted from 0) is not a number."""
        factor = math.nan if self.passes in self.bad else 1.0 + self.noise * float(torch.rand(()))
        self.passes += 1
        return super().loss(model, micro, weight) * factor


class After:
    """A stop that comes after so many steps."""

    def __init__(self, trainer: Trainer, steps: int) -> None:
        self.trainer, self.steps = trainer, steps

    def is_set(self) -> bool:
        return self.trainer.step >= self.steps


def begin(home: Home, recipe: Recipe, name: str = "run") -> Run:
    return Run.create(home, name, config.to_toml(recipe), "0" * 64)


def stopped(recipe: Recipe, objective: Pretraining, run: Run, steps: int) -> None:
    trainer = Trainer(recipe, objective, run)
    with pytest.raises(KeyboardInterrupt):
        trainer.loop(lambda *_, **__: None, After(trainer, steps))  # type: ignore[arg-type]


def saved(run: Run) -> dict[str, dict[str, Tensor]]:
    checkpoint = latest(run.checkpoints)
    assert checkpoint is not None
    return load(checkpoint).groups


def assert_same(one: Run, other: Run) -> None:
    ours, theirs = saved(one), saved(other)
    assert ours.keys() == theirs.keys()
    for group, tensors in ours.items():
        assert all(torch.equal(tensor, theirs[group][name]) for name, tensor in tensors.items()), group


def test_a_step_that_is_not_finite_stops_the_run_before_the_weights_move(
    home: Home, texts: Path, dataset: Dataset
) -> None:
    recipe = tiny_recipe(texts, steps=8)
    run, good = begin(home, recipe), begin(home, tiny_recipe(texts, steps=4))
    objective = Faulty(recipe, dataset, bad=(4, 5))
    trainer = Trainer(recipe, objective, run)
    with pytest.raises(TrainingError, match=r"Step 4 .*not finite.*loss nan.*same bits.*data or weights"):
        trainer.loop(lambda *_, **__: None, After(trainer, 99))  # type: ignore[arg-type]
    (event,) = run.events.read("bad_step")
    assert (event["step"], event["fault"], event["action"]) == (4, "data", "stop")
    assert tuple(event["samples"]) == objective.loader.samples_at(16, 4)
    assert run.status() == "failed"
    whole = tiny_recipe(texts, steps=8)
    unharmed = Trainer(whole, Pretraining(whole.train, dataset), good)
    with pytest.raises(KeyboardInterrupt):
        unharmed.loop(lambda *_, **__: None, After(unharmed, 4))  # type: ignore[arg-type]
    for name, tensor in trainer.replica.groups()["optimizer"].items():
        assert torch.equal(tensor, saved(good)["optimizer"][name])


@pytest.mark.parametrize("step", [3, 6])
def test_weights_that_are_not_finite_are_never_saved(
    home: Home, texts: Path, dataset: Dataset, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They spoil no checkpoint that is good, not the last one either, and the error says which one there is."""
    monkeypatch.setattr("lapis.train.trainer.RECORD_EVERY_S", 0.0)
    recipe = tiny_recipe(texts, steps=6, checkpoint={"steps": 3, "keep": 1})
    run = begin(home, recipe)
    trainer = Trainer(recipe, Pretraining(recipe.train, dataset), run)

    def spoil(*_: object) -> None:
        if trainer.step == step:
            trainer.replica.groups()["optimizer"]["master.embed"][7, 5] = math.nan  # type: ignore[index]

    with pytest.raises(TrainingError, match=f"not finite after step {step}; .*not saved") as caught:
        trainer.loop(spoil, threading.Event())
    kept = "There is no checkpoint yet." if step == 3 else "Its checkpoint of step 3 is good."
    assert kept in str(caught.value)
    assert run.status() == "failed"
    assert [checkpoint.step for checkpoint in listing(run.checkpoints)[0]] == ([] if step == 3 else [3])


def test_a_bad_step_can_be_skipped(home: Home, texts: Path, dataset: Dataset) -> None:
    recipe = tiny_recipe(texts, steps=8, bad_step="skip")
    run = train(recipe, Faulty(recipe, dataset, bad=(4, 5)), begin(home, recipe))
    assert run.status() == "finished"
    checkpoint = latest(run.checkpoints)
    assert checkpoint is not None
    state = load(checkpoint).state
    assert (state["step"], state["optimizer_steps"]) == (8, 7)
    assert all(bool(tensor.float().isfinite().all()) for tensor in saved(run)["model"].values())


def test_a_machine_that_miscomputes_once_changes_nothing(home: Home, texts: Path, dataset: Dataset) -> None:
    recipe = tiny_recipe(texts, steps=8, bad_step="skip")
    run = train(recipe, Faulty(recipe, dataset, bad=(4,)), begin(home, recipe))
    (event,) = run.events.read("bad_step")
    assert (event["fault"], event["action"]) == ("hardware", "replay taken")
    assert_same(run, train(recipe, Faulty(recipe, dataset), begin(home, recipe, "sound")))


def test_a_fault_that_was_survived_is_no_proof_and_neither_is_one_after_a_resume(
    home: Home, texts: Path, dataset: Dataset
) -> None:
    recipe = tiny_recipe(texts, steps=8, bad_step="skip", checkpoint={"steps": 4})
    run = begin(home, recipe)
    stopped(recipe, Faulty(recipe, dataset, bad=(4,)), run, 6)
    (newest,) = run.checkpoints.glob("step-00000006*")
    shutil.rmtree(newest)  # so that it goes on from step 4, and meets what followed there
    train(recipe, Faulty(recipe, dataset, bad=(1,)), run)
    assert [event["action"] for event in run.events.read("bad_step")] == ["replay taken"] * 2
    assert_same(run, train(recipe, Faulty(recipe, dataset), begin(home, recipe, "sound")))


def test_a_run_of_skipped_steps_alone_ends_with_words(
    home: Home, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(config.to_toml(tiny_recipe(texts, steps=2, bad_step="skip")))
    monkeypatch.setattr(Pretraining, "loss", lambda *_: torch.tensor(math.nan, requires_grad=True))
    told = CliRunner().invoke(lapis, ["train", str(path), "--workers", "1"], catch_exceptions=False)
    assert told.exit_code == 0
    assert "step 2, no loss, for every step was skipped" in told.output
    shown = CliRunner().invoke(lapis, ["runs", "show", "last"], catch_exceptions=False)
    assert shown.exit_code == 0


def test_skipping_ends_when_every_step_is_bad(home: Home, texts: Path, dataset: Dataset) -> None:
    recipe = tiny_recipe(texts, steps=30, bad_step="skip")
    with pytest.raises(TrainingError, match="Step 7 "):
        train(recipe, Faulty(recipe, dataset, bad=tuple(range(2, 99))), begin(home, recipe))


def test_figures_that_are_not_finite_are_told_as_nothing(home: Home, texts: Path, dataset: Dataset) -> None:
    class Odd(Pretraining):
        def metrics(self) -> Mapping[str, float]:
            return {"margin": math.nan, "accuracy": 0.5}

        def heldout(self, measure: Measure) -> Mapping[str, float]:
            return {"margin": -math.inf}

    recipe = tiny_recipe(texts, steps=2, checkpoint={"best": 1})
    run = train(recipe, Odd(recipe.train, dataset), begin(home, recipe))
    assert run.status() == "finished"
    assert {(event["margin"], event["accuracy"]) for event in run.events.read("step")} == {(None, 0.5)}
    assert [event["margin"] for event in run.events.read("heldout")] == [None, None]


def test_everything_is_in_the_checkpoint(home: Home, texts: Path, dataset: Dataset) -> None:
    """Random numbers, average, window of good steps, cosine, micro-batches, fp32: halves end as the whole does."""
    recipe = tiny_recipe(
        texts,
        steps=40,
        ema=0.9,
        outlier=20.0,
        schedule="cosine",
        micro_batch=2,
        dtype="fp32",
        optimizer="adamw",
    )
    whole = train(recipe, Faulty(recipe, dataset, noise=0.1), begin(home, recipe))
    halves = begin(home, recipe, "halves")
    stopped(recipe, Faulty(recipe, dataset, noise=0.1), halves, 25)
    train(recipe, Faulty(recipe, dataset, noise=0.1), halves)
    assert_same(halves, whole)
    proofs = [(event["checkpoint"], event["step"]) for event in halves.events.read("proof")]
    assert proofs == [(25, 25)]  # the loss that follows, known before the process ended
    groups = saved(whole)
    for average, group in ((False, "model"), (True, "ema")):
        with exported_run(home, whole.id, average=average) as exported:
            written = read_model(exported.folder)
        assert written.model.dtype is torch.float32
        for name, parameter in written.model.named_parameters():
            assert torch.equal(parameter, groups[group][name])
    assert not torch.equal(groups["ema"]["embed"], groups["model"]["embed"])


def test_a_resume_that_does_not_go_on_as_it_did_is_refused(home: Home, texts: Path, dataset: Dataset) -> None:
    recipe = tiny_recipe(texts)
    run = begin(home, recipe)
    stopped(recipe, Pretraining(recipe.train, dataset), run, 12)
    before = run.events.path.read_text()
    (proof,) = run.events.read("proof")
    was = float.fromhex(proof["loss"])
    other = math.nextafter(was, 9.0)
    run.events.path.write_text(before.replace(proof["loss"], other.hex()))
    with pytest.raises(TrainingError, match="does not go on as it did") as caught:
        train(recipe, Pretraining(recipe.train, dataset), run)
    assert repr(was) in caught.value.message
    assert repr(other) in caught.value.message
    assert run.status() == "stopped"
    elsewhere = before.replace(proof["loss"], other.hex()).replace(proof["setup"], "another machine")
    run.events.path.write_text(elsewhere)  # there a difference in the last bits is none
    train(recipe, Pretraining(recipe.train, dataset), run)
    assert run.status() == "finished"


def test_a_clock_that_jumps_changes_nothing(
    home: Home, texts: Path, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = time.time, [0]

    def jumping() -> float:
        calls[0] += 1
        return real() + (7200.0 if calls[0] % 2 else -7200.0)

    monkeypatch.setattr(time, "time", jumping)
    recipe = tiny_recipe(texts, steps=None, minutes=0.02, checkpoint={"seconds": 0.3})
    run = begin(home, recipe)
    begun = time.monotonic()
    stopped(recipe, Pretraining(recipe.train, dataset), run, 3)
    train(recipe, Pretraining(recipe.train, dataset), run)
    took = time.monotonic() - begun
    assert run.status() == "finished"
    assert run.summary().seconds == pytest.approx(1.2, abs=0.6)
    assert len(run.events.read("checkpoint")) <= 3 + took / 0.3
    found = account(run.events.read())
    assert found is not None
    assert 0 < found.productive_s < found.wall_s < took + 0.1


def test_training_goes_on_from_a_model_with_its_own_tokenizer(
    home: Home, texts: Path, tmp_path: Path
) -> None:
    shape = small_models.config(vocab_size=320)
    state = small_models.random_state(shape)
    write_model(home.models / "small", shape, state, small_models.tokenizer(), source=Source("run", "test"))
    values = tiny_recipe(texts, steps=2).model_dump(mode="json", exclude_none=True, by_alias=True)
    recipe = config.parse({**values, "model": {"from": "small"}}, Recipe)
    assert (
        config.parse(json.loads(recipe.model_dump_json(by_alias=True, exclude_none=True)), Recipe) == recipe
    )
    own = with_own_tokenizer(recipe, home)
    dataset = prepare(own.data, own.tokenizer, home, workers=1)
    objective = Pretraining(own.train, dataset)
    trainer = Trainer(own, objective, find_or_create(home, own, config.to_toml(own), objective))
    assert trainer.config == shape
    assert torch.equal(trainer.model.embed, state["embed"])
    foreign = prepare(recipe.data, recipe.tokenizer, home, workers=1)
    with pytest.raises(ConflictError, match="another tokenizer"):
        Trainer(recipe, Pretraining(recipe.train, foreign), begin(home, recipe))
    long = config.parse(
        {**values, "model": {"from": "small"}, "train": {"steps": 1, "sequence": 512}}, Recipe
    )
    with pytest.raises(ConfigError, match="longer than the context of small"):
        Trainer(long, Pretraining(long.train, dataset), begin(home, long))
    with pytest.raises(ConfigError, match="leave name"):
        config.parse({**values, "model": {"from": "small", "width": 64}}, Recipe)


def test_adapters_on_text_do_not_go_on_beside_other_weights(home: Home, texts: Path) -> None:
    def base(seed: int) -> None:
        shape = small_models.config(vocab_size=320)
        state = small_models.random_state(shape, seed=seed)
        shutil.rmtree(home.models / "small", ignore_errors=True)
        write_model(home.models / "small", shape, state, small_models.tokenizer(), source=Source("run", "t"))

    base(0)
    values = tiny_recipe(texts, steps=4, optimizer="adamw", checkpoint={"steps": 2}).model_dump(
        mode="json", exclude_none=True, by_alias=True
    )
    recipe = config.parse({**values, "model": {"from": "small"}, "lora": {"rank": 4}}, Recipe)
    recipe = with_own_tokenizer(recipe, home)
    objective = Pretraining(recipe.train, prepare(recipe.data, recipe.tokenizer, home, workers=1))
    run = begin(home, recipe)
    stopped(recipe, objective, run, 3)
    base(1)
    for _ in range(2):
        with pytest.raises(ConflictError, match="started from other weights than small has now"):
            train(recipe, objective, run)
    with pytest.raises(ConflictError, match="other weights"), exported_run(home, run.id):
        pass
    base(0)
    assert train(recipe, objective, run).status() == "finished"
    with exported_run(home, run.id) as exported:
        assert exported.lineage["step"] == 4


def test_data_that_do_not_fit_the_model_are_refused_before_there_is_a_run(
    home: Home, texts: Path, tmp_path: Path
) -> None:
    write_model(
        home.models / "small",
        small_models.config(),
        small_models.random_state(small_models.config()),
        small_models.tokenizer(),
        source=Source("run", "test"),
    )
    small_models.tokenizer(290).save(tmp_path / "other.json")
    path = tmp_path / "recipe.toml"
    path.write_text(
        f'[data]\nsources = [{{path = "{texts}", licence = "MIT"}}]\n[model]\nfrom = "small"\n'
        f'[tokenizer]\npath = "{tmp_path / "other.json"}"\n[train]\nsteps = 1\n'
    )

    def train_with(*options: str) -> None:
        CliRunner().invoke(lapis, ["train", str(path), "--workers", "1", *options], catch_exceptions=False)

    with pytest.raises(ConflictError, match="another tokenizer") as caught:
        train_with()
    assert str(home.models / "small" / "tokenizer.json") in str(caught.value)
    with pytest.raises(ConfigError, match="longer than the context of small, 256 tokens"):
        train_with("--set", "tokenizer.path=", "--set", "train.sequence=512")
    facts = json.loads((home.models / "small" / "lapis.json").read_text())
    del facts["seal"]
    facts["format"] += 1
    (home.models / "small" / "lapis.json").write_text(json.dumps({**facts, "seal": digest_json(facts)}))
    with pytest.raises(InputError, match="was written by a newer Lapis"):
        train_with("--set", "tokenizer.path=")
    assert not Run.list(home)


def test_a_run_that_meets_a_foreign_token_keeps_all_steps_before_it(
    home: Home, texts: Path, dataset: Dataset, tmp_path: Path
) -> None:
    """The token is on the disk, under digests that vouch for it: only the model knows that it is none of its own."""
    recipe = tiny_recipe(texts, steps=8)
    foreign = shutil.copytree(dataset.folder, tmp_path / "foreign")
    place = Pretraining(recipe.train, dataset).loader.samples_at(3 * 4, 4)[1] * 64 + 30
    shard = foreign / "shard-00000.tokens"
    ids = np.fromfile(shard, dtype="<u2")
    ids[place] = 512
    shard.write_bytes(ids.tobytes())
    manifest = json.loads((foreign / "manifest.json").read_text())
    manifest["shards"][0]["sha256"]["tokens"] = digest_file(shard)
    del manifest["digest"]
    (foreign / "manifest.json").write_text(json.dumps({**manifest, "digest": digest_json(manifest)}))
    run = begin(home, recipe)
    with pytest.raises(InputError, match=f"Token {place:,} .* is 512, beyond .* of 512") as caught:
        train(recipe, Pretraining(recipe.train, Dataset.open(foreign)), run)
    assert dataset.document_of(place).path in caught.value.message
    assert run.status() == "stopped"
    checkpoint = latest(run.checkpoints)
    assert checkpoint is not None
    assert checkpoint.step == 3


def test_a_checkpoint_of_a_newer_lapis_is_left_alone(home: Home, texts: Path, dataset: Dataset) -> None:
    """To go on from an older one would lose steps, and to save would remove the newer one."""
    recipe = tiny_recipe(texts, steps=12, checkpoint={"steps": 4})
    run = begin(home, recipe)
    stopped(recipe, Pretraining(recipe.train, dataset), run, 6)
    newest = latest(run.checkpoints)
    assert newest is not None
    assert newest.step == 6
    path = newest.folder / "manifest.json"
    before, kept = path.read_text(), sorted(run.checkpoints.rglob("*"))
    facts = {**json.loads(before), "format": FORMAT + 1}
    del facts["digest"]
    path.write_text(json.dumps({**facts, "digest": digest_json(facts)}))
    with pytest.raises(InputError, match=f"has format {FORMAT + 1}; this Lapis reads formats 1 to {FORMAT}"):
        train(recipe, Pretraining(recipe.train, dataset), run)
    assert sorted(run.checkpoints.rglob("*")) == kept
    path.write_text(before)
    assert train(recipe, Pretraining(recipe.train, dataset), run).status() == "finished"


def test_ranks_share_the_windows_of_a_step_in_order(texts: Path, dataset: Dataset) -> None:
    recipe = tiny_recipe(texts, batch=8, micro_batch=2)
    objective = Pretraining(recipe.train, dataset)
    whole = objective.step(3, 0, 1)
    parts = [objective.step(3, rank, 2) for rank in range(2)]
    assert whole.samples == parts[0].samples + parts[1].samples
    assert [len(part.micros) for part in (whole, *parts)] == [4, 2, 2]
    assert {part.weight for part in (whole, *parts)} == {8 * 64.0}
    with pytest.raises(ConfigError, match="cannot be shared by 3"):
        objective.step(3, 0, 3)
