"""Which documents a step of a run read, which checkpoints have read a document, and the data without it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from lapis import config
from lapis.cli.data import group
from lapis.data.pipeline import find, prepare
from lapis.data.remove import Removal
from lapis.data.shards import Dataset
from lapis.data.trace import trace
from lapis.errors import InputError, NotFoundError
from lapis.home import Home
from lapis.train.pretrain import Pretraining
from lapis.train.recipe import Recipe
from lapis.train.run import Run
from lapis.train.trainer import find_or_create, train
from lapis.train.uses import pieces_of_step, uses
from tests.corpus import write_corpus

STEPS, SEQUENCE, BATCH = 60, 32, 2


@dataclass(frozen=True)
class Trained:
    home: Home
    recipe: Recipe
    path: Path  # of the recipe
    dataset: Dataset
    runs: dict[str, Run]
    read: dict[str, dict[int, list[int]]]  # by run and step, the ids that the trainer was given


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Two runs of 60 steps with a checkpoint every 20, one of them on a mixture."""
    folder, home = tmp_path_factory.mktemp("texts"), Home(tmp_path_factory.mktemp("home"))
    for name, packages in (("web", ("http", "wsgiref")), ("mail", ("email",))):
        (folder / name).mkdir()
        write_corpus(folder / name, packages)
    values: dict[str, Any] = {
        "name": "plain",
        "data": {
            "sources": [{"path": str(folder / name), "licence": name.upper()} for name in ("web", "mail")],
            "heldout": {"max_bytes": 20_000},
        },
        "tokenizer": {"vocab_size": 512},
        "model": {"name": "tiny"},
        "train": {"steps": STEPS, "sequence": SEQUENCE, "batch": BATCH, "warmup": 2},
        "checkpoint": {"steps": 20, "keep": 9},
    }
    plain = config.parse(json.loads(json.dumps(values)), Recipe)
    mixture = {"segments": [{"weights": {"web": 1, "mail": 0}, "share": 0.5},
                            {"weights": {"web": 1, "mail": 1}, "share": 0.5}]}  # fmt: skip
    mixed = config.parse({**values, "name": "mixed", "data": {**values["data"], "mixture": mixture}}, Recipe)
    dataset = prepare(plain.sources, plain.tokenizer, home, workers=1)
    runs, read = {}, {}
    for recipe in (plain, mixed):
        objective = Noted(recipe.train, dataset, recipe.mixture)
        run = find_or_create(home, recipe, config.to_toml(recipe), objective)
        runs[recipe.name], read[recipe.name] = train(recipe, objective, run), objective.read
    path = folder / "recipe.toml"
    path.write_text(config.to_toml(plain))
    return Trained(home, plain, path, dataset, runs, read)


