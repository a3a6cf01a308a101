"""The learned quality score: it tells good texts from bad ones, the same way every time, and decides in a recipe."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from lapis.cli.data import group
from lapis.data.document import Document, Kind
from lapis.data.recipe import ScoreConfig
from lapis.data.score import (
    Classifier,
    ScoreAnnotator,
    area_under_curve,
    probability,
    score_rules,
    train,
)
from lapis.data.words import Words, split_words
from lapis.errors import InputError
from tests.attributes import reasons
from tests.texts import prose

GOOD = [prose(n, 40) for n in range(60)]
SPAM = [
    "buy",
    "cheap",
    "click",
    "here",
    "now",
    "free",
    "offer",
    "best",
    "price",
    "win",
    "cash",
    "today",
    "only",
]


def spam(seed: int) -> str:
    return " ".join(random.Random(seed).choices(SPAM, k=40)) + "!\n"


BAD = [spam(n) for n in range(60)]


def words(texts: list[str]) -> list[Words]:
    return [split_words(texts[n : n + 7]) for n in range(0, len(texts), 7)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "spam.safetensors"
    train(words(GOOD), words(BAD)).classifier.save(path)
    return path


def test_good_texts_score_high_and_bad_ones_low(model: Path) -> None:
    found = Classifier.load(model)
    assert (found.score(split_words([prose(n, 40) for n in range(100, 120)])) > 0.5).all()
    assert (found.score(split_words([spam(n) for n in range(100, 120)])) < 0.2).all()


def test_what_is_measured_on_held_out_texts_is_said() -> None:
    found = train(words(GOOD), words(BAD))
    assert (found.trained, found.heldout, found.auc, found.accuracy) == (108, 12, 1.0, 1.0)
    mixed = GOOD + BAD
    random.Random(1).shuffle(mixed)
    assert 0.1 < train(words(mixed[:60]), words(mixed[60:])).auc < 0.9  # nothing to learn


def test_one_seed_gives_one_model_and_another_seed_another() -> None:
    first, again, other = (train(words(GOOD), words(BAD), seed=seed).classifier for seed in (0, 0, 1))
    assert (first.scale, first.bias, first.weights.tobytes()) == (
        again.scale,
        again.bias,
        again.weights.tobytes(),
    )
    assert first.weights.tobytes() != other.weights.tobytes()


def test_a_score_does_not_depend_on_the_documents_around_it(model: Path) -> None:
    found = Classifier.load(model)
    texts = ["", GOOD[0], "one", BAD[0], "", "two words", ""]
    together = found.score(split_words(texts))
    assert together.tobytes() == b"".join(found.score(split_words([text])).tobytes() for text in texts)


def test_probabilities_are_those_of_the_logistic_function() -> None:
    odds = np.linspace(-39, 39, 1001)
    assert np.allclose(probability(odds), 1 / (1 + np.exp(-odds)), rtol=1e-12, atol=0)


def test_the_area_under_the_curve_counts_ordered_pairs() -> None:
    truth = np.array([True, True, False, False])
    assert area_under_curve(np.array([3.0, 1.0, 2.0, 0.0]), truth) == 0.75
    assert area_under_curve(np.zeros(4), truth) == 0.5


def test_a_recipe_keeps_by_score_or_by_share(model: Path) -> None:
    def judged(kind: Kind = "prose", **limits: float) -> list[str]:
        config = ScoreConfig(model=str(model), **limits)
        documents = [Document(text, "s", "p", "", kind) for text in [*GOOD[:3], *BAD[:5]]]
        return reasons(documents, ScoreAnnotator.of(config), score_rules(config))

    assert judged(min_score=0.5) == [""] * 3 + ["low score"] * 5
    assert judged(keep=0.25).count("") == 2
    assert judged(keep=0.001).count("") == 1
    assert judged() == [""] * 8
    assert judged("code", min_score=0.5) == [""] * 8


def test_too_few_examples_and_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="19 good texts"):
        train(words(GOOD[:19]), words(BAD))
    (tmp_path / "x").write_bytes(b"no model")
    for name in ("x", "missing"):
        with pytest.raises(InputError, match="classifier"):
            ScoreAnnotator.of(ScoreConfig(model=str(tmp_path / name)))


def test_the_command_learns_from_files(tmp_path: Path) -> None:
    for name, texts in (("good", GOOD), ("bad", BAD)):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (tmp_path / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    out = tmp_path / "model"
    options = [
        "--good",
        str(tmp_path / "good.jsonl"),
        "--bad",
        str(tmp_path / "bad.jsonl"),
        "--out",
        str(out),
    ]
    result = CliRunner().invoke(group, ["classifier", "train", *options, "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.output) == {
        "model": str(out),
        "trained": 108,
        "heldout": 12,
        "auc": 1.0,
        "accuracy": 1.0,
    }
    assert Classifier.load(out).score(split_words([GOOD[0]]))[0] > 0.5
