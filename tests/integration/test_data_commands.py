"""`lapis data` and `lapis tokenizer`: what they print, as tables and as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from lapis.cli import data, tokenizer
from lapis.data.shards import Dataset
from lapis.errors import ConfigError, InputError, NotFoundError
from lapis.home import Home
from lapis.tokenizer.bpe import Tokenizer
from tests.texts import changed, prose, write_corpus


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    write_corpus(tmp_path / "text", 60)
    path = tmp_path / "recipe.toml"
    source = f'[[data.sources]]\npath = "{tmp_path / "text"}"\nlicence = "CC-BY-4.0"\n'
    path.write_text(
        f"{source}[data.heldout]\nmin_bytes = 2000\n[tokenizer]\nvocab_size = 400\n[train]\nsteps = 1\n"
    )
    return path


def run(command: Any, *arguments: str, text: str | None = None) -> str:
    result = CliRunner().invoke(command, arguments, input=text, catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def test_prepare_prints_a_row_a_step_and_where_the_dataset_lies(recipe: Path) -> None:
    lines = run(data.group, "prepare", str(recipe), "--workers", "1").splitlines()
    assert [line.split()[0] for line in lines[:11]] == [
        "step", "list", "read", "repair", "sketch", "quality", "pii", "dedup", "split", "tokenizer", "encode",
    ]  # fmt: skip
    folder = lines[-1].removeprefix("The dataset lies in ")
    assert Dataset.open(Path(folder)).manifest["documents"] > 50


def test_prepare_as_json_and_with_settings(recipe: Path) -> None:
    facts = json.loads(run(data.group, "prepare", str(recipe), "--json", "--set", "tokenizer.vocab_size=300"))
    assert facts["statistics"]["vocabulary"] == 300
    assert facts["digest"] == Dataset.open(Path(facts["folder"])).digest
    assert [step["step"] for step in facts["steps"]][-1] == "encode"
    with pytest.raises(ConfigError, match="Did you mean 'vocab_size'"):
        run(data.group, "prepare", str(recipe), "--set", "tokenizer.vocabsize=300")
    with pytest.raises(InputError, match="no file or folder"):
        run(data.group, "prepare", str(recipe), "--set", 'data.sources=[{path="/nowhere/at/all"}]')


def test_rules_shows_what_each_costs_and_what_other_thresholds_would_without_making_anything(
    recipe: Path, home: Home
) -> None:
    with pytest.raises(NotFoundError, match="Not there yet: documents"):
        run(data.group, "rules", str(recipe))
    text = recipe.parent / "text"
    (text / "short.txt").write_text("Three words only.")
    (text / "near.txt").write_text(changed(prose(9), 1, 0.06))
    facts = json.loads(run(data.group, "prepare", str(recipe), "--json"))
    before = sorted(home.data.iterdir())
    found = json.loads(run(data.group, "rules", str(recipe), "--set", "data.dedup.threshold=0.95", "--json"))
    assert before == sorted(home.data.iterdir())
    kept = found["present"]["kept"]
    assert kept["documents"] == facts["statistics"]["documents"]
    assert kept["tokens"] == pytest.approx(facts["statistics"]["tokens"], rel=0.001)
    present, other = ({row["reason"]: row for row in found[key]["reasons"]} for key in ("present", "changed"))
    short = present["too few words"]
    assert (short["documents"], short["alone_documents"], short["bytes"]) == (1, 1, 17)
    assert present["near-duplicate"]["documents"] == 1
    assert other["near-duplicate"]["documents"] == 0
    assert found["changed"]["kept"]["documents"] != kept["documents"]
    shown = run(data.group, "rules", str(recipe), "--set", "data.dedup.threshold=0.95")
    assert "near-duplicate" in shown and "trained on" in shown and "as in the prepared dataset" in shown
    with pytest.raises(NotFoundError, match="change what is measured"):
        run(data.group, "rules", str(recipe), "--set", "data.document_chars=1000")


def test_preview_prints_what_it_predicts_and_leaves_nothing(recipe: Path, home: Home) -> None:
    shown = run(data.group, "preview", str(recipe), "--workers", "1")
    assert "training tokens" in shown and "documents kept" in shown
    assert [path.name for path in home.data.iterdir()] == []


def test_inspect_shows_licences_statistics_and_documents(recipe: Path) -> None:
    with pytest.raises(NotFoundError, match="not prepared") as caught:
        run(data.group, "inspect", str(recipe))
    assert caught.value.hint == f"lapis data prepare {recipe}"
    folder = json.loads(run(data.group, "prepare", str(recipe), "--json"))["folder"]
    shown = run(data.group, "inspect", str(recipe))
    assert "CC-BY-4.0" in shown
    assert "bytes per token" in shown
    assert shown.count("--- text: ") == 3
    facts = json.loads(run(data.group, "inspect", folder, "--json", "--documents", "2"))
    texts = [prose(n) for n in range(60)]
    assert len(facts["documents_shown"]) == 2
    assert all(any(text.startswith(one["text"][:100]) for text in texts) for one in facts["documents_shown"])


def test_a_tokenizer_is_trained_and_encodes_text_and_standard_input(tmp_path: Path) -> None:
    write_corpus(tmp_path / "text", 10)
    out = tmp_path / "tokenizer.json"
    facts = json.loads(
        run(tokenizer.group, "train", str(tmp_path / "text"), "--vocab", "350", "--out", str(out), "--json")
    )
    assert facts["entries"] == 350
    assert facts["documents"] == 10
    loaded = Tokenizer.load(out)
    answer = json.loads(run(tokenizer.group, "encode", str(tmp_path), "dé", "--json"))
    assert answer["ids"] == loaded.encode("dé")
    piped = json.loads(
        run(tokenizer.group, "encode", str(out), "-", "--special", "--json", text="a<|im_end|>")
    )
    assert piped["ids"] == [*loaded.encode("a"), 2]
    assert "bytes per token" in run(tokenizer.group, "encode", str(out), "hello")