class Noted(Pretraining):
    """Pretraining that notes what it gave to the trainer."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.read: dict[int, list[int]] = {}

    def step(self, step: int, rank: int, ranks: int) -> Any:
        batch = super().step(step, rank, ranks)
        self.read[step] = np.concatenate([micro.ids_T for micro in batch.micros]).tolist()
        return batch


@pytest.fixture(autouse=True)
def _home(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAPIS_HOME", str(trained.home.root))


def data(*arguments: str) -> Any:
    result = CliRunner().invoke(group, [*arguments, "--json"])
    if result.exception is not None:
        raise result.exception
    return json.loads(result.stdout)


def stream_ids(dataset: Dataset, document: dict[str, Any]) -> list[int]:
    return dataset.read(document["start"], document["of"]).tolist()


@pytest.mark.parametrize("name", ["plain", "mixed"])
def test_the_trace_of_a_step_is_what_the_trainer_read(name: str, trained: Trained) -> None:
    for step in (0, 31, STEPS - 1):
        told = data("trace", trained.runs[name].id, "--step", str(step))
        assert told["tokens"] == SEQUENCE * BATCH == sum(row["tokens"] for row in told["licences"])
        read = trained.read[name][step]
        for document in told["documents"]:  # a stretch of so many of its tokens is in the batch
            ids, count = stream_ids(trained.dataset, document), document["tokens"]
            stretches = {tuple(ids[n : n + count]) for n in range(len(ids) - count + 1)}
            assert any(tuple(read[n : n + count]) in stretches for n in range(len(read))) or count > SEQUENCE
        assert sum(document["tokens"] for document in told["documents"]) == len(read)
        assert {document["licence"] for document in told["documents"]} == {
            document["source"].upper() for document in told["documents"]
        }
    if name == "mixed":
        early = data("trace", trained.runs[name].id, "--step", "29")
        assert [row["source"] for row in early["licences"]] == ["web"]


def test_a_step_that_was_not_done_and_a_question_without_answer_are_refused(trained: Trained) -> None:
    with pytest.raises(InputError, match="has done 60 steps"):
        data("trace", trained.runs["plain"].id, "--step", "60")
    with pytest.raises(InputError, match="a range of tokens or a step"):
        data("trace", trained.runs["plain"].id)
    ranged = data("trace", str(trained.path), "10:400")
    assert sum(document["tokens"] for document in ranged["documents"]) == 390
    text = CliRunner().invoke(group, ["trace", str(trained.dataset.folder), "10:400"]).stdout
    assert all(document["path"] in text for document in ranged["documents"])


@pytest.mark.parametrize("name", ["plain", "mixed"])
def test_the_checkpoints_that_read_a_document_are_told_exactly(name: str, trained: Trained) -> None:
    dataset, run = trained.dataset, trained.runs[name]
    entries = [entry for n in range(len(dataset.manifest["shards"])) for entry in dataset.documents_of(n)]
    read_by_step = [
        {one.document.id for one in trace(dataset, pieces_of_step(run, dataset, step))}
        for step in range(STEPS)
    ]
    firsts = {
        entry: next((step for step, ids in enumerate(read_by_step) if entry.id in ids), None)
        for entry in entries
    }
    never = [entry for entry, first in firsts.items() if first is None]
    read = sorted(
        (entry for entry, first in firsts.items() if first is not None), key=lambda e: firsts[e] or 0
    )
    for entry in (*never[:2], *read[:: len(read) // 5], read[-1]):
        first = firsts[entry]
        (told,) = [use for use in uses(trained.home, [Removal(document=entry.id)]) if use.run == run.id]
        assert told.checkpoints == tuple(step for step in (20, 40, 60) if first is not None and step > first)
        assert told.first_step == first or (first is None and (told.first_step or STEPS) >= STEPS)
    assert never
    assert (firsts[read[-1]] or 0) > 20  # a checkpoint that did not read it is among them
    of_mail = {use["run"]: use for use in data("remove", run.id, "--source", "mail", "--dry-run")["runs"]}
    assert of_mail[trained.runs["mixed"].id]["checkpoints"] == [40, 60]
    assert of_mail[trained.runs["plain"].id]["checkpoints"] == [20, 40, 60]


def test_what_is_removed_stays_out_of_the_recipe(trained: Trained) -> None:
    with pytest.raises(NotFoundError, match="No document of .* is the text nothing"):
        data("remove", str(trained.path), "--document", "nothing")
    with pytest.raises(InputError, match="Nothing is named"):
        data("remove", str(trained.path))
    entry = trained.dataset.document_of(1000)
    told = data("remove", str(trained.path), "--document", entry.id)
    new = Dataset.open(Path(told["new"]["folder"]))
    assert new.tokens == trained.dataset.tokens - entry.tokens
    needle = trained.dataset.read(entry.start, entry.tokens).tobytes()
    assert needle in trained.dataset.read(0, trained.dataset.tokens).tobytes()
    assert needle not in new.read(0, new.tokens).tobytes()
    recipe = trained.recipe
    assert find(recipe.sources, recipe.tokenizer, trained.home).digest == new.digest
    assert prepare(recipe.sources, recipe.tokenizer, trained.home, workers=1).digest == new.digest
    text = CliRunner().invoke(group, ["remove", str(trained.path), "--source", "mail"]).stdout
    assert "the checkpoints 40, 60 contain them" in text
    after = prepare(recipe.sources, recipe.tokenizer, trained.home, workers=1)
    assert {row["source"] for row in after.manifest["licences"]} == {"web"}
    assert after.manifest["parent"] == trained.dataset.digest
    assert Dataset.open(trained.dataset.folder).digest == trained.dataset.digest  # the old one is as it was
