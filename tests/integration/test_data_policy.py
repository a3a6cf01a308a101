"""What must not be trained on, through the whole pipeline: personal data, evaluation items, licences."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from lapis.config import parse
from lapis.data.pipeline import prepare
from lapis.data.recipe import DataConfig, TokenizerConfig
from lapis.data.shards import Dataset
from lapis.errors import InputError
from lapis.home import Home

VOCABULARY = [
    f"{a}{b}{c}" for a in ("ba", "ke", "lo", "mi", "ru") for b in ("d", "n", "st") for c in ("ar", "el", "y")
]
SECRET = "q8Zt4Lw0Xe7Rb2Vn5Ks9"
SMALL = TokenizerConfig(vocab_size=300)


def prose(seed: int, words: int = 300) -> str:
    chance = random.Random(seed)
    return " ".join(chance.choice(VOCABULARY) + chance.choice(("", "", ",", ".")) for _ in range(words))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Sixty documents: one with an e-mail address and a token, one with an evaluation item, two by licence."""
    texts = {f"{n}": (prose(n), "MIT") for n in range(56)}
    texts["mail"] = (
        f"{prose(100)} Ask Änne, anne@nordwind.de (anne@nordwind.de); api_key = '{SECRET}'",
        "MIT",
    )
    texts["leak"] = (f"{prose(101)}\n{prose(7_000, 40).upper()}\n{prose(102)}", "MIT")
    texts["gpl"] = (prose(103), "GPL-3.0-only")
    texts["none"] = (prose(104), "")
    rows = [{"id": name, "text": text, "licence": licence} for name, (text, licence) in texts.items()]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    items = [{"question": prose(7_000 + n, 40), "answer": prose(8_000 + n, 5)} for n in range(30)]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in items))
    return tmp_path


def config(folder: Path, **settings: object) -> DataConfig:
    whole = {
        "sources": [{"path": str(folder / "texts.jsonl"), "licence_column": "licence"}],
        "heldout": {"min_bytes": 1_000},
        "dedup": {"near": False},
        "filters": {"enabled": False},
        "decontamination": {
            "sets": [{"path": str(folder / "questions.jsonl"), "columns": ["question", "answer"]}]
        },
        **settings,
    }
    return parse(whole, DataConfig)


def text_of(dataset: Dataset) -> str:
    return dataset.tokenizer.decode(dataset.read(0, dataset.tokens).tolist()) + (
        dataset.folder / "heldout.jsonl"
    ).read_text(encoding="utf-8")


def reasons(dataset: Dataset) -> dict[str, int]:
    return {
        f"{step.step}: {reason}": count for step in dataset.report for reason, count in step.reasons.items()
    }


def test_personal_data_is_masked_evaluation_items_and_denied_licences_are_dropped(folder: Path) -> None:
    wanted = config(folder, licences={"deny": ["copyleft"], "unknown": "drop"})
    dataset = prepare(wanted, SMALL, Home(folder / "home"), workers=1)
    assert reasons(dataset) == {
        "licences: licence not allowed": 1,
        "licences: licence unknown": 1,
        "overlap: holds an evaluation item": 1,
    }
    text = text_of(dataset)
    assert "Ask Änne, <EMAIL_1> (<EMAIL_1>); api_key = '<SECRET_1>'" in text
    assert "nordwind" not in text
    assert SECRET not in text
    policy = dataset.manifest["policy"]
    assert policy["licences"] == {"allow": [], "deny": ["copyleft"], "unknown": "drop"}
    assert policy["pii"]["email"] == "mask"
    gate = policy["decontamination"]["gate"]
    assert gate["passed"] is True
    assert min(gate["recall"].values()) >= 0.95
    assert gate["items"] == 30
    notes = next(step.notes for step in dataset.report if step.step == "overlap")
    assert (notes["gate: items injected"], notes["gate: found rewrapped"]) == (30, 30)
    assert {row["licence"]: row["family"] for row in dataset.manifest["licences"]} == {"MIT": "permissive"}
    assert len(policy["decontamination"]["sets"][0]["sha256"]) == 64


def test_other_actions_remake_what_is_decided_and_annotate_nothing_again(folder: Path) -> None:
    home = Home(folder / "home")
    masked = prepare(config(folder), SMALL, home, workers=1)
    kept = prepare(config(folder, pii={"email": "keep", "secret": "drop"}), SMALL, home, workers=1)
    assert "anne@nordwind.de" not in text_of(masked)
    assert reasons(kept)["pii: holds secret"] == 1
    open_ = prepare(config(folder, pii={"enabled": False}), SMALL, home, workers=1)
    assert "anne@nordwind.de (anne@nordwind.de)" in text_of(open_)
    stages = sorted(path.name.split("-")[0] for path in home.data.iterdir() if path.name != ".locks")
    assert [stages.count(name) for name in ("documents", "pii", "overlap", "split")] == [1, 1, 1, 3]


def test_an_item_that_is_in_many_documents_is_named(folder: Path) -> None:
    rows = [json.loads(line) for line in (folder / "texts.jsonl").read_text().splitlines()]
    for row in rows[:12]:
        row["text"] += "\n" + prose(7_003, 40)
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = prepare(config(folder), SMALL, Home(folder / "home"), workers=1)
    notes = next(step.notes for step in dataset.report if step.step == "overlap")
    assert notes["documents with questions.jsonl#4"] == 12


def test_a_gate_that_fails_ends_the_preparation(folder: Path) -> None:
    blind = config(folder).decontamination.model_dump() | {"ngram": 50, "short": 50}
    with pytest.raises(InputError, match="decontamination gate failed") as failure:
        prepare(config(folder, decontamination=blind), SMALL, Home(folder / "home"), workers=1)
    assert failure.value.hint


def test_lines_that_c4_drops_are_not_trained_on(tmp_path: Path) -> None:
    bad = ["Home | About | Contact", "We use cookies to make this better for you.", "Too short."]
    good = [[f"{prose(100 * n + line, 12).replace('.', '')} here." for line in range(9)] for n in range(12)]
    rows = [{"text": "\n".join([bad[n % 3], *lines, bad[(n + 1) % 3]])} for n, lines in enumerate(good)]
    (tmp_path / "code.py").write_text("def f(x):\n    return {x: 'no line of this ends in a mark'}\n" * 3)
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = [{"path": str(tmp_path / "texts.jsonl")}, {"path": str(tmp_path / "code.py")}]
    settings = {"filters": {"rules": ["c4"]}, "decontamination": {}}
    dataset = prepare(config(tmp_path, sources=sources, **settings), SMALL, Home(tmp_path / "home"))
    text = text_of(dataset)
    assert "return {x: 'no line of this ends in a mark'}" in text
    assert all(lines[0] in text for lines in good)
    assert not any(line in text for line in bad)
