"""The model store: models by name, and clear words for what is not there or damaged."""

from __future__ import annotations

from pathlib import Path

import pytest

from lapis.errors import ConfigError, IntegrityError, NotFoundError
from lapis.home import Home
from lapis.model import manifest
from lapis.model.manifest import Manifest, Source
from lapis.model.store import ModelStore


def put(home: Home, name: str) -> Path:
    folder = home.models / name
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_text(name)
    files = manifest.describe_files(folder)
    made = Manifest(
        digest=manifest.digest_of_files(files),
        source=Source("gguf", f"{name}.gguf", "MIT"),
        files=files,
        parameters=7,
        add_bos=False,
        bos_id=None,
        stop_ids=(2,),
    )
    (folder / manifest.NAME).write_text(made.to_json())
    return folder


def test_a_fresh_home_has_no_models(home: Home) -> None:
    store = ModelStore(home)
    assert list(store.list()) == []
    assert not home.models.exists()
    with pytest.raises(NotFoundError, match="no model 'x'"):
        store.get("x")


def test_models_are_listed_by_name_with_their_facts(home: Home) -> None:
    put(home, "b")
    put(home, "a")
    (home.models / f".c.{'0' * 32}.part").mkdir()  # what a killed writer leaves
    (home.models / ".a.lock").touch()
    first, second = ModelStore(home).list()
    assert (first.name, second.name) == ("a", "b")
    assert (first.licence, first.parameters, first.bytes) == ("MIT", 7, 1)
    assert first.digest == manifest.verify(first.folder).digest
    assert first == ModelStore(home).get("a")


@pytest.mark.parametrize("name", ["tiny-lama", "Tiny-Llama", "../tiny-llama", "", ".", "a/b"])
def test_a_name_that_is_not_there_is_not_found(home: Home, name: str) -> None:
    put(home, "tiny-llama")
    with pytest.raises(NotFoundError) as caught:
        ModelStore(home).get(name)
    assert "lapis models list" in caught.value.hint


def test_the_nearest_name_is_told(home: Home) -> None:
    put(home, "tiny-llama")
    with pytest.raises(NotFoundError, match="Did you mean 'tiny-llama'"):
        ModelStore(home).get("tiny-lama")


def test_a_damaged_model_is_reported_beside_the_sound_ones_and_can_be_removed(home: Home) -> None:
    put(home, "sound")
    path = put(home, "bad") / manifest.NAME
    path.write_text(path.read_text().replace("MIT", "GPL"))
    (home.models / "alien").mkdir()
    store = ModelStore(home)
    assert [model.name for model in store.list()] == ["sound"]
    alien, bad = store.damaged()
    assert "alien" in alien.message and "bad" in bad.message
    with pytest.raises(IntegrityError, match=r"bad/lapis\.json"):
        store.get("bad")
    store.remove("bad")
    assert [model.name for model in store.list()] == ["sound"]


def test_removing_takes_the_model_and_nothing_else(home: Home) -> None:
    put(home, "a")
    put(home, "a.b")
    store = ModelStore(home)
    store.remove("a")
    assert sorted(path.name for path in home.models.iterdir()) == ["a.b"]
    with pytest.raises(NotFoundError):
        store.remove("a")


def test_sweeping_takes_only_what_writers_of_that_name_left(home: Home) -> None:
    put(home, "a")
    for name in ("a", "a.b", "ab"):
        (home.models / f".{name}.{'f' * 32}.part").mkdir()
    ModelStore(home).sweep("a")
    left = sorted(path.name for path in home.models.iterdir())
    assert left == [f".a.b.{'f' * 32}.part", f".ab.{'f' * 32}.part", "a"]


@pytest.mark.parametrize("name", ["", ".hidden", "a/b", "..", "Größe", "UPPER", "a" * 97, "a b", "-x"])
def test_what_cannot_be_a_name_is_refused(home: Home, name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be the name"):
        ModelStore(home).place(name)
