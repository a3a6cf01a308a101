"""A small real dataset, prepared once for all integration tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from lapis import config
from lapis.data.pipeline import prepare
from lapis.data.shards import Dataset
from lapis.home import Home
from lapis.train.recipe import Recipe
from tests.corpus import write_corpus


def tiny_recipe(texts: Path, *, checkpoint: dict[str, object] | None = None, **train: object) -> Recipe:
    """A recipe for the tiny model on a folder of texts."""
    values = {
        "name": "tiny",
        "data": {"sources": [{"path": str(texts), "licence": "PSF-2.0"}], "heldout": {"max_bytes": 60_000}},
        "tokenizer": {"vocab_size": 512},
        "model": {"name": "tiny"},
        "train": {"steps": 30, "sequence": 64, "batch": 4, "warmup": 5, **train},
        "checkpoint": checkpoint or {},
    }
    return config.parse(values, Recipe)


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of real sources, about half a megabyte."""
    return write_corpus(tmp_path_factory.mktemp("texts"), ("email", "json", "logging", "http"))


@pytest.fixture(scope="session")
def dataset(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dataset]:
    """The texts as token shards."""
    recipe = tiny_recipe(texts)
    return prepare(recipe.sources, recipe.tokenizer, Home(tmp_path_factory.mktemp("home")), workers=1)
