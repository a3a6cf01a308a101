"""What a model writes while it trains: read from its weights, told once a validation, and nothing else is touched."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from lapis import config
from lapis.data.shards import Dataset
from lapis.errors import ConfigError
from lapis.home import Home
from lapis.inference.engine import LocalEngine, prompt_ids
from lapis.inference.request import Request, SamplingParams
from lapis.kernels.ops import Ops
from lapis.train.export import exported_run
from lapis.train.float8 import Float8Ops
from lapis.train.pretrain import Pretraining
from lapis.train.recipe import Recipe
from lapis.train.run import Run
from lapis.train.trainer import Trainer, find_or_create, train

from .conftest import tiny_recipe
from .test_trainer import losses, weights_digest

PROMPTS = ("def parse(", "import ")


@pytest.fixture(autouse=True)
def _every_step_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lapis.train.trainer.RECORD_EVERY_S", 0.0)


def sampled(texts: Path, **changes: Any) -> Recipe:
    samples = {"prompts": PROMPTS, "tokens": 12}
    return tiny_recipe(texts, checkpoint={"steps": 4}, **{"steps": 10, "samples": samples, **changes})


def trained(home: Home, recipe: Recipe, dataset: Dataset, name: str) -> Run:
    run = Run.create(home, name, config.to_toml(recipe), "0" * 64)
    return train(recipe, Pretraining(recipe.train, dataset), run)


def written(run: Run) -> list[tuple[int, list[dict[str, str]]]]:
    return [(event["step"], event["samples"]) for event in run.samples()]


@pytest.mark.parametrize("changes", [{}, {"dtype": "fp32", "recompute": "full"}], ids=["bf16", "fp32"])
def test_samples_are_told_at_every_validation_and_change_no_bit(
    home: Home, texts: Path, dataset: Dataset, changes: dict[str, Any]
) -> None:
    recipe = sampled(texts, **changes)
    run = trained(home, recipe, dataset, "read")
    plain = trained(home, sampled(texts, samples={}, **changes), dataset, "unread")
    assert losses(run) == losses(plain)
    assert weights_digest(run) == weights_digest(plain)  # the state of torch's random numbers too
    assert plain.samples() == []
    assert [(step, [one["prompt"] for one in told]) for step, told in written(run)] == [
        (step, list(PROMPTS)) for step in (0, 4, 8, 10)
    ]
    last = [one["text"] for one in written(run)[-1][1]]
    assert any(text.strip() for text in last)
    with exported_run(home, run.id) as exported, closing(LocalEngine.load(exported.folder, "m")) as engine:
        for prompt, text in zip(PROMPTS, last, strict=True):
            params = SamplingParams(12, temperature=0.0)
            ids = tuple(prompt_ids(engine, prompt))
            assert engine.submit(Request("a", ids, params)).result().text == text  # what it would serve
    spent = run.events.read("end")[-1]["spent"]
    assert 0 < spent["samples"] < spent["elapsed"]


def test_a_resumed_run_writes_what_the_whole_one_wrote(home: Home, texts: Path, dataset: Dataset) -> None:
    recipe = sampled(texts)
    whole = trained(home, recipe, dataset, "whole")
    halves = Run.create(home, "halves", config.to_toml(recipe), "1" * 64)

    class After:
        """A stop that comes after 6 steps."""

        def is_set(self) -> bool:
            return len(halves.events.read("step")) >= 6

    with pytest.raises(KeyboardInterrupt):
        Trainer(recipe, Pretraining(recipe.train, dataset), halves).loop(lambda *_, **__: None, After())  # type: ignore[arg-type]
    train(recipe, Pretraining(recipe.train, dataset), halves)
    assert halves.events.read("resume")[0]["step"] == 6
    assert written(halves) == written(whole)
    assert losses(halves) == losses(whole)


def test_samples_name_no_run_and_can_be_asked_for_later(home: Home, texts: Path, dataset: Dataset) -> None:
    found = [
        find_or_create(home, recipe, config.to_toml(recipe), Pretraining(recipe.train, dataset)).id
        for recipe in (sampled(texts, samples={}), sampled(texts))
    ]
    assert found[0] == found[1]


def test_plain_torch_is_sampled_from_as_well(
    home: Home, texts: Path, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAPIS_KERNELS", "stock")
    run = trained(home, sampled(texts, steps=2), dataset, "stock")
    assert not run.events.read("samples_failed")
    assert [step for step, _ in written(run)] == [0, 2]


def test_a_run_in_8_bit_floats_is_read_as_it_is_served(home: Home, texts: Path, dataset: Dataset) -> None:
    recipe = sampled(texts)
    run = Run.create(home, "eight", config.to_toml(recipe), "3" * 64)
    trainer = Trainer(recipe, Pretraining(recipe.train, dataset), run)
    trainer._sample()
    trainer.model.ops = cast(Ops, Float8Ops(trainer.model.ops))
    trainer._sample()
    plain, eight = run.events.read("samples")
    assert plain["samples"] == eight["samples"]


def test_what_goes_wrong_in_sampling_costs_the_run_nothing(home: Home, texts: Path, dataset: Dataset) -> None:
    recipe = sampled(texts)
    run = Run.create(home, "spoilt", config.to_toml(recipe), "2" * 64)
    trainer = Trainer(recipe, Pretraining(recipe.train, dataset), run)
    with torch.no_grad():
        spoilt = trainer.model.embed.detach().clone()
        trainer.model.embed.fill_(float("nan"))
        trainer._sample()
        trainer.model.embed.copy_(spoilt)
    assert "logits" in run.events.read("samples_failed")[0]["why"]
    assert run.samples() == []


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ({"prompts": ("x",) * 9}, "at most 8"),
        ({"heldout": 1}, "held-out text has no prompts"),
        ({"tokens": 0}, "greater than 0"),
    ],
)
def test_other_sections_are_refused(texts: Path, samples: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sampled(texts, samples=samples)


def test_a_prompt_that_leaves_no_room_is_refused(home: Home, texts: Path, dataset: Dataset) -> None:
    recipe = sampled(texts, samples={"prompts": ("a b c " * 500,)})
    with pytest.raises(ConfigError, match=r"prompts\[0\] has .* tokens"):
        trained(home, recipe, dataset, "long")
