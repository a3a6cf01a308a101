"""A small run, really trained: listed, shown, drawn, measured, and measured again as a release."""

from __future__ import annotations

import asyncio
import inspect
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from lapis import config
from lapis.cli.evaluate import command as evaluate_command
from lapis.cli.runs import group as runs_group
from lapis.data.pipeline import prepare
from lapis.db import open_database
from lapis.errors import ConflictError, InputError, NotFoundError
from lapis.evaluate.loss import bits_per_byte, document_losses, one_by_one
from lapis.home import Home
from lapis.inference.engine import LocalEngine
from lapis.model.weights import read_model
from lapis.release.registry import Registry
from lapis.train.export import exported_run
from lapis.train.pretrain import Pretraining
from lapis.train.recipe import Recipe
from lapis.train.run import Run
from lapis.train.trainer import find_or_create, train

STEPS = 12


@dataclass(frozen=True)
class Trained:
    home: Home
    run: Run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A dozen steps of the tiny model on one package of the standard library."""
    home = Home(tmp_path_factory.mktemp("home"))
    values = {
        "name": "tiny",
        "data": {
            "sources": [{"path": str(Path(inspect.getfile(asyncio)).parent), "licence": "PSF-2.0"}],
            "heldout": {"fraction": 0.05},
        },
        "tokenizer": {"vocab_size": 512},
        "model": {"name": "tiny"},
        "train": {
            "steps": STEPS,
            "sequence": 64,
            "batch": 4,
            "samples": {"prompts": ["import os"], "tokens": 8},
        },
    }
    recipe = config.parse(values, Recipe)
    dataset = prepare(recipe.sources, recipe.tokenizer, home, workers=1)
    objective = Pretraining(recipe.train, dataset)
    run = find_or_create(home, recipe, config.to_toml(recipe), objective)
    train(recipe, objective, run)
    return Trained(home, run)


def call(trained: Trained, command: Any, *arguments: str) -> str:
    """What a command prints; its error is raised, as in `lapis`."""
    result = CliRunner(env={"LAPIS_HOME": str(trained.home.root)}).invoke(
        command, list(arguments), catch_exceptions=False, standalone_mode=False
    )
    return str(result.stdout)


def test_list_and_show_tell_the_same_facts(trained: Trained) -> None:
    (listed,) = json.loads(call(trained, runs_group, "list", "--json"))
    shown = json.loads(call(trained, runs_group, "show", "last", "--json"))
    assert listed.items() <= shown.items()
    assert (listed["id"], listed["status"], listed["step"]) == (trained.run.id, "finished", STEPS)
    assert shown["start"]["kernels"]
    assert shown["last_step"]["tokens"] == STEPS * 64 * 4
    goodput = shown["goodput"]
    assert goodput["productive_s"] + sum(goodput["lost_s"].values()) == pytest.approx(
        goodput["wall_s"], abs=0.1
    )
    assert 0 < goodput["ratio"] < 1
    assert 50e6 < shown["last_step"]["memory"] < 1e11
    assert f"{goodput['ratio']:.1%} of" in call(trained, runs_group, "show", "last")
    assert [item["step"] for item in shown["checkpoints"]] == [STEPS]
    plain = call(trained, runs_group, "list")
    assert trained.run.id in plain
    assert "finished" in plain


def test_show_draws_the_curve_and_names_the_next_commands(trained: Trained) -> None:
    text = call(trained, runs_group, "show", "tiny")
    assert "loss, nats per token" in text
    assert any(0x2800 < ord(char) < 0x2900 for char in text)
    assert f"step {STEPS}" in text
    assert f"lapis runs plot {trained.run.id}" in text


def test_show_has_what_the_model_wrote_last(trained: Trained) -> None:
    last = json.loads(call(trained, runs_group, "show", "last", "--json"))["samples"]
    assert (last["step"], last["samples"][0]["prompt"]) == (STEPS, "import os")
    trained.run.events.write(
        "samples", step=STEPS, samples=[{"prompt": "a\nb", "text": "\x1b[2Jc", "reward": 0.5}]
    )
    text = call(trained, runs_group, "show", "last")
    lines = [line.strip() for line in text.splitlines()]
    start = lines.index(f"samples      of step {STEPS}:")
    assert lines[start + 1 : start + 4] == ["› a", "› b", "[2Jc   reward 0.5"]
    assert "\x1b" not in text


def test_plot_writes_the_picture_where_asked(trained: Trained, tmp_path: Path) -> None:
    out = tmp_path / "curve.png"
    facts = json.loads(call(trained, runs_group, "plot", "last", "--out", str(out), "--json"))
    assert facts["file"] == str(out)
    assert out.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InputError, match="cannot be written"):
        call(trained, runs_group, "plot", "last", "--out", str(tmp_path / "absent" / "curve.png"))


def test_a_damaged_checkpoint_is_told(trained: Trained, tmp_path: Path) -> None:
    copy = Trained(Home(tmp_path), Run(tmp_path / "runs" / trained.run.id))
    shutil.copytree(trained.run.folder, copy.run.folder, dirs_exist_ok=True)
    manifest = next(copy.run.checkpoints.glob("step-*/manifest.json"))
    manifest.write_text(manifest.read_text().replace("model", "modem", 1))
    assert "does not match its own digest" in call(copy, runs_group, "show", "last")
    with pytest.raises(ConflictError, match="has no checkpoint"):
        call(copy, evaluate_command, "last")


def test_unknown_names_and_a_run_without_steps_are_clear_errors(trained: Trained, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no run 'tony'"):
        call(trained, runs_group, "show", "tony")
    with pytest.raises(NotFoundError, match="no run and no model 'tony'"):
        call(trained, evaluate_command, "tony")
    empty = Trained(Home(tmp_path), Run.create(Home(tmp_path), "new", "", "0" * 64))
    with pytest.raises(ConflictError, match="no steps"):
        call(empty, runs_group, "plot", "last")
    assert "stopped" in call(empty, runs_group, "show", "last")
    assert "No runs" in call(Trained(Home(tmp_path / "nothing"), trained.run), runs_group, "list")


def test_evaluate_keeps_in_the_run_what_the_engine_measures_too(trained: Trained) -> None:
    """Batched scorer and serving engine give the same numbers, from checkpoint and from exported weights."""
    report = json.loads(call(trained, evaluate_command, "last", "--json"))
    assert trained.run.evaluation() == report
    assert report["subject"] == f"{trained.run.id} at step {STEPS}"
    assert report["yardstick_tokens"] == STEPS * 64 * 4
    assert set(report["yardsticks"]) == {"5-gram", "xz -9e"}
    assert 0 < report["low"] <= report["bits_per_byte"] <= report["high"] < 8
    assert "bits per byte" in call(trained, runs_group, "show", "last")

    with exported_run(trained.home, trained.run.id) as exported:
        loaded = read_model(exported.folder)
        dataset = Path(trained.run.events.read("start")[0]["dataset"])
        lines = (dataset / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
        texts = [json.loads(line)["text"] for line in lines]
        engine = LocalEngine(loaded, "tiny")
        try:
            score = one_by_one(engine.score)
            losses = document_losses(texts, loaded.tokenizer, score, loaded.config.context)
        finally:
            engine.close()
    if report["bit_exact"]:
        assert bits_per_byte(losses) == report["bits_per_byte"]
    assert bits_per_byte(losses) == pytest.approx(report["bits_per_byte"], rel=1e-3)


def test_a_draft_release_is_measured_on_the_data_of_its_run(trained: Trained, tmp_path: Path) -> None:
    registry = Registry(trained.home, open_database(trained.home.database_url))
    with exported_run(trained.home, trained.run.id) as exported:
        registry.create("tiny-release", exported.folder, trained.run.id, None, "tester", exported.lineage)
        shutil.copytree(exported.folder, tmp_path / "folder")
    text = call(trained, evaluate_command, "tiny-release")
    assert "Kept with tiny-release:1" in text
    release = registry.show("tiny-release")
    assert release.state == "evaluated"
    assert release.report is not None
    assert release.report["weights"] == release.digest

    with pytest.raises(InputError, match="on which dataset") as caught:
        call(trained, evaluate_command, str(tmp_path / "folder"))
    assert "--data" in caught.value.hint
    data = Path(trained.run.events.read("start")[0]["dataset"]).name
    again = json.loads(call(trained, evaluate_command, str(tmp_path / "folder"), "--data", data, "--json"))
    assert again["bits_per_byte"] == release.report["bits_per_byte"]
