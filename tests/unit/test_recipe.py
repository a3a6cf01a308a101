"""Recipes: strict, overridable, readable back."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from lapis import config
from lapis.errors import ConfigError
from lapis.train.recipe import Recipe

MINIMAL = '[[data.sources]]\npath = "texts"\n[train]\nsteps = 10\n'


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
        (MINIMAL + '[model]\nname = "latpop"\n', "unknown size 'latpop'"),
        (MINIMAL + "sequence = 4096\n", "longer than the model's context"),
        ("[train]\nsteps = 10\n", "'data' is required"),
        ("[train\n", "not valid TOML"),
    ],
)
def test_a_wrong_recipe_names_key_value_and_nearest_key(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError, match="recipe.toml") as caught:
        load(tmp_path, text)
    assert said in caught.value.message
    assert caught.value.exit_status == 2


@pytest.mark.parametrize("wrong", ["train.lr", "=3", "train.sequnce=3", "train.steps.more=3"])
def test_a_wrong_override_is_refused(tmp_path: Path, wrong: str) -> None:
    with pytest.raises(ConfigError):
        load(tmp_path, MINIMAL, wrong)


def test_a_missing_recipe_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere.toml cannot be read"):
        config.load(tmp_path / "nowhere.toml", Recipe)


def test_every_setting_has_a_sentence() -> None:
    fields = list(config.fields(Recipe))
    assert not [field.key for field in fields if not field.text.endswith(".")]
    assert {"train.lr", "data.sources[].path", "model.name"} <= {field.key for field in fields}


def test_the_vocabulary_is_padded_to_whole_tiles(tmp_path: Path) -> None:
    assert load(tmp_path, MINIMAL).model.resolve(1001).vocab_size == 1024
