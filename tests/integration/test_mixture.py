"""A run on a mixture of sources: refused a changed one, goes on with it as a new segment, and says what it saw."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from lapis import config
from lapis.checkpoint.folder import listing
from lapis.checkpoint.sharded import load
from lapis.cli.runs import group as runs_group
from lapis.cli.train import command as train_command
from lapis.errors import ConflictError
from lapis.home import Home
from lapis.train.recipe import Recipe
from lapis.train.run import Run
from lapis.train.segments import recipe_of, segments_of_run, settle
from tests.corpus import write_corpus

OLD, NEW = {"web": 3.0, "mail": 1.0}, {"web": 1.0, "mail": 3.0}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    for name, packages in (("web", ("http", "wsgiref")), ("mail", ("email",))):
        (folder / name).mkdir()
        write_corpus(folder / name, packages)
    return folder


@pytest.fixture
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Home:
    """One home for all of them, so that the data is prepared once; the recipes' names tell the runs apart."""
    home = Home(tmp_path_factory.getbasetemp() / "mixture-home")
    monkeypatch.setenv("LAPIS_HOME", str(home.root))
    return home


def recipe_text(sources: Path, name: str, weights: dict[str, float] | None, **train: Any) -> str:
    values = {
        "name": name,
        "data": {
            "sources": [{"path": str(sources / name), "licence": name.upper()} for name in OLD],
            "heldout": {"max_bytes": 20_000},
        }
        | ({"mixture": {"weights": weights}} if weights else {}),
        "tokenizer": {"vocab_size": 512},
        "model": {"name": "tiny"},
        "train": {"steps": 12, "sequence": 32, "batch": 4, "warmup": 2, **train},
        "checkpoint": {"steps": 4, "keep": 9},
    }
    return config.to_toml(config.parse(values, Recipe))


def lapis_train(recipe: Path, *arguments: str) -> Any:
    result = CliRunner().invoke(
        train_command, [str(recipe), "--json", "--workers", "1", *arguments], catch_exceptions=True
    )
    if result.exception is not None:
        raise result.exception
    return json.loads(result.stdout)


def seen(monkeypatch: pytest.MonkeyPatch) -> dict[int, tuple[int, ...]]:
    """The samples that the trainer takes from here on, by step."""
    from lapis.train.pretrain import Pretraining

    taken: dict[int, tuple[int, ...]] = {}
    whole = Pretraining.step

    def noted(self: Pretraining, step: int, rank: int, ranks: int) -> Any:
        batch = whole(self, step, rank, ranks)
        taken[step] = batch.samples
        return batch

    monkeypatch.setattr(Pretraining, "step", noted)
    return taken


def test_a_changed_mixture_is_a_new_recorded_segment(
    sources: Path, home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = seen(monkeypatch)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(recipe_text(sources, "changed", OLD))
    assert lapis_train(recipe)["step"] == 12
    unbroken = dict(taken)
    run = Run.find(home, "last")
    _forget_after(run, 8)  # as if it had been killed after its checkpoint of step 8

    recipe.write_text(recipe_text(sources, "changed", NEW))
    with pytest.raises(ConflictError, match=r"web 0\.75, mail 0\.25; the recipe says web 0\.25, mail 0\.75"):
        lapis_train(recipe)
    recipe.write_text(recipe_text(sources, "changed", None))
    with pytest.raises(ConflictError, match="does not go back to no mixture"):
        lapis_train(recipe, "--new-segment")
    recipe.write_text(recipe_text(sources, "changed", NEW))
    taken.clear()
    assert lapis_train(recipe, "--new-segment")["id"] == run.id
    assert sorted(taken) == [8, 9, 10, 11]  # what came before step 8 stays as it was
    assert taken[8] != unbroken[8]
    assert [(one.from_step, dict(one.weights)) for one in segments_of_run(run)] == [(0, OLD), (8, NEW)]
    assert run.events.read("segment")[0]["from_step"] == 8
    states = {one.step: load(one, {}).state["segments"] for one in listing(run.checkpoints)[0]}
    assert {step: [one["from_step"] for one in told] for step, told in states.items()} == {
        4: [0],
        8: [0],
        12: [0, 8],
    }
    before = run.events.read()
    lapis_train(recipe)  # the mixture is the run's own now: nothing to refuse
    assert run.events.read() == before

    shown = CliRunner().invoke(runs_group, ["show", run.id, "--json"], catch_exceptions=False)
    consumed = {row["source"]: row["tokens"] for row in json.loads(shown.stdout)["consumed"]}
    assert consumed == {"web": (8 * 3 + 4) * 32, "mail": (8 + 4 * 3) * 32}
    text = CliRunner().invoke(runs_group, ["show", run.id], catch_exceptions=False).stdout
    assert "from step 8: " in text
    assert "58.3%  web" in text


def test_a_run_without_a_mixture_can_be_given_one(
    sources: Path, home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = seen(monkeypatch)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(recipe_text(sources, "plain", None))
    lapis_train(recipe)
    run = Run.find(home, "last")
    _forget_after(run, 4)
    plain = dict(taken)
    recipe.write_text(recipe_text(sources, "plain", NEW))
    with pytest.raises(ConflictError, match="has the mixture none"):
        lapis_train(recipe)
    lapis_train(recipe, "--new-segment")
    count = max(max(samples) for samples in plain.values())
    assert all(min(taken[step]) > count for step in range(4, 12))
    assert Counter(len(taken[step]) for step in range(12)) == {4: 12}


def test_a_finished_run_is_not_touched_by_another_mixture(sources: Path, home: Home, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(recipe_text(sources, "finished", OLD, steps=2))
    first = lapis_train(recipe)
    recipe.write_text(recipe_text(sources, "finished", NEW, steps=2))
    second = lapis_train(recipe)
    assert second["id"] != first["id"]
    begun = Run.open(home, first["id"])
    settle(begun, recipe_of(begun), False)  # the first one's own mixture: nothing to say


def _forget_after(run: Run, step: int) -> None:
    import shutil

    kept = [event for event in run.events.read() if event["event"] != "end" and event.get("step", 0) <= step]
    run.events.path.write_text("".join(json.dumps(event) + "\n" for event in kept))
    for checkpoint in listing(run.checkpoints)[0]:
        if checkpoint.step > step:
            shutil.rmtree(checkpoint.folder)
