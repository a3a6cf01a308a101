"""Recipes: strict, overridable, readable back."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from lapis import config
from lapis.errors import ConfigError
from lapis.train.recipe import Recipe

MINIMAL = '[[data.sources]]\npath = "texts"\n[train]\nsteps = 10\n'

TUNED = '[model]\nfrom = "m"\n[examples]\nfiles = ["a.jsonl"]\n[train]\nsteps = 10\nobjective = "sft"\n'


def load(tmp_path: Path, text: str, *sets: str) -> Recipe:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    return config.load(path, Recipe, sets)


def test_a_few_lines_are_a_whole_recipe(tmp_path: Path) -> None:
    recipe = load(tmp_path, MINIMAL)
    assert recipe.model.resolve(8192).parameters == 13_767_552
    assert recipe.train.steps == 10


def test_what_is_printed_is_read_back_to_the_same_digest(tmp_path: Path) -> None:
    recipe = load(tmp_path, MINIMAL, "train.lr=0.5", 'data.sources=[{path="it\\"s", licence="MIT"}]')
    again = config.parse(tomllib.loads(config.to_toml(recipe)), Recipe)
    assert again == recipe
    assert again.digest() == recipe.digest()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (MINIMAL + "sequnce = 128\n", "'train.sequnce'. Did you mean 'sequence'?"),
        (MINIMAL + "[modle]\n", "'modle'. Did you mean 'model'?"),
        (MINIMAL + 'seed = "one"\n', "train.seed = 'one'"),
        (MINIMAL + "minutes = 3.0\n", "exactly one of train.steps and train.minutes"),
        (MINIMAL.replace("10", "0"), "train.steps = 0"),
        (MINIMAL + f"seed = {10**22}\n", "train.seed = "),
        (MINIMAL + "lr = inf\n", "train.lr = inf"),
        (MINIMAL + "embed_lr = 1e38\n", "train.embed_lr = 1e+38"),
        (MINIMAL + "betas = [0.9, 1.0]\n", "train.betas.1 = 1.0"),
        (MINIMAL + '[model]\nname = "latpop"\n', "unknown size 'latpop'"),
        (MINIMAL + "sequence = 4096\n", "longer than the model's context"),
        (MINIMAL + '[model]\nfrom = "x"\nlayers = 3\n', "has its size: leave name, layers, width"),
        (MINIMAL + '[model]\nfrm = "x"\n', "'model.frm'. Did you mean 'from'?"),
        (MINIMAL.replace("steps = 10", "minutes = 1.0") + 'schedule = "cosine"\n', "needs train.steps"),
        ("[train]\nsteps = 10\n", "needs [data]"),
        (MINIMAL + 'objective = "sft"\n', "needs [examples]"),
        (MINIMAL + '[examples]\nfiles = ["a.jsonl"]\n', "needs [data], and of the two only that"),
        (TUNED.replace('from = "m"', ""), "needs model.from"),
        (TUNED + '[tokenizer]\npath = "t.json"\n', "the model's own tokenizer"),
        (TUNED + "[lora]\n", 'train.optimizer = "adamw"'),
        (TUNED.replace('["a.jsonl"]', "[]"), "at least one file"),
        ("[train\n", "not valid TOML"),
    ],
)
def test_a_wrong_recipe_names_key_value_and_nearest_key(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError, match="recipe.toml") as caught:
        load(tmp_path, text)
    assert said in caught.value.message
    assert caught.value.exit_status == 2


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("train.minutes=1", "train: give exactly one of train.steps and train.minutes."),
        (
            "train.sequence=100000",
            "train.sequence = 100000 is longer than the model's context of 512 tokens.",
        ),
        ("train.samples.prompts=import", "train.samples.prompts = 'import': should be a list."),
        ("train.mesh=foo", "train.mesh: mesh: unknown axis 'foo'. Known: cp, dp, ep, fsdp, pp, tp."),
        ("train=5", "train = 5: should be a table."),
    ],
)
def test_a_wrong_recipe_is_told_in_the_recipe_s_words(tmp_path: Path, wrong: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, MINIMAL, wrong)
    assert caught.value.message == f"{tmp_path}/recipe.toml: {said}"


@pytest.mark.parametrize("wrong", ["train.lr", "=3", "train.sequnce=3", "train.steps.more=3"])
def test_a_wrong_override_is_refused(tmp_path: Path, wrong: str) -> None:
    with pytest.raises(ConfigError):
        load(tmp_path, MINIMAL, wrong)


def test_a_missing_recipe_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere.toml cannot be read"):
        config.load(tmp_path / "nowhere.toml", Recipe)


def test_every_setting_has_a_sentence() -> None:
    fields = list(config.fields(Recipe))
    assert not [field.key for field in fields if not field.text.endswith(".") or "\n" in field.text]
    assert {"train.lr", "data.sources[].path", "model.name"} <= {field.key for field in fields}


def test_the_vocabulary_is_padded_to_whole_tiles(tmp_path: Path) -> None:
    assert load(tmp_path, MINIMAL).model.resolve(1001).vocab_size == 1024


def test_rates_follow_the_optimizer_and_are_in_the_printed_recipe(tmp_path: Path) -> None:
    muon, adamw = (load(tmp_path, MINIMAL, f"train.optimizer={name}").train for name in ("muon", "adamw"))
    assert (muon.lr, muon.embed_lr, muon.betas) == (0.02, 0.03, (0.8, 0.95))
    assert (adamw.lr, adamw.embed_lr, adamw.betas) == (0.0006, 0.0006, (0.9, 0.95))
    chosen = load(tmp_path, MINIMAL, "train.optimizer=adamw", "train.lr=0.001", "train.betas=[0.8, 0.99]")
    assert (chosen.train.lr, chosen.train.embed_lr, chosen.train.betas) == (0.001, 0.001, (0.8, 0.99))
    assert "embed_lr = 0.001\n" in config.to_toml(chosen)


def test_a_model_to_go_on_from_is_written_as_from(tmp_path: Path) -> None:
    recipe = load(tmp_path, MINIMAL + '[model]\nfrom = "smollm2-135m"\n')
    assert recipe.model.source == "smollm2-135m"
    assert 'from = "smollm2-135m"\n' in config.to_toml(recipe)
    assert config.parse(tomllib.loads(config.to_toml(recipe)), Recipe).digest() == recipe.digest()
    assert "model.from" in {field.key for field in config.fields(Recipe)}
